"""What of a batch counts, and in which precision it is summed.

Letters: B batch, T position, U unit.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor


class Tokens(NamedTuple):
    """The tokens of a batch that count.

    Attributes:
        x: (batch, pos, unit), float32 or float64; tokens left out are zero vectors.
        keep: (batch, pos) bool, which tokens count; ``None`` when all do.
        count: how many count, an int64 scalar.
        real: how many are not padding, an int64 scalar; more than `count` when some were not finite.
        non_finite: how many activations of real tokens are NaN or infinite, an int64 scalar.
    """

    x: Tensor
    keep: Tensor | None
    count: Tensor
    real: Tensor
    non_finite: Tensor


def real_tokens(x_BTU: Tensor, mask_BT: Tensor | None = None) -> Tokens:
    """Leaves out padding and every token with a non-finite unit, without a copy when there are none.

    Left-out tokens become zero vectors: they add nothing to sums, to maxima of absolute values, or to counts of units
    that exceed something, so a measure needs to know of them only through `count` (and `keep`, for tokenwise means).

    The check for non-finite units waits for the device once a call. What is returned must not be written to.

    >>> real_tokens(torch.tensor([[[1.0, 2.0], [float("nan"), 3.0]]])).count
    tensor(1)
    """
    return shared("tokens", x_BTU, mask_BT, lambda: _real_tokens(x_BTU, mask_BT))


def token_norms(x_BTU: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """Lengths of the tokens' vectors, (batch, pos), 0 for those that `real_tokens` leaves out; not to be written to.

    >>> token_norms(torch.tensor([[[3.0, 4.0], [torch.inf, 3.0]]]))
    tensor([[5., 0.]])
    """
    keep, norm_BT = real_tokens(x_BTU, mask_BT).keep, all_norms(x_BTU)
    return norm_BT if keep is None else norm_BT.where(keep, 0.0)


def all_norms(x_BTU: Tensor) -> Tensor:
    """Lengths of all vectors, (batch, pos), padding and what is not finite among them; not to be written to."""
    return shared("norms", x_BTU, None, lambda: torch.linalg.vector_norm(_wide_once(x_BTU), dim=-1))


def unit_peaks(x_BTU: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """Largest magnitude of each unit in each row, (batch, unit), over what `real_tokens` keeps; not to be written to.

    >>> unit_peaks(torch.tensor([[[3.0, -4.0], [1.0, 3.0]]]))
    tensor([[3., 4.]])
    """

    def make() -> Tensor:
        x = real_tokens(x_BTU, mask_BT).x
        # Cheaper than the maximum of the absolute values, which would be written to memory first.
        return torch.maximum(x.amax(1), -x.amin(1))

    return shared("peaks", x_BTU, mask_BT, make)


T = TypeVar("T")


def shared(name: str, x: Tensor, beside: Tensor | None, make: Callable[[], T]) -> T:
    """What `make` makes of a tensor, made once for all measures that look at it one after the other.

    Only within `shared_tokens`; elsewhere it is made anew. Nobody may write to it.

    Args:
        name: of what is made; the same name, the same thing.
        x: the tensor it is made of.
        beside: another that it depends on, such as the mask.
        make: a pure function of the two, which depends on nothing else.
    """
    memo = _LOCAL.__dict__.get("memo")
    # Tensors made in inference mode do not count their changes.
    if memo is None or x.is_inference() or (beside is not None and beside.is_inference()):
        return make()
    if not memo or not memo[0].holds(x):
        memo[:] = [_Memo(x)]
    return memo[0].part(name, beside, make)


@contextlib.contextmanager
def shared_tokens() -> Iterator[None]:
    """Within it, measures that look at the same tensor one after the other share what they make of it (`shared`)."""
    before = _LOCAL.__dict__.get("memo")
    _LOCAL.memo = []
    try:
        yield
    finally:
        _LOCAL.memo = before


def forget() -> None:
    """Lets go of the last tensor and of what was made of it, so that its memory is free as soon as its owner's."""
    if memo := _LOCAL.__dict__.get("memo"):
        memo.clear()


_LOCAL = threading.local()


class _Memo:
    """What was made of the last tensor, which is held so that its memory is not given to another."""

    def __init__(self, x: Tensor):
        self.x, self.version = x, x._version
        self.parts: dict[tuple[str, int], tuple[Tensor | None, int, Any]] = {}

    def holds(self, x: Tensor) -> bool:
        mine = self.x
        return (
            x.data_ptr() == mine.data_ptr()
            and x.shape == mine.shape
            and x.stride() == mine.stride()
            and x.dtype == mine.dtype
            and x.device == mine.device
            and x._version == self.version
        )

    def part(self, name: str, beside: Tensor | None, make: Callable[[], Any]) -> Any:
        version = 0 if beside is None else beside._version
        # What it was made beside is held too, or another could have its `id`.
        found = self.parts.get((name, id(beside)))
        if found is None or found[1] != version:
            found = self.parts[name, id(beside)] = beside, version, make()
        return found[2]


def _real_tokens(x_BTU: Tensor, mask_BT: Tensor | None) -> Tokens:
    x, norm_BT, keep = _wide_once(x_BTU), all_norms(x_BTU), mask_BT
    if keep is None:
        real = torch.full((), x.shape[0] * x.shape[1], device=x.device)
    else:
        x, norm_BT, real = x.masked_fill(~keep[..., None], 0.0), norm_BT.where(keep, 0.0), keep.sum()
    # Norms are finite only if every entry is; should one of them alone overflow, the look decides.
    if math.isfinite(norm_BT.sum()):
        return Tokens(x, keep, real, real, torch.zeros_like(real))
    finite_BTU = x.isfinite()
    finite = finite_BTU.all(-1)
    keep = finite if keep is None else keep & finite
    return Tokens(x.masked_fill(~keep[..., None], 0.0), keep, keep.sum(), real, (~finite_BTU).sum())


def _wide_once(x: Tensor) -> Tensor:
    return shared("wide", x, None, lambda: wide(x))


def wide(x: Tensor) -> Tensor:
    """In float32, or float64 when it is already."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def double(x: Tensor) -> Tensor:
    """In float64 where the device has it, for sums over many tokens; a copy, so for small tensors."""
    return x.float() if x.device.type == "mps" else x.double()


def ratio(part: Tensor, whole: Tensor) -> Tensor:
    """`part / whole` in float64, which torch would give in float32 for two counts; NaN for nothing of nothing."""
    return double(part) / double(whole)
