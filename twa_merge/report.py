"""What a run shows: the league table as text, JSON and pictures, and the model card."""

from __future__ import annotations

import json
import math
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twa_merge.card import is_on_hub, model_card
from twa_merge.checkpoints import Soup
from twa_merge.evaluation import Evaluation, Scores, bootstrap_paired, paired_difference
from twa_merge.league import Candidate, best_baseline
from twa_merge.plots import plot_curve, plot_league, plot_mixing_weights
from twa_merge.recipe import Recipe, to_yaml

if TYPE_CHECKING:
    from twa_merge.job import Result


def league_table(candidates: list[Candidate], winner: Candidate | None = None) -> str:
    """Return the league table as Markdown: loss and metrics with standard errors on each part, passes."""
    parts = ["fit", "select"] + (["test"] if any(c.test for c in candidates) else [])
    metrics = [metric.name for metric in candidates[0].select.metrics]
    header = ["", *(f"{part} loss" for part in parts), *(f"{part} {name}" for name in metrics for part in parts[1:])]
    rows = [[*header, "passes"]]
    for c in candidates:
        scores = {"fit": c.fit, "select": c.select, "test": c.test}
        row = [_row_name(c, winner), *(_loss(scores[part]) for part in parts)]
        row += [_metric(scores[part], name) for name in metrics for part in parts[1:]]
        rows.append([*row, f"{c.passes:.1f}"])
    return aligned(rows)


def _row_name(candidate: Candidate, winner: Candidate | None) -> str:
    marks = ("*" if candidate.optimistic else "") + (" ←" if candidate is winner else "")
    return candidate.name + marks


def _loss(evaluation: Evaluation | None) -> str:
    return "" if evaluation is None else scores_text(evaluation.loss)


def _metric(evaluation: Evaluation | None, name: str) -> str:
    return "" if evaluation is None else scores_text(evaluation.metric(name))


def scores_text(scores: Scores) -> str:
    """Return value ± standard error."""
    return f"{scores.value:.4f} ± {scores.standard_error:.4f}"


def aligned(rows: list[list[str]]) -> str:
    """Return rows as a Markdown table with aligned columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| "
        + " | ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        + " |"
        for row in rows
    ]
    rule = "|" + "|".join("-" * (w + 1) + ("-" if i == 0 else ":") for i, w in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def summary(result: Result) -> dict[str, Any]:
    """Return the machine-readable account of a run."""
    baseline = best_baseline(result.league)
    return {
        "winner": result.verdict.winner.name,
        "reason": result.verdict.reason,
        "warnings": result.warnings,
        "cross_fitting_folds": len(result.folds) if len(result.folds) > 1 else None,
        "samples": {"fit": len(result.folds[0][0]), "select": sum(len(part) for _, part in result.folds)},
        "league": [_candidate(c, baseline) for c in result.league],
        "curves": [[{k: finite(v) for k, v in row.items()} for row in run.curve] for run in result.learned],
        "best_step": result.best_step,
        "storage": {
            "name": result.storage,
            "select_loss_while_learning": finite(result.select_loss_while_learning),
            "select_loss_exact": finite(next(c.select.loss.value for c in result.league if c.learned)),
        },
        "seconds": {name: round(value, 3) for name, value in result.seconds.items()},
        "peak_memory_mb": {name: round(value, 1) for name, value in result.peak_memory_mb.items()},
    }


def _candidate(candidate: Candidate, baseline: Candidate) -> dict[str, Any]:
    about: dict[str, Any] = {
        "name": candidate.name,
        "learned": candidate.learned,
        "optimistic": candidate.optimistic,
        "passes": round(candidate.passes, 3),
    }
    for part in ("fit", "select", "test"):
        evaluation = getattr(candidate, part)
        if evaluation is None:
            continue
        about[part] = {"loss": _json_scores(evaluation.loss)}
        for metric in evaluation.metrics:
            about[part][metric.name] = _json_scores(evaluation.metric(metric.name))
    gain = paired_difference(baseline.select, candidate.select)
    interval = bootstrap_paired(baseline.select, candidate.select)
    about["select_gain_over_best_baseline"] = {**_json_scores(gain), "bootstrap_95": [*map(finite, interval)]}
    about["mixing_weights"] = dict(zip(candidate.weights.groups, candidate.weights.table.tolist(), strict=True))
    return about


def _json_scores(scores: Scores) -> dict[str, float | None]:
    return {"value": finite(scores.value), "standard_error": finite(scores.standard_error)}


def finite(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    from importlib.metadata import version

    names = ("twa-merge", "torch", "transformers", "datasets", "accelerate", "safetensors")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def write_report(folder: Path, result: Result, recipe: Recipe | None, soup: Soup) -> None:
    """Write report.json, report.md, the pictures, the model card and, if there is a recipe, recipe.yaml."""
    about = summary(result) | {
        "checkpoints": [
            {"label": s.label, "revision": s.revision, "fingerprint": soup.fingerprints[k]}
            for k, s in enumerate(soup.sources)
        ],
        "data_on_hub": recipe is not None and is_on_hub(recipe.data.path),
        "notes": soup.notes,
        "versions": versions(),
    }
    (folder / "report.json").write_text(json.dumps(about, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    if recipe is not None:
        (folder / "recipe.yaml").write_text(to_yaml(recipe), encoding="utf-8")
    plot_league(result.league, result.verdict.winner, folder / "league.png")
    learned = next((c for c in result.league if c.learned), result.verdict.winner)
    plot_mixing_weights(learned.weights, folder / "mixing_weights.png")
    selects = [len(part) for _, part in result.folds]
    plot_curve([run.curve for run in result.learned], selects, result.best_step, folder / "curve.png")
    (folder / "report.md").write_text(report_text(result, soup), encoding="utf-8")
    league = "\n".join(
        [result.verdict.reason + ".", "", league_table(result.league, result.verdict.winner), "", legend(result)]
    )
    card = model_card(result.weights, soup, task=result.task, league=league, recipe=recipe)
    (folder / "README.md").write_text(card, encoding="utf-8")


def report_text(result: Result, soup: Soup) -> str:
    """Return `report.md`."""
    lines = [
        "# Merge report",
        "",
        result.verdict.reason + ".",
        "",
        league_table(result.league, result.verdict.winner),
        "",
    ]
    lines += [legend(result), ""]
    if result.storage not in ("float32", "disk"):
        learned = next(c for c in result.league if c.learned)
        lines += [
            f"Learned on deltas in {result.storage}: the select loss of {learned.name} was "
            f"{result.select_loss_while_learning:.5f} with those, and is {learned.select.loss.value:.5f} for the exact "
            "merge, as are all numbers above.",
            "",
        ]
    lines += ["![league table](league.png)", "", "## Mixing weights", ""]
    lines += ["![mixing weights](mixing_weights.png)", "", "## Learning", "", "![curve](curve.png)", ""]
    lines += ["## Checkpoints", "", *(f"- {label}" for label in soup.labels), ""]
    for title, items in (("Warnings", result.warnings), ("Differences in configs", soup.notes)):
        if items:
            lines += [f"## {title}", "", *(f"- {item}" for item in items), ""]
    return "\n".join(lines)


def result_text(result: Result) -> str:
    """Return the league table, how to read it, and what ships."""
    return f"{league_table(result.league, result.verdict.winner)}\n\n{legend(result)}\n{result.verdict.reason}."


def legend(result: Result) -> str:
    """Return how to read the table."""
    fit, select_part = result.folds[0]
    if fit == select_part:
        select = (
            f"learned on the training split; the fixed merges are chosen, and all are compared, on the same "
            f"{len(select_part)} held-out samples, which favours the fixed ones"
        )
    elif len(result.folds) > 1:
        select = (
            f"cross-fitting over {len(result.folds)} folds: each fold's choice is scored on samples it has not seen, "
            "and the final table is the mean of the folds' tables"
        )
    else:
        select = (
            f"fit: {len(result.folds[0][0])} samples to learn and choose on; select: {len(result.folds[0][1])} others"
        )
    return (
        f"Loss is the mean over samples, ± its standard error; {select}. "
        "← ships. * chosen with the select part in view."
    )
