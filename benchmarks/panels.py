"""Whole panels over a stream of text: their time, and that their memory does not grow with the text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

import actome
from actome.measures.panels import PANELS

from . import subjects
from .row import Options, Row
from .timing import Figure, interleave, threads

NAME = "panels"
# What a panel may cost, in forwards of the bare model.
LIMITS = {"health": 1.35, "all": 2.5}
# Batches of the two processes whose peaks are compared.
COUNTS = {"health": (4, 16), "all": (16, 32)}

# Makes the C library give every large block back at once, so that a peak is what was in use and not what was hoarded.
# Smaller ones than these 2 MB, the buffers of measures among them, come and go too often for that.
_EXACT = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "2097152", "MALLOC_TRIM_THRESHOLD_": "2097152"}


def run(options: Options) -> Iterator[Row]:
    """On GPT-2 small, batches of 4 x 256 random tokens, made as they are needed."""
    with threads(options.threads):
        yield from _time(options)
    for name in LIMITS:
        yield _memory(options, name)


def batches(count: int) -> Iterator[torch.Tensor]:
    """A stream of ids."""
    for seed in range(count):
        yield subjects.tokens(subjects.gpt2(), subjects.BATCH, subjects.LENGTH, seed)


def _time(options: Options) -> Iterator[Row]:
    module = subjects.gpt2()
    model, never = actome.wrap(module), subjects.twin(module)
    count = 2 if options.quick else 8
    ends: dict[str, list[float]] = {name: [] for name in LIMITS}

    def bare() -> None:
        for ids in batches(count):
            subjects.forward(never, ids)

    def measured(name: str) -> None:
        done: list[float] = []
        model.measure(batches(count), PANELS[name], progress=lambda _: done.append(time.perf_counter()))
        ends[name].append(time.perf_counter() - done[-1])

    works = {"bare": bare, **{name: partial(measured, name) for name in LIMITS}}
    times = interleave(works, options.rounds(5), warmup=1)
    whole = f"{Figure(tuple(times['bare'])).median:.2f} s"
    for name, limit in LIMITS.items():
        # What is computed once from the totals, eigenvalues above all, does not grow with the text.
        end = Figure(tuple(ends[name][1:]))
        stream = [a - b for a, b in zip(times[name], end.samples, strict=True)]
        work = f"the `{name}` panel over {count} batches"
        while_streaming = Figure.ratios(stream, times["bare"]).median
        note = f"{while_streaming:.3f} x while it streams, and {end.median:.2f} s once at the end"
        yield Row(work, "x", Figure.ratios(times[name], times["bare"]), limit, whole, note=note)


def _memory(options: Options, name: str) -> Row:
    """The peak of a process that measures two or four times as much text, beside one that measures less."""
    few, many = (2, 4) if options.quick else COUNTS[name]
    growth = []
    # Minutes for `all`, whose allocator settles only after some batches.
    for _ in range(options.rounds(2) if name == "health" else 1):
        peaks = [_peak_of(name, count, options.threads) for count in (few, many)]
        growth.append((peaks[1]["measured"] - peaks[0]["measured"]) / 1e6)
    bare, measured = (peaks[1][which] / 1e6 for which in ("bare", "measured"))
    # 8 MB are the interpreter's play; one residual stream kept of each of the batches would be 450 MB.
    note = f"peak {measured:.0f} MB, of which {measured - bare:.0f} MB above the bare forward's"
    return Row(f"memory of `{name}`: {many} batches beside {few}", "MB", Figure(tuple(growth)), 8, note=note)


def _peak_of(name: str, count: int, threads_: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.panels", name, str(count), str(threads_)]
    where = Path(__file__).parents[1]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=where, env={**os.environ, **_EXACT})
    return json.loads(done.stdout.splitlines()[-1])


def _peak() -> float:
    """The largest resident memory of this process so far, in bytes."""
    try:
        # Not `getrusage`, in which a child begins at its parent's peak.
        line = next(one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith("VmHWM"))
        return 1024.0 * int(line.split()[1])
    except FileNotFoundError:
        import resource

        return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def _measure_peaks(name: str, count: int) -> dict[str, float]:
    for ids in batches(min(count, 2)):
        subjects.forward(subjects.gpt2(), ids)
    bare = _peak()
    actome.wrap(subjects.gpt2()).measure(batches(count), PANELS[name])
    return {"bare": bare, "measured": _peak()}


if __name__ == "__main__":
    panel, batches_, threads_ = sys.argv[1:]
    torch.set_num_threads(int(threads_))
    print(json.dumps(_measure_peaks(panel, int(batches_))))
