"""`finish`: the merge of a Trainer's snapshots, learned and put in place in one call."""

from __future__ import annotations

import contextlib
import inspect
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from twa_merge.adapters import is_adapted, without_adapters
from twa_merge.assembly import load_merge
from twa_merge.callbacks import FOLDER, SnapshotCallback
from twa_merge.checkpoints import Soup
from twa_merge.errors import UserError
from twa_merge.evaluation import evaluation_mode, fixed_random_numbers
from twa_merge.job import Job, Result
from twa_merge.memory import say
from twa_merge.metrics import get_metric
from twa_merge.model import MergedModel
from twa_merge.recipe import Recipe
from twa_merge.snapshot_stores import MemoryStore
from twa_merge.splits import split_indices
from twa_merge.task_base import Batch, Task, require_rows, without_labels
from twa_merge.task_classification import classification_task
from twa_merge.task_custom import batch_size_of
from twa_merge.task_generation import IGNORED, logits_of_tokens, token_losses
from twa_merge.task_labels import SINGLE, LabelSpace
from twa_merge.tasks import guess_task, to_device

if TYPE_CHECKING:
    from transformers import Trainer

LEARN_ON = ("validation", "train")


def finish(
    trainer: Trainer,
    snapshots: Sequence[str | Path] | None = None,
    *,
    learn_on: str = "validation",
    test_dataset: Any = None,
    task: Task | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    recipe: Recipe | None = None,
    **learn_options: Any,
) -> Result:
    """Learn the merge of a run's snapshots, and leave it in `trainer.model`.

    After a training run, or in place of the second half of one (paper, sec. 6.1: head of training). The trainer's own
    data sets, collator, device and processes are used; running statistics of BatchNorm are recomputed. What goes into
    the model is what the result's verdict says: the learned merge, or the best fixed one if that is as good. A mean of
    products of low rank is not one: in place of a model with PEFT adapters, `trainer.model` becomes a full model.

        trainer = Trainer(model, args, callbacks=[SnapshotCallback()], ...)
        trainer.train()
        print(twa.finish(trainer))

    Args:
        trainer: with an `eval_dataset`, or a `train_dataset` to learn on.
        snapshots: checkpoint folders or patterns, in the order of the run; default those of its `SnapshotCallback`.
        learn_on: `validation` divides `eval_dataset` into what is learned on and what decides (TWA-v); `train` learns
            on `train_dataset`, and all of `eval_dataset` decides (TWA-t), or a tenth of the training data if there is
            none.
        test_dataset: scored once, at the end.
        task: losses and metrics; default those of classification or language models where the model is one of
            transformers' own, else the trainer's loss, scored sample by sample. `compute_metrics` is not used.
        output: also write the merged model and the report to this folder.
        overwrite: replace an earlier merge at `output`.
        recipe: everything else; default batches no larger than the trainer's. `learn_options` (`lr`, `epochs`,
            `granularity`, ...) override its `learn` part.

    Returns:
        What `twa.train` returns; `print` it for the table.

    Raises:
        UserError: no snapshots, no evaluation data, or something else the caller can mend; the model is as it was.
    """
    if learn_on not in LEARN_ON:
        raise UserError(f"learn_on: expected {' or '.join(LEARN_ON)}, got {learn_on!r}")
    if isinstance(trainer.model, MergedModel):
        raise UserError("finish: a TWATrainer learns the merge itself; call its save_model()")
    module = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    adapted = is_adapted(module)
    if adapted:
        module = without_adapters(module)
    soup = _soup_of(trainer, module) if snapshots is None else Soup(list(snapshots))
    splits = {"test": test_dataset}
    if learn_on == "train":
        splits["train"], collate = _features(trainer, trainer.train_dataset, training=True)
    if learn_on == "train" and trainer.eval_dataset is None:
        splits["train"], splits["held_out"] = _divided(splits["train"], trainer.args.seed)
        say(
            f"warning: no eval_dataset: {len(splits['held_out'])} training samples, which the snapshots have seen, "
            "decide in its place; their scores are optimistic",
            main_process=trainer.is_world_process_zero(),
        )
    else:
        splits["held_out"], collate = _features(trainer, trainer.eval_dataset)
    task = replace(task if task is not None else trainer_task(trainer, module), collate=collate)
    recipe = replace(recipe or _recipe_of(trainer, soup), ordered=True)
    options: dict[str, Any] = {"seed": trainer.args.seed} | learn_options
    if "mixed_precision" not in options:
        options["mixed_precision"] = _mixed_precision(trainer)
    recipe = replace(recipe, learn=replace(recipe.learn, **options))
    if output is not None:
        recipe = replace(recipe, output=replace(recipe.output, path=str(output)))
    if trainer.accelerator.device.type == "cpu":
        recipe = replace(recipe, device="cpu")
    if task.name == "trainer":
        _warn_unless_mean(task, module, splits["held_out"], trainer)
    with _restored_on_error(module):
        result = Job(recipe, soup, splits, task=task, module=module, overwrite=overwrite).run()
        load_merge(module, soup, result.weights)
    if adapted:
        trainer.model = trainer.model_wrapped = module
        trainer.optimizer = trainer.lr_scheduler = None  # those of the adapters
    return result


def trainer_task(trainer: Trainer, module: nn.Module) -> Task:
    """Return losses and metrics of what a trainer trains: a loss for each sample where the kind of model is known."""
    common: dict[str, Any] = {"prepare": require_rows, "collate": trainer.data_collator}
    config = getattr(module, "config", None)
    try:
        stock = config is not None and _has_stock_loss(trainer, module)
        kind = guess_task([type(module).__name__]) if stock else None
    except UserError:
        kind = None
    if kind in ("text-classification", "image-classification"):
        labels = LabelSpace.of(config)
        accuracy = (get_metric("accuracy"),) if labels.problem == SINGLE else ()
        return classification_task(kind, labels, require_rows, trainer.data_collator, accuracy)
    if kind is not None:
        shift = 1 if kind == "causal-lm" else 0
        return Task(
            name=kind,
            count=lambda batch: (batch["labels"][:, shift:] != IGNORED).sum().float(),
            sample_losses=lambda outputs, batch: _token_losses(outputs, batch, shift),
            predictions=None,
            metrics=(get_metric("perplexity"),),
            forward=without_labels if shift else lambda module, batch: module(**batch),
            **common,
        )
    return Task(
        name="trainer",
        count=lambda batch: torch.tensor(float(batch_size_of(batch))),
        sample_losses=_one_loss,
        predictions=None,
        forward=_loss_of(trainer),
        per_sample=False,
        **common,
    )


def _has_stock_loss(trainer: Any, module: nn.Module) -> bool:
    from transformers import Trainer

    own = type(trainer).compute_loss is not Trainer.compute_loss or trainer.compute_loss_func is not None
    forward = inspect.unwrap(type(module).forward)
    own = own or not forward.__module__.startswith("transformers.") or hasattr(module, "_loss_function")
    return not own and trainer.label_smoother is None


def _recipe_of(trainer: Trainer, soup: Soup) -> Recipe:
    """Return the defaults, in passes no larger than the trainer's."""
    recipe, args = Recipe(checkpoints=list(soup.labels)), trainer.args
    batch = min(recipe.learn.batch_size, args.train_batch_size * trainer.accelerator.num_processes)
    learn = replace(recipe.learn, batch_size=batch, accumulation=recipe.learn.batch_size // batch)
    return replace(recipe, learn=learn, eval_batch_size=min(recipe.eval_batch_size, args.eval_batch_size))


@contextlib.contextmanager
def _restored_on_error(module: nn.Module) -> Iterator[None]:
    """Put weights and buffers back if what is done in between fails: they may be nowhere else."""
    before = [(tensor, tensor.detach().cpu().clone()) for tensor in (*module.parameters(), *module.buffers())]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)
        raise


def _warn_unless_mean(task: Task, module: nn.Module, dataset: Any, trainer: Trainer) -> None:
    """Say so if the loss of a few samples is not the mean of theirs: candidates are scored sample by sample."""
    rows = [dataset[i] for i in range(min(4, len(dataset)))]

    def loss(samples: list[Any]) -> float:
        return float(task.forward(module, to_device(task.collate(samples), trainer.accelerator.device)))

    with torch.no_grad(), evaluation_mode(module), fixed_random_numbers():
        whole, each = loss(rows), [loss([row]) for row in rows]
    low, high = min(each), max(each)
    # weighted means, of samples with unequal numbers of labels, lie between
    if not low - 0.01 * abs(low) <= whole <= high + 0.01 * abs(high):
        say(
            f"warning: the trainer's loss of {len(rows)} samples together, {whole:.4g}, is none of a mean of theirs, "
            f"{low:.4g} to {high:.4g}: candidates are scored sample by sample, which may mean little; pass task=",
            main_process=trainer.is_world_process_zero(),
        )


def _token_losses(outputs: Any, batch: Batch, shift: int) -> tuple[Tensor, Tensor]:
    logits, labels = logits_of_tokens(outputs), batch["labels"]
    return token_losses(logits[:, : logits.shape[1] - shift], labels[:, shift:])


def _loss_of(trainer: Any) -> Callable[[nn.Module, Batch], Any]:
    # a copy: with label smoothing, Trainer takes the labels out of the batch
    return lambda module, batch: trainer.compute_loss(module, dict(batch))


def _one_loss(loss: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    return loss.float().reshape(1), torch.full((1,), float(batch_size_of(batch)), device=loss.device)


def _soup_of(trainer: Trainer, module: nn.Module) -> Soup:
    callbacks = trainer.callback_handler.callbacks
    found = [c for c in callbacks if isinstance(c, SnapshotCallback) and c.store is not None]
    for callback in found:
        if isinstance(callback.store, MemoryStore) and trainer.accelerator.num_processes > 1:
            _spread(callback.store, trainer, module)
        if callback.store is not None and callback.store.steps:
            return callback.soup()
    raise UserError(
        "finish: no snapshots; add callbacks=[twa.SnapshotCallback()] to the trainer before it trains, or name "
        "checkpoints ('runs/checkpoint-*')"
    )


def _spread(store: MemoryStore, trainer: Any, module: nn.Module) -> None:
    """Give every process the snapshots that the main one holds in memory, by a file in `output_dir`."""
    folder, main = Path(trainer.args.output_dir) / FOLDER, trainer.is_world_process_zero()
    if main:
        folder.mkdir(parents=True, exist_ok=True)
        store.save(folder)
    trainer.accelerator.wait_for_everyone()
    if not main:
        store.load(folder)
        store.describe(module, trainer.processing_class)
    trainer.accelerator.wait_for_everyone()
    if main:
        shutil.rmtree(folder)


def _features(trainer: Any, dataset: Any, *, training: bool = False) -> tuple[Any, Callable[[list[Any]], Batch]]:
    """Return a data set without the columns that the model does not take, and what makes its batches."""
    role = "train_dataset" if training else "eval_dataset"
    if dataset is None or isinstance(dataset, dict):
        got = "none" if dataset is None else f"several ({', '.join(dataset)})"
        raise UserError(f"finish: expected the trainer to have one {role}, got {got}")
    loader = trainer.get_train_dataloader() if training else trainer.get_eval_dataloader(dataset)
    return require_rows(loader.dataset), loader.collate_fn


def _divided(dataset: Any, seed: int) -> tuple[Any, Any]:
    """Return nine tenths of a data set, and a tenth."""
    from torch.utils.data import Subset

    [(fit, select)] = split_indices(len(dataset), select_fraction=0.1, min_select=1, seed=seed)
    return Subset(dataset, fit), Subset(dataset, select)


def _mixed_precision(trainer: Trainer) -> str:
    found = trainer.accelerator.mixed_precision
    if found not in ("no", "bf16"):
        raise UserError(f"finish: mixed precision {found} is not supported; train with bf16, or without")
    return str(found)
