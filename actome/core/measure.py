"""Measures: streams of activations folded into small mergeable statistics.

A measure is a monoid. `statistics` turns one batch into small tensors and keeps no state; `reductions` says how those
of two batches become one (sum, max or min); `values` turns the total into what one wants to know. Around these three
pure parts stands a thin `torchmetrics.Metric`, so a measure is used like any other metric, merges across processes
under `torch.distributed`, and pickles.

Letters: B batch, T position, U unit (any feature of a token), H head, Q query, S key, V vocabulary, L layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from .errors import MeasureError
from .fold import Fold, Reduction
from .real import Tokens, all_norms, double, ratio, real_tokens, shared, token_norms, unit_peaks, wide
from .table import MeasureResult, MeasureTable, tidy

if TYPE_CHECKING:
    import pandas as pd

    from .sites import Site

__all__ = [
    "TOGETHER",
    "Layout",
    "Measure",
    "MeasureResult",
    "MeasureTable",
    "Reduction",
    "Tokens",
    "all_norms",
    "double",
    "ratio",
    "real_tokens",
    "shared",
    "token_norms",
    "unit_peaks",
    "wide",
]

Layout = Literal["tokens", "pattern", "logits", "depth", "sites"]
# Those that need all sites of a forward before they can be folded.
TOGETHER: tuple[Layout, ...] = ("depth", "sites")

_DIMS: dict[str, tuple[str, ...]] = {
    "tokens": ("batch", "pos", "unit"),
    "pattern": ("batch", "head", "query", "key"),
    "logits": ("batch", "pos", "vocab"),
    "depth": ("layer", "k", "batch", "pos"),
    "sites": ("batch", "pos", "unit"),
}


class Measure(Fold):
    """Base of every measure; a `Fold` of the activations of sites.

    Attributes:
        layout: what `x` is. ``"tokens"``: (batch, pos, unit). ``"pattern"``: (batch, head, query, key).
            ``"logits"``: (batch, pos, vocab), read together with `tokens`. ``"depth"``: all layers of one forward at
            once, as `prepare` made them: (layer, k, batch, pos). ``"sites"``: the tensors of all sites of one forward
            at once, a list of what `prepare` made of each, whatever their widths.
        reductions: for each statistic, how two of them become one (`Fold`).
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

    layout: ClassVar[Layout] = "tokens"
    value_dims: ClassVar[dict[str, tuple[str, ...]]]

    # -- the pure parts -----------------------------------------------------------------------------------------

    def site_statistics(self, x: Tensor, mask: Tensor | None = None, tokens: Tensor | None = None) -> dict[str, Tensor]:
        """The statistics of one batch at one site; written by the subclass, pure, without stack dims."""
        raise NotImplementedError

    def values(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the statistics say; written by the subclass, pure, leading dims left in front."""
        raise NotImplementedError

    def prepare(self, x: Tensor, previous: Tensor | None, mask: Tensor | None = None) -> Tensor:
        """What is kept of one site until all have been reached, for the layouts ``"depth"`` and ``"sites"``.

        For ``"depth"`` (k, batch, pos), from the states of a layer and those before; for ``"sites"`` whatever the
        measure takes of it, by default everything.

        Args:
            x: (batch, pos, unit), the states at this site.
            previous: the same at the site before it; ``None`` at the first, and always for ``"sites"``.
            mask: (batch, pos), ``None`` when all tokens are real.
        """
        if self.layout == "sites":
            return x.detach()
        raise NotImplementedError(f"{type(self).__name__} has the layout {self.layout!r} and compares no layers")

    def fits(self, site: Site) -> str | None:
        """Why this measure cannot be taken at a site, or ``None`` when it can."""
        return None

    def at(self, sites: Sequence[Site]) -> Measure:
        """This measure as sites of one shape want it, where it must know something of them, such as their heads."""
        return self

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
        if self.layout == "sites":
            return self.site_statistics(x, mask, tokens)
        dims = _DIMS[self.layout]
        self._check(x, mask, dims)
        stack = x.shape[: x.ndim - len(dims)]
        x, mask, tokens = _not_empty(x, mask, tokens, dims)
        # Detached, since the arithmetic works in place where it can and nothing here is differentiated.
        x = x.detach()
        if not stack:
            return self.site_statistics(x, mask, tokens)
        parts = [self.site_statistics(one, mask, tokens) for one in x.flatten(0, len(stack) - 1)]
        return {name: torch.stack([part[name] for part in parts]).unflatten(0, stack) for name in self.reductions}

    def _check(self, x: Tensor, mask: Tensor | None, dims: tuple[str, ...]) -> None:
        if not isinstance(x, Tensor):
            raise MeasureError(
                f"{type(self).__name__} takes a tensor ({', '.join(dims)}), not {type(x).__name__}; see torch.as_tensor"
            )
        if x.ndim < len(dims):
            raise MeasureError(f"{type(self).__name__} takes ({', '.join(dims)}), and this is {tuple(x.shape)}")
        if not x.is_floating_point():
            raise MeasureError(f"{type(self).__name__} takes floating-point activations, not {x.dtype}")
        if mask is not None:
            sizes = dict(zip(dims, x.shape[-len(dims) :], strict=True))
            wanted = (sizes["batch"], sizes.get("pos", sizes.get("key")))
            if not isinstance(mask, Tensor):
                raise MeasureError(
                    f"{type(self).__name__} takes as mask a bool tensor (batch, pos) of the shape {wanted}, "
                    f"not {type(mask).__name__}"
                )
            if mask.dtype != torch.bool or tuple(mask.shape) != wanted:
                raise MeasureError(
                    f"{type(self).__name__} takes a bool mask (batch, pos) of the shape {wanted}, "
                    f"not {mask.dtype} {tuple(mask.shape)}"
                )
            if mask.device != x.device:
                raise MeasureError(
                    f"{type(self).__name__}: the activations are on {x.device} and their mask on {mask.device}; "
                    "move it there, as by mask.to(x.device)"
                )

    def update(self, x: Tensor | Sequence[Tensor], mask: Tensor | None = None, tokens: Tensor | None = None) -> None:
        """Folds one batch into the state; arguments as in `statistics`.

        For the layouts ``"depth"`` and ``"sites"``, `x` holds the states of the sites themselves, (batch, pos, unit)
        each. A batch without rows or positions changes nothing.
        """
        if self.layout in TOGETHER:
            dims = _DIMS["tokens"]
            for one in x:
                self._check(one, mask, dims)
            if any(0 in one.shape[-3:-1] for one in x):
                full = [_not_empty(one, mask, tokens, dims) for one in x]
                x, mask, tokens = [one[0] for one in full], *full[0][1:]
        if self.layout == "depth":
            x = torch.stack([self.prepare(x[i], x[i - 1] if i else None, mask) for i in range(len(x))])
        elif self.layout == "sites":
            x = [self.prepare(one, None, mask) for one in x]
        self._absorb(self.statistics(x, mask, tokens))

    def rows(self, sites: Sequence[Site]) -> pd.DataFrame:
        """The values as a tidy table: site, layer, head, unit, expert (those that apply), measure, value.

        Args:
            sites: one for each entry of the stack, in its order; a single one when there is no stack.
        """
        return tidy(self.compute(), self.value_dims, sites)


def _not_empty(
    x: Tensor, mask: Tensor | None, tokens: Tensor | None, dims: tuple[str, ...]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """A batch without rows or positions as one that is all padding, which no measure counts; others as they are."""
    if x.numel():
        return x, mask, tokens
    # A width of nothing stays so: that is no empty batch.
    widths = ("unit", "vocab", "head", "layer", "k")
    stack, sizes = x.shape[: x.ndim - len(dims)], dict(zip(dims, x.shape[-len(dims) :], strict=True))
    sizes = {dim: size if dim in widths else max(size, 1) for dim, size in sizes.items()}
    rows = sizes["batch"], sizes.get("pos", sizes.get("key"))
    padding = torch.zeros(rows, dtype=torch.bool, device=x.device)
    return x.new_zeros(*stack, *sizes.values()), padding, None if tokens is None else tokens.new_zeros(rows)
