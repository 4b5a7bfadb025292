"""`actome papers`: the research that actome covers, and its reproductions."""

from __future__ import annotations

import argparse
import json
from typing import Any

from actome.cli.common import UsageError, add_command, progress, whole

_SCALES = ("smoke", "small")  # said again here, since the registry is imported only when a command runs


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = add_command(
        commands,
        "papers",
        run,
        help="list, show and reproduce the papers that actome covers",
        about="Lists the papers that actome covers, shows one, or puts its claim to the test on this machine. A claim "
        "that does not hold is a result, not a failure: run exits with 0 either way.",
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", dest="action", required=True)
    for name, about in [("list", "all papers"), ("show", "one paper"), ("run", "reproduce one paper's claim")]:
        action = actions.add_parser(name, help=about, description=about)
        action.add_argument("--json", action="store_true", help="print JSON")
        if name != "list":
            action.add_argument("slug", metavar="SLUG", help="slug or number of the paper")
        if name == "run":
            action.add_argument("--seed", type=whole, default=0, help="default 0")
            action.add_argument("--scale", choices=_SCALES, default="smoke", help="default smoke, which takes seconds")


def run(args: argparse.Namespace) -> int:
    from actome.papers import PaperError, entries, find

    if args.action == "list":
        everything = entries()
        _print(args, [entry.to_dict() for entry in everything], "\n".join(_line(entry) for entry in everything))
        return 0
    try:
        entry = find(args.slug)
    except PaperError as error:
        raise UsageError(str(error)) from None
    if args.action == "show":
        _print(args, entry.to_dict(), _fields(entry.to_dict()))
        return 0
    with progress(args, f"reproducing {entry.slug}, {args.scale} ({entry.takes.get(args.scale, 'a while')})"):
        result = entry.reproduce(args.seed, args.scale).to_dict()
    _print(args, result, _fields(result))
    return 0


def _line(entry: Any) -> str:
    return f"[{entry.number}] {entry.slug:<28} {entry.kind:<12} {entry.title}"


def _print(args: argparse.Namespace, data: Any, words: str) -> None:
    print(json.dumps(data, indent=2, allow_nan=False) if args.json else words)


def _fields(data: dict[str, Any], indent: str = "") -> str:
    lines = []
    for key, value in data.items():
        if isinstance(value, dict):
            lines += [f"{indent}{key}:", _fields(value, indent + "  ")]
        elif isinstance(value, bool):
            lines.append(f"{indent}{key}: {'yes' if value else 'no'}")
        else:
            lines.append(f"{indent}{key}: {value}")
    return "\n".join(lines)
