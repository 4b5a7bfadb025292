"""How long one waits before anything happens."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from .row import Options, Row
from .timing import Figure

NAME = "imports"

# All in one process, so that only what actome adds is counted; the class is what every user of a model has imported.
_IMPORT = """
import time
start = time.perf_counter()
import torch, transformers
from transformers import GPT2LMHeadModel
libraries = time.perf_counter()
import actome
imported = time.perf_counter()
for name in actome.__all__:
    getattr(actome, name)
print(libraries - start, imported - libraries, time.perf_counter() - libraries)
"""


def run(options: Options) -> Iterator[Row]:
    """Fresh processes, after one that leaves the files in the system's cache."""
    count = options.rounds(15)
    _python("-c", _IMPORT), _python("-m", "actome", "--help")
    samples, helps, starts = [], [], []
    for _ in range(count):
        samples.append([float(word) for word in _python("-c", _IMPORT)[1].split()])
        starts.append(_python("-c", "")[0])
        helps.append(_python("-m", "actome", "--help")[0])
    libraries, imported, everything = (Figure(tuple(column)) for column in zip(*samples, strict=True))
    bare = f"{libraries.median:.2f} s"
    yield Row("`import actome`, beyond torch and transformers", "s", imported, 0.3, bare)
    yield Row("the same and every public name", "s", everything, None, bare, note="names are imported when first used")
    start = f"{Figure(tuple(starts)).median:.2f} s"
    yield Row("`actome --help`", "s", Figure(tuple(helps)), 0.5, start, note="the bare time is that of `python -c ''`")


def _python(*words: str) -> tuple[float, str]:
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *words], check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    return time.perf_counter() - start, done.stdout
