"""A phase change of a curve: how long it stood still, how long the change took, and when it was.

A sigmoid is no phase change by itself: whatever is learned once has some shape of it. What is told here is the *ratio*
of the time of standing still to the time of the change.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from actome.core.errors import MeasureError
from actome.dynamics.dates import _median, first_passage, median_interval
from actome.dynamics.series import series
from actome.dynamics.smoothing import smoother
from actome.dynamics.turns import _still


@dataclass(frozen=True)
class PhaseChange:
    """The change of a curve from where it stood still longest to where it ends; medians over seeds.

    Attributes:
        at, low, high: when the curve is half way between the two levels, with a bootstrap interval of the median over
            seeds (NaN for a single run); infinite where (half of the seeds or more) did not change.
        plateau: how long the curve stood still before.
        transition: how long the change took, from the end of the plateau until the curve is near its last level.
        ratio: plateau / transition; what is called abrupt has a large one. A straight line has 0.25 or less.
        before, after: the two levels, means over the seeds that changed.
        censored: share of seeds without a change.
        runs: each seed's date; plateaus, transitions: each seed's, NaN without a change.
    """

    at: float
    low: float
    high: float
    plateau: float
    transition: float
    ratio: float
    before: float
    after: float
    censored: float
    runs: tuple[float, ...] = field(repr=False)
    plateaus: tuple[float, ...] = field(repr=False)
    transitions: tuple[float, ...] = field(repr=False)


def phase_change(
    x: Any, y: Any = None, *, tolerance: float = 0.1, least: float = 0.02, bandwidth: float = 0.0,
    least_change: float = 0.5, level: float = 0.95, resamples: int = 1000, seed: int = 0,
) -> PhaseChange:  # fmt: skip
    """Finds the phase change of a curve and says how abrupt it is.

    Each run by itself. The last level is the mean of the stretch at the end in which the curve moves by no more than
    `tolerance` of its range; the plateau is the longest such stretch whose level is `least_change` of the range or more
    away from it. The transition goes from the end of the plateau to the first point within the tolerance of the last
    level, so it is counted from about 10 to 90 percent; the date is the `first_passage` of the middle.

    Args:
        x, y: as everywhere; with several seeds each has its change.
        tolerance: as a share of the run's range. Noise of more than that breaks a plateau.
        least: how long the last stretch must be, as a share of the range of x; a run that still changes is censored.
        bandwidth: of `smooth`, applied first; 0 for none. A transition shorter than that is smoothed out.
        least_change: as a share of the run's range.
        level, resamples, seed: of the bootstrap over seeds.

    Raises:
        MeasureError: too few points, or a share outside 0 to 1.

    >>> steps = np.arange(0, 1001, 5.0)
    >>> found = phase_change(steps, 1 / (1 + np.exp(-(steps - 400) / 20)))
    >>> round(found.at), found.plateau, found.transition
    (400, 355.0, 90.0)
    >>> smooth = phase_change(steps, np.exp(-steps / 200))  # it falls from the start
    >>> round(smooth.ratio, 2)
    0.13

    Source: the ratio, as a caution, is ours. Phase changes of in-context learning: Olsson et al. 2022, In-context
    Learning and Induction Heads; Singh et al. 2024, What needs to go right for an induction head?; plateau and jump:
    Gopalani and Hu 2025, What Happens During the Loss Plateau?
    """
    for name, share in (("tolerance", tolerance), ("least", least), ("least_change", least_change)):
        if not 0 < share < 1:
            raise MeasureError(f"{name}={share}: a share between 0 and 1")
    curve = series(x, y, minimum=4, what="a phase change")
    values = curve.runs @ smoother(curve.x, bandwidth).T if bandwidth else curve.runs
    found = np.array([_of_run(curve.x, run, tolerance, least, least_change) for run in values])
    dates, waits, moves, befores, afters = found.T
    known = np.isfinite(dates)
    low, high = median_interval(dates, level, resamples, seed)

    def over_seeds(summary: Any, per_seed: np.ndarray) -> float:
        return float(summary(per_seed[known])) if known.any() else math.nan

    return PhaseChange(
        _median(dates), low, high, over_seeds(np.median, waits), over_seeds(np.median, moves),
        over_seeds(np.median, waits / moves), over_seeds(np.mean, befores), over_seeds(np.mean, afters),
        float((~known).mean()), tuple(dates.tolist()), tuple(waits.tolist()), tuple(moves.tolist()),
    )  # fmt: skip


def _of_run(
    x: np.ndarray, y: np.ndarray, tolerance: float, least: float, least_change: float
) -> tuple[float, float, float, float, float]:
    """Date, length of the plateau, length of the change, level before and after."""
    none = (math.inf, math.nan, math.nan, math.nan, math.nan)
    size = float(np.ptp(y))
    back = y[::-1]
    span = np.maximum.accumulate(back) - np.minimum.accumulate(back)
    last = int(np.searchsorted(span, tolerance * size * (1 + 1e-12), side="right")) - 1  # counted from the end
    if size == 0 or x[-1] - x[-1 - last] < least * (x[-1] - x[0]):
        return none
    after = float(y[len(y) - 1 - last :].mean())
    far = [
        (float(x[j] - x[i]), j, float(y[i : j + 1].mean()))
        for i, j in enumerate(end for _, end in _still(y, tolerance * size))
        if abs(y[i : j + 1].mean() - after) >= least_change * size
    ]
    if not far:
        return none
    wait, end, before = max(far, key=lambda one: one[0])
    rising = after > before
    near = after - tolerance * size if rising else after + tolerance * size

    def passes(threshold: float, interpolate: bool) -> float:
        return first_passage(x[end:], y[end:], threshold=threshold, rising=rising, interpolate=interpolate).at

    return passes((before + after) / 2, True), wait, passes(near, False) - float(x[end]), before, after
