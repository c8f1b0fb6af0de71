"""One Accelerate loop that learns the coefficients of a `MergedModel`."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from twa_merge.batches import load_batches
from twa_merge.errors import UserError
from twa_merge.evaluation import Evaluation
from twa_merge.learn_config import LearnConfig
from twa_merge.model import MergedModel
from twa_merge.tasks import Batch, Task

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Learned:
    """What training produced: the table at every evaluation, and how it scored."""

    tables_EGN: Tensor
    """(E, G, N) float64 mixing weights, one table for each of E evaluations."""
    curve: list[dict[str, float]]
    """E rows: step, lr, fit_loss (mean since the last), select_loss."""


def best_evaluation(runs: Sequence[Learned], samples: Sequence[int]) -> int:
    """Return the evaluation with the lowest select loss of all folds together.

    One evaluation for all: picking each fold's own best step on its few samples would flatter the learned merge.

    Args:
        runs: one for each fold; an early stop shortens the choice to the steps that all have reached.
        samples: select samples of each fold.
    """
    reached = min(len(run.curve) for run in runs)
    pooled = [
        sum(n * run.curve[e]["select_loss"] for run, n in zip(runs, samples, strict=True)) for e in range(reached)
    ]
    return min(range(reached), key=pooled.__getitem__)


def learn(
    model: MergedModel,
    fit: Any,
    task: Task,
    config: LearnConfig,
    accelerator: Accelerator,
    *,
    score: Callable[[], Evaluation],
    state_file: Path | None = None,
    state_of: str = "",
    progress: bool = False,
) -> Learned:
    """Train the coefficients of `model` on `fit` and return the tables of all evaluations.

    The result does not depend on the number of processes or on how a step is divided into forward passes: every step
    sees the same samples, and each label element weighs the same.

    Args:
        model: starts from its present coefficients.
        fit: map-style data set of the task's features.
        task: makes batches and losses.
        config: learning rate, steps, ...
        accelerator: devices, precision and processes.
        score: returns the select part's evaluation at the model's present coefficients; called on every process.
        state_file: kept up to date at every evaluation; training goes on from it if it exists.
        state_of: says what is learned on what; a state of anything else is refused.
        progress: show a bar.

    Raises:
        UserError: the loss is not finite, or the batch is smaller than the number of processes.
    """
    total = config.total_steps(len(fit))
    run = _Run(model, config, total, accelerator, state_of)
    run.resume(state_file)
    if run.curve:
        run.require_same_score(score, state_file)
    else:
        run.evaluate(score, 0, math.nan)
        run.save(state_file)
    every = max(1, math.ceil(total / config.evaluations))
    batches = load_batches(fit, task, config, range(run.step, total), accelerator)
    recent: list[float] = []
    with _bar(total, run.step, progress and accelerator.is_main_process) as bar:
        model.train()
        while run.step < total and not run.stopped:
            recent.append(run.step_on(next(batches), task))
            bar.update()
            if run.step % every == 0 or run.step == total:
                run.evaluate(score, run.step, sum(recent) / len(recent))
                run.save(state_file)
                bar.set_postfix(select_loss=f"{run.curve[-1]['select_loss']:.4f}")
                recent.clear()
                model.train()
    return Learned(torch.stack(run.tables), run.curve)


class _Run:
    """The state of one training run: everything that a resumed run needs."""

    def __init__(
        self, model: MergedModel, config: LearnConfig, total: int, accelerator: Accelerator, state_of: str
    ) -> None:
        from transformers import get_cosine_schedule_with_warmup

        self.model, self.config, self.total, self.accelerator = model, config, total, accelerator
        self.identity = {"config": asdict(config), "total": total, "of": state_of}
        self.optimizer = torch.optim.AdamW(
            [model.twa_coefficients], lr=config.lr, weight_decay=config.weight_decay, betas=(0.9, 0.999)
        )
        self.scheduler = get_cosine_schedule_with_warmup(self.optimizer, round(config.warmup * total), total)
        self.wrapped = accelerator.prepare_model(model) if accelerator.num_processes > 1 else model
        self.step = 0
        self.curve: list[dict[str, float]] = []
        self.tables: list[Tensor] = []

    @property
    def stopped(self) -> bool:
        losses = [row["select_loss"] for row in self.curve]
        return len(losses) - 1 - losses.index(min(losses)) >= self.config.patience

    def step_on(self, micro_batches: list[Batch], task: Task) -> float:
        """Take one optimisation step and return its loss."""
        model, world = self.model, self.accelerator.num_processes
        counts = torch.stack([task.count(batch) for batch in micro_batches]).sum().to(model.twa_coefficients.device)
        count = self.accelerator.reduce(counts.float(), reduction="sum")
        value = torch.zeros((), device=model.twa_coefficients.device)
        for i, batch in enumerate(micro_batches):
            last = i + 1 == len(micro_batches)
            with _synchronised(self.wrapped, last):
                with self.accelerator.autocast():
                    outputs = task.forward(self.wrapped, batch)
                losses, weights = task.sample_losses(outputs, batch)
                loss = (losses * weights).sum() / count
                value += loss.detach()
                loss = loss * world  # DDP averages gradients over processes
                if last:
                    loss = loss + self.config.regularization / 2 * model.twa_coefficients.square().sum()
                self.accelerator.backward(loss)
        mean = float(self.accelerator.reduce(value, reduction="sum"))
        self._require_finite(mean)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.step += 1
        return mean

    def evaluate(self, score: Callable[[], Evaluation], step: int, fit_loss: float) -> None:
        loss = score().ranking_loss
        lr = self.optimizer.param_groups[0]["lr"]
        self.curve.append({"step": step, "lr": lr, "fit_loss": fit_loss, "select_loss": loss})
        self.tables.append(self.model.table_GN())

    def require_same_score(self, score: Callable[[], Evaluation], file: Path | None) -> None:
        """Raise if resumed coefficients score otherwise than when they were saved.

        No other check sees all of the select part and the loss.
        """
        saved, now = self.curve[-1]["select_loss"], score().ranking_loss
        if not math.isclose(saved, now, rel_tol=1e-3):
            raise UserError(
                f"{file}: its coefficients had a select loss of {saved:.4f}, and have {now:.4f} here: other data or "
                "another loss; give the same ones, or start without --resume"
            )

    def _require_finite(self, loss: float) -> None:
        if math.isfinite(loss):
            return
        furthest_G = self.model.table_GN().abs().amax(dim=1).nan_to_num(math.inf)
        group = list(self.model.basis.groups)[int(furthest_G.argmax())]
        raise UserError(
            f"the loss is {loss} at step {self.step + 1} (lr {self.optimizer.param_groups[0]['lr']:g}); the group "
            f"with the largest weights is {group!r}: lower the lr, or leave out a broken checkpoint"
        )

    def save(self, file: Path | None) -> None:
        """Write the state atomically, on the main process."""
        if file is None or not self.accelerator.is_main_process:
            return
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {
            "coefficients": self.model.twa_coefficients.detach(),
            "tables": torch.stack(self.tables),
        }
        for name, value in self.optimizer.state_dict()["state"].get(0, {}).items():
            tensors[f"optimizer.{name}"] = value
        about = {"step": self.step, "curve": self.curve, **self.identity}
        temporary = file.with_suffix(".tmp")
        save_file({n: t.cpu().contiguous().clone() for n, t in tensors.items()}, temporary, {"run": json.dumps(about)})
        os.replace(temporary, file)

    def resume(self, file: Path | None) -> None:
        """Go on from a saved state, if there is one."""
        if file is None or not file.is_file():
            return
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, framework="pt") as opened:
                about = json.loads(opened.metadata()["run"])
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file}: not a readable state ({error}); start without --resume") from error
        if any(about.get(key) != value for key, value in self.identity.items()):
            raise UserError(
                f"{file}: belongs to a run with other settings, checkpoints or data; give the same ones, or start "
                "without --resume"
            )
        with torch.no_grad():
            self.model.twa_coefficients.copy_(tensors["coefficients"])
        self.tables = list(tensors["tables"])
        self.step, self.curve = about["step"], about["curve"]
        state = {n.removeprefix("optimizer."): t for n, t in tensors.items() if n.startswith("optimizer.")}
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": {0: state} if state else {}, "param_groups": groups})
        for _ in range(self.step):
            self.optimizer._opt_called = True  # type: ignore[attr-defined]
            self.scheduler.step()


def _synchronised(wrapped: Any, last: bool) -> Any:
    import contextlib

    return contextlib.nullcontext() if last or not hasattr(wrapped, "no_sync") else wrapped.no_sync()


def _bar(total: int, done: int, show: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, initial=done, desc="learning", unit="step", delay=2, disable=None if show else True)
