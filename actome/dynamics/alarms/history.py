"""What a detector remembers: the last readings of one place, a sorted window, a best value so far.

Each forgets what came at a step and later (`rewind`), for a run that goes back to a checkpoint.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque

import numpy as np

_KEPT = 4096


class Track:
    """The last `size` readings of one place, with their steps."""

    def __init__(self, size: int):
        self.steps: deque[int] = deque(maxlen=size)
        self.values: deque[float] = deque(maxlen=size)

    def __len__(self) -> int:
        return len(self.steps)

    def add(self, step: int, value: float) -> None:
        """A second reading of one step takes the place of the first."""
        if self.steps and self.steps[-1] == step:
            self.values[-1] = value
            return
        self.steps.append(step)
        self.values.append(value)

    def last(self, count: int) -> list[float]:
        return list(self.values)[-count:]

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values, float64."""
        return np.array(self.steps, dtype=np.float64), np.array(self.values, dtype=np.float64)

    def rewind(self, step: int) -> None:
        while self.steps and self.steps[-1] >= step:
            self.steps.pop()
            self.values.pop()


class Window:
    """The last `size` readings, kept sorted as well, so that quantiles cost nothing to read.

    Older ones are kept by, so that a run may go back some thousand steps and find its window as it was.

    >>> window = Window(5)
    >>> for step, value in enumerate([9.0, 1.0, 2.0, 3.0, 4.0, 5.0]):
    ...     window.add(step, value)
    >>> window.median, len(window)                                  # the 9 has left
    (3.0, 5)
    >>> window.rewind(5)
    >>> window.median, len(window)
    (3.0, 5)
    """

    def __init__(self, size: int):
        self.size = size
        self.track = Track(size + _KEPT)
        self._sorted: list[float] = []

    def __len__(self) -> int:
        return len(self._sorted)

    @property
    def full(self) -> bool:
        return len(self._sorted) == self.size

    @property
    def last(self) -> float:
        return self.track.values[-1]

    def add(self, step: int, value: float) -> None:
        if self.full:
            del self._sorted[bisect_left(self._sorted, self.track.values[-self.size])]
        self.track.steps.append(step)
        self.track.values.append(value)
        insort(self._sorted, value)

    @property
    def median(self) -> float:
        return self._sorted[len(self._sorted) // 2]

    @property
    def quartile(self) -> float:
        """The lower one: three of four readings lie above it."""
        return self._sorted[len(self._sorted) // 4]

    def rewind(self, step: int) -> None:
        self.track.rewind(step)
        self._sorted = sorted(self.track.last(self.size))


class Best:
    """The lowest value so far and when it came; improvements of less than a thousandth are not kept apart."""

    def __init__(self) -> None:
        self._records: list[tuple[int, float]] = []

    def add(self, step: int, value: float) -> None:
        if not self._records or value < self.value - 1e-3 * abs(self.value):
            self._records.append((step, value))

    @property
    def value(self) -> float:
        return self._records[-1][1] if self._records else math.inf

    @property
    def step(self) -> int | None:
        return self._records[-1][0] if self._records else None

    def rewind(self, step: int) -> None:
        while self._records and self._records[-1][0] >= step:
            self._records.pop()
