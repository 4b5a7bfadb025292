"""A bounded sample of a stream of vectors that does not depend on how the stream was cut up.

Each vector gets a key from what it holds, as good as random, and those with the smallest keys are kept. So the sample
of a merge is the sample of the whole, in whatever order it came.

Letters: N vectors, U unit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .tally import mixed

_LOOKED_AT = 128  # units that make the key; more would cost and not help
_BITS = 24  # what a float32 holds of a key


def keyed(x_NU: Tensor, size: int, *more: Tensor) -> Tensor:
    """The `size` vectors with the smallest keys: (size, 2 + unit + ...), float32 or float64, smallest first.

    Args:
        x_NU: the vectors, whose content makes the keys; equal ones have the same.
        size: how many; where there are fewer, the rest has infinite keys and is 0 otherwise.
        more: what goes with each vector, (N, anything).
    """
    key = _keys(x_NU)
    order = key.sort().indices[:size]
    rows = torch.cat([_halves(key[order]).to(x_NU.dtype), *(one[order].to(x_NU.dtype) for one in (x_NU, *more))], 1)
    if len(rows) == size:
        return rows
    nothing = rows.new_zeros(size - len(rows), rows.shape[1])
    nothing[:, :2] = torch.inf
    return torch.cat([rows, nothing])


def smallest(rows: Tensor, size: int) -> Tensor:
    """Those of the rows (*stack, N, 2 + ...) with the smallest keys, smallest first."""
    high, low = rows[..., 0].double(), rows[..., 1].double()
    order = (high * 2.0**_BITS + low).sort(dim=-1, stable=True).indices[..., :size]
    return rows.gather(-2, order[..., None].expand(*order.shape, rows.shape[-1]))


def kept(rows: Tensor) -> Tensor:
    """The vectors of a reservoir without their keys, (N, unit): those that are there."""
    return rows[rows[:, 0].isfinite(), 2:]


def _keys(x_NU: Tensor) -> Tensor:
    """48 bits for each vector, int64; equal for equal vectors and else as good as random."""
    units = x_NU.shape[1]
    step = max(1, units // _LOOKED_AT)
    bits = (x_NU[:, ::step] + 0.0).float().contiguous().view(torch.int32).long()  # + 0.0: no negative zeros
    generator = torch.Generator().manual_seed(0)
    odd = torch.randint(-(2**62), 2**62, (bits.shape[1],), generator=generator).to(bits.device) * 2 + 1
    return mixed((bits * odd).sum(1)) & ((1 << 2 * _BITS) - 1)


def _halves(key: Tensor) -> Tensor:
    return torch.stack([key >> _BITS, key & ((1 << _BITS) - 1)], 1)
