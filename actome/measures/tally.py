"""Tallies: how often each distinct row of a stream occurred, in bounded memory.

Rows are known by 64-bit hashes. Up to a cap all are kept and everything is exact; beyond it only the rows with the
smallest hashes stay. A hash that was kept once more rows came has been kept since it first appeared, so its count is
exact, and which rows stay depends neither on order nor on how the stream was cut: it is a random sample of the
*distinct* rows, whose share is known from the largest hash kept (Bar-Yossef et al. 2002; Beyer et al. 2007).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_WRAP = 1 << 64
# The multipliers of splitmix64 (Steele et al. 2014), as signed 64-bit numbers.
_GOLDEN, _FIRST, _SECOND = (
    n - _WRAP for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)  # fmt: skip


def mixed(x: Tensor) -> Tensor:
    """Integers spread over all int64 values, one to one and the same everywhere.

    >>> len(set(mixed(torch.arange(1000)).tolist()))
    1000
    """
    x = x.long() + _GOLDEN
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def row_hashes(symbols_NU: Tensor) -> Tensor:
    """One 64-bit hash for each row of integers, (rows); equal rows have equal ones.

    Two of n different rows share one by accident with a chance of n^2 / 2^65.

    >>> a, b, c = row_hashes(torch.tensor([[0, 1], [0, 1], [1, 0]])).tolist()
    >>> a == b, a == c
    (True, False)
    """
    out = torch.full(symbols_NU.shape[:1], symbols_NU.shape[-1], dtype=torch.int64, device=symbols_NU.device)
    for column in symbols_NU.unbind(-1):
        out = mixed(out ^ column.long())
    return out


def packed(bits_NU: Tensor) -> Tensor:
    """Booleans in 63-bit words, (rows, words), so that hashing takes a step for 63 of them and not for each."""
    words = []
    for part in bits_NU.split(63, -1):
        weight = 2 ** torch.arange(part.shape[-1], device=bits_NU.device)
        words.append((part.long() * weight).sum(-1))
    return torch.stack(words, -1) if words else bits_NU.new_zeros(len(bits_NU), 0, dtype=torch.int64)


def tallied(rows: Tensor, cap: int) -> Tensor:
    """Rows (hash, count, ...) with equal hashes put together, those with the smallest hashes kept.

    One row more than `cap` is kept where there are more: its hash says how large a share of all was kept.

    >>> tallied(torch.tensor([[7, 1], [3, 1], [7, 1]]), cap=10).tolist()
    [[3, 1], [7, 2]]
    """
    hashes, where = rows[:, 0].unique(return_inverse=True)
    counts = rows.new_zeros(len(hashes), rows.shape[1] - 1).index_add_(0, where, rows[:, 1:])
    return torch.cat([hashes[:, None], counts], -1)[: cap + 1]


class Kept(NamedTuple):
    """What of a tally to sum over.

    Attributes:
        counts: (rows, columns) float64, of the distinct rows that were kept.
        share: of all distinct rows that these are, known or estimated; 1 when all were kept.
    """

    counts: Tensor
    share: float

    def total(self, of_each: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of something over all distinct rows, from what it is for those kept, and its standard error."""
        variance = (1 - self.share) / self.share**2 * of_each.square().sum(0)
        return of_each.sum(0) / self.share, variance.sqrt()


def kept(rows: Tensor, cap: int) -> Kept:
    """The counts of a tally made by `tallied` with the same cap.

    >>> kept(torch.tensor([[3, 1], [7, 2]]), cap=10)
    Kept(counts=tensor([[1.],
            [2.]], dtype=torch.float64), share=1.0)
    """
    if len(rows) <= cap:
        return Kept(rows[:, 1:].double(), 1.0)
    # The hashes spread evenly over 2^64 values; `cap` of all distinct ones lie below that of the row kept in excess.
    return Kept(rows[:cap, 1:].double(), (int(rows[cap, 0]) + _WRAP // 2) / _WRAP)


def _shifted(x: Tensor, by: int) -> Tensor:
    return (x >> by) & ((1 << (64 - by)) - 1)
