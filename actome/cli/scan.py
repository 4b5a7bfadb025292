"""`actome scan`: one pass over a text, what the model's activations are like, and what is worth a look."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from actome.report.scan import Scan

FOUND = 3

# Said again here, since the panels are imported only when a command runs.
_PANELS = ("health", "sparsity", "geometry", "attention", "experts", "quantisation", "uncertainty", "training", "all")


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = add_command(
        commands,
        "scan",
        run,
        help="measure a model's activations over text and report what stands out",
        about="Reads text once, measures the activations of the model on the way, and reports what stands out.",
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="folder, hub id, or demo; default: demo")
    parser.add_argument("--panel", default="health", help=f"set of measures: {', '.join(_PANELS)}; default health")
    parser.add_argument(
        "--threshold",
        action="append",
        default=[],
        type=setting,
        metavar="NAME=VALUE",
        help="when a finding is made, such as dead_share=0.1; may be repeated",
    )
    out = parser.add_argument_group("results")
    out.add_argument("--json", metavar="FILE", help="write the scan as JSON; - is standard output, without a report")
    out.add_argument("--html", metavar="FILE", help="write the report as one page that needs no network")
    out.add_argument(
        "--compare", metavar="OTHER.json", help="put this scan beside one that was written before, in report and page"
    )
    out.add_argument("--no-passage", action="store_true", help="leave out the text with values of each token")
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
    from actome.core.errors import ActomeError
    from actome.measures.findings import thresholds_of
    from actome.report.scan import finding_ids, panel_names, scan

    for word, known, what in [*((word, finding_ids(), "finding") for word in args.fail_on),
                              (args.panel, panel_names(), "panel")]:  # fmt: skip
        if word not in known:
            raise UsageError(f"there is no {what} {word!r}{_nearest_or_all(word, known)}")
    thresholds = dict(args.threshold)
    try:
        thresholds_of(thresholds)
    except ActomeError as error:
        raise UsageError(str(error)) from None
    other = None if args.compare is None else _other(args)

    model = open_model(args)
    text = open_text(args, model)
    with progress(args, f"scanning {model.name}, tokens", args.tokens) as tell:
        result = scan(
            model, text, panel=args.panel, thresholds=thresholds, progress=tell, passage=not args.no_passage
        )  # fmt: skip
    if data:
        result.save_json(data)
    elif args.json:
        sys.stdout.write(result.to_json())
    # After the JSON is safe: two models may turn out to have nothing in common.
    comparison = None if other is None else result.compare(other)
    if page:
        (comparison or result).save_html(page)
    if not args.quiet and args.json != "-":
        from rich.console import Console

        result.print(Console())
        if comparison is not None:
            comparison.print(Console())
        for path in filter(None, (data, page)):
            print(f"written: {path}")
    present = {finding.id for finding in result.findings}
    return FOUND if present & set(args.fail_on) else 0


def _other(args: argparse.Namespace) -> Scan:
    """The scan to compare with, looked at before the work begins."""
    from actome.core.errors import ActomeError
    from actome.report.scan import Scan

    path = Path(args.compare)
    if not path.is_file():
        raise UsageError(f"--compare {path}: there is no such file; actome scan --json FILE writes one")
    try:
        other = Scan.from_json(path)
    except ActomeError as error:
        raise UsageError(f"--compare: {error}") from None
    if other.run.get("panel") != args.panel:
        raise UsageError(
            f"--compare {path}: that is a scan with the panel {other.run.get('panel')}, and this one is with "
            f"{args.panel}; give --panel {other.run.get('panel')}, or scan the other again"
        )
    return other


def setting(word: str) -> tuple[str, float]:
    """An argument NAME=VALUE with a number for its value."""
    name, equals, value = word.partition("=")
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not name or not equals or math.isnan(number):
        raise argparse.ArgumentTypeError(f"{word!r} is not NAME=VALUE with a number, such as dead_share=0.1")
    return name.strip(), number


def _nearest_or_all(word: str, known: list[str]) -> str:
    from actome.core.errors import nearest

    return nearest(word, known) or f"; there are: {', '.join(known)}"
