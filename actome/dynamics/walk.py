"""A run's checkpoints in order of their steps, however they are kept; one in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
from torch import nn

from actome.core.errors import MeasureError
from actome.tasks.training import Training

T = TypeVar("T")
Checkpoints = Training | Mapping[int, nn.Module] | Iterable[tuple[int, nn.Module]]


def walk(run: Checkpoints) -> Iterator[tuple[float, Any]]:
    """The steps and modules of one run.

    Args:
        run: a `Training` with checkpoints; modules by step; or an iterator of (step, module), which may load each one
            only when it is asked for.

    Raises:
        MeasureError: no checkpoint, or steps that do not rise.

    >>> list(walk({10: "b", 0: "a"}))
    [(0.0, 'a'), (10.0, 'b')]
    """
    if isinstance(run, Training):
        pairs: Iterable[tuple[float, Any]] = ((step, run.at(step)) for step in sorted(run.checkpoints))
    elif isinstance(run, Mapping):
        pairs = ((step, run[step]) for step in sorted(run))
    else:
        pairs = run
    last = None
    for step, module in pairs:
        if last is not None and step <= last:
            raise MeasureError(f"checkpoint {step} comes after {last}; give the checkpoints of a run in rising order")
        last = float(step)
        yield last, module
    if last is None:
        raise MeasureError("a run without checkpoints; train(..., checkpoints='log') keeps some")


def over_runs(runs: Any, look: Callable[[Any], T]) -> tuple[np.ndarray, list[list[T]]]:
    """What `look` makes of every checkpoint of one run, or of several in a list or tuple.

    Returns:
        The steps (steps), and for each run a list over them.

    Raises:
        MeasureError: no run, or runs of different steps.

    >>> over_runs([{0: 3, 10: 4}, {0: 5, 10: 6}], lambda module: module + 1)
    (array([ 0., 10.]), [[4, 5], [6, 7]])
    """
    steps: list[float] | None = None
    found = []
    for run in runs if isinstance(runs, list | tuple) else [runs]:
        pairs = [(step, look(module)) for step, module in walk(run)]
        seen = [step for step, _ in pairs]
        if steps is not None and seen != steps:
            raise MeasureError(
                f"runs of different checkpoints, {len(steps)} up to step {steps[-1]:g} and {len(seen)} up to "
                f"{seen[-1]:g}; keep the same steps in all"
            )
        steps = seen
        found.append([one for _, one in pairs])
    if steps is None:
        raise MeasureError("no run was given")
    return np.array(steps), found
