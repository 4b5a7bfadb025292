"""Folding features together with something that is known of them: labels, node ids, targets."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from .errors import MeasureError
from .fold import Fold
from .measure import Measure
from .stream import canonical, stop_after
from .taps import StopForward

if TYPE_CHECKING:
    from .model import Model
    from .sites import Site

Pool = Literal["tokens", "last", "mean", "flat"]


def fold(
    model: Model,
    batches: Iterable[Sequence[Any]],
    folds: Mapping[str | tuple[str, ...], Fold],
    *,
    pool: Pool | int = "tokens",
) -> dict[str, Fold]:
    """Folds the activations of sites together with labels, in one pass.

    Args:
        batches: of (inputs, extra, ...). Inputs are whatever a forward takes (ids, images, a dict of arguments); the
            extras go to the fold's `update` behind the features. Tensors among them with one entry for each token,
            (batch, pos), are flattened and masked as the tokens are when `pool` is ``"tokens"``, and so are those with
            one entry for each row, (batch), repeated.
        folds: for each pattern a fold, which is cloned for each site and itself stays empty.
        pool: how the tokens of a row become features: ``"tokens"`` every real token is one row (N, unit); ``"last"``
            the last real token; ``"mean"`` their mean; an integer that position, counted from the first real token
            or, negative, from the last; ``"flat"`` all dims after the first in one row, whatever they are.

    Returns:
        For each site name its fold; call `compute()` on it.

    Raises:
        SiteError: a pattern that matches nothing.
        MeasureError: no batch was given, or a batch without extras' sizes matching.

    Example:
        >>> import actome as ac
        >>> class Mean(Fold):
        ...     reductions = {"total": "sum", "count": "sum"}
        ...     def statistics(self, x, y):
        ...         return {"total": (x.mean(-1) * y).sum(), "count": y.sum()}
        ...     def values(self, stats):
        ...         return {"mean": stats["total"] / stats["count"]}
        >>> model = ac.wrap(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU()))
        >>> out = model.fold([(torch.ones(4, 2), torch.ones(4))], {"module:1": Mean()}, pool="flat")
        >>> list(out), out["module:1"].compute()["mean"].shape
        (['module:1'], torch.Size([]))
    """
    for pattern, one in folds.items():
        if not isinstance(one, Fold) or isinstance(one, Measure):
            raise MeasureError(
                f"{pattern}: {one!r} is no fold of features with labels; give an instance such as NeuralCollapse(10), "
                "and measures of the activations alone to model.measure"
            )
    if not folds:
        raise MeasureError("there is nothing to fold: give {pattern: fold}")
    wanted = [(site, one.clone()) for pattern, one in folds.items() for site in model.match(pattern)]
    seen: dict[str, Tensor] = {}
    taps = [(site.address, _keep(seen, site, pool), "read") for site, _ in wanted]
    taps += stop_after(model, {site.name for site, _ in wanted})
    taken = 0
    for batch in batches:
        # A tensor would be taken apart by its rows.
        if not isinstance(batch, tuple | list) or not batch:
            raise MeasureError(f"a batch is (inputs, labels, ...), not {type(batch).__name__}; give [(inputs, labels)]")
        inputs, *extra = batch
        arguments, _, mask = model.arguments(inputs)
        with model.tap(taps), torch.no_grad(), contextlib.suppress(StopForward):
            model.module(**arguments)
        for site, one in wanted:
            one.update(*_rows(seen.pop(site.name), mask, extra, pool))
        taken += 1
    if not taken:
        raise MeasureError("there is no batch to fold")
    return {site.name: one for site, one in wanted}


def _keep(seen: dict[str, Tensor], site: Site, pool: Pool | int) -> Any:
    def keep(x: Tensor) -> None:
        seen[site.name] = (x.flatten(1) if pool == "flat" else canonical(x, site, "tokens")).detach().clone()

    return keep


def _rows(x: Tensor, mask: Tensor | None, extra: Sequence[Any], pool: Pool | int) -> tuple[Any, ...]:
    """The features of a batch as rows, and the extras that go with them."""
    if pool == "flat":
        return (x, *extra)
    B, T = x.shape[:2]
    keep = mask if mask is not None and tuple(mask.shape) == (B, T) else None
    if pool == "tokens":
        where = torch.ones(B, T, dtype=torch.bool, device=x.device) if keep is None else keep
        return (x[where], *(_each_token(one, where) for one in extra))
    if pool == "mean":
        if keep is None:
            return (x.mean(1), *extra)
        x = x.masked_fill(~keep[..., None], 0.0)
        return (x.sum(1) / keep.sum(1, keepdim=True).clamp_min(1), *extra)
    at = -1 if pool == "last" else pool
    if not isinstance(at, int):
        raise MeasureError(f"pool is {pool!r}; choose 'tokens', 'last', 'mean', 'flat' or a position")
    first = torch.zeros(B, dtype=torch.long, device=x.device) if keep is None else keep.long().argmax(1)
    count = torch.full((B,), T, device=x.device) if keep is None else keep.sum(1)
    place = first + (at if at >= 0 else count + at)
    if bool(((place < first) | (place >= first + count)).any()):
        raise MeasureError(f"position {at} is not in every row: the shortest has {int(count.min())} tokens")
    return (x[torch.arange(B, device=x.device), place], *extra)


def _each_token(one: Any, where: Tensor) -> Any:
    if not isinstance(one, Tensor):
        return one
    if one.shape[:2] == where.shape:
        return one.to(where.device)[where]
    if one.shape[0] == where.shape[0]:
        return one.to(where.device).repeat_interleave(where.sum(1), 0)
    raise MeasureError(f"labels of the shape {tuple(one.shape)} do not belong to tokens {tuple(where.shape)}")
