"""`actome watch`: a training run in the terminal while it is written, or as one page."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from actome.cli.common import add_command, make_room

INTERRUPTED = 130


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = add_command(
        commands,
        "watch",
        run,
        help="follow a training run in the terminal, or write its report page",
        about="Shows a run that a training writes: alarms on top, the loss, the other numbers, and panels by layer. "
        "Follows it until it ends; piped, or with --once or --html, shows once what there is.",
    )
    parser.add_argument("path", metavar="RUN", help="the folder of the run")
    parser.add_argument("--run", dest="name", metavar="NAME", help="which one, where several were merged")
    parser.add_argument("--html", metavar="FILE", help="write the report as one page that needs no network")
    parser.add_argument("--once", action="store_true", help="print what there is now, and end")
    parser.add_argument(
        "--measures",
        nargs="+",
        default=[],
        metavar="NAME",
        help="show only these; patterns such as 'loss*' are allowed",
    )
    parser.add_argument("--every", type=seconds, default=1.0, metavar="SECONDS", help="between two looks; default 1")


def run(args: argparse.Namespace) -> int:
    """Follows or prints, writes the page; returns the exit code."""
    out = make_room(args.html)
    from rich.console import Console

    from actome.dynamics.digest import RunDigest
    from actome.dynamics.store import RunStore
    from actome.report.live import follow, print_run

    console = Console()
    with RunStore.open(Path(args.path)) as store:
        digest = RunDigest(store, args.name)
        digest.refresh()
        if args.once or out or not console.is_terminal or digest.status != "running":
            if not args.quiet:
                print_run(digest, console, args.measures)
            if out:
                from actome.report.run_page import run_page

                run_page(digest, measures=args.measures).save_html(out)
                if not args.quiet:
                    print(f"written: {out}")
            return 0
        try:
            follow(digest, console, args.measures, args.every)
        except KeyboardInterrupt:
            return INTERRUPTED
    return 0


def seconds(word: str) -> float:
    """An argument that is a time, above 0."""
    try:
        number = float(word)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{word!r} is not a number of seconds above 0")
    return number
