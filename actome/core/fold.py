"""Folds: streams of data folded into small mergeable statistics, whatever the data is.

A fold is a monoid. `statistics` turns one batch into small tensors and keeps no state; `reductions` says how those of
two batches become one; `values` turns the total into what one wants to know. Around these pure parts stands a thin
`torchmetrics.Metric`, so a fold is used like any other metric, merges across processes under `torch.distributed`, and
pickles. `core.measure` builds on it for the activations of sites; a fold by itself takes what its subclass takes:
features with labels, two sets of features, codes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
import torchmetrics
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors

from .errors import MeasureError

Reduction = Literal["sum", "max", "min", "cat"]

_IDENTITY = {"sum": 0.0, "max": -math.inf, "min": math.inf, "cat": 0.0}
_COMBINE: dict[str, Callable[..., Tensor]] = {"sum": torch.add, "max": torch.maximum, "min": torch.minimum}


class Fold(torchmetrics.Metric):
    """Base of everything that folds a stream; a subclass declares `reductions` and writes two pure functions.

    Attributes:
        reductions: for each statistic, how two of them become one: ``"sum"``, ``"max"``, ``"min"``, or ``"cat"``: rows
            (..., row, column) put below one another, which `bounded` then keeps from growing with the stream.

    A subclass writes ``statistics(...)``, which takes what `update` takes, and ``values(stats)``. Sums over the stream
    are kept in int64 and float64 (float32 on a device without float64).

    Example:
        >>> class Mean(Fold):
        ...     reductions = {"total": "sum", "count": "sum"}
        ...     def statistics(self, x):
        ...         return {"total": x.sum(), "count": torch.tensor(x.numel())}
        ...     def values(self, stats):
        ...         return {"mean": stats["total"] / stats["count"]}
        >>> one, other = Mean(), Mean()
        >>> one.update(torch.ones(3)), other.update(torch.zeros(1))
        (None, None)
        >>> one.merge_state(other)
        >>> one.compute()
        {'mean': tensor(0.7500, dtype=torch.float64)}
    """

    is_differentiable = False
    full_state_update = False

    reductions: ClassVar[dict[str, Reduction]]

    def __init__(self, **options: Any):
        super().__init__(**options)
        for name, how in self.reductions.items():
            # A scalar identity takes the shape of whatever is folded first, so no shape need be known beforehand.
            reduce = None if how == "cat" else how
            self.add_state(name, torch.tensor(_IDENTITY[how], dtype=torch.float64), dist_reduce_fx=reduce)

    # -- the pure parts -----------------------------------------------------------------------------------------

    def statistics(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The statistics of one batch; written by the subclass, pure."""
        raise NotImplementedError

    def values(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the statistics say; written by the subclass, pure."""
        raise NotImplementedError

    def bounded(self, name: str, rows: Tensor) -> Tensor:
        """What is kept of a ``"cat"`` statistic after rows were added; written by a subclass that has one.

        It must not matter in which order rows came or were merged: keep, say, those with the smallest keys.
        """
        return rows

    # -- the state ----------------------------------------------------------------------------------------------

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Folds one batch into the state; arguments as in `statistics`."""
        self._absorb(self.statistics(*args, **kwargs))

    def fold(self, stats: Mapping[str, Tensor]) -> None:
        """Reduces statistics that were already computed, of one batch, into the state."""
        self.__dict__["_computed"] = None
        self.__dict__["_update_count"] += 1
        with torch.no_grad():
            self._absorb(stats)

    def _absorb(self, stats: Mapping[str, Tensor]) -> None:
        state = self.__dict__  # past the attribute machinery of nn.Module, which would cost more than the additions
        for name, how in self.reductions.items():
            state[name] = self._into(how, state[name], stats[name], name)

    def compute(self) -> dict[str, Tensor]:
        """The values of all that was folded; under `torch.distributed`, of all processes together."""
        if not self._update_count and not self._is_synced:
            raise MeasureError(f"{type(self).__name__} has seen nothing yet; call update first")
        return self.values({name: self.__dict__[name] for name in self.reductions})

    def merge_state(self, incoming_state: dict[str, Any] | torchmetrics.Metric) -> None:
        """Takes in the state of another of the same kind and options, which may have seen nothing.

        Raises:
            MeasureError: the other is of another kind, or has other options, so that their statistics are not of the
                same thing; a bare state, a dict, does not tell.
        """
        count = 1
        if isinstance(incoming_state, torchmetrics.Metric):
            count = incoming_state._update_count
            if type(incoming_state) is not type(self):
                raise MeasureError(
                    f"{type(self).__name__} merges with its own kind, not with {type(incoming_state).__name__}"
                )
            if count:
                self._refuse_other_options(incoming_state)
        super().merge_state(incoming_state)
        # Unlike torchmetrics: what was computed before is out of date, and what was merged counts as seen.
        self._computed = None
        self._update_count += count

    def _refuse_other_options(self, other: Fold) -> None:
        mine, theirs = _options(self), _options(other)
        apart = [name for name in mine if name in theirs and not _alike(mine[name], theirs[name])]
        if apart:
            said = [", ".join(f"{name}={_short(of[name])}" for name in apart) for of in (mine, theirs)]
            raise MeasureError(
                f"{type(self).__name__} with {said[0]} cannot take in one with {said[1]}: "
                "their statistics are not of the same thing; use the same options for all parts"
            )

    def _into(self, how: str, state: Tensor, new: Tensor, name: str) -> Tensor:
        if how != "cat":
            return _into(how, state, new, name)
        with torch.inference_mode(False), torch.no_grad():
            if state.ndim == 0:
                return self.bounded(name, new.clone())
            if state.shape[:-2] != new.shape[:-2] or state.shape[-1] != new.shape[-1]:
                raise MeasureError(
                    f"statistic {name!r} has rows of the shape {(*new.shape[:-2], new.shape[-1])}, and "
                    f"{(*state.shape[:-2], state.shape[-1])} were folded before; use one measure for each shape of site"
                )
            return self.bounded(name, torch.cat([state, new.to(state.device, state.dtype)], -2))

    # -- how torchmetrics is told -------------------------------------------------------------------------------

    def _reduce_states(self, incoming_state: dict[str, Any]) -> None:
        for name, how in self.reductions.items():
            if name not in incoming_state:
                raise MeasureError(f"{type(self).__name__} has the state {name!r}, which what is merged lacks")
            mine, theirs = getattr(self, name), incoming_state[name]
            # A scalar is the identity of one that saw nothing, unless both are.
            seen = theirs.ndim > 0 if how == "cat" else theirs.ndim >= mine.ndim
            setattr(self, name, self._into(how, mine, theirs.to(mine.device), name) if seen else mine)

    def _sync_dist(self, dist_sync_fn: Callable[..., Any] = gather_all_tensors, process_group: Any = None) -> None:
        if dist_sync_fn is not gather_all_tensors:
            super()._sync_dist(dist_sync_fn, process_group)
            return
        # Reduced in place of gathered: one state per process is enough. A process that has seen nothing holds scalars,
        # so shapes and dtypes are agreed upon first. What is put together instead of reduced is gathered.
        group = process_group or self.process_group or dist.group.WORLD
        mine = {
            name: getattr(self, name).cpu()
            if how == "cat"
            else (tuple(getattr(self, name).shape), getattr(self, name).dtype)
            for name, how in self.reductions.items()
        }
        all_of_them: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(all_of_them, mine, group)
        for name, how in self.reductions.items():
            if how == "cat":
                rows = [one[name] for one in all_of_them if one[name].ndim]
                if rows:
                    setattr(self, name, self.bounded(name, torch.cat(rows, -2).to(getattr(self, name).device)))
                continue
            shape = torch.broadcast_shapes(*(one[name][0] for one in all_of_them))
            # The scalar identities of those that saw nothing are float64; they must not decide the dtype.
            dtypes = [one[name][1] for one in all_of_them if one[name][0] == shape]
            dtype = functools.reduce(torch.promote_types, dtypes)
            full = getattr(self, name).expand(shape).to(dtype, copy=True).contiguous()
            if dist.get_backend(group) == "nccl" and full.device.type == "cpu":
                full = full.cuda()
            dist.all_reduce(full, getattr(dist.ReduceOp, how.upper()), group=group)
            setattr(self, name, full)

    def _wrap_compute(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        # torchmetrics squeezes every tensor of one element, which would lose the stack of a one-layer model;
        # it leaves alone what it does not know, and copies it not either, so the values are copied here.
        boxed = super()._wrap_compute(lambda: _Box({name: value.clone() for name, value in compute().items()}))
        return functools.wraps(compute)(lambda: dict(boxed().values))


@functools.cache
def _machinery() -> frozenset[str]:
    """The attributes of a metric that are not its own options."""

    class Bare(Fold):
        reductions: ClassVar[dict[str, Reduction]] = {}

    return frozenset(vars(Bare()))


def _options(fold: Fold) -> dict[str, Any]:
    """What a fold was made with, as far as that can be compared."""
    known = (bool, int, float, str, tuple, Tensor, type(None))
    own = {
        name: value for name, value in vars(fold).items() if name not in _machinery() and name not in fold.reductions
    }
    return {name: value for name, value in own.items() if not name.startswith("_") and isinstance(value, known)}


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a.cpu(), b.cpu().to(a.dtype))
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_alike, a, b))
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return False
    return bool(a == b)


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"tensor {tuple(value.shape)}" if value.numel() > 8 else str(value.tolist())
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class _Box:
    """Values that torchmetrics does not look into."""

    def __init__(self, values: dict[str, Tensor]):
        self.values = values


def _into(how: str, state: Tensor, new: Tensor, name: str) -> Tensor:
    """`new` reduced into `state`, in place where that is possible."""
    if state.ndim == 0 and new.ndim == 0:
        if state.device != new.device:
            state = state.to(_kept_dtype(how, new)).to(new.device)
        return _COMBINE[how](state, new)
    if state.ndim == 0:
        # The first: a copy of our own. Outside inference mode, or it could not be updated outside of it later on.
        with torch.inference_mode(False), torch.no_grad():
            return torch.empty(new.shape, dtype=_kept_dtype(how, new), device=new.device).copy_(new)
    if state.shape != new.shape:
        raise MeasureError(
            f"statistic {name!r} has the shape {tuple(new.shape)}, and {tuple(state.shape)} was folded before; "
            "use one measure for each shape of site"
        )
    if new.device != state.device:
        new = new.to(state.device)
    if how == "sum":
        return state.add_(new)
    return _COMBINE[how](state, new.to(state.dtype), out=state)


def _kept_dtype(how: str, x: Tensor) -> torch.dtype:
    if how != "sum":
        return x.dtype
    if not x.is_floating_point():
        return torch.int64
    return torch.float32 if x.device.type == "mps" else torch.float64
