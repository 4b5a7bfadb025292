"""How varied a set of images (or texts, or sounds) is, on a scale that pairs of a reference collection give."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor

from ..core.errors import MeasureError
from ..core.fold import Fold, Reduction
from ..core.real import double, wide

_KNOTS = 20_001  # of the calibration: quantiles in steps of 0.00005


class SetVariability(Fold):
    r"""W1KP: how alike the members of a set are, calibrated, and how many of them one may take before they repeat.

    With unit-length embeddings :math:`e_i` of the members and :math:`d_{ij} = \|e_i - e_j\|`:

    - ``mean``: the mean of :math:`d_{ij}` over pairs
    - ``u``: :math:`F(\text{mean})`, F the distribution of the distances of pairs of a reference collection; 0 all alike
    - ``w1kp``: 1 - u; 1 all alike
    - ``reuse``: the first k such that the k-th member drawn has a chance above one half of being `alike` one of those
      drawn before it (infinite when the set never gets there). Exact over all orders: with :math:`m_i` members alike
      member *i*, the chance is :math:`\operatorname{mean}_i 1 - \binom{n-1-m_i}{k-1} / \binom{n-1}{k-1}`

    F is the empirical distribution of the reference, (0, 0) and (2, 1) added, linear in between. For single pairs that
    are drawn as the reference's were, F(d) is uniform; the mean over a set is no pair, and its u is not. The reference
    must not hold the sets to be judged. ``u``, ``w1kp`` and ``reuse`` are NaN before `calibrate`.

    The embeddings are kept, up to `keep` of them: beyond that a pseudo-random choice which depends on their values
    only, not on the order they came in.

    Args:
        alike: two members count as alike when F(d) is at most this. Where to put it is for people to say (the paper
            asked them); without them, take it from sets of known variance.
        keep: how many embeddings are kept at most; all their pairs are taken.

    Shapes: `update(embeddings)` takes (N, unit); all values ().

    Source: Tang et al. 2024, Words Worth a Thousand Pictures (pairs are sampled there for reuse).

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> wide, narrow = torch.randn(40, 8, generator=g), 1 + 0.1 * torch.randn(40, 8, generator=g)
        >>> measure = SetVariability().calibrate([wide, narrow])
        >>> measure.update(1 + 0.1 * torch.randn(40, 8, generator=g))
        >>> values = measure.compute()
        >>> bool(values["w1kp"] > 0.5), int(values["reuse"])
        (True, 5)
    """

    reductions: ClassVar[dict[str, Reduction]] = {"embeddings": "cat"}

    def __init__(self, alike: float = 0.1, keep: int = 1024, **options: object):
        super().__init__(**options)
        if not 0 <= alike <= 1:
            raise MeasureError(f"alike={alike} is a quantile, between 0 and 1")
        if keep < 2:
            raise MeasureError(f"keep={keep}; pairs need two embeddings at least")
        self.alike, self.keep = alike, keep
        self.knots = torch.empty(0, dtype=torch.float64)

    def calibrate(self, reference: Sequence[Tensor]) -> Self:
        """Takes the scale from a collection of sets, by the distances of all pairs within each.

        Args:
            reference: embeddings of each set, (N, unit).

        Raises:
            MeasureError: there is no pair in it, or fewer than 100: such a scale would be a guess.
        """
        distances = torch.cat([pair_distances(one) for one in reference]) if len(reference) else torch.empty(0)
        if len(distances) < 100:
            raise MeasureError(f"the reference has {len(distances)} pairs; at least 100 are needed for a scale")
        distances = distances.cpu().sort().values
        if len(distances) > _KNOTS:
            distances = distances[torch.linspace(0, len(distances) - 1, _KNOTS).round().long()]
        self.knots = distances
        return self

    def quantile(self, distance: Tensor) -> Tensor:
        """F of distances, of any shape: their place among those of the reference, 0 to 1.

        Example:
            >>> measure = SetVariability().calibrate([torch.randn(50, 4, generator=torch.Generator().manual_seed(0))])
            >>> measure.quantile(torch.tensor([0.0, 2.0])).tolist()
            [0.0, 1.0]
        """
        import numpy as np

        if not len(self.knots):
            return torch.full_like(double(distance), torch.nan)
        n = len(self.knots)
        x = np.concatenate([[0.0], self.knots.numpy(), [2.0]])
        y = np.concatenate([[0.0], np.arange(1, n + 1) / (n + 1), [1.0]])
        found = np.interp(distance.double().cpu().numpy(), x, y)
        return torch.as_tensor(found, dtype=torch.float64).to(distance.device)

    def statistics(self, embeddings: Tensor) -> dict[str, Tensor]:
        """embeddings: (N, unit), of unit length; rows that are not finite or all zero are left out."""
        if embeddings.ndim != 2:
            raise MeasureError(f"SetVariability takes embeddings (N, unit), not {tuple(embeddings.shape)}")
        return {"embeddings": self.bounded("embeddings", _unit(embeddings))}

    def bounded(self, name: str, rows: Tensor) -> Tensor:
        """The rows with the smallest keys, keys being pseudo-random functions of the rows themselves."""
        if len(rows) <= self.keep:
            return rows
        weights = torch.linspace(1.0, 2.0, rows.shape[1], dtype=torch.float64, device=rows.device).sqrt()
        keys = torch.frac(torch.sin(rows.double() @ weights * 12.9898) * 43758.5453).abs()
        return rows[keys.argsort()[: self.keep].sort().values]

    def values(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See the class."""
        embeddings = stats["embeddings"]
        n = len(embeddings) if embeddings.ndim else 0
        if n < 2:
            raise MeasureError(f"{n} embeddings make no pair; at least 2 are needed")
        distance_NN = _distances(embeddings)
        mean = distance_NN.sum() / (n * (n - 1))
        u = self.quantile(mean)
        reuse = torch.tensor(torch.nan)
        if len(self.knots):
            alike_NN = self.quantile(distance_NN) <= self.alike
            reuse = torch.tensor(_reuse(alike_NN.fill_diagonal_(False).sum(1)))
        return {"mean": mean, "u": u, "w1kp": 1 - u, "reuse": reuse.double()}


def pair_distances(embeddings: Tensor) -> Tensor:
    """The distances of all pairs of embeddings (N, unit) once they have unit length, (N (N - 1) / 2).

    >>> pair_distances(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]]))
    tensor([0.0000, 1.4142, 1.4142], dtype=torch.float64)
    """
    distance_NN = _distances(_unit(embeddings))
    rows, columns = torch.triu_indices(len(distance_NN), len(distance_NN), 1)
    return distance_NN[rows, columns]


def _unit(x: Tensor) -> Tensor:
    x = double(wide(x.detach()))
    norm = x.norm(dim=-1, keepdim=True)
    keep = (norm[:, 0] > 0) & norm[:, 0].isfinite()
    return (x / norm)[keep]


def _distances(unit_NU: Tensor) -> Tensor:
    # Differences and not products: the distance of two that are nearly alike would drown in rounding otherwise.
    return torch.cdist(unit_NU, unit_NU, compute_mode="donot_use_mm_for_euclid_dist")


def _reuse(alike_N: Tensor) -> float:
    """The first k whose chance of meeting one alike among k - 1 others is above one half."""
    n = len(alike_N)
    others = n - 1 - alike_N.double()
    log_chance = torch.zeros(n, dtype=torch.float64)  # of meeting none, one more drawn each time
    for k in range(2, n + 1):
        log_chance = log_chance + (((others - (k - 2)).clamp_min(0)) / (n - 1 - (k - 2))).log()
        if float((1 - log_chance.exp()).mean()) > 0.5:
            return float(k)
    return math.inf
