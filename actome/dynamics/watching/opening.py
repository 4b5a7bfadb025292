"""Opening: the run that a watch writes to, new or gone on with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from actome.core.errors import RunError

from ..store import RunStore
from ..writer import RunWriter


def open_run(to: Any, config: Any, resume: bool | int, store: Mapping[str, Any]) -> RunWriter:
    """The writer of a run.

    Args:
        to: a folder, or a writer that is open already.
        config: kept with a new run.
        resume: False for a new run, True to go on with one, or the step of the checkpoint that it goes on from.
        store: options of `RunWriter`.

    Raises:
        RunError: what `RunWriter` raises; no place to write to.
    """
    if isinstance(to, RunWriter):
        return to
    if to is None:
        raise RunError("a watch writes to a run: give run=, a folder such as 'runs/a'")
    if resume is False:
        return RunStore.create(to, config, **store)
    return RunStore.resume(to, from_step=None if resume is True else resume + 1, **store)


def first_weights(run: RunWriter) -> Tensor | None:
    """The entries of the weights that movement is measured from, where the run has them already."""
    kept = run.tensors
    return run.tensor("initial_weights") if (kept["name"] == "initial_weights").any() else None
