"""What the page of a trace draws: for each measure and kind of site the values by layer and step, as plain data."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from actome.dynamics.trace_table import Trace
from actome.report.arrays import rounded
from actome.report.words import GROUPS, WORDS, kind_of, word

_MOST_STEPS = 240  # of one figure: more than there are pixels to tell apart
_MOST_LAYERS = 64


def page_data(trace: Trace) -> dict[str, Any]:
    """The data of the page's scripts, ready for JSON.

    Returns:
        ``steps``: those that the slider goes through. ``stacks``: for each measure and kind of site that has layers its
        ``layers``, ``steps`` and ``values`` (layer, step), with heads or experts (layer, step, place). ``lines``: for
        values without a layer, ``steps`` and ``values``. ``words``: by measure its title, sentence and number format.
    """
    frame = trace.frame.assign(kind=[kind_of(site) if isinstance(site, str) else "" for site in trace.frame["site"]])
    order = {name: i for i, name in enumerate(WORDS)}
    names = sorted((name for name in trace.measures if word(name).drawn), key=lambda name: order.get(name, len(order)))
    stacks, lines = [], []
    for name in names:
        rows = frame[frame["measure"] == name]
        layered = rows[rows["layer"].notna()]
        for kind, part in layered.groupby("kind", sort=False):
            stacks += _stack(name, kind, part)
        plain = rows[rows["layer"].isna() & rows["head"].isna() & rows["expert"].isna()]
        for kind, part in plain.groupby("kind", sort=False):
            lines += _line(name, kind, part)
    steps = sorted({step for one in stacks for step in one["steps"]}) or trace.steps
    return {
        "layers": [],  # of pages of single layers, which a trace has none of
        "steps": [steps[i] for i in _thinned(len(steps))],
        "stacks": stacks,
        "lines": lines,
        "words": {name: _word(name) for name in names},
    }


def _word(measure: str) -> dict[str, Any]:
    one = word(measure)
    order = GROUPS.index(one.group) if one.group in GROUPS else len(GROUPS)
    return {"title": one.title, "says": one.says, "look": one.look, "order": order, "signed": one.signed}


def _stack(measure: str, kind: str, part: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """One value over layers and steps, and that of heads and experts."""
    for place in (None, "head", "expert"):
        rows = part[part[["head", "expert"]].isna().all(axis=1)] if place is None else part[part[place].notna()]
        rows = rows[np.isfinite(rows["value"])]
        if rows.empty:
            continue
        steps = sorted(int(step) for step in rows["step"].unique())
        steps = [steps[i] for i in _thinned(len(steps))]
        rows = rows[rows["step"].isin(steps)]
        layers = sorted(int(layer) for layer in rows["layer"].unique())[:_MOST_LAYERS]
        rows = rows[rows["layer"].isin(layers)]
        shape = (len(layers), len(steps), *(() if place is None else (int(rows[place].max()) + 1,)))
        values = np.full(shape, np.nan)
        rank = [{n: i for i, n in enumerate(some)} for some in (layers, steps)]
        at = [rows["layer"].map(rank[0]), rows["step"].map(rank[1]), *([] if place is None else [rows[place]])]
        values[tuple(one.astype(int).to_numpy() for one in at)] = rows["value"]
        key = f"{measure}-{kind}-{place or 'layer'}".replace(" ", "-").replace(".", "-")
        yield {
            "key": key, "measure": measure, "kind": kind, "place": place, "layers": layers, "steps": steps,
            "values": _numbers(values),
        }  # fmt: skip


def _line(measure: str, kind: str, part: pd.DataFrame) -> Iterator[dict[str, Any]]:
    part = part[np.isfinite(part["value"])].sort_values("step")
    if len(part):
        kept = part.iloc[_extremes(part["value"].to_numpy(), _MOST_STEPS)]
        key = f"{measure}-{kind or 'model'}-line".replace(" ", "-").replace(".", "-")
        yield {
            "key": key, "measure": measure, "kind": kind, "steps": [int(step) for step in kept["step"]],
            "values": _numbers(kept["value"].to_numpy()),
        }  # fmt: skip


def _thinned(count: int) -> list[int]:
    """Which of many steps are drawn: evenly, the first and the last among them."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, _MOST_STEPS))}) if count else []


def _extremes(values: np.ndarray, most: int) -> list[int]:
    """Which points of a long curve are drawn: the lowest and the highest of each stretch, so that no spike is lost.

    >>> _extremes(np.array([0, 0, 9, 0, 0, 0, -9, 0.0]), 4)
    [0, 2, 4, 6, 7]
    """
    if len(values) <= most:
        return list(range(len(values)))
    edges = np.linspace(0, len(values), most // 2 + 1).astype(int)
    chosen = {0, len(values) - 1}
    for a, b in itertools.pairwise(edges):
        chosen |= {int(a + values[a:b].argmin()), int(a + values[a:b].argmax())}
    return sorted(chosen)


def _numbers(values: np.ndarray) -> Any:
    if values.ndim > 1:
        return [_numbers(one) for one in values]
    return [rounded(x, 4) if math.isfinite(x) else None for x in values]
