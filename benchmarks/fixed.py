"""What a call costs however small the model: nearly all of it Python, and what one feels on a fast accelerator."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch

import actome

from . import peers, subjects
from .row import Options, Row
from .timing import Figure, Times, interleave, threads

NAME = "fixed"
SITE, LAYER = "blocks.*.resid.post", 6


def run(options: Options) -> Iterator[Row]:
    """On a GPT-2 of twelve layers of width 64, batch 1 x 8, one thread, in its processor time.

    A clamp is made, entered and left at every call.
    """
    with threads(1):
        yield from _forwards(options)
        yield from _generation(options)


def _forwards(options: Options) -> Iterator[Row]:
    module = subjects.narrow()
    never, model = subjects.twin(module), actome.wrap(module)
    ids, vector, layers = subjects.tokens(module, 1, 8), subjects.vector(module), range(module.config.n_layer)

    def added() -> torch.Tensor:
        with model.clamp(actome.Add(f"blocks.{LAYER}.resid.post", vector)):
            return subjects.forward(module, ids)

    works: dict[str, Callable[[], object]] = {
        "bare": lambda: subjects.forward(never, ids),
        "record": lambda: model.record(ids, SITE, stop=False),
        "add": added,
    }
    others = peers.build(module, subjects.twin, options.peers)
    recorded = model.record(ids, SITE)
    ours = [recorded[f"blocks.{i}.resid.post"] for i in layers]
    wanted = {
        "record": peers.agreeing(others, lambda peer: peer.record(ids, layers), ours),
        "add": peers.agreeing(others, lambda peer: peer.add(ids, LAYER, vector), added()),
    }
    for row, checked in wanted.items():
        works.update({f"{row} {name}": work for name, work in checked.items() if callable(work)})
    times = interleave(works, options.rounds(200), clock=time.thread_time, best_of=3)
    bare = f"{1e3 * Figure(tuple(times['bare'])).median:.2f} ms"
    for row, work, limit in (("record", f"record `{SITE}`", 0.2), ("add", "one `Add`", 0.1)):
        theirs = _theirs(wanted[row], times, 1e3, f"{row} ")
        yield Row(f"{work}, a forward", "ms", _beside(times, row, 1e3), limit, bare, theirs)


def _generation(options: Options) -> Iterator[Row]:
    module, new = subjects.narrow(), subjects.NEW
    never, model = subjects.twin(module), actome.wrap(module)
    ids, vector = subjects.tokens(module, 1, 8), subjects.vector(module)

    def clamped() -> torch.Tensor:
        with model.clamp(actome.Add(f"blocks.{LAYER}.resid.post", vector)):
            return model.generate(ids, max_new_tokens=new, min_new_tokens=new).ids

    works: dict[str, Callable[[], object]] = {"bare": lambda: subjects.generate(never, ids, new), "add": clamped}
    others = peers.build(module, subjects.twin, options.peers)
    checked = peers.agreeing(others, lambda peer: peer.generate(ids, LAYER, vector, new), clamped())
    works.update({name: work for name, work in checked.items() if callable(work)})
    times = interleave(works, options.rounds(20), clock=time.thread_time, best_of=2)
    bare = f"{1e3 * Figure(tuple(times['bare'])).median / new:.2f} ms"
    theirs = _theirs(checked, times, 1e3 / new)
    yield Row("generation with one `Add`, a token", "ms", _beside(times, "add", 1e3 / new), 0.1, bare, theirs)


def _beside(times: Times, name: str, scale: float) -> Figure:
    return Figure.differences(times[name], times["bare"], scale)


def _theirs(
    checked: dict[str, Callable[[], object] | str], times: Times, scale: float, prefix: str = ""
) -> dict[str, Figure | str]:
    return {name: _beside(times, prefix + name, scale) if callable(work) else work for name, work in checked.items()}
