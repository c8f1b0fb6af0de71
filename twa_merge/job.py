"""One run, stage by stage: data, basis, baselines, learning, scores, the written merge."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from twa_merge import buffers, league
from twa_merge.assembly import config_folder, load_architecture, make_accelerator, make_task, merged_model
from twa_merge.baselines import best_single, greedy_soup
from twa_merge.checkpoints import Soup, require_several
from twa_merge.data import open_split, split_indices
from twa_merge.errors import UserError
from twa_merge.evaluation import Evaluation, evaluate
from twa_merge.league import Candidate, Folds, Scorer, Verdict
from twa_merge.mixing import MixingWeights
from twa_merge.plan import output_dtype
from twa_merge.publish import check_output
from twa_merge.recipe import Recipe
from twa_merge.tasks import Task
from twa_merge.training import Learned, best_evaluation, learn
from twa_merge.writer import write


@dataclass
class Result:
    """What a run found."""

    weights: MixingWeights
    """Of the candidate that ships, recomputed statistics included."""
    league: list[Candidate]
    verdict: Verdict
    learned: list[Learned]
    """A training run for each fold."""
    best_step: int
    """The step whose tables are used, the same in all folds."""
    folds: Folds
    warnings: list[str]
    seconds: dict[str, float]
    """Wall time of each stage."""
    output: Path | None


class Job:
    """One run, stage by stage."""

    def __init__(
        self,
        recipe: Recipe,
        soup: Soup,
        splits: Mapping[str, Any],
        *,
        task: Task | None = None,
        module: nn.Module | None = None,
        resume: bool = False,
        overwrite: bool = False,
        progress: bool = False,
    ) -> None:
        self.recipe, self.soup, self.splits, self.task, self.module = recipe, soup, splits, task, module
        self.resume, self.overwrite, self.progress = resume, overwrite, progress
        self.holds_features = task is not None
        self.output = Path(recipe.output.path) if recipe.output.path is not None else None
        self.seconds: dict[str, float] = {}

    def run(self) -> Result:
        require_several(self.soup.labels)
        self.check_settings()
        self.accelerator = make_accelerator(self.recipe)
        self.stage("data", self.open_data)
        self.stage("basis", self.build_model)
        candidates = self.stage("baselines", self.score_baselines)
        try:
            learned = self.stage("learning", self.learn_folds)
        except UserError:  # its state is of no use: only other settings will help
            self.drop_state()
            raise
        candidates.append(self.stage("scoring", lambda: self.learned_candidate(learned)))
        verdict = league.choose(candidates, self.recipe.margin)
        if self.test is not None:
            self.stage("test", lambda: self.score_test(candidates))
        weights = self.scorer.with_statistics(verdict.winner.weights)
        result = Result(
            weights=weights,
            league=candidates,
            verdict=verdict,
            learned=learned,
            best_step=self.best_step,
            folds=self.folds,
            warnings=self.warnings,
            seconds=self.seconds,
            output=self.output,
        )
        if self.output is not None:
            self.stage("writing", lambda: self.write(result))
        return result

    def stage(self, name: str, do: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        value = do()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        return value

    def check_settings(self) -> None:
        """Refuse what would fail only at the end."""
        if self.output is not None:
            check_output(self.output, self.soup, overwrite=self.overwrite)
        output_dtype(self.recipe.output.dtype)

    def open_data(self) -> None:
        recipe, config = self.recipe, self.recipe.data
        if self.task is None:
            self.task = make_task(recipe, self.soup)
        self.held_out = self.prepare(self.splits.get("held_out"), config.split)
        self.test = None
        if self.splits.get("test") is not None or config.test_split is not None:
            self.test = self.prepare(self.splits.get("test"), config.test_split)
        train = self.splits.get("train")
        self.train_part = None
        if train is not None or config.train_split is not None:
            self.train_part = self.prepare(train, config.train_split)
        if self.train_part is None:
            self.folds: Folds = split_indices(
                len(self.held_out),
                select_fraction=config.select_fraction,
                min_select=config.min_select,
                seed=recipe.learn.seed,
            )
        else:  # TWA-t: the held-out split decides as a whole, and baselines are chosen on it
            everything = list(range(len(self.held_out)))
            self.folds = [(everything, everything)]

    def prepare(self, given: Any, split: str | None) -> Any:
        """Return features of a split; data passed with a `Task` or a module hold features already."""
        assert self.task is not None
        source = given if given is not None else self.recipe.data.path
        if source is None:
            raise UserError("data: none given")
        if isinstance(source, str | Path) or not self.holds_features:
            return self.task.prepare(open_split(source, split, name=self.recipe.data.name))
        if len(source) == 0:
            raise UserError("data: the data set is empty")
        return source

    def build_model(self) -> None:
        learn_config = self.recipe.learn
        if self.module is None and self.recipe.data.preprocess is not None:
            self.module = load_architecture(config_folder(self.soup))
        self.model = merged_model(
            self.soup,
            self.module,
            task=self.recipe.task,
            granularity=learn_config.granularity,
            coordinates=learn_config.coordinates,
            dtype=self.recipe.dtype,
            progress=self.progress,
        ).to(self.accelerator.device)
        if learn_config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        self.scorer = self.make_scorer()

    def make_scorer(self) -> Scorer:
        from torch.utils.data import DataLoader, Subset

        assert self.task is not None
        task = self.task
        fit = sorted({i for part, _ in self.folds for i in part})
        source = self.train_part if self.train_part is not None else Subset(self.held_out, fit)
        size = self.recipe.learn.batch_size
        loader = DataLoader(source, batch_size=size, collate_fn=task.collate, drop_last=len(source) >= size)
        return Scorer(
            self.model,
            self.soup,
            task,
            self.held_out,
            batch_size=self.recipe.eval_batch_size,
            accelerator=self.accelerator,
            statistics_batches=(lambda: loader) if buffers.has_batchnorm(self.model.module) else None,
            progress=self.progress,
        )

    def score_baselines(self) -> list[Candidate]:
        candidates = league.baselines(self.scorer, self.soup.labels, self.folds, ordered=self.recipe.ordered)
        basis = self.model.basis
        centre = sum(float(block[-1].square().sum()) for block in basis.blocks.values()) ** 0.5
        self.warnings = league.warnings(self.scorer, self.soup, basis.norms, centre)
        for warning in self.warnings if self.accelerator.is_main_process else ():
            print(f"warning: {warning}", file=sys.stderr)
        return candidates

    def learn_folds(self) -> list[Learned]:
        return [self.learn_fold(number, fit, select) for number, (fit, select) in enumerate(self.folds)]

    def learn_fold(self, number: int, fit: list[int], select: list[int]) -> Learned:
        from torch.utils.data import Subset

        assert self.task is not None
        task, model = self.task, self.model
        model.start_from(self.start_weights(fit))
        select_part = Subset(self.held_out, select)

        def score() -> Evaluation:
            with model.materialized() as module:
                if buffers.has_batchnorm(module):
                    self.scorer._recompute(module)
                return evaluate(
                    module, select_part, task, batch_size=self.recipe.eval_batch_size, accelerator=self.accelerator
                )

        return learn(
            model,
            self.train_part if self.train_part is not None else Subset(self.held_out, fit),
            task,
            self.recipe.learn,
            self.accelerator,
            score=score,
            state_file=self.state_file(number),
            progress=self.progress,
        )

    def start_weights(self, fit: list[int]) -> MixingWeights | None:
        start, labels = self.recipe.learn.start, self.soup.labels
        if start == "uniform":
            return None
        chooser = {"greedy": greedy_soup, "best": best_single}.get(start)
        if chooser is None:
            raise UserError(f"learn.start: expected uniform, greedy or best, got {start!r}")
        return chooser(labels, lambda weights: self.scorer(weights).subset(fit).loss.value)

    def state_file(self, fold: int) -> Path | None:
        """Where a run's state is kept until its output is there: beside it, hidden."""
        if self.output is None:
            return None
        folder = state_folder(self.output)
        file = folder / f"fold-{fold}.safetensors"
        if self.accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            if not self.resume:
                file.unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()  # no process may go on from a state that another is about to drop
        return file

    def learned_candidate(self, learned: list[Learned]) -> Candidate:
        before = self.scorer.passes
        best = best_evaluation(learned, [len(part) for _, part in self.folds])
        groups, labels = self.model.basis.groups, self.soup.labels
        tables = [run.tables_EGN[best] for run in learned]
        selects = [
            self.scorer(MixingWeights(table, groups, labels)).subset(part)
            for table, (_, part) in zip(tables, self.folds, strict=True)
        ]
        weights = MixingWeights(torch.stack(tables).mean(dim=0), groups, labels)
        fit = self.scorer(weights)
        if len(self.folds) == 1:
            fit = fit.subset(self.folds[0][0])
        size = self.recipe.learn.batch_size * self.recipe.learn.accumulation
        trained = sum(run.curve[-1]["step"] for run in learned) * size / len(self.held_out)
        scored = sum(len(run.curve) * len(part) for run, (_, part) in zip(learned, self.folds, strict=True))
        passes = trained + scored / len(self.held_out) + self.scorer.passes - before
        self.best_step = int(learned[0].curve[best]["step"])
        name = _learned_name(self.recipe.learn.granularity)
        return Candidate(name, weights, league.pool(selects), fit, passes=passes, learned=True)

    def score_test(self, candidates: list[Candidate]) -> None:
        for candidate in candidates:
            candidate.test = self.scorer.on(candidate.weights, self.test)

    def write(self, result: Result) -> None:
        from twa_merge.report import write_report

        assert self.output is not None
        if self.accelerator.is_main_process:
            write(
                self.soup,
                result.weights,
                self.output,
                dtype=output_dtype(self.recipe.output.dtype),
                max_shard_bytes=int(self.recipe.output.max_shard_gb * 1e9),
                overwrite=self.overwrite,
                finish=lambda folder: write_report(folder, result, self.recipe, self.soup),
                progress=self.progress,
            )
            self.drop_state()
        self.accelerator.wait_for_everyone()

    def drop_state(self) -> None:
        if self.output is not None:
            shutil.rmtree(state_folder(self.output), ignore_errors=True)


def _learned_name(granularity: str | list[str]) -> str:
    names = {"model": "TWA", "layer": "TWA by layer", "tensor": "TWA by tensor"}
    return names[granularity] if isinstance(granularity, str) else "TWA by pattern"


def state_folder(output: Path) -> Path:
    """Return where the state of an unfinished run to `output` is."""
    return output.parent / f".{output.name}.twa-state"
