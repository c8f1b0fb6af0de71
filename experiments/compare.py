"""Every candidate on one soup: baselines, TWA at three granularities, and the rival, fine-tuning on the same data.

    python experiments/compare.py digits   --soups SOUPS --output results/digits.json
    python experiments/compare.py sst2     --data DATA --soups SOUPS --output results/sst2.json
    python experiments/compare.py cifar10  --data DATA --soups SOUPS --output results/cifar10.json
    python experiments/compare.py wikitext --data DATA --soups SOUPS --output results/wikitext.json

DATA is a folder of public data sets, SOUPS holds what `experiments/soups/*.py` made. Learning uses the defaults and
nothing else. Test splits are scored once, at the end of each run.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset
from transformers import get_cosine_schedule_with_warmup
from trials import KINDS, Trial, add_arguments

import twa_merge as twa
from twa_merge.assembly import load_merge
from twa_merge.evaluation import Evaluation, evaluate, paired_difference
from twa_merge.job import Job, Result
from twa_merge.league import best_baseline
from twa_merge.learn_config import LearnConfig
from twa_merge.recipe import Recipe

GRANULARITIES = ("model", "layer", "tensor")
RIVAL_LRS = (1e-5, 1e-4, 1e-3)


class Scores:
    """What earlier runs on the same soup and data have scored: baselines do not depend on groups or settings."""

    def __init__(self) -> None:
        self.held_out: dict[bytes, Evaluation] = {}
        self.test: dict[bytes, Evaluation] = {}
        self.weights: dict[bytes, twa.MixingWeights] = {}
        """With the running statistics that belong to them."""


class SharedJob(Job):
    """A run that looks up what has been scored before."""

    scores: Scores

    def make_scorer(self) -> Any:
        scorer = super().make_scorer()
        scorer._cache = self.scores.held_out
        return scorer

    def score_test(self, candidates: list[Any]) -> None:
        for candidate in candidates:
            key = key_of(candidate.weights)
            if key not in self.scores.test:
                self.scores.weights[key] = self.scorer.with_statistics(candidate.weights)
                self.scores.test[key] = self.scorer.on(self.scores.weights[key], self.data.test)
            candidate.test = self.scores.test[key]


def key_of(weights: twa.MixingWeights) -> bytes:
    """Return what tells tables apart: one number for each group and checkpoint."""
    return weights.table.numpy().tobytes()


def learn_merge(trial: Trial, soup: twa.Soup, scores: Scores, **settings: Any) -> Result:
    """Return a run on the trial, with other settings than the defaults if given."""
    recipe = Recipe(learn=replace(LearnConfig(), seed=trial.seed, **settings), ordered=trial.ordered)
    splits = {"held_out": trial.held_out, "test": trial.test}
    job = SharedJob(recipe, soup, splits, task=trial.task, module=copy.deepcopy(trial.module))
    job.scores = scores
    return job.run()


def account(result: Result) -> dict[str, Any]:
    """Return what a run's learned merge gained over the best baseline, and at what cost."""
    learned = next(c for c in result.league if c.learned)
    best = best_baseline(result.league)
    gaps = {
        "select_gain": paired_difference(best.select, learned.select),
        "minus_best_baseline": paired_difference(learned.test, best.test),
    }
    return {
        **{name: [gap.value, gap.standard_error] for name, gap in gaps.items()},
        "best_baseline": best.name,
        "best_step": result.best_step,
        "last_step": max(int(run.curve[-1]["step"]) for run in result.learned),
        "learning_seconds": result.seconds["learning"],
    }


def run_trial(trial: Trial) -> dict[str, Any]:
    """Return scores of every candidate."""
    soup = twa.Soup(trial.checkpoints)
    scores = Scores()
    tested: dict[str, Evaluation] = {}
    rows: dict[str, dict[str, Any]] = {}
    for granularity in GRANULARITIES:
        result = learn_merge(trial, soup, scores, granularity=granularity)
        for candidate in result.league:
            if candidate.name not in rows:  # asked again, baselines are scored from memory and cost no pass
                rows[candidate.name] = measured(candidate.select, candidate.test) | {"passes": candidate.passes}
                tested[candidate.name] = candidate.test
            if candidate.learned:
                rows[candidate.name] |= account(result)
    for name in ("best single", "greedy"):
        weights = next(c.weights for c in result.league if c.name == name)
        tested[f"{name}, fine-tuned"] = fine_tune(trial, soup, scores.weights[key_of(weights)])
        rows[f"{name}, fine-tuned"] = measured(None, tested[f"{name}, fine-tuned"])
    for name, evaluation in tested.items():
        for other in ("uniform", "greedy", "best single"):
            gap = paired_difference(evaluation, tested[other])
            rows[name][f"minus {other}"] = [gap.value, gap.standard_error]
    return rows


def measured(select: Evaluation | None, test: Evaluation) -> dict[str, Any]:
    """Return losses and metrics with standard errors."""
    found: dict[str, Any] = {}
    for part, evaluation in (("select", select), ("test", test)):
        if evaluation is None:
            continue
        found[part] = {"loss": [evaluation.loss.value, evaluation.loss.standard_error]}
        for metric in evaluation.metrics:
            score = evaluation.metric(metric.name)
            found[part][metric.name] = [score.value, score.standard_error]
    return found


def fine_tune(trial: Trial, soup: twa.Soup, weights: twa.MixingWeights) -> Evaluation:
    """Return the test evaluation of a merge fine-tuned on four fifths of the held-out data.

    Each learning rate has the steps, batches, schedule and evaluations that learning a merge has; it and the step, 0
    (not fine-tuned) among them, are chosen on the last fifth: not on a random one, for neighbours in a text leak, and
    training all weights would be chosen for what it memorises.
    """
    module = twa.merged_model(soup, copy.deepcopy(trial.module), granularity="model").merge_and_unload()
    load_merge(module, soup, weights)
    cut = round(0.8 * len(trial.held_out))
    fit, select = Subset(trial.held_out, range(cut)), Subset(trial.held_out, range(cut, len(trial.held_out)))
    config = LearnConfig()
    steps = config.total_steps(len(fit))
    best, best_loss = copy.deepcopy(module), evaluate(module, select, trial.task, batch_size=64).loss.value
    for lr in RIVAL_LRS:
        tuned = copy.deepcopy(module)
        optimizer = torch.optim.AdamW(tuned.parameters(), lr=lr)
        schedule = get_cosine_schedule_with_warmup(optimizer, round(config.warmup * steps), steps)
        torch.manual_seed(trial.seed)
        loader = DataLoader(fit, batch_size=config.batch_size, shuffle=True, collate_fn=trial.task.collate)
        batches = itertools.chain.from_iterable(itertools.repeat(loader))
        due = {round(steps * k / config.evaluations) for k in range(1, config.evaluations + 1)}
        for step, batch in enumerate(itertools.islice(batches, steps), start=1):
            tuned.train()
            losses, counts = trial.task.sample_losses(trial.task.forward(tuned, batch), batch)
            ((losses * counts).sum() / counts.sum()).backward()
            torch.nn.utils.clip_grad_norm_(tuned.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if step in due:
                loss = evaluate(tuned, select, trial.task, batch_size=64).loss.value
                if loss < best_loss:
                    best, best_loss = copy.deepcopy(tuned), loss
    return evaluate(best, trial.test, trial.task, batch_size=64)


def main() -> None:
    """Run the trials that the output does not hold yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    args = parser.parse_args()
    args.development = False
    found: dict[str, Any] = {"trials": {}}
    if args.output.is_file():
        found = json.loads(args.output.read_text(encoding="utf-8"))
    for trial in KINDS[args.kind](args):
        if trial.name in found["trials"]:
            continue
        rows = run_trial(trial)
        found["trials"][trial.name] = rows
        for name, row in rows.items():
            print(trial.name, f"{name:24s}", f"{row['test']['loss'][0]:.4f}", row.get("best_step", ""), flush=True)
        save(args.output, found)


def save(path: Path, found: dict[str, Any]) -> None:
    """Write a JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
