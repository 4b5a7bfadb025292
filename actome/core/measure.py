"""Measures: streams of activations folded into small mergeable statistics.

A measure is a monoid. `statistics` turns one batch into small tensors and keeps no state; `reductions` says how those
of two batches become one (sum, max or min); `values` turns the total into what one wants to know. Around these three
pure parts stands a thin `torchmetrics.Metric`, so a measure is used like any other metric, merges across processes
under `torch.distributed`, and pickles.

Letters: B batch, T position, U unit (any feature of a token), H head, Q query, S key, V vocabulary, L layer.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.distributed as dist
import torchmetrics
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors

from .errors import MeasureError
from .real import Tokens, double, ratio, real_tokens, wide
from .table import MeasureResult, MeasureTable, tidy

if TYPE_CHECKING:
    import pandas as pd

    from .sites import Site

__all__ = [
    "Layout",
    "Measure",
    "MeasureResult",
    "MeasureTable",
    "Reduction",
    "Tokens",
    "double",
    "ratio",
    "real_tokens",
    "wide",
]

Layout = Literal["tokens", "pattern", "logits", "depth"]
Reduction = Literal["sum", "max", "min"]

_DIMS: dict[str, tuple[str, ...]] = {
    "tokens": ("batch", "pos", "unit"),
    "pattern": ("batch", "head", "query", "key"),
    "logits": ("batch", "pos", "vocab"),
    "depth": ("layer", "k", "batch", "pos"),
}
_IDENTITY = {"sum": 0.0, "max": -math.inf, "min": math.inf}
_COMBINE: dict[str, Callable[..., Tensor]] = {"sum": torch.add, "max": torch.maximum, "min": torch.minimum}


class Measure(torchmetrics.Metric):
    """Base of every measure; a subclass declares four things and writes two pure functions.

    Attributes:
        layout: what `x` is. ``"tokens"``: (batch, pos, unit). ``"pattern"``: (batch, head, query, key).
            ``"logits"``: (batch, pos, vocab), read together with `tokens`. ``"depth"``: all layers of one forward at
            once, as `prepare` made them: (layer, k, batch, pos).
        reductions: for each statistic, how two of them become one.
        value_dims: for each value, its dims after the stack dims: ``{"rms": (), "sink": ("head",)}``.

    A subclass writes ``site_statistics(x, mask, tokens)`` for one site without stack dims, and ``values(stats)``, which
    leaves any leading dims of the statistics in front. Statistics are integers where they count, float32 or better
    otherwise (maxima and minima always); sums over the stream are kept in int64 and float64 (float32 on a device
    without float64).

    Non-finite activations: the measures that ship with actome count them in `ActivationScale` and leave the tokens
    that hold them out of everything else, so that one overflow does not hide what the other tokens do.

    Padding (mask False) never changes a number, whatever it holds. A mask of ``None`` means that every token is real;
    the fast paths are those without one.

    Example:
        >>> class Largest(Measure):
        ...     reductions = {"largest": "max"}
        ...     value_dims = {"largest": ()}
        ...     def site_statistics(self, x, mask=None, tokens=None):
        ...         return {"largest": real_tokens(x, mask).x.amax()}
        ...     def values(self, stats):
        ...         return dict(stats)
        >>> measure = Largest()
        >>> measure.update(torch.tensor([[[1.0], [7.0]]]), torch.tensor([[True, False]]))
        >>> measure.compute()
        {'largest': tensor(1., dtype=torch.float64)}
    """

    is_differentiable = False
    full_state_update = False

    layout: ClassVar[Layout] = "tokens"
    reductions: ClassVar[dict[str, Reduction]]
    value_dims: ClassVar[dict[str, tuple[str, ...]]]

    def __init__(self, **options: Any):
        super().__init__(**options)
        for name, how in self.reductions.items():
            # A scalar identity takes the shape of whatever is folded first, so no shape need be known beforehand.
            self.add_state(name, torch.tensor(_IDENTITY[how], dtype=torch.float64), dist_reduce_fx=how)

    # -- the pure parts -----------------------------------------------------------------------------------------

    def site_statistics(self, x: Tensor, mask: Tensor | None = None, tokens: Tensor | None = None) -> dict[str, Tensor]:
        """The statistics of one batch at one site; written by the subclass, pure, without stack dims."""
        raise NotImplementedError

    def values(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the statistics say; written by the subclass, pure, leading dims left in front."""
        raise NotImplementedError

    def prepare(self, x: Tensor, previous: Tensor | None) -> Tensor:
        """For the layout ``"depth"``: what is kept of one layer, (k, batch, pos), from its states and those before.

        Args:
            x: (batch, pos, unit), the states at this site.
            previous: the same at the site before it, ``None`` at the first.
        """
        raise NotImplementedError(f"{type(self).__name__} has the layout {self.layout!r} and compares no layers")

    def fits(self, site: Site) -> str | None:
        """Why this measure cannot be taken at a site, or ``None`` when it can."""
        return None

    def statistics(self, x: Tensor, mask: Tensor | None = None, tokens: Tensor | None = None) -> dict[str, Tensor]:
        """The statistics of one batch; pure.

        Args:
            x: floating point of any precision, (*stack, *dims of the layout).
            mask: (batch, pos) bool, ``None`` when all tokens are real; for patterns, of the keys.
            tokens: (batch, pos) ids, needed for logits.

        Returns:
            For each name in `reductions` a tensor with the stack dims of `x` in front.

        Raises:
            MeasureError: `x` has too few dims, is not floating point, or the mask has another shape.
        """
        dims = _DIMS[self.layout]
        stack = x.shape[: x.ndim - len(dims)]
        self._check(x, mask, dims)
        # Detached, since the arithmetic works in place where it can and nothing here is differentiated.
        x = x.detach()
        if not stack:
            return self.site_statistics(x, mask, tokens)
        parts = [self.site_statistics(one, mask, tokens) for one in x.flatten(0, len(stack) - 1)]
        return {name: torch.stack([part[name] for part in parts]).unflatten(0, stack) for name in self.reductions}

    def _check(self, x: Tensor, mask: Tensor | None, dims: tuple[str, ...]) -> None:
        if x.ndim < len(dims):
            raise MeasureError(f"{type(self).__name__} takes ({', '.join(dims)}), and this is {tuple(x.shape)}")
        if not x.is_floating_point():
            raise MeasureError(f"{type(self).__name__} takes floating-point activations, not {x.dtype}")
        if mask is not None:
            sizes = dict(zip(dims, x.shape[-len(dims) :], strict=True))
            wanted = (sizes["batch"], sizes.get("pos", sizes.get("key")))
            if mask.dtype != torch.bool or tuple(mask.shape) != wanted:
                raise MeasureError(
                    f"{type(self).__name__} takes a bool mask (batch, pos) of the shape {wanted}, "
                    f"not {mask.dtype} {tuple(mask.shape)}"
                )

    # -- the state ----------------------------------------------------------------------------------------------

    def update(self, x: Tensor, mask: Tensor | None = None, tokens: Tensor | None = None) -> None:
        """Folds one batch into the state; arguments as in `statistics`.

        For the layout ``"depth"``, `x` holds the states of the layers themselves: (layer, batch, pos, unit).
        """
        if self.layout == "depth":
            x = torch.stack([self.prepare(x[i], x[i - 1] if i else None) for i in range(len(x))])
        self._absorb(self.statistics(x, mask, tokens))

    def fold(self, stats: Mapping[str, Tensor]) -> None:
        """Reduces statistics that were already computed, of one batch, into the state."""
        self.__dict__["_computed"] = None
        self.__dict__["_update_count"] += 1
        with torch.no_grad():
            self._absorb(stats)

    def _absorb(self, stats: Mapping[str, Tensor]) -> None:
        state = self.__dict__  # past the attribute machinery of nn.Module, which would cost more than the additions
        for name, how in self.reductions.items():
            state[name] = _into(how, state[name], stats[name], name)

    def compute(self) -> dict[str, Tensor]:
        """The values of all that was folded; under `torch.distributed`, of all processes together."""
        if not self._update_count and not self._is_synced:
            raise MeasureError(f"{type(self).__name__} has seen nothing yet; call update first")
        return self.values({name: self.__dict__[name] for name in self.reductions})

    def merge_state(self, incoming_state: dict[str, Any] | torchmetrics.Metric) -> None:
        """Takes in the state of another measure of the same kind, which may have seen nothing."""
        count = incoming_state._update_count if isinstance(incoming_state, torchmetrics.Metric) else 1
        super().merge_state(incoming_state)
        # Unlike torchmetrics: what was computed before is out of date, and what was merged counts as seen.
        self._computed = None
        self._update_count += count

    def rows(self, sites: Sequence[Site]) -> pd.DataFrame:
        """The values as a tidy table: site, layer, head, unit, expert (those that apply), measure, value.

        Args:
            sites: one for each entry of the stack, in its order; a single one when there is no stack.
        """
        return tidy(self.compute(), self.value_dims, sites)

    # -- how torchmetrics is told -------------------------------------------------------------------------------

    def _reduce_states(self, incoming_state: dict[str, Any]) -> None:
        for name, how in self.reductions.items():
            if name not in incoming_state:
                raise MeasureError(f"{type(self).__name__} has the state {name!r}, which what is merged lacks")
            mine, theirs = getattr(self, name), incoming_state[name]
            setattr(self, name, _into(how, mine, theirs.to(mine.device), name) if theirs.ndim >= mine.ndim else mine)

    def _sync_dist(self, dist_sync_fn: Callable[..., Any] = gather_all_tensors, process_group: Any = None) -> None:
        if dist_sync_fn is not gather_all_tensors:
            super()._sync_dist(dist_sync_fn, process_group)
            return
        # Reduced in place of gathered: one state per process is enough. A process that has seen nothing holds scalars,
        # so shapes and dtypes are agreed upon first.
        group = process_group or self.process_group or dist.group.WORLD
        mine = {name: (tuple(getattr(self, name).shape), getattr(self, name).dtype) for name in self.reductions}
        all_of_them: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(all_of_them, mine, group)
        for name, how in self.reductions.items():
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
