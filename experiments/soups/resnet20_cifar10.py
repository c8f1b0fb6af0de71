"""Fine-tune ResNet-20 on CIFAR-10 (JPEG) with random hyper-parameters, some of them bad.

python experiments/soups/resnet20_cifar10.py --data DATA --output SOUPS/resnet20-1 --seed 1
"""

from __future__ import annotations

from common import arguments, missing_members, published
from resnet20 import ResNet20, draw, fine_tune, load_pictures
from safetensors.torch import load_file, save_file


def main() -> None:
    """Make the members that are missing."""
    args = arguments(__doc__, members=10)
    x, y = load_pictures(args.data / "cifar10/train.parquet")
    base = load_file(args.data / "cifar10_resnet/resnet20.safetensors")
    for folder, choice in missing_members(args, draw):
        model = ResNet20()
        model.load_state_dict(base, strict=False)
        fine_tune(model, x, y, choice)
        with published(folder) as unfinished:
            save_file(model.state_dict(), unfinished / "model.safetensors")


if __name__ == "__main__":
    main()
