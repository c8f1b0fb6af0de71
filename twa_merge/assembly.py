"""Puts single parts together: a soup and a module into a `MergedModel`, names in a recipe into a task or an engine."""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import nn

from twa_merge import buffers, sharding
from twa_merge.basis import build_basis, mergeable_parameters
from twa_merge.checkpoints import Soup
from twa_merge.coordinates import needs_gram
from twa_merge.errors import UserError
from twa_merge.groups import group_parameters
from twa_merge.kernels import Kernels
from twa_merge.memory import free_in_every_process
from twa_merge.mixing import MixingWeights
from twa_merge.model import MergedModel
from twa_merge.originals import MappedFiles, OriginalBlock
from twa_merge.recipe import Recipe
from twa_merge.sharding import SHARDS
from twa_merge.sources import SIDE_SUFFIXES
from twa_merge.storage import storage_for
from twa_merge.tasks import Task, build_task, custom_task, guess_task, load_module
from twa_merge.tensorfile import Window, read_tensor

if TYPE_CHECKING:
    from accelerate import Accelerator


def merged_model(
    soup: Soup,
    module: nn.Module | None = None,
    *,
    task: str | None = None,
    granularity: str | list[str] = "tensor",
    coordinates: str = "relative",
    directions: str = "deltas",
    components: int | None = None,
    linear: bool = False,
    start: MixingWeights | None = None,
    dtype: str = "float32",
    storage: str = "auto",
    shard: str = "none",
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> MergedModel:
    """Return a `MergedModel` of a soup: an ordinary module in which only the coefficients train.

    Args:
        soup: the checkpoints.
        module: whose parameters are merged; default the task's Auto class on the first checkpoint.
        task: default found from the checkpoint's `architectures`.
        granularity: `model`, `layer`, `tensor`, or name patterns.
        coordinates: `relative` or `normalized`.
        directions: `deltas`, `orthogonal` or `pca`.
        components: of `pca`, how many; default all.
        linear: train the scale of the centre too (eq. 1).
        start: mixing weights to start from, default uniform.
        dtype: of the module, when it is loaded here.
        storage: of the deltas while learning: `float32`, `bfloat16`, `int8`, `int4`, `disk` (nothing in memory), or
            `auto`, the most exact of them that takes at most half of the free memory.
        shard: with several processes (`torch.distributed` initialised), what they share instead of each holding all
            of it: `none`, `basis`, or `model`, whose weights are then gathered a layer at a time.
        device: where the basis will be, for `auto`; move the model there. Of a sharded model, where it is put.
        progress: show a bar while the checkpoints are read.
    """
    check_shard(shard)
    device = torch.device(device)
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    spread = shard != "none" and world > 1
    if module is None:
        with _standard_names(soup) as folder:
            module = load_module(task or guess_task(architectures(folder)), folder, dtype=dtype, empty=spread)
    if spread:
        from torch.distributed.device_mesh import init_device_mesh

        sharding.shard(module, init_device_mesh(device.type, (world,)), layers=shard == "model")
        sharding.make_room(module, device)
    _fill_integers(module, soup)
    if storage == "auto":
        storage, _ = storage_for(soup, free_in_every_process(device), processes=world if spread else 1)
    groups = group_parameters(mergeable_parameters(soup, module), granularity)
    gram = needs_gram(directions)
    basis = build_basis(soup, module, groups, storage=storage, gram=gram, progress=progress)
    buffers.load_buffers(module, buffers.averaged(module, soup, [1 / len(soup)] * len(soup)))
    return MergedModel(
        module,
        basis,
        soup.labels,
        coordinates=coordinates,
        directions=directions,
        components=components,
        linear=linear,
        start=start,
        fingerprints=soup.fingerprints,
    )


@torch.no_grad()
def load_merge(module: nn.Module, soup: Soup, weights: MixingWeights) -> None:
    """Put a merge into a module's parameters and buffers, combined in float32 from the checkpoints."""
    files, plain = MappedFiles(owner=soup), Kernels(compile=False)
    for name, parameter in mergeable_parameters(soup, module).items():
        tensor = soup.tensor_of(name)
        assert tensor is not None
        block = OriginalBlock(tensor.entries, Window.whole(parameter.numel()), files, plain)
        block.combine(weights.row(name), parameter)
    averaged = buffers.averaged(module, soup, weights.mean_N)
    buffers.load_buffers(module, averaged | dict(weights.statistics))


@torch.no_grad()
def _fill_integers(module: nn.Module, soup: Soup) -> None:
    """Load what is not averaged: tensors of whole numbers, which are equal in all checkpoints."""
    for name, tensor in (*module.named_buffers(), *module.named_parameters()):
        if not tensor.is_floating_point() and soup.tensor_of(name) is not None:
            tensor.copy_(soup.read(0, name))


def check_shard(shard: str) -> None:
    """Raise unless this is something to shard."""
    if shard not in SHARDS:
        raise UserError(f"shard: expected {', '.join(SHARDS[:-1])} or {SHARDS[-1]}, got {shard!r}")


@contextlib.contextmanager
def _standard_names(soup: Soup) -> Iterator[Path]:
    """Yield a folder that `from_pretrained` reads the first checkpoint from, whatever its weights' file is called."""
    folder, files = config_folder(soup), soup.sources[0].files
    pickled = bool(files) and files[0].suffix != ".safetensors"
    standard = "pytorch_model.bin" if pickled else "model.safetensors"
    if len(files) > 1 or (files and files[0].name == standard):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="twa_merge-") as links:
        for side in folder.iterdir():
            if side.is_file() and side.suffix in SIDE_SUFFIXES and "index" not in side.name:
                Path(links, side.name).symlink_to(side.resolve())
        if files:
            Path(links, standard).symlink_to(files[0].resolve())
        else:  # held in memory
            state = {tensor.name: read_tensor(tensor.entries[0]) for tensor in soup.tensors}
            save_file(state, Path(links, standard), {"format": "pt"})
        yield Path(links)


def architectures(folder: Path) -> list[str]:
    """Return `architectures` of a checkpoint's config."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return list(config.get("architectures") or [])


def config_folder(soup: Soup) -> Path:
    """Return the folder with the config that the soup's model is built from."""
    if soup.folder is None or not (soup.folder / "config.json").is_file():
        raise UserError(f"{soup.labels[0]}: no config.json, so its model cannot be built; pass the module in Python")
    return soup.folder


def make_accelerator(recipe: Recipe) -> Accelerator:
    """Return the Accelerator of a recipe's device and precision."""
    from accelerate import Accelerator, InitProcessGroupKwargs

    if torch.distributed.is_available():
        # before there is a process group: functions of it take the one of their import for a default, and a group that
        # is held beyond its end keeps threads of gloo's, which now and then abort the exit of Python
        from torch.distributed import fsdp  # noqa: F401
    if recipe.device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device: expected auto, cpu or cuda, got {recipe.device!r}")
    if recipe.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda asked for, but torch finds no GPU; use --device cpu")
    torch.manual_seed(recipe.learn.seed)
    # the others wait while one writes; torchrun notices a process that has died
    patient = InitProcessGroupKwargs(timeout=timedelta(hours=24))
    # without a GPU, Accelerate takes several processes for single ones unless it is told that they are to use the CPU
    on_cpu = recipe.device == "cpu" or not torch.accelerator.is_available()
    try:
        return Accelerator(mixed_precision=recipe.learn.mixed_precision, cpu=on_cpu, kwargs_handlers=[patient])
    except ValueError as error:
        if "already been initialized" not in str(error):
            raise
        raise UserError(
            "learn.mixed_precision and device: another run in this Python process has used others, and Accelerate "
            "keeps the first; start a new process, or call accelerate.state.AcceleratorState._reset_state(True)"
        ) from error


def make_task(recipe: Recipe, soup: Soup) -> Task:
    """Return the task of a recipe."""
    folder, config = config_folder(soup), recipe.data
    if config.preprocess is not None:
        return custom_task(load_function(config.preprocess), folder, metrics=config.metrics or ())
    name = recipe.task or guess_task(architectures(folder))
    return build_task(
        name,
        folder,
        columns=config.columns,
        max_length=config.max_length,
        metrics=config.metrics,
        problem_type=config.problem_type,
        source_prefix=config.source_prefix,
    )


def load_function(where: str) -> Callable[..., Any]:
    """Import `package.module:function`, also from the working directory."""
    module_name, colon, function = where.partition(":")
    if not colon:
        raise UserError(f"data.preprocess: expected package.module:function, got {where!r}")
    sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module_name), function)  # type: ignore[no-any-return]
    except (ImportError, AttributeError) as error:
        raise UserError(f"data.preprocess: {where!r} cannot be imported ({error})") from error
    finally:
        sys.path.pop(0)


def load_architecture(folder: Path) -> nn.Module:
    """Return the module of the class named in the config's `architectures`."""
    import transformers

    names = architectures(folder)
    cls = getattr(transformers, names[0], None) if names else None
    if cls is None:
        raise UserError(f"{folder}: transformers has no class {names[0] if names else '(none named)'}")
    return cls.from_pretrained(folder, local_files_only=True, dtype=torch.float32)  # type: ignore[no-any-return]
