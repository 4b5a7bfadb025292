"""Second moments of a stream of vectors, and the eigenvalues that they have.

Letters: N tokens, U unit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.measure import double

# Eigenvalues below this share of the scatter around the mean are the rounding of the float32 products it is made of;
# below the other share of everything, that of float64.
ROUNDING, ROUNDING_DOUBLE = 1e-7, 1e-13


def moments(x_NU: Tensor, weight_N: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The sum of all rows and of their outer products, (unit) and (unit, unit) in float64, whatever their mean.

    Args:
        x_NU: float32 or float64.
        weight_N: how much each row counts; all 1 when not given.
    """
    if not len(x_NU):
        nothing = double(x_NU.new_zeros(x_NU.shape[1]))
        return nothing, nothing.outer(nothing)
    mean, centred, weight = centre(x_NU, weight_N)
    return mean * weight, double(gram(centred)).addr_(mean, mean, alpha=float(weight))


def centre(x_NU: Tensor, weight_N: Tensor | None = None) -> tuple[Tensor, Tensor, float]:
    """The mean (unit) in float64, the rows less their mean times the root of their weights, and the sum of weights.

    A common mean would drown the small directions in its rounding, so it is taken out and float64 takes care of it.
    """
    if weight_N is None:
        mean = x_NU.mean(0)
        centred = x_NU - mean
        return double(mean) + double(centred.mean(0)), centred, float(len(x_NU))
    weight_N = weight_N.to(x_NU.dtype)
    total = float(weight_N.double().sum()) if weight_N.device.type != "mps" else float(weight_N.sum())
    mean = weight_N @ x_NU / total
    centred = x_NU - mean
    rest = weight_N @ centred / total
    return double(mean) + double(rest), centred.mul_(weight_N.sqrt()[:, None]), total


def gram(x_NU: Tensor) -> Tensor:
    """``x.T @ x``, (unit, unit), by its upper half where that is faster."""
    units = x_NU.shape[1]
    if units < 256 or x_NU.device.type != "cpu":
        return x_NU.T @ x_NU
    # A stair of eight steps: what lies below it is the mirror image of what lies above.
    out = x_NU.new_empty(units, units)
    step = max(128, -(-units // 8))
    for at in range(0, units, step):
        rows = slice(at, min(at + step, units))
        torch.mm(x_NU[:, rows].T, x_NU[:, at:], out=out[rows, at:])
        out[rows, :at] = out[:at, rows].T
    return out


def eigenvalues(moment: Tensor, total: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    r"""Eigenvalues of a second moment around the mean and around zero, by one reduction of the matrix.

    With the first axis turned into the mean :math:`\mu`, the scatter :math:`C` becomes a tridiagonal T whose first axis
    still is the mean's, so that :math:`C + w \mu \mu^\top` is the same T with :math:`w \lVert\mu\rVert^2` more in its
    first entry: two cheap tridiagonal problems in place of two dense ones.

    Args:
        moment: (\*stack, unit, unit), summed outer products.
        total: (\*stack, unit), summed rows.
        weight: (\*stack), how many.

    Returns:
        Two of (\*stack, unit), largest first: of the scatter around the mean, and of the moment itself. What is below
        the rounding of the sums is 0; NaN where the moment is not finite.

    >>> x = torch.tensor([[3.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    >>> centred, around_zero = eigenvalues(x.T @ x, x.sum(0), torch.tensor(2.0))
    >>> centred.round().tolist(), around_zero.round().tolist()
    ([2.0, 0.0], [10.0, 0.0])
    """
    stack, units = moment.shape[:-2], moment.shape[-1]
    A, s = double(moment).cpu().double().reshape(-1, units, units), total.cpu().double().reshape(-1, units)
    pairs = [_pair(one, sum_, float(w)) for one, sum_, w in zip(A, s, weight.cpu().reshape(-1), strict=True)]
    centred, around_zero = (torch.stack(part).reshape(*stack, units) for part in zip(*pairs, strict=True))
    device, dtype = moment.device, double(moment[..., :0]).dtype
    return centred.to(device, dtype), around_zero.to(device, dtype)


def _pair(moment: Tensor, total: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    from scipy.linalg import eigvalsh_tridiagonal, lapack

    if not bool(moment.isfinite().all()) or not bool(total.isfinite().all()):
        # An overflow would make the decomposition fail; its spectrum is unknown.
        return torch.full_like(total, torch.nan), torch.full_like(total, torch.nan)
    mean = total / weight if weight else torch.zeros_like(total)
    scatter = moment.addr(total, mean, alpha=-1)
    # What is left of a large mean counts as rounding too.
    floor = max(ROUNDING * float(scatter.norm()), ROUNDING_DOUBLE * float(moment.norm()))
    length = float(mean.norm())
    if length:
        axis = mean / length
        axis[0] += 1.0 if float(axis[0]) >= 0 else -1.0  # the reflection that turns the mean into the first axis
        axis /= axis.norm()
        turned = scatter @ axis
        turned -= (axis @ turned) * axis
        scatter = scatter.addr(axis, turned, alpha=-2).addr_(turned, axis, alpha=-2)
    if len(total) == 1:
        diagonal, beside = scatter.flatten().numpy(), None
    else:
        room = int(lapack.dsytrd_lwork(len(total), lower=1)[0])
        _, diagonal, beside, _, failed = lapack.dsytrd(scatter.numpy().T, lower=1, lwork=room)
        assert not failed
    spectra = []
    for more in (0.0, weight * length**2):
        diagonal = diagonal.copy()
        diagonal[0] += more
        known = torch.from_numpy(diagonal if beside is None else eigvalsh_tridiagonal(diagonal, beside)).flip(0)
        spectra.append(known.where(known > floor, 0.0))
    return spectra[0], spectra[1]
