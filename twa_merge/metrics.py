"""Metrics: the common ones work offline, any other name is asked of `evaluate`; and how uncertain each value is."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from twa_merge.errors import UserError

DEFAULT_METRICS: Mapping[str, tuple[str, ...]] = {
    "single_label_classification": ("accuracy",),
    "multi_label_classification": ("f1",),
    "regression": ("mse",),
    "causal-lm": ("perplexity",),
    "seq2seq": ("perplexity",),
}
"""What is reported when no metric is named, by problem type of a classification or by task."""

OFFLINE = ("accuracy", "f1", "mse", "exact_match", "bleu", "perplexity")
_LOWER_IS_BETTER = frozenset(
    {"mse", "mae", "mape", "mase", "smape", "rmse", "perplexity", "wer", "cer", "ter", "brier_score"}
)


@dataclass(frozen=True)
class Metric:
    """A number that sums up the predictions on a split."""

    name: str
    compute: Callable[[list[Any], list[Any]], float]
    """(S predictions, S references) -> value; for `from_loss` ([mean loss], [])."""
    higher_is_better: bool
    needs_text: bool = False
    from_loss: bool = False
    resamples: int = 200
    """Of the bootstrap behind its standard error; few where one evaluation is slow."""


def get_metric(name: str, *, num_classes: int | None = None) -> Metric:
    """Return a metric by name.

    Args:
        name: one of `OFFLINE`, a name of the `evaluate` library, or a local metric script given as `./path`.
        num_classes: of a single-label classification: `f1` is that of class 1 for two classes (as in GLUE), the mean
            over classes for more; without it, for labels beyond 0 and 1. On multi-label predictions it is the micro F1.

    Raises:
        UserError: nothing of that name can be had.
    """
    if name == "accuracy":
        return Metric(name, _matches, higher_is_better=True)
    if name == "exact_match":
        return Metric(name, _matches, higher_is_better=True)
    if name == "f1":
        return Metric(name, lambda p, r: f1_score(p, r, num_classes=num_classes), higher_is_better=True)
    if name == "mse":
        return Metric(name, _mean_squared_error, higher_is_better=False)
    if name == "perplexity":
        return Metric(name, _perplexity, higher_is_better=False, from_loss=True)
    if name == "bleu":
        return _bleu()
    return _from_evaluate(name)


def standard_error(
    metric: Metric, predictions: list[Any], references: list[Any], seed: int = 0, resamples: int | None = None
) -> float:
    """Return the standard error of a metric over S samples: binomial for shares of hits, else by the bootstrap.

    Args:
        metric: not one that is computed from the loss; `Evaluation.metric` knows the losses.
        predictions: S of them.
        references: S of them.
        seed: of the resampling; equal seeds give equal results.
        resamples: default the metric's own number.
    """
    num_samples = len(references)
    if num_samples < 2:
        return math.nan
    if metric.name in ("accuracy", "exact_match"):
        share = metric.compute(predictions, references)
        return math.sqrt(share * (1 - share) / num_samples)
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(metric.resamples if resamples is None else resamples):
        drawn = rng.integers(num_samples, size=num_samples).tolist()
        values.append(metric.compute([predictions[i] for i in drawn], [references[i] for i in drawn]))
    return float(np.std(values, ddof=1))


def f1_score(predictions: list[Any], references: list[Any], *, num_classes: int | None = None) -> float:
    """Return F1: of class 1 for two classes, the mean over present classes for more, micro for lists of 0 and 1.

    F1 of a class that is never predicted and never right is 0, as in scikit-learn with `zero_division=0`.
    """
    predicted, true = np.asarray(predictions), np.asarray(references)
    if predicted.ndim == 2:
        return _f1(predicted.astype(bool), true.astype(bool))
    present = sorted(set(predicted.tolist()) | set(true.tolist()))
    binary = num_classes == 2 if num_classes is not None else set(present) <= {0, 1}
    if binary:
        return _f1(predicted == 1, true == 1)
    return float(np.mean([_f1(predicted == label, true == label) for label in present]))


def _f1(predicted: np.ndarray, true: np.ndarray) -> float:
    total = int(predicted.sum()) + int(true.sum())
    return 2 * int((predicted & true).sum()) / total if total else 0.0


def _matches(predictions: list[Any], references: list[Any]) -> float:
    hits = [p == r for p, r in zip(predictions, references, strict=True)]
    return sum(hits) / len(hits) if hits else math.nan


def _mean_squared_error(predictions: list[Any], references: list[Any]) -> float:
    return float(np.mean((np.asarray(predictions, np.float64) - np.asarray(references, np.float64)) ** 2))


def _perplexity(losses: list[Any], references: list[Any]) -> float:
    return math.exp(losses[0]) if not losses[0] > 700 else math.inf


def _bleu() -> Metric:
    try:
        import sacrebleu
    except ImportError as error:
        raise UserError('metric bleu: needs sacrebleu; install it with `pip install "twa-merge[bleu]"`') from error

    def compute(predictions: list[Any], references: list[Any]) -> float:
        return float(sacrebleu.corpus_bleu(predictions, [references]).score)

    return Metric("bleu", compute, higher_is_better=True, needs_text=True, resamples=50)


def _from_evaluate(name: str) -> Metric:
    is_path = name.startswith(("./", "../", "/", "~"))
    script = Path(name).expanduser()
    if is_path and not (script.is_file() or (script / f"{script.name}.py").is_file()):
        raise UserError(f"metric {name}: no such script here; expected a .py file or a folder holding {script.name}.py")
    if not is_path:
        _check_bare_name(name)
    try:
        import evaluate

        module = evaluate.load(str(script.resolve()) if is_path else name)
    except Exception as error:  # evaluate raises whatever its imports, the network or the script raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        near = difflib.get_close_matches(name, OFFLINE, n=1)
        hint = f"did you mean {near[0]}?" if near else f"these always work: {', '.join(OFFLINE)}"
        raise UserError(
            f"metric {name}: `evaluate` cannot load it ({type(error).__name__}: {reason}); {hint}"
        ) from error
    key = script.stem if is_path else name

    def compute(predictions: list[Any], references: list[Any]) -> float:
        result = module.compute(predictions=predictions, references=references)
        return _number(key, result)

    return Metric(name, compute, higher_is_better=key not in _LOWER_IS_BETTER, resamples=20)


def _check_bare_name(name: str) -> None:
    if "/" in name:
        raise UserError(
            f"metric {name}: code of other people's repositories is not run; expected a name such as `rouge`, or the "
            f"script itself as ./path"
        )
    for local in (Path(name), Path(f"{name}.py")):
        if local.exists():  # evaluate would run it, before it asks the Hub
            raise UserError(
                f"metric {name}: {local} in this folder would be run in its place; write ./{local} if you mean it"
            )


def _number(name: str, result: Mapping[str, Any]) -> float:
    numbers = {key: value for key, value in result.items() if isinstance(value, (int, float, np.number))}
    if not numbers:
        raise UserError(
            f"metric {name}: expected a number, got {', '.join(result)}; it cannot be reported as one value"
        )
    return float(numbers.get(name, next(iter(numbers.values()))))
