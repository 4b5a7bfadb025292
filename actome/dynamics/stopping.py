"""Stopping a training run once it is not going to get better than the best so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from actome.core.errors import MeasureError
from actome.dynamics.extrapolation import Goal, extrapolate_curve
from actome.dynamics.forecast import Forecast

Array = np.ndarray


@dataclass(frozen=True)
class PredictedStop:
    """Whether to stop a run, and why.

    Attributes:
        stop: whether `chance` is below the threshold.
        chance: the largest chance, over the later steps, that the value of that step beats the best.
        at: that step, counted from 1.
        forecast: of all later steps.

    The chance that *any* later step beats the best lies between `chance` and the sum over steps: a forecast of single
    steps does not say how they go together. Learning curves rise, so that it is mostly near `chance`, but noise that is
    drawn anew at each step adds to it.
    """

    stop: bool
    chance: float
    at: int
    forecast: Forecast = field(repr=False)

    def __bool__(self) -> bool:
        return self.stop


def predictive_stop(
    curve: Any, best: float, delta: float = 0.05, *, length: int, goal: Goal = "max", **how: Any
) -> PredictedStop:
    """Whether a run may be stopped: the chance that any one later value beats the best is below `delta`.

    Args:
        curve: the run's values so far, (points).
        best: the value to beat, of this run or of earlier ones.
        delta: the chance below which it is not worth going on.
        length: how many values the whole run would have.
        goal: ``"max"`` or ``"min"``, as in `extrapolate_curve`.
        how: `method`, `bounds`, `pfn` and `ensemble` of `extrapolate_curve`.

    Raises:
        MeasureError: a `delta` that is no chance, a `best` that is not finite, a run that is at its end, or what
            `extrapolate_curve` refuses.

    Source: Efficient Bayesian Learning Curve Extrapolation using Prior-Data Fitted Networks (early stopping).

    >>> curve = 0.6 - 0.5 * np.arange(1.0, 16.0) ** -1.5
    >>> bool(predictive_stop(curve, best=0.9, length=50)), bool(predictive_stop(curve, best=0.58, length=50))
    (True, False)
    """
    if not 0 < delta < 1 or not np.isfinite(best):
        raise MeasureError(f"delta={delta}, best={best}: want a chance between 0 and 1 and a finite value")
    if length <= len(curve):
        raise MeasureError(f"the curve has {len(curve)} of {length} points; nothing is left to stop")
    forecast = extrapolate_curve(curve, length - len(curve), goal=goal, **how)
    below = forecast.cdf(best)
    chances = 1 - below if goal == "max" else below
    at = int(chances.argmax())
    chance = float(chances[at])
    return PredictedStop(chance < delta, chance, len(curve) + at + 1, forecast)


@dataclass(frozen=True)
class StoppedRuns:
    """What a series of runs would have cost and found with predictive stopping.

    Attributes:
        steps: how many steps each run went, (runs).
        saved: share of all steps saved.
        best: value found, and `best_of_all`, that of running all of them to the end.
        regret: how much worse `best` is, 0 or more.
    """

    steps: tuple[int, ...]
    saved: float
    best: float
    best_of_all: float
    regret: float


def stop_runs(
    curves: Sequence[Any], delta: float = 0.05, *, goal: Goal = "max", first: int = 5, every: int = 1, **how: Any
) -> StoppedRuns:
    """Plays a series of runs, one after the other, each stopped by what was known at the time.

    The value to beat is the best of all runs so far, this one included; a run is asked about after `first` values, and
    then after every `every`.

    Args:
        curves: whole runs in the order in which they were made, (points) each.
        delta, goal, how: as in `predictive_stop`.

    >>> runs = [0.8 - 0.6 * np.arange(1.0, 31.0) ** -0.8, 0.5 - 0.4 * np.arange(1.0, 31.0) ** -1.0]
    >>> played = stop_runs(runs)
    >>> played.steps[1] < 30, played.regret < 0.01
    (True, True)
    """
    if not len(curves) or first < 2 or every < 1:
        raise MeasureError(f"{len(curves)} runs, first={first}, every={every}: want 1, 2 and 1 or more")
    sign, best, steps = (1.0 if goal == "max" else -1.0), -np.inf, []
    for curve in curves:
        values = np.asarray(curve, dtype=np.float64)
        length = went = len(values)
        for seen in range(first, length, every):
            here = max(best, float((sign * values[:seen]).max()))
            if predictive_stop(values[:seen], sign * here, delta, length=length, goal=goal, **how):
                went = seen
                break
        best = max(best, float((sign * values[:went]).max()))
        steps.append(went)
    top = max(float((sign * np.asarray(curve)).max()) for curve in curves)
    total = sum(len(curve) for curve in curves)
    return StoppedRuns(tuple(steps), 1 - sum(steps) / total, sign * best, sign * top, top - best)
