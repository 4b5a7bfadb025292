"""`actome serve`: a model with clamps behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

from actome.cli.common import UsageError, add_command, add_model_options, open_model, positive


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = add_command(
        commands,
        "serve",
        run,
        help="serve a model with clamps over HTTP, as OpenAI's API",
        about="Serves a model under /v1/completions and /v1/chat/completions. Requests choose their clamps with "
        '"clamps": ["NAME", {"name": "NAME", "scale": 0.5}]; all apply to those that do not choose.',
    )
    parser.add_argument("model", metavar="MODEL", help="folder, hub id, or demo")
    parser.add_argument(
        "--clamp",
        action="append",
        default=[],
        metavar="[NAME=]FOLDER",
        help="clamps as steer fit saved them, or a .gguf file; may be repeated",
    )
    parser.add_argument("--host", default="127.0.0.1", help="default: this machine only")
    parser.add_argument("--port", type=positive, default=8000, help="default 8000")
    limits = parser.add_argument_group("limits")
    limits.add_argument("--running", type=positive, default=8, metavar="N", help="sequences at once; default 8")
    limits.add_argument("--waiting", type=positive, default=64, metavar="N", help="requests that may wait; default 64")
    limits.add_argument("--max-prompt", type=positive, metavar="N", help="tokens; default: the model's context")
    limits.add_argument("--max-new", type=positive, default=2048, metavar="N", help="tokens a request; default 2048")
    limits.add_argument("--timeout", type=positive, default=120, metavar="SECONDS", help="a request; default 120")
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    """Serves until it is interrupted."""
    named = [_named(word) for word in args.clamp]
    if not all(name and path for name, path in named):
        raise UsageError("--clamp takes FOLDER, or NAME=FOLDER with neither of them empty")
    if args.port > 65535:
        raise UsageError(f"--port {args.port}: ports are 1 to 65535")
    if len({name for name, _ in named}) < len(named):
        raise UsageError("two --clamp have the same name; give NAME=FOLDER")
    try:
        import uvicorn

        from actome.steer.serving import Limits, make_app
    except ImportError as error:
        raise UsageError(f"serving needs FastAPI and uvicorn: pip install 'actome[serve]' ({error})") from None
    from actome.steer.files import read_clamps

    model = open_model(args)
    clamps = {name: read_clamps(path, model) for name, path in named}
    limits = Limits(
        prompt=args.max_prompt, new=args.max_new, seconds=args.timeout, running=args.running, waiting=args.waiting
    )
    app = make_app(model, clamps, limits=limits)
    if not args.quiet:
        print(f"{model.name} on http://{args.host}:{args.port}/v1, clamps: {', '.join(clamps) or 'none'}", flush=True)
    uvicorn.run(app, host=args.host, port=args.port, log_level="warning")
    return 0


def _named(word: str) -> tuple[str, str]:
    """A name and a path; the name of the path unless one is given."""
    name, given, path = word.partition("=")
    return (name, path) if given else (Path(word).stem, word)
