"""The figures of a trace as Vega-Lite: curves over steps, maps of layers by steps, and what follows the slider.

On the page they are templates: the script puts the numbers of one measure into ``rows``, and moves the parameter
``at``, the step of the slider.
"""

from __future__ import annotations

from typing import Any

import altair as alt
import numpy as np

from actome.dynamics.trace_table import Trace
from actome.report.spec import CELLS, inline, spec_of
from actome.report.words import word

# From the first layer to the last, between light and dark, so that they show on either; and what stands back.
_FIRST, _LAST, _PALE = "#d98a4e", "#4f93c0", "#888"
_RAMP = alt.Scale(range=[_FIRST, _LAST], interpolate="lab")
_HEIGHT = 150
# Whole up to 10,000, then with a prefix; a format would give all ticks of an axis the prefix of the largest.
_STEPS = "format(datum.value, datum.value < 10000 ? ',' : '.3~s')"
_TIP = (alt.Tooltip("step:Q"), alt.Tooltip("value:Q", format=".4~g"))
_GRADIENT = alt.Legend(orient="right", gradientLength=100, gradientThickness=10, tickCount=3)


def templates() -> dict[str, dict[str, Any]]:
    """The specifications of the page, by the name under which its script asks for them."""
    rows, at = alt.Chart(alt.NamedData("rows")), alt.param(name="at", value=0)
    return {
        "curves": spec_of(_curves(rows).add_params(at), _HEIGHT),
        "lines": spec_of(_line(rows).add_params(at), _HEIGHT),
        "map": spec_of(_map(rows).add_params(at), _HEIGHT),
        "profile": spec_of(_profile(rows).add_params(at), 110),
        "heads": spec_of(_heads(rows).add_params(at), _HEIGHT),
    }


def _steps() -> alt.X:
    # The script makes the scale linear or logarithmic, and says which steps get a tick.
    return alt.X("step:Q", title="step", axis=alt.Axis(grid=False, labelOverlap=True, labelExpr=_STEPS))


def _value() -> alt.Y:
    return alt.Y("value:Q", title=None, scale=alt.Scale(zero=False, nice=True), axis=alt.Axis(tickCount=4))


def _rule() -> alt.Chart:
    """A line at the slider's step."""
    chart = alt.Chart(alt.InlineData(values=[{}])).transform_calculate(step="at")
    return chart.mark_rule(strokeDash=[3, 3], color=_PALE).encode(_steps())


def _curves(rows: alt.Chart) -> alt.LayerChart:
    legend = alt.Legend(orient="top", gradientLength=90, tickCount=3)
    depth = alt.Color("layer:Q", title="layer", scale=_RAMP, legend=legend)
    base = rows.encode(_steps(), _value(), depth, alt.Detail("name:N"))
    points = base.mark_point(size=18, filled=True, opacity=1).encode(tooltip=[alt.Tooltip("name:N", title="at"), *_TIP])
    return alt.layer(base.mark_line(strokeWidth=1.6), points, _rule())


def _line(rows: alt.Chart) -> alt.LayerChart:
    base = rows.encode(_steps(), _value())
    points = base.mark_point(size=18, filled=True, opacity=1).encode(tooltip=list(_TIP))
    return alt.layer(base.mark_line(strokeWidth=2), points, _rule())


def _map(rows: alt.Chart) -> alt.LayerChart:
    """Layers by steps, one cell each, whatever lies between the steps."""
    steps = alt.Axis(labelAngle=0, labelOverlap=True, labelExpr=_STEPS)
    x = alt.X("step:O", title="step", axis=steps, scale=CELLS)
    y = alt.Y("layer:O", title="layer", sort="descending", axis=alt.Axis(labelOverlap=True), scale=CELLS)
    scale = alt.Scale(nice=False, zero=False, interpolate="lab")
    colour = alt.Color("value:Q", title=None, scale=scale, legend=_GRADIENT)
    cells = rows.mark_rect().encode(x, y, colour, tooltip=[alt.Tooltip("layer:O"), *_TIP])
    now = rows.transform_filter("datum.step == at").mark_rect(fill=None, stroke=_PALE, strokeWidth=1.5).encode(x, y)
    return alt.layer(cells, now)


def _profile(rows: alt.Chart) -> alt.LayerChart:
    """A value over the layers at the slider's step, with the first and the last step behind it."""
    axis = alt.Axis(grid=False, tickMinStep=1, format="d")
    x = alt.X("layer:Q", title="layer", axis=axis, scale=alt.Scale(nice=False, padding=10))
    dash = alt.StrokeDash(
        "end:N", title=None, scale=alt.Scale(domain=["first", "last"], range=[[2, 3], [7, 3]]),
        legend=alt.Legend(orient="top", symbolType="stroke"),
    )  # fmt: skip
    ends = rows.transform_filter("datum.end != null").mark_line(strokeWidth=1.2, color=_PALE)
    now = rows.transform_filter("datum.step == at").encode(x, _value())
    points = now.mark_point(size=40, filled=True, opacity=1).encode(tooltip=[alt.Tooltip("layer:Q"), *_TIP])
    return alt.layer(ends.encode(x, _value(), dash), now.mark_line(strokeWidth=2), points)


def _heads(rows: alt.Chart) -> alt.Chart:
    """Layers by heads or experts at the slider's step, in colours that are the same for all steps."""
    x = alt.X("layer:O", title="layer", axis=alt.Axis(labelAngle=0, labelOverlap=True), scale=CELLS)
    y = alt.Y("place:O", title="head", axis=alt.Axis(labelOverlap=True), scale=CELLS)
    colour = alt.Color("value:Q", title=None, scale=alt.Scale(nice=False, interpolate="lab"), legend=_GRADIENT)
    tip = [alt.Tooltip("layer:O"), alt.Tooltip("place:O", title="head"), *_TIP]
    return rows.transform_filter("datum.step == at").mark_rect(cornerRadius=2).encode(x, y, colour, tooltip=tip)


def chart(trace: Trace, measure: str, site: str | None = None, *, log: bool = True) -> alt.Chart:
    """The curves of one measure as an Altair chart of its own.

    Args:
        site: one, or a pattern.
        log: steps on a logarithmic axis that has room for step 0.

    >>> import pandas as pd
    >>> trace = Trace(pd.DataFrame({"step": [0, 10], "measure": "loss", "value": [3.0, 2.0]}))
    >>> chart(trace, "loss").to_dict()["encoding"]["x"]["scale"]["type"]
    'symlog'
    """
    rows = trace.rows(measure, site).rename(columns={"place": "name"})[["step", "layer", "name", "value"]]
    least = min((step for step in trace.steps if step > 0), default=1)
    scale = alt.Scale(type="symlog", constant=least) if log else alt.Scale()
    axis = alt.Axis(grid=False, labelExpr=_STEPS, **({"values": ticks(trace.steps)} if log else {}))
    colour = [alt.Color("layer:Q", title="layer", scale=_RAMP)] if rows["layer"].notna().any() else []
    base = alt.Chart(inline(rows), title=word(measure).title).mark_line(point=True)
    tip = [alt.Tooltip("name:N", title="at"), *_TIP]
    x = alt.X("step:Q", title="step", scale=scale, axis=axis)
    return base.encode(x, _value(), alt.Detail("name:N"), *colour, tooltip=tip)


def ticks(steps: list[int], most: int = 8) -> list[int]:
    """Some of the steps for the ticks of a logarithmic axis, far enough apart there.

    >>> ticks([0, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192], most=5)
    [0, 128, 512, 2048, 8192]
    """
    least = min((step for step in steps if step > 0), default=1)
    along = np.log1p(np.array(steps) / least)
    chosen: list[int] = []
    for wanted in np.linspace(along[0], along[-1], most):
        step = steps[int(np.abs(along - wanted).argmin())]
        if step not in chosen:
            chosen.append(step)
    return chosen
