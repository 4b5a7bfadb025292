"""Whether a trace loses its resilience: a constant pull back to the middle against one that weakens, by likelihood."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from actome.core.errors import MeasureError
from actome.dynamics.series import series

Array = np.ndarray
_LEAST, _MOST = 1e-3, 20.0  # rates per sample between which one looks
_GRID = (0.01, 0.05, 0.2, 0.7, 2.0)


@dataclass(frozen=True)
class Pull:
    """dX = theta_t (mu - X) dt + sigma dW, theta_t from `first` to `last` along a line; time in samples.

    Attributes:
        first, last: the rate of return at the beginning and at the end; the same for a constant pull.
        mu, sigma: middle and noise.
        loglik: of the trace.
    """

    first: float
    last: float
    mu: float
    sigma: float
    loglik: float

    def simulate(self, runs: int, points: int, rng: np.random.Generator) -> Array:
        """Traces of it, from its stationary distribution at the start; (runs, points)."""
        theta, noise = np.linspace(self.first, self.last, points - 1), rng.standard_normal((points, runs))
        keep, spread = np.exp(-theta), self.sigma * np.sqrt(_gain(theta))
        x = np.empty((points, runs))
        x[0] = self.mu + self.sigma / math.sqrt(2 * self.first) * noise[0]
        for t in range(points - 1):
            x[t + 1] = self.mu + (x[t] - self.mu) * keep[t] + spread[t] * noise[t + 1]
        return x.T


@dataclass(frozen=True)
class OUTest:
    """A trace under both models, and how well the two can be told apart on such traces.

    Attributes:
        deviance: 2 (log likelihood with a weakening pull - with a constant one), 0 or more.
        p: share of traces simulated from the constant model with at least this deviance, the trace itself counted.
        auc: chance that a trace simulated from the weakening model has a higher deviance than one from the constant
            one: 0.5 when traces of this length could not tell, whatever p says.
        power: share of traces of the weakening model beyond the 95 % point of the constant one.
        constant, weakening: the fitted models.
        null, alternative: deviances of the simulated traces, (n_boot) each; their ROC is that of the test.
    """

    deviance: float
    p: float
    auc: float
    power: float
    constant: Pull
    weakening: Pull
    null: Array = field(repr=False)
    alternative: Array = field(repr=False)


def ou_lr_test(x: Any, n_boot: int = 100, seed: int = 0) -> OUTest:
    """Likelihood-ratio test of an Ornstein-Uhlenbeck process against one whose pull weakens along a line.

    dX = theta (mu - X) dt + sigma dW, against theta_t = theta_0 - m t with m of 0 or more. Both are fitted by maximum
    likelihood with the exact transitions of a pull that is constant between two samples. The deviance is compared with
    its distribution under each fitted model, since the usual chi-squared law does not hold at the bound m = 0. The
    trace has to end before the jump, and must have no trend of its own: take that off first.

    Args:
        x: an evenly spaced trace, (points).
        n_boot: traces simulated under each model, and refitted.
        seed: of them.

    Raises:
        MeasureError: for fewer than 40 points, values that are not finite, or a constant trace.

    Source: Boettiger and Hastings 2012, Quantifying limits to detection of early warning for critical transitions;
    Boettiger, Ross and Hastings 2013, Early warning signals: the charted and uncharted territories.

    >>> steady = Pull(first=0.5, last=0.5, mu=0.0, sigma=1.0, loglik=0.0)
    >>> weaker = Pull(first=1.0, last=0.05, mu=0.0, sigma=1.0, loglik=0.0)
    >>> rng = np.random.default_rng(0)
    >>> found = ou_lr_test(weaker.simulate(1, 400, rng)[0], n_boot=19)
    >>> found.p, found.weakening.first > 3 * found.weakening.last, found.auc > 0.9
    (0.05, True, True)
    >>> ou_lr_test(steady.simulate(1, 400, rng)[0], n_boot=19).p > 0.05
    True
    """
    x = series(np.arange(np.size(x)), np.ravel(x), minimum=40, what="a test of resilience", allow_constant=False).y
    if n_boot < 1:
        raise MeasureError(f"n_boot={n_boot}; at least one simulated trace is needed")
    constant, weakening = fit_pull(x)
    deviance = _deviance(constant, weakening)
    rng = np.random.default_rng(seed)
    null, alternative = (ou_deviance(model.simulate(n_boot, len(x), rng)) for model in (constant, weakening))
    ties = null[:, None] == alternative[None, :]
    auc = float((alternative[None, :] > null[:, None]).mean() + 0.5 * ties.mean())
    return OUTest(
        deviance, (1 + int((null >= deviance).sum())) / (1 + n_boot), auc,
        float((alternative > np.quantile(null, 0.95)).mean()), constant, weakening, null, alternative,
    )  # fmt: skip


def ou_deviance(traces: Any) -> Array:
    """The deviance of `ou_lr_test` for many traces, (traces, points) -> (traces), without simulations."""
    return np.array([_deviance(*fit_pull(one)) for one in np.atleast_2d(np.asarray(traces, dtype=np.float64))])


def fit_pull(x: Array) -> tuple[Pull, Pull]:
    """The likeliest constant pull and the likeliest one that does not grow stronger.

    Given the rates, middle and noise follow from weighted least squares; the rates are searched for in logarithms.
    """
    from scipy.optimize import minimize, minimize_scalar

    before, now, n = x[:-1], x[1:], len(x) - 1
    time = np.linspace(0, 1, n)

    def parts(first: float, last: float) -> tuple[float, float, float]:
        theta = first + (last - first) * time
        keep, gain = np.exp(-theta), _gain(theta)
        lever, rest = 1 - keep, now - keep * before
        mu = float((lever * rest / gain).sum() / (lever**2 / gain).sum())
        square = float(((rest - mu * lever) ** 2 / gain).sum() / n)
        loglik = -0.5 * (n * (math.log(2 * math.pi * max(square, 1e-300)) + 1) + float(np.log(gain).sum()))
        return mu, math.sqrt(square), loglik

    def clipped(rates: Array) -> tuple[float, float]:
        first, last = np.exp(np.clip(rates, math.log(_LEAST), math.log(_MOST)))
        return float(first), float(min(first, last))

    starts = {rate: parts(rate, rate)[2] for rate in _GRID}
    best = math.log(max(starts, key=starts.__getitem__))
    line = minimize_scalar(
        lambda one: -parts(*clipped(np.array([one, one])))[2], bounds=(best - 2, best + 2), method="bounded"
    )
    rate = clipped(np.array([line.x, line.x]))[0]
    constant = Pull(rate, rate, *parts(rate, rate))
    # From the constant pull, and from one that weakens by a factor of three either way of it.
    simplex = np.array([[0.0, 0.0], [0.55, -0.55], [1.1, -0.2]]) + math.log(rate)
    found = minimize(
        lambda rates: -parts(*clipped(rates))[2], simplex[1], method="Nelder-Mead",
        options={"initial_simplex": simplex, "xatol": 0.01, "fatol": 0.005, "maxfev": 120},
    )  # fmt: skip
    first, last = clipped(found.x)
    weakening = Pull(first, last, *parts(first, last))
    return constant, weakening if weakening.loglik > constant.loglik else constant


def _deviance(constant: Pull, weakening: Pull) -> float:
    return max(0.0, 2 * (weakening.loglik - constant.loglik))


def _gain(theta: Array) -> Array:
    """Variance that noise of unit strength gathers in one sample: (1 - exp(-2 theta)) / (2 theta)."""
    return -np.expm1(-2 * theta) / (2 * theta)
