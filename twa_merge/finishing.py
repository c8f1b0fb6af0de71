"""`finish`: the merge of a Trainer's snapshots, learned and put in place in one call."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from twa_merge import buffers
from twa_merge.adapters import is_adapted, without_adapters
from twa_merge.assembly import load_merge
from twa_merge.checkpoints import Soup
from twa_merge.errors import UserError
from twa_merge.finishing_snapshots import find_snapshots
from twa_merge.job import Job, Result
from twa_merge.memory import say
from twa_merge.model import MergedModel
from twa_merge.recipe import Recipe, with_options
from twa_merge.splits import split_indices
from twa_merge.task_base import Task, require_rows
from twa_merge.task_trainer import Collate, check_mean, require_same_batches, trainer_task

if TYPE_CHECKING:
    from transformers import Trainer

LEARN_ON = ("validation", "train")


def finish(
    trainer: Trainer,
    snapshots: str | Path | Sequence[str | Path] | None = None,
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
    data sets, collator, device and processes are used; running statistics of BatchNorm are recomputed, from training
    data where there are any. What goes into the model is what the result's verdict says: the learned merge, or the best
    fixed one if that is as good. A mean of products of low rank is not one: in place of a model with PEFT adapters,
    `trainer.model` becomes a full model.

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
            transformers' own and its loss of a batch agrees, else the trainer's loss, scored sample by sample.
            `compute_metrics` is not used, nor the collate of a task: the trainer's makes the batches.
        output: also write the merged model and the report to this folder.
        overwrite: replace an earlier merge at `output`.
        recipe: everything else; default batches no larger than the trainer's. `learn_options` (`lr`, `epochs`,
            `granularity`, ...) override its `learn` part.

    Returns:
        What `twa.train` returns; `print` it for the table. Its losses are the model's own, of all samples or tokens;
        `trainer.evaluate()` gives others (transformers 5.23: for shifted labels of T tokens `(T - 1) / T` of them, and
        with K processes K times as much).

    Raises:
        UserError: no snapshots, no evaluation data, or something else the caller can mend; the model is as it was.
    """
    _require_usable(trainer, learn_on, learn_options.get("shard", "none" if recipe is None else recipe.learn.shard))
    module = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    adapted = is_adapted(module)
    if adapted:
        module = without_adapters(module)
    trainer.accelerator.wait_for_everyone()  # the main process may still be writing the last snapshot
    soup = find_snapshots(trainer, module, snapshots)
    splits, collate = _splits_of(trainer, module, learn_on)
    splits["test"] = test_dataset
    if task is None:
        task = trainer_task(trainer, module, collate, splits["held_out"])
    require_same_batches(collate, splits["held_out"])
    task = replace(task, collate=collate)
    if recipe is None:
        recipe = _recipe_of(trainer, soup, learn_options.get("batch_size"))
    recipe = _completed(recipe, trainer, output, learn_options)
    _warn_if_pushed(trainer, output)
    if task.name == "trainer":
        check_mean(task, module, splits["held_out"], trainer)
    with _restored_on_error(module):
        result = Job(recipe, soup, splits, task=task, module=module, overwrite=overwrite).run()
        load_merge(module, soup, result.weights)
    if adapted:
        trainer.model = trainer.model_wrapped = module
        trainer.optimizer = trainer.lr_scheduler = None  # those of the adapters
    return result


def _require_usable(trainer: Trainer, learn_on: str, shard: str) -> None:
    if learn_on not in LEARN_ON:
        raise UserError(f"learn_on: expected {' or '.join(LEARN_ON)}, got {learn_on!r}")
    if isinstance(trainer.model, MergedModel):
        raise UserError("finish: a TWATrainer learns the merge itself; call its save_model()")
    if shard != "none":
        raise UserError(
            "finish: shard: the trainer's model is whole in every process, and must be so afterwards; for a model that "
            "needs more, merge the snapshots with twa-merge train --shard"
        )


def _splits_of(trainer: Trainer, module: nn.Module, learn_on: str) -> tuple[dict[str, Any], Collate]:
    """Return the data that decide, learn and give BatchNorm's statistics, and what makes batches of them."""
    splits: dict[str, Any] = {}
    if learn_on == "train":
        splits["train"], collate = _features(trainer, trainer.train_dataset, training=True)
    elif buffers.has_batchnorm(module) and hasattr(trainer.train_dataset, "__len__"):
        splits["statistics"], _ = _features(trainer, trainer.train_dataset, training=True)
    if learn_on == "train" and trainer.eval_dataset is None:
        splits["train"], splits["held_out"] = _divided(splits["train"], trainer.args.seed)
        say(
            f"warning: no eval_dataset: {len(splits['held_out'])} training samples, which the snapshots have seen, "
            "decide in its place; their scores are optimistic",
            main_process=trainer.is_world_process_zero(),
        )
    else:
        splits["held_out"], collate = _features(trainer, trainer.eval_dataset)
    return splits, collate


def _completed(recipe: Recipe, trainer: Trainer, output: str | Path | None, learn_options: dict[str, Any]) -> Recipe:
    """Return a recipe with what the trainer and the caller say."""
    options: dict[str, Any] = {"seed": trainer.args.seed} | learn_options
    if "mixed_precision" not in options:
        options["mixed_precision"] = _mixed_precision(trainer)
    recipe = replace(recipe, ordered=True, learn=with_options(recipe.learn, options, "finish"))
    if output is not None:
        recipe = replace(recipe, output=replace(recipe.output, path=str(output)))
    return replace(recipe, device="cpu") if trainer.accelerator.device.type == "cpu" else recipe


def _recipe_of(trainer: Trainer, soup: Soup, batch_size: int | None) -> Recipe:
    """Return the defaults, in passes no larger than the trainer's unless the caller names a size."""
    recipe, args = Recipe(checkpoints=list(soup.labels)), trainer.args
    learn = recipe.learn
    if batch_size is None:
        batch = min(learn.batch_size, args.train_batch_size * trainer.accelerator.num_processes)
        learn = replace(learn, batch_size=batch, accumulation=learn.batch_size // batch)
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


def _warn_if_pushed(trainer: Trainer, output: str | Path | None) -> None:
    """Say so if Trainer's own `push_to_hub` would upload the report, in which local paths are."""
    if output is None or trainer.args.output_dir is None:
        return
    place, root = Path(output).resolve(), Path(trainer.args.output_dir).resolve()
    if root in place.parents and not any(part.startswith("_") for part in place.relative_to(root).parts):
        say(
            f"warning: {output} is inside the trainer's output_dir: trainer.push_to_hub() would upload it as it is, "
            "local paths included; push it with twa.push_to_hub, or write it elsewhere",
            main_process=trainer.is_world_process_zero(),
        )


def _features(trainer: Any, dataset: Any, *, training: bool = False) -> tuple[Any, Collate]:
    """Return a data set without the columns that the model does not take, and what makes its batches."""
    role = "train_dataset" if training else "eval_dataset"
    if dataset is None or isinstance(dataset, dict):
        got = "none" if dataset is None else f"several ({', '.join(dataset)}): set trainer.{role} to one of them"
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
        raise UserError(f"finish: mixed precision {found} is not supported; pass mixed_precision='no' or 'bf16'")
    return str(found)
