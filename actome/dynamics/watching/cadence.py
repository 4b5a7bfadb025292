"""When to look, so that all looking together stays within a share of the time that training takes."""

from __future__ import annotations

import math
from collections import deque
from statistics import median

# A step's usual time is the median of the last so many: a first compilation or an evaluation in between is no step.
_WINDOW = 32
# What is not spent is not saved up beyond this many looks, or a pause would be followed by a burst of them.
_SAVED = 2.0


class Cadence:
    """Which steps to look at, when looking may take a share of the time.

    It earns `share` of every step's usual time and spends what looks really took. After each look the next one is put
    at the step by which enough will have been earned: a number of steps, which processes that work together can agree
    upon, where a time could not be.

    Where the length of the run is known, half of all that will be earned is lent to looks at the steps 1, 2, 4, 8, ...
    and the other half is earned by the step: a network changes most at the beginning.

    Args:
        share: of the time, above 0; `math.inf` for no limit.
        every: look at each so-manieth step instead, whatever it takes.
        steps: how long the run will be, if that is known.

    >>> cadence = Cadence(share=0.01)
    >>> cadence.look(at=0, seconds=0.2, step_seconds=0.1)      # 0.2 s are owed and another 0.2 s to be earned
    >>> cadence.next
    400
    """

    def __init__(self, share: float, every: int | None = None, steps: int | None = None):
        self.share, self.every, self.steps = share, every, steps
        self.balance = 0.0
        self.lent = 0.0
        self.cost: float | None = None
        self.looks = 0
        self.next: int | None = 0
        self._since = 0
        self._known = False

    def plan(self, at: int, step_seconds: float | None) -> None:
        """Puts the next look; called after a look, and again when the time of a step has become known."""
        if self.every is not None:
            self.next = (at // self.every + 1) * self.every
            return
        if step_seconds is None or self.cost is None:
            self.next = None  # nothing is known yet of what may be spent
            return
        rate = self.share * step_seconds
        if not self._known and self.steps is not None:
            self._known, self.lent = True, 0.5 * rate * max(self.steps - at, 0)
        if self.steps is not None:
            rate /= 2
        self._earn(at, rate)
        steps = max(1, math.ceil((self.cost - self.balance) / rate)) if rate < math.inf else 1
        early = _next_power(at) - at
        if self.lent >= self.cost and early < steps:
            steps = early
        self.next = at + steps

    def look(self, at: int, seconds: float, step_seconds: float | None) -> None:
        """Takes in that a look at a step took so long, and puts the next."""
        if step_seconds is not None and self.every is None:
            self._earn(at, self.share * step_seconds / (2 if self.steps is not None else 1))
        self._since = at
        self.looks += 1
        self.cost = seconds if self.cost is None or self.looks <= 2 else 0.5 * (self.cost + seconds)
        self.spend(seconds)
        self.plan(at, step_seconds)

    def spend(self, seconds: float) -> None:
        """Takes in what else was spent, such as on making the watch."""
        early = min(self.lent, max(seconds - max(self.balance, 0.0), 0.0)) if self._known else 0.0
        self.lent -= early
        self.balance -= seconds - early

    def rewind(self, at: int) -> None:
        """Goes on from an earlier or later step, to which the loop's own count has jumped."""
        self._since = at
        self.next = None if self.every is None else at

    def _earn(self, at: int, rate: float) -> None:
        cap = math.inf if self.cost is None else _SAVED * self.cost
        if rate < math.inf:
            self.balance = min(self.balance + rate * max(at - self._since, 0), max(cap, self.balance))
        self._since = at


class StepClock:
    """How long a step takes without what watching adds.

    >>> clock = StepClock()
    >>> for end in (10.0, 11.0, 12.0, 30.0, 31.0):
    ...     _ = clock.tick(end, watched=0.0)
    >>> clock.usual
    1.0
    """

    def __init__(self) -> None:
        self._last: float | None = None
        self._recent: deque[float] = deque(maxlen=_WINDOW)
        self.total = 0.0
        self.steps = 0

    def start(self, now: float) -> None:
        """Has the next step begin now, after whatever watching did at the end of the last."""
        self._last = now

    def tick(self, now: float, watched: float) -> float | None:
        """The seconds of the step that ends now, less those within it that watching took."""
        seconds = None if self._last is None else max(now - self._last - watched, 0.0)
        if seconds is not None:
            self.total += seconds
            self.steps += 1
            # The first is not like the others: it warms up, or compiles.
            if self.steps > 1:
                self._recent.append(seconds)
        self._last = now
        return seconds

    @property
    def usual(self) -> float | None:
        """The median of the last steps' seconds; None before three of them are known."""
        return median(self._recent) if len(self._recent) >= 3 else None


def _next_power(at: int) -> int:
    """The smallest power of two above a step."""
    return 1 << max(at, 0).bit_length() if at > 0 else 1
