"""Fine-tune ResNet-20 on CIFAR-10 (JPEG) with random hyper-parameters, some of them bad.

python experiments/soups/resnet20_cifar10.py --data DATA --output SOUPS/resnet20-1 --seed 1
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from common import arguments, missing_members, published
from resnet20 import ResNet20, load_pictures
from safetensors.torch import load_file, save_file
from torch.nn import functional as F


def draw(generator: np.random.Generator) -> dict[str, Any]:
    """Draw what a sweep would try."""
    return {
        "lr": float(10 ** generator.uniform(-3.5, -1)),
        "epochs": int(generator.integers(1, 3)),
        "batch": int(generator.choice([64, 128])),
        "weight_decay": float(10 ** generator.uniform(-4.5, -3)),
        "label_smoothing": float(generator.uniform(0, 0.1)),
        "augment": bool(generator.random() < 0.7),
        "share": float(generator.uniform(0.15, 0.5)),
        "seed": int(generator.integers(1 << 30)),
    }


def augmented(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return a batch shifted by up to four pixels and mirrored at random."""
    if torch.rand((), generator=generator) < 0.5:
        x = x.flip(3)
    down, right = torch.randint(0, 9, (2,), generator=generator).tolist()
    return F.pad(x, (4, 4, 4, 4))[:, :, down : down + 32, right : right + 32]


def main() -> None:
    """Make the members that are missing."""
    args = arguments(__doc__, members=10)
    x, y = load_pictures(args.data / "cifar10/train.parquet")
    base = load_file(args.data / "cifar10_resnet/resnet20.safetensors")
    for folder, choice in missing_members(args, draw):
        generator = torch.Generator().manual_seed(choice["seed"])
        model = ResNet20()
        model.load_state_dict(base, strict=False)
        model.train()
        kept = torch.randperm(len(x), generator=generator)[: int(choice["share"] * len(x))]
        optimizer = torch.optim.SGD(
            model.parameters(), lr=choice["lr"], momentum=0.9, nesterov=True, weight_decay=choice["weight_decay"]
        )
        steps = choice["epochs"] * (len(kept) // choice["batch"])
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(choice["epochs"]):
            order = kept[torch.randperm(len(kept), generator=generator)]
            for batch in order.split(choice["batch"])[: len(kept) // choice["batch"]]:
                pictures = augmented(x[batch], generator) if choice["augment"] else x[batch]
                F.cross_entropy(model(pictures), y[batch], label_smoothing=choice["label_smoothing"]).backward()
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
        with published(folder) as unfinished:
            save_file(model.state_dict(), unfinished / "model.safetensors")


if __name__ == "__main__":
    main()
