"""Data sets from the Hub, with failures that come soon and in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from twa_merge.errors import UserError, first_line, raise_disk_failure


def load_from_hub(source: str, *, name: str | None, revision: str | None) -> Any:
    """Return all splits of a data set on the Hub; nothing in its repository is run.

    Raises:
        UserError: no such data set, no access, or no network and nothing in the cache.
    """
    import datasets

    _check_reachable(source, revision)
    try:
        return datasets.load_dataset(source, name, revision=revision)
    except Exception as error:  # transport errors share no public base class
        raise_disk_failure(error)
        raise UserError(f"data {source}: the Hub did not give it ({first_line(error)})") from error


def _check_reachable(source: str, revision: str | None) -> None:
    """Ask the Hub once: `load_dataset` on its own takes half a minute of retries to find no network."""
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    cached = (Path(datasets.config.HF_DATASETS_CACHE) / source.replace("/", "___")).is_dir()
    try:
        HfApi().dataset_info(source, revision=revision, timeout=10)
    except Exception as error:  # transport errors share no public base class
        if cached and (isinstance(error, OfflineModeIsEnabled) or not isinstance(error, HfHubHTTPError)):
            return
        raise UserError(
            f"data {source}: no such file or folder here, and the Hub gave no such data set ({first_line(error)})"
        ) from error
