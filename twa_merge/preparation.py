"""Do two checkpoints prepare their inputs alike? What tokenizers and processors do differently is refused by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from twa_merge.configs import MISSING, differences, read_json, show
from twa_merge.errors import UserError

_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", "*.model")
_OF_VOCAB_FILES = ("do_lower_case", "strip_accents", "tokenize_chinese_chars", "do_basic_tokenize", "add_prefix_space")
"""Settings of tokenizer_config.json that `vocab.txt` and its like leave open; `tokenizer.json` holds its own."""
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
_PREPARATION = re.compile(
    r"do_\w+|image_(mean|std)|size|crop_size|crop_pct|pad_size|resample|rescale_factor|patch_size|sampling_rate"
)
"""What a processor does to its input; other keys name classes, versions and defaults."""


def compare_tokenizers(first: Path, other: Path) -> list[str]:
    """Return the harmless differences between two checkpoints' tokenizers, a line each.

    `tokenizer.json` decides where both have one; truncation and padding settings in it are harmless.

    Raises:
        UserError: the vocabularies or their merges differ, or a tokenizer file is unreadable.
    """
    first, other = Path(first), Path(other)
    a, b = _tokenizer_files(first), _tokenizer_files(other)
    if not a or not b:
        return [] if not a and not b else [f"tokenizer: {', '.join(a) or 'none'} / {', '.join(b) or 'none'}"]
    common = [name for name in a if name in b]
    if not common:
        return [f"tokenizer: {', '.join(a)} / {', '.join(b)} (different files: not compared)"]
    lines = []
    for name in common[:1] if common[0] == "tokenizer.json" else common:
        if a[name].read_bytes() != b[name].read_bytes():
            lines += _compare_files(a[name], b[name])
    return lines + _compare_settings(first, other, decisive=common[0] != "tokenizer.json")


def _compare_settings(first: Path, other: Path, *, decisive: bool) -> list[str]:
    a, b = first / "tokenizer_config.json", other / "tokenizer_config.json"
    if not a.is_file() or not b.is_file():
        return []
    found = differences(read_json(a), read_json(b))
    for key, (x, y) in found.items():
        if decisive and key in _OF_VOCAB_FILES and x is not MISSING and y is not MISSING:
            raise UserError(
                f"{b}: another tokenizer than {a}: {key} is {show(y)}, expected {show(x)}; "
                "merge checkpoints of one tokenizer"
            )
    keys = dict.fromkeys(key.split(".")[0] for key in found)
    return [f"tokenizer_config.json: {', '.join(keys)} differs"] if keys else []


def compare_processors(first: Path, other: Path) -> list[str]:
    """Return the harmless differences between two checkpoints' image or feature processors, a line each.

    Raises:
        UserError: they prepare inputs in different ways (mean, size, resampling, ...).
    """
    lines = []
    for name in _PROCESSOR_FILES:
        a, b = Path(first) / name, Path(other) / name
        if not a.is_file() or not b.is_file():
            lines += [f"{name}: only in {(a if a.is_file() else b).parent}"] if a.is_file() or b.is_file() else []
            continue
        p, q = _steps(a), _steps(b)
        for key in dict.fromkeys([*p, *q]):
            x, y = p.get(key, MISSING), q.get(key, MISSING)
            if x == y or _same_size(x, y) or _same_size(y, x):
                continue
            if _PREPARATION.fullmatch(key) and x is not MISSING and y is not MISSING:
                raise UserError(
                    f"{b}: prepares inputs in another way than {a}: {key} is {show(y)}, expected {show(x)}; "
                    "merge checkpoints that see the same inputs"
                )
            lines.append(f"{name}: {key}: {show(x)} / {show(y)}")
    return lines


def _steps(path: Path) -> dict[str, Any]:
    """Return a processor's settings, also where they are nested among those of several processors."""
    content = read_json(path)
    settings = {key: value for key, value in content.items() if not isinstance(content.get(key), Mapping)}
    for key, value in content.items():
        if key.endswith(("processor", "extractor")) and isinstance(value, Mapping):
            settings |= value
        elif isinstance(value, Mapping):
            settings[key] = value
    return settings


def _same_size(number: Any, sides: Any) -> bool:
    """Whether a size is written as a number by an old version and side by side by a new one."""
    return isinstance(number, int) and isinstance(sides, Mapping) and set(sides.values()) == {number}


def _tokenizer_files(folder: Path) -> dict[str, Path]:
    return {path.name: path for pattern in _TOKENIZER_FILES for path in sorted(folder.glob(pattern))}


def _compare_files(a: Path, b: Path) -> list[str]:
    if a.suffix == ".model":
        raise UserError(f"{b}: another vocabulary than {a} (different bytes); merge checkpoints of one tokenizer")
    x, y = _vocabulary(a), _vocabulary(b)
    for part in x:
        if x[part] != y[part]:
            raise UserError(
                f"{b}: another tokenizer than {a}: {_first_difference(part, x[part], y[part])}; "
                "merge checkpoints of one tokenizer"
            )
    if a.name != "tokenizer.json":
        return []
    p, q = read_json(a), read_json(b)
    for part in ("normalizer", "pre_tokenizer", "post_processor"):
        for key, (x, y) in differences({part: p.get(part)}, {part: q.get(part)}).items():
            if x is not MISSING and y is not MISSING:  # newer versions of tokenizers write more keys
                raise UserError(
                    f"{b}: another tokenizer than {a}: {key} is {show(y)}, expected {show(x)}; "
                    "merge checkpoints of one tokenizer"
                )
    ignored = ("model", "added_tokens", "version")
    keys = [key for key in dict.fromkeys([*p, *q]) if key not in ignored and p.get(key) != q.get(key)]
    return [f"tokenizer.json: {', '.join(keys)} differs"] if keys else []


def _vocabulary(path: Path) -> dict[str, dict[str, Any]]:
    """Return what decides the ids of a text: part -> token or rule -> its id or place."""
    if path.suffix == ".txt":
        lines = path.read_text(encoding="utf-8").splitlines()
        return {path.stem: {line: i for i, line in enumerate(lines) if not line.startswith("#version")}}
    data = read_json(path)
    if path.name != "tokenizer.json":
        return {"vocab": data}
    model = data.get("model") or {}
    vocab, merges = model.get("vocab") or {}, model.get("merges") or []
    if not isinstance(vocab, dict):  # Unigram: a list of (token, score)
        vocab = {token: [i, score] for i, (token, score) in enumerate(vocab)}
    return {
        "vocab": vocab,
        "merges": {m if isinstance(m, str) else " ".join(m): i for i, m in enumerate(merges)},
        "added_tokens": {token["content"]: token["id"] for token in data.get("added_tokens") or []},
        "model": {key: value for key, value in model.items() if key in ("type", "unk_token", "unk_id")},
    }


def _first_difference(part: str, x: Mapping[str, Any], y: Mapping[str, Any]) -> str:
    key = next(key for key in [*x, *y] if x.get(key, MISSING) != y.get(key, MISSING))
    sizes = f"{len(y)} entries, expected {len(x)}; " if len(x) != len(y) else ""
    return f"{part} differs ({sizes}{key!r} is {show(y.get(key, MISSING))}, expected {show(x.get(key, MISSING))})"
