"""`SnapshotCallback`: collects the candidates of a merge while transformers' `Trainer` trains."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from twa_merge.adapters import check_adapters, full_model, is_adapted
from twa_merge.checkpoints import Soup
from twa_merge.errors import UserError
from twa_merge.model import MergedModel
from twa_merge.sharding import is_dtensor
from twa_merge.snapshot_stores import DiskStore, MemoryStore, Store
from twa_merge.snapshots import SnapshotTaker

FOLDER = "_snapshots"
"""Inside `output_dir`; Trainer's `push_to_hub` leaves out what starts with `_`."""


class SnapshotCallback(TrainerCallback):
    """Keeps the model's weights every so many steps or epochs, as checkpoint folders `snapshot-STEP` or in memory.

    Training waits for a copy in memory only; the rest is done in the background. Where Trainer saves a checkpoint of
    its own at the same step, its files are linked instead; they stay when Trainer removes that checkpoint. A run that
    is resumed goes on with the snapshots before the checkpoint that it resumes from.

        callback = SnapshotCallback(every_n_steps=100)
        trainer = Trainer(model, args, callbacks=[callback], ...)
        trainer.train()
        soup = callback.soup()  # or twa.Soup(["out/_snapshots/snapshot-*"])

    Of a model with PEFT adapters, the full model is kept, with the adapters merged in. Of several processes the main
    one writes.

    Args:
        every_n_steps: optimisation steps between snapshots.
        every_n_epochs: epochs between them; one, if nothing is given.
        last: keep only so many, the newest.
        storage: `disk`; or `int8` or `int4`, in memory: the first snapshot as it is, the others as differences from it
            in few bits (1.06 or 0.56 bytes an element), so that merges of them are those of the rounded snapshots.
        folder: default `_snapshots` in Trainer's `output_dir`.
        overwrite: remove the snapshots of an earlier run that are there when training starts anew.

    Raises:
        UserError: when training begins: snapshots of an earlier run are there, the processes share the model (FSDP,
            DeepSpeed, tensor parallelism), its adapters cannot be merged into it, or the trainer is a `TWATrainer`.
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        *,
        every_n_epochs: int | None = None,
        last: int | None = None,
        storage: str = "disk",
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
        if storage != "disk" and folder is not None:
            raise UserError(f"snapshots: a folder has no meaning with storage {storage}")
        self.folder = None if folder is None else Path(folder)
        self.store: Store | None = None if storage == "disk" else MemoryStore(storage)
        self._named: Path | None = None
        self._taker: SnapshotTaker | None = None
        self._awaited: int | None = None
        self._runs = False

    @property
    def snapshots(self) -> list[Path]:
        """The folders of all snapshots so far, in the order of the run; none of those in memory."""
        self._wait()
        return list(self.store.paths.values()) if isinstance(self.store, DiskStore) else []

    def soup(self) -> Soup:
        """Return all snapshots so far.

        Raises:
            UserError: there are none.
        """
        self._wait()
        if self.store is None or not self.store.steps:
            raise UserError("snapshots: there are none yet")
        return Soup(self.store.sources())

    def _wait(self) -> None:
        if self._taker is not None:
            self._taker.wait()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        module, processor = _unwrapped(kwargs["model"]), kwargs.get("processing_class")
        _require_usable(args, state, module)
        self._wait()  # for what an interrupted run has left in the background
        self._named = None  # a run begins where the working directory is now
        self.store = self.store_of(args)
        if not state.is_world_process_zero:
            return
        if state.global_step > 0 and not self.store.steps:
            self._take_up(self.store, args, state, module, processor)
        # a run that is resumed takes the later ones again
        stale = [step for step in self.store.steps if step > state.global_step]
        again = self._runs and args.auto_find_batch_size  # Trainer starts anew with smaller batches
        if stale and state.global_step == 0 and not (self.overwrite or again):
            where = self.store.folder if isinstance(self.store, DiskStore) else "this callback"
            raise UserError(
                f"snapshots: {where} holds {len(stale)} of an earlier run; move them, give another folder, or "
                "set overwrite=True"
            )
        for step in stale:
            self.store.remove(step)
        self._taker = SnapshotTaker(self.store)
        self._awaited, self._runs = None, True
        # a run that was cut off between Trainer's save and `on_save` lacks one; of a stream, what epoch it was in at
        # the end of that step is not known
        told = self.every_n_steps is not None or has_length(kwargs["train_dataloader"])
        if state.global_step > 0 and state.global_step not in self.store.steps and told and self._is_due(state, kwargs):
            self._taker.take(state.global_step, module, processor)

    def _take_up(
        self, store: Store, args: TrainingArguments, state: TrainerState, module: nn.Module, processor: Any
    ) -> None:
        """Go on with the snapshots that the checkpoint holds, or say that there are none on disk."""
        assert args.output_dir is not None
        store.load(Path(args.output_dir) / f"checkpoint-{state.global_step}")
        if isinstance(store, MemoryStore):
            with full_model(module) as (base, _):
                store.describe(base, processor)
        elif self.every_n_steps is not None and state.global_step >= self.every_n_steps:
            warnings.warn(
                f"snapshots: none in {args.output_dir} from before step {state.global_step}, where this run goes on: "
                "was it started elsewhere, or without snapshots?",
                stacklevel=3,
            )

    def store_of(self, args: TrainingArguments) -> Store:
        """Return where the snapshots of a run are kept: each run's in its own folder."""
        if isinstance(self.store, MemoryStore):
            return self.store
        assert args.output_dir is not None
        folder = self.folder or Path(args.output_dir) / FOLDER
        if self.store is None or self._named != folder:
            # where it is now: the caller may change the working directory
            self.store, self._named = DiskStore(folder.absolute()), folder
        return self.store

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.every_n_steps is not None and self._is_due(state, kwargs):
            self._take(args, state, control, **kwargs)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.every_n_epochs is not None and self._is_due(state, kwargs):
            self._take(args, state, control, **kwargs)

    def _is_due(self, state: TrainerState, given: dict[str, Any]) -> bool:
        """Whether there is a snapshot of the present step, or of the epoch that ends with it."""
        if self.every_n_steps is not None:
            return state.global_step % self.every_n_steps == 0
        assert self.every_n_epochs is not None
        epoch = state.epoch or 0.0
        if has_length(given["train_dataloader"]):
            done = round(epoch)
            if not math.isclose(epoch, done, abs_tol=1e-6):
                return False  # the run was cut off
        else:  # Trainer takes all steps for one epoch
            done = math.ceil(epoch - 1e-6)
        return done % self.every_n_epochs == 0

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._taker is None:
            return
        assert args.output_dir is not None
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        self._taker.wait()  # a run that resumes from this checkpoint finds all before it
        if self._awaited == state.global_step and isinstance(self.store, DiskStore):
            self._awaited = None
            self.store.link(state.global_step, checkpoint)
        self._keep_last()
        self._taker.store.save(checkpoint)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._wait()
        self._keep_last()
        self._runs = False

    def _take(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        if self._taker is None:
            return
        module = _unwrapped(model)
        saves = control.should_save and args.save_strategy != "best"  # which may find that it is not the best
        if saves and isinstance(self.store, DiskStore) and not is_adapted(module):  # whose checkpoints hold no model
            self._awaited = state.global_step
        else:
            self._keep_last()
            self._taker.take(state.global_step, module, processing_class)

    def _keep_last(self) -> None:
        if self.last is not None and self._taker is not None:
            self._taker.wait()
            for step in self._taker.store.steps[: -self.last]:
                self._taker.store.remove(step)


def _require_usable(args: TrainingArguments, state: TrainerState, module: nn.Module) -> None:
    if _is_shared(args, module):
        raise UserError(
            "snapshots: with FSDP, DeepSpeed or tensor parallelism no process has the whole model; merge Trainer's own "
            "checkpoints instead (save_steps, then checkpoint-*)"
        )
    if isinstance(module, MergedModel):
        raise UserError("snapshots: what a TWATrainer trains are coefficients of a merge, not a model's weights")
    if state.is_hyper_param_search:
        raise UserError("snapshots: not in a hyperparameter search; take them when the best trial is trained again")
    check_adapters(module)


def _is_shared(args: TrainingArguments, model: nn.Module) -> bool:
    """Whether processes hold parts of a model, whoever has asked for that: the arguments, or `accelerate launch`."""
    from accelerate.utils import parse_flag_from_env

    asked = bool(getattr(args, "fsdp", None) or getattr(args, "deepspeed", None))
    launched = any(parse_flag_from_env(f"ACCELERATE_USE_{kind}") for kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"))
    return asked or launched or any(is_dtensor(parameter) for parameter in model.parameters())


def _unwrapped(model: nn.Module) -> nn.Module:
    from accelerate.utils import extract_model_from_parallel

    module: nn.Module = extract_model_from_parallel(model, keep_torch_compile=False)
    return module
