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

    Where the length of the run is known, half of all that will be earned is lent to looks that follow one another at
    equal ratios of steps, since a network changes most at the beginning; once these are as far apart as the others,
    what is left of it is spread over the rest.

    Args:
        share: of the time, above 0.
        every: look at each so-manieth step instead, whatever it takes.
        steps: how long the run will be, if that is known.

    Attributes:
        next: the step of the next look; None while it is not known what a step takes.
        cost: seconds that a look takes, by the last ones.
        looks: how many there were.

    >>> cadence = Cadence(share=0.01)
    >>> cadence.look(at=0, seconds=0.2, step_seconds=0.1)      # 0.2 s are owed and another 0.2 s to be earned
    >>> cadence.next
    400
    """

    def __init__(self, share: float, every: int | None = None, steps: int | None = None):
        self.share, self.every, self.steps = share, every, steps
        self.next: int | None = None
        self.cost: float | None = None
        self.looks = 0
        self._balance = 0.0
        self._since = self._last = 0
        self._lent: float | None = None
        self._ratio, self._bonus = math.inf, 0.0

    def begin(self, at: int) -> None:
        """Begins at a step."""
        self._since = self._last = at
        self.next = None if self.every is None else at

    def look(self, at: int, seconds: float, step_seconds: float | None) -> None:
        """Takes in that a look at a step took so long, and puts the next."""
        self.looks += 1
        # The first is not like the others: it imports and allocates.
        self.cost = seconds if self.cost is None or self.looks <= 2 else 0.5 * (self.cost + seconds)
        self.spend(seconds)
        self._last = at
        self.plan(at, step_seconds)

    def spend(self, seconds: float) -> None:
        """Takes in what was spent; what has not been earned is taken from what was lent, if anything was."""
        owed = max(seconds - max(self._balance, 0.0), 0.0)
        lent = min(self._lent or 0.0, owed)
        self._lent = None if self._lent is None else self._lent - lent
        self._balance -= seconds - lent

    def plan(self, at: int, step_seconds: float | None) -> None:
        """Puts the next look; called after a look, and again whenever the time of a step may have changed."""
        if self.every is not None:
            self.next = (at // self.every + 1) * self.every
            return
        if step_seconds is None or self.cost is None:
            self._since, self.next = at, None
            return
        rate = self.share * step_seconds
        if self.steps is not None:
            rate = 0.5 * rate + self._bonus
            if self._lent is None:
                self._lend(at, rate)
        self._balance = min(self._balance + rate * (at - self._since), max(_SAVED * self.cost, self._balance))
        self._since = at
        due = at + max(1, math.ceil((self.cost - self._balance) / rate))
        early = self._early(at)
        if early is not None and early < due:
            due = early
        elif self._lent and self._last == at and self.steps is not None:
            self._bonus, self._lent = self._bonus + self._lent / max(self.steps - at, 1), 0.0
        self.next = due

    def _early(self, at: int) -> int | None:
        """The step of the next early look, as long as what was lent can pay for it."""
        if not self._lent or self.cost is None or self._lent < self.cost or self._ratio == math.inf:
            return None
        return max(at + 1, math.ceil(self._ratio * self._last))

    def _lend(self, at: int, rate: float) -> None:
        assert self.steps is not None
        assert self.cost is not None
        self._lent = rate * max(self.steps - at, 0)
        looks = self._lent / self.cost
        self._ratio = max(self.steps, 2) ** (1 / looks) if looks >= 1 else math.inf


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
