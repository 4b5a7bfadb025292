"""The command `actome`: its parser, its exit codes, and how errors are told.

Exit codes: 0 fine, 1 failed, 2 bad usage, 3 a finding of `--fail-on` is present, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from actome import __version__
from actome.cli import papers, record, scan, serve, sites, steer, trace, watch
from actome.cli.common import UsageError
from actome.core.errors import ActomeError

FINE, FAILED, BAD_USAGE, INTERRUPTED = 0, 1, 2, 130

EPILOG = """\
MODEL is a folder with a model in it, a hub id such as Qwen/Qwen3-0.6B, or the word demo for the model that ships with
actome. Exit codes: 0 fine, 1 failed, 2 bad usage, 3 a finding of --fail-on is present, 130 interrupted.
"""


def parser() -> argparse.ArgumentParser:
    """The whole command line as an argparse parser; each command adds its own part."""
    top = argparse.ArgumentParser(
        prog="actome",
        description="A laboratory for the activations of neural networks.",
        epilog=EPILOG,
    )
    top.add_argument("--version", action="version", version=f"actome {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (scan, sites, record, watch, trace, steer, serve, papers):
        command.add_parser(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    Args:
        argv: the words after `actome`; None takes them from the command line.

    >>> main(["papers", "show", "attention-sink-metrik"])
    2
    """
    try:
        args = parser().parse_args(argv)
    except SystemExit as stop:  # argparse has said what it had to say
        return stop.code if isinstance(stop.code, int) else BAD_USAGE
    debug = getattr(args, "debug", False)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print("actome: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone, as `head` does; what Python flushes at exit must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except UsageError as error:
        print(f"actome: {error}\nSee actome {args.command} --help", file=sys.stderr)
        return BAD_USAGE
    except (ActomeError, OSError) as error:
        if debug:
            raise
        print(f"actome: {error}", file=sys.stderr)
        return FAILED


def entry() -> None:
    """What the installed command and `python -m actome` call."""
    sys.exit(main())
