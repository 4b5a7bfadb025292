"""Mutual nearest neighbours: whether two sets of features put the same rows next to one another."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..core.errors import MeasureError
from .paired import PairedSample


class MutualKNN(PairedSample):
    r"""Share of the k nearest neighbours that are the same in two sets of features.

    - ``mutual_knn``: mean over rows of :math:`|N_k^x(i) \cap N_k^y(i)| / k`, neighbours by cosine
    - ``mutual_knn_chance``: k / (n - 1), what unrelated features give
    - ``mutual_knn_rows``: n, at most `size`; the value depends on it, so compare at equal n

    Args:
        k: how many neighbours.
        size: rows kept; up to so many, all of them.
        centre: subtract each one's mean first.

    Shapes: x (N, unit), y (N, other).

    Raises:
        MeasureError: fewer than k + 2 rows.

    Source: Huh, Cheung, Wang and Isola 2024, The Platonic Representation Hypothesis (appendix A), without its clipping
    of outliers.

    Example:
        >>> x = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
        >>> knn = MutualKNN(k=3)
        >>> knn.update(x, 2 * x)
        >>> float(knn.compute()["mutual_knn"])
        1.0
    """

    def __init__(self, k: int = 10, size: int = 1024, centre: bool = False, **options: object):
        super().__init__(size, **options)
        if k < 1 or size < k + 2:
            raise MeasureError(f"k={k} and size={size}: at least one neighbour, and k + 2 rows")
        self.k, self.centre = k, centre

    def values(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See the class."""
        x, y = self.rows(stats)
        n = len(x)
        if n < self.k + 2:
            raise MeasureError(f"{self.k} neighbours need {self.k + 2} rows or more, and there were {n}")
        shared = (self._nearest(x) & self._nearest(y)).sum() / (self.k * n)
        return {
            "mutual_knn": shared,
            "mutual_knn_chance": torch.tensor(self.k / (n - 1)),
            "mutual_knn_rows": torch.tensor(n),
        }

    def _nearest(self, x_NU: Tensor) -> Tensor:
        """(N, N) bool, row i True at the neighbours of i."""
        if self.centre:
            x_NU = x_NU - x_NU.mean(0)
        unit = torch.nn.functional.normalize(x_NU, dim=1, eps=1e-300)
        cosine = (unit @ unit.T).fill_diagonal_(-torch.inf)
        return torch.zeros_like(cosine, dtype=torch.bool).scatter_(1, cosine.topk(self.k).indices, True)
