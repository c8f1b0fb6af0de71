"""Do two checkpoints mean the same function? Functional differences are refused by name, harmless ones are listed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from twa_merge.errors import UserError

MISSING = object()
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
    found = differences(a, b)
    if any(_functional(key, *values) for key, values in found.items()):
        # transformers is loaded only here: equal configs need no model library
        x, y = _normalized(a, first), _normalized(b, other)
        compared = found
        if x is not None and y is not None:  # every default is filled in: null and missing mean the same
            compared = {k: v for k, v in differences(x, y).items() if not all(u in (None, MISSING) for u in v)}
        functional = {key: values for key, values in compared.items() if _functional(key, *values)}
        if functional:
            raise UserError(_refusal(functional, first, other))
    return [f"{key}: {show(x)} / {show(y)}" for key, (x, y) in found.items() if not _functional(key, x, y)]


def _read(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{path}: not there, expected beside the weights; add it, or leave this folder out")
    config = read_json(path)
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
                f"{other}: another architecture, {key} is {show(y)}, but {show(x)} in {first}; "
                "a soup needs checkpoints of one architecture"
            )


def differences(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Return `dotted.key -> (value in a, value in b)` where they differ, lists of one length element by element."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in dict.fromkeys([*a, *b]):
        x, y = a.get(key, MISSING), b.get(key, MISSING)
        if isinstance(x, list) and isinstance(y, list) and len(x) == len(y) and x != y:
            x, y = (dict(enumerate(values)) for values in (x, y))
        if isinstance(x, Mapping) and isinstance(y, Mapping):
            found.update(differences(x, y, f"{prefix}{key}."))
        elif x != y or isinstance(x, bool) != isinstance(y, bool):
            found[f"{prefix}{key}"] = (x, y)
    return found


def _functional(key: str, x: Any, y: Any) -> bool:
    *parents, leaf = key.split(".")
    if any(parent in ("id2label", "label2id") for parent in parents):
        return True  # the leaf is the user's own label, whatever it is called
    if leaf == "problem_type":
        return not any(value is None or value is MISSING for value in (x, y))
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
        f"{other}: config.json means another function than {first}: {key} is {show(y)}, expected {show(x)}{more}; "
        "leave it out, or correct the config that is wrong"
    )


def show(value: Any) -> str:
    text = "(missing)" if value is MISSING else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."


def read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); save or download the checkpoint again") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(data).__name__}; save the checkpoint again")
    return data
