"""The `twa-merge` command. Handlers import what they need: `--help` loads no torch."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from typing import Any

import twa_merge.commands
from twa_merge import __version__
from twa_merge.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, 2 for the user's mistakes, 1 for failures."""
    parser = build_parser()
    args, left = parser.parse_known_args(arguments)
    if left and hasattr(args, "overrides") and not any(word.startswith("-") for word in left):
        args.overrides, left = [*args.overrides, *left], []  # argparse takes none that follow a flag
    if left:
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that unfinished folders are removed
    try:
        args.handler(args)
    except UserError as error:
        return _fail(args, error, str(error), 2)
    except KeyboardInterrupt as error:
        return _fail(args, error, "interrupted; nothing was written" + _resume_hint(args), 130)
    except OSError as error:
        where = error.filename or "could not read or write"
        return _fail(args, error, f"{where}: {error.strerror or error}" + _resume_hint(args), 1)
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

    train = _command(commands, "train", "learn the mixing weights and write the merged model")
    _add_checkpoints(train)
    _add_data(train)
    _add_learning(train)
    _add_output(train)
    _add_run(train)

    run = _command(commands, "run", "the same from a recipe file")
    run.add_argument("recipe", metavar="RECIPE.yaml")
    run.add_argument("overrides", nargs="*", metavar="key.sub=value", help="such as learn.lr=0.03 output.path=merged")
    _add_run(run)

    _add_fixed_commands(commands)
    _add_other_commands(commands)
    return parser


def _add_fixed_commands(commands: Any) -> None:
    average = _command(commands, "average", "merge with fixed or chosen weights")
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

    apply = _command(commands, "apply", "write the merge of a saved table")
    apply.add_argument("weights", metavar="WEIGHTS", help="mixing_weights.safetensors, or the folder that holds it")
    _add_checkpoints(apply)
    _add_output(apply)


def _add_other_commands(commands: Any) -> None:
    evaluate = _command(commands, "evaluate", "score checkpoints as they are")
    _add_checkpoints(evaluate)
    _add_data(evaluate)
    evaluate.add_argument("--json", action="store_true", help="print JSON")

    inspect = _command(commands, "inspect", "are these mergeable? reads headers and configs")
    _add_checkpoints(inspect)
    inspect.add_argument("--granularity", default="layer", help="which groups to list (default layer)")
    inspect.add_argument("--distances", action="store_true", help="also read the weights and print distances")
    inspect.add_argument("--json", action="store_true", help="print JSON")

    push = _command(commands, "push", "upload a merged folder to the Hub")
    push.add_argument("folder", metavar="OUT", help="a folder that twa-merge has written")
    push.add_argument("repo", metavar="org/name", help="made if it is not there")
    push.add_argument("--private", action="store_true", help="make it a private one")
    push.add_argument("--revision", help="branch, made if it is not there (default main)")

    demo = _command(commands, "demo", "all of it on handwritten digits, offline, in under two minutes")
    demo.add_argument("--keep", metavar="DIR", default="twa-merge-demo", help="where checkpoints and merge are kept")
    demo.add_argument("--seed", type=int, default=0)


def _command(commands: Any, name: str, about: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=about, description=about)
    parser.set_defaults(handler=getattr(twa_merge.commands, name))
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
    parser.add_argument("--problem-type", help="of a text classification, where the checkpoint does not say")
    parser.add_argument("--source-prefix", help="put before every source text (seq2seq, T5)")
    parser.add_argument("--eval-batch-size", type=int, help="samples of one scoring pass")
    parser.add_argument("--device", help="auto, cpu or cuda")


def _add_learning(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--train-split", help="learn on this training split (TWA-t)")
    parser.add_argument("--test-split", help="scored once, at the end")
    parser.add_argument("--granularity", help="what shares weights: model, layer or tensor (default tensor)")
    parser.add_argument("--coordinates", help="relative or normalized (default relative)")
    parser.add_argument(
        "--storage", help="of the deltas: float32, bfloat16, int8, int4, disk (default auto, by memory)"
    )
    parser.add_argument("--shard", help="what several processes share: none, basis or model (default none)")
    parser.add_argument("--start", help="uniform, greedy or best (default uniform)")
    parser.add_argument("--optimizer", help="adamw or sgd (default adamw)")
    parser.add_argument("--lr", type=float, help="of the optimizer, with warm-up and cosine (default 0.03)")
    parser.add_argument("--epochs", type=float, help="over the fit part, at least 100 steps (default 5)")
    parser.add_argument("--steps", type=int, help="in place of epochs")
    parser.add_argument("--batch-size", type=int, help="samples of a forward pass, all processes together (default 32)")
    parser.add_argument("--accumulation", type=int, help="forward passes in a step (default 1)")
    parser.add_argument("--mixed-precision", help="no or bf16 (default no)")
    parser.add_argument("--gradient-checkpointing", action="store_true", default=None)
    parser.add_argument("--seed", type=int, help="of the data's order and division (default 0)")
    parser.add_argument("--ordered", action="store_true", help="snapshots of one run in order: LAWA and EMA join in")
    parser.add_argument(
        "--margin", type=float, help="paired standard errors to beat the best baseline by, or it ships (default 1.0)"
    )


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


if __name__ == "__main__":
    sys.exit(main())
