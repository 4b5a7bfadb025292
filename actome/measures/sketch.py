r"""Second moments of wide sites from a sketch: a few products with random directions in place of the whole matrix.

Of :math:`A = \sum_t x_t x_t^\top` (unit, unit) only :math:`Y = A \Omega` and the trace are kept, which stream and merge
by addition. The Nyström approximation :math:`\hat A = Y (\Omega^\top Y)^+ Y^\top` never exceeds A, so what it misses is
known exactly: :math:`\operatorname{tr} A - \operatorname{tr} \hat A`. Its eigenvalues are too low; with R columns the
shortfall is that of a ridge :math:`\kappa = (\operatorname{tr} A - \operatorname{tr} \hat A) / R`,
:math:`\hat\lambda \approx \lambda^2 / (\lambda + \kappa)`, which is solved for :math:`\lambda` where
:math:`\hat\lambda` is not lost in it. A few further columns, :math:`A \Psi`, take no part in :math:`\hat A` and tell
without bias how much of :math:`\operatorname{tr} A^2` it misses.

Source: Tropp, Yurtsever, Udell and Cevher 2017, Fixed-Rank Approximation of a Positive-Semidefinite Matrix from
Streaming Data (algorithm 3); the ridge is the expected projection of Dereziński, Liang, Liao and Mahoney 2020, Precise
Expressions for Random Projections; the square sum is Hutchinson's estimator of what remains.

Letters: N tokens, U unit, R columns that approximate, P columns that probe.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..core.measure import double
from .moments import ROUNDING_DOUBLE, centre
from .spectral import Eigenvalues

# An eighth of the columns probes what the others miss.
_PROBES = 8
# Below this share of the largest, what the columns say of one another is the rounding of float32 products.
_FLOOR = 1e-6
# An eigenvalue counts as resolved from so many times the ridge on; from trials on the spectra of the documentation.
_RESOLVED = 0.5


@lru_cache(maxsize=16)
def directions(units: int, columns: int, seed: int, device: torch.device) -> Tensor:
    """The random directions (unit, columns): orthonormal ones that approximate, then signs that probe; float32.

    The same for the same arguments, wherever they are made, so that sketches of different processes merge.
    """
    generator = torch.Generator().manual_seed(seed)
    probes = probing(columns)
    omega = torch.randn(units, columns - probes, generator=generator, dtype=torch.float64)
    psi = torch.randint(0, 2, (units, probes), generator=generator) * 2.0 - 1.0
    return torch.cat([torch.linalg.qr(omega).Q.float(), psi], 1).to(device)


def probing(columns: int) -> int:
    """How many of the columns probe.

    >>> probing(256)
    32
    """
    return max(1, columns // _PROBES)


def sketch(x_NU: Tensor, both: Tensor, weight_N: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of the rows (unit), the sketch (unit, columns), and the trace (), in float64.

    Args:
        x_NU: float32 or float64.
        both: from `directions`.
        weight_N: how much each row counts; all 1 when not given.
    """
    if not len(x_NU):
        nothing = double(x_NU.new_zeros(x_NU.shape[1]))
        return nothing, double(x_NU.new_zeros(both.shape)), nothing.sum()
    mean, centred, weight = centre(x_NU, weight_N)
    both = both.to(x_NU.dtype)
    sketched = double(centred.T @ (centred @ both)).addr_(mean, mean @ double(both), alpha=weight)
    return mean * weight, sketched, double(centred.square().sum()) + weight * mean.square().sum()


def nystrom(
    sketched: Tensor, both: Tensor, square: Tensor, total: Tensor, weight: Tensor, count: Tensor
) -> tuple[Eigenvalues, Eigenvalues]:
    r"""What a sketch knows of the eigenvalues, around the mean and around zero.

    Args:
        sketched: (\*stack, unit, columns).
        both: (unit, columns), the directions.
        square: (\*stack), the trace.
        total: (\*stack, unit), the sum of the rows.
        weight: (\*stack), the sum of their weights.
        count: (\*stack), how many rows there were.
    """
    both = double(both)
    mean = total / weight[..., None].clamp_min(torch.finfo(weight.dtype).tiny)
    around_mean = sketched - total[..., :, None] * (mean @ both)[..., None, :]
    spread = square - (total * mean).sum(-1)
    varies = spread > ROUNDING_DOUBLE * square  # or it is what rounding leaves of a large mean
    spread, around_mean = spread.where(varies, 0.0), around_mean.where(varies[..., None, None], 0.0)
    centred, largest = _approximate(around_mean, both, spread, (count - 1).clamp_min(0), torch.zeros_like(spread))
    return centred, _approximate(sketched, both, square, count, largest)[0]


def _approximate(
    sketched: Tensor, both: Tensor, trace: Tensor, count: Tensor, largest: Tensor
) -> tuple[Eigenvalues, Tensor]:
    units, columns = both.shape
    rank = columns - probing(columns)
    omega, psi = both.split([rank, columns - rank], 1)
    known = sketched.isfinite().all(-1).all(-1) & trace.isfinite()
    sketched = sketched.where(known[..., None, None], 0.0)
    near, far = sketched.split([rank, columns - rank], -1)
    core = omega.T @ near
    values, vectors = torch.linalg.eigh((core + core.mT) / 2)
    top = values.amax(-1)
    # The floor of the products around the mean, which are in float32; the mean's own part is in float64.
    floor = torch.maximum(_FLOOR * (largest if bool(largest.any()) else top), ROUNDING_DOUBLE * top)
    inverse = torch.where(values > floor[..., None], values, torch.inf).rsqrt()
    half = near @ (vectors * inverse[..., None, :])  # (unit, R), whose square is the approximation
    low = torch.linalg.eigvalsh(half.mT @ half).flip(-1).clamp_min(0.0)
    missed = (trace - low.sum(-1)).clamp_min(0.0)
    missed = missed.where(missed > _FLOOR * trace, 0.0)
    ridge = (missed / rank)[..., None]
    eigen = (low + (low.square() + 4 * low * ridge).sqrt()) / 2
    eigen = eigen.where(low > _RESOLVED * ridge, 0.0)
    # Unbiased for what the squares of `low` lack, since the probes took no part in it.
    approximated = half @ (half.mT @ psi)
    lacking = (far.square().sum((-2, -1)) - approximated.square().sum((-2, -1))) / psi.shape[1]
    rest = (trace - eigen.sum(-1)).clamp_min(0.0).where(missed > 0, 0.0)
    rest_square = low.square().sum(-1) + lacking - eigen.square().sum(-1)
    return Eigenvalues(
        eigen.where(known[..., None], torch.nan), rest.where(known, torch.nan), rest_square, count.clamp(max=units)
    ), top
