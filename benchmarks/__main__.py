"""The command: ``python -m benchmarks [NAME ...] [--quick] [--threads N] [--json FILE] [--write]``."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import warnings
from pathlib import Path

# Nothing is fetched, and what transformers says of generation would be said hundreds of times.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from . import machine, table
from .row import Options, Row

SUITES = ("forward", "patterns", "generation", "steering", "panels", "watching", "fixed", "imports")
DETAILS = ("measures", "similarity", "store")


def main() -> None:
    """Runs the suites that are named, or all, and tells their rows as they come."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="What actome costs; docs/benchmarks.md")
    names = f"of {', '.join(SUITES)}; all of these unless named; {', '.join(DETAILS)} only when named"
    parser.add_argument("names", nargs="*", metavar="NAME", help=names)
    parser.add_argument("--quick", action="store_true", help="few rounds: to see that everything works")
    parser.add_argument("--threads", type=int, default=2, help="for the large model (default 2)")
    parser.add_argument("--no-peers", action="store_true", help="do not import TransformerLens and nnsight")
    parser.add_argument("--panel", default="health", help="for `measures`: whose measures (default health)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures with their samples")
    parser.add_argument("--write", action="store_true", help=f"write the table into docs/{table.DOCUMENT.name}")
    args = parser.parse_args()
    if unknown := set(args.names) - {*SUITES, *DETAILS}:
        parser.error(f"no suite is called {', '.join(sorted(unknown))}; there are {', '.join((*SUITES, *DETAILS))}")
    if args.write and args.names:
        parser.error("--write replaces the whole table; leave out the names")
    options = Options(args.threads, args.quick, not args.no_peers, args.panel)
    facts = machine.describe(options)
    print(", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    warnings.simplefilter("ignore")  # those of other libraries, at every call
    done: dict[str, tuple[str, list[Row]]] = {}
    for name in args.names or SUITES:
        suite = importlib.import_module(f"benchmarks.{name}")
        about, rows = " ".join(suite.run.__doc__.split()), []
        print(f"\n{name}: {about}", flush=True)
        for row in suite.run(options):
            rows.append(row)
            print(table.lines(row), flush=True)
        done[name] = about, rows
    over = [row.work for _, rows in done.values() for row in rows if row.verdict == "over"]
    print(f"\n{len(over)} over the limit" + (": " + "; ".join(over) if over else ""))
    if args.json:
        found = {name: [row.as_json() for row in rows] for name, (_, rows) in done.items()}
        args.json.write_text(json.dumps({"machine": facts, "suites": found}, indent=1), encoding="utf-8")
    if args.write:
        print(f"wrote {table.write(table.markdown(done, facts))}")


if __name__ == "__main__":
    main()
