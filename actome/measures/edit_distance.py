"""Edit distances of many pairs of integer strings at once.

Letters: N strings, M symbols of a string, P pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor


def edit_distance(a_PM: Tensor, b_PM: Tensor) -> Tensor:
    """Levenshtein distances of pairs of integer strings, (P); entries below 0 are left out, wherever they stand.

    >>> edit_distance(torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, -1]])).tolist()
    [1]
    """
    (a, length_a), (b, length_b) = packed(a_PM), packed(b_PM)
    column = torch.arange(b.shape[1] + 1, dtype=torch.int32)
    row = column.expand(len(a), -1).contiguous()
    at_b = length_b[:, None]
    out = row.gather(1, at_b)[:, 0]
    for i in range(a.shape[1]):
        best = row + 1
        best[:, 1:] = torch.minimum(best[:, 1:], row[:, :-1] + (b != a[:, i : i + 1]))
        # What may still be inserted: new[j] = min over j' <= j of best[j'] + (j - j').
        row = (best - column).cummin(1).values + column
        out = torch.where(length_a == i + 1, row.gather(1, at_b)[:, 0], out)
    return out


def packed(strings: Tensor) -> tuple[Tensor, Tensor]:
    """Strings with what is left out (entries below 0) moved to their end, and their lengths.

    >>> packed(torch.tensor([[-1, 5, 6]]))[0].tolist()
    [[5, 6, -1]]
    """
    absent = strings < 0
    order = absent.byte().argsort(dim=1, stable=True)
    return strings.gather(1, order), (~absent).sum(1)


def mean_distance(symbols_NM: Tensor, count_N: Tensor, chunk: int = 1 << 14) -> Tensor:
    """Mean distance of two different samples, in parts of the longer string; a float64 scalar.

    Args:
        symbols_NM: the different strings, as for `edit_distance`.
        count_N: how many samples have each string; NaN is returned for fewer than two samples.
        chunk: pairs at a time.

    >>> float(mean_distance(torch.tensor([[1, 2], [1, 3]]), torch.tensor([1.0, 1.0])))
    0.5
    """
    total = count_N.sum()
    if total < 2:
        return torch.full((), torch.nan, dtype=torch.float64)
    a, b = torch.triu_indices(len(symbols_NM), len(symbols_NM), 1)
    length = (symbols_NM >= 0).sum(1)
    # Packed to the longest: parts of a single layer are short.
    symbols_NM = packed(symbols_NM)[0][:, : max(1, int(length.max()))]
    out = torch.zeros((), dtype=torch.float64)
    for i in range(0, len(a), chunk):
        one, other = a[i : i + chunk], b[i : i + chunk]
        longer = torch.maximum(length[one], length[other]).clamp_min(1)
        distance = edit_distance(symbols_NM[one], symbols_NM[other]) / longer.double()
        out += (2 * count_N[one] * count_N[other] * distance).sum()
    return out / (total * (total - 1))
