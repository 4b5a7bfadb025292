"""The figures of a report, as Vega-Lite specifications made with Altair.

Colours and fonts are not in them: the page gives both when it draws, from the same variables that its style sheet
uses, so that figures follow the reader's light or dark setting. Axes and legends say everything in words.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from actome.report.band import band
from actome.report.compare import Comparison
from actome.report.distributions import histogram_maps, other_lists, reliability, site_maps
from actome.report.scan import Scan
from actome.report.spec import CELLS, decades, inline, spec_of
from actome.report.words import WORDS, Word, kind_of, word

# A span of values wider than this is drawn on a logarithmic axis.
_WIDE_SPAN = 12


@dataclass(frozen=True)
class Figure:
    """One figure.

    Attributes:
        key: what it is called in the page.
        title, caption: for people.
        group: the part of the page it belongs to: ``"depth"``, ``"heads"`` or ``"distributions"``.
        spec: Vega-Lite, with its data in it.
        measure: the value that it shows.
        kinds: the kinds of sites that it shows.
        note: small print below it.
    """

    key: str
    title: str
    caption: str
    group: str
    spec: dict[str, Any]
    measure: str
    kinds: tuple[str, ...] = ()
    note: str = ""


def figures(scan: Scan, comparison: Comparison | None = None) -> list[Figure]:
    """All figures that a scan has the numbers for: a profile or a map for each value, in the order of `WORDS`.

    Args:
        comparison: draws the other scan as well, in the same profiles and in maps of its own.
    """
    measured = list(dict.fromkeys(scan.frame["measure"]))
    order = [name for name in WORDS if name in measured] + [name for name in measured if name not in WORDS]
    drawn = [name for name in order if word(name).drawn]
    return [
        *(figure for name in drawn for figure in _profiles(scan, name, comparison)),
        *(figure for name in drawn for figure in _maps(scan, name, comparison)),
        *(Figure(**one) for one in (*histogram_maps(scan), *site_maps(scan), *reliability(scan), *other_lists(scan))),
    ]


def _profiles(scan: Scan, measure: str, comparison: Comparison | None) -> Iterator[Figure]:
    rows = by_depth(scan.values(measure, "layer"))
    if np.isfinite(rows["value"]).sum() < 2:
        return
    name, layers = word(measure), _layers_of(scan)
    bands = pd.concat([band(measure, kind, layers.get("", 0)).assign(kind=kind) for kind in _stream_first(rows)])
    relative = comparison is not None and not comparison.same_depth
    if comparison is not None:
        others = by_depth(comparison.other.values(measure, "layer"))
        if relative:
            rows, others = _by_share(rows, layers), _by_share(others, _layers_of(comparison.other))
            bands = bands.assign(layer=(bands["layer"] + 1) / max(1, layers.get("", 0)))
        rows = pd.concat([rows.assign(scan="this"), others.assign(scan="other")], ignore_index=True)
    note = "" if bands.empty else "Shaded: the demo family."
    spec = profile(rows, name, bands, relative)
    yield Figure(f"depth-{measure}", name.title, name.says, "depth", spec, measure, tuple(_stream_first(rows)), note)


def profile(
    rows: pd.DataFrame, name: Word, bands: pd.DataFrame | None = None, relative: bool = False
) -> dict[str, Any]:
    """A line for each kind of site over the depth of the model.

    Args:
        rows: columns layer (-1 is the stream before the first block), kind, site, value, and scan (``"this"`` or
            ``"other"``) where two are compared.
        name: how the value is shown.
        bands: columns layer, kind, low, high: areas behind the lines.
        relative: whether layer is a share of the depth.
    """
    rows = rows.sort_values("layer", kind="stable")
    bands = pd.DataFrame({"low": [], "high": []}) if bands is None else bands
    finite = pd.concat([rows["value"], bands["low"], bands["high"]]).astype(float)
    finite = finite[np.isfinite(finite)]
    logarithmic = (name.look == "ratio" or name.wide) and finite.min() > 0 and finite.max() / finite.min() > _WIDE_SPAN
    # A share that is zero throughout would have an axis without a size.
    top = {"domainMax": 0.1} if name.look == "share" and finite.max() < 0.1 and not name.wide else {}
    scale = alt.Scale(type="log", nice=False, padding=8) if logarithmic else alt.Scale(zero=True, nice=True, **top)
    labels: dict[str, Any] = {"format": "~%" if name.wide else ".0%" if name.look == "share" else ",~f"}
    if logarithmic:
        # Whole powers as people write them, up to where that gets long.
        labels = {
            "values": decades(finite.min(), finite.max()),
            "labelExpr": "format(datum.value, '~%')"
            if name.look == "share"
            else "datum.value >= 1e6 ? format(datum.value, '.0e') : format(datum.value, ',~r')",
        }
    if name.look == "count":
        labels["values"] = list(range(0, int(finite.max()) + 1, max(1, math.ceil(finite.max() / 4))))
    kinds = _stream_first(rows)
    ticks = {"format": ".0%", "tickCount": 5} if relative else {"format": "d", "tickMinStep": 1}
    depth = alt.X(
        "layer:Q",
        title="share of the depth" if relative else "layer",
        axis=alt.Axis(grid=False, **ticks),
        scale=alt.Scale(nice=False, padding=12),
    )
    height = alt.Y("value:Q", title=None, scale=scale, axis=alt.Axis(tickCount=4, **labels))
    colour = alt.Color(
        "kind:N",
        title=None,
        sort=kinds,
        scale=alt.Scale(domain=kinds),
        legend=alt.Legend(orient="top", symbolType="circle", symbolOpacity=1, columns=3) if len(kinds) > 1 else None,
    )
    dash = {}
    if "scan" in rows:
        which = ["this", "other"]
        legend = alt.Legend(orient="top", symbolType="stroke")
        scale = alt.Scale(domain=which, range=[[1, 0], [5, 4]])
        dash = {"strokeDash": alt.StrokeDash("scan:N", title=None, scale=scale, legend=legend)}
    base = alt.Chart(inline(rows)).encode(
        depth,
        height,
        colour,
        tooltip=[
            *([alt.Tooltip("scan:N")] if dash else []),
            alt.Tooltip("site:N"),
            alt.Tooltip(
                "value:Q", title=name.title, format=".3~%" if name.wide else ".2%" if name.look == "share" else ".4~g"
            ),
        ],
    )
    points = base.mark_point(size=45 if rows["layer"].nunique() < 24 else 15, filled=True, opacity=1)
    parts = [base.mark_line(strokeWidth=2).encode(**dash), points]
    if len(bands):
        shaded = bands[bands["kind"].isin(kinds)]
        area = alt.Chart(inline(shaded)).mark_area(opacity=0.16, interpolate="linear")
        parts.insert(0, area.encode(depth, alt.Y("low:Q", title=None), alt.Y2("high:Q"), colour))
    return spec_of(alt.layer(*parts), height=150)


def _maps(scan: Scan, measure: str, comparison: Comparison | None) -> Iterator[Figure]:
    for place in ("head", "expert"):
        rows = scan.values(measure, "layer", place)
        others = comparison.other.values(measure, "layer", place) if comparison is not None else rows.iloc[:0]
        for kind, part in rows.groupby(rows["site"].map(kind_of), sort=False):
            other = others[others["site"].map(kind_of) == kind]
            name = word(measure)
            title = name.title + ("" if kind in ("attn.pattern", "moe.router", "moe.weights") else f", {kind}")
            key = f"heads-{measure}-{kind}".replace(" ", "-").replace(".", "-")
            span = _span(pd.concat([part["value"], other["value"]]), name, place)
            say = " This scan." if len(other) else ""
            spec = heads_map(part, name, span, place)
            yield Figure(key, title, name.says + say, "heads", spec, measure, (kind,))
            if len(other):
                say = " The other scan, in the same colours."
                spec = heads_map(other, name, span, place)
                yield Figure(f"{key}-other", title, name.says + say, "heads", spec, measure, (kind,))


def _span(values: pd.Series, name: Word, place: str = "head") -> tuple[float, float]:
    # From zero to one where one is the most that there is, so that models compare; below zero as far as it goes.
    finite = values[np.isfinite(values)]
    if not len(finite):
        return 0.0, 1.0
    low = min(0.0, finite.min()) if name.signed or finite.min() < 0 else 0.0
    if place == "expert" and finite.max() > 0:
        # Shares of many experts are all small.
        return float(low), float(finite.max())
    bounded = name.look == "share" or (name.look == "number" and finite.max() <= 1.0)
    return float(low), float(max(1.0, finite.max()) if bounded else finite.max() or 1.0)


def heads_map(
    rows: pd.DataFrame, name: Word, span: tuple[float, float] | None = None, place: str = "head"
) -> dict[str, Any]:
    """Layers by heads (or experts), one cell each.

    Args:
        rows: columns layer, head (or expert), value.
        name: how the value is shown.
        span: the values of the first and the last colour.
        place: ``"head"`` or ``"expert"``.
    """
    count = int(rows[place].max()) + 1
    step = 30 if count <= 8 else 22 if count <= 16 else 12 if count <= 40 else 7
    chart = (
        alt.Chart(inline(rows))
        .mark_rect(cornerRadius=2)
        .encode(
            alt.X("layer:O", title="layer", axis=alt.Axis(labelAngle=0, labelOverlap=True), scale=CELLS),
            alt.Y(f"{place}:O", title=place, axis=alt.Axis(labelOverlap=True), scale=CELLS),
            alt.Color(
                "value:Q",
                title=None,
                scale=alt.Scale(domain=list(span or _span(rows["value"], name, place)), nice=False, interpolate="lab"),
                legend=alt.Legend(
                    orient="right",
                    gradientLength=alt.expr(f"min({count * step}, 160)"),
                    gradientThickness=10,
                    tickCount=3,
                    **({"format": ".0%"} if name.look == "share" else {}),
                ),
            ),
            tooltip=[
                alt.Tooltip("layer:O"),
                alt.Tooltip(f"{place}:O"),
                alt.Tooltip("value:Q", title=name.title, format=".1%" if name.look == "share" else ".3~f"),
            ],
        )
    )
    return spec_of(chart, height=count * step)


def by_depth(rows: pd.DataFrame) -> pd.DataFrame:
    """With the kind of each site; the stream before the first block becomes layer -1 of the stream after the blocks."""
    rows = rows.assign(kind=rows["site"].map(kind_of))
    before = rows["kind"].str.endswith("resid.pre") & (rows["layer"] == 0)
    after = rows["kind"].str.replace("resid.pre", "resid.post")
    paired = before & after.isin(rows["kind"])
    rows = rows.assign(layer=rows["layer"].where(~paired, -1), kind=rows["kind"].where(~paired, after))
    # What compares a block with the stream before it has no value before the first.
    return rows[(rows["layer"] >= 0) | rows["value"].notna()]


def _layers_of(scan: Scan) -> dict[str, int]:
    """How many layers each stack has, by its name as `kind_of` writes it; "" is the only one of most models."""
    rows = scan.frame[scan.frame["layer"].notna()].drop_duplicates("site")
    stacks = rows["site"].str.partition("blocks.")[0].str.removesuffix(".")
    return (rows.groupby(stacks)["layer"].max() + 1).astype(int).to_dict()


def _by_share(rows: pd.DataFrame, layers: dict[str, int]) -> pd.DataFrame:
    """With the share of the depth for the layer; the stream before the first block is at 0."""
    stacks = rows["site"].str.partition("blocks.")[0].str.removesuffix(".")
    depth = (rows["layer"].astype(float) + 1) / stacks.map(layers).astype(float)
    return rows.assign(layer=depth)


def _stream_first(rows: pd.DataFrame) -> Sequence[str]:
    """The kinds of sites; the residual stream keeps its colour in every figure."""
    return sorted(rows["kind"].unique(), key=lambda kind: not kind.endswith("resid.post"))
