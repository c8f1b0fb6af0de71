"""The tasks by name: guessed from a checkpoint, built from its tokenizer or image processor, and its module loaded."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from twa_merge.errors import UserError
from twa_merge.metrics import DEFAULT_METRICS, Metric, get_metric
from twa_merge.task_base import Batch, Task, check_column_roles, to_device
from twa_merge.task_classification import IMAGE_ROLES, TEXT_ROLES, image_classification, text_classification
from twa_merge.task_custom import custom_task, module_task
from twa_merge.task_generation import CAUSAL_ROLES, SEQ2SEQ_ROLES, causal_lm, seq2seq
from twa_merge.task_labels import MULTI, REGRESSION, SINGLE, LabelSpace

__all__ = [
    "TASKS",
    "Batch",
    "Task",
    "build_task",
    "custom_task",
    "guess_task",
    "load_module",
    "module_task",
    "to_device",
]

TASKS = ("text-classification", "image-classification", "causal-lm", "seq2seq")
_AUTO_CLASSES = dict(
    zip(
        TASKS,
        (
            "AutoModelForSequenceClassification",
            "AutoModelForImageClassification",
            "AutoModelForCausalLM",
            "AutoModelForSeq2SeqLM",
        ),
        strict=True,
    )
)
_ROLES = dict(zip(TASKS, (TEXT_ROLES, IMAGE_ROLES, CAUSAL_ROLES, SEQ2SEQ_ROLES), strict=True))
_DEFAULT_TOKENS = 1024
_METRICS_OF = {
    SINGLE: {"accuracy", "f1", "exact_match", "perplexity"},
    MULTI: {"accuracy", "f1", "exact_match"},
    REGRESSION: {"mse"},
    "causal-lm": {"perplexity"},
    "seq2seq": {"perplexity", "bleu", "exact_match"},
}
_OFFSET_POSITIONS = (
    "roberta",
    "camembert",
    "mpnet",
    "longformer",
    "data2vec-text",
    "ibert",
    "luke",
    "markuplm",
    "layoutlmv3",
)


def guess_task(architectures: Sequence[str]) -> str:
    """Return the task of a checkpoint from the `architectures` of its config.json.

    Raises:
        UserError: none of them belongs to a known task.
    """
    from transformers.models.auto import modeling_auto

    tables = (
        (
            "text-classification",
            modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
            "ForSequenceClassification",
        ),
        ("image-classification", modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, "ForImageClassification"),
        ("seq2seq", modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, None),
        ("causal-lm", modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "ForCausalLM"),
    )
    for architecture in architectures:
        for task, table, suffix in tables:
            known = {name for value in table.values() for name in ([value] if isinstance(value, str) else value)}
            if architecture in known or (suffix is not None and architecture.endswith(suffix)):
                return task
    raise UserError(
        f"task: cannot be told from the architecture {', '.join(architectures) or '(none in config.json)'}; "
        f"name it, one of {', '.join(TASKS)}"
    )


def build_task(
    name: str,
    checkpoint: Path,
    *,
    columns: Mapping[str, str] | None = None,
    max_length: int | None = None,
    metrics: Sequence[str] | None = None,
    problem_type: str | None = None,
    source_prefix: str = "",
) -> Task:
    """Return a task by name, with the tokenizer or image processor of a checkpoint; remote code is never run.

    Args:
        name: one of `TASKS`.
        checkpoint: folder with config.json and tokenizer or image processor files.
        columns: role -> column: `text`, `text_pair`, `label`; `image`, `label`; `text`; `source`, `target`. A dot
            reaches into a column of dicts (`translation.en`).
        max_length: tokens at most (of a block, for causal-lm); default what tokenizer and model take, for language
            models at most 1024.
        metrics: names; default by task, see `DEFAULT_METRICS`.
        problem_type: of a classification, where the config does not say: see `LabelSpace`.
        source_prefix: put before every source text (seq2seq).
    """
    _check_name(name)
    columns = dict(columns or {})
    check_column_roles(columns, _ROLES[name], what=name)
    if source_prefix and name != "seq2seq":
        raise UserError(f"source_prefix: has a meaning only for seq2seq, not for {name}")
    if problem_type is not None and name in ("causal-lm", "seq2seq"):
        raise UserError(f"problem_type: has a meaning only for a classification, not for {name}")
    config = _load("AutoConfig", checkpoint)
    if name in ("text-classification", "image-classification"):
        return _classification(name, checkpoint, config, columns, max_length, metrics, problem_type)
    if name == "seq2seq" and not config.is_encoder_decoder:  # the Auto class has some that are none, of audio
        raise UserError(
            f"seq2seq: expected an encoder-decoder, got {config.model_type}; bring a data.preprocess hook of your own"
        )
    chosen = _choose_metrics(name, metrics, None)
    tokenizer = load_tokenizer(checkpoint, config, needs_padding=name == "seq2seq")
    length = max_length
    if length is None:
        length = min(_DEFAULT_TOKENS, _max_tokens(tokenizer, config, None) or _DEFAULT_TOKENS)
    _max_tokens(tokenizer, config, length)
    if name == "causal-lm":
        return causal_lm(tokenizer, block_size=length, columns=columns, metrics=chosen)
    return seq2seq(tokenizer, max_length=length, columns=columns, metrics=chosen, source_prefix=source_prefix)


def _classification(
    name: str,
    checkpoint: Path,
    config: Any,
    columns: dict[str, str],
    max_length: int | None,
    metrics: Sequence[str] | None,
    problem_type: str | None,
) -> Task:
    labels = LabelSpace.of(config, problem_type)
    classes = len(labels.names) if labels.problem == SINGLE else None
    chosen = _choose_metrics(labels.problem, metrics, classes)
    if name == "image-classification":
        processor = _load("AutoImageProcessor", checkpoint)
        mode = "L" if getattr(config, "num_channels", 3) == 1 else "RGB"
        return image_classification(processor, labels, mode=mode, columns=columns, metrics=chosen)
    tokenizer = load_tokenizer(checkpoint, config, needs_padding=True)
    length = _max_tokens(tokenizer, config, max_length)
    return text_classification(tokenizer, labels, max_length=length, columns=columns, metrics=chosen)


def load_module(task_name: str, checkpoint: Path, *, dtype: str = "float32", empty: bool = False) -> nn.Module:
    """Return the checkpoint's model for a task, on the CPU, in `eval()` mode; local files only, no remote code.

    Args:
        task_name: gives the Auto class.
        checkpoint: a folder.
        dtype: of the weights.
        empty: leave the parameters on `meta`, without values.

    Raises:
        UserError: no such dtype, not a model for this task, or weights that the task needs are not in it (transformers
            would make them up).
    """
    import transformers

    _check_name(task_name)
    value = getattr(torch, dtype, None)
    if not isinstance(value, torch.dtype) or not value.is_floating_point:
        raise UserError(f"dtype: expected float32, bfloat16 or float16, got {dtype!r}")
    loader: Any = getattr(transformers, _AUTO_CLASSES[task_name])
    try:
        if empty:
            module = _empty_module(loader, checkpoint, value)
        else:
            module, found = loader.from_pretrained(
                checkpoint, dtype=value, local_files_only=True, trust_remote_code=False, output_loading_info=True
            )
    except Exception as error:  # whatever config, code or files give
        raise UserError(f"{checkpoint}: not a model for {task_name} ({_reason(error)})") from error
    missing = [] if empty else [*sorted(found["missing_keys"]), *sorted(str(e[0]) for e in found["mismatched_keys"])]
    if missing:
        raise UserError(
            f"{checkpoint}: {type(module).__name__} needs {missing[0]}"
            f"{f' and {len(missing) - 1} more tensors' if len(missing) > 1 else ''}, not in the checkpoint; was it "
            f"trained for another task than {task_name}?"
        )
    if task_name == "text-classification" and module.config.get_text_config().pad_token_id is None:
        # decoders find the last token of a sample by it; without it they refuse batches of more than one
        tokenizer = load_tokenizer(checkpoint, module.config, needs_padding=True)
        module.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    eval_module: nn.Module = module.eval()
    return eval_module


def _empty_module(loader: Any, checkpoint: Path, dtype: torch.dtype) -> Any:
    """Return what `from_pretrained` does, with parameters on `meta`; buffers, which configs define, are there."""
    import transformers
    from accelerate import init_empty_weights

    config = transformers.AutoConfig.from_pretrained(checkpoint, local_files_only=True, trust_remote_code=False)
    with init_empty_weights(include_buffers=False):
        module = loader.from_config(config, dtype=dtype, trust_remote_code=False)
    module.tie_weights()
    if module.can_generate() and (checkpoint / "generation_config.json").is_file():
        module.generation_config = transformers.GenerationConfig.from_pretrained(checkpoint, local_files_only=True)
    return module


def load_tokenizer(checkpoint: Path, config: Any, *, needs_padding: bool) -> Any:
    """Return the tokenizer in a checkpoint's folder.

    Raises:
        UserError: there is none (transformers makes an empty one then), or it cannot pad and must.
    """
    tokenizer = _load("AutoTokenizer", checkpoint)
    files = {"tokenizer.json", *tokenizer.vocab_files_names.values()} - {"tokenizer_config.json"}
    if not tokenizer.vocab_files_names:  # by bytes or characters: nothing to store
        files = {"tokenizer_config.json"}
    if not any((Path(checkpoint) / file).is_file() for file in files):
        raise UserError(f"{checkpoint}: no tokenizer files; expected e.g. {sorted(files)[0]}: copy them there")
    if needs_padding and tokenizer.pad_token_id is None:
        own = config.get_text_config().pad_token_id
        if own is None or own >= len(tokenizer):
            raise UserError(f"{checkpoint}: the tokenizer has no padding token; set one (pad_token) and save it there")
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(own)
    return tokenizer


def _load(auto_class: str, checkpoint: Path) -> Any:
    if not (Path(checkpoint) / "config.json").is_file():
        raise UserError(f"{checkpoint}: no config.json; expected the folder of a transformers checkpoint")
    try:
        import transformers

        loader = getattr(transformers, auto_class)
        return loader.from_pretrained(checkpoint, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever the files give, or imports of optional libraries
        what = {"AutoConfig": "config", "AutoTokenizer": "tokenizer"}.get(auto_class, "image processor")
        raise UserError(f"{checkpoint}: its {what} cannot be loaded ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def _check_name(name: str) -> None:
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"task: expected one of {', '.join(TASKS)}, got {name!r}{hint}")


def _max_tokens(tokenizer: Any, config: Any, wanted: int | None) -> int | None:
    """Return the most tokens that tokenizer and model take (None: no limit), or `wanted` if that is not beyond it."""
    inner = config.get_text_config()
    positions = getattr(inner, "max_position_embeddings", None)
    if positions is not None and inner.model_type.removeprefix("xlm-").startswith(_OFFSET_POSITIONS):
        positions -= (inner.pad_token_id or 0) + 1  # their positions start after the padding index
    if wanted is not None:
        if wanted < 2 or (positions is not None and positions > 0 and wanted > positions):
            raise UserError(
                f"max_length: expected 2 to {positions or 'any number'} tokens for this model, got {wanted}"
            )
        return wanted
    sane = tokenizer.model_max_length if tokenizer.model_max_length < 10**9 else None
    limits = [limit for limit in (positions, sane) if limit is not None and limit > 0]
    return min(limits) if limits else None


def _choose_metrics(kind: str, names: Sequence[str] | None, num_classes: int | None) -> tuple[Metric, ...]:
    metrics = tuple(
        get_metric(name, num_classes=num_classes) for name in (DEFAULT_METRICS[kind] if names is None else names)
    )
    possible = _METRICS_OF[kind]
    known = set().union(*_METRICS_OF.values())
    for metric in metrics:
        if (metric.name in known and metric.name not in possible) or (kind == "causal-lm" and not metric.from_loss):
            raise UserError(f"metric {metric.name}: not for {kind}; expected one of {', '.join(sorted(possible))}")
    return metrics
