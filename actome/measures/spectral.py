r"""What the eigenvalues of a covariance say: ranks, concentration, decay. Pure functions.

Where a sketch knows only the leading eigenvalues, it also knows the sum and the square sum of the others. They are then
taken to be spread as a gamma distribution of that mean and variance, which is needed only for what depends on more than
these two sums: entropies.

Letters: K rank (of an eigenvalue, the largest first).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.errors import MeasureError


class Eigenvalues(NamedTuple):
    r"""Eigenvalues, all of them or the leading ones.

    Attributes:
        known: (\*stack, rank), largest first.
        rest: (\*stack), the sum of those that are not known; 0 where all are.
        rest_square: (\*stack), an estimate of the sum of their squares.
        count: (\*stack), how many there are at most: as many as units, and no more than the tokens allow.
    """

    known: Tensor
    rest: Tensor
    rest_square: Tensor
    count: Tensor

    @classmethod
    def all(cls, known: Tensor, count: Tensor) -> Eigenvalues:
        """Of a matrix that is known exactly."""
        return cls(known, torch.zeros_like(known[..., 0]), torch.zeros_like(known[..., 0]), count)

    @property
    def trace(self) -> Tensor:
        return self.known.sum(-1) + self.rest


class _Tail(NamedTuple):
    """The eigenvalues that are not known, as a gamma distribution; nothing where `count` is 0."""

    count: Tensor
    mean: Tensor
    shape: Tensor


def _tail(eigen: Eigenvalues) -> _Tail:
    count = (eigen.count - (eigen.known > 0).sum(-1)).clamp_min(0).to(eigen.known.dtype)
    count = count.where(eigen.rest > 0, 0.0)
    mean = eigen.rest / count.clamp_min(1)
    spread = eigen.rest_square / count.clamp_min(1) / mean.square() - 1  # squared coefficient of variation
    return _Tail(count, mean.where(count > 0, 1.0), spread.where(count > 0, 1.0).clamp(1e-6, 1e3).reciprocal())


def trace_share_missed(eigen: Eigenvalues) -> Tensor:
    """Share of the trace in eigenvalues that are not known, 0 to 1."""
    return eigen.rest / eigen.trace


def entropy_rank(eigen: Eigenvalues, power: float = 1.0) -> Tensor:
    r"""The exponential of the entropy of :math:`p_k \propto \lambda_k^{power}`; power 1/2 is of the singular values.

    >>> flat = Eigenvalues.all(torch.ones(4, dtype=torch.float64), torch.tensor(4))
    >>> round(float(entropy_rank(flat)), 6)
    4.0
    """
    total, weighed = _power_sums(eigen, power)
    return (total.log() - power * weighed / total).exp()


def renyi_entropy(eigen: Eigenvalues, order: float) -> Tensor:
    r"""Entropy of order :math:`\alpha` of :math:`p_k \propto \lambda_k`, in nats; of order 1 that of Shannon."""
    if order == 1:
        return entropy_rank(eigen).log()
    return (_power_sums(eigen, order)[0].log() - order * eigen.trace.log()) / (1 - order)


def _power_sums(eigen: Eigenvalues, power: float) -> tuple[Tensor, Tensor]:
    r""":math:`\sum \lambda^p` and :math:`\sum \lambda^p \ln \lambda`."""
    known = eigen.known.clamp_min(0.0)
    raised = known.pow(power).where(known > 0, 0.0).where(~known.isnan(), known)
    total, weighed = raised.sum(-1), torch.xlogy(raised, known).sum(-1)
    tail = _tail(eigen)
    k = tail.shape
    moment = tail.count * tail.mean.pow(power) * (torch.lgamma(k + power) - torch.lgamma(k) - power * k.log()).exp()
    return total + moment, weighed + moment * (torch.digamma(k + power) + (tail.mean / k).log())


def participation_ratio(eigen: Eigenvalues) -> Tensor:
    r""":math:`(\sum \lambda)^2 / \sum \lambda^2`, in which the unknown eigenvalues take part by their two sums.

    >>> round(float(participation_ratio(Eigenvalues.all(torch.tensor([1.0, 1.0, 0.0]), torch.tensor(3)))), 6)
    2.0
    """
    return eigen.trace.square() / (eigen.known.square().sum(-1) + eigen.rest_square)


def leading_share(eigen: Eigenvalues, k: int) -> Tensor:
    """Share of the trace in the `k` leading eigenvalues; NaN where fewer are known.

    >>> round(float(leading_share(Eigenvalues.all(torch.tensor([3.0, 1.0]), torch.tensor(2)), 1)), 6)
    0.75
    """
    told = (eigen.rest <= 0) | ((eigen.known > 0).sum(-1) >= k)
    return (eigen.known[..., :k].sum(-1) / eigen.trace).where(told, torch.nan)


def power_law(eigen: Eigenvalues, fit: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
    r"""The exponent of :math:`\lambda_k \propto k^{-\alpha}` and how good the line is.

    A straight line through the logarithms, each rank weighing 1/rank, so that every stretch of the logarithmic axis
    weighs the same.

    Args:
        fit: first and last rank, counted from 1. By default 11 to 50, and where fewer than 100 eigenvalues are above
            the rounding, from 10 % to 50 % of them.

    Returns:
        The exponent and the weighted coefficient of determination, NaN where fewer than 5 ranks are left.

    >>> law = Eigenvalues.all(torch.arange(1, 101.0).double() ** -1.5, torch.tensor(100))
    >>> [round(float(one), 6) for one in power_law(law)]
    [1.5, 1.0]
    """
    known = eigen.known
    usable = (known > 0).sum(-1)
    rank = torch.arange(1, known.shape[-1] + 1, device=known.device)
    if fit is None:
        first, last = (usable // 10 + 1).clamp(2, 11), (usable // 2).clamp(max=50)
        # Where only some are known there are many more than 100.
        first, last = first.where(eigen.rest <= 0, 11), last.where(eigen.rest <= 0, 50)
    else:
        first, last = (torch.full_like(usable, one) for one in fit)
    inside = (rank >= first[..., None]) & (rank <= last[..., None])
    weight = inside / rank.to(known.dtype)
    weight = weight / weight.sum(-1, keepdim=True)
    x, y = rank.to(known.dtype).log(), known.where(inside & (known > 0), 1.0).log()
    dx, dy = x - (weight * x).sum(-1, keepdim=True), y - (weight * y).sum(-1, keepdim=True)
    xy, xx, yy = ((weight * product).sum(-1) for product in (dx * dy, dx * dx, dy * dy))
    enough = (inside.sum(-1) >= 5) & (last <= usable)
    return (-xy / xx).where(enough, torch.nan), (xy.square() / (xx * yy)).where(enough, torch.nan)


def scaling_fit(x: Sequence[float] | Tensor, y: Sequence[float] | Tensor) -> tuple[float, float]:
    r"""The exponent b of :math:`y \propto x^b` by least squares on logarithms, and its coefficient of determination.

    Args:
        x, y: positive, (n) with n of 3 or more: widths and ranks, say.

    Raises:
        MeasureError: too few, or not positive.

    >>> b, r2 = scaling_fit([16, 32, 64], [2.0, 4.0, 8.0])
    >>> round(b, 6), round(r2, 6)
    (1.0, 1.0)
    """
    x, y = (torch.as_tensor(one, dtype=torch.float64) for one in (x, y))
    if x.shape != y.shape or x.ndim != 1 or len(x) < 3 or not bool((x > 0).all() and (y > 0).all()):
        raise MeasureError(f"a scaling fit takes 3 or more positive pairs, not x={x.tolist()} and y={y.tolist()}")
    dx, dy = x.log() - x.log().mean(), y.log() - y.log().mean()
    xy, xx, yy = dx @ dy, dx @ dx, dy @ dy
    return float(xy / xx), float(xy.square() / (xx * yy)) if float(yy) else 1.0
