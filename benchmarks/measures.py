"""Where the time of a panel goes: each of its measures by itself, while the panel runs over GPT-2 small."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch

import actome
from actome.core.real import forget, shared_tokens
from actome.core.stream import plan
from actome.core.taps import Tap
from actome.measures import PANELS

from . import subjects
from .row import Options, Row
from .timing import Figure, threads

NAME = "measures"

# Processor time of the one thread: what else runs on the machine hardly shows.
_clock = time.thread_time


def run(options: Options) -> Iterator[Row]:
    """Milliseconds a batch of each measure of a panel (`--panel`, `health` unless given), in the order and in the
    cache in which the engine meets them; on GPT-2 small, batch 4 x 256, in processor time of one thread.

    What measures share at a site, such as the look for padding, is with the one that comes first.
    """
    module = subjects.gpt2()
    model, never = actome.wrap(module), subjects.twin(module)
    ids = subjects.tokens(module, subjects.BATCH, subjects.LENGTH)
    streams, _ = plan(model, PANELS[options.panel])
    names = [f"{type(one.measure).__name__} at {_place([site.name for site in one.sites])}" for one in streams]
    spent: dict[str, float] = defaultdict(float)

    def timed(name: str, work: Callable[..., None]) -> Callable[..., None]:
        def inner(*args: Any) -> None:
            start = _clock()
            work(*args)
            spent[name] += _clock() - start

        return inner

    taps: list[tuple[Any, Tap, Any]] = [
        (point, timed(name, tap), kind)
        for name, stream in zip(names, streams, strict=True)
        for point, tap, kind in stream.taps()
    ]
    taps += [(point, lambda _: forget(), "read") for point in dict.fromkeys(point for point, _, _ in taps)]
    samples: dict[str, list[float]] = defaultdict(list)
    bare: list[float] = []
    rounds = options.rounds(11)
    with threads(1), torch.no_grad():
        for turn in range(-2, rounds):
            spent.clear()
            start = _clock()
            subjects.forward(never, ids)
            alone = _clock() - start
            for stream in streams:
                stream.begin(None, ids)
            with model.tap(taps), shared_tokens():
                module(input_ids=ids, use_cache=False)
                for name, stream in zip(names, streams, strict=True):
                    timed(name, stream.end)()
            if turn >= 0:
                bare.append(alone)
                for name, seconds in spent.items():
                    samples[name].append(seconds)
        ends: dict[str, float] = {}
        for name, stream in zip(names, streams, strict=True):
            start = _clock()
            stream.results()
            ends[name] = _clock() - start
    words = f"{1e3 * Figure(tuple(bare)).median:.0f} ms"
    for name in sorted(samples, key=lambda one: -Figure(tuple(samples[one])).median):
        note = f"and {1e3 * ends[name]:.0f} ms once at the end" if ends[name] > 0.01 else ""
        yield Row(name, "ms", Figure(tuple(1e3 * one for one in samples[name])), None, words, note=note)
    whole = [sum(one) for one in zip(*samples.values(), strict=True)]
    note = f"of the bare forward, beside it; and {sum(ends.values()):.2f} s once at the end"
    yield Row(f"the whole panel `{options.panel}`", "x", Figure.ratios(whole, bare), None, words, note=note)


def _place(names: list[str]) -> str:
    """Sites of one stream in few words."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
