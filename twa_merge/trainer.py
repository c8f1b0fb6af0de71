"""`TWATrainer`: transformers' `Trainer` on the coefficients of a merge."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from twa_merge import buffers
from twa_merge.assembly import merged_model
from twa_merge.card import model_card
from twa_merge.checkpoints import Soup
from twa_merge.errors import UserError
from twa_merge.hub import push_to_hub
from twa_merge.mixing import MixingWeights
from twa_merge.model import MergedModel
from twa_merge.publish import check_working_folder, replace_model
from twa_merge.splits import split_indices
from twa_merge.writer import write


@dataclass
class TWAConfig(TrainingArguments):
    """`TrainingArguments` with defaults that suit coefficients, and what makes the merge (see `LearnConfig`)."""

    learning_rate: float = field(default=0.03, metadata={"help": "Share of each delta that a step may move."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Steps, or their share, with rising learning rate."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "0: gradients of coefficients are not clipped."})
    num_train_epochs: float = field(default=5.0, metadata={"help": "Passes over the data that are learned on."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Samples of a forward pass."})
    granularity: str = field(default="tensor", metadata={"help": "model, layer or tensor: what shares a row."})
    coordinates: str = field(default="relative", metadata={"help": "relative or normalized."})
    directions: str = field(default="deltas", metadata={"help": "deltas, orthogonal or pca."})
    components: int | None = field(default=None, metadata={"help": "Of pca, how many; default all."})
    linear: bool = field(default=False, metadata={"help": "Learn the scale of the centre too."})
    storage: str = field(default="auto", metadata={"help": "Of the deltas: float32, bfloat16, int8, int4, disk, auto."})
    regularization: float = field(default=1e-5, metadata={"help": "lambda / 2 * ||c||^2 is added to the loss (eq. 2)."})
    select_fraction: float = field(
        default=0.2, metadata={"help": "Of an eval_dataset that is learned on: kept to decide."}
    )


class TWATrainer(Trainer):
    """Learns the coefficients of a merge as `Trainer` trains weights.

    Logging, evaluation, `compute_metrics`, callbacks, resume, `load_best_model_at_end` and several processes work as in
    `Trainer`. `checkpoint-*` folders hold the coefficients; `save_model` and `push_to_hub` leave the merged model,
    exact from the checkpoints.

        trainer = TWATrainer(["runs/a", "runs/b"], args=TWAConfig("out"), eval_dataset=held_out)
        trainer.train()
        trainer.save_model()

    Args:
        checkpoints: folders, patterns, Hub ids, or a `Soup`.
        args: `TWAConfig`; plain `TrainingArguments` too, whose learning rate is then to be set (0.03, not 5e-5).
        model: the module whose weights are merged; default the task's Auto class on the first checkpoint.
        task: for that, where the checkpoint's `architectures` does not say.
        train_dataset: learn on this (TWA-t). Without it, on a part of `eval_dataset` (TWA-v); the rest evaluates.
        eval_dataset: as of `Trainer`.
        options: everything else that `Trainer` takes, except `model_init`.

    Raises:
        UserError: the checkpoints do not fit together, they would be replaced by what is written, or an option that has
            no meaning here.
    """

    model: MergedModel
    _saves_checkpoint = False

    def __init__(
        self,
        checkpoints: Soup | str | Path | Sequence[str | Path],
        args: TrainingArguments | None = None,
        *,
        model: nn.Module | None = None,
        task: str | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        **options: Any,
    ) -> None:
        if isinstance(checkpoints, nn.Module):
            raise UserError("TWATrainer: expected checkpoints first, got a module; name it model=")
        if options.get("model_init") is not None:
            raise UserError("TWATrainer: model_init has no meaning; the weights come from the checkpoints")
        args = TWAConfig("trainer_output") if args is None else args
        if args.n_gpu > 1:
            raise UserError(
                f"TWATrainer: one process would take {args.n_gpu} GPUs, by nn.DataParallel, which cannot copy a merge; "
                "start it with torchrun --nproc-per-node, or show it one (CUDA_VISIBLE_DEVICES=0)"
            )
        if not isinstance(args, TWAConfig) and args.learning_rate == TrainingArguments.learning_rate:
            warnings.warn(
                f"learning_rate {args.learning_rate:g} is Trainer's default for weights; coefficients need about 0.03: "
                "use TWAConfig, or set it",
                stacklevel=2,
            )
        self.soup = checkpoints if isinstance(checkpoints, Soup) else Soup(checkpoints)
        check_working_folder(Path(args.output_dir or "."), self.soup, name="output_dir")
        made = merged_model(self.soup, model, task=task, device=args.device, **_merge_options(args))
        if train_dataset is None and eval_dataset is not None:
            train_dataset, eval_dataset = _divide(eval_dataset, args)
        self._regularization = float(getattr(args, "regularization", 0.0))
        super().__init__(model=made, args=args, train_dataset=train_dataset, eval_dataset=eval_dataset, **options)

    def mixing_weights(self) -> MixingWeights:
        """Return the present merge, BatchNorm's statistics recomputed from training data."""
        weights = self.model.mixing_weights()
        if not buffers.has_batchnorm(self.model.module):
            return weights
        with self.model.materialized(weights) as module:
            self._recompute(module)
            return MixingWeights(
                weights.table,
                weights.groups,
                weights.checkpoints,
                statistics=buffers.statistics(module),
                fingerprints=weights.fingerprints,
                linear=weights.linear,
            )

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return Trainer's loss, in training with the regulariser of eq. 2."""
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not (model.training and self._regularization):
            return found
        added = self._regularization / 2 * self.model.twa_coefficients.square().sum()
        if self._is_share_of_step(num_items_in_batch):
            added = added / self.current_gradient_accumulation_steps
        return (found[0] + added, *found[1:]) if isinstance(found, tuple) else found + added

    def _is_share_of_step(self, num_items_in_batch: Any) -> bool:
        """Whether the losses of accumulated passes add up to the step's; else Trainer divides each by their number."""
        if getattr(self, "loss_is_scaled_for_ga", None) is not None:
            return bool(self.loss_is_scaled_for_ga)
        counted = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return bool(counted or self.compute_loss_func is not None)

    def evaluation_loop(self, *arguments: Any, **options: Any) -> Any:
        """Evaluate with BatchNorm's statistics of the present merge."""
        if buffers.has_batchnorm(self.model.module):
            self.model.refresh()
            self._recompute(self.model.module)
        return super().evaluation_loop(*arguments, **options)

    def create_model_card(self, *arguments: Any, **options: Any) -> None:
        """Write the card of a merge."""
        if self.is_world_process_zero():
            card = model_card(self.model.mixing_weights(), self.soup)
            Path(self._output_dir(), "README.md").write_text(card, encoding="utf-8")

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save the merged model, upload it without local paths, wait for that (`blocking` or not), and return its
        address."""
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token or self.args.hub_token, private=private)
        self.save_model(_internal_call=True)
        self.create_model_card()
        if not self.is_world_process_zero():
            return None
        assert self.hub_model_id is not None
        return push_to_hub(
            self._output_dir(),
            self.hub_model_id,
            private=private,
            revision=revision or self.args.hub_revision,
            token=token or self.args.hub_token,
            message=commit_message or "End of training",
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push nothing while training: a checkpoint holds coefficients, not a model."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the merged model, exact from the checkpoints.

        Raises:
            UserError: an input is there.
        """
        # Trainer itself names a folder for `checkpoint-*` alone: those hold what a run resumes from, the coefficients
        self._saves_checkpoint = _internal_call and output_dir is not None
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            self._saves_checkpoint = False

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir if output_dir is not None else self._output_dir())
        weights = self.mixing_weights()  # on every process: statistics may be recomputed
        if self._saves_checkpoint:
            super()._save(str(folder), state_dict)
            if self.args.should_save:
                weights.save(folder)
            return
        check_working_folder(folder, self.soup, name="save_model")
        if not self.args.should_save:
            return
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".merge-", dir=folder) as beside:
            side, merge = Path(beside, "side"), Path(beside, "merge")
            super()._save(str(side), state_dict)
            (side / "model.safetensors").unlink()  # the coefficients
            write(self.soup, weights, merge)
            for path in side.iterdir():
                path.replace(merge / path.name)
            replace_model(folder, merge)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load coefficients, if they are of these checkpoints and mean the same."""
        if not Path(resume_from_checkpoint, "mixing_weights.safetensors").is_file():
            raise UserError(
                f"{resume_from_checkpoint}: no checkpoint of a TWATrainer, or damaged: mixing_weights.safetensors is "
                "not there; resume from an earlier one"
            )
        saved, now = MixingWeights.load(resume_from_checkpoint), self.model.mixing_weights()
        known = saved.fingerprints == now.fingerprints and saved.groups == now.groups and saved.linear == now.linear
        if known:
            try:
                super()._load_from_checkpoint(resume_from_checkpoint, model)
                known = torch.allclose(saved.table, self.model.table_GN(), rtol=1e-6, atol=1e-9)
            except RuntimeError:  # of another size: other components
                known = False
        if not known:
            raise UserError(
                f"{resume_from_checkpoint}: its coefficients are of other checkpoints, of another order of them, or of "
                "other granularity, coordinates or directions; resume with what it was started with"
            )

    def _recompute(self, module: nn.Module) -> None:
        from torch.utils.data import DataLoader, Subset

        # all of it in every process; without the columns that the model does not take. The loader of evaluation may be
        # kept by Trainer, for its own data
        whole = self.get_test_dataloader(self.train_dataset) if self.train_dataset is not None else None
        if whole is None or not hasattr(self.train_dataset, "__len__"):
            raise UserError(
                "TWATrainer: the model has BatchNorm, whose statistics are recomputed from training data; expected a "
                f"train_dataset with a length, got {type(self.train_dataset).__name__}"
            )
        size = len(self.train_dataset)  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(self.args.seed)  # a sampler's own would change the order of training
        chosen = torch.randperm(size, generator=generator)[: buffers.STATISTICS_SAMPLES].tolist()
        batch = self.args.per_device_train_batch_size
        part, last = Subset(whole.dataset, chosen), len(chosen) >= batch
        loader = DataLoader(part, batch, collate_fn=whole.collate_fn, drop_last=last)
        with torch.no_grad(), self.compute_loss_context_manager():
            batches = (self._prepare_inputs(batch) for batch in loader)
            buffers.recompute(module, batches, lambda inner, batch: inner(**batch))

    def _output_dir(self) -> str:
        assert self.args.output_dir is not None
        return self.args.output_dir


def _merge_options(args: TrainingArguments) -> dict[str, Any]:
    names = ("granularity", "coordinates", "directions", "components", "linear", "storage")
    return {name: getattr(args, name) for name in names} if isinstance(args, TWAConfig) else {}


def _divide(dataset: Any, args: TrainingArguments) -> tuple[Any, Any]:
    """Return the parts of a data set that are learned on and that decide."""
    from torch.utils.data import Subset

    if isinstance(dataset, dict):
        raise UserError(f"eval_dataset: expected one data set to learn on, got several ({', '.join(dataset)})")
    if not hasattr(dataset, "__len__"):
        raise UserError(f"eval_dataset: expected one with a length, to be divided; got {type(dataset).__name__}")
    fraction = args.select_fraction if isinstance(args, TWAConfig) else TWAConfig.select_fraction
    [(fit, select)] = split_indices(len(dataset), select_fraction=fraction, min_select=1, seed=args.seed)
    if hasattr(dataset, "select"):  # a `datasets.Dataset` stays one: Trainer removes columns of those
        return dataset.select(fit), dataset.select(select)
    return Subset(dataset, fit), Subset(dataset, select)
