"""`actome record`: activations of a text, streamed to a folder that any tool can read."""

from __future__ import annotations

import argparse

from actome.cli.common import add_command, add_model_options, add_text_options, open_model, open_text, progress


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = add_command(
        commands,
        "record",
        run,
        help="write activations to a folder",
        about="Streams the activations at some sites to a folder: safetensors shards and one Parquet index. What is "
        "written stays readable when the command is interrupted, and --resume goes on from there.",
    )
    parser.add_argument("model", metavar="MODEL", help="folder, hub id, or demo")
    parser.add_argument("pattern", metavar="PATTERN", help="which sites, such as 'blocks.*.resid.post'")
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write")
    exists = parser.add_mutually_exclusive_group()
    exists.add_argument("--append", action="store_true", help="add to the recording in DIR")
    exists.add_argument("--resume", action="store_true", help="go on with an interrupted recording of the same text")
    exists.add_argument("--overwrite", action="store_true", help="replace the recording in DIR")
    add_text_options(parser)
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    model = open_model(args)
    model.sites(args.pattern)  # a misspelt pattern is told before any text is read
    text = open_text(args, model)
    modes = {"append": args.append, "resume": args.resume, "overwrite": args.overwrite}
    with progress(args, f"recording {model.name}, tokens", args.tokens) as tell:
        recording = model.record(text, args.pattern, out=args.out, progress=tell, **modes)
    if not args.quiet:
        print(recording)
        print(f"written: {args.out}")
    return 0
