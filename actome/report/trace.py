"""A trace as a page with a step slider, and as JSON."""

from __future__ import annotations

import json
import math
from typing import Any

import pandas as pd

from actome import __version__
from actome.core.errors import MeasureError
from actome.dynamics.geometry_phases import Phases, geometry_phases
from actome.dynamics.trace_dates import Dated
from actome.dynamics.trace_table import Trace
from actome.report.plain import lines, strict, write
from actome.report.shell import whole
from actome.report.trace_data import page_data
from actome.report.trace_figures import chart, templates, ticks
from actome.report.words import kind_of, word

__all__ = ["chart", "page", "to_json", "write"]

_SCRIPTS = ("page.js", "trace.js")
_MOST_DATES = 400
_TILES = ("loss", "perplexity")


def page(trace: Trace, title: str | None = None) -> str:
    """The page of a trace: what changed and when, curves and maps over steps, and layers at the slider's step.

    Args:
        title: what it is a trace of; by default what its `about` says.

    Returns:
        HTML of about a megabyte, nearly all of it the drawing library; it loads nothing.
    """
    data = page_data(trace)
    data["ticks"] = ticks(trace.steps) if trace.steps else []
    found = phases_of(trace)
    data["phases"] = [{"name": one.name, "step": one.start} for one in found or ()][1:]
    drawn = bool(data["stacks"] or data["lines"])
    return whole(
        "trace.html",
        specs=templates(),
        data=data,
        scripts=_SCRIPTS,
        needed=drawn,
        name=title or _name(trace),
        facts=_facts(trace),
        reads=_reads(trace),
        tiles=_tiles(trace),
        phases=_phases(found),
        dates=_dates(trace),
        left_out=sorted(trace.left_out.items()),
        notes=trace.notes,
        steps=data["steps"],
        have={
            "curves": drawn,
            "profiles": any(one["place"] is None and len(one["layers"]) > 1 for one in data["stacks"]),
            "heads": any(one["place"] is not None for one in data["stacks"]),
        },
        made=f"actome {__version__}"
        + (f", panel {panel}" if isinstance(panel := trace.about.get("panel"), str) else ""),
    )


def phases_of(trace: Trace) -> Phases | None:
    """The phases of the last layer, where a trace has what they take."""
    try:
        return geometry_phases(trace)
    except MeasureError:
        return None


def dated_of(trace: Trace) -> Dated | None:
    """The dates of all that is drawn, where there are steps enough."""
    drawn = [name for name in trace.measures if word(name).drawn]
    try:
        return trace.dates(drawn)
    except MeasureError:
        return None


def _name(trace: Trace) -> str:
    source = str(trace.about.get("source", "a run"))
    return source.rstrip("/").rpartition("/")[2] or source if source.startswith("/") else source


def _facts(trace: Trace) -> list[str]:
    model = trace.about.get("model") or {}
    steps = trace.steps
    facts = [str(model.get("class", ""))]
    facts += [f"{model['parameters']:,} parameters"] if "parameters" in model else []
    facts += [f"{model[key]} {noun}" for key, noun in (("layers", "layers"), ("head", "heads")) if model.get(key)]
    facts += [f"width {model['d_model']}"] if model.get("d_model") else []
    facts += [f"{len(steps)} steps from {steps[0]:,} to {steps[-1]:,}"] if steps else []
    return [fact for fact in facts if fact]


def _reads(trace: Trace) -> str:
    reads = trace.about.get("reads") or {}
    counts = reads.get("counts")
    said = str(reads.get("source", ""))
    if counts:
        said += f": {counts['tokens']:,} tokens in {counts['sequences']:,} rows of up to {reads['context']}"
    if trace.about.get("repeats") and "induction" in trace.measures:
        said += f"; {trace.about['repeats']} rows of repeated random tokens for induction"
    return said


def _tiles(trace: Trace) -> list[dict[str, str]]:
    tiles = [{"name": "Steps", "value": f"{len(trace.steps)}", "tone": ""}]
    for name in _TILES:
        curve = next(iter(trace.each(name)), None) if name in trace.measures else None
        if curve is not None and len(curve.y) > 1:
            shown = [word(name).show(float(one)) for one in (curve.y[0], curve.y[-1])]
            tiles.append({"name": word(name).title, "value": " → ".join(shown), "tone": ""})
    best = strongest_head(trace)
    if best is not None:
        tiles.append({"name": f"Induction, head {best[0]}", "value": word("induction").show(best[1]), "tone": ""})
    if trace.left_out:
        tiles.append({"name": "Steps left out", "value": str(len(trace.left_out)), "tone": "warning"})
    return tiles


def strongest_head(trace: Trace, measure: str = "induction") -> tuple[str, float] | None:
    """The head with the largest value at the last step, as layer.head, and that value."""
    if measure not in trace.measures:
        return None
    rows = trace.rows(measure)
    rows = rows[(rows["step"] == rows["step"].max()) & rows["head"].notna() & rows["layer"].notna()]
    if rows["value"].isna().all():
        return None
    row = rows.loc[rows["value"].idxmax()]
    return f"{row['layer']}.{row['head']}", float(row["value"])


def _phases(found: Phases | None) -> list[dict[str, str]]:
    if found is None or found.p > 0.05:
        return []
    rank = word("effective_rank").show
    return [
        {
            "name": one.name,
            "steps": f"{one.start:,.0f} to {one.end:,.0f}",
            "sure": f"begins between {one.low:,.0f} and {one.high:,.0f} (95 %)" if i else "",
            "rank": f"effective rank {rank(one.rank[0])} → {rank(one.rank[1])}",
            "support": f"{one.support:.0%}".replace("%", " %"),
        }
        for i, one in enumerate(found)
    ]


def _dates(trace: Trace) -> list[dict[str, Any]]:
    found = dated_of(trace)
    if found is None:
        return []
    frame = found.frame[(found.frame["span"] > 0.02) & (found.frame["p"] <= 0.05)].head(_MOST_DATES)
    return [_date(row) for row in frame.to_dict("records")]


def _date(row: dict[str, Any]) -> dict[str, Any]:
    name = word(row["measure"])
    site = row["site"] if isinstance(row["site"], str) else ""
    head = f" head {row['head']}" if not pd.isna(row["head"]) else ""
    expert = f" expert {row['expert']}" if not pd.isna(row["expert"]) else ""
    turn = not math.isnan(row["turn"])
    return {
        "title": name.title,
        "says": name.says,
        "kind": kind_of(site) if site else "",
        "place": f"{site}{head}{expert}",
        "first": name.show(row["first"]),
        "last": name.show(row["last"]),
        "when": when(row),
        "sort": row["at"] if math.isfinite(row["at"]) else 1e300,
        "turn": f"{name.show(row['turn_value'])} at {row['turn']:,.0f}" if turn else "",
        "sought": f"{row['measure']} {name.title} {site}{head}",
    }


def when(row: dict[str, Any]) -> str:
    """A date in words, as far as the checkpoints tell it.

    >>> when({"at": 1700.0, "low": 1024.0, "high": 2048.0}), when({"at": math.inf, "low": math.inf, "high": math.inf})
    ('1,024–2,048', '–')
    """
    return f"{row['low']:,.0f}–{row['high']:,.0f}" if math.isfinite(row["at"]) else "–"


def to_json(trace: Trace) -> str:
    """The trace as strict JSON: no NaN and no infinity in it, one row and one date to a line.

    >>> trace = Trace(pd.DataFrame({"step": [0, 10], "measure": "loss", "value": [3.0, math.nan]}))
    >>> json.loads(to_json(trace))["rows"]
    [{'step': 0, 'measure': 'loss', 'value': 3.0}, {'step': 10, 'measure': 'loss', 'value': None}]
    """
    found, phases = dated_of(trace), phases_of(trace)
    parts = {
        "actome": __version__,
        "about": strict(trace.about),
        "steps": trace.steps,
        "left_out": {str(step): reason for step, reason in trace.left_out.items()},
        "notes": list(trace.notes),
        "phases": [] if phases is None else _records(phases.frame),
        "dates": [] if found is None else _records(found.frame),
        "rows": _records(trace.frame),
    }
    many = ("phases", "dates", "rows")
    said = [
        f"{json.dumps(key)}: {lines(value) if key in many else json.dumps(value, allow_nan=False, default=str)}"
        for key, value in parts.items()
    ]
    return "{\n" + ",\n".join(said) + "\n}\n"


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as plain dicts: places absent where they do not apply, ``None`` for what is not a number."""
    places = ("site", "layer", "head", "expert")
    rows = []
    for record in frame.to_dict("records"):
        kept = {key: value for key, value in record.items() if not (key in places and _missing(value))}
        rows.append({key: strict(value.item() if hasattr(value, "item") else value) for key, value in kept.items()})
    return rows


def _missing(value: Any) -> bool:
    return value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value))
