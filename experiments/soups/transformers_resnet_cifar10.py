"""Train a small ResNet of transformers on CIFAR-10 (JPEG), then fine-tune members from it with Trainer.

    python experiments/soups/transformers_resnet_cifar10.py --data DATA --output SOUPS/resnet-1 --seed 1 --members 4

For `recipes/cifar10-resnet.yaml`; the reported comparison uses the ResNet-20 of `resnet20_cifar10.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import arguments, missing_members, published
from datasets import Dataset, load_dataset
from transformers import ConvNextImageProcessor, ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments
from transformers import default_data_collator as collate


def draw(generator: np.random.Generator) -> dict[str, Any]:
    """Draw what a sweep would try."""
    return {
        "lr": float(10 ** generator.uniform(-3.7, -2)),
        "weight_decay": float(10 ** generator.uniform(-4, -1)),
        "share": float(generator.uniform(0.3, 0.6)),
        "seed": int(generator.integers(1 << 30)),
    }


def fine_tune(model: Any, rows: Dataset, output: Path, **settings: Any) -> None:
    """Train for one epoch."""
    training = TrainingArguments(
        output_dir=str(output), num_train_epochs=1, per_device_train_batch_size=64, warmup_steps=10,
        save_strategy="no", report_to=[], use_cpu=True, logging_steps=50, **settings,
    )  # fmt: skip
    Trainer(model=model, args=training, train_dataset=rows, data_collator=collate).train()


def main() -> None:
    """Make the members that are missing."""
    args = arguments(__doc__, members=4)
    rows = load_dataset("parquet", data_files={"train": str(args.data / "cifar10/train.parquet")})["train"]
    names = rows.features["label"].names
    processor = ConvNextImageProcessor(
        size={"shortest_edge": 32}, crop_pct=1.0, do_resize=False, image_mean=[0.5] * 3, image_std=[0.25] * 3
    )

    def pixels(batch: dict[str, list[Any]]) -> dict[str, Any]:
        found = processor([picture.convert("RGB") for picture in batch["img"]], return_tensors="np")
        return {"pixel_values": found["pixel_values"], "labels": batch["label"]}

    rows = rows.map(pixels, batched=True, remove_columns=rows.column_names).with_format("torch")
    base = args.output / "base"
    torch.manual_seed(args.seed)
    if not base.exists():
        config = ResNetConfig(
            embedding_size=32, hidden_sizes=[32, 64, 128], depths=[1, 1, 1], layer_type="basic",
            id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)},
        )  # fmt: skip
        model = ResNetForImageClassification(config)
        fine_tune(model, rows, args.output / "trainer", learning_rate=5e-3, seed=args.seed)
        with published(base) as unfinished:
            model.save_pretrained(unfinished)
            processor.save_pretrained(unfinished)
    for folder, choice in missing_members(args, draw):
        model = ResNetForImageClassification.from_pretrained(base)
        kept = np.random.default_rng(choice["seed"]).permutation(len(rows))[: int(choice["share"] * len(rows))]
        fine_tune(
            model, rows.select(kept), args.output / "trainer", learning_rate=choice["lr"],
            weight_decay=choice["weight_decay"], seed=choice["seed"],
        )  # fmt: skip
        with published(folder) as unfinished:
            model.save_pretrained(unfinished)
            processor.save_pretrained(unfinished)


if __name__ == "__main__":
    main()
