"""The figures of a report, as Vega-Lite specifications made with Altair.

Colours and fonts are not in them: the page gives both when it draws, from the same variables that its style sheet
uses, so that figures follow the reader's light or dark setting. Axes and legends say everything in words.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from actome.report.scan import Scan
from actome.report.words import WORDS, Word, kind_of, word

# A span of values wider than this is drawn on a logarithmic axis.
_WIDE_SPAN = 12


@dataclass(frozen=True)
class Figure:
    """One figure.

    Attributes:
        key: what it is called in the page.
        title, caption: for people.
        group: the part of the page it belongs to: ``"depth"`` or ``"heads"``.
        spec: Vega-Lite, with its data in it.
    """

    key: str
    title: str
    caption: str
    group: str
    spec: dict[str, Any]


def figures(scan: Scan) -> list[Figure]:
    """All figures that a scan has the numbers for: a profile or a map for each value, in the order of `WORDS`."""
    measured = list(dict.fromkeys(scan.frame["measure"]))
    order = [name for name in WORDS if name in measured] + [name for name in measured if name not in WORDS]
    return [figure for name in order if word(name).drawn for figure in (*_profiles(scan, name), *_maps(scan, name))]


def _profiles(scan: Scan, measure: str) -> Iterator[Figure]:
    rows = _by_depth(scan.values(measure, "layer"))
    if np.isfinite(rows["value"]).sum() < 2:
        return
    name = word(measure)
    yield Figure(f"depth-{measure}", name.title, name.says, "depth", profile(rows, name))


def profile(rows: pd.DataFrame, name: Word) -> dict[str, Any]:
    """A line for each kind of site over the depth of the model.

    Args:
        rows: columns layer (-1 is the stream before the first block), kind, value.
        name: how the value is shown.
    """
    finite = rows["value"][np.isfinite(rows["value"])]
    logarithmic = name.look == "ratio" and finite.min() > 0 and finite.max() / finite.min() > _WIDE_SPAN
    # A share that is zero throughout would have an axis without a size.
    top = {"domainMax": 0.1} if name.look == "share" and finite.max() < 0.1 else {}
    scale = alt.Scale(type="log", nice=False, padding=8) if logarithmic else alt.Scale(zero=True, nice=True, **top)
    labels: dict[str, Any] = {"format": ".0%" if name.look == "share" else ",~f"}
    if logarithmic:
        # Whole powers as people write them, up to where that gets long.
        labels = {
            "values": _decades(finite.min(), finite.max()),
            "labelExpr": "datum.value >= 1e6 ? format(datum.value, '.0e') : format(datum.value, ',~r')",
        }
    if name.look == "count":
        labels["values"] = list(range(0, int(finite.max()) + 1, max(1, math.ceil(finite.max() / 4))))
    # The residual stream keeps its colour in every figure.
    kinds = sorted(rows["kind"].unique(), key=lambda kind: not kind.endswith("resid.post"))
    base = alt.Chart(_inline(rows)).encode(
        alt.X(
            "layer:Q",
            title="layer",
            axis=alt.Axis(tickMinStep=1, format="d", grid=False),
            scale=alt.Scale(nice=False, padding=12),
        ),
        alt.Y("value:Q", title=None, scale=scale, axis=alt.Axis(tickCount=4, **labels)),
        alt.Color(
            "kind:N",
            title=None,
            sort=kinds,
            legend=alt.Legend(orient="top", symbolType="circle") if len(kinds) > 1 else None,
        ),
        tooltip=[
            alt.Tooltip("site:N"),
            alt.Tooltip("value:Q", title=name.title, format=".2%" if name.look == "share" else ".4~g"),
        ],
    )
    chart = base.mark_line(strokeWidth=2) + base.mark_point(
        size=45 if rows["layer"].nunique() < 24 else 15, filled=True, opacity=1
    )
    return _spec(chart, height=150)


def _maps(scan: Scan, measure: str) -> Iterator[Figure]:
    rows = scan.values(measure, "layer", "head")
    name = word(measure)
    for kind, part in rows.groupby(rows["site"].map(kind_of), sort=False):
        where = "" if kind == "attn.pattern" else f", {kind}"
        key = f"heads-{measure}-{kind}".replace(" ", "-").replace(".", "-")
        yield Figure(key, f"{name.title}{where}", name.says, "heads", heads_map(part, name))


def heads_map(rows: pd.DataFrame, name: Word) -> dict[str, Any]:
    """Layers by heads, one cell a head.

    Args:
        rows: columns layer, head, value.
        name: how the value is shown.
    """
    heads = int(rows["head"].max()) + 1
    step = 30 if heads <= 8 else 22 if heads <= 16 else 12 if heads <= 40 else 7
    # From zero to one where one is the most that there is, so that models compare; below zero as far as it goes.
    finite = rows["value"][np.isfinite(rows["value"])]
    low = min(0.0, finite.min()) if name.signed and len(finite) else 0.0
    high = max(1.0, finite.max()) if len(finite) else 1.0
    chart = (
        alt.Chart(_inline(rows))
        .mark_rect(cornerRadius=2)
        .encode(
            alt.X("layer:O", title="layer", axis=alt.Axis(labelAngle=0, labelOverlap=True), scale=_CELLS),
            alt.Y("head:O", title="head", axis=alt.Axis(labelOverlap=True), scale=_CELLS),
            alt.Color(
                "value:Q",
                title=None,
                scale=alt.Scale(domain=[low, high], nice=False, interpolate="lab"),
                legend=alt.Legend(
                    orient="right",
                    gradientLength=alt.expr(f"min({heads * step}, 160)"),
                    gradientThickness=10,
                    tickCount=3,
                ),
            ),
            tooltip=[
                alt.Tooltip("layer:O"),
                alt.Tooltip("head:O"),
                alt.Tooltip("value:Q", title=name.title, format=".3~f"),
            ],
        )
    )
    return _spec(chart, height=heads * step)


_CELLS = alt.Scale(paddingInner=0.06, paddingOuter=0.02)


def _by_depth(rows: pd.DataFrame) -> pd.DataFrame:
    """With the kind of each site; the stream before the first block becomes layer -1 of the stream after the blocks."""
    rows = rows.assign(kind=rows["site"].map(kind_of))
    before = rows["kind"].str.endswith("resid.pre") & (rows["layer"] == 0)
    after = rows["kind"].str.replace("resid.pre", "resid.post")
    paired = before & after.isin(rows["kind"])
    rows = rows.assign(layer=rows["layer"].where(~paired, -1), kind=rows["kind"].where(~paired, after))
    # What compares a block with the stream before it has no value before the first.
    return rows[(rows["layer"] >= 0) | rows["value"].notna()]


def _decades(low: float, high: float) -> list[float]:
    """Ticks of a logarithmic axis: powers of ten, with their double and fivefold where there are few of them.

    >>> _decades(0.08, 2.5)
    [0.1, 0.2, 0.5, 1, 2]
    >>> _decades(3, 20000)
    [10, 100, 1000, 10000]
    """
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = (1,) if math.log10(high / low) >= 2.5 else (1, 2, 5)
    ticks = [float(f"{step}e{power}") for power in range(first, last + 1) for step in steps]
    return [int(tick) if tick >= 1 else tick for tick in ticks if low <= tick <= high]


def _inline(rows: pd.DataFrame) -> alt.InlineData:
    # As plain values: Altair refuses a frame of more than 5000 rows. Six digits are more than a screen can show.
    records = rows.astype({column: "int64" for column in ("layer", "head") if column in rows}).to_dict("records")
    for record in records:
        value = record["value"]
        record["value"] = float(f"{value:.6g}") if math.isfinite(value) else None
    return alt.InlineData(values=records)


def _spec(chart: alt.Chart | alt.LayerChart, height: int) -> dict[str, Any]:
    spec = chart.properties(width="container", height=height).to_dict()
    spec.pop("config", None)
    return spec
