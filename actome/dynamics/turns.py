"""Where a curve turns, and where it stands still."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from actome.dynamics.series import autoregressive, lag1, series
from actome.dynamics.smoothing import Axis, along_axis, smoother

Array = np.ndarray


@dataclass(frozen=True)
class Turn:
    """A top or a bottom of a smoothed curve.

    Attributes:
        at, low, high: its date, with a bootstrap interval over the resamples that have it.
        value: of the smoothed curve there.
        kind: ``"top"`` or ``"bottom"``.
        prominence: how far the curve goes away from it on the lesser side, in standard deviations of the residuals.
        support: share of resamples that have a turn of this kind nearer to it than to its neighbours.
    """

    at: float
    low: float
    high: float
    value: float
    kind: str
    prominence: float
    support: float


def turning_points(
    x: Any, y: Any = None, *, bandwidth: float = 0.06, axis: Axis = "linear", least: float = 3.0, level: float = 0.95,
    resamples: int = 200, seed: int = 0,
) -> list[Turn]:  # fmt: skip
    """Tops and bottoms of a smoothed curve that stand out from its noise, each with an interval and its support.

    Args:
        x, y: as everywhere; the mean over seeds is smoothed.
        bandwidth: of `smooth`; a share of the range. It sets the size of what counts as a turn.
        axis: smooth over x or over log x.
        least: prominence that a turn must have, in standard deviations of the residuals.
        level, resamples, seed: of the bootstrap, over seeds where there are five or more and over residuals otherwise.

    A turn at either end is none. Smoothing flattens tops, so values are drawn in; dates are not.

    >>> x = np.linspace(0, 1, 60)
    >>> [(turn.kind, round(turn.at, 1)) for turn in turning_points(x, np.cos(3 * np.pi * x))]
    [('bottom', 0.3), ('top', 0.7)]
    """
    curve = series(x, y, minimum=8, what="turning points", allow_constant=False)
    along = along_axis(curve.x, axis)
    operator = smoother(along, bandwidth)
    fitted = operator @ curve.y
    residuals = curve.y - fitted
    # A linear smoother takes trace(2 S - S S') degrees of freedom (Hastie and Tibshirani 1990).
    taken = float(np.trace(2 * operator - operator @ operator.T))
    sd = math.sqrt(float(residuals @ residuals) / max(len(curve) - taken, 1.0))
    floor = max(least * sd, 1e-3 * float(np.ptp(fitted)))
    found = _extrema(fitted, floor)
    rng = np.random.default_rng(seed)
    by_seed, rho = len(curve.runs) >= 5, max(lag1(residuals), 0.0) if sd > 0 else 0.0
    inflated = (residuals - residuals.mean()) * math.sqrt(len(curve) / max(len(curve) - taken, 1.0))
    drawn = []
    for _ in range(resamples):
        again = curve.resampled(rng) if by_seed else fitted + autoregressive(inflated, rho, rng)
        drawn.append(_extrema(operator @ again, floor / 2))
    turns = []
    for i, kind, prominence in found:
        dates = [curve.x[j] for one in drawn if (j := _matching(i, kind, one, found)) is not None]
        low, high = np.quantile(dates, [(1 - level) / 2, (1 + level) / 2]) if dates else (math.nan, math.nan)
        turns.append(
            Turn(
                _vertex(along, fitted, i, axis), float(low), float(high), float(fitted[i]), kind,
                prominence / sd if sd > 0 else math.inf, len(dates) / resamples if resamples else math.nan,
            )
        )  # fmt: skip
    return turns


def _extrema(y: Array, floor: float) -> list[tuple[int, str, float]]:
    """Tops and bottoms with their prominence, in alternation: a zigzag of legs of at least `floor`."""
    found: list[tuple[int, str, float]] = []
    high = low = 0
    direction = 0
    for i in range(1, len(y)):
        high = i if y[i] > y[high] else high
        low = i if y[i] < y[low] else low
        if direction >= 0 and y[high] - y[i] >= floor:
            if direction > 0 or high > 0:
                found.append((high, "top", 0.0))
            direction, low = -1, i
            high = i
        elif direction <= 0 and y[i] - y[low] >= floor:
            if direction < 0 or low > 0:
                found.append((low, "bottom", 0.0))
            direction, high = 1, i
            low = i
    out = []
    for k, (i, kind, _) in enumerate(found):
        left = y[found[k - 1][0] : i + 1] if k else y[: i + 1]
        right = y[i : found[k + 1][0] + 1] if k + 1 < len(found) else y[i:]
        out.append((i, kind, float(min(np.abs(left - y[i]).max(), np.abs(right - y[i]).max()))))
    return [one for one in out if 0 < one[0] < len(y) - 1 and one[2] >= floor]


def _matching(i: int, kind: str, drawn: list, found: list) -> int | None:
    same = [j for j, other, _ in drawn if other == kind]
    if not same:
        return None
    j = min(same, key=lambda one: abs(one - i))
    return j if min(found, key=lambda one: abs(one[0] - j) + (one[1] != kind) * 1e9)[0] == i else None


def _vertex(along: Array, y: Array, i: int, axis: Axis) -> float:
    """Vertex of the parabola through a turn and its neighbours."""
    a, b, _ = np.polyfit(along[i - 1 : i + 2] - along[i], y[i - 1 : i + 2], 2)
    at = along[i] - b / (2 * a) if a else along[i]
    return float(np.exp(at)) if axis == "log" else float(at)


@dataclass(frozen=True)
class Plateau:
    """A stretch in which a curve stands still.

    Attributes:
        start, end: its dates; `end` is where the transition that follows begins.
        level: mean of the curve in it.
        share: of the range of x (of log x).
        open: whether it lasts to the end of the curve, so that its own end is not known.
        next: start of the next plateau, where the transition is over; infinite when there is none.
    """

    start: float
    end: float
    level: float
    share: float
    open: bool
    next: float


def plateaus(
    x: Any, y: Any = None, *, tolerance: float = 0.1, least: float = 0.1, bandwidth: float = 0.0, axis: Axis = "linear"
) -> list[Plateau]:
    """The longest stretches in which a curve moves by no more than a share of its whole range.

    The longest goes first, then the longest of what is left; they do not overlap, and come in order of time.

    Args:
        x, y: as everywhere; the mean over seeds is taken.
        tolerance: largest minus smallest value in a plateau, as a share of the curve's range.
        least: length of a plateau, as a share of the range of x (of log x).
        bandwidth: of `smooth`, applied first; 0 for none. Noise of more than `tolerance` breaks a plateau.
        axis: whether lengths are measured in x or in log x.

    >>> y = [1.0] * 10 + [0.75, 0.5, 0.25] + [0.0] * 10
    >>> [(one.start, one.end, one.open) for one in plateaus(np.arange(23.0), y)]
    [(0.0, 9.0, False), (13.0, 22.0, True)]
    """
    curve = series(x, y, minimum=4, what="plateaus", allow_constant=False)
    along = along_axis(curve.x, axis)
    values = smoother(along, bandwidth) @ curve.y if bandwidth else curve.y
    n, limit, whole = len(curve), tolerance * float(np.ptp(values)), float(along[-1] - along[0])
    free, found = [(0, n)], []
    while free:
        a, b = free.pop()
        best = max(_still(values[a:b], limit), key=lambda one: along[a + one[1]] - along[a + one[0]], default=None)
        if best is None or along[a + best[1]] - along[a + best[0]] < least * whole:
            continue
        i, j = a + best[0], a + best[1]
        found.append((i, j))
        free += [(a, i), (j + 1, b)]
    found.sort()
    starts = [float(curve.x[i]) for i, _ in found[1:]] + [math.inf]
    return [
        Plateau(
            float(curve.x[i]), float(curve.x[j]), float(values[i : j + 1].mean()), float(along[j] - along[i]) / whole,
            j == n - 1, following,
        )
        for (i, j), following in zip(found, starts[: len(found)], strict=True)
    ]  # fmt: skip


def _still(values: Array, limit: float) -> list[tuple[int, int]]:
    """For each start, the last point up to which values stay within `limit` of one another."""
    out = []
    for i in range(len(values)):
        span = np.maximum.accumulate(values[i:]) - np.minimum.accumulate(values[i:])
        out.append((i, i + int(np.searchsorted(span, limit * (1 + 1e-12), side="right")) - 1))
    return out
