"""Families of learning curves and priors over their parameters: what a curve may look like before any of it is seen.

A curve is a weighted sum of families (pow3, ilog2, janoschek by default, the weights uniform in [0, 1]) at steps
x = 1, 2, ..., plus Gaussian noise whose standard deviation is log-normal. Curves that leave [0, 1] or that end no
higher than they began are not drawn. It is the prior that `LCPFN` is trained on and `CurveEnsemble` samples from.

Every parameter has one coordinate u in which its prior is a plain uniform or normal density; samplers work there.

Dims: N curves, T steps, P coordinates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from actome.core.errors import MeasureError, nearest

Array = np.ndarray


@dataclass(frozen=True)
class Coordinate:
    """One parameter: the density of its coordinate u, and how u becomes the parameter.

    Attributes:
        density: ``"uniform"`` between `a` and `b`, or ``"normal"`` with mean `a` and standard deviation `b`.
        link: ``"same"`` (u itself), ``"exp"`` (e^u) or ``"one minus exp"`` (1 - e^u).
    """

    density: Literal["uniform", "normal"]
    a: float
    b: float
    link: Literal["same", "exp", "one minus exp"] = "same"

    def value(self, u: Array) -> Array:
        """The parameter at u."""
        if self.link == "same":
            return u
        return np.exp(u) if self.link == "exp" else 1 - np.exp(u)

    def draw(self, count: int, rng: np.random.Generator) -> Array:
        """Coordinates from the prior, (count)."""
        draw = rng.uniform if self.density == "uniform" else rng.normal
        return draw(self.a, self.b, count)

    def log_density(self, u: Array) -> Array:
        """Log prior density of u."""
        if self.density == "uniform":
            return np.where((u >= self.a) & (u <= self.b), -math.log(self.b - self.a), -np.inf)
        return -0.5 * ((u - self.a) / self.b) ** 2 - math.log(self.b * math.sqrt(2 * math.pi))


@dataclass(frozen=True)
class CurveFamily:
    """One family: formula, function of (x, *parameters), and the prior of each parameter."""

    name: str
    formula: str
    function: Callable[..., Array]
    prior: dict[str, Coordinate]


def _uniform(a: float, b: float, link: str = "same") -> Coordinate:
    return Coordinate("uniform", a, b, link)  # type: ignore[arg-type]


def _normal(a: float, b: float, link: str = "same") -> Coordinate:
    return Coordinate("normal", a, b, link)  # type: ignore[arg-type]


_FAMILIES = [
    CurveFamily(
        "pow3", "c - a x^-alpha", lambda x, c, a, alpha: c - a * x**-alpha,
        {"c": _uniform(0, 1.25), "a": _uniform(-0.6, 0.6), "alpha": _normal(0, 2, "exp")},
    ),
    CurveFamily(
        "ilog2", "c - a / log(x + 1)", lambda x, c, a: c - a / np.log1p(x),
        {"c": _uniform(0, 1), "a": _uniform(-0.5, 0.5)},
    ),
    CurveFamily(
        "janoschek", "a - (a - b) exp(-k x^d)", lambda x, a, b, k, d: a - (a - b) * np.exp(-k * x**d),
        {"a": _uniform(0, 1), "b": _uniform(0, 2), "k": _normal(-2, 1, "exp"), "d": _normal(0, 0.5, "exp")},
    ),
    CurveFamily(
        "log_power", "a / (1 + (x / e^b)^c)", lambda x, a, b, c: a / (1 + (x / np.exp(b)) ** c),
        {"a": _normal(0.8, 0.1), "b": _normal(1, 1), "c": _uniform(-3, 0)},
    ),
    CurveFamily(
        "weibull", "a - (a - b) exp(-(k x)^d)", lambda x, a, b, k, d: a - (a - b) * np.exp(-((k * x) ** d)),
        {"a": _uniform(0, 1.5), "b": _uniform(0, 1), "k": _normal(-2, 1, "exp"), "d": _normal(0, 0.5, "exp")},
    ),
    CurveFamily(
        "mmf", "a - (a - b) / (1 + (k x)^d)", lambda x, a, b, k, d: a - (a - b) / (1 + (k * x) ** d),
        {"a": _normal(0.8, 0.1), "b": _normal(0.2, 0.1), "k": _normal(0, 2, "exp"), "d": _normal(0, 1, "exp")},
    ),
    CurveFamily(
        "vap", "exp(a + b / x + c log x)", lambda x, a, b, c: np.exp(a + b / x + c * np.log(x)),
        {"a": _uniform(-2, 0), "b": _uniform(-4, 0), "c": _uniform(-8, 0, "exp")},
    ),
    CurveFamily(
        "loglog_linear", "log(a log x + b)", lambda x, a, b: np.log(a * np.log(x) + b),
        {"a": _normal(-2, 1, "exp"), "b": _uniform(0, 1, "exp")},
    ),
    CurveFamily(
        "exp4", "c - exp(b - a x^alpha)", lambda x, c, a, b, alpha: c - np.exp(b - a * x**alpha),
        {
            "c": _normal(0.8, 0.1), "a": _normal(-2, 1, "exp"), "b": _normal(0, 0.5, "exp"),
            "alpha": _normal(0, 1, "exp"),
        },
    ),
    CurveFamily(
        "pow4", "c - (a x + b)^-alpha", lambda x, c, a, b, alpha: c - (a * x + b) ** -alpha,
        {
            "c": _uniform(-5, 0, "one minus exp"), "a": _normal(-3, 2, "exp"), "b": _uniform(0, 1, "exp"),
            "alpha": _normal(0, 1, "exp"),
        },
    ),
    CurveFamily(
        "hill3", "a x^h / (k^h + x^h)", lambda x, a, h, k: a / (1 + (k / x) ** h),
        {"a": _normal(0.8, 0.1), "h": _normal(1, 1, "exp"), "k": _normal(1, 2, "exp")},
    ),
]  # fmt: skip
CURVE_FAMILIES: dict[str, CurveFamily] = {one.name: one for one in _FAMILIES}
DOMHAN = ("pow3", "ilog2", "janoschek")


class PriorCurves(NamedTuple):
    """Curves from the prior: without noise and with it, (N, T) each, and the noise's standard deviation, (N)."""

    clean: Array
    noisy: Array
    sigma: Array


@dataclass(frozen=True)
class CurvePrior:
    """The prior over curves of `length` steps, as samplers need it.

    Attributes:
        length: T; the curve has to stay in [0, 1] and to have risen by then.
        families: names out of `CURVE_FAMILIES`.
        noise: mean and standard deviation of log sigma.
    """

    length: int = 50
    families: tuple[str, ...] = DOMHAN
    noise: tuple[float, float] = (-4.0, 1.0)

    def __post_init__(self) -> None:
        if self.length < 2 or not self.families:
            raise MeasureError(f"a prior over curves takes 2 steps and one family or more, not {self.length} steps")
        for one in self.families:
            if one not in CURVE_FAMILIES:
                raise MeasureError(
                    f"there is no family of curves {one!r}{nearest(one, CURVE_FAMILIES)}; there are: "
                    + ", ".join(CURVE_FAMILIES)
                )

    @property
    def coordinates(self) -> list[Coordinate]:
        """In order: log sigma, the weights, the parameters of each family; P in all."""
        weights = [_uniform(0, 1) for _ in self.families]
        rest = [one for name in self.families for one in CURVE_FAMILIES[name].prior.values()]
        return [_normal(*self.noise), *weights, *rest]

    def draw(self, count: int, rng: np.random.Generator) -> Array:
        """Coordinates before the curve has been looked at, (count, P)."""
        return np.stack([one.draw(count, rng) for one in self.coordinates], 1)

    def log_density(self, u_NP: Array) -> Array:
        """Log density of coordinates, (N), before the curve has been looked at."""
        return sum(one.log_density(u) for one, u in zip(self.coordinates, u_NP.T, strict=True))

    def curve(self, u_NP: Array, x_T: Array) -> Array:
        """Curves without noise at any x above 0, (N, T); not finite where parameters overflow."""
        total, at = np.zeros((len(u_NP), len(x_T))), 1 + len(self.families)
        with np.errstate(all="ignore"):
            for i, name in enumerate(self.families):
                family = CURVE_FAMILIES[name]
                values = []
                for one in family.prior.values():
                    values.append(one.value(u_NP[:, at, None]))
                    at += 1
                total += u_NP[:, 1 + i, None] * family.function(x_T[None], *values)
        return total

    def allowed(self, curve_NT: Array) -> Array:
        """Whether curves at steps 1 to T are finite, within [0, 1] and end above where they began, (N)."""
        with np.errstate(invalid="ignore"):
            inside = ((curve_NT >= 0) & (curve_NT <= 1)).all(1)
            return inside & (curve_NT[:, -1] > curve_NT[:, 0])

    def sample(self, count: int, rng: np.random.Generator) -> tuple[Array, Array]:
        """Coordinates (N, P) of curves that are allowed, and these curves (N, T), by rejection."""
        x, kept, curves, have = np.arange(1.0, self.length + 1), [], [], 0
        while have < count:
            # About one in six of the default families is allowed.
            u = self.draw(max(4 * (count - have), 256), rng)
            curve = self.curve(u, x)
            good = self.allowed(curve)
            kept.append(u[good])
            curves.append(curve[good])
            have += int(good.sum())
        return np.concatenate(kept)[:count], np.concatenate(curves)[:count]


def curve_prior(
    count: int, length: int = 50, seed: int | np.random.Generator = 0, *, families: Sequence[str] = DOMHAN,
    noise: tuple[float, float] = (-4.0, 1.0),
) -> PriorCurves:  # fmt: skip
    """Draws learning curves from the prior of learning-curve extrapolation.

    Args:
        count: N.
        length: T, steps 1 to T.
        seed: or a generator.
        families: which are added up, out of `CURVE_FAMILIES`.
        noise: mean and standard deviation of the log of the noise's standard deviation.

    Returns:
        `PriorCurves`. The noise may carry values out of [0, 1].

    Raises:
        MeasureError: a family that does not exist, fewer than two steps, or no curves.

    Source: Efficient Bayesian Learning Curve Extrapolation using Prior-Data Fitted Networks, section 3 and its code
    (log sigma ~ N(-4, 1), where the text has another); families of Domhan, Springenberg and Hutter 2015.

    >>> curves = curve_prior(100, 20, seed=1)
    >>> curves.noisy.shape, bool((curves.clean[:, -1] > curves.clean[:, 0]).all()), bool((curves.clean <= 1).all())
    ((100, 20), True, True)
    """
    if count < 1:
        raise MeasureError(f"count={count}: give at least one curve")
    rng = np.random.default_rng(seed)
    u, clean = CurvePrior(length, tuple(families), noise).sample(count, rng)
    sigma = np.exp(u[:, 0])
    return PriorCurves(clean, clean + sigma[:, None] * rng.standard_normal(clean.shape), sigma)


def laid_out(steps: Array, length: int, onto: int) -> Array:
    """Steps 1 to `length` laid evenly over 1 to `onto`, so that curves of any length meet the prior of one.

    >>> laid_out(np.array([1, 2, 100]), 100, 50).round(3).tolist()
    [1.0, 1.495, 50.0]
    """
    return 1 + (np.asarray(steps, dtype=np.float64) - 1) * ((onto - 1) / (length - 1))


def ahead(horizons: int | Sequence[int] | None, count: int, length: int) -> list[int]:
    """Horizons as a list of steps after `count`: a number is that one alone, None all up to `length`.

    Raises:
        MeasureError: nothing is left to predict, or a horizon beyond the end.
    """
    if count >= length:
        raise MeasureError(f"the prefix has {count} points and the whole curve {length}; nothing is left to predict")
    if horizons is None:
        return list(range(1, length - count + 1))
    found = [int(horizons)] if np.ndim(horizons) == 0 else [int(one) for one in horizons]
    if not found or min(found) < 1 or max(found) > length - count:
        raise MeasureError(
            f"horizons={found} after {count} of {length} steps; want steps ahead from 1 to {length - count} (length= "
            "says how long the whole curve is)"
        )
    return found
