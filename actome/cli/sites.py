"""`actome sites`: the names by which a model's activations are reached."""

from __future__ import annotations

import argparse

from actome.cli.common import add_command, add_model_options, open_model


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = add_command(
        commands,
        "sites",
        run,
        help="list the sites of a model",
        about="Lists the sites of a model in the order of its forward, with their dims and sizes.",
    )
    parser.add_argument("model", metavar="MODEL", help="folder, hub id, or demo")
    parser.add_argument(
        "pattern",
        nargs="?",
        metavar="PATTERN",
        help="such as 'blocks.*.attn.*' or 'blocks.{0..3}.mlp.{act,out}'; default: all sites, blocks of one kind on "
        "one line",
    )
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    model = open_model(args)
    if args.pattern is not None:
        for site in model.sites(args.pattern):
            print(site)
        return 0
    from actome.report.words import spans

    # Without a pattern the twelve or eighty blocks of a model say the same twelve or eighty times.
    kinds: dict[tuple[str, str], list] = {}
    for site in model.sites():
        shape = str(site).removeprefix(site.name)
        kinds.setdefault((site.local, shape), []).append(site)
    for (local, shape), group in kinds.items():
        alone = len(group) == 1
        layers = "" if alone else f"  layers {spans([site.layer for site in group])}"
        print(f"{group[0].name if alone else local}{shape}{layers}")
    return 0
