"""`SnapshotCallback`: collects the candidates of a merge while transformers' `Trainer` trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from twa_merge.adapters import is_adapted
from twa_merge.errors import UserError
from twa_merge.snapshots import SnapshotWriter, find_snapshots, remove_snapshot

FOLDER = "_snapshots"
"""Inside `output_dir`; Trainer's `push_to_hub` leaves out what starts with `_`."""


class SnapshotCallback(TrainerCallback):
    """Keeps the model's weights every so many steps or epochs, as checkpoint folders `snapshot-STEP`.

    Training waits for a copy in memory only; files are written in the background. Where Trainer saves a checkpoint of
    its own at the same step, its files are linked instead; they stay when Trainer removes that checkpoint. A run that
    is resumed goes on with the snapshots before the checkpoint that it resumes from.

        trainer = Trainer(model, args, callbacks=[SnapshotCallback(every_n_steps=100)], ...)
        trainer.train()
        soup = twa.Soup(["out/_snapshots/snapshot-*"])

    Of a model with PEFT adapters, the full model is kept, with the adapters merged in. Of several processes the main
    one writes.

    Args:
        every_n_steps: optimisation steps between snapshots.
        every_n_epochs: epochs between them; one, if nothing is given.
        last: keep only so many, the newest.
        folder: default `_snapshots` in Trainer's `output_dir`.
        overwrite: remove the snapshots of an earlier run that are there when training starts anew.

    Raises:
        UserError: snapshots of an earlier run are there, or the processes share the model (FSDP, DeepSpeed).
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        *,
        every_n_epochs: int | None = None,
        last: int | None = None,
        folder: str | Path | None = None,
        overwrite: bool = False,
    ) -> None:
        if every_n_steps is not None and every_n_epochs is not None:
            raise UserError("snapshots: every_n_steps and every_n_epochs exclude each other")
        for name, value in (("every_n_steps", every_n_steps), ("every_n_epochs", every_n_epochs), ("last", last)):
            if value is not None and value < 1:
                raise UserError(f"snapshots: {name}: expected at least 1, got {value}")
        self.every_n_steps, self.last, self.overwrite = every_n_steps, last, overwrite
        self.every_n_epochs = 1 if every_n_steps is None and every_n_epochs is None else every_n_epochs
        self.folder = None if folder is None else Path(folder)
        self._writer: SnapshotWriter | None = None
        self._awaited: int | None = None

    @property
    def snapshots(self) -> list[Path]:
        """The folders of all snapshots so far, in the order of the run."""
        if self._writer is not None:
            self._writer.wait()
        return [] if self.folder is None else list(find_snapshots(self.folder).values())

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if getattr(args, "fsdp", None) or getattr(args, "deepspeed", None):
            raise UserError(
                "snapshots: with FSDP or DeepSpeed no process has the whole model; merge Trainer's own checkpoints "
                "instead (save_steps, then checkpoint-*)"
            )
        if self.folder is None:
            assert args.output_dir is not None
            self.folder = Path(args.output_dir) / FOLDER
        if not state.is_world_process_zero:
            return
        # a run that is resumed takes the later ones again
        stale = {step: path for step, path in find_snapshots(self.folder).items() if step > state.global_step}
        if stale and state.global_step == 0 and not self.overwrite:
            raise UserError(
                f"snapshots: {self.folder} holds {len(stale)} of an earlier run; move them, give another folder, or "
                "set overwrite=True"
            )
        for path in stale.values():
            remove_snapshot(path)
        self._writer = SnapshotWriter(self.folder)
        self._awaited = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.every_n_steps is not None and state.global_step % self.every_n_steps == 0:
            self._take(state, control, **kwargs)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.every_n_epochs is not None and round(state.epoch or 0) % self.every_n_epochs == 0:
            self._take(state, control, **kwargs)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._writer is None:
            return
        self._writer.wait()  # a run that resumes from this checkpoint finds all before it
        if self._awaited == state.global_step:
            self._awaited = None
            assert args.output_dir is not None
            self._writer.link(state.global_step, Path(args.output_dir) / f"checkpoint-{state.global_step}")
            self._keep_last()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._writer is not None:
            self._writer.wait()
            self._keep_last()

    def _take(
        self,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        from accelerate.utils import extract_model_from_parallel

        if self._writer is None:
            return
        module = extract_model_from_parallel(model, keep_torch_compile=False)
        if control.should_save and not is_adapted(module):
            self._awaited = state.global_step  # Trainer saves next; of an adapted model the adapter alone
        else:
            self._writer.take(state.global_step, module, processing_class)
        self._keep_last()

    def _keep_last(self) -> None:
        if self.last is not None and self.folder is not None:
            for path in list(find_snapshots(self.folder).values())[: -self.last]:
                remove_snapshot(path)
