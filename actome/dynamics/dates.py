"""Dates of a curve: when it first passes a level and stays, and which of two curves comes first.

A run that has not got there is censored: its date is infinite, which keeps medians and orders right, and it is counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from actome.core.errors import MeasureError
from actome.dynamics.series import series
from actome.dynamics.smoothing import Axis, along_axis, smoother

Array = np.ndarray


@dataclass(frozen=True)
class Passage:
    """When a curve first passed a level for good.

    Attributes:
        at: the date, the median over seeds; infinite when (half of the seeds or more) never passed.
        low, high: bootstrap interval of the median over seeds, NaN for a single run.
        runs: each seed's date.
        censored: share of seeds that had not passed at the end.
        last: the last x; all that is known of a censored run is that its date is later.
    """

    at: float
    low: float
    high: float
    runs: tuple[float, ...] = field(repr=False)
    censored: float
    last: float


def first_passage(
    x: Any, y: Any = None, *, threshold: float | None = None, share: float | None = None, rising: bool | None = None,
    hold: int = 1, interpolate: bool = True, level: float = 0.95, resamples: int = 1000, seed: int = 0,
) -> Passage:  # fmt: skip
    """The first time that a curve passes a level and stays beyond it for `hold` points.

    Args:
        x, y: as everywhere; with several seeds each has its date.
        threshold: the level; or
        share: of the way from a run's first value to its last, such as 0.5.
        rising: passing upwards or downwards; by default towards the side of the last value.
        hold: points in a row, the first included, that must be beyond the level. With fewer left, the run is censored.
        interpolate: put the date between points, on the straight line; otherwise at the first point beyond.
        level, resamples, seed: of the bootstrap over seeds.

    >>> first_passage([0, 1, 2, 3, 4], [0.0, 1.0, 0.0, 1.0, 1.0], threshold=0.5, hold=2).at
    2.5
    """
    curve = series(x, y, minimum=2, what="a first passage")
    if (threshold is None) == (share is None):
        raise MeasureError("give a threshold or a share of the way from first to last value, one of the two")
    if hold < 1:
        raise MeasureError(f"hold={hold}; at least one point has to be beyond the level")
    dates = np.array([_passage(curve.x, run, threshold, share, rising, hold, interpolate) for run in curve.runs])
    low, high = median_interval(dates, level, resamples, seed)
    last = float(curve.x[-1])
    return Passage(_median(dates), low, high, tuple(dates.tolist()), float(np.isinf(dates).mean()), last)


def _passage(
    x: Array, y: Array, threshold: float | None, share: float | None, rising: bool | None, hold: int, interpolate: bool
) -> float:
    if threshold is None:
        if y[-1] == y[0]:
            return math.inf
        threshold = y[0] + share * (y[-1] - y[0])
        rising = bool(y[-1] > y[0])
    elif rising is None:
        rising = bool(y[-1] >= threshold)
    beyond = y >= threshold if rising else y <= threshold
    if len(y) < hold:
        return math.inf
    kept = np.flatnonzero(np.lib.stride_tricks.sliding_window_view(beyond, hold).all(1))
    if not len(kept):
        return math.inf
    i = int(kept[0])
    if i == 0 or not interpolate or beyond[i - 1]:
        return float(x[i])
    return float(x[i - 1] + (threshold - y[i - 1]) / (y[i] - y[i - 1]) * (x[i] - x[i - 1]))


@dataclass(frozen=True)
class Lead:
    """How much earlier one event comes than another, run by run.

    Attributes:
        median: of later minus earlier; infinite when the second never came in half of the runs.
        low, high: bootstrap interval of it, over runs.
        first_wins: share of the runs in which the order is known where the first came first; a tie counts half.
        p: two-sided sign test of that.
        unknown: runs in which neither came, or there was no telling.
        runs: each lead; NaN where unknown, infinite where only one of the two came.
    """

    median: float
    low: float
    high: float
    first_wins: float
    p: float
    unknown: int
    runs: tuple[float, ...] = field(repr=False)


def lead_time(
    first: Sequence[float] | Passage, second: Sequence[float] | Passage, *, level: float = 0.95, resamples: int = 1000,
    seed: int = 0,
) -> Lead:  # fmt: skip
    """By how much the first of two dates leads the second, over paired runs with censoring.

    Args:
        first, second: dates, one a run in the same order, infinite where the run ended before; or two `first_passage`.

    Raises:
        MeasureError: for different numbers of runs, or when neither event came in any.

    >>> found = lead_time([10, 20, 30, math.inf], [40, 60, math.inf, math.inf])
    >>> found.runs, found.median, found.unknown
    ((30.0, 40.0, inf, nan), 40.0, 1)
    """
    a, b = (np.asarray(one.runs if isinstance(one, Passage) else one, dtype=np.float64) for one in (first, second))
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise MeasureError(f"{a.shape} and {b.shape} dates; want one of each for every run")
    if np.isnan(a).any() or np.isnan(b).any():
        raise MeasureError("a date is NaN; give infinity for a run that ended before the event")
    with np.errstate(invalid="ignore"):
        leads = b - a  # inf - inf: neither came
    known = leads[~np.isnan(leads)]
    if not len(known):
        raise MeasureError(f"neither event came in any of {len(a)} runs; nothing can be said of their order")
    from scipy.stats import binomtest

    ahead, behind = int((known > 0).sum()), int((known < 0).sum())
    p = float(binomtest(ahead, ahead + behind).pvalue) if ahead + behind else 1.0
    low, high = median_interval(known, level, resamples, seed)
    wins = float((known > 0).mean() + 0.5 * (known == 0).mean())
    return Lead(_median(known), low, high, wins, p, int(np.isnan(leads).sum()), tuple(leads.tolist()))


@dataclass(frozen=True)
class Delay:
    """By how much one curve follows another.

    Attributes:
        at: shift of the second that brings their changes to the best agreement; positive when the second comes later.
            In units of x, or the factor in time on a log axis.
        correlation: of the two at that shift.
        p: share of curves with the spectrum of the second's changes and random phases that agree as well at their best.
            Two curves with one jump each agree at some shift whatever made them jump: only several events, or several
            runs (`lead_time`), tell that one follows the other.
        lags, correlations: the whole curve.
    """

    at: float
    correlation: float
    p: float
    lags: Array = field(repr=False)
    correlations: Array = field(repr=False)


def delay(
    x: Any, first: Any, second: Any, *, most: float = 0.5, axis: Axis = "linear", grid: int = 200,
    bandwidth: float = 0.02, permutations: int = 199, seed: int = 0,
) -> Delay:  # fmt: skip
    """By how much the changes of one curve follow those of another, by their cross-correlation.

    Both are put on an even grid, smoothed a little and differenced, so that a common trend does not count as agreement.

    Args:
        x, first, second: (points) each.
        most: largest shift that is tried, as a share of the range; at least half of the curves overlaps at 0.5.
        axis: delays in x, or as factors on log x.
        grid: points of the even grid.
        bandwidth: of `smooth`.
        permutations, seed: of the test.

    >>> x = np.linspace(0, 10, 101)
    >>> round(delay(x, np.tanh(2 * (x - 3)), np.tanh(2 * (x - 5))).at, 1)
    2.0
    """
    one = series(x, first, minimum=8, what="a delay", allow_constant=False)
    two = series(x, second, minimum=8, what="a delay", allow_constant=False)
    along = along_axis(one.x, axis)
    even = np.linspace(along[0], along[-1], grid)
    operator = smoother(even, bandwidth)
    a, b = (np.diff(operator @ np.interp(even, along, curve.y)) for curve in (one, two))
    reach = max(1, min(int(most * (grid - 1)), grid // 2))
    lags = np.arange(-reach, reach + 1)

    def agreement(b: Array) -> Array:
        return _cross_correlation(a, b, lags)

    correlations = agreement(b)
    i = int(correlations.argmax())
    shift = float(lags[i])
    if 0 < i < len(lags) - 1:
        left, middle, right = correlations[i - 1 : i + 2]
        bend = left - 2 * middle + right
        shift += float(0.5 * (left - right) / bend) if bend < 0 else 0.0
    rng = np.random.default_rng(seed)
    spectrum = np.abs(np.fft.rfft(b))
    phases = np.exp(2j * np.pi * rng.random((permutations, len(spectrum))))
    null = [agreement(one).max() for one in np.fft.irfft(spectrum * phases, len(b))]
    p = (1 + int((np.array(null) >= correlations[i] - 1e-12).sum())) / (1 + permutations)
    step = shift * (even[1] - even[0])
    at = float(np.exp(step)) if axis == "log" else float(step)
    return Delay(at, float(correlations[i]), p, lags * (even[1] - even[0]), correlations)


def _cross_correlation(a: Array, b: Array, lags: Array) -> Array:
    """Pearson's correlation of a[t] and b[t + lag] over the t that both have, (lags)."""
    n = len(a)
    together = np.correlate(b, a, "full")[lags + n - 1]
    start, stop = np.maximum(0, -lags), n - np.maximum(0, lags)  # of a; b is shifted by the lag
    count = stop - start

    def total(values: Array, low: Array, high: Array) -> Array:
        running = np.concatenate([[0.0], np.cumsum(values)])
        return running[high] - running[low]

    sa, saa = total(a, start, stop), total(a * a, start, stop)
    sb, sbb = total(b, start + lags, stop + lags), total(b * b, start + lags, stop + lags)
    va, vb = saa - sa**2 / count, sbb - sb**2 / count
    # What is left of a flat stretch by rounding is no change.
    flat = (va <= 1e-12 * float(a @ a)) | (vb <= 1e-12 * float(b @ b))
    return np.where(flat, 0.0, (together - sa * sb / count) / np.sqrt(np.where(flat, 1.0, va * vb)))


def _median(dates: Array) -> float:
    """The median; of two middle values of which one is infinite, that is infinite."""
    ordered = np.sort(dates)
    a, b = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
    return float(a) if a == b else float((a + b) / 2)


def median_interval(dates: Array, level: float, resamples: int, seed: int) -> tuple[float, float]:
    if len(dates) < 2 or not resamples:
        return math.nan, math.nan
    rng = np.random.default_rng(seed)
    medians = [_median(one) for one in dates[rng.integers(0, len(dates), (resamples, len(dates)))]]
    low, high = np.quantile(medians, [(1 - level) / 2, (1 + level) / 2], method="inverted_cdf")
    return float(low), float(high)
