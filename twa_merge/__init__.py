"""twa_merge: N fine-tuned checkpoints in, one better model out (trainable weight averaging, arXiv 2205.13104).

Names are imported when they are first used: `import twa_merge` loads no torch.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "Soup": "checkpoints",
    "MixingWeights": "mixing",
    "uniform": "mixing",
    "one_hot": "mixing",
    "last_k": "mixing",
    "ema": "mixing",
    "MergedModel": "model",
    "LearnConfig": "training",
    "Task": "tasks",
    "module_task": "tasks",
    "UserError": "errors",
    "merged_model": "assembly",
    "train": "runner",
    "Result": "job",
    "run_recipe": "runner",
    "write": "writer",
    "random_basis": "random_directions",
    "SnapshotCallback": "callbacks",
    "finish": "finishing",
    "push_to_hub": "hub",
    "TWATrainer": "trainer",
    "TWAConfig": "trainer",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'twa_merge' has no attribute {name!r}")
    return getattr(import_module(f"twa_merge.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
