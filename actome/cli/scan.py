"""`actome scan`: one pass over a text, what the model's activations are like, and what is worth a look."""

from __future__ import annotations

import argparse
import sys

from actome.cli.common import (
    UsageError,
    add_command,
    add_model_options,
    add_text_options,
    make_room,
    open_model,
    open_text,
    progress,
)

FOUND = 3


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = add_command(
        commands,
        "scan",
        run,
        help="measure a model's activations over text and report what stands out",
        about="Reads text once, measures the activations of the model on the way, and reports what stands out.",
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="folder, hub id, or demo; default: demo")
    parser.add_argument("--panel", default="health", help="set of measures; default health")
    out = parser.add_argument_group("results")
    out.add_argument("--json", metavar="FILE", help="write the scan as JSON; - is standard output, without a report")
    out.add_argument("--html", metavar="FILE", help="write the report as one page that needs no network")
    out.add_argument(
        "--fail-on",
        action="append",
        default=[],
        metavar="ID",
        help="exit with 3 when this finding is present; may be repeated",
    )
    add_text_options(parser)
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    """Scans, prints, writes; returns the exit code."""
    page, data = make_room(args.html), None if args.json == "-" else make_room(args.json)
    from actome.report.scan import finding_ids, panel_names, scan

    for word, known, what in [*((word, finding_ids(), "finding") for word in args.fail_on),
                              (args.panel, panel_names(), "panel")]:  # fmt: skip
        if word not in known:
            raise UsageError(f"there is no {what} {word!r}{_nearest_or_all(word, known)}")

    model = open_model(args)
    text = open_text(args, model)
    with progress(args, f"scanning {model.name}, tokens", args.tokens) as tell:
        result = scan(model, text, panel=args.panel, progress=tell)
    if data:
        result.save_json(data)
    elif args.json:
        sys.stdout.write(result.to_json())
    if page:
        result.save_html(page)
    if not args.quiet and args.json != "-":
        from rich.console import Console

        result.print(Console())
        for path in filter(None, (data, page)):
            print(f"written: {path}")
    present = {finding.id for finding in result.findings}
    return FOUND if present & set(args.fail_on) else 0


def _nearest_or_all(word: str, known: list[str]) -> str:
    from actome.core.errors import nearest

    return nearest(word, known) or f"; there are: {', '.join(known)}"
