"""The `twa-merge` command. Handlers import what they need: `--help` loads no torch."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twa_merge import __version__
from twa_merge.errors import UserError

if TYPE_CHECKING:
    from twa_merge.checkpoints import Soup
    from twa_merge.mixing import MixingWeights
    from twa_merge.recipe import Recipe
    from twa_merge.runner import Result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, 2 for the user's mistakes, 1 for failures."""
    args = build_parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that unfinished folders are removed
    try:
        args.handler(args)
    except UserError as error:
        return _fail(args, error, str(error), 2)
    except KeyboardInterrupt as error:
        return _fail(args, error, "interrupted; nothing was written" + _resume_hint(args), 130)
    except OSError as error:
        return _fail(args, error, f"{error.filename or 'system'}: {error.strerror or error}" + _resume_hint(args), 1)
    except Exception as error:
        first = str(error).strip().splitlines()[:1]
        return _fail(args, error, f"{type(error).__name__}: {''.join(first)} (--debug shows where)", 1)
    return 0


def _fail(args: argparse.Namespace, error: BaseException, message: str, code: int) -> int:
    if args.debug:
        raise error
    print(f"twa-merge: {' '.join(message.split())}", file=sys.stderr)
    return code


def _resume_hint(args: argparse.Namespace) -> str:
    return "; the same command with --resume goes on" if hasattr(args, "resume") else ""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all subcommands."""
    parser = argparse.ArgumentParser(
        prog="twa-merge", description="N fine-tuned checkpoints in, one better model out (trainable weight averaging)."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    train = _command(commands, "train", _train, "learn the mixing weights and write the merged model")
    _add_checkpoints(train)
    _add_data(train)
    _add_learning(train)
    _add_output(train)
    _add_run(train)

    run = _command(commands, "run", _run, "the same from a recipe file")
    run.add_argument("recipe", metavar="RECIPE.yaml")
    run.add_argument("overrides", nargs="*", metavar="key.sub=value", help="such as learn.lr=0.03 output.path=merged")
    _add_run(run)

    average = _command(commands, "average", _average, "merge with fixed or chosen weights")
    _add_checkpoints(average)
    average.add_argument("--weights", type=_numbers, help="comma-separated, one for each checkpoint; scaled to sum one")
    average.add_argument(
        "--method",
        choices=("uniform", "last", "ema", "greedy", "best"),
        help="default uniform; greedy, best need --data",
    )
    average.add_argument("--last", type=int, metavar="K", help="with --method last: how many (default half)")
    average.add_argument("--decay", type=float, help="with --method ema (default 0.9)")
    _add_data(average, required=False)
    _add_output(average)

    apply = _command(commands, "apply", _apply, "write the merge of a saved table")
    apply.add_argument("weights", metavar="WEIGHTS", help="mixing_weights.safetensors, or the folder that holds it")
    _add_checkpoints(apply)
    _add_output(apply)

    evaluate = _command(commands, "evaluate", _evaluate, "score checkpoints as they are")
    _add_checkpoints(evaluate)
    _add_data(evaluate)
    evaluate.add_argument("--json", action="store_true", help="print JSON")

    inspect = _command(commands, "inspect", _inspect, "are these mergeable? reads headers and configs")
    _add_checkpoints(inspect)
    inspect.add_argument("--granularity", default="layer", help="which groups to list (default layer)")
    inspect.add_argument("--distances", action="store_true", help="also read the weights and print distances")
    inspect.add_argument("--json", action="store_true", help="print JSON")

    demo = _command(commands, "demo", _demo, "all of it on handwritten digits, offline, in under two minutes")
    demo.add_argument("--keep", metavar="DIR", default="twa-merge-demo", help="where checkpoints and merge are kept")
    demo.add_argument("--seed", type=int, default=0)
    return parser


def _command(commands: Any, name: str, handler: Any, about: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=about, description=about)
    parser.set_defaults(handler=handler)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _add_checkpoints(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoints", nargs="+", metavar="CKPT", help="folder, glob, file, or org/name@revision")
    parser.add_argument("--allow-pickle", action="store_true", help="also read pytorch_model.bin (weights only)")


def _add_data(parser: argparse.ArgumentParser, required: bool = True) -> None:
    parser.add_argument(
        "--task", help="text-classification, image-classification, causal-lm or seq2seq; found if absent"
    )
    parser.add_argument("--data", required=required, metavar="D", help="held-out data: file, folder or Hub name")
    parser.add_argument("--split", help="held-out split (default validation, or the only one)")
    parser.add_argument("--column", action="append", default=[], metavar="ROLE=NAME", help="such as text=sentence")
    parser.add_argument("--metric", action="append", metavar="NAME", help="accuracy, f1, mse, exact_match, bleu, ...")
    parser.add_argument("--max-length", type=int, help="tokens")
    parser.add_argument("--eval-batch-size", type=int, help="samples of one scoring pass")
    parser.add_argument("--device", help="auto, cpu or cuda")


def _add_learning(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--train-split", help="learn on this training split (TWA-t)")
    parser.add_argument("--test-split", help="scored once, at the end")
    parser.add_argument("--granularity", help="model, layer or tensor")
    parser.add_argument("--coordinates", help="relative or normalized")
    parser.add_argument("--start", help="uniform, greedy or best")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--epochs", type=float)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--accumulation", type=int)
    parser.add_argument("--mixed-precision", help="no, bf16 or fp16")
    parser.add_argument("--gradient-checkpointing", action="store_true", default=None)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--ordered", action="store_true", help="snapshots of one run in order: LAWA and EMA join in")


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", required=True, metavar="OUT", help="folder of the merged model")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16; default as in the checkpoints")
    parser.add_argument("--max-shard-gb", type=float, help="default 5")
    if "--overwrite" not in parser._option_string_actions:
        parser.add_argument("--overwrite", action="store_true", help="replace an earlier merge")


def _add_run(parser: argparse.ArgumentParser) -> None:
    if "--overwrite" not in parser._option_string_actions:
        parser.add_argument("--overwrite", action="store_true", help="replace an earlier merge")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run to the same output")
    parser.add_argument("--json", action="store_true", help="print report.json in place of the table")


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected comma-separated numbers, got {text!r}") from None


# --- handlers ---------------------------------------------------------------------------------------------------


def _train(args: argparse.Namespace) -> None:
    _run_and_print(_recipe(args), args)


def _run(args: argparse.Namespace) -> None:
    from twa_merge.recipe import load_recipe

    _run_and_print(load_recipe(args.recipe, args.overrides), args)


def _run_and_print(recipe: Recipe, args: argparse.Namespace) -> None:
    _quiet_libraries()
    from twa_merge.runner import run_recipe

    result = run_recipe(recipe, resume=args.resume, overwrite=args.overwrite)
    if int(os.environ.get("RANK", "0")) == 0:
        print_result(result, as_json=args.json)
    _end_processes()


def _end_processes() -> None:
    """Take down the process group of torchrun; left alone, its threads abort or hang the interpreter's exit."""
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def print_result(result: Result, *, as_json: bool = False) -> None:
    """Print the league table, what ships and where the report is."""
    from twa_merge.report import league_table, legend, summary

    if as_json:
        print(json.dumps(summary(result), indent=2))
        return
    print(league_table(result.league, result.verdict.winner))
    print(f"\n{legend(result)}\n{result.verdict.reason}.")
    if result.output is not None:
        print(f"merged model and report: {result.output}/ (report.md, league.png)")


def _average(args: argparse.Namespace) -> None:
    from twa_merge.checkpoints import Soup, require_several
    from twa_merge.publish import check_output

    soup = Soup(args.checkpoints, allow_pickle=args.allow_pickle)
    require_several(soup.labels)
    check_output(Path(args.output), soup, overwrite=args.overwrite)
    _write(soup, _fixed_weights(args, soup), args)


def _fixed_weights(args: argparse.Namespace, soup: Soup) -> MixingWeights:
    from twa_merge import mixing

    if args.weights is not None:
        if args.method is not None:
            raise UserError("--weights and --method exclude each other")
        return mixing.given(args.weights, soup.labels)
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


def _apply(args: argparse.Namespace) -> None:
    from twa_merge.checkpoints import Soup
    from twa_merge.mixing import MixingWeights

    weights = MixingWeights.load(args.weights)
    soup = Soup(args.checkpoints, allow_pickle=args.allow_pickle)
    _write(soup, weights, args)


def _write(soup: Soup, weights: MixingWeights, args: argparse.Namespace) -> None:
    from twa_merge.writer import MAX_SHARD_BYTES, output_dtype, write

    write(
        soup,
        weights,
        args.output,
        dtype=output_dtype(args.dtype),
        max_shard_bytes=int(args.max_shard_gb * 1e9) if args.max_shard_gb else MAX_SHARD_BYTES,
        overwrite=args.overwrite,
        progress=True,
    )
    for note in soup.notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"merged {len(soup)} checkpoints: {args.output}/")


def _evaluate(args: argparse.Namespace) -> None:
    _quiet_libraries()
    from twa_merge.report import aligned, scores_text
    from twa_merge.runner import evaluate_checkpoints

    found = evaluate_checkpoints(_recipe(args))
    if args.json:
        rows = {
            label: {"loss": e.loss.value, **{m.name: e.metric(m.name).value for m in e.metrics}}
            for label, e in found.items()
        }
        print(json.dumps(rows, indent=2))
        return
    names = [m.name for m in next(iter(found.values())).metrics]
    table = [["", "loss", *names]]
    table += [[k, scores_text(e.loss), *(scores_text(e.metric(n)) for n in names)] for k, e in found.items()]
    print(aligned(table))


def _inspect(args: argparse.Namespace) -> None:
    from twa_merge.checkpoints import Soup
    from twa_merge.inspection import inspect_soup, inspection_text

    about = inspect_soup(
        Soup(args.checkpoints, allow_pickle=args.allow_pickle), args.granularity, distances=args.distances
    )
    print(json.dumps(about, indent=2) if args.json else inspection_text(about))


def _demo(args: argparse.Namespace) -> None:
    _quiet_libraries()
    from twa_merge.demo import run_demo

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
        "start",
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
        "data": data | given(max_length="max_length") | ({"columns": columns} if columns else {}),
        "learn": given(**{flag: flag for flag in learn_flags}),
        "output": given(path="output", dtype="dtype", max_shard_gb="max_shard_gb"),
        "allow_pickle": args.allow_pickle,
        "ordered": getattr(args, "ordered", False),
    }
    return from_dict(content | given(task="task", eval_batch_size="eval_batch_size", device="device"), "arguments")


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


if __name__ == "__main__":
    sys.exit(main())
