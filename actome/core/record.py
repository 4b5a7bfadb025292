"""Recording: bringing tensors out of a forward, in memory or streamed to disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .clamp import chosen
from .errors import RecordingError, SiteError
from .recording import Recording
from .run import absolute
from .sites import Site
from .taps import Kind, Point, StopForward, Tap

if TYPE_CHECKING:
    from .model import Model
    from .text import Batch

_TIME = ("pos", "query")


class _Group:
    """Sites of one shape that are written into one buffer, layer after layer."""

    __slots__ = ("buffer", "names", "whole")

    def __init__(self, names: list[str]):
        self.names = names
        self.buffer: Tensor | None = None
        self.whole = len(names) > 1

    def store(self, x: Tensor, i: int, dtype: torch.dtype | None, device: Any) -> Tensor:
        if self.buffer is None:
            self.buffer = torch.empty((len(self.names), *x.shape), dtype=dtype or x.dtype, device=device or x.device)
        if self.buffer.shape[1:] != x.shape:
            self.whole = False
            return x.detach().to(device=device or x.device, dtype=dtype or x.dtype, copy=True)
        slot = self.buffer[i]
        slot.copy_(x)
        return slot


class Capture:
    """The taps of one recording: where each tensor goes, cut to the asked positions, heads and units before copying.

    Args:
        positions, heads, units, dtype, device, grad: see `record`.
        mask: (batch, pos) of the inputs, or ``None`` when every token is real.
        stop: the name of the site after which nothing more is needed, or ``None`` to run to the end.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        *,
        positions: Any = None,
        heads: Any = None,
        units: Any = None,
        dtype: torch.dtype | None = None,
        device: Any = None,
        grad: bool = False,
        mask: Tensor | None = None,
        stop: str | None = None,
    ):
        self.sites, self.dtype, self.device, self.grad = sites, dtype, device, grad
        self.positions, self.mask = positions, mask
        self.heads, self.units = heads, units
        self.tensors: dict[str, Tensor] = {}
        self.groups: dict[str, _Group] = {}
        self.stop = stop
        self.cut = positions is not None or heads is not None or units is not None

    def taps(self) -> list[tuple[Point, Tap, Kind]]:
        locals_: dict[str, list[str]] = {}
        for site in self.sites:
            locals_.setdefault(site.local if site.layer is not None else site.name, []).append(site.name)
        self.groups = {local: _Group(names) for local, names in locals_.items()}
        kind: Kind = "keep" if self.grad else "read"
        return [(site.address, self._tap(site), kind) for site in self.sites]

    def _tap(self, site: Site) -> Tap:
        group = self.groups[site.local if site.layer is not None else site.name]
        name, index, stop = site.name, group.names.index(site.name), self.stop == site.name
        cut = self._cut(site) if self.cut else None
        tensors, dtype, device = self.tensors, self.dtype, self.device

        def capture(x: Tensor) -> None:
            if cut is not None:
                x = cut(x)
            if self.grad:
                if x.requires_grad:
                    x.retain_grad()
                tensors[name] = x if dtype is None and device is None else x.to(device=device, dtype=dtype)
            else:
                tensors[name] = group.store(x.detach(), index, dtype, device)
            if stop:
                raise StopForward

        return capture

    def _cut(self, site: Site) -> Callable[[Tensor], Tensor]:
        steps: list[Callable[[Tensor], Tensor]] = []
        dims = site.dims
        if self.positions is not None and dims:
            axis = next((i for i, d in enumerate(dims) if d in _TIME), None)
            if axis is not None:
                steps.append(lambda x, a=axis: take_positions(x, a, self.positions, self.mask))
        if self.heads is not None:
            axis = next((i for i, d in enumerate(dims) if d in ("head", "kv_head")), None)
            if axis is not None:
                index = chosen(self.heads, site.sizes[axis], f"{site.name}: head")
                steps.append(lambda x, a=axis, i=index: take(x, a, i))
            elif not any(d in ("head", "kv_head") for s in self.sites for d in s.dims):
                raise SiteError(f"{site.name} has no heads (its dims are {', '.join(dims)}); leave out heads=")
        if self.units is not None:
            size = site.sizes[-1] if site.sizes else None
            index = chosen(self.units, size, f"{site.name}: {dims[-1] if dims else 'unit'} unit")
            steps.append(lambda x, i=index: take(x, x.ndim - 1, i))

        def cut(x: Tensor) -> Tensor:
            for step in steps:
                x = step(x)
            return x

        return cut

    def stacks(self) -> dict[str, tuple[Tensor, tuple[str, ...]]]:
        """The buffers that hold all sites of one shape: local name -> ((layer, batch, pos, ...), names)."""
        return {
            local: (group.buffer, tuple(group.names))
            for local, group in self.groups.items()
            if group.whole and group.buffer is not None and all(name in self.tensors for name in group.names)
        }


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
    found = model.match(sites)
    options = {"positions": positions, "heads": heads, "units": units, "dtype": dtype, "device": device}
    last = _last_needed(model, found) if stop and not grad else None
    if out is None and not _is_stream(inputs):
        return _record_once(model, inputs, found, last, grad, options)
    if grad:
        raise RecordingError("grad=True keeps a graph in memory; it cannot be streamed. Give one batch and no out=")
    from .streaming import record_to_disk, record_to_memory

    if out is None:
        return record_to_memory(model, inputs, found, last, options, progress)
    modes = {"append": append, "resume": resume, "overwrite": overwrite}
    return record_to_disk(model, inputs, found, last, options, Path(out), modes, batch_size, progress)


def _is_stream(inputs: Any) -> bool:
    from .text import Text

    return isinstance(inputs, Text)


def _record_once(
    model: Model, inputs: Any, found: Sequence[Site], last: str | None, grad: bool, options: dict[str, Any]
) -> Recording:
    arguments, ids, mask = model.arguments(inputs)
    capture = capture_forward(model, arguments, found, mask, last, grad, options)
    tokens = ids
    if options["positions"] is not None and ids is not None:
        tokens = take_positions(ids, 1, options["positions"], mask)
        mask = None
    return Recording(
        capture.tensors,
        {site.name: dims_at(model, site, capture.tensors[site.name]) for site in found},
        tokens=tokens,
        mask=mask,
        stacks=capture.stacks(),
        meta={"model": model.name},
    )


def capture_forward(
    model: Model,
    arguments: dict[str, Any],
    found: Sequence[Site],
    mask: Tensor | None,
    last: str | None,
    grad: bool,
    options: dict[str, Any],
) -> Capture:
    """Runs one forward and returns what was captured; every site must have been reached."""
    capture = Capture(found, mask=mask, stop=last, grad=grad, **options)
    with model.tap(capture.taps()), torch.set_grad_enabled(grad and torch.is_grad_enabled()):
        try:
            model.module(**arguments)
        except StopForward:
            pass
    missing = [site.name for site in found if site.name not in capture.tensors]
    if missing:
        raise SiteError(f"the forward did not reach {', '.join(missing[:4])}; is it used for these inputs?")
    return capture


def dims_at(model: Model, site: Site, x: Tensor) -> tuple[str, ...]:
    """The dims of a recorded tensor; those of plain modules are told from its shape."""
    if site.dims:
        return site.dims
    from .plain import is_image_module, plain_dims

    return plain_dims(x.ndim, is_image_module(site))


def _last_needed(model: Model, found: Sequence[Site]) -> str | None:
    """The site after which the forward may end: the last of those recorded and of those under an active clamp."""
    order = model.order
    needed = [site.name for site in found] + [one.site.name for c in model.clamped for one in c.active]
    if any(name not in order for name in needed):
        return None  # plain modules: nobody knows which comes last
    last = max(needed, key=order.__getitem__)
    return last if any(site.name == last for site in found) else None


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


def iterate(text: Any, batch_size: int, model: Model) -> Iterator[Batch]:
    """Batches of a `Text`, or of a list of texts."""
    from .text import Text

    if isinstance(text, Text):
        yield from text
        return
    if isinstance(text, str):
        text = [text]
    yield from Text(text, model.tokenizer, context=model.context, batch_size=batch_size, pack=False)
