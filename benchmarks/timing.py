"""Times of several pieces of work, taken in turns so that whatever slows the machine slows all of them."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

Times = dict[str, list[float]]


@dataclass(frozen=True)
class Figure:
    """The median of some samples, with their quartiles."""

    samples: tuple[float, ...]

    @classmethod
    def ratios(cls, some: Sequence[float], bare: Sequence[float]) -> Figure:
        """Of what was measured in the same round."""
        return cls(tuple(a / b for a, b in zip(some, bare, strict=True)))

    @classmethod
    def differences(cls, some: Sequence[float], bare: Sequence[float], scale: float = 1.0) -> Figure:
        """Of what was measured in the same round, times a scale."""
        return cls(tuple(scale * (a - b) for a, b in zip(some, bare, strict=True)))

    def quantile(self, q: float) -> float:
        """A quantile of the samples."""
        return float(np.quantile(self.samples, q))

    @property
    def median(self) -> float:
        return self.quantile(0.5)


def interleave(
    works: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
    best_of: int = 1,
) -> Times:
    """Seconds of each piece of work in each round.

    Each round does every piece once, in an order of its own: what a piece leaves behind, in the caches and in the
    allocator, would otherwise always meet the same next one. What a piece returns is freed within its time. The garbage
    collector runs between rounds and never within one.

    Args:
        works: what to do, by name.
        rounds: how many rounds count.
        warmup: how many rounds go before them.
        clock: what tells the time; `time.thread_time` for work on one thread, which then shares its core unnoticed.
        best_of: a sample is the fastest of so many calls in a row, for work so short that an interruption drowns it.
    """
    names = list(works)
    times: Times = {name: [] for name in names}
    gc.collect()
    gc.freeze()  # what is there stays; collecting between rounds then costs next to nothing
    try:
        for turn in range(-warmup, rounds):
            gc.collect()
            gc.disable()
            for name in random.Random(turn).sample(names, len(names)):
                seconds = min(_seconds(works[name], clock) for _ in range(best_of))
                if turn >= 0:
                    times[name].append(seconds)
            gc.enable()
    finally:
        gc.enable()
        gc.unfreeze()
    return times


def _seconds(work: Callable[[], object], clock: Callable[[], float]) -> float:
    start = clock()
    work()
    return clock() - start


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Computes on this many threads for the time of a block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
