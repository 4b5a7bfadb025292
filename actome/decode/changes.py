"""Where a series of outcome distributions changes: stretches of one distribution each, by Bayes and exactly.

Letters: T positions, C outcomes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from actome.core.errors import MeasureError


@dataclass(frozen=True, eq=False)
class Changes:
    """A series parted into stretches within which nothing changes.

    Attributes:
        probability: (T), float64, the posterior probability that a stretch begins at each position; 0 at the first.
        starts: the first position of each stretch of the likeliest parting, 0 among them.
        expected: posterior mean number of changes.
        evidence: log Bayes factor, in nats, of any number of changes against none, with the prior that was given.
    """

    probability: Tensor
    starts: tuple[int, ...]
    expected: float
    evidence: float


def change_points(counts_TC: Tensor, *, prior: float | None = None, concentration: float = 0.5) -> Changes:
    r"""Posterior of the places at which counts begin to come from another distribution.

    A product-partition model: each position but the first begins a new stretch with probability `prior`, and all
    counts of a stretch come from one distribution with a symmetric Dirichlet prior, which is integrated out,
    :math:`\log p(\text{stretch}) = \log B(a + \sum_t n_t) - \log B(a)`. Sums over all :math:`2^{T-1}` partings are
    exact, in O(T^2).

    Counts are taken to be as noisy as draws are. A distribution that drifts within a stretch gives several short ones.

    Args:
        counts_TC: how often each outcome was seen at each position; need not be whole numbers.
        prior: of a change at a position; one change in the series by default.
        concentration: of the Dirichlet prior; 0.5 is Jeffreys'.

    Raises:
        MeasureError: negative or non-finite counts, fewer than two positions, a prior outside 0 to 1.

    Source: Barry and Hartigan 1992, Product Partition Models for Change Point Problems. The paper on forking paths
    (Bigelow et al. 2025) fits change points to distances from the first distribution; here they are fitted to the
    distributions themselves.

    >>> found = change_points(torch.tensor([[9.0, 1.0]] * 5 + [[1.0, 9.0]] * 5))
    >>> found.starts, bool(found.probability[5] > 0.95)
    ((0, 5), True)
    """
    counts = torch.as_tensor(counts_TC, dtype=torch.float64)
    if counts.ndim != 2 or len(counts) < 2 or not bool(counts.isfinite().all()) or bool((counts < 0).any()):
        raise MeasureError(
            f"change_points takes finite counts of at least two positions, (T, C), not {tuple(counts.shape)}"
        )
    T = len(counts)
    prior = 1 / T if prior is None else prior
    if not 0 < prior < 1 or concentration <= 0:
        raise MeasureError(f"prior={prior} must lie between 0 and 1, and concentration={concentration} above 0")
    sums = torch.cat([counts.new_zeros(1, counts.shape[1]), counts.cumsum(0)])
    within = (sums[None] - sums[:, None]).clamp_min(0)  # [i, j]: counts of positions i to j - 1
    log_IJ = _log_beta(within + concentration) - _log_beta(counts.new_full((counts.shape[1],), concentration))
    length_IJ = torch.arange(T + 1)[None] - torch.arange(T + 1)[:, None]
    log_IJ = log_IJ + (length_IJ - 1) * math.log1p(-prior)
    log_IJ = log_IJ.where(length_IJ > 0, -math.inf)
    log_IJ[1:] += math.log(prior)  # a stretch that begins anywhere but at 0 is a change

    before, best = counts.new_full((T + 1,), -math.inf), counts.new_full((T + 1,), -math.inf)
    back = [0] * (T + 1)
    before[0] = best[0] = 0.0
    for j in range(1, T + 1):
        before[j] = torch.logsumexp(before[:j] + log_IJ[:j, j], 0)
        value, at = (best[:j] + log_IJ[:j, j]).max(0)
        best[j], back[j] = value, int(at)
    after = counts.new_full((T + 1,), -math.inf)
    after[T] = 0.0
    for i in range(T - 1, -1, -1):
        after[i] = torch.logsumexp(log_IJ[i, i + 1 :] + after[i + 1 :], 0)
    probability = (before[:T] + after[:T] - before[T]).exp()
    probability[0] = 0.0
    starts, j = [], T
    while j > 0:
        j = back[j]
        starts.append(j)
    none = float(log_IJ[0, T])  # prior of no change included
    rest = float(before[T]) + math.log1p(-min(math.exp(none - float(before[T])), 1 - 1e-16))
    no_change = (T - 1) * math.log1p(-prior)
    evidence = (rest - math.log1p(-math.exp(no_change))) - (none - no_change)
    return Changes(probability, tuple(reversed(starts)), float(probability.sum()), evidence)


def _log_beta(alpha: Tensor) -> Tensor:
    return torch.lgamma(alpha).sum(-1) - torch.lgamma(alpha.sum(-1))
