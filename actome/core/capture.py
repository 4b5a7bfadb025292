"""Capturing: the taps of a recording, what they cut out, and the buffers that they copy it into."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import SiteError
from .select import chosen, take, take_positions
from .sites import HEAD_DIMS, TIME_DIMS, Site, axis_of
from .taps import Kind, Point, StopForward, Tap


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
            axis = axis_of(dims, TIME_DIMS)
            if axis is not None:
                steps.append(lambda x, a=axis: take_positions(x, a, self.positions, mask))
        if self.heads is not None:
            axis = axis_of(dims, HEAD_DIMS)
            if axis is not None:
                index = chosen(self.heads, site.sizes[axis], f"{site.name}: head")
                steps.append(lambda x, a=axis, i=index: take(x, a, i))
            elif all(axis_of(other.dims, HEAD_DIMS) is None for other in sites):
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
                else self._copier(site, cut, self.groups[local], index, ends)
            )
            self.taps.append((site.address, tap, "keep" if grad else "read"))

    def _copier(self, site: Site, cut: Any, group: _Group, index: int, ends: bool) -> Tap:
        tensors, name, point = self.tensors, site.name, site.address
        as_is = cut is None and group.dtype is None and group.device is None

        def copy(x: Tensor) -> None:
            x = x.detach() if x.requires_grad else x
            if point.fresh and as_is:
                tensors[name], group.whole = x, False
            else:
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
