"""Where the time of the health panel goes: each of its measures alone, at the shapes of GPT-2 small, batch 4 x 256."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from actome.core.measure import Measure
from actome.measures import PANELS

from .row import Options, Row
from .timing import Figure, interleave, threads

NAME = "measures"
LAYERS, BATCH, LENGTH, WIDTH, HEADS, MLP, VOCAB = 12, 4, 256, 768, 12, 3072, 50257


def run(options: Options) -> Iterator[Row]:
    """Milliseconds a batch of each measure of the panel, on random tensors, beside the forward's matrix products."""
    data, tokens = _inputs(), torch.randint(0, VOCAB, (BATCH, LENGTH))
    works: dict[str, Callable[[], object]] = {"all": _products()}
    for patterns, makes in PANELS["health"].entries:
        xs = [x for pattern in patterns for x in data[pattern]]
        for make in makes:
            measure = make()
            metrics = [measure.clone() for _ in xs]
            name = f"{type(measure).__name__} at {', '.join(patterns)}"
            works[name] = lambda m=measure, x=xs, s=metrics: _one_batch(m, x, tokens, s)
    # In turns, so that no measure finds its tensors in the cache because it has just used them.
    with threads(options.threads), torch.inference_mode():
        times = interleave(works, options.rounds(21))
    products = times.pop("all")
    bare = f"{1e3 * Figure(tuple(products)).median:.0f} ms"
    for name, seconds in times.items():
        yield Row(name, "ms", Figure(tuple(1e3 * one for one in seconds)), None, bare)
    whole = [sum(one) for one in zip(*times.values(), strict=True)]
    yield Row("the whole panel", "x", Figure.ratios(whole, products), None, bare, note="of those matrix products")


def _inputs() -> dict[str, list[Tensor]]:
    """What the panel's sites would hold, by pattern."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    scores = [normal(BATCH, HEADS, LENGTH, LENGTH).masked_fill(causal, -torch.inf) for _ in range(LAYERS)]
    return {
        "blocks.0.resid.pre": [normal(BATCH, LENGTH, WIDTH)],
        "blocks.*.resid.post": [normal(BATCH, LENGTH, WIDTH) for _ in range(LAYERS)],
        "blocks.*.mlp.act": [torch.nn.functional.gelu(normal(BATCH, LENGTH, MLP)) for _ in range(LAYERS)],
        "blocks.*.attn.pattern": [score.softmax(-1) for score in scores],
        "logits": [normal(BATCH, LENGTH, VOCAB)],
    }


def _one_batch(measure: Measure, xs: list[Tensor], tokens: Tensor, metrics: list[Measure]) -> None:
    """What the engine does for one measure in one forward."""
    if measure.layout == "depth":
        prepared = [measure.prepare(x, xs[i - 1] if i else None) for i, x in enumerate(xs)]
        metrics[0].fold(measure.statistics(torch.stack(prepared)))
        return
    for metric, x in zip(metrics, xs, strict=True):
        metric.fold(metric.statistics(x, None, tokens))


def _products() -> Callable[[], None]:
    """The matrix products of a bare forward, which are nearly all of its time."""
    x, mlp = torch.randn(BATCH * LENGTH, WIDTH), torch.randn(BATCH * LENGTH, MLP)
    qkv, out = torch.randn(WIDTH, 3 * WIDTH), torch.randn(WIDTH, WIDTH)
    up, down, unembed = torch.randn(WIDTH, MLP), torch.randn(MLP, WIDTH), torch.randn(WIDTH, VOCAB)

    def work() -> None:
        for _ in range(LAYERS):
            x @ qkv, x @ out, x @ up, mlp @ down
        x @ unembed

    return work
