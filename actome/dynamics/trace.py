"""Trace: the same measurement over many checkpoints of one training, one of them in memory at a time."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actome.core.errors import ActomeError, LoadError, MeasureError, RunError, nearest
from actome.core.fold import Fold, _options
from actome.dynamics.schema import begun
from actome.dynamics.store import RunStore
from actome.dynamics.trace_inputs import Inputs, inputs_for, on_device, repeats_for
from actome.dynamics.trace_sources import Checkpoint, checkpoints
from actome.dynamics.trace_table import DONE, KIND, LEFT_OUT, Trace
from actome.dynamics.trace_weights import differing, shapes_of

if TYPE_CHECKING:
    import pandas as pd

    from actome.core.model import Model
    from actome.dynamics.writer import RunWriter
    from actome.measures.panels import Panel

TOKENS = 16_384  # enough for an effective rank of a width of some hundreds
REPEATS = 16  # rows of repeated random tokens
_SAME = ("source", "panel", "text", "repeats", "seed", "loading")  # what a trace that goes on must have in common
_WORDS = {"text": "text", "panel": "panel", "source": "source", "loading": "dtype or loading options"}


def trace(
    source: Any,
    panel: Any = "geometry",
    *,
    text: Any = None,
    tokens: int | None = TOKENS,
    context: int | None = None,
    repeats: int | None = None,
    revisions: str | Iterable[str] | None = None,
    steps: Iterable[int] | None = None,
    model: Any = None,
    tokenizer: Any = None,
    out: str | os.PathLike[str] | None = None,
    on_error: str = "raise",
    batch_size: int = 8,
    seed: int = 0,
    progress: Callable[[int, int, int], None] | None = None,
    api: Any = None,
    **loading: Any,
) -> Trace:
    """Measures the same on the same text at every checkpoint of a training, in order of step.

    One checkpoint is in memory at a time. With `out`, what was measured is committed after each, and a second call goes
    on where the first was interrupted, or adds checkpoints that have come since.

    Args:
        source: a folder of checkpoints, a hub id, ``"demo"``, a `Training`, or pairs (step, folder, weights, model or
            function); see `checkpoints`.
        panel: name of a set of measures (the loss is measured with it), a `Panel`, or ``{pattern: measures}`` as
            `Model.measure` takes them.
        text: what is read: a file, a folder, a list of strings, a `Text`, token ids or other inputs as a tensor, or an
            iterable of batches; by default held-out text that ships with Python.
        tokens: how many tokens of a text are read at most; None for all.
        context: tokens in a row; what the models take, up to 512.
        repeats: rows of repeated random tokens on which the previous-token and induction scores of heads are measured
            besides; 16 with a named panel, none with one's own measures.
        revisions: of a hub id, patterns such as ``"step*"``.
        steps: only these.
        model: for checkpoints that are weights alone: what to load them into.
        tokenizer: for models that come without one.
        out: folder of the run store that the trace is kept in.
        on_error: ``"raise"``, or ``"skip"`` for leaving out checkpoints that are missing, corrupt or of another
            architecture, with the reason in `Trace.left_out`.
        batch_size: rows in a batch.
        seed: of the repeats.
        progress: called after each checkpoint with how many are done, how many there are, and the step.
        api: in place of ``huggingface_hub.HfApi()``.
        loading: options of `actome.load`, such as ``dtype="bfloat16"`` and ``device="cuda"``.

    Raises:
        LoadError: no checkpoints; one that is missing, corrupt or of another architecture than the first.
        RunError: `out` holds a trace of another source, text or panel, or something else.
        MeasureError, TextError: nothing that could be measured, no text, or no tokenizer to read it with.

    Example:
        >>> from actome.measures import ActivationScale
        >>> found = trace("demo", {"blocks.3.resid.post": ActivationScale()}, steps=[0, 8192], text=["one two three"])
        >>> found.curve("rms").round(1).to_dict()
        {0: 0.2, 8192: 4.0}
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error={on_error!r}: choose 'raise' or 'skip'")
    measures, about_panel = _panel(panel)
    found = checkpoints(
        source, revisions=revisions, steps=steps, model=model, tokenizer=tokenizer, api=api, **loading
    )  # fmt: skip
    rows = (REPEATS if isinstance(panel, str) else 0) if repeats is None else repeats
    job = _Job(
        measures, rows, seed, batch_size, on_error == "skip",
        {"source": found.label, "panel": about_panel, "repeats": rows, "seed": seed, "loading": _plainly(loading)},
        lambda first: inputs_for(
            first, text, tokens=tokens, context=context, batch_size=batch_size, tokenizer=tokenizer
        ),
    )  # fmt: skip
    with ExitStack() as stack:
        if out is not None and begun(Path(out).expanduser()):
            job.go_on(Path(out).expanduser())
        for step, reason in found.missing.items():
            job.leave_out(step, f"step {step}", LoadError(reason))
        # When nothing is left to measure, one is opened all the same: only its tokenizer says whether the text is new.
        todo = [one for one in found.items if not job.has(one)]
        for one in todo or found.items[:1]:
            measured = job.measured(one, only_look=not todo)
            if one.fresh:
                gc.collect()  # a wrapped module is part of cycles; the next must not find it in memory
            if out is not None and job.store is None and job.inputs is not None:
                job.keep_in(stack, Path(out).expanduser())
            if measured is not None and todo:
                job.commit(one, measured)
            if progress is not None:
                progress(len(job.done) + len(job.left_out), len(found.items) + len(found.missing), one.step)
        if not job.done:
            reasons = "; ".join(job.left_out.values())
            raise LoadError(
                f"none of the {len(job.left_out)} checkpoints of {found.label} could be measured: {reasons}"
            )
        return job.result(found.passed_over)


class _Job:
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


def _panel(panel: Any) -> tuple[Any, Any]:
    """What `Model.measure` takes, and how the store says it."""
    from actome.measures.panels import PANELS, Panel

    if isinstance(panel, str):
        if panel not in PANELS:
            raise MeasureError(f"there is no panel {panel!r}{nearest(panel, PANELS)}; there are: {', '.join(PANELS)}")
        return _with_loss(PANELS[panel]), panel
    if isinstance(panel, Panel):
        return panel, panel.name
    if not isinstance(panel, Mapping) or not panel:
        raise MeasureError(f"a panel is a name, a Panel or {{pattern: measures}}, not {panel!r}")
    listed = {key: one if isinstance(one, list | tuple) else [one] for key, one in panel.items()}
    said = {str(key): [_said(one) for one in some] for key, some in listed.items()}
    return panel, said


def _with_loss(panel: Panel) -> Panel:
    """With the loss, which is the clock that everything else is read against."""
    from actome.measures.loss import NextTokenLoss

    measured = any(NextTokenLoss in makes for _, makes in panel)
    return panel if measured else replace(panel, entries=(*panel.entries, (("logits",), (NextTokenLoss,))))


def _said(measure: Any) -> str:
    """A measure with its options, so that a trace that goes on can tell whether they are the same."""
    made = measure() if callable(measure) and not isinstance(measure, Fold) else measure
    return f"{type(made).__name__}({', '.join(f'{k}={v!r}' for k, v in sorted(_options(made).items()))})"


def _plainly(loading: Mapping[str, Any]) -> dict[str, str]:
    return {key: str(value).removeprefix("torch.") for key, value in loading.items() if key != "device"}
