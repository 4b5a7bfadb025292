"""What the commands share: options for the model and the text, opening both, and progress on standard error."""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from actome.core.model import Model
    from actome.core.text import Text

# Enough for every unit of a common model to have had its chance to fire, little enough to wait for on a laptop.
DEFAULT_TOKENS = 32_768
# Attention patterns take memory with the square of this.
LONGEST_DEFAULT_CONTEXT = 512
DEMO = "demo"


class UsageError(Exception):
    """The command line asks for something that cannot be: exit code 2."""


def add_command(
    commands: argparse._SubParsersAction, name: str, run: Callable[[argparse.Namespace], int], help: str, about: str
) -> argparse.ArgumentParser:
    """A command with the options that all commands have."""
    parser = commands.add_parser(name, help=help, description=about)
    parser.set_defaults(run=run, command=name)
    parser.add_argument("--quiet", "-q", action="store_true", help="print nothing but errors and what was asked for")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def add_model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--revision", help="branch, tag or commit on the hub")
    group.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as saved")
    group.add_argument("--device", help="such as cuda or cuda:1; default: the CPU")
    group.add_argument("--step", type=whole, help="training step of the demo model's checkpoint; default: the last")
    group.add_argument("--allow-pickle", action="store_true", help="also read pickled weights, which can run code")
    group.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")


def add_text_options(parser: argparse.ArgumentParser, tokens: int = DEFAULT_TOKENS) -> None:
    group = parser.add_argument_group("text")
    group.add_argument(
        "--text", metavar="FILE_OR_DIR", help="default: manual and source text that ships with Python, held out"
    )
    group.add_argument(
        "--tokens",
        type=lambda word: None if word == "all" else positive(word),
        default=tokens,
        metavar="N",
        help=f"read this many tokens at most, or all; default {tokens}",
    )
    group.add_argument("--batch-size", type=positive, default=8, metavar="N", help="rows in a batch; default 8")
    group.add_argument(
        "--context",
        type=positive,
        metavar="N",
        help=f"tokens in a row; default: as many as the model takes, up to {LONGEST_DEFAULT_CONTEXT}",
    )


def whole(word: str) -> int:
    """An argument that counts from zero."""
    if not word.isdecimal():
        raise argparse.ArgumentTypeError(f"{word!r} is not a whole number")
    return int(word)


def number(word: str) -> float:
    """An argument that is a finite number."""
    try:
        found = float(word)
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise argparse.ArgumentTypeError(f"{word!r} is not a finite number")
    return found


def positive(word: str) -> int:
    """An argument that counts from one."""
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r} is not a whole number above zero")
    return int(word)


def open_model(args: argparse.Namespace) -> Model:
    """The model that the command line names.

    Raises:
        UsageError: for a step without the demo model, or one that it does not have.
        LoadError: when there is no such model or it may not be loaded.
    """
    name = args.model or DEMO
    if args.step is not None and name != DEMO:
        raise UsageError(f"--step chooses a checkpoint of the demo model, and the model is {name}")
    _calm_transformers(args)
    import actome as ac

    _check_device(args.device)
    if name != DEMO:
        return ac.load(
            name,
            revision=args.revision,
            dtype=args.dtype,
            device=args.device,
            trust_remote_code=args.trust_remote_code,
            allow_pickle=args.allow_pickle,
        )
    from actome.tasks.demo import demo_steps

    if args.step is not None and args.step not in demo_steps():
        raise UsageError(f"the demo model has no checkpoint at step {args.step}; it has {demo_steps()}")
    return ac.demo(args.step, dtype=args.dtype, device=args.device)


def open_text(args: argparse.Namespace, model: Model) -> Text:
    """The text that the command line names, for the tokenizer and the context of the model.

    Raises:
        UsageError: for a context that the model does not have.
        TextError: when there is no such text, or no tokenizer to read it with.
    """
    from actome.core.text import Text
    from actome.report.scan import default_text

    if args.context is not None and model.context is not None and args.context > model.context:
        raise UsageError(f"--context {args.context} is longer than {model.name} takes, which is {model.context} tokens")
    options = {
        "context": args.context or min(model.context or LONGEST_DEFAULT_CONTEXT, LONGEST_DEFAULT_CONTEXT),
        "batch_size": args.batch_size,
        "limit": args.tokens,
    }
    if args.text is None:
        return default_text(model, **options)
    if not Path(args.text).exists():
        raise UsageError(f"--text {args.text} is not there")
    return Text(Path(args.text), model.tokenizer, **options)


def make_room(path: str | None) -> Path | None:
    """The path of an output file, with its folders made now rather than after the work.

    Raises:
        UsageError: when a folder of that name stands in the way, or for ``-``.
    """
    if path is None:
        return None
    if path == "-":
        raise UsageError("only --json goes to standard output with -; give the name of a file")
    if Path(path).is_dir():
        raise UsageError(f"{path} is a folder; give the name of a file")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return Path(path)


def shows_progress(args: argparse.Namespace) -> bool:
    """Whether somebody looks: not with --quiet, and not when piped."""
    return not args.quiet and sys.stderr.isatty()


@contextlib.contextmanager
def progress(args: argparse.Namespace, what: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """A bar on standard error; the value is called with how much is done. Silent with --quiet and when piped."""
    if not shows_progress(args):
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    unknown = total is None
    columns = [SpinnerColumn(), TextColumn("{task.description}")]
    columns += [BarColumn(), MofNCompleteColumn()] if not unknown else []
    remaining = TimeRemainingColumn(elapsed_when_finished=True)
    screen = Console(stderr=True)
    with Progress(*columns, remaining, console=screen, transient=True, refresh_per_second=4) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)


def _check_device(name: str | None) -> None:
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # an unknown name; a torch that was built without it
        raise UsageError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from None


def _calm_transformers(args: argparse.Namespace) -> None:
    import transformers

    if args.quiet or not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    if args.quiet:
        transformers.utils.logging.set_verbosity_error()
