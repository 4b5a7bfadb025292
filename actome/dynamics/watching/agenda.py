"""Agenda: what is due at which step, and what it has cost so far."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .cadence import Cadence, StepClock
from .logbook import Logbook
from .optimizers import OptimizerWatch
from .ranks import Ranks

# Scalars wait no longer than this before they are fetched, written and shown to the detectors.
_STEPS, _SECONDS = 50, 1.0
# Of the budget the scalars of every step, the norms and the writing may take a third, and the panel the rest.
_SHARE = 1 / 3
# A change of the distance between looks by less than this factor is not worth an event.
_CHANGE = 1.5


class Agenda:
    """When to look, when to take norms, and when to fetch what waits.

    Args:
        every: look at each so-manieth step; None keeps within `budget`.
        budget: the share of the training's time that all of watching may add.
        steps: how long the run will be, if known.

    Attributes:
        clock: how long steps take.
        spent: seconds that watching took.
    """

    def __init__(self, every: int | None, budget: float, steps: int | None):
        self.every, self.budget, self.steps = every, budget, steps
        self.clock = StepClock()
        self.spent = 0.0
        self._looks = Cadence(budget * (1 - _SHARE), every, steps)
        self._norms = Cadence(budget * _SHARE, every)
        self._told: float | None = None
        self._charged = 0.0  # seconds of this step that some look, norms or writing has answered for

    def begin(self, at: int, ranks: Ranks, looks: bool, seconds: float) -> None:
        """Begins at a step, after so many seconds of preparation."""
        self._ranks, self._has_looks = ranks, looks
        for cadence in (self._looks, self._norms):
            cadence.begin(at)
        (self._looks if looks else self._norms).spend(seconds)
        self.spent += seconds
        self._flush_at, self._flushed = at + 4, time.perf_counter()

    # -- what is due ----------------------------------------------------------------------------------------------

    def looks_at(self, at: int) -> bool:
        """Whether a look is due."""
        return self._has_looks and self._looks.next is not None and at >= self._looks.next

    def measures_at(self, at: int) -> bool:
        """Whether norms are due; they always are with a look."""
        return self.looks_at(at) or (self._norms.next is not None and at >= self._norms.next)

    def flushes_at(self, at: int) -> bool:
        """Whether what waits is to be fetched; processes that work together go by the step, to do it together."""
        late = self._ranks.alone and time.perf_counter() - self._flushed > _SECONDS
        return late or at >= self._flush_at

    # -- what it took ---------------------------------------------------------------------------------------------

    def tick(self, now: float, hooked: float) -> dict[str, float]:
        """The time of the step that ends now, as its row."""
        seconds = self.clock.tick(now, hooked)
        return {} if seconds is None else {"step_time": seconds}

    def spend(self, begin: float, hooked: float) -> None:
        """Counts what a step of the watch took, and begins to time the next step of the training."""
        end = time.perf_counter()
        took = end - begin + hooked
        self.spent += took
        # What no look, norms or writing has answered for is what every step costs.
        self._norms.spend(max(took - self._charged, 0.0))
        self._charged = 0.0
        self.clock.start(end)

    @contextmanager
    def norms(self, at: int, hooks: OptimizerWatch) -> Iterator[None]:
        """Around the norms of a step."""
        begin = time.perf_counter()
        yield
        took = time.perf_counter() - begin + hooks.spent
        self._charged += took
        self._norms.look(at, took, self.clock.usual)

    @contextmanager
    def look(self, at: int, device: torch.device) -> Iterator[None]:
        """Around a look; what the device still has to do for the training is waited for first, and not counted."""
        if device.type != "cpu":
            torch.accelerator.synchronize()
        begin = time.perf_counter()
        yield
        took = time.perf_counter() - begin
        self._charged += took
        self._looks.look(at, took, self.clock.usual)

    @property
    def overhead(self) -> float:
        """Seconds of watching over seconds of training."""
        return self.spent / self.clock.total if self.clock.total else 0.0

    # -- what comes next ------------------------------------------------------------------------------------------

    def plan(self, at: int, seconds: float, log: Logbook) -> None:
        """Puts what is due next, after a fetching that took so many seconds."""
        self._charged += seconds
        self._norms.spend(seconds)
        usual = self.clock.usual
        for cadence in (self._looks, self._norms):
            cadence.plan(at, usual)
        self._flushed = time.perf_counter()
        steps = 1 if usual is None else int(_SECONDS / max(usual, 1e-9))
        self._flush_at = at + (4 if usual is None else min(max(steps, 1), _STEPS))
        if self._has_looks:
            self._tell(at, usual, log)

    def agree(self, ranks: Ranks) -> None:
        """Has every process look and fetch at the steps that the first has put."""
        self._looks.next, self._flush_at = ranks.tell((self._looks.next, self._flush_at))

    def _tell(self, at: int, usual: float | None, log: Logbook) -> None:
        """An event when the distance between looks is new or has changed."""
        if self._looks.next is None or usual is None or self._looks.cost is None:
            return
        distance = float(self._looks.next - at)
        if self._told is not None and 1 / _CHANGE < distance / self._told < _CHANGE:
            return
        if self._told is not None and self.every is not None:
            return
        self._told = distance
        share = self._looks.cost / (distance * usual)
        log.event("cadence", at, every=int(distance), look_seconds=self._looks.cost, step_seconds=usual, share=share)

    def last_values(self, scaler: Any) -> dict[str, float]:
        """What is said of the last step of a batch of them."""
        values = {"overhead": self.overhead} if self.clock.total else {}
        if scaler is not None and scaler.is_enabled():
            values["loss_scale"] = float(scaler.get_scale())
        return values

    def describe(self) -> dict[str, Any]:
        """How it was set."""
        return {"every": "auto" if self.every is None else self.every, "budget": self.budget, "steps": self.steps}

    def costs(self) -> dict[str, Any]:
        """What it has all taken."""
        return {
            "seconds": self.clock.total,
            "watching_seconds": self.spent,
            "overhead": self.overhead,
            "looks": self._looks.looks,
            "norms": self._norms.looks,
        }
