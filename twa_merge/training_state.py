"""The file that a training run is resumed from."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from twa_merge.errors import UserError


def read_state(file: Path, identity: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what `write_state` has written: the account of the run, and its tensors.

    Args:
        file: the state.
        identity: entries of the account that must be equal.

    Raises:
        UserError: not a readable state, or one of another run.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            about = json.loads(opened.metadata()["run"])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: not a readable state ({error}); start without --resume") from error
    if any(about.get(key) != value for key, value in identity.items()):
        raise UserError(
            f"{file}: belongs to a run with other settings, checkpoints or data; give the same ones, or start "
            "without --resume"
        )
    return about, tensors


def write_state(file: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write a state atomically."""
    from safetensors.torch import save_file

    temporary = file.with_suffix(".tmp")
    save_file({n: t.cpu().contiguous().clone() for n, t in tensors.items()}, temporary, {"run": json.dumps(about)})
    os.replace(temporary, file)
