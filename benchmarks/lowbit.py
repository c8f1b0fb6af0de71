"""What few bits cost: the error of real deltas, and the exact merge's select and test loss after learning on them.

    OMP_NUM_THREADS=1 python benchmarks/lowbit.py RECIPE.yaml [key=value ...] --storages int8 int4 disk

The recipe is run with each storage and each seed, which divides the held-out data and orders the batches; differences
between storages, seed by seed, stand beside the spread over seeds.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import replace

import numpy as np
import torch

from twa_merge.blocks import TiledBlock
from twa_merge.checkpoints import Soup
from twa_merge.kernels import Kernels
from twa_merge.quantize import dequantize
from twa_merge.recipe import Recipe, load_recipe
from twa_merge.storage import BITS
from twa_merge.tensorfile import read_tensor


def delta_error(soup: Soup, storage: str) -> float:
    """Return `||rounded - delta|| / ||delta||` over all tensors and checkpoints of a soup."""
    error = norm = 0.0
    for tensor in soup.tensors:
        if not tensor.is_float or tensor.entries[0].numel == 0:
            continue
        values = torch.stack([read_tensor(entry).double().flatten() for entry in tensor.entries])
        centre = values.mean(dim=0)
        deltas = values - centre
        block = TiledBlock(len(soup), deltas.shape[1], BITS[storage], Kernels(compile=False))
        block.put(0, deltas.float(), centre.float())
        held = dequantize(block.codes, block.scales, block.bits).transpose(0, 1).flatten(1)[:, : deltas.shape[1]]
        error += float((held.double() - deltas).square().sum())
        norm += float(deltas.square().sum())
    return math.sqrt(error / norm)


def losses(recipe: Recipe, storage: str, seed: int) -> tuple[float, float, float]:
    """Return the learned merge's select loss while learning, and the exact merge's select and test loss."""
    from twa_merge.job import Job

    learn = replace(recipe.learn, storage=storage, seed=seed)
    recipe = replace(recipe, learn=learn, output=replace(recipe.output, path=None))
    result = Job(recipe, Soup(recipe.checkpoints), {}).run()
    learned = next(candidate for candidate in result.league if candidate.learned)
    test = math.nan if learned.test is None else learned.test.loss.value
    return result.select_loss_while_learning, learned.select.loss.value, test


def main() -> None:
    """Print a row for each storage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--storages", nargs="+", default=["bfloat16", "int8", "int4"])
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    recipe = load_recipe(args.recipe, args.overrides)
    soup = Soup(recipe.checkpoints)
    print(
        "| storage | error of the deltas | select loss while learning | exact merge's, ± sd of seeds | less float32's "
        "| test loss, ± sd of seeds | less float32's |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|")
    base = None
    for storage in ("float32", *args.storages):
        found = np.array([losses(recipe, storage, seed) for seed in range(args.seeds)])
        base = found if base is None else base
        error = f"{delta_error(soup, storage):.4f}" if storage in BITS else "0"
        spread = found.std(axis=0, ddof=1) if len(found) > 1 else np.full(3, math.nan)
        away = found - base
        cells = [f"{found[:, 0].mean():.5f}"]
        for part in (1, 2):
            cells.append(f"{found[:, part].mean():.5f} ± {spread[part]:.5f}")
            cells.append(f"{away[:, part].mean():+.6f} (largest {abs(away[:, part]).max():.6f})")
        print(f"| {storage} | {error} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
