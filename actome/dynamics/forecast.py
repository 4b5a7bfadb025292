"""What a forecast of a curve is: a distribution for each horizon, which can be asked and scored; and Gaussian mixtures.

Dims: ... leading dims (curves, horizons), S components.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from actome.core.errors import MeasureError


class Forecast(ABC):
    """Distributions of values, one for each leading index: `BarDistribution` and `GaussianMixture`.

    Everything comes back as float64 on the CPU, in the shape of what is predicted.
    """

    @property
    @abstractmethod
    def shape(self) -> torch.Size:
        """Of what is predicted: curves and horizons."""

    @abstractmethod
    def mean(self) -> Tensor:
        """Expected value."""

    @abstractmethod
    def log_prob(self, y: Any) -> Tensor:
        """Log density at y (a number, or whatever fits the shape), nats."""

    @abstractmethod
    def cdf(self, y: Any) -> Tensor:
        """Probability of a value of at most y."""

    @abstractmethod
    def quantile(self, q: float) -> Tensor:
        """The value below which a share q lies, 0 < q < 1."""

    @abstractmethod
    def crps(self, y: Any) -> Tensor:
        """Continuous ranked probability score at y: the integral of (cdf(z) - [z >= y])^2, in closed form.

        In units of y; lower is better, and 0 is a forecast that was sure and right.

        Source: Gneiting and Raftery 2007, Strictly Proper Scoring Rules, section 4.2.
        """

    @abstractmethod
    def affine(self, scale: float, shift: float) -> Forecast:
        """The distribution of ``scale * value + shift``; a negative scale turns it round."""

    def interval(self, level: float = 0.9) -> tuple[Tensor, Tensor]:
        """The central interval that holds this probability, low and high."""
        if not 0 < level < 1:
            raise MeasureError(f"level={level}: give the probability of the interval, between 0 and 1")
        return self.quantile(0.5 - level / 2), self.quantile(0.5 + level / 2)

    def _like(self, y: Any) -> Tensor:
        if isinstance(y, Tensor):
            y = y.detach().cpu()
        y = torch.as_tensor(y, dtype=torch.float64)
        return y.expand(torch.broadcast_shapes(y.shape, self.shape))


def check_share(q: float) -> None:
    """Refuses what is no quantile."""
    if not 0 < q < 1:
        raise MeasureError(f"q={q}: a quantile is asked for strictly between 0 and 1")


def check_affine(scale: float, shift: float) -> None:
    """Refuses what is no change of units."""
    if scale == 0 or not math.isfinite(scale) or not math.isfinite(shift):
        raise MeasureError(f"scale={scale}, shift={shift}: want finite numbers and a scale other than 0")


@dataclass(frozen=True)
class GaussianMixture(Forecast):
    """Weighted normal distributions, such as one for each curve of a posterior sample; one alone is a normal.

    Attributes:
        means, sds: (..., S), of each component.
        weights: (S) or (..., S), not negative; they are brought to a sum of one.

    Raises:
        MeasureError: shapes that do not fit, standard deviations not above zero, or values that are not finite.

    Source: Grimit et al. 2006, The continuous ranked probability score for circular variables and its application to
    mesoscale forecast ensemble verification, equation 5 (CRPS of a mixture of normals).

    >>> one = GaussianMixture([[0.0]], [[1.0]])
    >>> round(float(one.cdf(1.96)), 3), round(float(one.quantile(0.975)), 2), round(float(one.crps(0.0)), 4)
    (0.975, 1.96, 0.2337)
    """

    means: Tensor = field(repr=False)
    sds: Tensor = field(repr=False)
    weights: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        means, sds = (torch.as_tensor(one, dtype=torch.float64) for one in (self.means, self.sds))
        weights = torch.ones(means.shape[-1:] or (1,)) if self.weights is None else torch.as_tensor(self.weights)
        try:
            sds, weights = sds.expand(means.shape), weights.double().expand(means.shape)
        except RuntimeError as error:
            raise MeasureError(
                f"means {tuple(means.shape)}, sds {tuple(sds.shape)}, weights {tuple(weights.shape)} do not fit"
            ) from error
        whole = bool(means.isfinite().all() and sds.isfinite().all() and weights.isfinite().all())
        if not means.ndim or not whole or float(sds.min()) <= 0 or float(weights.min()) < 0:
            raise MeasureError("a mixture takes finite means, standard deviations above 0 and weights of 0 or more")
        object.__setattr__(self, "means", means)
        object.__setattr__(self, "sds", sds)
        object.__setattr__(self, "weights", weights / weights.sum(-1, keepdim=True))

    @property
    def shape(self) -> torch.Size:
        return self.means.shape[:-1]

    def mean(self) -> Tensor:
        return (self.weights * self.means).sum(-1)

    def log_prob(self, y: Any) -> Tensor:
        z = (self._like(y)[..., None] - self.means) / self.sds
        return (self.weights.log() - 0.5 * z**2 - self.sds.log() - 0.5 * math.log(2 * math.pi)).logsumexp(-1)

    def cdf(self, y: Any) -> Tensor:
        return (self.weights * torch.special.ndtr((self._like(y)[..., None] - self.means) / self.sds)).sum(-1)

    def quantile(self, q: float) -> Tensor:
        check_share(q)
        # Between the components' own quantiles, halved until doubles do not tell the ends apart.
        own = self.means + self.sds * torch.special.ndtri(torch.tensor(q, dtype=torch.float64))
        low, high = own.amin(-1), own.amax(-1)
        while bool(((high - low) > 1e-14 * (low.abs() + high.abs()) + 1e-300).any()):
            middle = (low + high) / 2
            below = self.cdf(middle) < q
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def crps(self, y: Any) -> Tensor:
        first = (self.weights * _spread(self._like(y)[..., None] - self.means, self.sds)).sum(-1)
        count = self.means.shape[-1]
        # Pairs of components, each once, and one forecast at a time: they are many.
        i, j = torch.triu_indices(count, count, 1)
        flat = zip(*(one.reshape(-1, count) for one in (self.means, self.sds, self.weights)), strict=True)
        second = [
            (w[i] * w[j] * _spread(m[i] - m[j], (s[i] ** 2 + s[j] ** 2).sqrt())).sum()
            + (w**2 * s).sum() / math.sqrt(math.pi)
            for m, s, w in flat
        ]
        return first - torch.stack(second).view(self.shape)

    def affine(self, scale: float, shift: float) -> GaussianMixture:
        check_affine(scale, shift)
        return GaussianMixture(self.means * scale + shift, self.sds * abs(scale), self.weights)


def _spread(mean: Tensor, sd: Tensor) -> Tensor:
    """Expected absolute value of a normal variable."""
    z = mean / sd
    density = torch.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    return 2 * sd * density + mean * (2 * torch.special.ndtr(z) - 1)
