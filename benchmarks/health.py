"""The whole health panel over a stream of text: its time, and that its memory does not grow with the text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

import actome
from actome.measures.panels import PANELS

from . import subjects
from .row import Options, Row
from .timing import Figure, interleave, threads

NAME = "health"

# Makes the C library give every large block back at once, so that a peak is what was in use and not what was hoarded.
_EXACT = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def run(options: Options) -> Iterator[Row]:
    """On GPT-2 small, batches of 4 x 256 random tokens, made as they are needed."""
    with threads(options.threads):
        yield from _time(options)
    yield _memory(options)


def batches(count: int) -> Iterator[torch.Tensor]:
    """A stream of ids."""
    for seed in range(count):
        yield subjects.tokens(subjects.gpt2(), subjects.BATCH, subjects.LENGTH, seed)


def _time(options: Options) -> Iterator[Row]:
    module = subjects.gpt2()
    model, never = actome.wrap(module), subjects.twin(module)
    count = 2 if options.quick else 8
    ends: list[float] = []

    def bare() -> None:
        for ids in batches(count):
            subjects.forward(never, ids)

    def panel() -> None:
        start: list[float] = []
        model.measure(batches(count), PANELS["health"], progress=lambda _: start.append(time.perf_counter()))
        ends.append(time.perf_counter() - start[-1])

    times = interleave({"bare": bare, "panel": panel}, options.rounds(5), warmup=1)
    whole = Figure(tuple(times["bare"])).median
    # What is computed once from the totals, eigenvalues above all, does not grow with the text.
    end = Figure(tuple(ends[1:]))
    stream = Figure(tuple((a - b) / c for a, b, c in zip(times["panel"], end.samples, times["bare"], strict=True)))
    work = f"the `health` panel over {count} batches"
    ours, bare_words = Figure.ratios(times["panel"], times["bare"]), f"{whole:.2f} s"
    note = f"{stream.median:.3f} x while it streams, and {end.median:.2f} s once at the end"
    yield Row(work, "x", ours, 1.35, bare_words, note=note)


def _memory(options: Options) -> Row:
    """The peak of a process that measures four times as much text, beside one that measures less."""
    few, many = (2, 4) if options.quick else (4, 16)
    growth = []
    for _ in range(options.rounds(2)):
        peaks = [_peak_of(count, options.threads) for count in (few, many)]
        growth.append((peaks[1]["measured"] - peaks[0]["measured"]) / 1e6)
    bare, measured = (peaks[1][name] / 1e6 for name in ("bare", "measured"))
    # 8 MB are the interpreter's play; one residual stream kept of each of the batches would be 450 MB.
    note = f"peak {measured:.0f} MB, of which {measured - bare:.0f} MB above the bare forward's"
    return Row(f"memory of the panel: {many} batches beside {few}", "MB", Figure(tuple(growth)), 8, note=note)


def _peak_of(count: int, threads_: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.health", str(count), str(threads_)]
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


def _measure_peaks(count: int) -> dict[str, float]:
    for ids in batches(min(count, 2)):
        subjects.forward(subjects.gpt2(), ids)
    bare = _peak()
    actome.wrap(subjects.gpt2()).measure(batches(count), PANELS["health"])
    return {"bare": bare, "measured": _peak()}


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    print(json.dumps(_measure_peaks(int(sys.argv[1]))))
