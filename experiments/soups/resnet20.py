"""CIFAR-10: its pictures, ResNet-20 (He et al. 2015, option-A shortcuts) with the names of
akamaster/pytorch_resnet_cifar10, and fine-tuning as a sweep would."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Block(nn.Module):
    """Two 3x3 convolutions; a stride-2 shortcut takes every second row and column and pads zero channels."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.pad = stride, (channels - channels_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.pad:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(out + x)


class ResNet20(nn.Module):
    """(B, 3, 32, 32) normalised pictures -> (B, 10) logits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(Block(16, 16, 1) for _ in range(3)))
        self.layer2 = nn.Sequential(Block(16, 32, 2), Block(32, 32, 1), Block(32, 32, 1))
        self.layer3 = nn.Sequential(Block(32, 64, 2), Block(64, 64, 1), Block(64, 64, 1))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean(dim=(2, 3)))


def load_pictures(path: Path) -> tuple[Tensor, Tensor]:
    """Return normalised float pictures (S, 3, 32, 32) and labels (S,) of a parquet file of JPEGs."""
    import pyarrow.parquet as pq
    from PIL import Image

    table = pq.read_table(path).to_pydict()
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(row["bytes"])).convert("RGB")) for row in table["img"]])
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    x = (x - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)
    return x.contiguous(), torch.tensor(table["label"])


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


def fine_tune(model: nn.Module, x: torch.Tensor, y: torch.Tensor, choice: dict[str, Any]) -> None:
    """Train a model on a share of some pictures, by SGD with the hyper-parameters drawn."""
    generator = torch.Generator().manual_seed(choice["seed"])
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
