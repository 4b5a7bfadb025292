"""Reading in one forward: nothing tapped, one tap, and the residual stream of every layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

import actome

from . import peers, subjects
from .row import Options, Row
from .timing import Figure, interleave, threads

NAME = "forward"
ONE, ALL = "blocks.5.resid.post", "blocks.*.resid.post"


def run(options: Options) -> Iterator[Row]:
    """On GPT-2 small, batch 4 x 256, whole forwards (``stop=False``) unless said otherwise."""
    with threads(options.threads):
        yield from _run(options)


def _run(options: Options) -> Iterator[Row]:
    module = subjects.gpt2()
    never = subjects.twin(module)  # the same weights in a module that no library has seen
    ids = subjects.tokens(module, subjects.BATCH, subjects.LENGTH)
    before = subjects.forward(never, ids)
    model = actome.wrap(module)
    layers = range(module.config.n_layer)
    works: dict[str, Callable[[], object]] = {
        "bare": lambda: subjects.forward(never, ids),
        "untapped": lambda: subjects.forward(module, ids),
        "one": lambda: model.record(ids, ONE, stop=False),
        "all": lambda: model.record(ids, ALL, stop=False),
        "stop": lambda: model.record(ids, ALL),
    }
    others = peers.build(module, subjects.twin, options.peers)
    recorded = model.record(ids, ALL)
    ours = [recorded[f"blocks.{i}.resid.post"] for i in layers]
    wanted = {
        "one": peers.agreeing(others, lambda peer: peer.record(ids, [5]), ours[5:6]),
        "all": peers.agreeing(others, lambda peer: peer.record(ids, layers), ours),
    }
    for row, checked in wanted.items():
        works.update({f"{row} {name}": work for name, work in checked.items() if callable(work)})
    times = interleave(works, options.rounds(9))
    if not torch.equal(before, subjects.forward(never, ids)) or not torch.equal(before, subjects.forward(module, ids)):
        raise RuntimeError("a forward of the bare model is no longer what it was before anything was wrapped")

    def ratio(name: str) -> Figure:
        return Figure.ratios(times[name], times["bare"])

    def theirs(row: str) -> dict[str, Figure | str]:
        return {name: ratio(f"{row} {name}") if callable(work) else work for name, work in wanted[row].items()}

    bare = f"{Figure(tuple(times['bare'])).median:.2f} s"
    yield Row("nothing tapped: a forward after `wrap`", "x", ratio("untapped"), 1.00, bare)
    yield Row(f"one read-only tap: record `{ONE}`", "x", ratio("one"), 1.01, bare, theirs("one"))
    yield Row(f"record `{ALL}`", "x", ratio("all"), 1.02, bare, theirs("all"))
    note = "the default, which ends the forward after the last block"
    yield Row(f"record `{ALL}`, `stop=True`", "x", ratio("stop"), None, bare, note=note)
