"""Head of training, pictures (paper, table 2, figure 5, table 8): half of a run and a learned merge, or all of it.

    python experiments/head_images.py --data DATA --output runs/head-resnet --net resnet

A net with BatchNorm is trained on CIFAR-10 (JPEG) by SGD with a learning rate that drops by ten at half and at three
quarters of the run. Its snapshots of a first part of the run are merged along their five largest principal components,
one row for the whole model, on the training data (TWA-t) or on most of the held-out pictures (TWA-v, where the last
layer has a row and a scale of its own; also of the later half of the snapshots, along all deltas), or by fixed weights
(SWA from several starts). Half of the run with a tenth of that for learning is the paper's table 2; two thirds
with 3 % (60 + 2 of 90 epochs) its table 3, where a part of the snapshots are from after the first drop. Test pictures
are scored at the end. Seeds from 100 on are for development, and test on other pictures of the training file; how the
settings came about: docs/method.md. Larger, for a GPU: `--width 64 --pictures 9000 --epochs 160`.

`--control` asks what those labels that TWA-v has and the run has not are worth: the whole run alone, trained on the
held-out pictures too, in as many steps.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import DEVELOPMENT, against, arguments, report
from nets import NETS, WIDTHS, Classifier
from soups.resnet20 import load_pictures
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments, default_data_collator, set_seed

import twa_merge as twa
from twa_merge.assembly import load_merge
from twa_merge.recipe import Recipe
from twa_merge.snapshot_stores import DiskStore

HELD_OUT, TEST = 1_000, 5_000
HEADS = {0.5: 0.1, 2 / 3: 0.03}
"""Shares of the run whose snapshots are merged, and epochs of learning as a share of those."""
MARKERS = {"TWA-t": "o", "TWA-v": "s", "TWA-v of the later half": "D", "SWA": "^", "SWA of the later half": "v"}
"""In the plot."""


class Pictures(torch.utils.data.Dataset[dict[str, Any]]):
    """Normalised pictures; `augment` shifts by up to four pixels and mirrors, anew at every reading."""

    def __init__(self, pixels: Tensor, labels: Tensor, *, augment: bool = False) -> None:
        self.pixels, self.labels, self.augment = pixels, labels, augment
        self.padded = F.pad(pixels, (4, 4, 4, 4)) if augment else pixels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        picture = self.pixels[index]
        if self.augment:
            top, left, mirror = (int(n) for n in torch.randint(0, 9, (3,)))
            picture = self.padded[index, :, top : top + 32, left : left + 32]
            picture = picture.flip(-1) if mirror % 2 else picture
        return {"pixel_values": picture, "labels": self.labels[index]}


def splits(data: Path, seed: int, count: int, control: bool) -> dict[str, Pictures]:
    """Return `count` training pictures as they train and as they are, held-out pictures, and test pictures.

    For the control, those that are held out train too.
    """
    pixels, labels = load_pictures(data / "cifar10/train.parquet")
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(labels)))
    train, held_out, others = order[:count], order[-HELD_OUT:], order[count : count + TEST]
    train = torch.cat([train, held_out]) if control else train
    test = load_pictures(data / "cifar10/test.parquet") if seed < DEVELOPMENT else (pixels[others], labels[others])
    return {
        "train": Pictures(pixels[train], labels[train], augment=True),
        "train as it is": Pictures(pixels[train], labels[train]),
        "held out": Pictures(pixels[held_out], labels[held_out]),
        "test": Pictures(*test),
    }


@torch.no_grad()
def score(module: nn.Module, pictures: Pictures) -> dict[str, float]:
    """Return loss and accuracy."""
    module.eval()
    device = next(module.parameters()).device
    logits = torch.cat([module(chunk.to(device))["logits"].cpu() for chunk in pictures.pixels.split(500)])
    accuracy = (logits.argmax(dim=1) == pictures.labels).float().mean()
    return {"loss": float(F.cross_entropy(logits, pictures.labels)), "accuracy": float(accuracy)}


def scores(module: nn.Module, parts: dict[str, Pictures]) -> dict[str, Any]:
    """Return test scores and the generalisation gap: training accuracy less test accuracy."""
    test, train = score(module, parts["test"]), score(module, parts["train as it is"])
    return test | {"gap": train["accuracy"] - test["accuracy"]}


class Epochs(twa.SnapshotCallback):
    """Snapshots of every few epochs, and the test accuracy at each: for the plot alone."""

    def __init__(self, folder: Path, parts: dict[str, Pictures], every: int) -> None:
        super().__init__(every_n_epochs=every, folder=folder, overwrite=True)
        self.parts, self.curve = parts, []

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_epoch_end(args, state, control, **kwargs)
        if round(state.epoch) % self.every_n_epochs == 0:
            self.curve.append({"epoch": round(state.epoch)} | score(kwargs["model"], self.parts["test"]))
            kwargs["model"].train()


def folder_of(args: Any, seed: int) -> Path:
    """Return the folder of a seed's run."""
    return Path(args.output / f"{name_of(args)}-{seed}")


def name_of(args: Any) -> str:
    """Return what the JSON, the table and the runs are called."""
    return f"{args.net}-control" if args.control else str(args.net)


def make_trainer(args: Any, seed: int, parts: dict[str, Pictures], epochs: int) -> tuple[Trainer, Epochs]:
    """Return the trainer of the full run."""
    set_seed(seed)
    model = Classifier(args.net, args.width)
    steps = -(-len(parts["train"]) // args.batch_size) * epochs
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, weight_decay=5e-4)
    drops = [round(steps * args.first_drop), round(steps * (1 + args.first_drop) / 2)]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, drops, gamma=0.1)
    folder = folder_of(args, seed)
    settings = TrainingArguments(
        str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=500,
        seed=seed,
        save_strategy="no",
        logging_strategy="epoch",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        max_grad_norm=0,
        disable_tqdm=True,
    )
    callback = Epochs(folder / "snapshots", parts, args.every)
    trainer = Trainer(
        model,
        settings,
        train_dataset=parts["train"],
        eval_dataset=parts["held out"],
        data_collator=default_data_collator,
        optimizers=(optimizer, schedule),
        callbacks=[callback],
    )
    return trainer, callback


def merged(args: Any, trainer: Trainer, parts: dict[str, Pictures], snapshots: list[Path], **options: Any) -> Any:
    """Return a finished run, its learned table put into the model whatever the verdict, and its cost."""
    start = time.perf_counter()
    result = twa.finish(
        trainer,
        snapshots,
        task=twa.module_task(F.cross_entropy),
        recipe=Recipe(margin=-1e9, eval_batch_size=500),
        batch_size=args.batch_size,
        **options,
    )
    seconds = time.perf_counter() - start
    learned = next(c for c in result.league if c.learned)
    found = scores(trainer.model, parts) | {"seconds": seconds, "learning seconds": result.seconds["learning"]}
    fixed = {
        c.name: {"select": c.select.loss.value, "select accuracy": c.select.metric("accuracy").value}
        for c in result.league
    }
    return found | {"select": learned.select.loss.value, "league": fixed, "passes": learned.passes}


def fixed_merge(trainer: Trainer, parts: dict[str, Pictures], snapshots: list[Path], first: int) -> dict[str, Any]:
    """Return the scores of the plain average of the snapshots from `first` on (SWA), statistics recomputed."""
    from twa_merge import buffers

    soup = twa.Soup(snapshots)
    load_merge(trainer.model, soup, twa.last_k(len(soup) - first, soup.labels))
    torch.manual_seed(0)
    pixels = torch.stack([row["pixel_values"] for row in parts["train"]])
    buffers.recompute(trainer.model, pixels.split(500), lambda module, batch: module(batch.to(trainer.args.device)))
    return scores(trainer.model, parts)


def run(args: Any, seed: int) -> dict[str, Any]:
    """Train once, unless that is done; merge the snapshots of first parts of the run."""
    parts = splits(args.data, seed, args.pictures, args.control)
    # the control takes as many steps, in fewer epochs of more pictures; the last is one with a snapshot
    epochs = args.every * round(args.epochs * args.pictures / len(parts["train"]) / args.every)
    trainer, callback = make_trainer(args, seed, parts, epochs)
    done = folder_of(args, seed) / "curve.json"
    if not done.is_file():
        start = time.perf_counter()
        trainer.train()
        done.write_text(json.dumps({"curve": callback.curve, "training seconds": time.perf_counter() - start}))
    found: dict[str, Any] = json.loads(done.read_text())
    snapshots = list(DiskStore(callback.folder).paths.values())
    load_merge(trainer.model, twa.Soup(snapshots[-1:]), twa.one_hot(0, ["full"]))
    found["full"] = scores(trainer.model, parts)
    if args.control:
        return found
    steps_of_epoch = -(-args.pictures // args.batch_size)
    # along all deltas of all snapshots, or by tensor, what is learned fits the samples it is learned on: docs/method.md
    few: dict[str, Any] = {"directions": "pca", "components": args.components}
    # held-out data ask for less confidence; without a scale of the last layer they get it from blurred features
    last = f"net.{len(trainer.model.net) - 1}.*"
    held_out = {"learn_on": "validation", "granularity": [last, "*"], "linear": True}
    rows: dict[str, dict[str, Any]] = {
        "TWA-t": few | {"learn_on": "train", "granularity": "model"},
        "TWA-v": few | held_out,
        "TWA-v of the later half": held_out,
    }
    for share, learning_share in HEADS.items():
        name, epochs = f"{share:.0%}", round(args.epochs * share)
        chosen = snapshots[: epochs // args.every]
        steps = round(learning_share * epochs * steps_of_epoch)
        learning = {"steps": steps, "lr": args.twa_lr, "evaluations": 8}
        for kind, options in rows.items():
            of = chosen[len(chosen) // 2 :] if kind.endswith("later half") else chosen
            found[f"{name}: {kind}"] = merged(args, trainer, parts, of, **learning, **options)
        found[f"{name}: last snapshot"] = found["curve"][len(chosen) - 1] | {"gap": float("nan")}
        for first in sorted({0, len(chosen) // 2, 3 * len(chosen) // 4}):
            start_epoch = args.every * (first + 1)
            found[f"{name}: SWA from epoch {start_epoch}"] = fixed_merge(trainer, parts, chosen, first)
    return found


def plot(found: list[dict[str, Any]], args: Any, path: Path) -> None:
    """Draw test accuracy and loss over epochs, with what the merges reach (figure 5)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, both = plt.subplots(1, 2, figsize=(10, 4))
    for axes, score, below, above in zip(both, ("accuracy", "loss"), (0.13, 0.25), (0.03, 0.35), strict=True):
        for seed in found:
            epochs = [row["epoch"] for row in seed["curve"]]
            axes.plot(epochs, [row[score] for row in seed["curve"]], color="0.75", lw=1)
        full = np.mean([seed["full"][score] for seed in found])
        axes.plot([], [], color="0.75", label="each seed's run")
        axes.axhline(full, color="k", lw=1, ls="--", label="full run")
        lowest = min(seed[name][score] for seed in found for name in seed if "TWA" in name)
        axes.set(ylim=(min(full - below, lowest - 0.03), full + above))
        axes.set(xlabel="epochs, learning included", ylabel=f"test {score}")
        for k, (kind, marker) in enumerate(MARKERS.items()):
            for share, learning_share in HEADS.items():
                count = round(args.epochs * share) // args.every
                first = args.every * (count // 2 + 1 if kind.endswith("half") else 1)
                name = f"{share:.0%}: {kind if 'TWA' in kind else f'SWA from epoch {first}'}"
                values = [seed[name][score] for seed in found]
                cost = args.epochs * share * (1 + learning_share if "TWA" in kind else 1)
                label = kind if share == min(HEADS) else None
                axes.errorbar(cost, np.mean(values), np.std(values), marker=marker, color=f"C{k}", label=label)
    both[0].legend(fontsize=8)
    figure.suptitle(f"{args.net}, CIFAR-10 (JPEG)")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run all seeds, then print table and draw plot."""
    parser = arguments(__doc__)
    parser.add_argument("--net", choices=tuple(NETS), required=True)
    parser.add_argument("--width", type=int, help="channels of the first convolution")
    parser.add_argument("--pictures", type=int, default=5_000, help="to train on")
    parser.add_argument("--epochs", type=int, default=80, help="of the full run")
    parser.add_argument("--every", type=int, default=2, help="epochs between snapshots")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--first-drop", type=float, default=0.5, help="share of the run before lr is divided by ten")
    parser.add_argument("--twa-lr", type=float, default=0.03)
    parser.add_argument("--components", type=int, default=5, help="principal components of the snapshots")
    parser.add_argument("--control", action="store_true", help="the whole run on held-out pictures too, and no more")
    args = parser.parse_args()
    args.width = args.width or WIDTHS[args.net]
    table = against("full", accuracy="test accuracy", loss="test loss", gap="gap")
    found = report(args, name_of(args), lambda seed: run(args, seed), table)
    if not args.control:
        plot(found, args, args.output / f"{args.net}.png")


if __name__ == "__main__":
    main()
