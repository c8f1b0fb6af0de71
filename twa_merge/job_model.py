"""The model of a run, in the most exact storage that fits in every process."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from twa_merge.assembly import config_folder, load_architecture, merged_model
from twa_merge.checkpoints import Soup
from twa_merge.memory import OutOfMemory, drop_cached, free_in_every_process, is_out_of_memory, say
from twa_merge.model import MergedModel
from twa_merge.recipe import Recipe
from twa_merge.storage import next_smaller, storage_for

if TYPE_CHECKING:
    from accelerate import Accelerator


class ModelBuilder:
    """Builds the model of a run, once or, when memory runs out, again.

    Args:
        recipe: says how.
        soup: the checkpoints.
        accelerator: devices and processes.
        module: in place of the one that the recipe's task loads.
        progress: show a bar, and say which storage is taken.
    """

    def __init__(
        self, recipe: Recipe, soup: Soup, accelerator: Accelerator, module: nn.Module | None, *, progress: bool
    ) -> None:
        if module is None and recipe.data.preprocess is not None:
            module = load_architecture(config_folder(soup))
        self.recipe, self.soup, self.accelerator, self.module = recipe, soup, accelerator, module
        self.progress = progress

    def build(self, storage: str | None = None) -> MergedModel:
        """Return model and basis, in a smaller storage than asked for if memory runs out.

        Args:
            storage: in place of the recipe's.
        """
        storage = storage or self.choose_storage()
        while (model := self._build(storage)) is None:
            storage = self.smaller_storage(storage, f"storage {storage}: the model itself does not fit here")
        if self.recipe.learn.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        return model

    def _build(self, storage: str) -> MergedModel | None:
        """Return model and basis, or None if they do not fit in every process."""
        learn_config, world = self.recipe.learn, self.accelerator.num_processes
        failed, model = False, None
        try:
            model = merged_model(
                self.soup,
                self.module,
                task=self.recipe.task,
                granularity=learn_config.granularity,
                coordinates=learn_config.coordinates,
                directions=learn_config.directions,
                components=learn_config.components,
                linear=learn_config.linear,
                dtype=self.recipe.dtype,
                storage=storage,
                shard=learn_config.shard,
                device=self.accelerator.device,
                progress=self.progress and self.accelerator.is_main_process,
            )
            model.to(self.accelerator.device)
        except Exception as error:
            if not is_out_of_memory(error) or (learn_config.shard != "none" and world > 1):
                raise  # the others are waiting inside
            failed = True
        told = torch.tensor(float(failed), device=self.accelerator.device)
        if float(self.accelerator.reduce(told, reduction="sum")) > 0:
            if model is not None:
                model.unload()
            del model
            drop_cached()
            return None
        return model

    def smaller_storage(self, storage: str, reason: str) -> str:
        """Return the next smaller storage, and say that it is taken.

        Raises:
            OutOfMemory: there is none.
        """
        smaller = next_smaller(storage)
        if smaller is None:
            raise OutOfMemory(reason if reason.startswith("out of memory") else f"out of memory with {reason}")
        say(
            f"out of memory with storage {storage}: going on with {smaller}",
            main_process=self.accelerator.is_main_process,
        )
        return smaller

    def choose_storage(self) -> str:
        """Return the recipe's storage, or for `auto` the one that fits in every process."""
        if self.recipe.learn.storage != "auto":
            return self.recipe.learn.storage
        world = self.accelerator.num_processes
        free = free_in_every_process(self.accelerator.device)
        sharing = world if self.recipe.learn.shard != "none" else 1
        storage, line = storage_for(self.soup, free, processes=sharing)
        if self.progress:
            say(line, main_process=self.accelerator.is_main_process)
        return storage
