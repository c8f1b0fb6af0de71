"""How many held-out samples learning needs, with a row of weights for the whole model, each layer or each tensor.

    python experiments/held_out_size.py --data DATA --output runs/held-out-size

For each seed, a small BERT is trained on 4,000 sentences of SUBJ (subjective or objective) and fine-tuned eight times
in ways a sweep would try, some of them bad. Weights are learned on 50 to 2,000 other sentences, by the defaults, and
greedy soups chosen on the same. Test sentences are scored once; seeds from 100 on are for development, and test on
others of the training file.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import DEVELOPMENT, arguments, mean_sd, paired, report
from head_translation import make_tokenizer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from transformers import BertConfig, BertForSequenceClassification

import twa_merge as twa
from twa_merge.recipe import DataConfig, Recipe

TRAIN, MEMBERS, LENGTH, VOCABULARY = 4_000, 8, 48, 3_000
SIZES = (50, 100, 200, 500, 1000, 2000)
GRANULARITIES = {"TWA": "model", "TWA by layer": "layer", "TWA by tensor": "tensor"}


class Sentences(nn.Module):
    """A small BERT, from token ids to logits."""

    def __init__(self, width: int) -> None:
        super().__init__()
        config = BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=2 * width,
            max_position_embeddings=LENGTH,
        )
        self.bert = BertForSequenceClassification(config)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.bert(ids, attention_mask=ids != 0).logits
        return logits


def splits(data: Path, seed: int) -> dict[str, TensorDataset]:
    """Return token ids and labels of training, held-out and test sentences."""
    from datasets import load_dataset

    rows = load_dataset("csv", data_files={name: str(data / f"subj/{name}.csv") for name in ("train", "test")})
    order = np.random.default_rng(seed).permutation(len(rows["train"]))
    train, held_out, others = np.split(order, [TRAIN, TRAIN + max(SIZES)])
    parts = {name: rows["train"].select(chosen) for name, chosen in (("train", train), ("held out", held_out))}
    parts["test"] = rows["test"] if seed < DEVELOPMENT else rows["train"].select(others)
    tokenizer = make_tokenizer(list(parts["train"]["text"]), VOCABULARY)
    options = {"padding": "max_length", "truncation": True, "max_length": LENGTH, "return_tensors": "pt"}
    return {
        name: TensorDataset(tokenizer(list(part["text"]), **options)["input_ids"], torch.tensor(list(part["label"])))
        for name, part in parts.items()
    }


def draw(generator: np.random.Generator) -> dict[str, Any]:
    """Draw what a sweep would try."""
    return {
        "lr": float(10 ** generator.uniform(-4.5, -3)),
        "epochs": int(generator.integers(1, 6)),
        "batch": int(generator.choice([16, 32, 64])),
        "weight_decay": float(10 ** generator.uniform(-4, -1)),
        "label_smoothing": float(generator.uniform(0, 0.1)),
        "share": float(generator.uniform(0.4, 1)),
        "seed": int(generator.integers(1 << 30)),
    }


def fine_tune(model: nn.Module, data: TensorDataset, choice: dict[str, Any]) -> None:
    """Train a model on a share of the data, by AdamW with the hyper-parameters drawn."""
    ids, labels = data.tensors
    torch.manual_seed(choice["seed"])
    kept = torch.randperm(len(ids))[: int(choice["share"] * len(ids))]
    optimizer = torch.optim.AdamW(model.parameters(), lr=choice["lr"], weight_decay=choice["weight_decay"])
    steps = choice["epochs"] * -(-len(kept) // choice["batch"])
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 1 / steps, total_iters=steps)
    model.train()
    for _ in range(choice["epochs"]):
        for batch in kept[torch.randperm(len(kept))].split(choice["batch"]):
            logits = model(ids[batch])
            F.cross_entropy(logits, labels[batch], label_smoothing=choice["label_smoothing"]).backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    model.eval()


def make_soup(folder: Path, data: TensorDataset, width: int, seed: int) -> list[Path]:
    """Return members that are fine-tuned from one net."""
    generator = np.random.default_rng(seed)
    torch.manual_seed(seed)
    base = Sentences(width)
    common = {"batch": 32, "weight_decay": 0.01, "label_smoothing": 0.0, "share": 1.0}
    fine_tune(base, data, common | {"lr": 5e-4, "epochs": 4, "seed": seed})
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for k in range(MEMBERS):
        member = Sentences(width)
        member.load_state_dict(base.state_dict())
        fine_tune(member, data, draw(generator))
        paths.append(folder / f"member-{k}.safetensors")
        save_file(member.state_dict(), paths[-1])
    return paths


def run(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Return test losses, and whether what is learned ships, for every size and granularity."""
    parts = splits(args.data, seed)
    soup = twa.Soup(make_soup(args.output / f"soup-{seed}", parts["train"], args.width, seed))
    ids, labels = parts["held out"].tensors
    found: dict[str, Any] = {}
    for size in SIZES:
        known = TensorDataset(ids[:size], labels[:size])
        recipe = Recipe(data=DataConfig(min_select=min(200, size // 2)))
        for name, granularity in GRANULARITIES.items():
            result = twa.train(
                soup, known, module=Sentences(args.width), loss=F.cross_entropy, test=parts["test"], recipe=recipe,
                granularity=granularity, seed=seed,
            )  # fmt: skip
            for candidate in result.league:
                label = name if candidate.learned else candidate.name
                if candidate.learned or label in ("best single", "uniform", "greedy"):
                    found[f"{label}, {size} held out"] = {"loss": candidate.test.loss.value}
            found[f"{name}, {size} held out"] |= {
                "ships": result.verdict.winner.learned, "shipped": result.verdict.winner.test.loss.value
            }  # fmt: skip
    return found


def table(found: list[dict[str, Any]]) -> str:
    """Return all seeds as Markdown: learned and shipped, each against the greedy soup of the same pictures."""
    rows = ["| | test loss | learned - greedy | ships - greedy | learned ships |", "|---|--:|--:|--:|--:|"]
    for name in (name for name, value in found[0].items() if isinstance(value, dict)):
        losses = [seed[name]["loss"] for seed in found]
        greedy = [seed[f"greedy, {name.partition(', ')[2]}"]["loss"] for seed in found]
        shipped = ["", ""]
        if "TWA" in name:
            count = f"{sum(seed[name]['ships'] for seed in found)} of {len(found)}"
            shipped = [paired([seed[name]["shipped"] for seed in found], greedy), count]
        rows.append(f"| {name} | {mean_sd(losses)} | {paired(losses, greedy)} | {' | '.join(shipped)} |")
    return "\n".join(rows)


def plot(found: list[dict[str, Any]], path: Path) -> None:
    """Draw the difference from the greedy soup over the number of held-out samples."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))

    def losses(name: str) -> Any:
        return np.array([[seed[f"{name}, {size} held out"]["loss"] for size in SIZES] for seed in found])

    for k, name in enumerate(("best single", "uniform", *GRANULARITIES)):
        less = losses(name) - losses("greedy")
        error = less.std(axis=0, ddof=1) / len(found) ** 0.5 if len(found) > 1 else 0
        places = np.array(SIZES) * 1.04 ** (k - 2)
        style = "-o" if "TWA" in name else "--s"
        axes.errorbar(places, less.mean(axis=0), error, fmt=style, capsize=2, ms=4, lw=1, color=f"C{k}", label=name)
    axes.axhline(0, color="0.5", lw=1, ls="--", label="greedy")
    axes.set_xscale("log")
    axes.set_xticks(SIZES, [str(size) for size in SIZES])
    axes.set(xlabel="held-out samples", ylabel="test loss less greedy's, ± standard error")
    axes.legend(fontsize=8, loc="center right", bbox_to_anchor=(1, 0.61))
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run all seeds, print the table, draw the plot."""
    parser = arguments(__doc__)
    parser.add_argument("--width", type=int, default=64)
    args = parser.parse_args()
    found = report(args, "held-out-size", lambda seed: run(args, seed), table)
    plot(found, args.output / "held-out-size.png")


if __name__ == "__main__":
    main()
