"""Representational similarity analysis: whether two sets of features find the same things alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from ..core.errors import MeasureError
from .paired import PairedSample

Distance = Literal["correlation", "cosine", "euclidean"]


class RSA(PairedSample):
    """Correlation of the dissimilarities that two sets of features give to the same pairs of rows.

    - ``rsa``: over all pairs of rows, the correlation of their distances in the one and in the other
    - ``rsa_rows``: how many rows took part, at most `size`

    Args:
        distance: between rows: ``"correlation"`` (1 - r over units), ``"cosine"`` or ``"euclidean"``.
        compare: ``"spearman"`` (ties share their mean rank) or ``"pearson"``.
        size: rows kept; up to so many, all of them.

    Shapes: x (N, unit), y (N, other). NaN when all distances of one of the two are equal.

    Raises:
        MeasureError: fewer than 4 rows, or a correlation distance over fewer than 2 units.

    Source: Kriegeskorte, Mur and Bandettini 2008.

    Example:
        >>> x = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
        >>> rsa = RSA(distance="euclidean")
        >>> rsa.update(x, 2 * x + 1)
        >>> round(float(rsa.compute()["rsa"]), 6)
        1.0
    """

    needs = 4

    def __init__(
        self,
        distance: Distance = "correlation",
        compare: Literal["spearman", "pearson"] = "spearman",
        size: int = 1024,
        **options: object,
    ):
        super().__init__(size, **options)
        if distance not in ("correlation", "cosine", "euclidean") or compare not in ("spearman", "pearson"):
            raise MeasureError(
                f"distance={distance!r} is 'correlation', 'cosine' or 'euclidean', and compare={compare!r} 'spearman' "
                "or 'pearson'"
            )
        self.distance, self.compare = distance, compare

    def values(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See the class."""
        x, y = self.rows(stats)
        a, b = dissimilarities(x, self.distance), dissimilarities(y, self.distance)
        if self.compare == "spearman":
            a, b = _ranks(a), _ranks(b)
        a, b = _centred(a), _centred(b)
        scale = a.norm() * b.norm()
        return {"rsa": (a @ b / scale).where(scale > 0, torch.nan), "rsa_rows": torch.tensor(len(x))}


def dissimilarities(x_NU: Tensor, distance: Distance = "correlation") -> Tensor:
    """The distances of all pairs of rows i < j, (N (N - 1) / 2), in the order of ``scipy.spatial.distance.pdist``.

    >>> dissimilarities(torch.tensor([[0.0, 0.0], [3.0, 4.0]]), "euclidean").tolist()
    [5.0]
    """
    if distance == "euclidean":
        return torch.nn.functional.pdist(x_NU.contiguous())
    if distance == "correlation":
        if x_NU.shape[1] < 2:
            raise MeasureError("a correlation distance is over 2 units or more; choose distance='euclidean'")
        x_NU = x_NU - x_NU.mean(1, keepdim=True)
    unit = torch.nn.functional.normalize(x_NU, dim=1, eps=1e-300 if x_NU.dtype == torch.float64 else 1e-30)
    upper = torch.triu_indices(len(unit), len(unit), 1, device=unit.device).unbind(0)
    distance = 1 - (unit @ unit.T)[upper]
    # Rows that are alike must not be told apart by rounding.
    return distance.where(distance.abs() > (1e-12 if x_NU.dtype == torch.float64 else 1e-6), 0.0)


def _centred(x: Tensor) -> Tensor:
    """Around the mean; zeros where all are equal up to rounding."""
    centred = x - x.mean()
    return centred.where(centred.norm() > 1e-12 * x.norm(), 0.0)


def _ranks(x: Tensor) -> Tensor:
    """Ranks, values that are equal up to rounding sharing their mean."""
    x = (x / x.abs().amax().clamp_min(1e-300)).round(decimals=12)
    _, which, count = x.unique(return_inverse=True, return_counts=True)
    count = count.double()
    return (count.cumsum(0) - (count - 1) / 2)[which]
