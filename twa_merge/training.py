"""One Accelerate loop that learns the coefficients of a `MergedModel`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from twa_merge.batches import load_batches
from twa_merge.errors import UserError
from twa_merge.evaluation import Evaluation
from twa_merge.learn_config import LearnConfig
from twa_merge.memory import OutOfMemory, drop_cached, is_out_of_memory, say, smaller_batch
from twa_merge.model import MergedModel
from twa_merge.tasks import Batch, Task
from twa_merge.training_state import read_state, write_state

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
        UserError: the checkpoints do not differ, the loss is not finite, or the batch is smaller than the number of
            processes.
    """
    if not model.basis.trainable_G.any():
        raise UserError(f"the {model.basis.num_checkpoints} checkpoints do not differ: there is nothing to learn")
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
            loss = run.step_on(next(batches), task)
            if loss is None:
                config = run.divide_batch(config)
                batches = load_batches(fit, task, config, range(run.step, total), accelerator)
                continue
            recent.append(loss)
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
        identity = {"config": _what_counts(config), "total": total, "of": state_of}
        self.identity = json.loads(json.dumps(identity))  # as it is read again: without tuples
        self.optimizer = _optimizer(model.twa_coefficients, config)
        self.scheduler = get_cosine_schedule_with_warmup(self.optimizer, round(config.warmup * total), total)
        self.step = 0
        self.storage = model.basis.storage
        self.curve: list[dict[str, float]] = []
        self.tables: list[Tensor] = []

    @property
    def stopped(self) -> bool:
        losses = [row["select_loss"] for row in self.curve]
        return len(losses) - 1 - losses.index(min(losses)) >= self.config.patience

    def step_on(self, micro_batches: list[Batch], task: Task) -> float | None:
        """Take one optimisation step and return its loss; None, with nothing changed, if memory ran out.

        Processes exchange the gradient once a step, together with the loss and whether memory ran out anywhere.
        """
        model = self.model
        coefficients = model.twa_coefficients
        counts = torch.stack([task.count(batch) for batch in micro_batches]).float()
        count = self.accelerator.reduce(counts.sum().to(coefficients.device), reduction="sum")
        value = torch.zeros((), device=coefficients.device)
        failed = False
        try:
            for batch, labelled in zip(micro_batches, counts.tolist(), strict=True):
                if not labelled and not model.is_sharded:
                    continue  # a loss over no label may be NaN, and its gradient too; sharded, all make every pass
                with self.accelerator.autocast():
                    outputs = task.forward(model, batch)
                losses, weights = task.sample_losses(outputs, batch)
                # without a label, loss and gradient are zero
                loss = (losses * weights).sum() / torch.where(count > 0, count, 1)
                value += loss.detach()
                self.accelerator.backward(loss)
        except Exception as error:
            if not is_out_of_memory(error) or (model.is_sharded and self.accelerator.num_processes > 1):
                raise  # inside a sharded model the other processes wait for this one: there is no going back
            failed = True
        grad = torch.zeros_like(coefficients) if coefficients.grad is None else coefficients.grad
        told = torch.stack([value, torch.tensor(float(failed), device=value.device)])
        if model.is_sharded:
            grad = grad * self.accelerator.num_processes  # it is the average over processes already
            told = self.accelerator.reduce(told, reduction="sum")
        else:
            packed = self.accelerator.reduce(torch.cat([grad.flatten(), told]), reduction="sum")
            grad, told = packed[:-2].view_as(grad), packed[-2:]
        self.optimizer.zero_grad()
        if float(told[1]) > 0:
            return None
        mean = float(told[0])
        self._require_finite(mean)
        coefficients.grad = grad + self.config.regularization * coefficients.detach()
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.step += 1
        return mean

    def divide_batch(self, config: LearnConfig) -> LearnConfig:
        """Return the same steps in smaller forward passes.

        Raises:
            OutOfMemory: a forward pass has one sample of each process already.
        """
        drop_cached()
        size = smaller_batch(config.batch_size, least=self.accelerator.num_processes)
        if size is None:
            raise OutOfMemory(
                f"out of memory with {config.batch_size} sample(s) in a forward pass: try --gradient-checkpointing, "
                "--mixed-precision bf16 or shorter inputs (--max-length)"
            )
        smaller = replace(config, batch_size=size, accumulation=config.accumulation * config.batch_size // size)
        say(
            f"out of memory with {config.batch_size} samples in a forward pass: going on with {size}, "
            f"{smaller.accumulation} passes in a step",
            main_process=self.accelerator.is_main_process,
        )
        return smaller

    def evaluate(self, score: Callable[[], Evaluation], step: int, fit_loss: float) -> None:
        loss = score().ranking_loss
        lr = self.optimizer.param_groups[0]["lr"]
        self.curve.append({"step": step, "lr": lr, "fit_loss": fit_loss, "select_loss": loss})
        self.tables.append(self.model.table_GN())

    def require_same_score(self, score: Callable[[], Evaluation], file: Path | None) -> None:
        """Raise if resumed coefficients score otherwise than when they were saved.

        No other check sees all of the select part and the loss. Rounded otherwise, they score otherwise.
        """
        if self.storage != self.model.basis.storage:
            return
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
        tensors: dict[str, Tensor] = {
            "coefficients": self.model.twa_coefficients.detach(),
            "tables": torch.stack(self.tables),
        }
        for name, value in self.optimizer.state_dict()["state"].get(0, {}).items():
            if value is not None:
                tensors[f"optimizer.{name}"] = value
        about = {"step": self.step, "curve": self.curve, "storage": self.model.basis.storage, **self.identity}
        write_state(file, tensors, about)

    def resume(self, file: Path | None) -> None:
        """Go on from a saved state, if there is one; the main process reads it for all."""
        from accelerate.utils import broadcast_object_list

        found: list[Any] = [None]
        if self.accelerator.is_main_process and file is not None and file.is_file():
            try:
                found = [read_state(file, self.identity)]
            except UserError as error:
                found = [error]
        if self.accelerator.num_processes > 1 and file is not None:
            broadcast_object_list(found)
        if isinstance(found[0], UserError):
            raise found[0]
        if found[0] is None:
            return
        about, tensors = found[0]
        with torch.no_grad():
            self.model.twa_coefficients.copy_(tensors["coefficients"])
        self.tables = list(tensors["tables"])
        self.step, self.curve, self.storage = about["step"], about["curve"], about.get("storage")
        state = {n.removeprefix("optimizer."): t for n, t in tensors.items() if n.startswith("optimizer.")}
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": {0: state} if state else {}, "param_groups": groups})
        for _ in range(self.step):
            self.optimizer._opt_called = True  # type: ignore[attr-defined]
            self.scheduler.step()


def _optimizer(coefficients: Tensor, config: LearnConfig) -> torch.optim.Optimizer:
    options: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.optimizer == "sgd":
        return torch.optim.SGD([coefficients], momentum=config.momentum, **options)
    return torch.optim.AdamW([coefficients], betas=(0.9, 0.999), **options)


def _what_counts(config: LearnConfig) -> dict[str, Any]:
    """Return the settings that a resumed run must share: not how a step is divided, nor where things are held."""
    found = asdict(config)
    for name in ("batch_size", "accumulation", "storage", "shard", "gradient_checkpointing"):
        del found[name]
    return found | {"samples": config.batch_size * config.accumulation}


def _bar(total: int, done: int, show: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, initial=done, desc="learning", unit="step", delay=2, disable=None if show else True)
