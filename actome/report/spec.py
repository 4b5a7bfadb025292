"""What the figures share: data put into a specification, ticks of a logarithmic axis, cells of a map."""

from __future__ import annotations

import math
from typing import Any

import altair as alt
import pandas as pd

CELLS = alt.Scale(paddingInner=0.06, paddingOuter=0.02)
_WHOLE = ("head", "expert", "unit")


def decades(low: float, high: float) -> list[float]:
    """Ticks of a logarithmic axis: powers of ten, with their double and fivefold where there are few of them.

    >>> decades(0.08, 2.5)
    [0.1, 0.2, 0.5, 1, 2]
    >>> decades(3, 20000)
    [10, 100, 1000, 10000]
    """
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = (1,) if math.log10(high / low) >= 2.5 else (1, 2, 5)
    ticks = [float(f"{step}e{power}") for power in range(first, last + 1) for step in steps]
    return [int(tick) if tick >= 1 else tick for tick in ticks if low <= tick <= high]


def inline(rows: pd.DataFrame) -> alt.InlineData:
    """Rows as plain values, numbers with six digits: more than a screen can show."""
    # Altair refuses a frame of more than 5000 rows.
    rows = rows.astype({column: "int64" for column in _WHOLE if column in rows})
    return alt.InlineData(values=[{key: _short(x) for key, x in record.items()} for record in rows.to_dict("records")])


def _short(x: Any) -> Any:
    if x is pd.NA:
        return None
    if isinstance(x, float):
        return float(f"{x:.6g}") if math.isfinite(x) else None
    return x


def spec_of(chart: alt.TopLevelMixin, height: int) -> dict[str, Any]:
    """A chart as wide as its place in the page, without colours and fonts."""
    spec = chart.properties(width="container", height=height).to_dict()
    spec.pop("config", None)
    return spec
