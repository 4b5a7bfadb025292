"""Trace: the same measurement over many checkpoints of one training, one of them in memory at a time."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actome.core.errors import LoadError, MeasureError, nearest
from actome.core.fold import Fold, _options
from actome.dynamics.schema import begun
from actome.dynamics.trace_inputs import inputs_for
from actome.dynamics.trace_job import Job
from actome.dynamics.trace_sources import checkpoints
from actome.dynamics.trace_table import Trace

if TYPE_CHECKING:
    from actome.measures.panels import Panel

TOKENS = 16_384  # enough for an effective rank of a width of some hundreds
REPEATS = 16  # rows of repeated random tokens


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
        {0: 0.1, 8192: 5.4}
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error={on_error!r}: choose 'raise' or 'skip'")
    measures, about_panel = _panel(panel)
    found = checkpoints(
        source, revisions=revisions, steps=steps, model=model, tokenizer=tokenizer, api=api, **loading
    )  # fmt: skip
    rows = (REPEATS if isinstance(panel, str) else 0) if repeats is None else repeats
    job = Job(
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
