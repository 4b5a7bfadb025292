"""Units that did something and then nothing any more."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, ClassVar

from actome.core.errors import MeasureError

from .base import Alarm, Detector, Level, Reading
from .history import Best, Track
from .places import in_forward_order

_NAMED = 32


class DyingUnits(Detector):
    """Units that were alive at several samples and then dead at each of the last ones.

    From the share of dead units (`DeadUnits`, value ``dead``), against the lowest share that held for `settled`
    samples; where the peaks of single units were logged (value ``peak``), the units are named. In the first steps of a
    healthy training with ReLU a tenth of a site's units may look dead and come back, and later a few die: that is told
    as ``info``; from `warn` of a site's units on it is a ``warning``, from `critical` on ``critical``. Units that were
    never alive are no news.

    Args:
        hold: samples in a row at which a unit has to be dead. A unit that opens rarely looks dead on a short probe.
        settled: samples at which a unit has to have been alive before.
        warn, critical: shares of a site's units that died.
        threshold: of `DeadUnits`, for single units: a peak of at most this, in units of the site's rms, is dead.

    Delay: `hold` samples after the death.

    Source: Neurons in Large Language Models: Dead, N-gram, Positional (what dead means).

    >>> dying = DyingUnits()
    >>> site = "blocks.0.mlp.act"
    >>> def peaks(step):                                            # unit 1 dies at step 30
    ...     return [Reading("peak", 2.0, site, 0, unit=0), Reading("peak", 0.0 if step >= 30 else 1.0, site, 0, unit=1)]
    >>> told = [one for step in range(0, 70, 10) for one in dying.update(step, peaks(step))]
    >>> told[0].step, told[0].evidence["units"], told[0].level
    (30, [1], 'critical')
    """

    name: ClassVar[str] = "dying_units"
    needs: ClassVar[tuple[str, ...]] = ("dead", "peak")

    def __init__(
        self, hold: int = 3, settled: int = 3, warn: float = 0.25, critical: float = 0.5, threshold: float = 1e-3
    ):
        if hold < 1 or settled < 1 or not 0 < warn <= critical <= 1 or threshold < 0:
            raise MeasureError(
                f"hold={hold}, settled={settled}, warn={warn}, critical={critical}, threshold={threshold}: want 1 or "
                "more samples, 0 < warn <= critical <= 1 and a threshold of 0 or more"
            )
        self.hold, self.settled, self.warn, self.critical, self.threshold = hold, settled, warn, critical, threshold
        self._shares: dict[str, Track] = {}
        self._least: dict[str, Best] = {}
        self._alive: dict[str, dict[int, tuple[int, ...]]] = {}  # the first steps at which a unit was seen alive
        self._dead: dict[str, deque[tuple[int, frozenset[int]]]] = {}

    def update(self, step: int, readings: Sequence[Reading]) -> list[Alarm] | None:
        peaks: dict[str, dict[int, float]] = {}
        shares: dict[str, float] = {}
        for one in readings:
            if one.site is None:
                continue
            if one.measure == "peak" and one.unit is not None:
                peaks.setdefault(one.site, {})[one.unit] = one.value
            elif one.measure == "dead" and one.value == one.value:
                shares[one.site] = one.value
        if not peaks and not shares:
            return None
        found = []
        for site in in_forward_order([*peaks, *shares]):
            alarm = self._units(step, site, peaks[site]) if site in peaks else self._share(step, site, shares[site])
            if alarm is not None:
                found.append(alarm)
        return found

    def rewind(self, step: int) -> None:
        for tracks in (self._shares, self._least):
            for one in tracks.values():
                one.rewind(step)
        for site, alive in self._alive.items():
            self._alive[site] = {unit: tuple(at for at in steps if at < step) for unit, steps in alive.items()}
        for dead in self._dead.values():
            while dead and dead[-1][0] >= step:
                dead.pop()

    def _units(self, step: int, site: str, peaks: dict[int, float]) -> Alarm | None:
        dead = frozenset(unit for unit, peak in peaks.items() if peak <= self.threshold)
        alive = self._alive.setdefault(site, {})
        for unit, peak in peaks.items():
            seen = alive.get(unit, ())
            if peak > self.threshold and len(seen) < self.settled:
                alive[unit] = (*seen, step)
        kept = self._dead.setdefault(site, deque(maxlen=self.hold))
        kept.append((step, dead))
        if len(kept) < self.hold:
            return None
        both = frozenset.intersection(*(units for _, units in kept))
        gone = sorted(unit for unit in both if len(alive.get(unit, ())) == self.settled)
        if not gone:
            return None
        return self._alarm(kept[0][0], site, len(gone) / len(peaks), len(peaks), gone)

    def _share(self, step: int, site: str, share: float) -> Alarm | None:
        track = self._shares.setdefault(site, Track(max(self.hold, self.settled)))
        least = self._least.setdefault(site, Best())
        track.add(step, share)
        last = track.last(self.hold)
        risen = min(last) - least.value if len(last) == self.hold and least.step is not None else 0.0
        if len(track) >= self.settled:
            least.add(step, max(track.last(self.settled)))
        return self._alarm(track.steps[-self.hold], site, risen, None, []) if risen > 0 else None

    def _alarm(self, step: int, site: str, share: float, width: int | None, units: list[int]) -> Alarm:
        level: Level = "critical" if share >= self.critical else "warning" if share >= self.warn else "info"
        evidence: dict[str, Any] = {"share_died": share}
        if units:
            listed = ", ".join(map(str, units[:8])) + (", ..." if len(units) > 8 else "")
            what = f"{len(units)} of {width} units died at {site} (unit{'s' if len(units) > 1 else ''} {listed})"
            evidence |= {"died": len(units), "units": units[:_NAMED]}
        else:
            what = f"{share:.2%} of the units at {site} died"
        return Alarm(
            step, self.name, f"{what}, seen dead from step {step} on", site, level,
            "lower the learning rate or lengthen the warm-up; look for biases that were driven far below zero, and for "
            "a loss spike before; dead units do not come back by themselves: set them up anew or use a smoother "
            "activation",
            evidence, "Neurons in Large Language Models: Dead, N-gram, Positional", degree=share,
        )  # fmt: skip
