"""Attention patterns of every layer, against the forward that has them anyway: the eager one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import actome

from . import peers, subjects
from .row import Options, Row
from .timing import Figure, interleave, threads

NAME = "patterns"
SITE = "blocks.*.attn.pattern"


def run(options: Options) -> Iterator[Row]:
    """On GPT-2 small, batch 4 x 256, whole forwards, of a model loaded as usual (SDPA) and of one loaded as eager."""
    with threads(options.threads):
        yield from _run(options)


def _run(options: Options) -> Iterator[Row]:
    module = subjects.gpt2()
    eager, never = subjects.twin(module, "eager"), subjects.twin(module, "eager")
    ids = subjects.tokens(module, subjects.BATCH, subjects.LENGTH)
    fused_model, eager_model = actome.wrap(module), actome.wrap(eager)
    works: dict[str, Callable[[], object]] = {
        "bare": lambda: subjects.forward(never, ids),
        "fused bare": lambda: subjects.forward(module, ids),
        "fused": lambda: fused_model.record(ids, SITE, stop=False),
        "eager": lambda: eager_model.record(ids, SITE, stop=False),
    }
    recorded = eager_model.record(ids, SITE)
    ours = [recorded[f"blocks.{i}.attn.pattern"] for i in range(module.config.n_layer)]
    others = peers.build(module, lambda one: subjects.twin(one, "eager"), options.peers)
    checked = peers.agreeing(others, lambda peer: peer.patterns(ids), ours)
    del recorded, ours
    works.update({name: work for name, work in checked.items() if callable(work)})
    times = interleave(works, options.rounds(9))

    def ratio(name: str) -> Figure:
        return Figure.ratios(times[name], times["bare"])

    bare = f"{Figure(tuple(times['bare'])).median:.2f} s"
    fused = Figure.ratios(times["fused"], times["fused bare"]).median
    theirs = {name: ratio(name) if callable(work) else work for name, work in checked.items()}
    note = f"{fused:.3f} x the bare SDPA forward"
    yield Row(f"record `{SITE}`, model loaded with SDPA", "x", ratio("fused"), 1.05, bare, note=note)
    yield Row(f"record `{SITE}`, model loaded as eager", "x", ratio("eager"), 1.05, bare, theirs)
