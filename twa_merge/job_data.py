"""What a run learns on, selects on and tests on: opened, without rows in common, as features of the task."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset

from twa_merge.data import open_split
from twa_merge.errors import UserError
from twa_merge.league import Folds
from twa_merge.recipe import Recipe
from twa_merge.splits import Rows, require_disjoint, same_split, split_indices
from twa_merge.tasks import Task


@dataclass(frozen=True)
class JobData:
    """The data of a run, each a map-style data set of the task's features."""

    held_out: Any
    folds: Folds
    """(fit, select) positions in the held-out data."""
    test: Any = None
    """Scored once, at the end."""
    train: Any = None
    """Learned on in place of the fit parts (TWA-t)."""
    statistics: Any = None
    """BatchNorm's statistics are recomputed from these in place of what is learned on."""
    warning: str | None = None

    @property
    def learned_on(self) -> Any:
        return self.held_out if self.train is None else self.train

    @property
    def statistics_of(self) -> Any:
        """What BatchNorm's statistics are recomputed from."""
        if self.statistics is not None or self.train is not None:
            return self.train if self.statistics is None else self.statistics
        return Subset(self.held_out, sorted({i for fit, _ in self.folds for i in fit}))


def open_job_data(
    recipe: Recipe, given: Mapping[str, Any], task: Task, *, holds_features: bool, divide: bool = True
) -> JobData:
    """Open the splits of a recipe and divide the held-out data.

    Args:
        recipe: says where the data are, how many select, and the seed.
        given: `held_out`, `test` and `train` data that the caller has passed; None: from the recipe's path.
            `statistics`: training data for BatchNorm's statistics alone; features.
        task: makes features of rows.
        holds_features: data that were passed are features already, unless they are a path.
        divide: into what is learned on and what selects; else all of the held-out data select.

    Raises:
        UserError: not there, not readable, too few, or two of them share rows.
    """
    config = recipe.data
    rows = {"held-out": _rows(recipe, given.get("held_out"), config.split, holds_features)}
    for role, split in (("test", config.test_split), ("train", config.train_split)):
        if given.get(role) is not None or split is not None:
            rows[role] = _rows(recipe, given.get(role), split, holds_features)
    require_disjoint(rows)
    found = {role: _features(part, task) for role, part in rows.items()}
    size = len(found["held-out"])
    # with training data, the held-out data decide as a whole, and baselines are chosen on them (TWA-t)
    folds: Folds = [(list(range(size)), list(range(size)))]
    if divide and "train" not in rows:
        folds = split_indices(
            size, select_fraction=config.select_fraction, min_select=config.min_select, seed=recipe.learn.seed
        )
    warning = None
    if "train" in rows and same_split(rows["held-out"], rows["train"]):
        warning = "the held-out rows are a part of the training split: scores are optimistic if checkpoints saw them"
    return JobData(found["held-out"], folds, found.get("test"), found.get("train"), given.get("statistics"), warning)


def content_digest(data: Any, task: Task) -> str:
    """Return a hash of up to 256 samples spread over a data set; of their number alone if samples are drawn anew."""
    places = sorted({i * (len(data) - 1) // 255 for i in range(256)})

    def digest(chosen: list[int]) -> str:
        found = hashlib.blake2b(str(len(data)).encode(), digest_size=16)
        for place in chosen:
            _update(found, task.collate([data[place]]))
        return found.hexdigest()

    few = places[:8]
    return digest(places) if digest(few) == digest(few) else digest([])


def _update(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        value = value.detach().cpu().contiguous()
        digest.update(f"{value.dtype} {list(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Mapping):
        for key in value:
            digest.update(str(key).encode())
            _update(digest, value[key])
    elif isinstance(value, (list, tuple)):
        for item in value:
            _update(digest, item)
    else:
        digest.update(repr(value).encode())


def _rows(recipe: Recipe, given: Any, split: str | None, holds_features: bool) -> Rows:
    source = given if given is not None else recipe.data.path
    if source is None:
        raise UserError("data: none given")
    if isinstance(source, str | Path) or not holds_features:
        return open_split(source, split, name=recipe.data.name)
    if len(source) == 0:
        raise UserError("data: the data set is empty")
    return Rows(source, source, (("data", 0, len(source)),), are_features=True)


def _features(rows: Rows, task: Task) -> Any:
    return rows.dataset if rows.are_features else task.prepare(rows.dataset)
