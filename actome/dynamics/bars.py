"""A predictive distribution as bars: a histogram over fixed borders with half-normal tails at both ends.

Dims: ... leading dims (curves, horizons), K bars.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from actome.core.errors import MeasureError
from actome.dynamics.forecast import Forecast, check_affine, check_share

# The half-normal of an outer bar has half of its mass within that bar's width: its scale is the width / 0.6745.
_HALF = math.sqrt(2) * float(torch.erfinv(torch.tensor(0.5, dtype=torch.float64)))
_ROOT2, _ROOT_PI = math.sqrt(2), math.sqrt(math.pi)


def bar_log_density(logits: Tensor, borders: Tensor, y: Tensor) -> Tensor:
    """Log density of y under bars, in the shape of y; differentiable in the logits.

    Args:
        logits: (..., K).
        borders: (K + 1), rising. Bars 0 and K - 1 are half-normals that begin at their inner border, open outwards.
        y: (...).
    """
    inner = borders[1:-1].contiguous()
    bar = torch.searchsorted(inner, y.contiguous(), right=True)
    widths = borders.diff()
    density = -widths.log()[bar]
    for end, away in ((0, inner[0] - y), (len(widths) - 1, y - inner[-1])):
        scale = widths[end] / _HALF
        tail = 0.5 * math.log(2 / math.pi) - scale.log() - 0.5 * (away / scale) ** 2
        density = torch.where(bar == end, tail, density)
    return logits.log_softmax(-1).gather(-1, bar[..., None])[..., 0] + density


def tail_width(away: Tensor) -> Tensor:
    """The width of an outer bar whose half-normal fits best (maximum likelihood) what lies out there, `away` > 0.

    >>> round(float(tail_width(torch.tensor([-1.0, 3.0, 4.0, 5.0]))), 3)          # 0.6745 sqrt((9 + 16 + 25) / 3)
    2.754
    """
    return _HALF * (away[away > 0] ** 2).mean().sqrt()


@dataclass(frozen=True)
class BarDistribution(Forecast):
    """Distributions over one set of bars, one for each leading index; the outer bars are half-normal tails.

    Attributes:
        logits: (..., K), up to a constant; kept as log probabilities.
        borders: (K + 1), rising.

    Raises:
        MeasureError: fewer than three bars, borders that do not rise, or shapes that do not fit.

    Source: Transformers Can Do Bayesian Inference (Riemann distribution), section 3; Efficient Bayesian Learning Curve
    Extrapolation using Prior-Data Fitted Networks, section 4.

    >>> bars = BarDistribution(torch.zeros(4), torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0]))
    >>> round(float(bars.mean()), 6), round(float(bars.quantile(0.5)), 6), round(float(bars.cdf(2.5)), 3)
    (2.0, 2.0, 0.625)
    >>> round(float(bars.affine(-2.0, 1.0).cdf(-4.0)), 3)             # P(1 - 2 x <= -4) = P(x >= 2.5)
    0.375
    """

    logits: Tensor = field(repr=False)
    borders: Tensor = field(repr=False)

    def __post_init__(self) -> None:
        logits, borders = self.logits.detach().cpu().double(), self.borders.detach().cpu().double()
        if borders.ndim != 1 or len(borders) < 4 or logits.shape[-1:] != (len(borders) - 1,):
            raise MeasureError(
                f"logits {tuple(logits.shape)} and borders {tuple(borders.shape)}; want (..., bars) and (bars + 1), "
                "three bars or more"
            )
        if not bool((borders.diff() > 0).all() and borders.isfinite().all()):
            raise MeasureError("borders of bars have to be finite and to rise, each above the one before")
        object.__setattr__(self, "logits", logits.log_softmax(-1))
        object.__setattr__(self, "borders", borders)

    @property
    def shape(self) -> torch.Size:
        return self.logits.shape[:-1]

    @property
    def _scales(self) -> tuple[Tensor, Tensor]:
        """Of the two half-normals."""
        widths = self.borders.diff()
        return widths[0] / _HALF, widths[-1] / _HALF

    def log_prob(self, y: Any) -> Tensor:
        y = self._like(y)
        return bar_log_density(self.logits.expand(*y.shape, -1), self.borders, y)

    def cdf(self, y: Any) -> Tensor:
        y, (low, high) = self._like(y)[..., None], self._scales
        left, right = self.borders[:-1], self.borders[1:]
        below = ((y - left) / (right - left)).clamp(0, 1)
        below[..., 0] = torch.erfc((right[0] - y[..., 0]).clamp(min=0) / low / _ROOT2)
        below[..., -1] = torch.erf((y[..., 0] - left[-1]).clamp(min=0) / high / _ROOT2)
        return (below * self.logits.exp()).sum(-1)

    def quantile(self, q: float) -> Tensor:
        check_share(q)
        mass, (low, high) = self.logits.exp(), self._scales
        total = mass.cumsum(-1)
        bar = (total < q).sum(-1, keepdim=True).clamp(max=mass.shape[-1] - 1)
        here = mass.gather(-1, bar)
        share = ((q - total.gather(-1, bar) + here) / here).clamp(1e-15, 1 - 1e-15)
        left, right = self.borders[bar], self.borders[bar + 1]
        value = left + (right - left) * share
        value = torch.where(bar == 0, right - low * _ROOT2 * torch.erfinv(1 - share), value)
        return torch.where(bar == mass.shape[-1] - 1, left + high * _ROOT2 * torch.erfinv(share), value)[..., 0]

    def mean(self) -> Tensor:
        middles, (low, high) = (self.borders[:-1] + self.borders[1:]) / 2, self._scales
        middles[0] = self.borders[1] - low * math.sqrt(2 / math.pi)
        middles[-1] = self.borders[-2] + high * math.sqrt(2 / math.pi)
        return (self.logits.exp() * middles).sum(-1)

    def crps(self, y: Any) -> Tensor:
        y, (low, high) = self._like(y), self._scales
        mass = self.logits.exp().expand(*y.shape, -1)
        inner = self.borders[1:-1]
        # Tails: the integral of (p erfc)^2 over a half-line, and what changes when y lies within it.
        ends = [(mass[..., 0], low, inner[0] - y), (mass[..., -1], high, y - inner[-1])]
        total = sum(_tail(p, scale, away) for p, scale, away in ends)
        # Inner bars: cdf is a line, cut at y where y lies within, so that its square integrates by the ends' values.
        before = mass.cumsum(-1)[..., :-2]
        step, left, width = mass[..., 1:-1], inner[:-1], inner.diff()
        at = ((y[..., None] - left) / width).clamp(0, 1)
        cut = before + step * at
        under = at * (before**2 + before * cut + cut**2)
        a, b = 1 - cut, 1 - before - step
        return total + (width / 3 * (under + (1 - at) * (a**2 + a * b + b**2))).sum(-1)

    def affine(self, scale: float, shift: float) -> BarDistribution:
        check_affine(scale, shift)
        borders, logits = self.borders * scale + shift, self.logits
        return BarDistribution(logits, borders) if scale > 0 else BarDistribution(logits.flip(-1), borders.flip(-1))


def _tail(p: Tensor, scale: Tensor, away: Tensor) -> Tensor:
    """A tail's part of the CRPS; `away` is how far out y lies in it, negative when it lies elsewhere.

    With t = distance / scale the tail is p erfc(t / sqrt 2); the integral of its square over t from 0 on is
    2 (sqrt 2 - 1) / sqrt pi. Between its start and y, (1 - tail)^2 stands in the place of tail^2: 1 - 2 tail more.
    """
    u = F.relu(away) / scale / _ROOT2
    gone = _ROOT2 * (u * torch.erfc(u) - torch.exp(-(u**2)) / _ROOT_PI + 1 / _ROOT_PI)
    return scale * (p**2 * 2 * (_ROOT2 - 1) / _ROOT_PI + _ROOT2 * u - 2 * p * gone)
