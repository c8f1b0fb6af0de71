"""What users call: a recipe or Python arguments in, a finished run out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from twa_merge import mixing
from twa_merge.baselines import best_single, greedy_soup
from twa_merge.checkpoints import Soup
from twa_merge.errors import UserError
from twa_merge.evaluation import Evaluation
from twa_merge.job import Job, Result
from twa_merge.mixing import MixingWeights
from twa_merge.recipe import Recipe, with_options
from twa_merge.tasks import Task, module_task


def train(
    soup: Soup,
    data: Any,
    *,
    task: str | Task | None = None,
    module: nn.Module | None = None,
    loss: Callable[[Any, Any], torch.Tensor] | None = None,
    test: Any = None,
    train_data: Any = None,
    output: str | Path | None = None,
    recipe: Recipe | None = None,
    resume: bool = False,
    overwrite: bool = False,
    **learn_options: Any,
) -> Result:
    """Learn the mixing weights of a soup on held-out data and write the merged model.

    Args:
        soup: the checkpoints.
        data: held-out data: a path or Hub name, a `datasets.Dataset`, or with a `Task` or a `module` any map-style
            data set of features that the task collates.
        task: a task's name or a `Task`; default found from the checkpoint.
        module: any module whose forward returns a loss, or with `loss`. Its weights are overwritten; load the merge
            from `output`, or pass a copy.
        loss: `loss(outputs, targets)` for batches `(inputs, targets)`.
        test: scored once, at the end.
        train_data: learn on this instead (TWA-t); `data` then only selects.
        output: folder of the merged model; None writes nothing. `recipe.yaml` is among what is left there if `data` is
            the only path, and no task, module or data set was passed: nothing else can be run again from a file.
        recipe: everything else; `learn_options` override its `learn` part.
        resume: go on with an interrupted run to the same output; it ends with the table of a whole run, unless the data
            are drawn anew each time they are read.
        overwrite: replace an earlier merge at `output`.

    Raises:
        UserError: something the caller can mend.
    """
    recipe = recipe or Recipe(checkpoints=list(soup.labels))
    recipe = replace(recipe, learn=with_options(recipe.learn, learn_options, "train"))
    if output is not None:
        recipe = replace(recipe, output=replace(recipe.output, path=str(output)))
    if isinstance(task, str):
        recipe = replace(recipe, task=task)
    if isinstance(data, str | Path):  # for the recipe.yaml that is left with the merge
        recipe = replace(recipe, data=replace(recipe.data, path=str(data)))
    splits = {"held_out": data, "test": test, "train": train_data}
    chosen = task if isinstance(task, Task) else module_task(loss) if module is not None else None
    return Job(recipe, soup, splits, task=chosen, module=module, resume=resume, overwrite=overwrite).run()


def run_recipe(recipe: Recipe, *, resume: bool = False, overwrite: bool = False, progress: bool = True) -> Result:
    """Run a recipe from checkpoints to the written merge."""
    if not recipe.checkpoints:
        raise UserError("checkpoints: none given")
    if recipe.data.path is None:
        raise UserError("data.path: none given; learning needs held-out data (--data)")
    if recipe.output.path is None:
        raise UserError("output.path: none given (--output)")
    soup = Soup(recipe.checkpoints, allow_pickle=recipe.allow_pickle)
    return Job(recipe, soup, {}, resume=resume, overwrite=overwrite, progress=progress).run()


def evaluate_checkpoints(recipe: Recipe) -> dict[str, Evaluation]:
    """Return each checkpoint's evaluation on a split, as it is."""
    soup = Soup(recipe.checkpoints, allow_pickle=recipe.allow_pickle)
    job = Job(recipe, soup, {})
    job.set_up()
    job.open_data(divide=False)
    job.build_model("disk")  # nothing learns: no basis is needed
    return {label: job.scorer(mixing.one_hot(k, soup.labels)) for k, label in enumerate(soup.labels)}


def choose_baseline(recipe: Recipe, soup: Soup, method: str) -> MixingWeights:
    """Return the greedy soup or the best single checkpoint on all held-out data, statistics recomputed."""
    job = Job(recipe, soup, {})
    job.set_up()
    job.open_data(divide=False)
    job.build_model("disk")  # nothing learns: no basis is needed
    chooser = {"greedy": greedy_soup, "best": best_single}[method]
    return job.scorer.with_statistics(chooser(soup.labels, lambda weights: job.scorer(weights).ranking_loss))
