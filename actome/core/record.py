"""Recording: bringing tensors out of a forward, in memory or streamed to disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .clamp import chosen
from .errors import RecordingError, SiteError
from .plain import module_dims
from .recording import Recording
from .run import absolute
from .sites import Site
from .taps import Kind, Point, StopForward, Tap

if TYPE_CHECKING:
    from .model import Model

_TIME = ("pos", "query")
_HEADS = ("head", "kv_head")


class _Group:
    """Sites of one shape that are written into one buffer, layer after layer."""

    __slots__ = ("buffer", "device", "dtype", "names", "shape", "slots", "whole")

    def __init__(self, names: tuple[str, ...], dtype: torch.dtype | None, device: Any):
        self.names, self.dtype, self.device = names, dtype, device
        self.buffer: Tensor | None = None
        self.whole = len(names) > 1

    def store(self, x: Tensor, i: int) -> Tensor:
        """A copy of `x`, in the group's buffer when its shape is that of the others."""
        if self.buffer is None:
            dtype, device = self.dtype or x.dtype, self.device or x.device
            if not self.whole:
                self.buffer = x.to(device=device, dtype=dtype, copy=True)
                return self.buffer
            self.buffer = torch.empty((len(self.names), *x.shape), dtype=dtype, device=device)
            self.slots, self.shape = self.buffer.unbind(0), x.shape
        if x.shape != self.shape or (self.dtype is None and x.dtype != self.buffer.dtype):
            # Not only widths differ: a stream kept in float32 may start from an embedding in bfloat16.
            self.whole = False
            return x.to(device=self.buffer.device, dtype=self.dtype or x.dtype, copy=True)
        return self.slots[i].copy_(x)


class Selection:
    """What a recording cuts out of each tensor before it copies: positions, heads and units."""

    def __init__(self, positions: Any = None, heads: Any = None, units: Any = None):
        self.positions, self.heads, self.units = positions, heads, units
        self.everything = positions is None and heads is None and units is None

    def cutter(self, site: Site, sites: Sequence[Site], mask: Tensor | None) -> Callable[[Tensor], Tensor] | None:
        """The function that cuts a tensor of `site`, or ``None`` when all of it is wanted."""
        if self.everything:
            return None
        steps: list[Callable[[Tensor], Tensor]] = []
        dims = site.dims
        if self.positions is not None:
            axis = next((i for i, d in enumerate(dims) if d in _TIME), None)
            if axis is not None:
                steps.append(lambda x, a=axis: take_positions(x, a, self.positions, mask))
        if self.heads is not None:
            axis = next((i for i, d in enumerate(dims) if d in _HEADS), None)
            if axis is not None:
                index = chosen(self.heads, site.sizes[axis], f"{site.name}: head")
                steps.append(lambda x, a=axis, i=index: take(x, a, i))
            elif not any(d in _HEADS for s in sites for d in s.dims):
                raise SiteError(f"{site.name} has no heads (its dims are {', '.join(dims)}); leave out heads=")
        if self.units is not None:
            index = chosen(
                self.units, site.sizes[-1] if site.sizes else None, f"{site.name}: {dims[-1] if dims else 'unit'} unit"
            )
            steps.append(lambda x, i=index: take(x, x.ndim - 1, i))

        def cut(x: Tensor) -> Tensor:
            for step in steps:
                x = step(x)
            return x

        return cut


class Capture:
    """The taps of one recording and what they caught.

    Args:
        plan: (site, local name, index in its group) for each site, and the names of each group.
        selection: what to cut out; `mask` (batch, pos) says where each row's tokens are, `source` where those of an
            encoder are.
        grad: catch the tensors of the graph themselves.
        stop: the name of the site after which nothing more is needed, or ``None`` to run to the end.
    """

    def __init__(
        self,
        plan: Plan,
        selection: Selection,
        dtype: torch.dtype | None = None,
        device: Any = None,
        *,
        grad: bool = False,
        mask: Tensor | None = None,
        source: Tensor | None = None,
        stop: str | None = None,
    ):
        self.tensors: dict[str, Tensor] = {}
        self.groups = {local: _Group(names, dtype, device) for local, names in plan.groups.items()}
        self.taps: list[tuple[Point, Tap, Kind]] = []
        for site, local, index in plan.sites:
            cut = selection.cutter(site, plan.asked, {"encoder": source, "vision": None}.get(site.stack, mask))
            ends = site.name == stop
            tap = (
                self._keeper(site.name, cut, dtype, device)
                if grad
                else self._copier(site.name, cut, self.groups[local], index, ends)
            )
            self.taps.append((site.address, tap, "keep" if grad else "read"))

    def _copier(self, name: str, cut: Any, group: _Group, index: int, ends: bool) -> Tap:
        tensors = self.tensors

        def copy(x: Tensor) -> None:
            x = x.detach() if x.requires_grad else x
            tensors[name] = group.store(x if cut is None else cut(x), index)
            if ends:
                raise StopForward

        return copy

    def _keeper(self, name: str, cut: Any, dtype: torch.dtype | None, device: Any) -> Tap:
        def keep(x: Tensor) -> None:
            x = x if cut is None else cut(x)
            x = x if dtype is None and device is None else x.to(device=device, dtype=dtype)
            if x.requires_grad:
                x.retain_grad()
            self.tensors[name] = x

        return keep

    def stacks(self) -> dict[str, tuple[Tensor, tuple[str, ...]]]:
        """The buffers that hold all sites of one shape: local name -> ((layer, batch, pos, ...), names)."""
        return {
            local: (group.buffer, group.names)
            for local, group in self.groups.items()
            if group.whole and group.buffer is not None
        }


class Plan:
    """How a choice of sites is grouped; made once for each choice and kept with the model."""

    def __init__(self, sites: tuple[Site, ...]):
        groups: dict[str, list[str]] = {}
        self.asked = sites
        self.sites: list[tuple[Site, str, int]] = []
        for site in sites:
            local = site.local if site.layer is not None else site.name
            names = groups.setdefault(local, [])
            self.sites.append((site, local, len(names)))
            names.append(site.name)
        self.groups = {local: tuple(names) for local, names in groups.items()}
        self.dims = {site.name: site.dims for site in sites}
        self.fixed = all(site.dims for site in sites)
        self.last: str | None = None


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
        with self.model.tap(capture.taps), torch.set_grad_enabled(self.grad and torch.is_grad_enabled()):
            try:
                self.model.module(**arguments)
            except StopForward:
                pass
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


def take(x: Tensor, axis: int, index: list[int]) -> Tensor:
    """`x` at some indices of one axis; a view where they are neighbours."""
    if index and index == list(range(index[0], index[-1] + 1)):
        return x.narrow(axis, index[0], len(index))
    return x.index_select(axis, torch.tensor(index, device=x.device))


def take_positions(x: Tensor, axis: int, positions: Any, mask: Tensor | None) -> Tensor:
    """`x` at some positions of each row; with padding, rows are gathered each at their own places.

    Raises:
        SiteError: no such position, or rows have different numbers of them.
    """
    total = x.shape[axis]
    if mask is None:
        index = absolute(positions, total)
        if not index:
            raise SiteError(f"no position {positions!r} in sequences of {total} tokens")
        return take(x, axis, index)
    mask = mask[:, -total:] if mask.shape[1] >= total else mask
    rows = []
    for start, count in zip(mask.int().argmax(dim=1).tolist(), mask.sum(dim=1).tolist(), strict=True):
        rows.append([start + p for p in absolute(positions, int(count))])
    counts = {len(row) for row in rows}
    if len(counts) != 1 or not rows[0]:
        raise SiteError(f"positions {positions!r} select {sorted(counts)} tokens in rows of different length; "
                        "choose positions that every row has, or record row by row")
    index = torch.tensor(rows, device=x.device)
    shape = [1] * x.ndim
    shape[0], shape[axis] = index.shape
    expanded = list(x.shape)
    expanded[axis] = index.shape[1]
    return x.gather(axis, index.view(shape).expand(expanded))
