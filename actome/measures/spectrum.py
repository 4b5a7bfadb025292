"""In how many directions the activations of a site spread."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from ..core.errors import MeasureError
from ..core.measure import Measure, Reduction, double, ratio, real_tokens
from ..core.sites import STREAM_DIMS, Site

# Eigenvalues below this share of the scatter around the mean are the rounding of the float32 products it is made of;
# below the other share of everything, that of float64.
_ROUNDING, _ROUNDING_DOUBLE = 1e-7, 1e-13


class EffectiveRank(Measure):
    r"""Effective rank of the activations (RankMe): the exponential of the entropy of their singular values.

    For the matrix of all N real tokens with singular values :math:`\sigma_k` and :math:`p_k = \sigma_k / \sum_j
    \sigma_j`:

    - ``effective_rank``: :math:`\exp(-\sum_k p_k \ln p_k)`, between 1 and min(N, U)
    - ``effective_rank_share``: the same divided by min(N, U)

    The singular values come from the second moments :math:`\sum_t x_t x_t^\top`, to which every token contributes:
    float32 products within a batch after its mean is taken out, float64 for the mean and over batches. Singular values
    below 0.0003 of the scatter around the mean are their rounding and count as 0. The matrix is not centred, so a large
    common mean lowers the rank. With fewer tokens than a few times the units, the rank says more of the text than of
    the site. Tokens with a non-finite unit are left out.

    Args:
        max_width: sites with more units are refused; U units hold U^2 float64 numbers, 134 MB for 4096, and the
            eigenvalues cost U^3 operations once at the end.

    Shapes: x (\*stack, batch, pos, unit); both values (\*stack).

    Source: Garrido et al. 2023, RankMe (equation 1, without its 1e-7); the entropy rank is Roy and Vetterli 2007.

    Example:
        >>> rank = EffectiveRank()
        >>> rank.update(torch.eye(4)[None] * torch.tensor([1.0, 1.0, 1.0, 0.0]))
        >>> round(float(rank.compute()["effective_rank"]), 4)
        3.0
    """

    reductions: ClassVar[dict[str, Reduction]] = {"tokens": "sum", "total": "sum", "moment": "sum"}
    value_dims: ClassVar[dict[str, tuple[str, ...]]] = {"effective_rank": (), "effective_rank_share": ()}

    def __init__(self, max_width: int = 4096, **options: object):
        super().__init__(**options)
        self.max_width = max_width

    def fits(self, site: Site) -> str | None:
        """Too wide a site is refused rather than estimated."""
        sizes = [site.size(dim) for dim in site.dims if dim not in STREAM_DIMS]
        return self._too_wide(math.prod(size for size in sizes if size is not None))

    def _too_wide(self, units: int) -> str | None:
        if units <= self.max_width:
            return None
        return (
            f"{units} units are more than EffectiveRank(max_width={self.max_width}) takes; "
            f"a larger max_width needs {8e-6 * units**2:.0f} MB for each site"
        )

    def site_statistics(self, x: Tensor, mask: Tensor | None = None, tokens: Tensor | None = None) -> dict[str, Tensor]:
        """tokens: (); total: (unit), the sum; moment: (unit, unit), summed outer products."""
        if reason := self._too_wide(x.shape[-1]):
            raise MeasureError(reason)
        kept = real_tokens(x, mask)
        x_NU = kept.x.flatten(0, 1) if kept.keep is None else kept.x[kept.keep]
        total, moment = moments(x_NU)
        return {"tokens": kept.count, "total": total, "moment": moment}

    def values(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See the class."""
        tokens = double(stats["tokens"])
        rank = effective_rank(stats["moment"], stats["total"], tokens).where(tokens > 0, torch.nan)
        return {
            "effective_rank": rank,
            "effective_rank_share": ratio(rank, stats["tokens"].clamp(max=stats["moment"].shape[-1])),
        }


def moments(x_NU: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of all rows and of their outer products, (unit) and (unit, unit) in float64, whatever their mean."""
    if not len(x_NU):
        nothing = double(x_NU.new_zeros(x_NU.shape[1]))
        return nothing, nothing.outer(nothing)
    # A common mean would drown the small directions in its rounding, so float64 takes care of it.
    mean = x_NU.mean(0)
    centred = x_NU - mean
    mean = double(mean) + double(centred.mean(0))
    return mean * len(x_NU), double(_gram(centred)).addr_(mean, mean, alpha=len(x_NU))


def effective_rank(moment: Tensor, total: Tensor, tokens: Tensor) -> Tensor:
    """The exponential of the entropy of the singular values.

    Args:
        moment: (*stack, unit, unit), summed outer products.
        total: (*stack, unit), the sum of the tokens.
        tokens: (*stack), how many.

    >>> x = torch.tensor([[2.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    >>> round(float(effective_rank(x.T @ x, x.sum(0), torch.tensor(2.0))), 4)
    2.0
    """
    # An overflow would make the decomposition fail; its rank is unknown.
    known = moment.isfinite().all(-1).all(-1)
    moment = double(moment).where(known[..., None, None], 0.0)
    mean = total / tokens[..., None].clamp_min(1)
    scatter = torch.linalg.matrix_norm(moment - total[..., :, None] * mean[..., None, :])[..., None]
    eigenvalues = torch.linalg.eigvalsh(moment if moment.device.type != "mps" else moment.cpu()).to(moment.device)
    floor = torch.maximum(_ROUNDING * scatter, _ROUNDING_DOUBLE * eigenvalues.amax(-1, keepdim=True))
    singular = eigenvalues.where(eigenvalues > floor, 0.0).sqrt()
    share = singular / singular.sum(-1, keepdim=True)
    return torch.special.entr(share).sum(-1).exp().where(known, torch.nan)


def _gram(x_NU: Tensor) -> Tensor:
    units = x_NU.shape[1]
    if units < 256 or x_NU.device.type != "cpu":
        return x_NU.T @ x_NU
    # Six blocks of nine: the other three are their mirror image.
    out = x_NU.new_empty(units, units)
    third = -(-units // 3)
    spans = [slice(at, min(at + third, units)) for at in range(0, units, third)]
    for i, rows in enumerate(spans):
        for j, columns in enumerate(spans[i:], i):
            torch.mm(x_NU[:, rows].T, x_NU[:, columns], out=out[rows, columns])
            if j > i:
                out[columns, rows] = out[rows, columns].T
    return out
