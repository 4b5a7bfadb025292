"""What of a batch counts, and in which precision it is summed.

Letters: B batch, T position, U unit.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator
from typing import NamedTuple

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
    memo = _LOCAL.__dict__.get("memo")
    if memo is None:
        return _real_tokens(x_BTU, mask_BT)
    if not memo or not memo[0].holds(x_BTU, mask_BT):
        memo[:] = [_Memo(x_BTU, mask_BT, _real_tokens(x_BTU, mask_BT))]
    return memo[0].tokens


@contextlib.contextmanager
def shared_tokens() -> Iterator[None]:
    """Within it, measures that look at the same tensor one after the other share what `real_tokens` makes of it."""
    before = _LOCAL.__dict__.get("memo")
    _LOCAL.memo = []
    try:
        yield
    finally:
        _LOCAL.memo = before


_LOCAL = threading.local()


class _Memo:
    """The last tensor, held so that its memory is not given to another, and its tokens."""

    def __init__(self, x: Tensor, mask: Tensor | None, tokens: Tokens):
        self.x, self.mask, self.tokens = x, mask, tokens
        self.version = _version(x)

    def holds(self, x: Tensor, mask: Tensor | None) -> bool:
        mine = self.x
        return (
            x.data_ptr() == mine.data_ptr()
            and x.shape == mine.shape
            and x.stride() == mine.stride()
            and x.dtype == mine.dtype
            and x.device == mine.device
            and mask is self.mask
            and self.version is not None
            and _version(x) == self.version
        )


def _version(x: Tensor) -> int | None:
    # Tensors made in inference mode do not count their changes.
    return None if x.is_inference() else x._version


def _real_tokens(x_BTU: Tensor, mask_BT: Tensor | None) -> Tokens:
    x, keep = wide(x_BTU), mask_BT
    if keep is None:
        real = torch.full((), x.shape[0] * x.shape[1], device=x.device)
    else:
        x, real = x.masked_fill(~keep[..., None], 0.0), keep.sum()
    # The sum is finite only if every entry is, and costs one pass; should the sum alone overflow, the look decides.
    if math.isfinite(x.sum()):
        return Tokens(x, keep, real, real, torch.zeros_like(real))
    finite_BTU = x.isfinite()
    finite = finite_BTU.all(-1)
    keep = finite if keep is None else keep & finite
    return Tokens(x.masked_fill(~keep[..., None], 0.0), keep, keep.sum(), real, (~finite_BTU).sum())


def wide(x: Tensor) -> Tensor:
    """In float32, or float64 when it is already."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def double(x: Tensor) -> Tensor:
    """In float64 where the device has it, for sums over many tokens; a copy, so for small tensors."""
    return x.float() if x.device.type == "mps" else x.double()


def ratio(part: Tensor, whole: Tensor) -> Tensor:
    """`part / whole` in float64, which torch would give in float32 for two counts; NaN for nothing of nothing."""
    return double(part) / double(whole)
