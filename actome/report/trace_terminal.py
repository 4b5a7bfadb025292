"""A trace in a terminal: what changed and when, the phases, and the heads that came up."""

from __future__ import annotations

from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from actome.dynamics.trace_table import Trace
from actome.report.console import printed
from actome.report.trace import _facts, _name, _reads, dated_of, phases_of, when
from actome.report.words import WORDS, word

_MOST = 24
_MOST_HEADS = 5
# What a head came to do, and the least mean weight at the end that is worth a line.
_HEADS = (("induction", "induction", 0.15), ("previous_token", "previous token", 0.3), ("sink_excess", "sink", 0.3))


def print_trace(trace: Trace, console: Console | None = None) -> None:
    """Prints a trace.

    Args:
        console: where to; the terminal by default.
    """
    printed(lambda to: to.print(_whole(trace)), console or Console())


def _whole(trace: Trace) -> Group:
    parts: list[Any] = [Text(_name(trace), style="bold"), Text(" · ".join(_facts(trace)), style="dim")]
    reads = _reads(trace)
    parts += [Text(f"read {reads}", style="dim")] if reads else []
    parts += [
        Text(f"step {step} is left out: {reason}", style="yellow") for step, reason in sorted(trace.left_out.items())
    ]
    parts += [Text(""), *_phases(trace), *_heads(trace), *_changes(trace)]
    parts += [Text(note, style="dim") for note in trace.notes]
    return Group(*parts)


def _phases(trace: Trace) -> list[Any]:
    found = phases_of(trace)
    if found is None or found.p > 0.05:
        return []
    out: list[Any] = [Text("Phases of the last layer's geometry", style="bold")]
    for i, one in enumerate(found):
        rank = word("effective_rank").show
        sure = f"  begins {one.low:,.0f} to {one.high:,.0f} (95 %)" if i else ""
        out.append(
            Text.assemble(
                f"  {one.name:<20} steps {one.start:,.0f} to {one.end:,.0f}",
                (f"  effective rank {rank(one.rank[0])} → {rank(one.rank[1])}{sure}", "dim"),
            )
        )
    return [*out, Text("")]


def _heads(trace: Trace) -> list[Any]:
    out: list[Any] = []
    for measure, name, floor in _HEADS:
        if measure not in trace.measures or len(trace.steps) < 3:
            continue
        dated = trace.dates(measure).frame
        dated = dated[dated["head"].notna() & dated["layer"].notna() & (dated["last"] >= floor) & (dated["p"] <= 0.05)]
        dated = dated[dated["last"] - dated["first"] >= floor / 2].sort_values("last", ascending=False)
        for row in dated.head(_MOST_HEADS).to_dict("records"):
            show = word(measure).show
            out.append(
                Text.assemble(
                    f"  {name:<15} head {row['layer']}.{row['head']}",
                    f"  {show(row['first'])} → {show(row['last'])}",
                    (f"  half-way between steps {when(row)}", "dim"),
                )
            )
    return [Text("Heads that came up", style="bold"), *out, Text("")] if out else []


def _changes(trace: Trace) -> list[Any]:
    found = dated_of(trace)
    if found is None:
        return [Text(f"{len(trace.steps)} steps are too few for dates; give three or more.", style="dim")]
    frame = found.frame[(found.frame["p"] <= 0.05) & (found.frame["span"] > 0.02)]
    order = {name: i for i, name in enumerate(WORDS)}
    # Of each value the place where it changed most.
    firsts = frame.drop_duplicates("measure").sort_values(
        "measure", key=lambda names: names.map(lambda name: order.get(name, len(order))), kind="stable"
    )
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("what changed", overflow="fold")
    table.add_column("most at", no_wrap=True)
    for name in ("first", "last", "half-way", "turn"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in firsts.head(_MOST).to_dict("records"):
        one = word(row["measure"])
        turn = f"{one.show(row['turn_value'])} at {row['turn']:,.0f}" if row["turn"] == row["turn"] else ""
        place = row["place"].removesuffix("model") if row["site"] is None else row["place"]
        table.add_row(one.title, place, one.show(row["first"]), one.show(row["last"]), when(row), turn)
    steady = len(found.frame) - len(frame)
    more = f", {len(firsts) - _MOST} more values" if len(firsts) > _MOST else ""
    told = f"{len(frame)} of {len(found.frame)} curves follow the steps{more}; {steady} do not, or hardly change."
    return [table, Text(told, style="dim")]
