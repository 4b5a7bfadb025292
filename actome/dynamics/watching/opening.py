"""Opening: the run that a watch writes to, new or gone on with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from actome.core.errors import RunError

from ..schema import begun
from ..store import RunStore
from ..writer import RunWriter

_INITIAL = "initial_weights"


@dataclass(frozen=True)
class Opening:
    """How a run is begun.

    Attributes:
        to: a folder, or a writer that is open already.
        config: kept with a new run.
        resume: False for a new run, True to go on with one, or the step of the checkpoint that it goes on from.
        start: how many steps the training has made that a new run is of.
        store: options of `RunWriter`.
    """

    to: Any
    config: Any
    resume: bool | int
    start: int
    store: Mapping[str, Any]

    @property
    def path(self) -> Path:
        """The folder."""
        return self.to.path if isinstance(self.to, RunWriter) else Path(self.to).expanduser()

    def open(self) -> RunWriter:
        """The writer.

        Raises:
            RunError: what `RunWriter` raises; no place to write to.
        """
        if isinstance(self.to, RunWriter):
            return self.to
        if self.to is None:
            raise RunError("a watch writes to a run: give run=, a folder such as 'runs/a'")
        if self.resume is False:
            if begun(self.path) and not self.store.get("overwrite"):
                raise RunError(
                    f"{self.path} holds a run already: resume=True, or the step of the checkpoint, goes on with it, "
                    "store={'overwrite': True} deletes it; or choose another folder"
                )
            return RunStore.create(self.to, self.config, **self.store)
        first = None if self.resume is True else self.resume + 1
        return RunStore.resume(self.to, from_step=first, **self.store)

    def step(self, run: RunWriter) -> int:
        """The step that has been made before this."""
        if self.resume is False:
            return self.start
        if self.resume is not True:
            return int(self.resume)
        last = run.runs["last_step"].iloc[-1]
        return 0 if last != last else int(last)


def first_weights(run: RunWriter) -> Tensor | None:
    """The entries of the weights that movement is measured from, where the run has them already."""
    return run.tensor(_INITIAL) if (run.tensors["name"] == _INITIAL).any() else None


def keep_weights(run: RunWriter, step: int, entries: Tensor) -> None:
    """Keeps them, for whoever goes on with this run."""
    run.log_tensor(step, _INITIAL, entries)
