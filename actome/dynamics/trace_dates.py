"""When each curve of a trace changed: dates between checkpoints, turns, and whether the order of steps matters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from actome.core.errors import MeasureError
from actome.dynamics.dates import first_passage
from actome.dynamics.trace_table import PLACES

if TYPE_CHECKING:
    from actome.dynamics.trace_table import Curve, Trace

_COLUMNS = (
    *("measure", "place", *PLACES, "first", "last", "span", "at", "low", "high", "start", "end"),
    *("turn", "turn_value", "p"),
)


@dataclass(frozen=True)
class Dated:
    """Dates of curves, those that changed most first.

    Attributes:
        frame: one row for each curve.

            - ``first``, ``last``: its values at the first and the last step; ``span``: its largest minus its smallest
              value, over the largest magnitude that the measure has in any curve;
            - ``at``: when it had gone half of the way (`share`) from the first to the last value and stayed there,
              on the straight line between checkpoints; ``low``, ``high``: the checkpoints on either side, which is all
              that is known; infinite when it did not get there for good;
            - ``start``, ``end``: the same of a tenth and of nine tenths of the way;
            - ``turn``, ``turn_value``: the step at which it was furthest beyond both ends, where that is more than a
              fifth of its span; NaN for a curve that only went from one end to the other;
            - ``p``: share of shuffled orders of the values with as short a way through them. Above 0.05 the values do
              not follow the order of steps, and a date is one of noise.
        share: of the way that dates an event.
    """

    frame: pd.DataFrame = field(repr=False)
    share: float

    def __repr__(self) -> str:
        return f"Dated({len(self.frame)} curves, {int((self.frame['p'] <= 0.05).sum())} of them follow the steps)"

    def when(self, measure: str, place: str | None = None) -> pd.Series:
        """The row of one curve; of several, of the one that changed most.

        Raises:
            MeasureError: there is none.
        """
        rows = self.frame[self.frame["measure"] == measure]
        rows = rows if place is None else rows[rows["place"] == place]
        if rows.empty:
            raise MeasureError(f"no curve of {measure!r}" + (f" at {place}" if place else "") + " was dated")
        return rows.iloc[0]


def date_curves(
    trace: Trace,
    measure: str | Sequence[str] | None = None,
    site: str | None = None,
    *,
    share: float = 0.5,
    hold: int = 2,
    permutations: int = 199,
    seed: int = 0,
) -> Dated:
    """When each curve of a trace changed.

    Args:
        trace: of at least three steps.
        measure: one, several or all.
        site: a pattern.
        share: of the way from the first to the last value that dates the change.
        hold: checkpoints in a row that must be beyond it (the last checkpoint alone counts too).
        permutations, seed: of the shuffled control.

    >>> from actome.dynamics import Trace
    >>> step = [0, 1, 2, 4, 8, 16, 32, 64]
    >>> trace = Trace(pd.DataFrame({"step": step, "measure": "induction", "value": [0, 0, 0, 0, 0.1, 0.9, 1, 1]}))
    >>> row = trace.dates().when("induction")
    >>> [float(row[name]) for name in ("low", "at", "high")], bool(row["p"] <= 0.05)
    ([8.0, 12.0, 16.0], True)
    """
    if not 0 < share < 1 or hold < 1:
        raise MeasureError(f"share={share}, hold={hold}: give a share between 0 and 1, and at least one checkpoint")
    curves = [one for one in trace.each(measure, site) if len(one.x) >= 3]
    if not curves:
        raise MeasureError(f"no curve has three steps or more, and the trace has {len(trace.steps)}")
    rng = np.random.default_rng(seed)
    largest: dict[str, float] = {}
    for one in curves:
        largest[one.measure] = max(largest.get(one.measure, 0.0), float(np.abs(one.y).max()))
    rows = [
        {"measure": one.measure, "place": one.place, **one.at, **_dated(one, share, hold, largest[one.measure])}
        for one in curves
    ]
    for row, p in zip(rows, _order_p(curves, permutations, rng), strict=True):
        row["p"] = p
    frame = pd.DataFrame(rows, columns=list(_COLUMNS))
    frame = frame.astype({"layer": "Int64", "head": "Int64", "expert": "Int64"})
    return Dated(frame.sort_values("span", ascending=False, kind="stable", ignore_index=True), share)


def _dated(curve: Curve, share: float, hold: int, largest: float) -> dict[str, Any]:
    x, y = curve.x, curve.y
    out = {"first": float(y[0]), "last": float(y[-1]), "span": float(np.ptp(y)) / largest if largest > 0 else 0.0}
    for name, part in (("at", share), ("start", 0.1), ("end", 0.9)):
        # What is held to the end is held, though fewer points may be left than `hold`.
        dates = [first_passage(x, y, share=part, hold=one).at for one in range(1, hold + 1)]
        stays = [at for one, at in enumerate(dates, 1) if one == hold or at > x[-2]]
        out[name] = min(stays)
    at = out["at"]
    after = int(np.searchsorted(x, at)) if math.isfinite(at) else -1
    out["low"] = float(x[max(after - 1, 0)]) if after >= 0 else math.inf
    out["high"] = float(x[after]) if after >= 0 else math.inf
    turn = _turn(y)
    out["turn"], out["turn_value"] = (float(x[turn]), float(y[turn])) if turn else (math.nan, math.nan)
    return out


def _turn(y: np.ndarray) -> int | None:
    """Where a curve is furthest beyond both of its ends, when that is more than a fifth of its span."""
    above, below = y.max() - max(y[0], y[-1]), min(y[0], y[-1]) - y.min()
    if max(above, below) <= 0.2 * np.ptp(y):
        return None
    return int(y.argmax() if above >= below else y.argmin())


def _order_p(curves: list[Curve], permutations: int, rng: np.random.Generator) -> list[float]:
    """For each curve the share of shuffled orders of its values whose path is as short, itself counted."""
    found = []
    for curve in curves:
        path = np.abs(np.diff(curve.y)).sum()
        shuffled = rng.permuted(np.tile(curve.y, (permutations, 1)), axis=1)
        null = np.abs(np.diff(shuffled, axis=1)).sum(1)
        found.append((1 + int((null <= path * (1 + 1e-12)).sum())) / (1 + permutations))
    return found
