"""In how many directions the activations of a site spread, and how evenly."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from ..core.errors import MeasureError
from ..core.measure import Measure, Reduction, double, ratio, real_tokens
from ..core.sites import STREAM_DIMS, Site
from .moments import eigenvalues, moments
from .sketch import directions, nystrom, sketch
from .spectral import Eigenvalues, entropy_rank, leading_share, participation_ratio, power_law, trace_share_missed


class SecondMoments(Measure):
    """Base of the measures that need only the second moments of the tokens, exact or sketched.

    Up to `max_width` units the (unit, unit) matrix is kept; beyond it a sketch (unit, `sketch`), see
    `actome.measures.sketch`. What is not in the sketch is told by the value that a subclass calls ``sketch_error``.

    Args:
        max_width: units up to which the matrix is exact: U units hold U^2 float64 numbers, 34 MB for 2048, and cost U^3
            operations once at the end.
        sketch: columns of the sketch for wider sites, rounded up to a multiple of 8; ``None`` to refuse them.
        every: of each row's real tokens take the first and every so-manieth after it. The first stands for itself and
            each other for `every` tokens, so that a special first token weighs what it does in the whole.
        seed: of the sketch's directions; only sketches of the same seed merge.
    """

    reductions: ClassVar[dict[str, Reduction]] = {
        "tokens": "sum",
        "weight": "sum",
        "total": "sum",
        "square": "sum",
        "moment": "sum",
    }

    def __init__(
        self, max_width: int = 2048, sketch: int | None = 256, every: int = 1, seed: int = 0, **options: object
    ):
        super().__init__(**options)
        if every < 1 or (sketch is not None and sketch < 16):
            raise MeasureError(f"every={every} and sketch={sketch}: take 1 and 16, or more, or sketch=None")
        if max_width < 1:
            raise MeasureError(f"max_width={max_width}: the widest site that is exact, 1 unit or more")
        self.max_width, self.every, self.seed = max_width, every, seed
        self.columns = None if sketch is None else -(-sketch // 8) * 8

    def fits(self, site: Site) -> str | None:
        """Without a sketch, too wide a site is refused."""
        sizes = [site.size(dim) for dim in site.dims if dim not in STREAM_DIMS]
        return self._too_wide(math.prod(size for size in sizes if size is not None))

    def _too_wide(self, units: int) -> str | None:
        if units <= self.max_width or self.columns is not None:
            return None
        return (
            f"{units} units are more than {type(self).__name__}(max_width={self.max_width}, sketch=None) takes; give "
            f"sketch=256, or a larger max_width, which needs {8e-6 * units**2:.0f} MB for each site"
        )

    def rows(self, x_NU: Tensor) -> Tensor:
        """What is made of the tokens before their moments are taken; nothing unless a subclass says so."""
        return x_NU

    def site_statistics(self, x: Tensor, mask: Tensor | None = None, tokens: Tensor | None = None) -> dict[str, Tensor]:
        """tokens, weight, square: (); total: (unit); moment: (unit, unit) or (unit, columns), summed outer products."""
        units = x.shape[-1]
        if reason := self._too_wide(units):
            raise MeasureError(reason)
        x_NU, weight_N = self._taken(x, mask)
        x_NU = self.rows(x_NU)
        count = torch.full((), len(x_NU), device=x.device)
        weight = double(count) if weight_N is None else double(weight_N).sum()
        if self.columns is None or units <= max(self.max_width, self.columns):
            total, moment = moments(x_NU, weight_N)
            square = moment.diagonal().sum()
        else:
            total, moment, square = sketch(x_NU, self._directions(units, x.device), weight_N)
        return {"tokens": count, "weight": weight, "total": total, "square": square, "moment": moment}

    def _taken(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The tokens that count (token, unit), and for how many each of them stands."""
        first_BT = None
        if self.every > 1 and mask is None:
            x = x[:, :: self.every]
            first_BT = (torch.arange(x.shape[1], device=x.device) == 0).expand(x.shape[:2])
        elif self.every > 1 and mask is not None:
            at_BT = mask.cumsum(1) - 1
            taken_BT = mask & (at_BT % self.every == 0)
            x, first_BT, mask = x[taken_BT][None], (at_BT == 0)[taken_BT][None], None
        kept = real_tokens(x, mask)
        x_NU = kept.x.flatten(0, 1) if kept.keep is None else kept.x[kept.keep]
        if first_BT is None:
            return x_NU, None
        first_N = first_BT.flatten() if kept.keep is None else first_BT[kept.keep]
        return x_NU, torch.where(first_N, 1.0, float(self.every))

    def _directions(self, units: int, device: torch.device) -> Tensor:
        assert self.columns is not None
        return directions(units, self.columns, self.seed, device)

    def eigenvalues(self, stats: Mapping[str, Tensor]) -> tuple[Eigenvalues, Eigenvalues]:
        """Around the mean and around zero."""
        moment, total, weight, count = (stats[name] for name in ("moment", "total", "weight", "tokens"))
        if moment.shape[-1] < moment.shape[-2]:
            both = self._directions(moment.shape[-2], moment.device)
            return nystrom(double(moment), both, double(stats["square"]), double(total), double(weight), count)
        centred, around_zero = eigenvalues(moment, total, weight)
        units = moment.shape[-1]
        return (
            Eigenvalues.all(centred, (count - 1).clamp(0, units)),
            Eigenvalues.all(around_zero, count.clamp(max=units)),
        )


class EffectiveRank(SecondMoments):
    r"""Effective rank of the activations (RankMe): the exponential of the entropy of their singular values.

    For the matrix of all N real tokens with singular values :math:`\sigma_k` and :math:`p_k = \sigma_k / \sum_j
    \sigma_j`:

    - ``effective_rank``: :math:`\exp(-\sum_k p_k \ln p_k)`, between 1 and min(N, U)
    - ``effective_rank_share``: the same divided by min(N, U)

    The singular values come from the second moments :math:`\sum_t x_t x_t^\top`, to which every token contributes:
    float32 products within a batch after its mean is taken out, float64 for the mean and over batches. Singular values
    below 0.0003 of the scatter around the mean are their rounding and count as 0. The matrix is not centred, so a large
    common mean lowers the rank. With fewer tokens than a few times the units, the rank says more of the text than of
    the site. Tokens with a non-finite unit are left out. Sites wider than `max_width` are sketched (`SecondMoments`),
    and the rank is then an estimate, see docs/measures/spectrum.md for how close.

    Args:
        max_width, sketch, every, seed: see `SecondMoments`; exact up to 4096 units by default.

    Shapes: x (\*stack, batch, pos, unit); both values (\*stack).

    Source: Garrido et al. 2023, RankMe (equation 1, without its 1e-7); the entropy rank is Roy and Vetterli 2007.

    Example:
        >>> rank = EffectiveRank()
        >>> rank.update(torch.eye(4)[None] * torch.tensor([1.0, 1.0, 1.0, 0.0]))
        >>> round(float(rank.compute()["effective_rank"]), 4)
        3.0
    """

    value_dims: ClassVar[dict[str, tuple[str, ...]]] = {"effective_rank": (), "effective_rank_share": ()}

    def __init__(self, max_width: int = 4096, **options: object):
        # Exact further than the other measures: this rank lives on small eigenvalues, of which a sketch knows little.
        super().__init__(max_width=max_width, **options)

    def values(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See the class."""
        return _rankme(self.eigenvalues(stats)[1], stats["tokens"])


class Spectrum(SecondMoments):
    r"""Ranks, concentration and decay of the eigenvalues of the activations' covariance, from one accumulator.

    For the covariance (around the mean) with eigenvalues :math:`\lambda_k`, largest first, :math:`p_k = \lambda_k /
    \sum_j \lambda_j`, over N real tokens of U units:

    - ``effective_rank``, ``effective_rank_share``: RankMe, of singular values *around zero*, as `EffectiveRank`
    - ``participation_ratio``: the hard rank :math:`1 / \sum_k p_k^2`
    - ``shannon_rank``: the soft rank :math:`\exp(-\sum_k p_k \ln p_k)`, never below the hard one
    - ``participation_utilisation``, ``shannon_utilisation``: both over U; ``sui``, the spectral utilisation index,
      their harmonic mean
    - ``spectral_concentration``: share of the variance in the leading eigenvalues, see `leading`
    - ``stable_rank``: :math:`\lVert X \rVert_F^2 / \lVert X \rVert_2^2 = \sum_k \lambda_k / \lambda_1`, X centred
    - ``alpha``, ``alpha_r2``: :math:`\lambda_k \propto k^{-\alpha}` fitted over ranks 11 to 50 (10 % to 50 % of the
      eigenvalues above the rounding when they are fewer than 100), each weighing 1/k; NaN when fewer than 5 ranks are
      left, for which min(N - 1, U) must be 12 or more
    - ``spectrum`` (rank): the leading :math:`p_k`, at most `keep`; no rows in the table
    - ``sketch_error``: share of the variance that the sketch does not resolve, 0 where the moments are exact
    - ``tokens_per_unit``: N / U. Below about 20, ranks are those of the text: they are bound by N

    NaN where nothing varies, as with a single token. **Under a sketch** (U > `max_width`) the trace is exact,
    participation_ratio and stable_rank are accurate to about a percent, alpha and the leading eigenvalues to a few, and
    the entropy ranks and a concentration that reaches beyond the resolved eigenvalues take the unresolved ones as gamma
    distributed with their measured sum and square sum: docs/measures/spectrum.md gives the errors on known spectra.

    Args:
        leading: how many eigenvalues spectral_concentration takes: a share of U (0.1) or a number of them (8).
        fit: first and last rank of alpha's fit, to set them by hand; NaN where there are fewer eigenvalues.
        keep: how many eigenvalues ``spectrum`` gives at most.
        max_width, sketch, every, seed: see `SecondMoments`.

    Shapes: x (\*stack, batch, pos, unit); values (\*stack), ``spectrum`` (\*stack, rank).

    Source: RankMe: Garrido et al. 2023, equation 1. alpha: Agrawal et al. 2022, alpha-ReQ, with the fit of Stringer et
    al. 2019; both traced over training in Li et al. 2025, Tracing the Representation Geometry of Language Models.
    Ranks, concentration and utilisation: Jha and Reagen 2025, Spectral Scaling Laws in Language Models (there the index
    is not spelled out; the harmonic mean is how this library reads it). Stable rank: Rudelson and Vershynin 2007.

    Example:
        >>> x = torch.randn(4, 256, 16, generator=torch.Generator().manual_seed(0))
        >>> spectrum = Spectrum()
        >>> spectrum.update(x * torch.tensor([1.0] * 4 + [0.0] * 12))
        >>> values = spectrum.compute()
        >>> round(float(values["shannon_rank"])), round(float(values["shannon_utilisation"]), 2)
        (4, 0.25)
    """

    value_dims: ClassVar[dict[str, tuple[str, ...]]] = {
        "effective_rank": (),
        "effective_rank_share": (),
        "participation_ratio": (),
        "shannon_rank": (),
        "participation_utilisation": (),
        "shannon_utilisation": (),
        "sui": (),
        "spectral_concentration": (),
        "stable_rank": (),
        "alpha": (),
        "alpha_r2": (),
        "spectrum": ("rank",),
        "sketch_error": (),
        "tokens_per_unit": (),
    }

    def __init__(self, leading: float = 0.1, fit: tuple[int, int] | None = None, keep: int = 128, **options: object):
        super().__init__(**options)
        if leading <= 0:
            raise MeasureError(f"leading={leading}: give a share of the units (0.1) or a number of eigenvalues (8)")
        if fit is not None and not 1 <= fit[0] < fit[1] - 3:
            raise MeasureError(f"fit={fit}: give a first and a last rank, counted from 1, with 5 or more among them")
        self.leading, self.fit, self.keep = leading, fit, keep

    def values(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See the class."""
        centred, around_zero = self.eigenvalues(stats)
        units = stats["total"].shape[-1]
        trace = centred.trace
        varies = trace > 0
        leading = math.ceil(self.leading * units) if self.leading < 1 else int(self.leading)
        hard, soft = participation_ratio(centred) / units, entropy_rank(centred) / units
        alpha, good = power_law(centred, self.fit)
        of_the_covariance = {
            "participation_ratio": hard * units,
            "shannon_rank": soft * units,
            "participation_utilisation": hard,
            "shannon_utilisation": soft,
            "sui": 2 * hard * soft / (hard + soft),
            "spectral_concentration": leading_share(centred, leading),
            "stable_rank": trace / centred.known[..., 0],
            "alpha": alpha,
            "alpha_r2": good,
            "sketch_error": trace_share_missed(centred),
        }
        return {
            **_rankme(around_zero, stats["tokens"]),
            **{name: value.where(varies, torch.nan) for name, value in of_the_covariance.items()},
            "spectrum": (centred.known / trace[..., None])[..., : self.keep],
            "tokens_per_unit": (double(stats["tokens"]) / units).where(stats["tokens"] > 0, torch.nan),
        }


def _rankme(around_zero: Eigenvalues, tokens: Tensor) -> dict[str, Tensor]:
    rank = entropy_rank(around_zero, 0.5).where(tokens > 0, torch.nan)
    return {"effective_rank": rank, "effective_rank_share": ratio(rank, around_zero.count)}
