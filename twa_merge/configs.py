"""Do two checkpoints mean the same function? Functional differences are refused by name, harmless ones are listed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from twa_merge.errors import UserError

_MISSING = object()
_HARMLESS = re.compile(
    r"""
    _?name_or_path | transformers(_js)?(_version|\.js_config) | (torch_)?dtype | auto_map | architectures | _commit_hash
    | (?!token_dropout).*drop(?!less).*     # ESM's token_dropout also rescales embeddings after training
    | use_cache | (_?gradient|use_gradient)_checkpointing | output_(attentions|hidden_states|scores|router_logits|past)
    | initializer_.* | init_std | init_xavier_std | embedding_init_std | .*_init_std
    | finetuning_task | task_specific_params | tf_legacy_loss | torchscript | return_dict | use_bfloat16
    | chunk_size_feed_forward | _?(attn|experts)_implementation.* | _?use_flash_attn.* | _flash_attn_.*
    | use_memory_efficient_attention | pretraining_tp
    | label_smoothing.* | .*_loss_(coef|coefficient|weight) | router_jitter_noise | apply_spec_augment
    | mask_(time|feature)_(prob|length|min_masks|min_space|selection|other) | ctc_(loss_reduction|zero_infinity)
    | (matcher_)?(class|bbox|giou|mask|dice)_cost | eos_coefficient
    | max_length | min_length | do_sample | early_stopping | num_beams | num_beam_groups | diversity_penalty
    | temperature | top_k | top_p | typical_p | repetition_penalty | length_penalty | (encoder_)?no_repeat_ngram_size
    | bad_words_ids | num_return_sequences | return_dict_in_generate | forced_(bos|eos)_token_id
    | remove_invalid_values | exponential_decay_length_penalty | (begin_)?suppress_tokens | prefix
    """,
    re.VERBOSE,
)
"""Keys that do not change what a trained model computes: names, training only, memory only, defaults of generation."""
_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", "*.model")


def compare_configs(first: Path, other: Path) -> list[str]:
    """Return the harmless differences between two checkpoints' `config.json`, a line each.

    Spellings that transformers reads alike (a default left out, `rope_theta` inside or outside `rope_parameters`)
    are no difference.

    Raises:
        UserError: a config is missing, unreadable or quantized, or the two mean different functions.
    """
    first, other = Path(first), Path(other)
    a, b = _read(first), _read(other)
    _same_architecture(a, b, first, other)
    found = _differences(a, b)
    if any(_functional(key, *values) for key, values in found.items()):
        # transformers is loaded only here: equal configs need no model library
        x, y = _normalized(a, first), _normalized(b, other)
        compared = found
        if x is not None and y is not None:  # every default is filled in: null and missing mean the same
            compared = {k: v for k, v in _differences(x, y).items() if not all(u in (None, _MISSING) for u in v)}
        functional = {key: values for key, values in compared.items() if _functional(key, *values)}
        if functional:
            raise UserError(_refusal(functional, first, other))
    return [f"{key}: {_show(x)} / {_show(y)}" for key, (x, y) in found.items() if not _functional(key, x, y)]


def _read(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{path}: not there, expected beside the weights; add it, or leave this folder out")
    config = _json(path)
    if config.get("quantization_config"):
        raise UserError(
            f"{path}: has a `quantization_config`; quantized weights cannot be averaged, expected float weights: "
            "merge the checkpoints before they are quantized"
        )
    return config


def _same_architecture(a: Mapping[str, Any], b: Mapping[str, Any], first: Path, other: Path) -> None:
    for key in ("model_type", "architectures"):
        x, y = a.get(key), b.get(key)
        if x != y and x and y:
            raise UserError(
                f"{other}: another architecture, {key} is {_show(y)}, but {_show(x)} in {first}; "
                "a soup needs checkpoints of one architecture"
            )


def _differences(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Return `dotted.key -> (value in a, value in b)` where they differ."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in dict.fromkeys([*a, *b]):
        x, y = a.get(key, _MISSING), b.get(key, _MISSING)
        if isinstance(x, Mapping) and isinstance(y, Mapping):
            found.update(_differences(x, y, f"{prefix}{key}."))
        elif x != y or isinstance(x, bool) != isinstance(y, bool):
            found[f"{prefix}{key}"] = (x, y)
    return found


def _functional(key: str, x: Any, y: Any) -> bool:
    *parents, leaf = key.split(".")
    if any(parent in ("id2label", "label2id") for parent in parents):
        return True  # the leaf is the user's own label, whatever it is called
    if leaf == "problem_type":
        return not any(value is None or value is _MISSING for value in (x, y))
    return not any(_HARMLESS.fullmatch(part) for part in (*parents, leaf))


def _normalized(config: Mapping[str, Any], folder: Path) -> dict[str, Any] | None:
    """Return the config with every default filled in by transformers; None for a model type it does not know."""
    from transformers import CONFIG_MAPPING

    model_type = str(config.get("model_type"))
    if model_type not in CONFIG_MAPPING:
        return None
    try:
        filled = CONFIG_MAPPING[model_type].from_dict(dict(config)).to_dict()
    except Exception as error:  # config classes validate in many ways
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{folder / 'config.json'}: transformers cannot read it as a {model_type!r} config ({reason}); correct it"
        ) from error
    labels = filled.get("id2label")
    if isinstance(labels, Mapping):
        filled["id2label"] = {str(index): label for index, label in labels.items()}
    return {**filled, "model_type": model_type}


def _refusal(functional: Mapping[str, tuple[Any, Any]], first: Path, other: Path) -> str:
    key, (x, y) = next(iter(functional.items()))
    others = [name for name in functional if name != key]
    more = f" (also different: {', '.join(others[:6])}{', ...' if len(others) > 6 else ''})" if others else ""
    return (
        f"{other}: config.json means another function than {first}: {key} is {_show(y)}, expected {_show(x)}{more}; "
        "leave it out, or correct the config that is wrong"
    )


def _show(value: Any) -> str:
    text = "(missing)" if value is _MISSING else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."


def compare_tokenizers(first: Path, other: Path) -> list[str]:
    """Return the harmless differences between two checkpoints' tokenizers, a line each.

    `tokenizer.json` decides where both have one; truncation and padding settings in it are harmless.

    Raises:
        UserError: the vocabularies or their merges differ, or a tokenizer file is unreadable.
    """
    a, b = _tokenizer_files(Path(first)), _tokenizer_files(Path(other))
    if not a or not b:
        return [] if not a and not b else [f"tokenizer: {', '.join(a) or 'none'} / {', '.join(b) or 'none'}"]
    common = [name for name in a if name in b]
    if not common:
        return [f"tokenizer: {', '.join(a)} / {', '.join(b)} (different files: not compared)"]
    lines = []
    for name in common[:1] if common[0] == "tokenizer.json" else common:
        if a[name].read_bytes() != b[name].read_bytes():
            lines += _compare_files(a[name], b[name])
    return lines


_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
_PREPARATION = re.compile(r"(do|image|pad)_.*|size|crop_size|crop_pct|resample|rescale_factor|patch_size|sampling_rate")
"""What a processor does to its input; other keys name classes, versions and defaults."""


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
        for key, (x, y) in _differences(_json(a), _json(b)).items():
            if _PREPARATION.fullmatch(key.split(".")[0]) and x is not _MISSING and y is not _MISSING:
                raise UserError(
                    f"{b}: prepares inputs in another way than {a}: {key} is {_show(y)}, expected {_show(x)}; "
                    "merge checkpoints that see the same inputs"
                )
            lines.append(f"{name}: {key}: {_show(x)} / {_show(y)}")
    return lines


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
    p, q = _json(a), _json(b)
    for part in ("normalizer", "pre_tokenizer", "post_processor"):
        for key, (x, y) in _differences({part: p.get(part)}, {part: q.get(part)}).items():
            if x is not _MISSING and y is not _MISSING:  # newer versions of tokenizers write more keys
                raise UserError(
                    f"{b}: another tokenizer than {a}: {key} is {_show(y)}, expected {_show(x)}; "
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
    data = _json(path)
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
    key = next(key for key in [*x, *y] if x.get(key, _MISSING) != y.get(key, _MISSING))
    sizes = f"{len(y)} entries, expected {len(x)}; " if len(x) != len(y) else ""
    return f"{part} differs ({sizes}{key!r} is {_show(y.get(key, _MISSING))}, expected {_show(x.get(key, _MISSING))})"


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); save or download the checkpoint again") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(data).__name__}; save the checkpoint again")
    return data
