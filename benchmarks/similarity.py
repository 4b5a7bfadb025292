"""Centred kernel alignment between the layers of GPT-2 small: folded as it streams, beside published packages."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import actome
from actome.measures import CKA

from . import subjects
from .row import Options, Row
from .timing import Figure, interleave, threads

NAME, SITES = "similarity", "blocks.*.resid.post"
SIZE = 256  # tokens of a minibatch, the same for all
PEERS = ("ckatorch", "pytorch-cka", "pytorch-cka, all tokens at once")


def run(options: Options) -> Iterator[Row]:
    """CKA of all pairs of the 12 residual streams of GPT-2 small, of 2 batches of 4 x 256 random tokens.

    The others are given stored activations, already cut into the same minibatches; none of the figures contains the
    forward that made them. Results must agree within 1e-4, and within 1e-2 where all tokens are
    taken at once.
    """
    model = actome.wrap(subjects.gpt2())
    ids = [subjects.tokens(subjects.gpt2(), subjects.BATCH, subjects.LENGTH, seed) for seed in (0, 1)]
    recordings = [model.record(one, SITES) for one in ids]
    stored = [[recording[site.name] for site in model.match(SITES)] for recording in recordings]
    minibatches = [torch.stack(part) for batch in stored for part in _minibatches(batch)]
    ours = _folded(stored)
    works: dict[str, Callable[[], object]] = {"actome": lambda: _folded(stored)}
    said: dict[str, Figure | str] = {}
    for name in PEERS:
        try:
            peer = _peer(name, minibatches) if options.peers else "left out"
        except ImportError:
            peer = "not installed"
        if isinstance(peer, str):
            said[name] = peer
            continue
        apart = float((peer() - ours).abs().max())
        # Without minibatches it is another sample of the same pairs of tokens.
        if apart > (1e-2 if "all tokens" in name else 1e-4):
            said[name] = f"another result, {apart:.1e} apart"
            continue
        works[name] = peer
    with threads(options.threads):
        times = interleave(works, options.rounds(11), warmup=1)
    mine = times["actome"]
    for name in set(works) - {"actome"}:
        said[name] = Figure(tuple(1e3 * one for one in times[name]))
    for name in PEERS:
        if name in times:
            speed = Figure.ratios(mine, times[name])
            note = f"{1 / speed.median:.1f} times as fast"
            limit = 0.33 if name == "ckatorch" else None
            yield Row(f"CKA of 12 layers beside {name}", "x", speed, limit, note=note)
    yield Row("CKA of 12 layers, 2048 tokens", "ms", Figure(tuple(1e3 * one for one in mine)), peers=said)


def _folded(stored: list[list[Tensor]]) -> Tensor:
    """What the engine does in two forwards."""
    cka = CKA(size=SIZE)
    for batch in stored:
        cka.fold(cka.statistics([cka.prepare(one, None) for one in batch]))
    return cka.compute()["cka"]


def _minibatches(batch: list[Tensor]) -> Iterator[list[Tensor]]:
    """The tokens of a batch as `CKA` deals them out."""
    dealt = [CKA().prepare(one, None) for one in batch]
    parts = -(-len(dealt[0]) // SIZE)
    yield from ([*part] for part in zip(*(one.tensor_split(parts) for one in dealt), strict=True))


def _peer(name: str, minibatches: list[Tensor]) -> Callable[[], Tensor]:
    """The same matrix as another library makes it of stored minibatches, each (site, token, unit)."""
    if name == "ckatorch":
        cka_batch = importlib.import_module("ckatorch.core").cka_batch
        sites = list(torch.stack(minibatches, 1))  # for each (minibatch, token, unit)

        def pairwise() -> Tensor:
            # Its matrix is symmetric, so half of the pairs are enough.
            out = torch.eye(len(sites), dtype=torch.float64)
            for i in range(len(sites)):
                for j in range(i):
                    out[i, j] = out[j, i] = cka_batch(sites[i], sites[j])
            return out

        return pairwise
    if name == "pytorch-cka, all tokens at once":
        from_features = importlib.import_module("cka").cka_from_features
        whole = list(torch.cat(minibatches, 1))
        return lambda: from_features(whole, whole)
    hsic = importlib.import_module("cka.hsic").hsic

    def together() -> Tensor:
        cross = own = torch.zeros(())
        for one in minibatches:
            gram = one @ one.mT
            xy, xx, _ = hsic(gram, gram)
            cross, own = cross + xy, own + xx
        return cross / (own[:, None] * own).sqrt()

    return together
