"""Figures of values that are lists: histograms over the depth of a model, and templates for the page of a layer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import altair as alt
import pandas as pd

from actome.report.scan import Scan
from actome.report.spec import CELLS, decades, inline, spec_of
from actome.report.words import kind_of, word

# A doubling of the magnitude with less than this of all activations is no part of a figure.
_LEAST = 1e-5
_MAGNITUDES = "datum.value >= 1e4 || datum.value < 1e-3 ? format(datum.value, '.0e') : format(datum.value, '~r')"
# On a logarithmic axis every digit has a tick, and labels have room beside some.
_SOME_MAGNITUDES = f"test(/^[125]/, format(datum.value, '.0e')) ? ({_MAGNITUDES}) : ''"
# Lists that make one figure together, see `reliability`.
_RELIABILITY = ("bin_share", "bin_confidence", "bin_accuracy")
# Dims whose entries are the sites of the measurement themselves.
_SITE_DIMS = {"site", "sites", "other", "other_site", "layer2"}


def histogram_maps(scan: Scan) -> Iterator[dict[str, Any]]:
    """For each kind of site: layers by magnitude, coloured by how many activations are there."""
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for one in scan.arrays:
        if one["dim"] == "bin" and "at" in one and one.get("layer") is not None and "head" not in one:
            by_kind.setdefault((one["measure"], kind_of(one["site"])), []).append(one)
    for (measure, kind), arrays in by_kind.items():
        rows = pd.DataFrame(
            [{"layer": one["layer"], "site": one["site"], **part} for one in arrays for part in doublings(one)]
        )
        if rows.empty or rows["layer"].nunique() < 2:
            continue
        name = word(measure)
        yield {
            "key": f"{measure}-{kind}".replace(" ", "-").replace(".", "-"),
            "title": f"{name.title}, {kind}",
            "caption": name.says,
            "group": "distributions",
            "spec": _histogram_map(rows),
            "measure": measure,
            "kinds": (kind,),
        }


def doublings(array: dict[str, Any]) -> list[dict[str, float]]:
    """The bins of a histogram summed between powers of two: low, high and share of each.

    >>> doublings({"at": [0.75, 1.0, 1.25, 1.5], "values": [0.1, 0.2, 0.6, 0.1]})
    [{'low': 0.5, 'high': 1.0, 'share': 0.1}, {'low': 1.0, 'high': 2.0, 'share': 0.9}]
    """
    shares: dict[int, float] = {}
    for low, share in zip(array["at"], array["values"], strict=True):
        if low > 0 and share is not None:
            power = math.floor(math.log2(low) + 1e-6)  # edges were rounded to eight digits
            shares[power] = shares.get(power, 0.0) + share
    return [
        {"low": 2.0**power, "high": 2.0 ** (power + 1), "share": float(f"{share:.4g}")}
        for power, share in sorted(shares.items())
        if share >= _LEAST
    ]


def _histogram_map(rows: pd.DataFrame) -> dict[str, Any]:
    low, high = rows["low"].min(), rows["high"].max()
    chart = (
        alt.Chart(inline(rows))
        .mark_rect(stroke=None)
        .encode(
            alt.X("layer:O", title="layer", axis=alt.Axis(labelAngle=0, labelOverlap=True), scale=CELLS),
            alt.Y(
                "low:Q",
                title=None,
                scale=alt.Scale(type="log", domain=[low, high], nice=False),
                axis=alt.Axis(
                    values=decades(low, high),
                    labelExpr=_MAGNITUDES,
                ),
            ),
            alt.Y2("high:Q"),
            alt.Color(
                "share:Q",
                title=None,
                # Square root, or the few large activations, which are the interesting ones, would not show.
                scale=alt.Scale(type="sqrt", domainMin=0, nice=False, interpolate="lab"),
                legend=alt.Legend(orient="right", gradientLength=120, gradientThickness=10, tickCount=3, format=".0%"),
            ),
            tooltip=[
                alt.Tooltip("site:N"),
                alt.Tooltip("low:Q", title="from", format=".3~g"),
                alt.Tooltip("high:Q", title="to", format=".3~g"),
                alt.Tooltip("share:Q", title="of all activations", format=".3~%"),
            ],
        )
    )
    return spec_of(chart, height=190)


def site_maps(scan: Scan) -> Iterator[dict[str, Any]]:
    """For values that compare each site with all: sites by sites."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for one in scan.arrays:
        if one["dim"] in _SITE_DIMS and "head" not in one:
            groups.setdefault(one["measure"], []).append(one)
    for measure, arrays in groups.items():
        if any(len(one["values"]) != len(arrays) for one in arrays):
            continue
        sites, name = [one["site"] for one in arrays], word(measure)
        rows = pd.DataFrame(
            [
                {"i": i, "j": j, "site": a, "with": b, "value": value}
                for i, (a, one) in enumerate(zip(sites, arrays, strict=True))
                for j, (b, value) in enumerate(zip(sites, one["values"], strict=True))
            ]
        )
        axis = alt.Axis(labels=False, ticks=False)
        chart = (
            alt.Chart(inline(rows.astype({"value": float})))
            .mark_rect()
            .encode(
                alt.X("j:O", title="sites in order", axis=axis, scale=CELLS),
                alt.Y("i:O", title="sites in order", axis=axis, scale=CELLS),
                alt.Color(
                    "value:Q",
                    title=None,
                    scale=alt.Scale(nice=False, interpolate="lab"),
                    legend=alt.Legend(orient="right", gradientLength=140, gradientThickness=10, tickCount=3),
                ),
                tooltip=["site:N", "with:N", alt.Tooltip("value:Q", title=name.title, format=".3~f")],
            )
        )
        yield {
            "key": f"sites-{measure}",
            "title": name.title,
            "caption": name.says,
            "group": "distributions",
            "spec": spec_of(chart, height=240),
            "measure": measure,
            "kinds": tuple(dict.fromkeys(map(kind_of, sites))),
        }


def reliability(scan: Scan) -> Iterator[dict[str, Any]]:
    """Accuracy against confidence, bin by bin, for each site whose predictions were judged."""
    by_site: dict[str, dict[str, dict[float, float | None]]] = {}
    for one in scan.arrays:
        if one["measure"] in _RELIABILITY and "at" in one:
            by_site.setdefault(one["site"], {})[one["measure"]] = dict(zip(one["at"], one["values"], strict=True))
    for site, lists in by_site.items():
        if set(lists) != set(_RELIABILITY):
            continue
        share, confidence, accuracy = (lists[name] for name in _RELIABILITY)
        # Ends that are zero are not in a list: of what is predicted in a bin, none was right then.
        rows = pd.DataFrame(
            [
                {"confidence": confidence[at], "accuracy": accuracy.get(at) or 0.0, "predictions": share[at]}
                for at in share
                if share[at] and confidence.get(at) is not None
            ]
        )
        if len(rows) < 2:
            continue
        name = word("bin_accuracy")
        percent = alt.Axis(format=".0%", tickCount=5)
        unit = alt.Scale(domain=[0, 1], nice=False)
        x = alt.X("confidence:Q", title="confidence", scale=unit, axis=percent)
        y = alt.Y("accuracy:Q", title="accuracy", scale=unit, axis=percent)
        line = pd.DataFrame({"confidence": [0.0, 1.0], "accuracy": [0.0, 1.0]})
        diagonal = alt.Chart(inline(line)).mark_line(style="rest", strokeDash=[4, 4], strokeWidth=1).encode(x, y)
        base = alt.Chart(inline(rows)).encode(x, y)
        points = base.mark_point(filled=True, opacity=1).encode(
            alt.Size("predictions:Q", legend=None, scale=alt.Scale(range=[12, 220], zero=True)),
            tooltip=[
                alt.Tooltip("confidence:Q", format=".1%"),
                alt.Tooltip("accuracy:Q", format=".1%"),
                alt.Tooltip("predictions:Q", title="of all predictions", format=".2~%"),
            ],
        )
        yield {
            "key": f"reliability-{site}".replace(".", "-").replace(":", "-"),
            "title": name.title,
            "caption": name.says,
            "group": "distributions",
            "spec": spec_of(alt.layer(diagonal, base.mark_line(strokeWidth=1.5), points), height=240),
            "measure": "bin_accuracy",
            "kinds": (kind_of(site),),
        }


def other_lists(scan: Scan) -> Iterator[dict[str, Any]]:
    """A line for each list of a site that belongs to no layer, such as the logits."""
    for one in scan.arrays:
        values = [x for x in one["values"] if x is not None]
        if one.get("layer") is not None or one["dim"] in _SITE_DIMS or len(values) < 2:
            continue
        if one["measure"] in _RELIABILITY or not word(one["measure"]).drawn:
            continue
        at = one.get("at", range(len(one["values"])))
        rows = pd.DataFrame({"at": at, "value": pd.Series(one["values"], dtype=float)})
        name = word(one["measure"])
        chart = (
            alt.Chart(inline(rows))
            .mark_line(point=True)
            .encode(
                alt.X("at:Q", title=one["dim"], axis=alt.Axis(grid=False, tickCount=6)),
                alt.Y("value:Q", title=None, axis=alt.Axis(tickCount=4)),
                tooltip=[
                    alt.Tooltip("at:Q", title=one["dim"]),
                    alt.Tooltip("value:Q", title=name.title, format=".4~g"),
                ],
            )
        )
        place = "".join(f" {key} {one[key]}" for key in ("head", "expert") if key in one)
        yield {
            "key": f"list-{one['measure']}-{one['site']}{place}".replace(" ", "-").replace(".", "-").replace(":", "-"),
            "title": f"{name.title}, {one['site']}{place}",
            "caption": name.says,
            "group": "distributions",
            "spec": spec_of(chart, height=190),
            "measure": one["measure"],
            "kinds": (kind_of(one["site"]),),
        }


def templates() -> dict[str, dict[str, Any]]:
    """Figures of the page of a layer, whose data the page fills in: ``histogram``, ``decay`` and ``list``."""
    here, rest = alt.NamedData("here"), alt.NamedData("rest")
    magnitude = alt.Axis(
        tickCount=6,
        grid=False,
        labelOverlap=True,
        labelExpr=_MAGNITUDES,
    )
    x = alt.X("low:Q", title="magnitude", scale=alt.Scale(type="log", nice=False), axis=magnitude)
    share = alt.Axis(format="~%", tickCount=4)
    histogram = alt.layer(
        alt.Chart(here)
        .mark_rect(style="here", stroke=None)
        .encode(
            x,
            alt.X2("high:Q"),
            alt.Y("share:Q", title=None, axis=share),
            alt.Y2(datum=0),
            tooltip=[
                alt.Tooltip("low:Q", title="from", format=".3~g"),
                alt.Tooltip("high:Q", title="to", format=".3~g"),
                alt.Tooltip("share:Q", title="of all activations", format=".3~%"),
            ],
        ),
        alt.Chart(rest).mark_line(style="rest", interpolate="step-after").encode(x, alt.Y("share:Q", title=None)),
    )
    return {
        "histogram": spec_of(histogram, height=130),
        "decay": spec_of(_lists(here, rest, "log"), height=150),
        "list": spec_of(_lists(here, rest, "linear"), height=150),
    }


def _lists(here: alt.NamedData, rest: alt.NamedData, scale: str) -> alt.LayerChart:
    ticks = {"labelExpr": _SOME_MAGNITUDES} if scale == "log" else {"format": ",~f"}
    zero = {} if scale == "log" else {"zero": False}
    x = alt.X(
        "at:Q",
        title=None,
        scale=alt.Scale(type=scale, nice=False, **zero),
        axis=alt.Axis(grid=False, tickCount=5, **ticks),
    )
    y = alt.Y("value:Q", title=None, scale=alt.Scale(type=scale), axis=alt.Axis(tickCount=4, **ticks))
    others = alt.Chart(rest).mark_line(style="rest", strokeWidth=1, opacity=0.5).encode(x, y, alt.Detail("layer:O"))
    line = alt.Chart(here).mark_line(style="here", point={"size": 12}).encode(
        x, y, tooltip=[alt.Tooltip("at:Q", title="at", format=",~f"), alt.Tooltip("value:Q", format=".4~g")]
    )  # fmt: skip
    return alt.layer(others, line)
