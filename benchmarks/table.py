"""The table, on the terminal and in the documentation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .row import Row
from .timing import Figure

DOCUMENT = Path(__file__).parents[1] / "docs" / "benchmarks.md"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"


def lines(row: Row) -> str:
    """A row for the terminal, with those of the peers below it."""
    limit = f"limit {_limit(row)}" if row.limit is not None else ""
    bare = f"bare {row.bare}" if row.bare else ""
    cells = f"{row.work:<60}{_figure(row.ours, row.unit):<29}{limit:<15}{row.verdict:<6}{bare:<14}{row.note}"
    return "\n".join([cells.rstrip(), *(f"    {name:<56}{_peer(one, row.unit)}" for name, one in row.peers.items())])


def markdown(suites: dict[str, tuple[str, list[Row]]], machine: dict[str, str]) -> str:
    """All suites as tables in markdown, under the machine that they were measured on."""
    out = [", ".join(f"{name} {value}" for name, value in machine.items()) + ".", ""]
    for about, rows in suites.values():
        names = list(dict.fromkeys(name for row in rows for name in row.peers))
        bare = any(row.bare for row in rows)
        out += [about, ""]
        head = ["work", *(["bare"] if bare else []), "limit", "actome", "", *names]
        out += [_cells(head), _cells(["---"] * len(head))]
        for row in rows:
            theirs = [_peer(row.peers[name], row.unit) if name in row.peers else "" for name in names]
            ours = _figure(row.ours, row.unit) + (f"; {row.note}" if row.note else "")
            cells = [row.work, *([row.bare] if bare else []), _limit(row), ours, row.verdict, *theirs]
            out.append(_cells(cells))
        out.append("")
    return "\n".join(out).rstrip()


def write(text: str) -> Path:
    """Puts the tables between the two marks of the document."""
    before, begin, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{DOCUMENT} has no lines {BEGIN} and {END} to write between")
    DOCUMENT.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")
    return DOCUMENT


def _figure(figure: Figure, unit: str) -> str:
    digits = 1 if unit == "MB" else 3
    low, middle, high = (f"{figure.quantile(q):.{digits}f}" for q in (0.25, 0.5, 0.75))
    return f"{middle} {unit} ({low} to {high})"


def _peer(one: Figure | str, unit: str) -> str:
    return one if isinstance(one, str) else _figure(one, unit)


def _limit(row: Row) -> str:
    if row.limit is None:
        return ""
    return f"{row.limit:.2f} {row.unit}" if row.unit == "x" else f"{row.limit:g} {row.unit}"


def _cells(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
