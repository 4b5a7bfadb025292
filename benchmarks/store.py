"""How many rows the run store takes a second, and what they weigh; only when named."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from actome.dynamics import RunDigest, RunStore, RunWriter

from .row import Options, Row
from .timing import Figure

NAME = "store"

# The store promises 100,000 rows a second: ten seconds for a million.
_LIMIT = 10.0


def run(options: Options) -> Iterator[Row]:
    """Seconds for a million rows, each in a new run on the disk of the temporary folder; from the first call to a
    closed file."""
    count = 100_000 if options.quick else 1_000_000
    rounds = options.rounds(5)

    def scalars(run: RunWriter, many: int) -> None:
        values = {f"measure{i}": 0.1 * i for i in range(many)}
        for step in range(count // many):
            run.log(step, values)

    frame = pd.DataFrame(
        {
            "site": np.repeat([f"blocks.{i}.attn.pattern" for i in range(12)], 12),
            "layer": pd.array(np.repeat(range(12), 12), dtype="Int64"),
            "head": pd.array(np.tile(range(12), 12), dtype="Int64"),
            "measure": "sink",
            "value": np.linspace(0, 1, 144),
        }
    )
    units = pd.DataFrame(
        {"site": "mlp", "unit": pd.array(range(count // 10), dtype="Int64"), "measure": "rate", "value": 0.5}
    )

    def tables(run: RunWriter, table: pd.DataFrame) -> None:
        for step in range(count // len(table)):
            run.log_rows(table, step)

    works: dict[str, Callable[[RunWriter], None]] = {
        "scalars, 10 a call": lambda run: scalars(run, 10),
        "scalars, 1 a call": lambda run: scalars(run, 1),
        "tidy rows, tables of 144 (12 layers x 12 heads)": lambda run: tables(run, frame),
        f"tidy rows, tables of {len(units):,} units": lambda run: tables(run, units),
    }
    for name, work in works.items():
        seconds, size = [], 0.0
        for _ in range(rounds):
            with _folder() as folder:
                start = time.perf_counter()
                with RunStore.create(folder) as run:
                    work(run)
                seconds.append((time.perf_counter() - start) * 1_000_000 / count)
                size = os.path.getsize(folder / "run.sqlite") / count
        figure = Figure(tuple(seconds))
        yield Row(name, "s", figure, _LIMIT, note=f"{1 / figure.median:.2f} M rows a second; {size:.0f} bytes a row")
    yield from _one_call(options)
    yield from _reading(count, rounds)


def _one_call(options: Options) -> Iterator[Row]:
    """What the training loop itself waits for."""
    samples, most = [], 0.0
    values = {f"measure{i}": 0.1 * i for i in range(10)}
    for _ in range(options.rounds(5)):
        with _folder() as folder, RunStore.create(folder) as run:
            some = []
            for step in range(5_000):
                start = time.perf_counter()
                run.log(step, values)
                some.append(1e3 * (time.perf_counter() - start))
        samples.append(float(np.median(some)))
        most = max(most, *some)
    yield Row(
        "one call with 10 scalars", "ms", Figure(tuple(samples)), note=f"the longest, with a commit: {most:.1f} ms"
    )


def _reading(count: int, rounds: int) -> Iterator[Row]:
    with _folder() as folder:
        with RunStore.create(folder) as run:
            for step in range(count // 10):
                run.log(step, {f"measure{i}": 0.1 * i for i in range(10)})
        store = RunStore.open(folder)
        looks = {
            "read all as a table": store.frame,
            "read one measure of ten": lambda: store.scalars("measure3"),
            "read all as a digest": lambda: RunDigest(store).refresh(),
        }
        for name, look in looks.items():
            seconds = []
            for _ in range(rounds):
                start = time.perf_counter()
                look()
                seconds.append((time.perf_counter() - start) * 1_000_000 / count)
            yield Row(name, "s", Figure(tuple(seconds)), note="of a million rows")
        yield _news(folder, count, rounds)


def _news(folder: Path, count: int, rounds: int) -> Row:
    """What a live view pays for what is new, in a run of a million rows."""
    milliseconds = []
    with RunStore.resume(folder, seconds=60.0) as run:
        digest = RunDigest(RunStore.open(folder))
        digest.refresh()
        for i in range(10 * rounds):
            for step in range(100):
                run.log(count + 100 * i + step, {f"measure{i}": 0.1 * i for i in range(10)})
            run.commit()
            start = time.perf_counter()
            digest.refresh()
            milliseconds.append(1e3 * (time.perf_counter() - start))
    return Row("a digest reads 1,000 new rows", "ms", Figure(tuple(milliseconds)), note="after a million")


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="actome-store-"))
    try:
        yield folder / "run"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
