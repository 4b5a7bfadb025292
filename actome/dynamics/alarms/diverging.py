"""A loss that goes back up: a learning rate that is too high."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from actome.core.errors import MeasureError

from .base import Alarm, Detector, Reading
from .history import Best, Track, Window
from .spikes import total


class LossDivergence(Detector):
    """The loss has lost what it had gained, or never gained anything and lies above where it began.

    Three of four of the last `window` losses have to be above a level. Above the best median of so many losses by
    `share` of what had been gained from the start, that is a ``warning``; above the start, ``critical``; in either case
    by a `margin` as well. The start is the first loss, or the median of the first `first` where that is lower. Typical
    of a learning rate that is too high, or of a spike that does not come back.

    Args:
        window: losses that a median is taken of.
        first: losses that the start is the median of.
        share: of the gain.
        margin: share of the best loss, or of the start, that a loss has to be above it.

    Delay: about `window` steps after the loss has gone up.

    >>> diverging = LossDivergence(window=8)
    >>> losses = [3.5] * 4 + [3.5 - 0.02 * step for step in range(50)] + [3.4] * 8
    >>> found = [diverging.update(step, [Reading("loss", loss)]) for step, loss in enumerate(losses)]
    >>> told = [one for each in found for one in each or []]
    >>> told[0].level, told[0].step
    ('warning', 59)
    """

    name: ClassVar[str] = "loss_divergence"
    needs: ClassVar[tuple[str, ...]] = ("loss",)

    def __init__(self, window: int = 16, first: int = 4, share: float = 0.5, margin: float = 0.02):
        if window < 4 or first < 1 or not 0 < share <= 1 or margin < 0:
            raise MeasureError(f"window={window}, first={first}, share={share}, margin={margin}: want 4, 1, a share, 0")
        self.window, self.share, self.margin = window, share, margin
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
        median, low = self._recent.median, self._recent.quartile
        start = min(self._start.values[0], sorted(self._start.values)[self._first // 2])
        self._best.add(step, median)
        best = self._best.value
        gain = start - best
        if low - start > self.margin * abs(start):
            return [self._alarm(step, "critical", median, best, start)]
        if gain > self.margin * abs(start) and low - best > max(self.share * gain, self.margin * abs(best)):
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
            advice="the learning rate is too high for this model, or its warm-up too short: lower it by 3 and go back "
            f"to a checkpoint before step {self._best.step}",
            evidence={"loss": median, "best": best, "best_step": self._best.step, "start": start},
            source="Small-scale proxies for large-scale Transformer training instabilities",
        )  # fmt: skip
