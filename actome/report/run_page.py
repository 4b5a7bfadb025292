"""The page of a run: alarms with their evidence, curves, layers through the steps, events and configuration."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

from actome import __version__
from actome.dynamics.digest import RunDigest
from actome.dynamics.schema import as_json
from actome.dynamics.store import RunStore
from actome.report.figures import Figure
from actome.report.run_figures import run_figures
from actome.report.run_view import LEVELS, alarm_groups, chosen, lines, panels, span, status_facts
from actome.report.shell import Page, whole
from actome.report.words import cited, kind_of, word

_SECTIONS = {
    "loss": ("Loss", "Loss"),
    "curves": ("Numbers over the run", "Curves"),
    "layers": ("Layers over the run", "Layers"),
    "weights": ("Weights, updates and gradients", "Weights"),
    "heads": ("Heads and experts", "Heads"),
}
_SCRIPTS = ("page.js", "filter.js")
_MOST_EVENTS = 200


def run_page(
    run: RunStore | RunDigest | str | os.PathLike[str], name: str | None = None, *, measures: Sequence[str] = ()
) -> Page:
    """The page of a run that has ended or is still written.

    Curves are thinned for long runs: a line is the mean over a number of steps that the page says, and a shade goes
    from the least to the greatest value among them.

    Args:
        run: a store, its folder, or a digest that has been read already.
        name: of one run, where several were merged.
        measures: names or patterns of what to show; everything when empty.

    Raises:
        RunError: no run there, several and none is named, or no such measure.

    >>> import tempfile
    >>> folder = f"{tempfile.mkdtemp()}/a"
    >>> with RunStore.create(folder) as run:
    ...     for step in range(20):
    ...         run.log(step, {"loss": 1.0 / (step + 1)})
    >>> page = run_page(folder)
    >>> "<title>a – actome run</title>" in page.html
    True
    """
    if isinstance(run, RunDigest):
        return Page(_page(run, measures))
    store = run if isinstance(run, RunStore) else RunStore.open(run)
    try:
        digest = RunDigest(store, name)
        digest.refresh()
        return Page(_page(digest, measures))
    finally:
        if store is not run:
            store.close()


def _page(digest: RunDigest, measures: Sequence[str]) -> str:
    names = chosen(digest, measures)
    drawn = run_figures(digest, names)
    events = digest.events[-_MOST_EVENTS:]
    severities = [
        (level, plural, count)
        for level, plural in zip(LEVELS, ("critical", "warnings", "notes"), strict=True)
        if (count := sum(some[0]["level"] == level for some in alarm_groups(digest)))
    ]
    return whole(
        "run.html",
        specs={figure.key: figure.spec for figure in drawn},
        data={"words": {}, "layers": []},
        scripts=_SCRIPTS,
        needed=True,
        name=digest.name,
        facts=status_facts(digest),
        told=_told(digest),
        tiles=_tiles(digest, severities),
        severities=severities,
        alarms=[_alarm(some) for some in alarm_groups(digest)],
        sections=list(_sections(digest, drawn)),
        nothing="Nothing is logged yet." if digest.status == "running" else "Nothing was logged.",
        events=[(one["name"], _step(one["step"]), _when(one["time"]), _plain(one["data"])) for one in events],
        earlier=len(digest.events) - len(events),
        tables=_tables(digest, names),
        settings=[
            ("Configuration", [(key, _plain(value)) for key, value in digest.config.items()]),
            ("Made with", [(key, _plain(value)) for key, value in digest.meta.items()]),
        ],
        left_out=[f"Not shown: {digest.units:,} series of single units; the store has them."] if digest.units else [],
        made=f"actome {__version__}, {digest.run.path.name}, {_when(time.time())}, {digest.rows:,} numbers",
    )  # fmt: skip


def _told(digest: RunDigest) -> Iterator[str]:
    yield f"Begun {_when(digest.started)}" + ("" if digest.ended is None else f", last written {_when(digest.ended)}")
    if digest.error:
        yield digest.error
    if digest.status == "killed":
        yield "Its writer was killed; RunStore.resume goes on with it."
    if digest.status == "running":
        yield "Still written when this page was made."


def _tiles(digest: RunDigest, severities: list[tuple[str, str, int]]) -> Iterator[dict[str, str]]:
    for one in lines(digest, ["loss"])[:1]:
        tone = "critical" if digest.not_finite(one.series) else ""
        yield {"name": "Loss", "value": word("loss").show(digest.latest(one.series)), "tone": tone}
    if digest.last_step is not None:
        yield {"name": "Step", "value": f"{digest.last_step:,}", "tone": ""}
    yield {"name": "Time", "value": span(digest.seconds), "tone": ""}
    counts = {level: count for level, _, count in severities}
    for level, title in zip(LEVELS, ("Critical alarms", "Warnings", "Notes"), strict=True):
        count = counts.get(level, 0)
        yield {"name": title, "value": str(count), "tone": level if count else "calm" if level != "info" else ""}


def _alarm(some: list[dict[str, Any]]) -> dict[str, Any]:
    last = some[-1]
    site = last["site"] or ""
    evidence = {key: value for key, value in last["evidence"].items() if key != "source"}
    _, blocks, rest = site.partition("blocks.")
    when = (
        f"step {last['step']:,}"
        if len(some) == 1
        else f"{len(some)} times, steps {some[0]['step']:,} to {last['step']:,}"
    )
    return {
        "level": last["level"],
        "name": last["name"],
        "site": site,
        "kind": kind_of(site),
        "layer": rest.partition(".")[0] if blocks else "",
        "when": when,
        "message": last["message"],
        "advice": last["advice"] or "",
        "source": str(last["evidence"].get("source", "")),
        "values": " ".join(map(str, evidence)),
        "evidence": [
            (cited(key), word(key).show(value) if isinstance(value, int | float) else _plain(value))
            for key, value in evidence.items()
        ],
    }  # fmt: skip


def _sections(digest: RunDigest, drawn: list[Figure]) -> Iterator[dict[str, Any]]:
    each = "every step" if digest.width == 1 else f"the mean of {digest.width} steps or more"
    thin = f"Lines are {each}; the shade goes from the least to the greatest value, so that no spike is lost."
    leads = {
        "loss": f"{thin} Broken lines are the first alarms of each kind.",
        "curves": "Drawn like the loss, in fewer columns.",
        "layers": "Up to five layers are lines, drawn like the loss. More are a map: a cell is the mean of its steps "
        "and stands until the next look; hover to see the least and the greatest.",
        "weights": "By component of the model, or by layer.",
        "heads": "One cell each, as they are at the last step.",
    }
    for key, (title, short) in _SECTIONS.items():
        figures = [figure for figure in drawn if figure.group == key]
        if figures:
            grid = {"loss": "wide", "heads": "heads"}.get(key, "maps")
            yield {"key": key, "title": title, "short": short, "lead": leads[key], "grid": grid, "figures": figures}


def _tables(digest: RunDigest, names: Sequence[str]) -> list[dict[str, Any]]:
    """The last values: by layer for each kind of site, and one by one for the rest."""
    kinds: dict[str, dict[str, dict[int, float]]] = {}
    for panel in panels(digest, names):
        values = dict(zip(panel.layers, panel.latest(digest).tolist(), strict=True))
        kinds.setdefault(panel.kind, {})[panel.measure] = values
    tables = []
    for kind, columns in kinds.items():
        layers = sorted(set().union(*columns.values()))
        rows = [
            {
                "name": str(layer), "layer": str(layer), "page": "", "site": kind,
                "cells": [word(name).show(values.get(layer, float("nan"))) for name, values in columns.items()],
            }
            for layer in layers
        ]  # fmt: skip
        tables.append(
            {"title": kind or "layers", "index": "layer", "columns": [(n, word(n)) for n in columns], "rows": rows}
        )
    plain = lines(digest, names)
    if plain:
        rows = [
            {
                "name": one.label, "layer": None, "page": "", "site": f"{one.measure} {one.label}",
                "cells": [word(one.measure).show(digest.latest(one.series))],
            }
            for one in plain
        ]  # fmt: skip
        last = [("value", word("value"))]
        tables.insert(0, {"title": "the whole model", "index": "value of", "columns": last, "rows": rows})
    return tables


def _plain(value: Any) -> str:
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return ", ".join(value)
    return value if isinstance(value, str) else as_json(value)


def _step(step: int | None) -> str:
    return "" if step is None else f"{int(step):,}"


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
