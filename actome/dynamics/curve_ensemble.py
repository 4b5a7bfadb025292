"""The parametric ensemble: the posterior of a weighted sum of curve families, by a sequential Monte Carlo sampler.

Domhan, Springenberg and Hutter (2015) extrapolate a learning curve by sampling the parameters of such a sum with Markov
chains. This does it for the very prior that `LCPFN` is trained on, so that the two differ in how they get to the
posterior and in nothing else: it is the slow and nearly exact way, about a second a curve.

Dims: S particles, P coordinates, C points seen, T steps of the prior.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from actome.core.errors import MeasureError
from actome.dynamics.forecast import GaussianMixture
from actome.dynamics.learning_curves import DOMHAN, Array, CurvePrior, ahead, laid_out


@dataclass
class CurveEnsemble:
    """Bayesian extrapolation of a rising curve in [0, 1] by parametric families.

    Particles drawn from the prior are led to the posterior through likelihoods raised to powers that rise from 0 to 1;
    at each power they are resampled and moved by Metropolis steps whose proposals are differences of other particles.

    Args:
        families: out of `CURVE_FAMILIES`; the more there are, the fewer curves of the prior are allowed.
        particles: S, an even number; with few of them the sample is too narrow.
        moves: sweeps at each power, and three times as many at the end.
        length: T of the prior; a curve of another length is laid evenly over it.
        noise: mean and standard deviation of the log of the noise's standard deviation, under the prior.
        seed: of everything random.

    Attributes:
        particles_: (S, P), after `fit`.
        powers_: of the likelihood, in order.
        log_evidence_: log probability density of the points seen, under the prior.
        acceptance_: share of accepted proposals at the last power; below about 0.05 the sample is not to be trusted.

    Source: Speeding up Automatic Hyperparameter Optimization of Deep Neural Networks by Extrapolation of Learning
    Curves (families, weighted sum, noise); Del Moral, Doucet and Jasra 2006, Sequential Monte Carlo Samplers; ter Braak
    2006, A Markov Chain Monte Carlo version of the genetic algorithm Differential Evolution (moves).

    >>> ensemble = CurveEnsemble(particles=200, seed=0).fit([0.10, 0.31, 0.42, 0.49, 0.54, 0.57, 0.60, 0.61])
    >>> forecast = ensemble.predict([1, 42])
    >>> bool((forecast.mean() > 0.6).all()), bool(forecast.quantile(0.95)[-1] < 1)
    (True, True)
    """

    families: Sequence[str] = DOMHAN
    particles: int = 1024
    moves: int = 8
    length: int = 50
    noise: tuple[float, float] = (-4.0, 1.0)
    seed: int = 0
    particles_: Array = field(default_factory=lambda: np.empty((0, 0)), init=False, repr=False)
    powers_: list[float] = field(default_factory=list, init=False, repr=False)
    log_evidence_: float = field(default=math.nan, init=False)
    acceptance_: float = field(default=math.nan, init=False)

    def __post_init__(self) -> None:
        if self.particles < 20 or self.particles % 2 or self.moves < 1:
            raise MeasureError(
                f"particles={self.particles}, moves={self.moves}: want an even number of 20 or more, and 1 or more"
            )
        self._prior = CurvePrior(self.length, tuple(self.families), self.noise)
        self._grid_T = np.arange(1.0, self.length + 1)

    def fit(self, y: Any, *, length: int | None = None) -> CurveEnsemble:
        """Samples the posterior given the first points of a curve.

        Args:
            y: (C), values of steps 1 to C, equally spaced, rising in [0, 1]; see `extrapolate_curve` for other scales.
            length: steps of the whole curve; that of the prior by default.

        Raises:
            MeasureError: no points, values that are not finite, or no more steps than points.
        """
        y_C = np.asarray(y, dtype=np.float64)
        if y_C.ndim != 1 or not len(y_C) or not np.isfinite(y_C).all():
            raise MeasureError(f"y has shape {y_C.shape}; want (points), one at least, all of them finite")
        self._count, self._length = len(y_C), self.length if length is None else length
        ahead(None, self._count, self._length)
        self._x_C = laid_out(np.arange(1, self._count + 1), self._length, self.length)
        rng = np.random.default_rng(self.seed)
        u, _ = self._prior.sample(self.particles, rng)
        log_like, power = self._log_likelihood(u, y_C), 0.0
        self.powers_, self.log_evidence_ = [0.0], 0.0
        while power < 1:
            step = _next_step(log_like, 1 - power)
            power = min(power + step, 1.0) if step < 1 - power else 1.0
            log_w = step * log_like
            top = log_w.max()
            self.log_evidence_ += float(np.log(np.mean(np.exp(log_w - top))) + top)
            chosen = _systematic(np.exp(log_w - top), rng)
            u, log_like = u[chosen], log_like[chosen]
            self.powers_.append(power)
            for _ in range(self.moves * (3 if power == 1 else 1)):
                u, log_like, self.acceptance_ = self._sweep(u, log_like, power, y_C, rng)
        self.particles_ = u
        return self

    def predict(self, horizons: int | Sequence[int] | None = None, *, components: int = 256) -> GaussianMixture:
        """The distribution of values after the last point, noise included, (Q).

        Args:
            horizons: as in `LCPFN.predict`.
            components: how many of the particles make the mixture, evenly spaced; scoring it takes the square of that.

        Raises:
            MeasureError: before `fit`, or horizons beyond the end.
        """
        curves_SQ, sigma_S = self.curves(horizons)
        taken = np.unique(np.linspace(0, len(sigma_S) - 1, min(max(components, 1), len(sigma_S))).astype(int))
        curves_SQ, sigma_S = curves_SQ[taken], sigma_S[taken]
        means = torch.from_numpy(curves_SQ.T.copy())
        return GaussianMixture(means, torch.from_numpy(sigma_S).expand(means.shape))

    def curves(self, horizons: int | Sequence[int] | None = None) -> tuple[Array, Array]:
        """The particles' curves without noise at horizons, (S, Q), and the standard deviation of each's noise, (S)."""
        if not len(self.particles_):
            raise MeasureError("fit the ensemble to a curve's first points before it can predict")
        steps = self._count + np.array(ahead(horizons, self._count, self._length))
        x_Q = laid_out(steps, self._length, self.length)
        return self._prior.curve(self.particles_, x_Q), np.exp(self.particles_[:, 0])

    def _log_likelihood(self, u_SP: Array, y_C: Array) -> Array:
        error_SC = y_C - self._prior.curve(u_SP, self._x_C)
        with np.errstate(all="ignore"):
            z = (error_SC / np.exp(u_SP[:, :1])) ** 2
            out = -0.5 * z.sum(1) - len(y_C) * (u_SP[:, 0] + 0.5 * math.log(2 * math.pi))
        return np.where(np.isfinite(out), out, -np.inf)

    def _sweep(
        self, u_SP: Array, log_like: Array, power: float, y_C: Array, rng: np.random.Generator
    ) -> tuple[Array, Array, float]:
        """One Metropolis step of every particle: each half moves along differences of the other half's particles."""
        half, p = len(u_SP) // 2, u_SP.shape[1]
        u_SP, log_like, accepted = u_SP.copy(), log_like.copy(), 0
        for mine, others in ((slice(0, half), slice(half, None)), (slice(half, None), slice(0, half))):
            here, there = u_SP[mine], u_SP[others]
            first = rng.integers(0, half, half)
            second = (first + rng.integers(1, half, half)) % half
            # Mostly the best scale for a normal density, now and then a whole difference, from one mode to another;
            # of some coordinates only, at times.
            scale = np.where(rng.random(half) < 0.1, 1.0, 2.38 / math.sqrt(2 * p) * rng.uniform(0.3, 1.3, half))
            some = rng.random((half, p)) < np.where(rng.random(half) < 0.5, 1.0, 0.3)[:, None]
            jump = scale[:, None] * (there[first] - there[second]) + 1e-5 * rng.standard_normal((half, p))
            proposed = here + np.where(some, jump, 0.0)
            log_prior = self._prior.log_density(proposed)
            possible = np.flatnonzero(np.isfinite(log_prior))
            possible = possible[self._prior.allowed(self._prior.curve(proposed[possible], self._grid_T))]
            new = np.full(half, -np.inf)
            new[possible] = self._log_likelihood(proposed[possible], y_C)
            with np.errstate(invalid="ignore"):
                gain = log_prior - self._prior.log_density(here) + power * (new - log_like[mine])
            take = np.log(rng.random(half)) < np.where(np.isfinite(new), gain, -np.inf)
            u_SP[mine] = np.where(take[:, None], proposed, here)
            log_like[mine] = np.where(take, new, log_like[mine])
            accepted += int(take.sum())
        return u_SP, log_like, accepted / (2 * half)


def _next_step(log_like: Array, most: float) -> float:
    """The largest step in power, at most `most`, after which half of the particles still count (effective number)."""

    def share(step: float) -> float:
        w = np.exp(step * (log_like - log_like.max()))
        return float(w.sum() ** 2 / (w @ w) / len(w))

    if share(most) >= 0.5:
        return most
    low, high = 0.0, most
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if share(middle) >= 0.5 else (low, middle)
    return max(low, 1e-12)


def _systematic(weights: Array, rng: np.random.Generator) -> Array:
    """Indices drawn with these weights, as evenly as can be, in random order."""
    n = len(weights)
    places = (rng.random() + np.arange(n)) / n
    return rng.permutation(np.searchsorted(np.cumsum(weights) / weights.sum(), places).clip(max=n - 1))
