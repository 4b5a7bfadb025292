"""Memorisation: what was seen in training is predicted better than what was not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

from actome.core.errors import MeasureError

from .base import Alarm, Detector, Level, Reading
from .history import Best, Track


class MemorisationOnset(Detector):
    """The loss on rows that were trained on falls away from the loss on rows like them that were not.

    It needs two readings: ``loss_seen``, on fixed rows that are in the training data, and ``loss_heldout``, on rows
    from the same source that are not. Nothing else can tell memorising from learning: a training loss that falls is
    what both look like. Log them under these names, or give a watch both texts.

    The gap, held-out minus seen, is compared with what it was at the first samples, so that a difference in difficulty
    between the two sets of rows does not count. A ``warning`` when it has widened by `share` of the held-out loss and
    by `z` times its own scatter at `hold` samples in a row; ``critical`` when besides the held-out loss has risen by
    `share` above its lowest, which is the point from which on training does harm.

    Args:
        share: of the held-out loss.
        z: times the scatter of the gap from sample to sample.
        hold: samples in a row.
        first: samples that the first gap is the median of.
        seen, heldout: names of the readings.

    Delay: `hold` samples after the gap has reached `share`.

    Source: Memorization Without Overfitting; Scaling Laws and Interpretability of Learning from Repeated Data.

    >>> onset = MemorisationOnset()
    >>> for step in range(0, 100, 10):                              # from step 50 on only what was seen gets better
    ...     heldout = max(2.0, 3.0 - step / 50)
    ...     told = onset.update(step, [Reading("loss_heldout", heldout), Reading("loss_seen", 3.0 - step / 50)])
    ...     if told:
    ...         break
    >>> step, told[0].step, told[0].level
    (90, 70, 'warning')
    """

    name: ClassVar[str] = "memorisation_onset"
    needs: ClassVar[tuple[str, ...]] = ("loss_seen", "loss_heldout")

    def __init__(
        self, share: float = 0.1, z: float = 4.0, hold: int = 3, first: int = 3, *, seen: str = "loss_seen",
        heldout: str = "loss_heldout",
    ):  # fmt: skip
        if not share > 0 or z < 0 or hold < 1 or first < 1:
            raise MeasureError(f"share={share}, z={z}, hold={hold}, first={first}: want above 0, 0, 1 and 1 or more")
        self.share, self.z, self.hold = share, z, hold
        self.seen, self.heldout = seen, heldout
        self.needs = (seen, heldout)  # type: ignore[misc]
        self._first, self._gaps, self._losses = Track(first), Track(32), Track(hold)
        self._size = first
        self._best = Best()

    def update(self, step: int, readings: Sequence[Reading]) -> list[Alarm] | None:
        read = {one.measure: one.value for one in readings if math.isfinite(one.value)}
        if self.seen not in read or self.heldout not in read:
            return None
        heldout, gap = read[self.heldout], read[self.heldout] - read[self.seen]
        if len(self._first) < self._size:
            self._first.add(step, gap)
        self._gaps.add(step, gap)
        self._losses.add(step, heldout)
        self._best.add(step, heldout)
        if len(self._gaps) < max(self._size, 4):
            return None
        start = sorted(self._first.values)[len(self._first) // 2]
        widened = [one - start for one in self._gaps.last(self.hold)]
        # Scatter about the trend, from second differences, which a steady widening leaves at zero.
        gaps = list(self._gaps.values)
        bends = sorted(abs(a - 2 * b + c) for a, b, c in zip(gaps, gaps[1:], gaps[2:], strict=False))
        noise = 1.4826 * bends[len(bends) // 2] / math.sqrt(6)
        if min(widened) < max(self.share * abs(heldout), self.z * noise):
            return []
        lowest = self._best.value
        harm = min(self._losses.values) > (1 + self.share) * lowest
        level: Level = "critical" if harm else "warning"
        rise = f", and {self.heldout} has risen to {heldout:.4g} from {lowest:.4g} at step {self._best.step}"
        began = list(self._gaps.steps)[-self.hold]
        return [
            Alarm(
                began, self.name,
                f"{self.seen} is {read[self.seen]:.4g} and {self.heldout} {heldout:.4g}: the gap has widened from "
                f"{start:.3g} to {gap:.3g}{rise if harm else ''}", level=level,
                advice="data repeat: shuffle in fresh data, drop duplicates, or end the training"
                + (f" at the checkpoint near step {self._best.step}" if harm else "")
                + "; weight decay and dropout delay it",
                evidence={"seen": read[self.seen], "heldout": heldout, "gap": gap, "first_gap": start,
                          "lowest_heldout": lowest, "lowest_step": self._best.step},
                source="Scaling Laws and Interpretability of Learning from Repeated Data",
            )
        ]  # fmt: skip

    def rewind(self, step: int) -> None:
        for one in (self._first, self._gaps, self._losses, self._best):
            one.rewind(step)
