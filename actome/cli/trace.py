"""`actome trace`: the same measurement over the checkpoints of a training, and what changed when."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from actome.cli.common import (
    DEMO,
    UsageError,
    _calm_transformers,
    _check_device,
    add_command,
    add_text_options,
    make_room,
    progress,
    whole,
)

# Said again here, since these are imported only when a command runs.
_PANELS = ("health", "sparsity", "geometry", "attention", "experts", "quantisation", "uncertainty", "all")
TOKENS = 16_384


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = add_command(
        commands,
        "trace",
        run,
        help="measure a model's activations at every checkpoint of its training",
        about="Measures the same on the same text at every checkpoint, one in memory at a time, and says what changed "
        "and when. With --out, what was measured is kept, and the same command goes on where it was interrupted.",
    )
    parser.add_argument(
        "source",
        nargs="?",
        metavar="SOURCE",
        default=DEMO,
        help="folder of checkpoints such as checkpoint-500 or step1000, hub id, run store, or demo; default: demo",
    )
    parser.add_argument("--panel", default="geometry", help=f"set of measures: {', '.join(_PANELS)}; default geometry")
    parser.add_argument(
        "--revisions", nargs="+", metavar="PATTERN", help="of a hub id, such as 'step*'; default: all that name a step"
    )
    parser.add_argument("--steps", nargs="+", type=whole, metavar="N", help="only these")
    parser.add_argument("--model", metavar="FOLDER", help="for checkpoints that are weights alone: a folder of a model")
    parser.add_argument("--repeats", type=whole, metavar="N", help="rows of repeated tokens for induction; default 16")
    parser.add_argument(
        "--skip", action="store_true", help="leave out steps that are missing, corrupt or of another architecture"
    )
    out = parser.add_argument_group("results")
    out.add_argument("--out", metavar="RUN", help="folder to keep the trace in, and to go on from")
    out.add_argument("--html", metavar="FILE", help="write the trace as one page that needs no network")
    out.add_argument("--json", metavar="FILE", help="write the trace as JSON; - is standard output, without a report")
    add_text_options(parser, TOKENS)
    group = parser.add_argument_group("model")
    group.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as saved")
    group.add_argument("--device", help="such as cuda or cuda:1; default: the CPU")
    group.add_argument("--allow-pickle", action="store_true", help="also read pickled weights, which can run code")
    group.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")


def run(args: argparse.Namespace) -> int:
    """Traces, prints, writes; returns the exit code."""
    page, data = make_room(args.html), None if args.json == "-" else make_room(args.json)
    from actome.core.errors import nearest
    from actome.dynamics import Trace, trace
    from actome.dynamics.schema import begun
    from actome.measures.panels import PANELS
    from actome.report.trace import to_json, write

    if args.panel not in PANELS:
        raise UsageError(f"there is no panel {args.panel!r}{nearest(args.panel, PANELS)}")
    if args.text is not None and not Path(args.text).exists():
        raise UsageError(f"--text {args.text} is not there")
    _calm_transformers(args)
    _check_device(args.device)
    # A run that was watched, or a trace that was made before, is shown as it is.
    if Path(args.source).is_dir() and begun(Path(args.source)):
        result = Trace.open(args.source)
    else:
        loading = {"dtype": args.dtype, "device": args.device}
        loading |= {"allow_pickle": args.allow_pickle, "trust_remote_code": args.trust_remote_code}
        with progress(args, f"tracing {args.source}, checkpoints") as tell:
            result = trace(
                args.source, args.panel, text=None if args.text is None else Path(args.text), tokens=args.tokens,
                context=args.context, batch_size=args.batch_size, repeats=args.repeats, revisions=args.revisions,
                steps=args.steps, model=args.model, out=args.out, on_error="skip" if args.skip else "raise",
                progress=lambda done, total, step: tell(done), **{key: one for key, one in loading.items() if one},
            )  # fmt: skip
    if data:
        write(data, to_json(result))
    elif args.json:
        sys.stdout.write(to_json(result))
    if page:
        result.to_html(page)
    if not args.quiet and args.json != "-":
        from rich.console import Console

        from actome.report.trace_terminal import print_trace

        print_trace(result, Console())
        for path in filter(None, (args.out, data, page)):
            print(f"written: {path}")
    return 0
