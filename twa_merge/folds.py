"""Learning on every fold of the held-out data, resumably, and one candidate of what the folds learned."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from twa_merge import buffers, league
from twa_merge.baselines import best_single, greedy_soup
from twa_merge.checkpoints import Soup
from twa_merge.evaluation import Evaluation, evaluate
from twa_merge.league import Candidate, Folds, Scorer
from twa_merge.learn_config import LearnConfig
from twa_merge.mixing import MixingWeights
from twa_merge.model import MergedModel
from twa_merge.publish import make_folder, remove_empty
from twa_merge.tasks import Task
from twa_merge.training import Learned, best_evaluation, learn


class StateFolder:
    """Where a run's state is kept until its output is there: beside it, hidden."""

    def __init__(self, output: Path | None) -> None:
        self.path = None if output is None else output.parent / f".{output.name}.twa-state"
        self._made: list[Path] = []

    def file(self, fold: int) -> Path | None:
        """Return the file of a fold; None for a run without output."""
        return None if self.path is None else self.path / f"fold-{fold}.safetensors"

    def make(self) -> None:
        """Make the folder."""
        if self.path is not None:
            self._made = make_folder(self.path) or self._made

    def drop(self) -> None:
        """Remove the state, and the folders that were made for it if nothing else is there."""
        if self.path is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            remove_empty(self._made[1:])


class FoldLearner:
    """Learns a table on each fold.

    Args:
        model: whose coefficients are trained, once for each fold.
        soup: the checkpoints.
        task: makes batches and losses.
        held_out: what the folds divide.
        folds: (fit, select) positions.
        learn_config: lr, steps, ...
        scorer: scores tables on the held-out data.
        train_part: learned on in place of the fit parts (TWA-t).
        state: kept at every evaluation; learning goes on from what is there.
        state_of: says what is learned on what; a state of anything else is refused.
    """

    def __init__(
        self,
        model: MergedModel,
        soup: Soup,
        task: Task,
        held_out: Any,
        folds: Folds,
        *,
        learn_config: LearnConfig,
        scorer: Scorer,
        train_part: Any = None,
        state: StateFolder,
        state_of: str = "",
        progress: bool = False,
    ) -> None:
        self.model, self.soup, self.task, self.held_out, self.folds = model, soup, task, held_out, folds
        self.learn_config, self.scorer, self.train_part = learn_config, scorer, train_part
        self.state, self.state_of, self.progress = state, state_of, progress
        self.accelerator = scorer.accelerator

    def run(self) -> list[Learned]:
        """Learn on each fold in turn."""
        return [self._learn(number, fit, select) for number, (fit, select) in enumerate(self.folds)]

    def candidate(self, learned: list[Learned]) -> tuple[Candidate, int]:
        """Return the folds' tables as one candidate, their mean, and the step that they are of.

        The select score is that of each fold's table on the samples that this fold has not learned on.
        """
        before = self.scorer.passes
        best = best_evaluation(learned, [len(part) for _, part in self.folds])
        tables = [run.tables_EGN[best] for run in learned]
        selects = [
            self.scorer(self.model.weights_of(table)).subset(part)
            for table, (_, part) in zip(tables, self.folds, strict=True)
        ]
        weights = self.model.weights_of(torch.stack(tables).mean(dim=0))
        fit = self.scorer(weights)
        if len(self.folds) == 1:
            fit = fit.subset(self.folds[0][0])
        passes = self._passes_of_learning(learned) + self.scorer.passes - before
        name = _learned_name(self.learn_config.granularity)
        candidate = Candidate(name, weights, league.pool(selects), fit, passes=passes, learned=True)
        return candidate, int(learned[0].curve[best]["step"])

    def _learn(self, number: int, fit: list[int], select: list[int]) -> Learned:
        from torch.utils.data import Subset

        self.model.start_from(self._start_weights(fit))
        select_part = Subset(self.held_out, select)

        def score() -> Evaluation:
            with self.model.materialized() as module:
                if buffers.has_batchnorm(module):
                    self.scorer.recompute(module)
                return evaluate(
                    module,
                    select_part,
                    self.task,
                    batch_size=self.scorer.batch_size,
                    accelerator=self.accelerator,
                )

        return learn(
            self.model,
            self.train_part if self.train_part is not None else Subset(self.held_out, fit),
            self.task,
            self.learn_config,
            self.accelerator,
            score=score,
            state_file=self._state_file(number),
            state_of=f"fold {number} of {len(self.folds)}, {self.state_of}",
            progress=self.progress,
        )

    def _start_weights(self, fit: list[int]) -> MixingWeights | None:
        start, labels = self.learn_config.start, self.soup.labels
        if start == "uniform":
            return None
        chooser = {"greedy": greedy_soup, "best": best_single}[start]
        return chooser(labels, lambda weights: self.scorer(weights).subset(fit).ranking_loss)

    def _state_file(self, fold: int) -> Path | None:
        if self.accelerator.is_main_process:
            self.state.make()
        return self.state.file(fold)

    def _passes_of_learning(self, learned: list[Learned]) -> float:
        """Return passes over the held-out data: every sample trained on or scored along the way."""
        size = self.learn_config.batch_size * self.learn_config.accumulation
        trained = sum(run.curve[-1]["step"] for run in learned) * size
        scored = sum(len(run.curve) * len(part) for run, (_, part) in zip(learned, self.folds, strict=True))
        return (trained + scored) / len(self.held_out)


def _learned_name(granularity: str | list[str]) -> str:
    names = {"model": "TWA", "layer": "TWA by layer", "tensor": "TWA by tensor"}
    return names[granularity] if isinstance(granularity, str) else "TWA by pattern"
