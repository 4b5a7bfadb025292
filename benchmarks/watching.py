"""What watching adds to a training: whole runs of a network of ten million parameters, beside the same without."""

from __future__ import annotations

import gc
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import actome
from actome.tasks import Subject, SubjectConfig

from .row import Options, Row
from .timing import Figure, threads

NAME = "watching"
# The whole run, and steps at which nothing is taken, as ratios to the bare loop.
LIMITS = {"default panel and budget": 1.03, "scalars only": 1.01}
BETWEEN = 1.01

_VOCAB, _ROWS, _LENGTH = 4096, 4, 128
_BLOCK = 5  # steps that one loop makes before it is another's turn


class Loop:
    """A training that can be made in parts, with the seconds of each step.

    Args:
        options: of `actome.watch`; None for the bare loop.
    """

    def __init__(self, options: dict[str, Any] | None):
        config = SubjectConfig(vocab=_VOCAB, d_model=320, heads=5, layers=6, d_mlp=1280, context=_LENGTH)
        self.module = Subject.fresh(config, seed=0)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-3)
        self.made, self.steps, self.whole = 0, [], 0.0
        self.watch = None
        if options is not None:
            begin = time.perf_counter()
            self.watch = actome.watch(self.module, **options).begin()
            self.whole += time.perf_counter() - begin

    def block(self) -> None:
        """The next few steps."""
        for _ in range(_BLOCK):
            begin = time.perf_counter()
            tokens = _tokens(self.made)
            logits = self.module(tokens).logits[:, :-1]
            loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.watch is not None:
                self.watch.step(loss)
            self.made += 1
            seconds = time.perf_counter() - begin
            self.steps.append(seconds)
            self.whole += seconds

    def close(self) -> None:
        """Ends the watch, which is part of the whole run."""
        if self.watch is not None:
            begin = time.perf_counter()
            self.watch.close()
            self.whole += time.perf_counter() - begin


def run(options: Options) -> Iterator[Row]:
    """A training of 10 M parameters (6 layers of width 320, batches of 4 x 128 tokens, AdamW), three times in one
    process, five steps of each in turn: bare, watched, and watched for scalars only. Times are of the whole, from
    making the watch to closing its run."""
    steps = 20 if options.quick else 350
    with threads(options.threads), tempfile.TemporaryDirectory() as folder:
        _warm(folder)
        loops = {
            "bare": Loop(None),
            "default panel and budget": Loop({"text": _tokens(-1, 8), "run": f"{folder}/panel"}),
            "scalars only": Loop({"panel": None, "run": f"{folder}/scalars"}),
        }
        for turn in range(steps // _BLOCK):
            gc.collect()
            gc.disable()
            for name in random.Random(turn).sample(list(loops), len(loops)):
                loops[name].block()
            gc.enable()
        for loop in loops.values():
            loop.close()
        same = all(_same(loops["bare"].module, loop.module) for loop in loops.values())
        assert same, "a watched training is not bit for bit the bare one"
        yield from _rows(loops, folder, options)


def _rows(loops: dict[str, Loop], folder: str, options: Options) -> Iterator[Row]:
    bare = loops["bare"]
    for name, limit in LIMITS.items():
        loop = loops[name]
        cost = _ended(Path(folder) / ("panel" if "panel" in name else "scalars"))
        note = f"{cost['looks']} looks, {cost['norms']} times norms; by its own count {1 + cost['overhead']:.4f} x" + (
            "; too short a run to be within its limit" if options.quick else ""
        )
        ratio = Figure((loop.whole / bare.whole,))
        words = f"{bare.whole:.0f} s"
        yield Row(f"{len(bare.steps)} steps, {name}", "x", ratio, None if options.quick else limit, words, note=note)
    for name in LIMITS:
        quiet = _quiet(loops[name].steps, bare.steps)
        between = Figure(tuple(quiet))
        each = f"{1e3 * median(bare.steps):.0f} ms"
        yield Row(f"a step between looks, {name}", "x", between, BETWEEN, each, note=f"{len(quiet)} blocks of steps")


def _quiet(steps: list[float], bare: list[float]) -> list[float]:
    """For each block the ratio of the medians of its steps: those at which something was taken are no medians."""
    blocks = range(0, len(steps), _BLOCK)
    return [median(steps[at : at + _BLOCK]) / median(bare[at : at + _BLOCK]) for at in blocks]


def _ended(path: Path) -> dict[str, Any]:
    """What a run said of its own cost."""
    events = actome.dynamics.RunStore.open(path).events
    return events[events["name"] == "end"]["data"].iloc[-1]


def _warm(folder: str) -> None:
    """Imports and first calls, which belong to the process and not to a run."""
    loop = Loop({"text": _tokens(-1, 8), "run": f"{folder}/warm", "every": 2})
    loop.block()
    loop.close()


def _tokens(step: int, rows: int = _ROWS) -> Tensor:
    generator = torch.Generator().manual_seed(step + 1)
    return torch.randint(0, _VOCAB, (rows, _LENGTH), generator=generator)


def _same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)
