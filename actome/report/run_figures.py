"""The figures of a run: bands over the steps, lines of a few places, and maps of layers by steps."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from actome.dynamics.digest import RunDigest
from actome.report.arrays import rounded
from actome.report.figures import Figure, heads_map
from actome.report.run_view import NORMS, Line, Panel, alarm_groups, lines, named, panels
from actome.report.spec import decades, spec_of
from actome.report.words import word

_MOST_LINES = 5  # as many as there are colours that one tells apart
_WIDE, _NARROW = 480, 160  # columns of the figure of the loss, and of the others
_POINTS, _CELLS = 30_000, 30_000  # of all lines, and of all maps
# Values that span more than this are drawn on a logarithmic scale: ratios, and what grew without bound.
_WIDE_SPAN, _WIDEST_SPAN = 12, 300
_MOST_RULES = 40

_Span = tuple[float, float]


def run_figures(digest: RunDigest, measures: Sequence[str]) -> list[Figure]:
    """All figures of a run: groups ``loss``, ``curves``, ``layers``, ``weights`` and ``heads``.

    Args:
        digest: of the run.
        measures: those to draw, in order.
    """
    plain, grid = lines(digest, measures), panels(digest, measures)
    groups = _by_measure(plain)
    few = sum(len(some) for some in groups.values() if len(some) <= _MOST_LINES)
    few += sum(len(one.layers) for one in grid if len(one.layers) <= _MOST_LINES)
    many = sum(len(some) for some in groups.values() if len(some) > _MOST_LINES)
    many += sum(len(one.layers) for one in grid if len(one.layers) > _MOST_LINES)
    columns = {"line": _share(_POINTS, few, _NARROW), "map": _share(_CELLS, many, _NARROW)}
    rules = _rules(digest)
    return [
        *(_curves(digest, measure, some, columns, rules) for measure, some in groups.items()),
        *(_layers(digest, one, columns, rules) for one in grid),
        *_heads(digest, grid),
    ]


def _share(all_: int, count: int, most: int) -> int:
    return max(12, min(most, all_ // max(1, count)))


def _by_measure(plain: Iterable[Line]) -> dict[str, list[Line]]:
    groups: dict[str, list[Line]] = {}
    for line in plain:
        groups.setdefault(line.measure, []).append(line)
    return groups


def _curves(digest: RunDigest, measure: str, some: list[Line], columns: dict[str, int], rules: pd.DataFrame) -> Figure:
    title, says = named(measure), word(measure).says if "/" not in measure else ""
    names = [digest.places[one.series].site or "whole" for one in some]
    members = [(one.series,) for one in some]
    bad = _not_finite(digest, members, names if len(names) > 1 else [""])
    group = "loss" if measure == "loss" else "weights" if measure in NORMS and len(some) > 1 else "curves"
    if len(some) > _MOST_LINES:
        spec = _map(digest, members, names, "component", measure, columns["map"])
    else:
        wide = _WIDE if group == "loss" else columns["line"]
        spec = _line_chart(digest, members, names, "", measure, wide, rules, 260 if group == "loss" else 150)
    return Figure(f"curve-{measure}", title, says, group, spec, measure, tuple(names), bad)


def _layers(digest: RunDigest, panel: Panel, columns: dict[str, int], rules: pd.DataFrame) -> Figure:
    names = [str(n) for n in panel.layers]
    says = " ".join(filter(None, (word(panel.measure).says, f"Of a layer the {panel.says}." if panel.says else "")))
    if len(names) > _MOST_LINES:
        spec = _map(digest, panel.members, names, "layer", panel.measure, columns["map"])
    else:
        spec = _line_chart(digest, panel.members, names, "layer", panel.measure, columns["line"], rules, 150)
    group = "weights" if panel.measure in NORMS else "layers"
    bad = _not_finite(digest, panel.members, [f"layer {name}" for name in names])
    key = f"layers-{panel.measure}-{panel.kind}".replace(" ", "-").replace(".", "-")
    return Figure(key, panel.title, says, group, spec, panel.measure, (panel.kind,), bad)


def _heads(digest: RunDigest, grid: Iterable[Panel]) -> Iterator[Figure]:
    """Layer by head, as they are now."""
    for panel in grid:
        place = panel.over.removesuffix("s")
        if not place:
            continue
        rows = [
            {"layer": layer, place: getattr(digest.places[i], place), "value": digest.latest(i)}
            for layer, some in zip(panel.layers, panel.members, strict=True)
            for i in some
            if getattr(digest.places[i], place) is not None
        ]
        frame = pd.DataFrame(rows).astype({"value": float})
        if not np.isfinite(frame["value"]).any():
            continue
        spec = heads_map(frame, word(panel.measure), place=place)
        says = f"{word(panel.measure).says} At its last step.".strip()
        key = f"heads-{panel.measure}-{panel.kind}".replace(" ", "-").replace(".", "-")
        yield Figure(key, panel.title, says, "heads", spec, panel.measure, (panel.kind,))


def _not_finite(digest: RunDigest, members: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    """Where numbers were not finite, since gaps alone could also mean that nothing was logged."""
    said = []
    for name, some in zip(names, members, strict=True):
        found = [bad for one in some if (bad := digest.not_finite(one))]
        if found:
            count, first = sum(n for n, _ in found), min(step for _, step in found)
            said.append(f"{name + ': ' if name else ''}{count:,} not finite, the first at step {first:,}")
    more = f"; and {len(said) - 4} more" if len(said) > 4 else ""
    return "; ".join(said[:4]) + more


# -- numbers ----------------------------------------------------------------------------------------------------------


def _thinned(digest: RunDigest, members: Sequence[int], most: int) -> dict[str, np.ndarray]:
    """Start, end, mean, least and greatest in at most so many columns; of several series the largest mean.

    Bins are put together whole, so that nothing between the least and the greatest is lost.
    """
    each = -(-digest.bins // most)
    edges = np.arange(0, digest.bins, each)
    count, mean, low, high = (digest.table(list(members), of) for of in ("count", "mean", "low", "high"))
    n = np.add.reduceat(count, edges, axis=1)
    total = np.add.reduceat(np.where(count > 0, mean * count, 0.0), edges, axis=1)
    with np.errstate(invalid="ignore"):
        means = np.where(n > 0, total / np.maximum(n, 1), np.nan)
    starts = (digest.steps[edges] - (digest.width - 1) / 2).astype(np.int64)
    ends = np.minimum(starts + each * digest.width - 1, digest.last_step)
    return {
        "from": np.maximum(starts, digest.first_step),
        "to": ends,
        "mean": np.fmax.reduce(means, axis=0),
        "low": np.fmin.reduce(np.fmin.reduceat(low, edges, axis=1), axis=0),
        "high": np.fmax.reduce(np.fmax.reduceat(high, edges, axis=1), axis=0),
    }


def _data(
    digest: RunDigest, members: Sequence[Sequence[int]], names: Sequence[str], most: int
) -> tuple[Any, _Span, _Span]:
    """Rows as CSV, which takes half of what JSON does; the span of all that is drawn, and that of the means alone."""
    out = io.StringIO()
    write = csv.writer(out, lineterminator="\n")
    write.writerow(("name", "from", "to", "step", "until", "mean", "low", "high"))
    means: list[float] = []
    every: list[float] = []
    for name, some in zip(names, members, strict=True):
        one = _thinned(digest, some, most)
        filled = np.flatnonzero(np.isfinite(one["mean"]))
        # A cell of a map stands until one looked again.
        until = [*one["from"][filled[1:]].tolist(), int(one["to"][filled[-1]]) + 1] if len(filled) else []
        for i, stands in zip(filled, until, strict=True):
            start, end = int(one["from"][i]), int(one["to"][i])
            values = [rounded(one[key][i]) for key in ("mean", "low", "high")]
            write.writerow((name, start, end, (start + end) / 2, stands, *values))
            means.append(values[0])
            every += values
    numbers = dict.fromkeys(("from", "to", "step", "until", "mean", "low", "high"), "number")
    data = alt.Data(values=out.getvalue(), format=alt.CsvDataFormat(type="csv", parse=numbers))
    return data, *((min(some), max(some)) if some else (0.0, 1.0) for some in (every, means))


def _rules(digest: RunDigest) -> pd.DataFrame:
    """The first step of each kind of alarm."""
    rows = [
        {"step": some[0]["step"], "level": some[0]["level"], "alarm": some[0]["name"], "site": some[0]["site"] or ""}
        for some in alarm_groups(digest)[:_MOST_RULES]
    ]
    return pd.DataFrame(rows, columns=["step", "level", "alarm", "site"])


# -- drawings ---------------------------------------------------------------------------------------------------------


def _line_chart(
    digest: RunDigest, members: Sequence[Sequence[int]], names: Sequence[str], what: str, measure: str, most: int,
    rules: pd.DataFrame, height: int,
) -> dict[str, Any]:  # fmt: skip
    data, (low, high), _ = _data(digest, members, names, most)
    shown = word(measure)
    base = alt.Chart(data)
    x = alt.X("step:Q", title="step", axis=_step_axis(), scale=_step_scale(digest))
    scale, labels = _value_scale(low, high, shown.look, shown.wide)
    y = alt.Y("mean:Q", title=None, scale=scale, axis=alt.Axis(tickCount=4, **labels))
    several = len(names) > 1
    legend = alt.Legend(orient="top", symbolType="circle", symbolOpacity=1, columns=5 if what else 2)
    colour = (
        {
            "color": alt.Color(
                "name:N", title=what or None, sort=list(names), scale=alt.Scale(domain=list(names)), legend=legend
            )
        }
        if several
        else {}
    )
    number = ".2%" if shown.look == "share" else ".4~g"
    tips = [*([alt.Tooltip("name:N", title=what or "place")] if several else []), *_tips(number)]
    parts: list[Any] = [
        base.mark_area(opacity=0.25).encode(x, alt.Y("low:Q", title=None, scale=scale), alt.Y2("high:Q"), **colour),
        base.mark_line(strokeWidth=1.5).encode(x, y, **colour),
        # What the mouse meets: nothing to see, and not so many as to make the page slow.
        base.mark_point(opacity=0, size=70, filled=True).encode(x, y, tooltip=tips, **colour),
    ]
    for level, part in rules.groupby("level", sort=False):
        values = alt.InlineData(values=part.drop(columns="level").to_dict("records"))
        rule = alt.Chart(values).mark_rule(style=str(level), strokeDash=[3, 3], strokeWidth=1.5)
        told = [alt.Tooltip("alarm:N"), alt.Tooltip("step:Q", format=",d"), alt.Tooltip("site:N")]
        parts.append(rule.encode(alt.X("step:Q"), tooltip=told))
    return spec_of(alt.layer(*parts), height=height)


def _map(
    digest: RunDigest, members: Sequence[Sequence[int]], names: Sequence[str], what: str, measure: str, most: int
) -> dict[str, Any]:
    data, _, (low, high) = _data(digest, members, names, most)
    shown = word(measure)
    title = what if what == "layer" else None
    step = 22 if len(names) <= 8 else 14 if len(names) <= 24 else 7
    number = ".2%" if shown.look == "share" else ".4~g"
    logarithmic = _logarithmic(low, high, shown.look, shown.wide)
    colours = alt.Scale(type="log" if logarithmic else "linear", domain=[low, high], nice=False, interpolate="lab")
    legend: dict[str, Any] = (
        {"format": ".0%"} if shown.look == "share" else {"format": ".3~s"} if abs(high) >= 1e4 else {}
    )
    gradient = alt.expr(f"min({len(names) * step}, 160)")
    bar = alt.Legend(orient="right", gradientLength=gradient, gradientThickness=10, tickCount=3, **legend)
    tips = [alt.Tooltip("name:N", title=what), *_tips(number)]
    chart = (
        alt.Chart(data)
        .mark_rect(strokeWidth=0)
        .encode(
            alt.X("from:Q", title="step", axis=_step_axis(), scale=_step_scale(digest)),
            alt.X2("until:Q"),
            alt.Y("name:N", title=title, sort=list(names), axis=alt.Axis(labelOverlap=True)),
            alt.Color("mean:Q", title=None, scale=colours, legend=bar),
            tooltip=tips,
        )
    )
    return spec_of(chart, height=max(60, len(names) * step))


def _tips(number: str) -> list[alt.Tooltip]:
    steps = [alt.Tooltip(f"{key}:Q", title=f"{key} step", format=",d") for key in ("from", "to")]
    names = {"mean": "mean", "low": "least", "high": "greatest"}
    return [*steps, *(alt.Tooltip(f"{key}:Q", title=title, format=number) for key, title in names.items())]


def _step_axis() -> alt.Axis:
    return alt.Axis(
        grid=False,
        tickCount=4,
        labelExpr="datum.value >= 1e4 ? format(datum.value, '.3~s') : format(datum.value, ',d')",
        tickMinStep=1,
    )


def _step_scale(digest: RunDigest) -> alt.Scale:
    first, last = digest.first_step or 0, digest.last_step or 0
    return alt.Scale(domain=[first, max(last, first + 1)], nice=False)


def _logarithmic(low: float, high: float, look: str, wide: bool) -> bool:
    ratio = look == "ratio" or wide
    return low > 0 and high / low > (_WIDE_SPAN if ratio else math.inf if look == "share" else _WIDEST_SPAN)


def _value_scale(low: float, high: float, look: str, wide: bool) -> tuple[alt.Scale, dict[str, Any]]:
    if _logarithmic(low, high, look, wide):
        form = "format(datum.value, '~%')" if look == "share" else "format(datum.value, '.3~s')"
        return alt.Scale(type="log", nice=False, domain=[low, high]), {"values": decades(low, high), "labelExpr": form}
    # A curve that hardly moves is drawn as such, and not as its rounding.
    room = max(high - low, 1e-3 * max(abs(low), abs(high)), 1e-12) - (high - low)
    domain = [low - room / 2, high + room / 2]
    return alt.Scale(zero=False, nice=True, domain=domain), {"format": "~%" if look == "share" else "~g"}
