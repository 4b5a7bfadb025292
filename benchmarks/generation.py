"""One vector added to the residual stream while tokens are generated."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

import actome

from . import peers, subjects
from .row import Options, Row
from .timing import Figure, interleave, threads

NAME = "generation"
LAYER = 6


def run(options: Options) -> Iterator[Row]:
    """On GPT-2 small: 64 tokens with the cache after a prompt of 16, batch 1."""
    with threads(options.threads):
        yield from _run(options)


def _run(options: Options) -> Iterator[Row]:
    module = subjects.gpt2()
    ids, new = subjects.tokens(module, 1, subjects.PROMPT), subjects.NEW
    vector, never = subjects.vector(module), subjects.twin(module)
    model = actome.wrap(module)
    length = {"max_new_tokens": new, "min_new_tokens": new}

    def clamped() -> torch.Tensor:
        with model.clamp(actome.Add(f"blocks.{LAYER}.resid.post", vector)):
            return model.generate(ids, **length).ids

    works: dict[str, Callable[[], object]] = {
        "bare": lambda: subjects.generate(never, ids, new),
        "unclamped": lambda: model.generate(ids, **length),
        "ours": clamped,
    }
    ours = clamped()
    assert ours.shape[1] == subjects.PROMPT + new, "other than the asked number of tokens"
    assert not torch.equal(ours, subjects.generate(never, ids, new)), "the vector changed nothing"
    others = peers.build(module, subjects.twin, options.peers)
    checked = peers.agreeing(others, lambda peer: peer.generate(ids, LAYER, vector, new), ours)
    works.update({name: work for name, work in checked.items() if callable(work)})
    times = interleave(works, options.rounds(9))

    def ratio(name: str) -> Figure:
        return Figure.ratios(times[name], times["bare"])

    bare = f"{Figure(tuple(times['bare'])).median:.2f} s"
    theirs = {name: ratio(name) if callable(work) else work for name, work in checked.items()}
    yield Row(f"one `Add` while generating {new} tokens", "x", ratio("ours"), 1.02, bare, theirs)
    yield Row(f"`generate` without a clamp, {new} tokens", "x", ratio("unclamped"), None, bare)
