"""The figures of a steering evaluation: dose against response with its controls, effect against damage, and sweeps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import altair as alt
import pandas as pd

from actome.report.figures import Figure
from actome.report.spec import CELLS, inline, spec_of
from actome.steer import Evaluation
from actome.steer.lab import HARM

# Name and sentence of each measure, in the order in which they are shown.
MEASURES = {
    "preference": ("Preference", "Log-odds of the wanted against the unwanted response, in nats."),
    "utility": ("Utility", "Log-odds of giving either of the two responses rather than anything else, in nats."),
    "nll": ("Loss of held-out text", "Nats a token, the clamp acting on all of it."),
    "accuracy": ("Accuracy of the task", "Share of questions answered rightly."),
    "repetition": ("Repetition", "Share of 4-grams in what is generated that stood in it before."),
    "off_manifold": (
        "Off the manifold",
        "Distance from where clean states vary, at the end of the stream; usual is 1.",
    ),
}
ARMS = {"fitted": "fitted", "random": "random", "shuffled": "shuffled"}
_COLOUR = alt.Color(
    "arm:N",
    title=None,
    scale=alt.Scale(domain=list(ARMS.values())),
    legend=alt.Legend(orient="top", symbolType="circle", symbolOpacity=1),
)


def steering_figures(found: Evaluation) -> list[Figure]:
    """Groups ``dose``, ``trade`` and ``sweep``; of several places the recommended one, or else the first, in full."""
    site, positions = place_of(found)
    frame = found.frame.assign(arm=found.frame["arm"].map(ARMS))
    here = frame[(frame["site"] == site) & (frame["positions"] == positions)]
    return [*_doses(here, found.strength), *_trades(here, found.strength), *_sweeps(frame)]


def place_of(found: Evaluation) -> tuple[str, str]:
    """Site and positions that figures and tables are of."""
    first = found.frame.iloc[0]
    return found.site or str(first["site"]), found.positions or str(first["positions"])


def _doses(here: pd.DataFrame, strength: float | None) -> Iterator[Figure]:
    for measure, (title, says) in MEASURES.items():
        rows = here[(here["measure"] == measure) & here["value"].notna()]
        if rows.empty:
            continue
        yield Figure(f"dose-{measure}", title, says, "dose", _dose(rows, strength), measure)


def _dose(rows: pd.DataFrame, strength: float | None) -> dict[str, Any]:
    base = alt.Chart(inline(rows[["arm", "draw", "strength", "value", "low", "high"]]))
    x = alt.X("strength:Q", title="strength", axis=alt.Axis(grid=False, tickCount=6))
    scale = alt.Scale(zero=False, nice=True)
    y = alt.Y("value:Q", title=None, scale=scale, axis=alt.Axis(tickCount=4))
    draw, fitted = alt.Detail("draw:N"), f"datum.arm == '{ARMS['fitted']}'"
    tips = [
        alt.Tooltip("arm:N"),
        alt.Tooltip("strength:Q", format=".3~g"),
        *(alt.Tooltip(f"{key}:Q", format=".4~g") for key in ("value", "low", "high")),
    ]
    one = base.transform_filter(fitted)
    band = one.mark_area(opacity=0.25).encode(x, alt.Y("low:Q", title=None, scale=scale), alt.Y2("high:Q"), _COLOUR)
    others = base.transform_filter(f"!({fitted})").mark_line(strokeWidth=1, opacity=0.7)
    parts: list[Any] = [
        band,
        others.encode(x, y, _COLOUR, draw),
        one.mark_line(strokeWidth=2).encode(x, y, _COLOUR),
        base.mark_point(size=36, filled=True, opacity=1).encode(x, y, _COLOUR, draw, tooltip=tips),
    ]
    if strength is not None:
        parts.append(_rule("strength", strength))
    return spec_of(alt.layer(*parts), height=170)


def _rule(axis: str, value: float) -> alt.Chart:
    """Where the recommended strength is."""
    chart = alt.Chart(alt.InlineData(values=[{axis: value}]))
    return chart.mark_rule(style="info", strokeDash=[3, 3], strokeWidth=1.5).encode(alt.X(f"{axis}:Q"))


def _trades(here: pd.DataFrame, strength: float | None) -> Iterator[Figure]:
    """Preference gained against each kind of damage, one point a strength."""
    wide = here.pivot(index=["arm", "draw", "strength"], columns="measure", values="value").reset_index()
    bare = wide[(wide["arm"] == ARMS["fitted"]) & (wide["strength"] == 0)].iloc[0]
    for measure, sign in (*HARM.items(), ("utility", -1)):
        if measure not in wide:
            continue
        rows = wide.assign(gain=wide["preference"] - bare["preference"], damage=sign * (wide[measure] - bare[measure]))
        rows = rows[["arm", "draw", "strength", "gain", "damage"]].dropna()
        base = alt.Chart(inline(rows))
        x = alt.X("damage:Q", title=f"{'rise' if sign > 0 else 'fall'} of {MEASURES[measure][0].lower()}")
        y = alt.Y("gain:Q", title="gain of preference, nats")
        tips = [alt.Tooltip("arm:N"), *(alt.Tooltip(f"{k}:Q", format=".3~g") for k in ("strength", "gain", "damage"))]
        order, draw = alt.Order("strength:Q"), alt.Detail("draw:N")
        line = base.mark_line(strokeWidth=1, opacity=0.5).encode(x, y, _COLOUR, order, draw)
        points = base.mark_point(size=40, filled=True, opacity=1).encode(x, y, _COLOUR, tooltip=tips)
        parts: list[Any] = [line, points]
        chosen = rows[(rows["arm"] == ARMS["fitted"]) & (rows["strength"] == strength)]
        if len(chosen):
            ring = alt.Chart(inline(chosen)).mark_point(size=160, style="info", strokeWidth=1.5)
            parts.append(ring.encode(x, y))
        says = "A point a strength, joined in order; the ring is what is recommended. Up and to the left is better."
        yield Figure(f"trade-{measure}", f"Effect against {MEASURES[measure][0].lower()}", says, "trade",
                     spec_of(alt.layer(*parts), height=220), measure)  # fmt: skip


def _sweeps(frame: pd.DataFrame) -> Iterator[Figure]:
    """Where it was tried, by strength; only where there was more than one place."""
    fitted = frame[frame["arm"] == ARMS["fitted"]]
    places = fitted[["site", "positions"]].drop_duplicates()
    if len(places) < 2:
        return
    several = places["positions"].nunique() > 1
    name = fitted["site"] + (", " + fitted["positions"] if several else "")
    for measure, (title, says) in MEASURES.items():
        rows = fitted.assign(place=name)
        rows = rows[(rows["measure"] == measure) & rows["value"].notna()][["place", "strength", "value", "low", "high"]]
        if rows.empty:
            continue
        order = list(dict.fromkeys(rows["place"]))
        tips = [alt.Tooltip("place:N"), alt.Tooltip("strength:Q", format=".3~g")]
        tips += [alt.Tooltip(f"{key}:Q", format=".4~g") for key in ("value", "low", "high")]
        legend = alt.Legend(orient="right", gradientLength=100, gradientThickness=10, tickCount=3)
        colours = alt.Scale(nice=False, zero=False, interpolate="lab")
        chart = (
            alt.Chart(inline(rows))
            .mark_rect()
            .encode(
                alt.X("strength:O", title="strength", axis=alt.Axis(labelAngle=0, labelOverlap=True), scale=CELLS),
                alt.Y("place:N", title=None, sort=order, scale=CELLS, axis=alt.Axis(labelLimit=170)),
                alt.Color("value:Q", title=None, scale=colours, legend=legend),
                tooltip=tips,
            )
        )
        height = max(80, 20 * len(order))
        yield Figure(f"sweep-{measure}", title, says, "sweep", spec_of(chart, height=height), measure)
