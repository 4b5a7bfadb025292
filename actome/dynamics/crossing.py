"""When, or at what size, a growing quantity will cross a critical value, with an interval."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from actome.core.errors import MeasureError
from actome.dynamics.series import lag1, series

Array = np.ndarray
TrendLaw = Literal["exponential", "power", "loglog2", "linear"]
# For each law: what is made of x, the degree of the polynomial in it, and whether log y is fitted.
_LAWS: dict[str, tuple[Callable[[Array], Array], int, bool]] = {
    "exponential": (lambda x: x, 1, True),
    "power": (np.log, 1, True),
    "loglog2": (np.log, 2, True),
    "linear": (lambda x: x, 1, False),
}
_FARTHEST = 1e6  # times the range that was seen; what crosses later is said to cross never


@dataclass(frozen=True)
class Crossing:
    """When a trend crosses a limit.

    Attributes:
        at: the x at which the fitted trend crosses; the last x where the last value is beyond the limit already, and
            infinite where the trend does not get there.
        low, high: where the confidence band of the trend crosses first, and where all of it has; `high` is infinite
            unless the trend is certain to get there at this level.
        law: that was fitted.
        past: whether the last value is beyond the limit already.
        slope: of the fitted quantity (log y, but for ``"linear"``) at the last x, for each unit of x.
        r2: of it.
        correlation: of neighbouring residuals; the interval allows for it.
        points: that were fitted.
    """

    at: float
    low: float
    high: float
    law: str
    past: bool
    slope: float
    r2: float
    correlation: float
    points: int
    trend: _Fit = field(repr=False)

    def predict(self, x: Any) -> Array:
        """The trend at any x, in the units of y."""
        return self.trend.out(self.trend.mean(np.atleast_1d(np.asarray(x, dtype=np.float64))))

    def band(self, x: Any, level: float = 0.9) -> tuple[Array, Array]:
        """Where a new point would lie: low and high."""
        x = np.atleast_1d(np.asarray(x, dtype=np.float64))
        half = self.trend.quantile(level) * np.sqrt(self.trend.variance(x) + self.trend.scale)
        middle = self.trend.mean(x)
        return self.trend.out(middle - half), self.trend.out(middle + half)


def forecast_crossing(
    x: Any, y: Any = None, limit: float = 1e4, *, law: TrendLaw | Literal["best"] = "best", level: float = 0.9,
    falling: bool = False,
) -> Crossing:  # fmt: skip
    """Fits a trend and says when it crosses a limit.

    The interval is that of inverse prediction: the x at which the trend's confidence band takes in the limit. Residuals
    that go together widen it by (1 + r) / (1 - r). It allows for the noise and not for the law being the wrong one:
    exponential trends seldom last, so look at `law` and take it for a warning rather than a date.

    Args:
        x: steps, or sizes; or a frame with columns `step`, `value` and perhaps `seed`.
        y: (points), or (seeds, points), of which the mean is fitted.
        limit: the critical value.
        law: ``"exponential"`` (log y in x), ``"power"`` (log y in log x), ``"loglog2"`` (the same with a square, for
            sizes), ``"linear"``; or ``"best"``, the one of the first two that leaves less error.
        level: of the interval.
        falling: crosses from above, as a gradient falls to the optimizer's epsilon.

    Raises:
        MeasureError: for fewer than two points more than the law has slopes, or y (x) of 0 or below where logarithms
            are taken.

    Source: Small-scale proxies for large-scale Transformer training instabilities, section 3.4 (logits and gradients
    over size, fitted in logarithms); Fieller 1954 (the interval).

    >>> steps = np.arange(0, 500, 20.0)
    >>> found = forecast_crossing(steps, 3 * np.exp(steps / 100), limit=1e4)
    >>> round(found.at), found.law, found.past                      # 100 ln(1e4 / 3)
    (811, 'exponential', False)
    """
    sign = -1.0 if falling else 1.0
    curve = series(x, y, minimum=3, what="a forecast")
    laws = ("exponential", "power") if law == "best" else (law,)
    for one in laws:
        if one not in _LAWS:
            raise MeasureError(f"law={one!r} does not exist; choose 'best' or one of {', '.join(_LAWS)}")
    if law == "best" and curve.x[0] <= 0:
        laws = ("exponential",)
    fits = {one: _fit(one, curve.x, curve.y, limit, sign) for one in laws}
    name, fit = min(fits.items(), key=lambda one: one[1].scale)
    past = bool(sign * (curve.y[-1] - limit) >= 0)
    last, span = float(curve.x[-1]), float(np.ptp(curve.x))
    ahead = last + span * np.concatenate([[0.0], np.geomspace(1e-4, _FARTHEST, 500)])
    target, t = fit.target, fit.quantile(level)
    middle, half = fit.mean(ahead), t * np.sqrt(fit.variance(ahead))
    at, low, high = (
        _first(ahead, sign * (values - target)) for values in (middle, middle + sign * half, middle - sign * half)
    )
    gap = 1e-6 * span
    slope = float((fit.mean(np.array([last + gap])) - fit.mean(np.array([last]))).item() / gap)
    return Crossing(
        last if past else at, min(low, last) if past else low, last if past else high, name, past, slope, fit.r2,
        fit.correlation, len(curve), fit,
    )  # fmt: skip


@dataclass(frozen=True)
class _Fit:
    """A polynomial in a function of x, with what its errors need."""

    of: Callable[[Array], Array]
    log: bool
    centre: float
    unit: float
    coefficients: Array
    cov: Array
    scale: float
    degrees: int
    r2: float
    correlation: float
    target: float

    def design(self, x: Array) -> Array:
        u = (self.of(x) - self.centre) / self.unit
        return u[:, None] ** np.arange(len(self.coefficients))

    def mean(self, x: Array) -> Array:
        return self.design(x) @ self.coefficients

    def variance(self, x: Array) -> Array:
        design = self.design(x)
        return np.einsum("nk,kl,nl->n", design, self.cov, design)

    def out(self, values: Array) -> Array:
        return np.exp(np.minimum(values, 700.0)) if self.log else values

    def quantile(self, level: float) -> float:
        from scipy.stats import t

        return float(t.ppf(0.5 + level / 2, self.degrees))


def _fit(law: str, x: Array, y: Array, limit: float, sign: float) -> _Fit:
    of, degree, log = _LAWS[law]
    if len(x) < degree + 2:
        raise MeasureError(f"a forecast with {law!r} needs {degree + 2} points or more, and was given {len(x)}")
    if log and (y.min() <= 0 or limit <= 0):
        raise MeasureError(f"{law!r} takes logarithms, and the smallest y is {y.min():g}, the limit {limit:g}")
    if of is np.log and x[0] <= 0:
        raise MeasureError(f"{law!r} takes the logarithm of x, and the smallest is {x[0]:g}; leave step 0 out")
    v, u = (np.log(y) if log else y), of(x)
    centre, unit = float(u.mean()), float(np.ptp(u)) / 2
    design = ((u - centre) / unit)[:, None] ** np.arange(degree + 1)
    coefficients, *_ = np.linalg.lstsq(design, v, rcond=None)
    r = v - design @ coefficients
    degrees = len(v) - degree - 1
    scale = max(float(r @ r) / degrees, (1e-12 * max(float(np.abs(v).max()), 1e-150)) ** 2)
    rho = lag1(r) if degrees > 4 else 0.0
    rho = min(max(rho, 0.0), 0.9) if math.isfinite(rho) else 0.0
    cov = scale * (1 + rho) / (1 - rho) * np.linalg.inv(design.T @ design)
    total = float(((v - v.mean()) ** 2).sum())
    r2 = 1 - float(r @ r) / total if total > 0 else math.nan
    target = math.log(limit) if log else float(limit)
    return _Fit(of, log, centre, unit, coefficients, cov, scale, degrees, r2, rho, target)


def _first(x: Array, beyond: Array) -> float:
    """The first x at which `beyond` is 0 or more, on the straight line between its neighbours; else infinite."""
    at = np.flatnonzero(beyond >= 0)
    if not len(at):
        return math.inf
    i = int(at[0])
    if i == 0:
        return float(x[0])
    share = -beyond[i - 1] / (beyond[i] - beyond[i - 1])
    return float(x[i - 1] + share * (x[i] - x[i - 1]))
