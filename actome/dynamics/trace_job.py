"""Job: the state of a trace while it is made: what is read, what is done, what is left out, and the store."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actome.core.errors import ActomeError, LoadError, RunError
from actome.dynamics.store import RunStore
from actome.dynamics.trace_inputs import Inputs, on_device, repeats_for
from actome.dynamics.trace_sources import Checkpoint
from actome.dynamics.trace_table import DONE, KIND, LEFT_OUT, Trace
from actome.dynamics.trace_weights import differing, shapes_of

if TYPE_CHECKING:
    import pandas as pd

    from actome.core.model import Model
    from actome.dynamics.writer import RunWriter

_SAME = ("source", "panel", "text", "repeats", "seed", "loading")  # what a trace that goes on must have in common
_WORDS = {"loading": "dtype or loading options"}


class Job:
    """The state of one trace while it is made."""

    def __init__(
        self, measures: Any, rows: int, seed: int, batch_size: int, skip: bool, about: dict[str, Any],
        read: Callable[[Model], Inputs],
    ):  # fmt: skip
        self.measures, self.rows, self.seed, self.batch_size, self.skip = measures, rows, seed, batch_size, skip
        self.about, self.read = about, read
        self.inputs: Inputs | None = None
        self.repeats: Inputs | None = None
        self.first: dict[str, Any] | None = None  # name, facts and shapes of the first architecture
        self.before: dict[str, Any] = {}  # the configuration of the trace that is gone on with
        self.path: Path | None = None
        self.store: RunWriter | None = None
        self.done: dict[int, str | None] = {}
        self.left_out: dict[int, str] = {}
        self.frames: dict[int, pd.DataFrame] = {}
        self.notes: dict[str, None] = {}

    # -- one checkpoint -----------------------------------------------------------------------------------------------

    def measured(self, checkpoint: Checkpoint, only_look: bool = False) -> pd.DataFrame | None:
        """The rows of a checkpoint; None when it is left out."""
        from actome.measures.induction import InductionScore
        from actome.tasks.demo import _without_progress_bar

        try:
            with _without_progress_bar():
                model = checkpoint.open()
            self._same_architecture(model, checkpoint)
        except (ActomeError, OSError) as error:
            self.leave_out(checkpoint.step, checkpoint.name, error)
            return None
        if self.inputs is None:
            self._first_inputs(model)
        if only_look:
            return None
        try:
            tables = [(self.measures, self.inputs)]
            tables += [({"blocks.*.attn.pattern": InductionScore()}, self.repeats)] if self.repeats else []
            frames = []
            for measures, inputs in tables:
                batches = (on_device(batch, model.device) for batch in inputs.batches)
                table = model.measure(batches, measures, batch_size=self.batch_size)
                self.notes.update(dict.fromkeys(f"not measured: {reason}" for reason in table.skipped))
                frames.append(table.frame)
        except ActomeError as error:
            raise type(error)(f"{_called(checkpoint)}: {error}") from error
        return _tidied(frames)

    def _first_inputs(self, model: Model) -> None:
        self.inputs = self.read(model)
        self.about["text"] = self.inputs.mark
        self.about["reads"] = self.inputs.about
        if self.rows:
            self.repeats = repeats_for(model, self.rows, self.seed, self.batch_size)
            if self.repeats is None:
                self.notes["not measured: induction, for the model has no causal attention pattern over tokens"] = None
        self._refuse_another()

    def _same_architecture(self, model: Model, checkpoint: Checkpoint) -> None:
        shapes, facts = shapes_of(model.module), model.info
        if self.first is None:
            self.first = {"name": checkpoint.name, "step": checkpoint.step, "facts": facts, "shapes": shapes}
            return
        wanted = {name: tuple(shape) for name, shape in self.first["shapes"].items()}
        if shapes == wanted:
            return
        keys = [k for k in ("class", "layers", "d_model", "head", "d_mlp", "vocab") if k in facts]
        apart = [
            f"{k} {self.first['facts'].get(k)} and {facts[k]}" for k in keys if facts[k] != self.first["facts"].get(k)
        ]
        raise LoadError(
            f"{checkpoint.name} (step {checkpoint.step}) is of another architecture than {self.first['name']} (step "
            f"{self.first['step']}): {', '.join(apart) or differing(wanted, shapes)}; a trace is of one training"
        )

    def leave_out(self, step: int, name: str, error: BaseException) -> None:
        """Raises, or notes why a checkpoint is not part of the trace."""
        said = str(error) if name in str(error) else f"{name}: {error}"
        if not self.skip:
            raise LoadError(f"step {step}: {said} (on_error='skip' leaves it out)") from error
        self.left_out[step] = said
        if self.store is not None:
            self.store.event(LEFT_OUT, step, checkpoint=name, reason=said)

    def commit(self, checkpoint: Checkpoint, frame: pd.DataFrame) -> None:
        """Keeps the rows of a checkpoint, in the store in one transaction with the note that it is done."""
        mark = None
        if self.store is None:
            self.frames[checkpoint.step] = frame
        else:
            mark = checkpoint.mark()
            self.store.log_rows(frame, step=checkpoint.step)
            self.store.event(DONE, checkpoint.step, checkpoint=checkpoint.name, mark=mark, notes=list(self.notes))
            self.store.commit()
        self.done[checkpoint.step] = mark
        self.left_out.pop(checkpoint.step, None)

    # -- going on -----------------------------------------------------------------------------------------------------

    def go_on(self, path: Path) -> None:
        """Takes over what a store holds already."""
        run = RunStore.open(path)
        try:
            self.before, events = run.config, run.events
        finally:
            run.close()
        if self.before.get("kind") != KIND:
            raise RunError(f"{path} holds a run that is no trace; choose another folder")
        self.path, self.first = path, self.before["architecture"]
        self._refuse_another()
        for event in events[events["name"] == DONE].itertuples():
            self.done[int(event.step)] = event.data["mark"]
            self.notes.update(dict.fromkeys(event.data["notes"]))

    def has(self, checkpoint: Checkpoint) -> bool:
        """Whether a checkpoint was measured before, as it is now."""
        if checkpoint.step not in self.done:
            return False
        then, now = self.done[checkpoint.step], checkpoint.mark()
        if then is not None and now is not None and then != now:
            raise RunError(
                f"{_called(checkpoint)} holds other weights than when {self.path} was begun: it is another training "
                "now; choose another folder for its trace"
            )
        return True

    def _refuse_another(self) -> None:
        for key in _SAME if self.before else ():
            if key in self.about and key in self.before and self.about[key] != self.before[key]:
                then, now = (about.get("reads") if key == "text" else about[key] for about in (self.before, self.about))
                raise RunError(
                    f"{self.path} holds a trace of another {_WORDS.get(key, key)} ({then} then, {now} now); choose "
                    "another folder, or the same as before"
                )

    def keep_in(self, stack: ExitStack, path: Path) -> None:
        """Opens the store for writing, once it is known what is read."""
        assert self.first is not None
        if self.before:
            self.store = stack.enter_context(RunStore.resume(path))
        else:
            config = {"kind": KIND, **self.about, "architecture": self.first, "model": self.first["facts"]}
            self.store = stack.enter_context(RunStore.create(path, config=config, seed=self.seed))
        for step, reason in self.left_out.items():
            self.store.event(LEFT_OUT, step, checkpoint=f"step {step}", reason=reason)

    def result(self, passed_over: tuple[str, ...]) -> Trace:
        import pandas as pd

        if self.store is not None:
            self.store.commit()
            return Trace.from_run(self.store)
        assert self.first is not None
        frame = pd.concat([one.assign(step=step) for step, one in sorted(self.frames.items())], ignore_index=True)
        about = {**self.about, "model": self.first["facts"], "made": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        return Trace(frame, about, dict(self.left_out), (*self.notes, *passed_over))


def _called(checkpoint: Checkpoint) -> str:
    number = str(checkpoint.step)
    return checkpoint.name if number in checkpoint.name else f"step {number} ({checkpoint.name})"


def _tidied(frames: list[pd.DataFrame]) -> pd.DataFrame:
    """The rows without those of single units, of which a model may have a million at every step."""
    import pandas as pd

    frame = pd.concat([one for one in frames if len(one)], ignore_index=True)
    return frame[frame["unit"].isna()].drop(columns="unit") if "unit" in frame else frame
