"""One run, stage by stage: data, basis, baselines, learning, scores, the written merge."""

from __future__ import annotations

import functools
import hashlib
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from twa_merge import buffers, league
from twa_merge.assembly import (
    make_accelerator,
    make_task,
)
from twa_merge.checkpoints import Soup, require_several
from twa_merge.errors import UserError
from twa_merge.folds import FoldLearner, StateFolder
from twa_merge.job_data import content_digest, open_job_data
from twa_merge.job_model import ModelBuilder
from twa_merge.league import Candidate, Folds, Scorer, Verdict
from twa_merge.memory import OutOfMemory, drop_cached
from twa_merge.mixing import MixingWeights
from twa_merge.model import MergedModel
from twa_merge.plan import output_dtype, require_equal_integers
from twa_merge.publish import check_output
from twa_merge.recipe import Recipe
from twa_merge.sources import require_order
from twa_merge.tasks import Task
from twa_merge.training import Learned
from twa_merge.writer import shard_bytes, write


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
    peak_memory_mb: dict[str, float]
    """Of this process, from its beginning to the end of each stage."""
    output: Path | None
    task: str
    """Its name."""
    storage: str
    """Of the deltas that were learned on."""
    select_loss_while_learning: float
    """Of the learned merge, on those deltas; the league's is that of the exact merge."""

    def __str__(self) -> str:
        from twa_merge.report import result_text

        return result_text(self)


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
        passed = [source for source in splits.values() if source is not None and source != recipe.data.path]
        self.runs_again = task is None and module is None and not passed
        self.output = Path(recipe.output.path).expanduser() if recipe.output.path is not None else None
        self.state = StateFolder(self.output)
        self.model: MergedModel = None  # type: ignore[assignment]
        self.seconds: dict[str, float] = {}
        self.peak_memory_mb: dict[str, float] = {}

    def run(self) -> Result:
        try:
            return self._run()
        finally:
            if self.model is not None:
                self.model.unload()  # a module of the user's works as before, on the weights that it was left with

    def _run(self) -> Result:
        require_several(self.soup.labels)
        self.check_settings()
        self.set_up()
        self.stage("data", self.open_data)
        assert self.task is not None
        self.stage("basis", self.build_model)
        candidates = self.stage("baselines", self.score_baselines)
        if not self.resume and self.accelerator.is_main_process:
            self.state.drop()  # also the folds of an earlier run that this one may not reach
        self.accelerator.wait_for_everyone()
        try:
            learned = self.stage("learning", self.learn)
        except OutOfMemory:
            raise  # with other settings of memory, the state goes on
        except UserError:
            if not self.resume:  # this run's own state is of no use: only other settings will help
                self.state.drop()
            raise
        candidate, best_step = self.stage("scoring", lambda: self.make_learner().candidate(learned))
        candidates.append(candidate)
        verdict = league.choose(candidates, self.recipe.margin)
        if self.data.test is not None:
            self.stage("test", lambda: self.score_test(candidates))
        weights = self.scorer.with_statistics(verdict.winner.weights)
        result = Result(
            weights=weights,
            league=candidates,
            verdict=verdict,
            learned=learned,
            best_step=best_step,
            folds=self.data.folds,
            warnings=self.warnings,
            seconds=self.seconds,
            peak_memory_mb=self.peak_memory_mb,
            output=self.output,
            task=self.task.name,
            storage=self.model.basis.storage,
            select_loss_while_learning=self._loss_while_learning(learned, best_step),
        )
        if self.output is not None:
            self.stage("writing", lambda: self.write(result))
        return result

    def _loss_while_learning(self, learned: list[Learned], best_step: int) -> float:
        sizes = [len(part) for _, part in self.data.folds]
        losses = [next(row["select_loss"] for row in run.curve if row["step"] == best_step) for run in learned]
        return float(np.average(losses, weights=sizes))

    def stage(self, name: str, do: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        value = do()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        peak = _peak_memory_mb()
        if peak is not None:
            self.peak_memory_mb[name] = peak
        return value

    def check_settings(self) -> None:
        """Refuse what would fail only at the end."""
        if self.output is not None:
            check_output(self.output, self.soup, overwrite=self.overwrite)
            require_equal_integers(self.soup)
        output_dtype(self.recipe.output.dtype)
        shard_bytes(self.recipe.output.max_shard_gb)
        if self.recipe.ordered:
            require_order(self.soup.labels)

    def set_up(self) -> None:
        """Start what every later stage needs: processes and devices."""
        self.accelerator = make_accelerator(self.recipe)
        self.builder = ModelBuilder(self.recipe, self.soup, self.accelerator, self.module, progress=self.progress)

    def open_data(self, *, divide: bool = True) -> None:
        """Open the splits and divide the held-out data, unless nothing is learned."""
        holds_features = self.task is not None
        if self.task is None:
            self.task = make_task(self.recipe, self.soup)
        self.data = open_job_data(self.recipe, self.splits, self.task, holds_features=holds_features, divide=divide)

    def build_model(self, storage: str | None = None) -> None:
        """Put model, basis and scorer together.

        Args:
            storage: in place of the recipe's.
        """
        self.model = self.builder.build(storage)
        self.scorer = self.make_scorer()

    def make_scorer(self) -> Scorer:
        from torch.utils.data import DataLoader, Subset

        assert self.task is not None
        task = self.task
        source = self.data.statistics_of
        # shuffled: rows sorted by class would make batches of one class, and statistics without the others
        order = (
            np.random.default_rng(self.recipe.learn.seed)
            .permutation(len(source))[: buffers.STATISTICS_SAMPLES]
            .tolist()
        )
        source = Subset(source, order)
        size = self.recipe.learn.batch_size * self.recipe.learn.accumulation  # however a step is divided
        loader = DataLoader(source, batch_size=size, collate_fn=task.collate, drop_last=len(source) >= size)
        return Scorer(
            self.model,
            self.soup,
            task,
            self.data.held_out,
            batch_size=self.recipe.eval_batch_size,
            accelerator=self.accelerator,
            statistics_batches=(lambda: loader) if buffers.has_batchnorm(self.model.module) else None,
            progress=self.progress,
        )

    def score_baselines(self) -> list[Candidate]:
        candidates = league.baselines(self.scorer, self.soup.labels, self.data.folds, ordered=self.recipe.ordered)
        league.require_finite(candidates)
        basis = self.model.basis
        self.warnings = [self.data.warning] if self.data.warning is not None else []
        self.warnings += league.warnings(
            self.scorer, self.soup, basis.norms, basis.centre_norm, ordered=self.recipe.ordered
        )
        for warning in self.warnings if self.accelerator.is_main_process else ():
            print(f"warning: {warning}", file=sys.stderr)
        return candidates

    def learn(self) -> list[Learned]:
        """Learn on every fold; where not even single samples fit beside the basis, go on with a smaller one."""
        while True:
            try:
                return self.make_learner().run()
            except OutOfMemory as error:
                storage = self.builder.smaller_storage(self.model.basis.storage, str(error))
            self.model.unload()  # a module of the user's must be as it was
            self.model = self.scorer.model = None  # type: ignore[assignment]
            drop_cached()
            self.stage("basis", functools.partial(self.build_model, storage))

    def make_learner(self) -> FoldLearner:
        assert self.task is not None
        return FoldLearner(
            self.model,
            self.soup,
            self.task,
            self.data.held_out,
            self.data.folds,
            learn_config=self.recipe.learn,
            scorer=self.scorer,
            train_part=self.data.train,
            state=self.state,
            state_of=self.identity(),
            progress=self.progress,
        )

    def identity(self) -> str:
        """Return what a state must have been learned on to be resumed: checkpoints, task and data."""
        assert self.task is not None
        learned_on = content_digest(self.data.learned_on, self.task)
        about = (self.task.name, self.recipe.dtype, self.soup.fingerprints, self.data.folds, learned_on)
        return hashlib.blake2b(repr(about).encode(), digest_size=16).hexdigest()

    def score_test(self, candidates: list[Candidate]) -> None:
        for candidate in candidates:
            candidate.test = self.scorer.on(candidate.weights, self.data.test)

    def write(self, result: Result) -> None:
        from twa_merge.hub import push_to_hub
        from twa_merge.report import write_report

        assert self.output is not None
        if self.accelerator.is_main_process:
            write(
                self.soup,
                result.weights,
                self.output,
                dtype=output_dtype(self.recipe.output.dtype),
                max_shard_bytes=shard_bytes(self.recipe.output.max_shard_gb),
                overwrite=self.overwrite,
                finish=lambda folder: write_report(folder, result, self.recipe if self.runs_again else None, self.soup),
                progress=self.progress,
            )
            self.state.drop()
            if self.recipe.output.push_to_hub is not None:
                push_to_hub(self.output, self.recipe.output.push_to_hub, private=self.recipe.output.private or None)
        self.accelerator.wait_for_everyone()


def _peak_memory_mb() -> float | None:
    """Return this process's peak memory so far; None where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak / (1 << 20 if sys.platform == "darwin" else 1 << 10))
