"""Recording: bringing tensors out of a forward, in memory or streamed to disk."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .capture import Capture, Plan, Selection
from .errors import RecordingError, SiteError
from .plain import module_dims
from .recording import Recording
from .select import take_positions
from .sites import Site
from .taps import StopForward

if TYPE_CHECKING:
    from .model import Model


def record(
    model: Model,
    inputs: Any,
    sites: str | Sequence[str],
    *,
    positions: Any = None,
    heads: Any = None,
    units: Any = None,
    dtype: torch.dtype | None = None,
    device: Any = None,
    grad: bool = False,
    stop: bool = True,
    out: str | Path | None = None,
    append: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    batch_size: int = 8,
    progress: Callable[[int], None] | None = None,
) -> Recording:
    """Brings the activations at some sites out of the model.

    Records are copies: nothing that happens to the model's tensors later changes them. Padding is marked by the
    recording's mask and never stored on disk. Clamps that are active show in what is recorded.

    Args:
        inputs: text, a list of texts, ids (pos) or (batch, pos), a dict of forward arguments, or a `Text`, which is
            streamed batch by batch.
        sites: names or patterns.
        positions: int, list, range or slice, counted from each row's first real token, negative from its last. Only
            these are copied. Rows must have equally many of them.
        heads, units: indices in the head dim and in the last dim.
        dtype, device: of what is recorded; the model's by default.
        grad: record the very tensors of the graph, for gradients of and with respect to them (in-memory only).
        stop: end the forward after the last site that is needed; nothing is lost but time.
        out: a folder to stream to, see `docs/recording-format.md`; the result is then lazily opened from it.
        append, resume, overwrite: what to do when that folder exists: add to it, go on after an interruption with
            the same text, or replace it.
        batch_size: rows a batch when `inputs` is a list of texts and `out` is given.
        progress: called with the number of tokens done.

    Returns:
        A `Recording`: ``rec[site]`` has the site's dims, ``rec["blocks.*.resid.post"]`` a layer dim in front.

    Raises:
        SiteError: an unknown site, head or unit.
        RecordingError: the folder exists, or cannot be written.

    Example:
        >>> import actome as ac
        >>> model = ac.demo()
        >>> rec = model.record(["import os", "def f(x):"], "blocks.*.attn.pattern", positions=-1, heads=[0])
        >>> rec["blocks.0.attn.pattern"].shape[:3]
        torch.Size([2, 1, 1])
    """
    plan = _plan(model, model.match(sites))
    last = _last_needed(model, plan) if stop and not grad else None
    job = Job(model, plan, Selection(positions, heads, units), dtype, device, last, grad)
    if out is None and not _is_stream(inputs):
        return _record_once(job, inputs)
    if grad:
        raise RecordingError("grad=True keeps a graph in memory; it cannot be streamed. Give one batch and no out=")
    from .streaming import record_to_disk, record_to_memory

    if out is None:
        return record_to_memory(job, inputs, progress)
    modes = {"append": append, "resume": resume, "overwrite": overwrite}
    return record_to_disk(job, inputs, Path(out), modes, batch_size, progress)


@dataclass(slots=True)
class Job:
    """One recording: what to record of which model, and how."""

    model: Model
    plan: Plan
    selection: Selection
    dtype: torch.dtype | None
    device: Any
    stop: str | None
    grad: bool = False

    def forward(self, arguments: dict[str, Any], mask: Tensor | None) -> Capture:
        """Runs one forward and returns what was captured; every site must have been reached."""
        source = None if self.selection.positions is None else _padding(arguments)
        capture = Capture(
            self.plan, self.selection, self.dtype, self.device, grad=self.grad, mask=mask, source=source, stop=self.stop
        )
        graph = torch.enable_grad() if self.grad and torch.is_grad_enabled() else torch.no_grad()
        with self.model.tap(capture.taps), graph, contextlib.suppress(StopForward):
            self.model.module(**arguments)
        if len(capture.tensors) < len(self.plan.sites):
            missing = [site.name for site in self.plan.asked if site.name not in capture.tensors]
            raise SiteError(f"the forward did not reach {', '.join(missing[:4])}; is it used for these inputs?")
        return capture

    def tokens(self, ids: Tensor | None, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The ids and the mask of what was recorded."""
        if self.selection.positions is None or ids is None:
            return ids, mask
        return take_positions(ids, 1, self.selection.positions, mask), None

    def dims(self, tensors: dict[str, Tensor]) -> dict[str, tuple[str, ...]]:
        """The dims of what was recorded; those of plain modules are told from the tensors."""
        if self.plan.fixed:
            return self.plan.dims
        return {site.name: site.dims or module_dims(site, tensors[site.name]) for site in self.plan.asked}


def _padding(arguments: dict[str, Any]) -> Tensor | None:
    """Which tokens of the (encoder's) input are real; ``None`` when all are."""
    mask = arguments.get("attention_mask")
    return None if mask is None or mask.ndim != 2 or bool(mask.all()) else mask.bool()


def _plan(model: Model, sites: tuple[Site, ...]) -> Plan:
    plan = model.plans.get(sites)
    if plan is None:
        plan = model.plans[sites] = Plan(sites)
    return plan


def _is_stream(inputs: Any) -> bool:
    if isinstance(inputs, (Tensor, str, list, dict)):
        return False
    from .text import Text

    return isinstance(inputs, Text)


def _record_once(job: Job, inputs: Any) -> Recording:
    arguments, ids, mask = job.model.arguments(inputs)
    capture = job.forward(arguments, mask)
    stacks = {site.stack for site in job.plan.asked}
    if stacks == {"encoder"}:
        ids, mask = arguments.get("input_ids"), _padding(arguments)
    elif stacks == {"vision"} or (len(stacks & {"encoder", "vision"}) and job.selection.positions is not None):
        ids = mask = None  # there are no tokens, or more than one sequence of them was cut
    ids, mask = job.tokens(ids, mask)
    return Recording(
        capture.tensors,
        job.dims(capture.tensors),
        tokens=ids,
        mask=mask,
        stacks=capture.stacks(),
        meta={"model": job.model.name},
    )


def _last_needed(model: Model, plan: Plan) -> str | None:
    """The site after which the forward may end: the last of those recorded and of those under an active clamp."""
    order = model.order
    if plan.last is None:
        names = [site.name for site in plan.asked]
        # Of plain modules nobody knows which comes last.
        plan.last = max(names, key=order.__getitem__) if all(name in order for name in names) else ""
    for context in model.clamped:
        for one in context.active:
            if order.get(one.site.name, len(order)) > order.get(plan.last, -1):
                return None
    return plan.last or None
