"""A task without a built-in: object detection, through the `preprocess` hook (snapshots of one run).

    python experiments/detection.py --output runs/detection

A small YOLOS (transformers) learns to find handwritten digits (scikit-learn's) in made-up scenes of 48 x 48 pixels, one
to three a scene. The snapshots of its run are merged by a recipe, `recipe.yaml` in the output, whose `data.preprocess`
is `detection:features`: the loss is the model's own. Learning starts from the greedy soup, for the weights still move
much. Test scenes are scored once, by loss and average precision. Larger, for a GPU: `--steps 40000`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from common import against, arguments, less, plot_differences, report
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments, YolosConfig, YolosForObjectDetection, set_seed

import twa_merge as twa
from twa_merge.assembly import load_merge
from twa_merge.recipe import DataConfig, Recipe
from twa_merge.runner import train

SIZE, SCENES = 48, {"train": 3000, "validation": 1000, "test": 600}


def make_scenes(count: int, digits: Any, rows: np.ndarray, rng: np.random.Generator) -> dict[str, list[Any]]:
    """Return scenes of one to three digits, of 12 to 20 pixels, that do not lie on each other, over noise."""
    scenes: dict[str, list[Any]] = {"pixels": [], "boxes": [], "classes": []}
    for _ in range(count):
        canvas = 0.3 * rng.random((SIZE, SIZE))
        taken, boxes, classes = np.zeros((SIZE, SIZE), dtype=bool), [], []
        for row in rng.choice(rows, size=rng.integers(1, 4)):
            size = int(rng.integers(12, 21))
            top, left = (int(n) for n in rng.integers(0, SIZE - size, 2))
            if taken[top : top + size, left : left + size].any():
                continue
            small = torch.from_numpy(digits.images[row] / 16)[None, None].float()
            digit = nn.functional.interpolate(small, (size, size), mode="bilinear")[0, 0].numpy()
            canvas[top : top + size, left : left + size] = np.maximum(
                canvas[top : top + size, left : left + size], digit
            )
            taken[top : top + size, left : left + size] = True
            boxes.append([(left + size / 2) / SIZE, (top + size / 2) / SIZE, size / SIZE, size / SIZE])
            classes.append(int(digits.target[row]))
        scenes["pixels"].append((255 * canvas).astype("uint8").tolist())
        scenes["boxes"].append(boxes)
        scenes["classes"].append(classes)
    return scenes


def make_data(folder: Path, seed: int) -> None:
    """Save three splits, made of different digits."""
    from datasets import Dataset, DatasetDict
    from sklearn.datasets import load_digits

    digits, rng = load_digits(), np.random.default_rng(seed)
    order = rng.permutation(len(digits.target))
    parts = dict(zip(SCENES, (order[:1000], order[1000:1300], order[1300:]), strict=True))
    made = {name: Dataset.from_dict(make_scenes(SCENES[name], digits, parts[name], rng)) for name in SCENES}
    DatasetDict(made).save_to_disk(str(folder))


class Scenes:
    """What the model takes: pictures, and for each the classes and boxes of its digits."""

    def __init__(self, rows: Any) -> None:
        self.rows = [
            {
                "pixel_values": torch.tensor(row["pixels"]).float().div(255).sub(0.3).expand(3, -1, -1),
                "labels": {
                    "class_labels": torch.tensor(row["classes"]),
                    "boxes": torch.tensor(row["boxes"]).float().view(-1, 4),
                },
            }
            for row in rows
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]

    @staticmethod
    def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return a batch: labels differ in length from picture to picture, and stay a list."""
        return {
            "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
            "labels": [sample["labels"] for sample in samples],
        }


def features(split: Any, checkpoint: Path) -> Scenes:
    """Return the features of a split: the hook of the recipe."""
    return Scenes(split)


def make_model() -> YolosForObjectDetection:
    """Return a small YOLOS with fresh weights."""
    config = YolosConfig(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=[SIZE, SIZE],
        patch_size=6,
        num_detection_tokens=8,
        use_mid_position_embeddings=False,
        id2label={k: str(k) for k in range(10)},
        label2id={str(k): k for k in range(10)},
    )
    return YolosForObjectDetection(config)


def corners(boxes: Tensor) -> Tensor:
    """Return (left, top, right, bottom) of (centre, size)."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1)


def overlap(box: Tensor, boxes: Tensor) -> Tensor:
    """Return intersection over union of a box with others, all as corners."""
    low, high = torch.maximum(box[:2], boxes[:, :2]), torch.minimum(box[2:], boxes[:, 2:])
    inner = (high - low).clamp_min(0).prod(dim=1)
    return inner / ((box[2:] - box[:2]).prod() + (boxes[:, 2:] - boxes[:, :2]).prod(dim=1) - inner)


@torch.no_grad()
def scores(module: nn.Module, scenes: Scenes) -> dict[str, float]:
    """Return the mean loss of a scene, and the average precision at half overlap, mean over classes."""
    module.eval()
    losses, found = [], {k: [] for k in range(10)}
    counts = dict.fromkeys(range(10), 0)
    for scene in scenes:
        outputs = send_to_device(module(**send_to_device(scenes.collate([scene]), module.device)), "cpu")
        losses.append(float(outputs.loss))
        chance, kinds = outputs.logits[0].softmax(-1)[:, :-1].max(-1)
        boxes, truth = corners(outputs.pred_boxes[0]), corners(scene["labels"]["boxes"])
        left = set(range(len(truth)))
        for k in scene["labels"]["class_labels"].tolist():
            counts[k] += 1
        for i in chance.argsort(descending=True).tolist():
            shared = overlap(boxes[i], truth)
            hit = max(
                (j for j in left if scene["labels"]["class_labels"][j] == kinds[i] and shared[j] >= 0.5),
                key=lambda j: float(shared[j]),
                default=None,
            )
            left -= {hit}
            found[int(kinds[i])].append((float(chance[i]), hit is not None))
    precisions = [average_precision(found[k], counts[k]) for k in found if counts[k]]
    return {"loss": float(np.mean(losses)), "AP50": float(np.mean(precisions))}


def average_precision(found: list[tuple[float, bool]], count: int) -> float:
    """Return the area under precision over recall (every point), of detections with their confidence."""
    hits = np.array([hit for _, hit in sorted(found, key=lambda pair: -pair[0])], dtype=float)
    if not len(hits):
        return 0.0
    precision = hits.cumsum() / np.arange(1, len(hits) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float((envelope * hits).sum() / count)


def run(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Train, collect snapshots, merge them by a recipe, score."""
    from datasets import load_from_disk

    folder = args.output / f"run-{seed}"
    if not (folder / "data").exists():
        make_data(folder / "data", seed)
    splits = {name: Scenes(rows) for name, rows in load_from_disk(str(folder / "data")).items()}
    set_seed(seed)
    settings = TrainingArguments(
        str(folder),
        max_steps=args.steps,
        per_device_train_batch_size=32,
        learning_rate=1e-3,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=200,
        weight_decay=1e-4,
        max_grad_norm=0.5,
        seed=seed,
        save_strategy="no",
        logging_steps=500,
        report_to="none",
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
    )
    callback = twa.SnapshotCallback(args.steps // 20, last=10, folder=folder / "snapshots", overwrite=True)
    trainer = Trainer(
        make_model(), settings, train_dataset=splits["train"], data_collator=Scenes.collate, callbacks=[callback]
    )
    trainer.train()
    found: dict[str, Any] = {}
    soup = twa.Soup(callback.snapshots)
    recipe = Recipe(
        checkpoints=[str(path) for path in callback.snapshots],
        data=DataConfig(path=str(folder / "data"), split="validation", preprocess="detection:features", min_select=100),
        ordered=True,
    )
    for name, granularity in (("TWA", "model"), ("TWA by layer", "layer"), ("TWA by tensor", "tensor")):
        output = folder / name.replace(" ", "-")
        shutil.rmtree(output, ignore_errors=True)
        result = train(
            soup, recipe.data.path, recipe=recipe, output=output, granularity=granularity, start="greedy", seed=seed
        )
        for candidate in result.league:
            label = name if candidate.learned else candidate.name
            if label not in found:
                load_merge(trainer.model, soup, candidate.weights)
                found[label] = scores(trainer.model, splits["test"]) | {"select": candidate.select.loss.value}
    return found


def main() -> None:
    """Run all seeds and print the table."""
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=10_000)
    args = parser.parse_args()
    args.output = args.output.resolve()
    os.chdir(Path(__file__).resolve().parent)  # where the hook is imported from
    sys.path.insert(0, str(Path.cwd()))
    table = against("greedy", loss="test loss", AP50="AP at half overlap")
    found = report(args, "detection", lambda seed: run(args, seed), table)
    differences = {"": less(found, "loss", "greedy")}
    plot_differences(differences, "test loss less that of the greedy soup", args.output / "detection.png")


if __name__ == "__main__":
    main()
