"""Milliseconds a batch of every measure of the health panel, at the shapes of GPT-2 small, batch 4 x 256.

    python -m benchmarks.measures [--threads 2] [--repeats 7]

Tensors are random and the layers take turns, so that none is in cache because it was used just before. The line at the
end compares with the matrix products of a bare forward of the same model, run in the same process.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from actome.core.measure import Measure
from actome.measures import PANELS

LAYERS, BATCH, LENGTH, WIDTH, HEADS, MLP, VOCAB = 12, 4, 256, 768, 12, 3072, 50257


def inputs(seed: int = 0) -> dict[str, list[Tensor]]:
    """What the panel's sites would hold, by pattern."""
    generator = torch.Generator().manual_seed(seed)

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


def one_batch(measure: Measure, xs: list[Tensor], tokens: Tensor, metrics: list[Measure]) -> None:
    """What the engine does for one measure in one forward."""
    if measure.layout == "depth":
        prepared = [measure.prepare(x, xs[i - 1] if i else None) for i, x in enumerate(xs)]
        metrics[0].fold(measure.statistics(torch.stack(prepared)))
        return
    for metric, x in zip(metrics, xs, strict=True):
        metric.fold(metric.statistics(x, None, tokens))


def milliseconds(work: Callable[[], None], repeats: int) -> list[float]:
    """The time of each of some runs, after one that is not counted."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def products() -> Callable[[], None]:
    """The matrix products of a bare forward, which are nearly all of its time."""
    x, mlp = torch.randn(BATCH * LENGTH, WIDTH), torch.randn(BATCH * LENGTH, MLP)
    qkv, out = torch.randn(WIDTH, 3 * WIDTH), torch.randn(WIDTH, WIDTH)
    up, down, unembed = torch.randn(WIDTH, MLP), torch.randn(MLP, WIDTH), torch.randn(WIDTH, VOCAB)

    def work() -> None:
        for _ in range(LAYERS):
            x @ qkv, x @ out, x @ up, mlp @ down
        x @ unembed

    return work


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{platform.processor() or platform.machine()}, {options.threads} threads, torch {torch.__version__}")
    print(f"{'measure':<22}{'sites':<46}{'calls':>6}{'median ms':>11}{'least ms':>10}")
    data, total, least = inputs(), 0.0, 0.0
    tokens = torch.randint(0, VOCAB, (BATCH, LENGTH))
    with torch.inference_mode():
        for patterns, makes in PANELS["health"].entries:
            xs = [x for pattern in patterns for x in data[pattern]]
            for make in makes:
                measure = make()
                metrics = [measure.clone() for _ in xs]
                times = milliseconds(lambda m=measure, x=xs, s=metrics: one_batch(m, x, tokens, s), options.repeats)
                total, least = total + statistics.median(times), least + min(times)
                name, where = type(measure).__name__, ", ".join(patterns)
                print(f"{name:<22}{where:<46}{len(xs):>6}{statistics.median(times):>11.2f}{min(times):>10.2f}")
        bare = milliseconds(products(), max(3, options.repeats // 2))
    print(f"{'the whole panel':<74}{total:>11.2f}{least:>10.2f}")
    print(f"{'matrix products of the bare forward':<74}{statistics.median(bare):>11.2f}{min(bare):>10.2f}")
    print(f"{'ratio':<74}{total / statistics.median(bare):>11.3f}{least / min(bare):>10.3f}")


if __name__ == "__main__":
    main()
