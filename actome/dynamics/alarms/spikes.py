"""Spikes: of the loss, and of the gradient or update before it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

from actome.core.errors import MeasureError

from .base import Alarm, Detector, Reading
from .history import Track, Window

_RECENT = 16  # values that a new one is compared with
# Median of the difference of two independent standard normal values.
_NEIGHBOURS = 0.6745 * math.sqrt(2)
_SPIKES = "Spike No More: Stabilizing the Pre-training of Large Language Models"


class _Burst:
    """Values in a row far above the median of those just before, which they do not enter.

    Noise is told by how much neighbouring values differ, so that a trend does not count as noise.
    """

    def __init__(self, window: int, z: float, hold: int):
        self.recent, self.moves = Window(_RECENT), Window(window)
        self.least, self.z, self.hold = window // 2, z, hold
        self.above = Track(_RECENT)  # the values of the burst so far

    @property
    def usual(self) -> float:
        """The median just before; NaN where there is none yet."""
        return self.recent.median if len(self.recent) else math.nan

    @property
    def spread(self) -> float:
        """Standard deviation of normal noise whose neighbours differ by as much."""
        return self.moves.median / _NEIGHBOURS if len(self.moves) else 0.0

    def add(self, step: int, value: float, rise: float) -> bool | None:
        """Whether a burst holds; None where too little was seen to tell."""
        if len(self.moves) < self.least:
            self._take(step, value)
            return None
        excess = value - self.usual
        if excess <= self.z * self.spread or excess <= rise:
            self._take(step, value)
            self.above.rewind(-1)
            return False
        self.above.add(step, value)
        if len(self.above) == _RECENT:  # no burst but a new level, from which the next one has to stand out
            for one in zip(self.above.steps, self.above.values, strict=True):
                self.recent.add(*one)
            self.above.rewind(-1)
        return len(self.above) >= self.hold

    def _take(self, step: int, value: float) -> None:
        if len(self.recent):
            self.moves.add(step, abs(value - self.recent.last))
        self.recent.add(step, value)

    def rewind(self, step: int) -> None:
        for one in (self.recent, self.moves, self.above):
            one.rewind(step)


class LossSpike(Detector):
    """The loss leaps above its running median and stays there for some steps.

    A step is above when it exceeds the median of the 16 losses before by `z` robust standard deviations of the noise
    (by how much neighbouring losses differ, the median of the last `window`) and by a share `rise`. One step alone may
    be an odd batch.

    Args:
        window: losses that tell the noise; half of them have to be there.
        z, rise: how far above.
        hold: steps in a row.

    Delay: `hold` steps. Of 20 runs of 2000 independent losses none raised it, with normal noise and with that of
    Student's t with three degrees of freedom (`tests/test_alarms_rates.py`).

    >>> spike = LossSpike()
    >>> noise = [0.02 * ((37 * step) % 11 - 5) for step in range(100)]
    >>> all(not spike.update(step, [Reading("loss", 3 + one)]) for step, one in enumerate(noise))
    True
    >>> spike.update(100, [Reading("loss", 5.0)])                   # an odd batch, perhaps
    []
    >>> [told.step for told in spike.update(101, [Reading("loss", 5.2)])]
    [100]
    """

    name: ClassVar[str] = "loss_spike"
    needs: ClassVar[tuple[str, ...]] = ("loss",)

    def __init__(self, window: int = 64, z: float = 8.0, hold: int = 2, rise: float = 0.1):
        if window < 16 or z <= 0 or hold < 1 or rise < 0:
            raise MeasureError(f"window={window}, z={z}, hold={hold}, rise={rise}: want 16, above 0, 1 and 0, or more")
        self.rise = rise
        self._burst = _Burst(window, z, hold)

    def update(self, step: int, readings: Sequence[Reading]) -> list[Alarm] | None:
        value = total(readings, "loss")
        if value is None:
            return None
        burst = self._burst
        median, spread = burst.usual, burst.spread
        holds = burst.add(step, value, self.rise * abs(median))
        if holds is None:
            return None
        if not holds:
            return []
        began, peak = burst.above.steps[0], max(burst.above.values)
        z = (value - median) / spread if spread > 0 else None
        return [
            Alarm(
                began, self.name, f"the loss leapt from {median:.4g} to {peak:.4g} at step {began}", level="warning",
                advice="if it does not come back, go back to a checkpoint before this step and skip its batches, or "
                "lower the learning rate; a smaller beta2, clipping and a longer warm-up make spikes rarer",
                evidence={"median": median, "peak": peak, "z": z}, source=_SPIKES,
            )
        ]  # fmt: skip

    def rewind(self, step: int) -> None:
        self._burst.rewind(step)


class SpikePrecursor(Detector):
    """The gradient or the update of the whole model is a multiple of what it was, while the loss may still look well.

    Looked at in logarithms, as `LossSpike` looks at the loss: `z` robust standard deviations and a factor `factor`
    above the median, `hold` steps in a row. The place is the component whose own norm has grown most against its median
    of the samples so far; it is known once components were sampled eight times.

    Args:
        window, z, hold: as for `LossSpike`.
        factor: how many times the median.

    Delay: `hold` steps.
    """

    name: ClassVar[str] = "spike_precursor"
    needs: ClassVar[tuple[str, ...]] = ("grad_norm", "update_ratio")

    def __init__(self, window: int = 64, z: float = 8.0, factor: float = 8.0, hold: int = 3):
        if window < 16 or z <= 0 or factor <= 1 or hold < 1:
            raise MeasureError(f"window={window}, z={z}, factor={factor}, hold={hold}: want 16, above 0, above 1, 1")
        self.window, self.rise = window, math.log(factor)
        self._totals = {name: _Burst(window, z, hold) for name in self.needs}
        self._parts: dict[tuple[str, str], Window] = {}
        self._latest: dict[tuple[str, str], tuple[int, float]] = {}

    def update(self, step: int, readings: Sequence[Reading]) -> list[Alarm] | None:
        for one in readings:
            if one.site is not None and one.value > 0 and math.isfinite(one.value):
                key = one.measure, one.site
                if key in self._latest:  # the newest sample is not among those it is compared with
                    self._parts.setdefault(key, Window(self.window)).add(*self._latest[key])
                self._latest[key] = step, math.log(one.value)
        judged, found = False, []
        for name, burst in self._totals.items():
            value = total(readings, name)
            if value is None or value <= 0:
                continue
            usual = burst.usual
            holds = burst.add(step, math.log(value), self.rise)
            judged = judged or holds is not None
            if holds:
                found.append(self._alarm(burst.above.steps[0], name, math.exp(usual), value))
        return found[:1] if judged else None

    def rewind(self, step: int) -> None:
        for burst in self._totals.values():
            burst.rewind(step)
        for window in self._parts.values():
            window.rewind(step)
        self._latest = {key: one for key, one in self._latest.items() if one[0] < step}

    def _alarm(self, step: int, name: str, usual: float, value: float) -> Alarm:
        grown = {
            site: math.exp(self._latest[name, site][1] - window.median)
            for (measure, site), window in self._parts.items()
            if measure == name and len(window) >= 8 and (name, site) in self._latest
        }
        site = max(grown, key=grown.__getitem__, default=None)
        if site is not None and grown[site] < 2:  # sampled before it began: no place to name
            site = None
        where = f", most of all at {site} ({grown[site]:.3g} times)" if site is not None else ""
        evidence = {"measure": name, "usual": usual, "value": value}
        if site is not None:
            evidence["times"] = grown[site]
        return Alarm(
            step, self.name, f"{name} is {value:.4g}, {value / usual:.3g} times what it was{where}", site, "warning",
            "clip the gradient, or skip the batch if it is odd; when the loss follows, lower the learning rate or "
            "beta2",
            evidence, _SPIKES,
        )  # fmt: skip


def total(readings: Sequence[Reading], measure: str) -> float | None:
    """The finite reading of the model as a whole, if there is one."""
    for one in readings:
        if one.measure == measure and one.site is None and math.isfinite(one.value):
            return one.value
    return None
