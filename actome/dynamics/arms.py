"""Several arms of one experiment: how many steps each takes to a threshold, and how that compares, with censoring."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from actome.core.errors import MeasureError, nearest
from actome.dynamics.dates import Passage, _median, first_passage, median_interval

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class StepsRatio:
    """How many times as long one arm takes as another, run by run.

    Attributes:
        median, low, high: over runs, with a bootstrap interval; infinite where the arm did not get there, NaN when
            neither did in any run.
        runs: each; 0 where only the other arm did not get there, NaN where neither did.
        at_least: each run's least possible ratio: for an arm that did not get there, the last step that it was seen at
            over the other's date. 0 where the other's date is not known.
        faster: share of the runs with a known ratio that is below 1; a tie counts half.
    """

    median: float
    low: float
    high: float
    faster: float
    runs: tuple[float, ...] = field(repr=False)
    at_least: tuple[float, ...] = field(repr=False)


@dataclass(frozen=True)
class StepsTo:
    """What `steps_to` found.

    Attributes:
        threshold: that was passed.
        arms: for each its `Passage`; a run that ended before is censored.
        ends: for each arm the last step of each run.
    """

    threshold: float
    arms: dict[str, Passage]
    ends: dict[str, tuple[float, ...]] = field(repr=False)

    def ratio(self, arm: str, to: str, *, level: float = 0.95, resamples: int = 1000, seed: int = 0) -> StepsRatio:
        """How many times as long `arm` takes as `to`, over runs paired by their order.

        Raises:
            MeasureError: an arm that there is not, or different numbers of runs.
        """
        for name in (arm, to):
            if name not in self.arms:
                raise MeasureError(f"there is no arm {name!r}{nearest(name, list(self.arms))}")
        a, b = (np.array(self.arms[name].runs) for name in (arm, to))
        if len(a) != len(b):
            raise MeasureError(f"{arm} has {len(a)} runs and {to} {len(b)}; a ratio is over pairs of runs")
        with np.errstate(invalid="ignore", divide="ignore"):
            runs = np.where(np.isinf(b), np.where(np.isinf(a), np.nan, 0.0), a / b)
            seen = np.where(np.isinf(a), np.array(self.ends[arm]), a)
            at_least = np.where(np.isinf(b), 0.0, seen / b)
        known = runs[~np.isnan(runs)]
        if not len(known):
            return StepsRatio(math.nan, math.nan, math.nan, math.nan, tuple(runs.tolist()), tuple(at_least.tolist()))
        low, high = median_interval(known, level, resamples, seed)
        faster = float((known < 1).mean() + 0.5 * (known == 1).mean())
        return StepsRatio(_median(known), low, high, faster, tuple(runs.tolist()), tuple(at_least.tolist()))

    def table(self) -> pd.DataFrame:
        """One row for each arm and run: arm, run, steps (infinite when censored), last."""
        import pandas as pd

        rows = [
            {"arm": name, "run": i, "steps": steps, "last": last}
            for name, one in self.arms.items()
            for i, (steps, last) in enumerate(zip(one.runs, self.ends[name], strict=True))
        ]
        return pd.DataFrame(rows)


def steps_to(
    arms: Mapping[str, Sequence[tuple[Any, Any]]], threshold: float, *, rising: bool = True, hold: int = 1,
    level: float = 0.95, resamples: int = 1000, seed: int = 0,
) -> StepsTo:  # fmt: skip
    """How many steps each arm of an experiment takes to a threshold.

    A run that ends before it gets there is *censored*: its date is infinite, medians stay right, and what is known is
    that it takes longer than its last step. Runs may be of different lengths, such as when training stopped early.

    Args:
        arms: by name, the runs of each as (steps, values); the i-th runs of all arms are paired (same seed).
        threshold: of the values.
        rising: whether it is passed upwards.
        hold: points in a row that must be beyond it.
        level, resamples, seed: of the bootstrap of each arm's median over runs.

    Raises:
        MeasureError: no arm, or an arm without runs.

    >>> steps = np.arange(101.0)
    >>> found = steps_to({"plain": [(steps, steps / 80)], "boosted": [(steps, steps / 20)]}, 0.9)
    >>> round(found.arms["plain"].at, 3), round(found.ratio("boosted", to="plain").median, 3)
    (72.0, 0.25)
    """
    if not arms:
        raise MeasureError("there are no arms; give {name: [(steps, values), ...]}")
    found, ends = {}, {}
    for name, runs in arms.items():
        if not len(runs):
            raise MeasureError(f"the arm {name!r} has no runs")
        passages = [first_passage(x, y, threshold=threshold, rising=rising, hold=hold, resamples=0) for x, y in runs]
        dates = np.array([one.at for one in passages])
        ends[name] = tuple(one.last for one in passages)
        low, high = median_interval(dates, level, resamples, seed)
        found[name] = Passage(
            _median(dates), low, high, tuple(dates.tolist()), float(np.isinf(dates).mean()), max(ends[name])
        )
    return StepsTo(float(threshold), found, ends)
