"""Pushing a merge to the Hub: what is public of it, in one commit."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from twa_merge.card import public_names, public_recipe
from twa_merge.errors import UserError, first_line
from twa_merge.mixing import MixingWeights
from twa_merge.plots import plot_mixing_weights
from twa_merge.recipe import load_recipe, to_yaml

_PUBLIC = re.compile(
    r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?|(league|curve)\.png|README\.md|LICENSE(\.\w+)?|report\.(md|json)|\w*config\.json"
    r"|(tokenizer|special_tokens_map|added_tokens|chat_template|normalizer)\.json|\w+\.(jinja|spm|codes|tokenizer)"
    r"|[\w.]+\.model|[\w-]*(vocab|merges|dict)[\w-]*\.(txt|json)"
)
"""What of a folder is uploaded: model, tokenizer or processor, and what is said of the merge. It may be a working
folder with much else in it."""
_NAMES = {"_name_or_path", "name_or_path"}
"""Where configs keep the folder that a model was loaded from."""
_OWN_WORDS = re.compile(r"id2label|label2id|added_tokens_decoder|extra_special_tokens|\w*_tokens?")
"""Keys of configs under which labels and tokens are, which may begin like a path and are the model's own."""
_LOCAL = re.compile(r"(/[^/\s]+/|~/|[A-Za-z]:[\\/])\S*")
_PATH = re.compile(r"(?<![\w:/.])(/[\w.@+~-]+){2,}/?")
"""Configs that differ in a path are noted with it."""
_CHECKED = re.compile(r".*\.(md|yaml|jinja)|\w*config\.json|report\.json|mixing_weights\.json")
"""Where paths could be; a vocabulary may hold anything."""


def push_to_hub(
    folder: str | Path,
    repo: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    message: str = "Merge by twa-merge",
) -> str:
    """Upload a merged folder to the Hub and return its address.

    Checkpoints that are not on the Hub are named `checkpoint-1`, ... in what is uploaded, and local paths are left out;
    the folder itself stays as it is, also if the Hub refuses.

    Args:
        folder: written by `twa_merge`.
        repo: `org/name`; made if it is not there.
        private: make it a private one (default as the Hub has it; no effect on one that is there).
        revision: branch, made if it is not there; default `main`.
        token: default the one that `hf auth login` has left.
        message: of the commit.

    Raises:
        UserError: no merge, no such name, no permission, or no network.
    """
    from huggingface_hub import HfApi

    folder = Path(folder).expanduser()
    if not (folder / "mixing_weights.safetensors").is_file():
        raise UserError(f"{folder}: not a folder that twa-merge has written; expected mixing_weights.safetensors in it")
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory(prefix="twa_merge-") as public:
        make_public(folder, Path(public))
        try:
            repo = api.create_repo(repo, private=private, exist_ok=True).repo_id
            if revision is not None:
                api.create_branch(repo, branch=revision, exist_ok=True)
            done = api.upload_folder(repo_id=repo, folder_path=public, revision=revision, commit_message=message)
        except Exception as error:  # transport errors share no public base class
            raise UserError(
                f"push to {repo}: the Hub did not take it ({first_line(error)}); {folder} is kept: check network and "
                f"permission (hf auth login), then twa-merge push {folder} {repo}"
            ) from error
    return str(done.repo_url)


def make_public(folder: Path, target: Path) -> None:
    """Fill `target` with what of a merged folder may be shown: large files as links, reports with public names.

    Raises:
        UserError: a local path is left in a file.
    """
    weights = MixingWeights.load(folder)
    names = public_names(weights.checkpoints, weights.revisions)
    private = {label: name for label, name in zip(weights.checkpoints, names, strict=True) if label != name}
    for path in folder.iterdir():
        if path.is_file() and _PUBLIC.fullmatch(path.name):
            _put(path, target / path.name, private)
    replace(weights, checkpoints=names).save(target)
    if (folder / "mixing_weights.png").is_file():
        plot_mixing_weights(replace(weights, checkpoints=names), target / "mixing_weights.png")
    if (folder / "recipe.yaml").is_file():
        recipe = public_recipe(load_recipe(folder / "recipe.yaml"), names, data_on_hub=_had_data_on_hub(folder))
        (target / "recipe.yaml").write_text(to_yaml(recipe), encoding="utf-8")
    local = [label for label, name in private.items() if "@" not in name]
    _require_no_paths(target, folder, [label for label in local if "/" in label])


def _put(path: Path, target: Path, private: Mapping[str, str]) -> None:
    if path.name == "report.json":
        about = _renamed(json.loads(path.read_text(encoding="utf-8")), private)
        target.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    elif path.name.endswith("config.json"):
        kept = _without_paths(json.loads(path.read_text(encoding="utf-8")))
        target.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    elif path.name == "report.md":
        target.write_text(_renamed(path.read_text(encoding="utf-8"), private), encoding="utf-8")
    elif path.suffix == ".safetensors":
        target.symlink_to(path.resolve())
    else:
        shutil.copyfile(path, target)


def _without_paths(about: Any) -> Any:
    """Return a config without the names of files and folders that it was made from, however nested."""
    if isinstance(about, list):
        return [_without_paths(value) for value in about if not _is_path(value)]
    if not isinstance(about, Mapping):
        return about
    return {
        key: value if _OWN_WORDS.fullmatch(key) else _without_paths(value)
        for key, value in about.items()
        if key not in _NAMES and (_OWN_WORDS.fullmatch(key) or not _is_path(value))
    }


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and _LOCAL.fullmatch(value) is not None


def _had_data_on_hub(folder: Path) -> bool:
    """Whether the run found its data on the Hub; where nothing says so, their name stays private."""
    report = folder / "report.json"
    return report.is_file() and bool(json.loads(report.read_text(encoding="utf-8")).get("data_on_hub"))


def _renamed(value: Any, private: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        for label in sorted(private, key=len, reverse=True):
            value = re.sub(rf"(?<![\w./-]){re.escape(label)}(?![\w/-])", private[label], value)
        return _PATH.sub("(a path)", value)
    if isinstance(value, Mapping):
        # keys may be names of groups, such as `model`, that a folder is called too
        return {private.get(key, key) if "/" in key else key: _renamed(inner, private) for key, inner in value.items()}
    return [_renamed(inner, private) for inner in value] if isinstance(value, list) else value


def _require_no_paths(target: Path, folder: Path, labels: list[str]) -> None:
    places = {str(Path.home()), str(Path.cwd()), str(folder.resolve()), *labels} - {"/"}
    for path in sorted(target.iterdir()):
        if _CHECKED.fullmatch(path.name):
            text = path.read_text(encoding="utf-8", errors="replace")
            for place in sorted(places, key=len, reverse=True):
                # one word after a slash, such as /app, may be anything; a path goes on
                if (place if place.count("/") > 1 else place.rstrip("/") + "/") in text:
                    raise UserError(
                        f"push: {folder / path.name} names the local path {place!r}; take it out, or remove the file"
                    )
