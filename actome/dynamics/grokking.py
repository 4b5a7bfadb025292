"""Grokking: by what factor in time generalisation comes after fitting, and what changed in between."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from actome.core.errors import MeasureError
from actome.dynamics.dates import Passage, first_passage, lead_time
from actome.dynamics.series import series

Array = np.ndarray


@dataclass(frozen=True)
class Grokking:
    """How long generalisation took, in times of fitting.

    Attributes:
        delay: date on the test divided by date on the training set, the median over seeds; about 1 without grokking,
            infinite when half of the seeds had not generalised at the end.
        low, high: bootstrap interval of it over seeds; NaN for a single run.
        censored: share of seeds (of those that fitted) that had not generalised at the end. Their delay is infinite
            here; all that is known is that it exceeds `least`.
        unknown: seeds that did not even fit, of which nothing is said.
        runs: each seed's delay; NaN where unknown.
        least: of each seed, last step / date on the training set: the delay that could have been seen.
        train, test: the dates.
    """

    delay: float
    low: float
    high: float
    censored: float
    unknown: int
    runs: tuple[float, ...] = field(repr=False)
    least: tuple[float, ...] = field(repr=False)
    train: Passage = field(repr=False)
    test: Passage = field(repr=False)

    def between(self, x: Any, curve: Any) -> Array:
        """When a quantity made its way: before fitting, from there to generalising, and after; (seeds, 3).

        Shares of the way from the first value to the last, so each row adds up to 1 (NaN for a seed that did not fit);
        of feature alignment, say, or of the `lazy_rich_index`. In a transition from lazy to rich the first is small:
        the training set was fitted with the features that were there.

        Args:
            x, curve: as given to `grokking_delay`: (points) and (seeds, points).

        Raises:
            MeasureError: another number of seeds, or a quantity that ends where it began.
        """
        found = series(x, curve, minimum=2, what="a quantity between two dates")
        if len(found.runs) != len(self.runs):
            raise MeasureError(f"{len(found.runs)} curves for {len(self.runs)} seeds; give one a seed")
        rows = []
        for run, fitted, generalised in zip(found.runs, self.train.runs, self.test.runs, strict=True):
            way = run[-1] - run[0]
            if way == 0:
                raise MeasureError("the quantity ends where it began, so there is no way to share out")
            if math.isinf(fitted):
                rows.append([math.nan] * 3)
                continue
            at = [np.interp(min(date, found.x[-1]), found.x, run) for date in (fitted, max(fitted, generalised))]
            rows.append([(at[0] - run[0]) / way, (at[1] - at[0]) / way, (run[-1] - at[1]) / way])
        return np.array(rows)


def grokking_delay(
    train_curve: Any, test_curve: Any, thr: float = 0.1, *, x: Any = None, relative: bool = True, rising: bool = False,
    hold: int = 1, level: float = 0.95, resamples: int = 1000, seed: int = 0,
) -> Grokking:  # fmt: skip
    """How much later the error on the test falls below a level than that on the training set, as a factor.

    A factor, because learning curves are read on a log axis of time, and because it does not change with the learning
    rate. Compare runs at a learning rate that fits their scale (`actome.tune.OutputScale`), or a slow run passes for
    one that groks.

    Args:
        train_curve, test_curve: errors, (points) of a run or (seeds, points).
        thr: the level, of the error relative to its first value (or as it is).
        x: steps of the points; 0, 1, 2 ... by default.
        relative: divide each curve by its own first value. Losses of different sets cannot be read off as they are.
        rising: for accuracies, which rise past `thr`; then not relative.
        hold: points in a row that must be beyond the level.
        level, resamples, seed: of the bootstrap over seeds.

    Returns:
        A `Grokking`. A run that did not generalise is censored and counts as infinite; one that did not fit is unknown.

    Raises:
        MeasureError: curves of different shapes, no run that fitted, or one that was fitted at its first point already.

    Source: Kumar et al. 2024, Grokking as the Transition from Lazy to Rich Training Dynamics; the dates as in
    `first_passage`.

    >>> steps = np.arange(1, 1001)
    >>> found = grokking_delay(np.exp(-steps / 20), np.exp(-steps / 200), x=steps)
    >>> round(found.delay, 1), found.censored
    (9.8, 0.0)
    """
    pair = [np.atleast_2d(np.asarray(one, dtype=np.float64)) for one in (train_curve, test_curve)]
    if pair[0].shape != pair[1].shape or pair[0].ndim != 2:
        raise MeasureError(f"curves of {pair[0].shape} and {pair[1].shape}; want (seeds, points) of the same runs")
    steps = np.arange(pair[0].shape[1], dtype=np.float64) if x is None else np.asarray(x, dtype=np.float64)
    if steps.shape != pair[0].shape[1:] or not (np.diff(steps) > 0).all():
        raise MeasureError(f"x of shape {steps.shape} for {pair[0].shape[1]} points; want rising steps, one a point")
    if relative and not rising:
        if any((one[:, 0] <= 0).any() for one in pair):
            raise MeasureError("a curve begins at zero or below, so nothing is relative to that; give relative=False")
        pair = [one / one[:, :1] for one in pair]
    train, test = (first_passage(steps, one, threshold=thr, rising=rising, hold=hold) for one in pair)
    dates = np.array(train.runs), np.array(test.runs)
    if (dates[0] <= 0).any():
        raise MeasureError(
            "a run had fitted at step 0 already, so a factor in time has no meaning; give steps from 1 on, or a "
            f"stricter level than thr={thr}"
        )
    fitted = np.isfinite(dates[0])
    if not fitted.any():
        raise MeasureError(f"none of {len(fitted)} runs came to {thr} on the training set; train longer")
    logs = [np.log(one) for one in dates]
    # Of a run that did not fit nothing is known, even if its test error fell.
    logs[1] = np.where(fitted, logs[1], np.inf)
    lead = lead_time(*logs, level=level, resamples=resamples, seed=seed)
    runs = np.exp(np.array(lead.runs))
    return Grokking(
        delay=math.exp(lead.median),
        low=math.exp(lead.low),
        high=math.exp(lead.high),
        censored=float(np.isinf(runs[fitted]).mean()),
        unknown=int((~fitted).sum()),
        runs=tuple(runs.tolist()),
        least=tuple(np.where(fitted, steps[-1] / dates[0], np.nan).tolist()),
        train=train,
        test=test,
    )
