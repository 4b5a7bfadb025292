"""Quantiles of a stream: each unit's distribution in a fixed number of points, to update and to merge.

Letters: N examples, D units, K points.
"""

from __future__ import annotations

import torch
from torch import Tensor

from actome.core.errors import MeasureError


class Quantiles:
    r"""The distribution of each unit over a stream, in `size` points of equal weight; mean and range are exact.

    What arrives is sorted into what is there, and when more than twice `size` points are held, each unit's
    distribution is cut into `size` equal shares, of which the middles are kept. One such cut moves a point by
    :math:`1 / (2\,\text{size})` of the distribution at most, and merging does as an update of what the other has seen.
    Cuts happen once in so many examples as have been seen before, so there are about :math:`\log_2 (N / \text{size})`.

    Args:
        size: points kept.

    Attributes:
        count: examples seen.
        mean, low, high: (D), exact.

    >>> one, other = Quantiles(), Quantiles()
    >>> one.update(torch.arange(0.0, 5000.0)[:, None])
    >>> other.update(torch.arange(5000.0, 10000.0)[:, None])
    >>> one.merge(other)
    >>> one.count, one.high.tolist(), round(one.at(torch.tensor([0.5])).item(), -2)
    (10000, [9999.0], 5000.0)
    """

    def __init__(self, size: int = 512):
        if size < 16:
            raise MeasureError(f"size={size} points are too few for a distribution; keep 16 at least")
        self.size, self.count = size, 0
        self.mean = self.low = self.high = torch.empty(0, dtype=torch.float64)
        self._kept: list[tuple[Tensor, float]] = []  # rows, and how many examples each of them stands for
        self._waiting: list[Tensor] = []
        self._seen_at_cut = 0

    def update(self, x_ND: Tensor) -> None:
        """Takes examples (N, D) in.

        Raises:
            MeasureError: another number of units, or values that are not finite.
        """
        if x_ND.ndim != 2 or not len(x_ND):
            raise MeasureError(f"quantiles take examples (N, D), one at least, not {tuple(x_ND.shape)}")
        x = x_ND.detach().double().cpu()
        if not bool(torch.isfinite(x).all()):
            raise MeasureError("examples hold values that are not finite")
        self._note(len(x), x.mean(0), x.amin(0), x.amax(0))
        self._waiting.append(x)
        if self.count - self._seen_at_cut > max(2 * self.size, self._seen_at_cut):
            self._cut()

    def merge(self, other: Quantiles) -> None:
        """Takes in all that another one has seen; the other stays as it is."""
        if not other.count:
            return
        self._note(other.count, other.mean, other.low, other.high)
        self._kept += [*other._kept, *((x, 1.0) for x in other._waiting)]
        self._cut()

    def at(self, shares: Tensor) -> Tensor:
        """The quantiles at some shares from 0 to 1, (K, D).

        Raises:
            MeasureError: nothing has been seen.
        """
        if not self.count:
            raise MeasureError("nothing has been seen yet; update with examples first")
        rows = [*self._kept, *((x, 1.0) for x in self._waiting)]
        values, order = torch.cat([x for x, _ in rows]).sort(0)
        weight = torch.cat([torch.full((len(x),), each, dtype=torch.float64) for x, each in rows])[order]
        upto = weight.cumsum(0)
        middle_DK = ((upto - weight / 2) / upto[-1]).T.contiguous()
        wanted_DK = shares.double().expand(len(middle_DK), -1).contiguous()
        after = torch.searchsorted(middle_DK, wanted_DK).clamp(1, max(len(values) - 1, 1)).clamp_max(len(values) - 1)
        before = (after - 1).clamp_min(0)
        ahead, behind = middle_DK.gather(1, after), middle_DK.gather(1, before)
        part = ((wanted_DK - behind) / (ahead - behind).clamp_min(1e-300)).clamp(0, 1)
        ends = values.T
        return (ends.gather(1, before) * (1 - part) + ends.gather(1, after) * part).T

    def _note(self, count: int, mean: Tensor, low: Tensor, high: Tensor) -> None:
        if self.count and len(self.mean) != len(mean):
            raise MeasureError(f"examples of {len(mean)} units do not fit what was seen, of {len(self.mean)}")
        if not self.count:
            self.count, self.mean, self.low, self.high = count, mean, low, high
            return
        self.mean = self.mean + (mean - self.mean) * (count / (self.count + count))
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        self.count += count

    def _cut(self) -> None:
        if sum(len(x) for x, _ in self._kept) + sum(len(x) for x in self._waiting) > 2 * self.size:
            kept = self.at((torch.arange(self.size, dtype=torch.float64) + 0.5) / self.size)
            self._kept, self._waiting = [(kept, self.count / self.size)], []
        self._seen_at_cut = self.count
