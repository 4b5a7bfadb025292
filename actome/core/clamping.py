"""Clamps at work: where a clamp finds itself, whether its gates are open, and what becomes of the tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .clamp import Clamp
from .errors import ClampError
from .run import Run, absolute
from .select import chosen
from .sites import HEAD_DIMS, TIME_DIMS, Site, axis_of

if TYPE_CHECKING:
    from .model import Model


class Place:
    """Where a clamp finds itself: the site, the forward's state, and its own choice of heads, units and positions.

    Attributes:
        seen: the tensors of this forward at the sites that the clamp `reads`, by name.
    """

    __slots__ = ("_cache", "choices", "dims", "length", "run", "seen", "site", "where")

    def __init__(self, site: Site, run: Run, choices: list[tuple[int, list[int]]]):
        self.site, self.run, self.choices = site, run, choices
        self.dims = site.dims
        self.where: Tensor | None = None
        self.length = 0
        self.seen: dict[str, Tensor] = {}
        self._cache: tuple[Tensor, Any, Tensor] | None = None

    def select(self, full: Tensor) -> Tensor:
        """Cuts a tensor of the site's dims to the clamp's heads and units."""
        for dim, index in self.choices:
            full = full.index_select(dim, torch.tensor(index, device=full.device))
        return full

    def fit(self, value: Any, x: Tensor, what: str = "value") -> Tensor | float:
        """`value` on the device and in the dtype of `x`, its shape proved to be what it may be.

        A value is a number, or a tensor whose shape equals the last dims of `x`; its batch and position dims may
        also be 1, and its positions may be just those that the clamp's gate selects.
        """
        if not isinstance(value, Tensor):
            if isinstance(value, (int, float, bool)):
                return value
            value = torch.as_tensor(value)
        if value.ndim == 0:
            return value.to(x) if value.requires_grad else value.item()
        value = self._converted(value, x)
        shape, wanted = tuple(value.shape), tuple(x.shape)
        if shape == wanted[-value.ndim :]:
            return value
        # Too many dims make the tail too short to line up with, which the next check says clearly.
        dims = self.dims[-value.ndim :]
        ok = value.ndim <= x.ndim
        for size, want, dim in zip(shape, wanted[-value.ndim :], dims, strict=False):
            ok = ok and (size == want or (dim in ("batch", "pos", "query") and (size == 1 or dim != "batch")))
        if ok and len(shape) >= x.ndim - 1:
            axis = axis_of(dims, TIME_DIMS)
            if axis is None or shape[axis] in (1, self.length):
                return value
            if self.where is not None and (placed := self._at_positions(value, axis)) is not None:
                return placed
        names = ", ".join(f"{d} {s}" for d, s in zip(self.dims, wanted, strict=False))
        raise ClampError(
            f"{self.site.name}: {what} of shape {shape} does not fit [{names}]; "
            f"give a number or a tensor whose shape equals its last dims, such as {(wanted[-1],)}"
        )

    def _converted(self, value: Tensor, x: Tensor) -> Tensor:
        if value.requires_grad or (value.dtype == x.dtype and value.device == x.device):
            return value.to(x)
        # Kept with the tensor that it came from and its version, so that neither another tensor nor an edit of this
        # one is taken for it.
        state = (value._version, x.dtype, x.device)
        if self._cache is None or self._cache[0] is not value or self._cache[1] != state:
            self._cache = (value, state, value.detach().to(x))
        return self._cache[2]

    def _at_positions(self, value: Tensor, axis: int) -> Tensor | None:
        # The gate's n-th selected position of a row takes the n-th entry of the value.
        where = self.where
        assert where is not None
        time = axis_of(self.dims, TIME_DIMS)
        assert time is not None
        gate = where.reshape(where.shape[0], where.shape[time])
        if gate.shape[0] > 1 and value.ndim < len(self.dims):
            return None
        if int(gate.sum(dim=1).max()) != value.shape[axis]:
            return None
        slot = (gate.long().cumsum(dim=1) - 1).clamp_min(0)
        if slot.shape[0] == 1:
            return value.index_select(axis, slot[0])
        if value.shape[0] == 1:
            value = value.expand(slot.shape[0], *value.shape[1:])
        return torch.stack([v.index_select(axis - 1, s) for v, s in zip(value, slot, strict=True)])


class ActiveClamp:
    """A clamp at one site while its context is open: evaluates the gates, applies it, counts."""

    def __init__(self, clamp: Clamp, site: Site, run: Run):
        self.clamp, self.site, self.run = clamp, site, run
        self.fired = self.reached = 0
        self.condition: Tensor | None = None
        dims = site.dims
        choices: list[tuple[int, list[int]]] = []
        if clamp.heads is not None:
            axis = axis_of(dims, HEAD_DIMS)
            if axis is None:
                raise ClampError(f"{site.name} has no heads (its dims are {', '.join(dims)}); leave out heads=")
            choices.append((axis, chosen(clamp.heads, site.sizes[axis], f"{site.name}: head")))
        if clamp.units is not None:
            size = site.sizes[-1] if len(site.sizes) == len(dims) else None
            choices.append((len(dims) - 1, chosen(clamp.units, size, f"{site.name}: {dims[-1]} unit")))
        self.place = Place(site, run, choices)
        self.time_axis = axis_of(dims, TIME_DIMS)
        if self.time_axis is None:
            self.time_axis = axis_of(dims, ("key",))
        if clamp.positions is not None and self.time_axis is None:
            raise ClampError(f"{site.name} has no positions (its dims are {', '.join(dims)}); leave out positions=")
        self.gated = any(g is not None for g in (clamp.positions, clamp.rows, clamp.when))
        self.needs_run = clamp.needs_run or bool(clamp.reads)
        self.needs_run |= any(g is not None for g in (clamp.positions, clamp.phase, clamp.steps))
        self.needs_run |= clamp.when is not None and any(part.needs_run for part in (clamp.when, *clamp.when.parts))

    def __call__(self, x: Tensor) -> Tensor | None:
        clamp, place, run = self.clamp, self.place, self.run
        self.reached += 1
        if clamp.phase is not None and clamp.phase != run.phase:
            return None
        if clamp.steps is not None and not _in(clamp.steps, run.step):
            return None
        if self.gated:
            place.length = x.shape[self.time_axis] if self.time_axis is not None else 0
            where = self._where(x)
            if where is None:
                return None
            place.where = where
        sel = place.select(x) if place.choices else x
        new = clamp.transform(sel, place)
        if new.shape != sel.shape:
            raise ClampError(
                f"{type(clamp).__name__} at {self.site.name} changed the shape from {tuple(sel.shape)} to "
                f"{tuple(new.shape)}; a clamp must keep it"
            )
        if new.dtype != x.dtype:
            new = new.to(x.dtype)
        if place.choices:
            new = _put_back(x, new, place.choices)
        self.fired += 1
        return torch.where(place.where, new, x) if self.gated else new

    def _where(self, x: Tensor) -> Tensor | None:
        """The gate as a bool tensor that broadcasts over `x`; ``None`` when nothing in this forward is meant."""
        clamp, axis = self.clamp, self.time_axis
        shape = [1] * x.ndim
        gate: Tensor | None = None
        if clamp.positions is not None:
            assert axis is not None
            hit = self._positions(x.shape[axis], x.device)
            if isinstance(hit, list):
                if not hit:
                    return None
                flags = torch.zeros(x.shape[axis], dtype=torch.bool, device=x.device)
                flags[hit] = True
                shape[axis] = x.shape[axis]
                gate = flags.view(shape)
            else:
                if hit.shape != (x.shape[0], x.shape[axis]):
                    raise ClampError(
                        f"{self.site.name}: positions= is a mask of shape {tuple(hit.shape)}, but the forward has "
                        f"{x.shape[0]} rows of {x.shape[axis]} positions"
                    )
                shape[0], shape[axis] = hit.shape
                gate = hit.view(shape)
        if clamp.rows is not None:
            rows = torch.zeros(x.shape[0], dtype=torch.bool, device=x.device)
            rows[chosen(clamp.rows, x.shape[0], f"{self.site.name}: row")] = True
            rows = rows.view([-1] + [1] * (x.ndim - 1))
            gate = rows if gate is None else gate & rows
        if clamp.when is not None:
            if self.condition is None:
                raise ClampError(f"the condition at {clamp.when.site} was not reached before {self.site.name}")
            flag = self.condition.to(x.device)
            shape = [1] * x.ndim
            if flag.ndim > 0:
                shape[0] = flag.shape[0]
            if flag.ndim > 1 and axis is not None:
                shape[axis] = flag.shape[1]
            flag = flag.view(shape)
            gate = flag if gate is None else gate & flag
        if gate is not None and x.device.type == "cpu" and not gate.any():
            # A condition that is nowhere true is an answer; a position that is not there is not.
            self.fired += clamp.when is not None
            return None
        return gate

    def _positions(self, length: int, device: torch.device) -> list[int] | Tensor:
        run = self.run
        keys = self.site.dims[self.time_axis or 0] == "key"
        if self.site.stack == "vision":
            return absolute(self.clamp.positions, length)
        if self.site.stack == "encoder" or (keys and ".cross." in self.site.name):
            return run.where_in_source(self.clamp.positions, length, device)
        if keys and run.mask is None:
            return absolute(self.clamp.positions, length)
        if not run.length:  # a plain module: nothing tracks tokens, the tensor itself says how many there are
            return absolute(self.clamp.positions, length)
        hit = run.where(self.clamp.positions, length, device)
        assert hit is not None
        return hit


class ClampContext:
    """What ``with model.clamp(...) as active`` gives: the clamps at work, counted.

    Attributes:
        active: one `ActiveClamp` a clamp and site, with `.fired` and `.reached` counts.
    """

    def __init__(self, model: Model, clamps: Sequence[Clamp], strict: bool = True):
        self.model, self.strict = model, strict
        self.active: list[ActiveClamp] = []
        self._taps: Any = None
        if not clamps:
            raise ClampError("model.clamp() was given no clamp")
        taps: list[tuple[Any, Any, Any]] = []
        needs_run = False
        for clamp in clamps:
            if not isinstance(clamp, Clamp):
                raise ClampError(f"model.clamp() takes clamps such as ac.Add(site, vector), not {type(clamp).__name__}")
            for site in model.match(clamp.site):
                if not site.writable:
                    raise ClampError(f"{site.name} can be read but not changed{_instead(site)}")
                one = ActiveClamp(clamp, site, model.run)
                if clamp.when is not None:
                    taps += model.condition_taps(clamp.when, one)
                taps += [
                    (model.before(name, site).address, _keep(one.place.seen, name), "read") for name in clamp.reads
                ]
                self.active.append(one)
                taps.append((site.address, one, "write"))
                needs_run = needs_run or one.needs_run
        self._taps = model.tap(taps, track=needs_run)

    @property
    def fired(self) -> int:
        """How often any of the clamps changed a tensor."""
        return sum(one.fired for one in self.active)

    def __enter__(self) -> ClampContext:
        self._taps.__enter__()
        self.model.clamped.append(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        self.model.clamped.remove(self)
        self._taps.__exit__(kind, error, trace)
        if kind is not None or not self.strict:
            return
        idle = [one for one in self.active if not one.fired]
        if idle:
            names = ", ".join(dict.fromkeys(f"{type(one.clamp).__name__} at {one.site.name}" for one in idle[:4]))
            more = f" and {len(idle) - 4} more" if len(idle) > 4 else ""
            why = (
                "its gates (positions, phase, steps, rows) never met a forward"
                if any(one.reached for one in idle)
                else "no forward reached the site inside the with block"
            )
            raise ClampError(f"never fired: {names}{more}; {why}")


def _keep(seen: dict[str, Tensor], name: str) -> Any:
    def keep(x: Tensor) -> None:
        seen[name] = x

    return keep


def _in(steps: Any, step: int) -> bool:
    if isinstance(steps, int):
        return step == steps
    if isinstance(steps, slice):
        return step in range(steps.start or 0, steps.stop if steps.stop is not None else step + 1, steps.step or 1)
    return step in steps


def _put_back(x: Tensor, new: Tensor, choices: list[tuple[int, list[int]]]) -> Tensor:
    # From the innermost choice outwards, so that each copy lands in the tensor the choice was cut from.
    cuts = [x]
    for dim, index in choices[:-1]:
        cuts.append(cuts[-1].index_select(dim, torch.tensor(index, device=x.device)))
    for cut, (dim, index) in zip(reversed(cuts), reversed(choices), strict=True):
        new = cut.index_copy(dim, torch.tensor(index, device=x.device), new)
    return new


def _instead(site: Site) -> str:
    if site.name.endswith("moe.chosen"):
        return "; clamp moe.router to have other experts chosen"
    return ""
