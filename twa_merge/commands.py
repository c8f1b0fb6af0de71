"""What each subcommand does. Handlers import what they need: parsing a command line loads no torch."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twa_merge.errors import UserError

if TYPE_CHECKING:
    from twa_merge.checkpoints import Soup
    from twa_merge.job import Result
    from twa_merge.mixing import MixingWeights
    from twa_merge.recipe import Recipe


_DATA_FLAGS = (
    "data", "split", "column", "metric", "max_length", "problem_type", "source_prefix", "eval_batch_size", "task",
    "device",
)  # fmt: skip
"""Flags of `average` that only choosing by held-out data has a use for."""


def train(args: argparse.Namespace) -> None:
    """Learn a merge from flags."""
    _run_and_print(_recipe(args), args)


def run(args: argparse.Namespace) -> None:
    """Learn a merge from a recipe file."""
    from twa_merge.recipe import load_recipe

    _run_and_print(load_recipe(args.recipe, args.overrides), args)


def _run_and_print(recipe: Recipe, args: argparse.Namespace) -> None:
    _quiet_libraries()
    from twa_merge.runner import run_recipe

    result = run_recipe(recipe, resume=args.resume, overwrite=args.overwrite)
    if _is_main_process():
        print_result(result, as_json=args.json)
    _end_processes()


def _is_main_process() -> bool:
    """Whether this is the process that prints and writes, of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def _end_processes() -> None:
    """Take down the process group of torchrun; left alone, its threads abort or hang the interpreter's exit."""
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()  # gloo may abort a process whose peer goes away first
        torch.distributed.destroy_process_group()


def print_result(result: Result, *, as_json: bool = False) -> None:
    """Print the league table, what ships and where the report is."""
    from twa_merge.report import summary

    if as_json:
        print(json.dumps(summary(result), indent=2))
        return
    print(result)
    if result.output is not None:
        print(f"merged model and report: {result.output}/ (report.md, league.png)")


def average(args: argparse.Namespace) -> None:
    """Write a merge with fixed or chosen weights."""
    from twa_merge.checkpoints import Soup, require_several
    from twa_merge.publish import check_output

    soup = Soup(args.checkpoints, allow_pickle=args.allow_pickle)
    require_several(soup.labels)
    if _is_main_process():
        check_output(Path(args.output), soup, overwrite=args.overwrite)
    weights = _fixed_weights(args, soup)
    if _is_main_process():
        _write(soup, weights, args)
    _end_processes()


def _fixed_weights(args: argparse.Namespace, soup: Soup) -> MixingWeights:
    from twa_merge import mixing
    from twa_merge.sources import require_order

    needed = {"last": ["last"], "decay": ["ema"], **{flag: ["greedy", "best"] for flag in _DATA_FLAGS}}
    for flag, methods in needed.items():
        if getattr(args, flag) not in (None, []) and args.method not in methods:
            raise UserError(f"--{flag.replace('_', '-')}: has a meaning only with --method {' or '.join(methods)}")
    if args.weights is not None:
        if args.method is not None:
            raise UserError("--weights and --method exclude each other")
        return mixing.given(args.weights, soup.labels)
    if args.method in ("last", "ema"):
        require_order(soup.labels)
    if args.method == "last":
        return mixing.last_k(args.last if args.last is not None else max(1, len(soup) // 2), soup.labels)
    if args.method == "ema":
        return mixing.ema(args.decay if args.decay is not None else 0.9, soup.labels)
    if args.method in ("greedy", "best"):
        if args.data is None:
            raise UserError(f"--method {args.method} chooses by held-out data: add --data")
        _quiet_libraries()
        from twa_merge.runner import choose_baseline

        return choose_baseline(_recipe(args), soup, args.method)
    return mixing.uniform(soup.labels)


def apply(args: argparse.Namespace) -> None:
    """Write the merge of a saved table."""
    from twa_merge.checkpoints import Soup
    from twa_merge.mixing import MixingWeights

    weights = MixingWeights.load(args.weights)
    soup = Soup(args.checkpoints, allow_pickle=args.allow_pickle)
    if _is_main_process():
        _write(soup, weights, args)


def _write(soup: Soup, weights: MixingWeights, args: argparse.Namespace) -> None:
    from twa_merge.plan import output_dtype
    from twa_merge.writer import MAX_SHARD_BYTES, shard_bytes, write

    write(
        soup,
        weights,
        args.output,
        dtype=output_dtype(args.dtype),
        max_shard_bytes=MAX_SHARD_BYTES if args.max_shard_gb is None else shard_bytes(args.max_shard_gb),
        overwrite=args.overwrite,
        finish=lambda folder: _write_card(folder, weights, soup),
        progress=True,
    )
    averaged = any(t.name.endswith("running_var") for t in soup.tensors) and weights.one_hot_column() is None
    if averaged and not weights.statistics:
        print(
            "note: BatchNorm's running statistics are averaged like weights, for there are no data to recompute them "
            "from; `train`, or `average --method greedy --data D`, does",
            file=sys.stderr,
        )
    for note in soup.notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"merged {len(soup)} checkpoints: {args.output}/")


def _write_card(folder: Path, weights: MixingWeights, soup: Soup) -> None:
    from twa_merge.card import model_card

    (folder / "README.md").write_text(model_card(weights, soup), encoding="utf-8")


def push(args: argparse.Namespace) -> None:
    """Upload a merged folder to the Hub."""
    _quiet_libraries()
    from twa_merge.hub import push_to_hub

    print(push_to_hub(args.folder, args.repo, private=args.private or None, revision=args.revision))


def evaluate(args: argparse.Namespace) -> None:
    """Score checkpoints as they are."""
    _quiet_libraries()
    from twa_merge.report import aligned, finite, scores_text
    from twa_merge.runner import evaluate_checkpoints

    found = evaluate_checkpoints(_recipe(args))
    _end_processes()
    if not _is_main_process():
        return
    if args.json:
        rows = {
            label: {name: finite(e.metric(name).value) for name in ("loss", *(m.name for m in e.metrics))}
            for label, e in found.items()
        }
        print(json.dumps(rows, indent=2, allow_nan=False))
        return
    names = [m.name for m in next(iter(found.values())).metrics]
    table = [["", "loss", *names]]
    table += [[k, scores_text(e.loss), *(scores_text(e.metric(n)) for n in names)] for k, e in found.items()]
    print(aligned(table))


def inspect(args: argparse.Namespace) -> None:
    """Say whether and how checkpoints fit together."""
    from twa_merge.checkpoints import Soup
    from twa_merge.inspection import inspect_soup, inspection_text

    about = inspect_soup(
        Soup(args.checkpoints, allow_pickle=args.allow_pickle), args.granularity, distances=args.distances
    )
    print(json.dumps(about, indent=2) if args.json else inspection_text(about))


def demo(args: argparse.Namespace) -> None:
    """Make the demo's soup and run the main job on it."""
    _quiet_libraries()
    import torch

    from twa_merge.demo import run_demo

    torch.set_num_threads(1)  # the models are tiny: threads would only wait for each other
    print_result(run_demo(Path(args.keep), args.seed))
    print(f"try next: twa-merge inspect '{args.keep}/members/*'")


def _recipe(args: argparse.Namespace) -> Recipe:
    """Return the recipe of `train`'s flags: only what the user gave, defaults stay in the recipe."""
    from twa_merge.recipe import from_dict

    def given(**flags: str) -> dict[str, Any]:
        found = {key: getattr(args, flag, None) for key, flag in flags.items()}
        return {key: value for key, value in found.items() if value is not None}

    columns = dict(_pair(text) for text in args.column)
    data = given(path="data", split="split", train_split="train_split", test_split="test_split", metrics="metric")
    learn_flags = [
        "granularity",
        "coordinates",
        "storage",
        "shard",
        "start",
        "optimizer",
        "lr",
        "epochs",
        "steps",
        "batch_size",
        "accumulation",
        "mixed_precision",
        "gradient_checkpointing",
        "seed",
    ]
    content: dict[str, Any] = {
        "checkpoints": args.checkpoints,
        "data": data
        | given(max_length="max_length", problem_type="problem_type", source_prefix="source_prefix")
        | ({"columns": columns} if columns else {}),
        "learn": given(**{flag: flag for flag in learn_flags}),
        "output": given(path="output", dtype="dtype", max_shard_gb="max_shard_gb"),
        "allow_pickle": args.allow_pickle,
        "ordered": getattr(args, "ordered", False),
    }
    content |= given(task="task", eval_batch_size="eval_batch_size", device="device", margin="margin")
    return from_dict(content, "arguments")


def _pair(text: str) -> tuple[str, str]:
    role, equals, column = text.partition("=")
    if not equals:
        raise UserError(f"--column: expected ROLE=NAME, such as text=sentence, got {text!r}")
    return role, column


def _quiet_libraries() -> None:
    """Libraries' own bars and advice would bury ours."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with contextlib.suppress(ImportError):
        from transformers.utils import logging

        logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with contextlib.suppress(ImportError):
        import datasets

        datasets.disable_progress_bars()
