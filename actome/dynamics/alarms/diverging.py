"""A loss that goes back up: a learning rate that is too high."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

from actome.core.errors import MeasureError

from .base import Alarm, Detector, Reading
from .history import Best, Track, Window
from .spikes import total


class LossDivergence(Detector):
    """The loss has lost what it had gained, or never gained anything and lies above where it began.

    Looked at is the median of the last `window` losses, against the best such median so far and the median of the first
    `first` losses. A ``warning`` when more than `share` of the gain is lost, ``critical`` when the loss is above its
    start; in either case by more than `z` standard errors of the median and two percent of the loss. Typical of a
    learning rate that is too high, or of a spike that does not come back.

    Args:
        window: losses that a median is taken of.
        first: losses that the start is the median of.
        share: of the gain.
        z: in standard errors of the median, of the spread of the losses within the window.

    Delay: about `window` steps after the loss has gone up.

    >>> diverging = LossDivergence(window=8)
    >>> losses = [3.5] * 4 + [3.5 - 0.02 * step for step in range(50)] + [3.4] * 8
    >>> told = [one for step, loss in enumerate(losses) for one in diverging.update(step, [Reading("loss", loss)]) or []]
    >>> told[0].level, told[0].step
    ('warning', 59)
    """

    name: ClassVar[str] = "loss_divergence"
    needs: ClassVar[tuple[str, ...]] = ("loss",)

    def __init__(self, window: int = 16, first: int = 4, share: float = 0.5, z: float = 4.0):
        if window < 4 or first < 1 or not 0 < share <= 1 or z < 0:
            raise MeasureError(f"window={window}, first={first}, share={share}, z={z}: want 4, 1, a share, and 0")
        self.window, self.share, self.z = window, share, z
        self._start = Track(first)
        self._first = first
        self._recent = Window(window)
        self._best = Best()

    def update(self, step: int, readings: Sequence[Reading]) -> list[Alarm] | None:
        value = total(readings, "loss")
        if value is None:
            return None
        if len(self._start) < self._first:
            self._start.add(step, value)
        self._recent.add(step, value)
        if not self._recent.full or len(self._start) < self._first:
            return None
        median, spread = self._recent.median, self._recent.spread
        start = sorted(self._start.values)[self._first // 2]
        self._best.add(step, median)
        best = self._best.value
        noise = self.z * spread / math.sqrt(self.window)
        lost, gain = median - best, start - best
        if median - start > max(noise, 0.02 * abs(start)):
            return [self._alarm(step, "critical", median, best, start)]
        if lost > max(self.share * gain, noise, 0.02 * abs(best)) and gain > noise:
            return [self._alarm(step, "warning", median, best, start)]
        return []

    def rewind(self, step: int) -> None:
        for one in (self._start, self._recent, self._best):
            one.rewind(step)

    def _alarm(self, step: int, level: str, median: float, best: float, start: float) -> Alarm:
        if level == "critical":
            message = f"the loss, {median:.4g}, is above its start of {start:.4g}"
        else:
            message = f"the loss went back up to {median:.4g}, from {best:.4g} at step {self._best.step}"
        return Alarm(
            step, self.name, message, level=level,  # type: ignore[arg-type]
            advice="the learning rate is too high for this model, or its warm-up too short: lower it by 3 and go back to "
            f"a checkpoint before step {self._best.step}",
            evidence={"loss": median, "best": best, "best_step": self._best.step, "start": start},
            source="Small-scale proxies for large-scale Transformer training instabilities",
        )  # fmt: skip
