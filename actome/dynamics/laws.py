"""Laws of how a quantity moves with training, data or size, with their uncertainty and what would refute them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from actome.core.errors import MeasureError
from actome.dynamics.law_families import Array, Law, law_of
from actome.dynamics.law_search import Loss, Search, Solution, covariance
from actome.dynamics.series import Series, block_length, lag1, series

if TYPE_CHECKING:
    from actome.dynamics.law_checks import Bootstrap, Control, Extrapolation


@dataclass(frozen=True)
class LawFit:
    """One law fitted to one curve.

    Attributes:
        law: its name; `formula` has the whole.
        parameters: by name, in the units of x and y.
        errors: standard errors; infinite for a parameter that the data leave open (`open`), NaN for one at a bound.
        derived: what follows from the parameters, such as the date of a peak.
        r2: share of the variance of y explained (of log y for laws that are fitted there).
        aic, bic: small-sample Akaike (AICc) and Bayesian criteria, of y in either case, so that laws can be compared.
        sigma: standard deviation of the residuals, over n - k.
        open: parameters in a direction along which the curve does not change.
        at_bound: parameters that ended at a bound of their range, and are treated as known there.
        curve: what was fitted.
    """

    law: str
    formula: str
    parameters: dict[str, float]
    errors: dict[str, float]
    derived: dict[str, float | str]
    r2: float
    aic: float
    bic: float
    sigma: float
    open: tuple[str, ...]
    at_bound: tuple[str, ...]
    loss: str
    curve: Series = field(repr=False)
    search: Search = field(repr=False)
    solution: Solution = field(repr=False)
    cov: Array = field(repr=False)

    def __repr__(self) -> str:
        values = ", ".join(f"{name} = {one:.4g} ± {self.errors[name]:.2g}" for name, one in self.parameters.items())
        rest = "".join(
            f", {name} = {one if isinstance(one, str) else f'{one:.4g}'}" for name, one in self.derived.items()
        )
        doubts = f"; left open by the data: {', '.join(self.open)}" if self.open else ""
        doubts += f"; at a bound: {', '.join(self.at_bound)}" if self.at_bound else ""
        return f"{self.law}: {self.formula} with {values}{rest}; r2 = {self.r2:.4f} on {len(self.curve)} points{doubts}"

    @property
    def degrees(self) -> int:
        """Points less parameters."""
        return len(self.curve) - len(self.parameters)

    def predict(self, x: Any) -> Array:
        """The law at any x, (points)."""
        u = (np.asarray(x, dtype=np.float64) - self.search.shift) / self.search.unit
        with np.errstate(all="ignore"):
            return self.search.law.function(u, *self.solution.theta)

    def interval(self, name: str, level: float = 0.95) -> tuple[float, float]:
        """A parameter's interval from its standard error and Student's t; see `bootstrap` for derived dates."""
        from scipy.stats import t

        if name not in self.parameters:
            raise MeasureError(f"{name!r} is no parameter of {self.law}; there are: {', '.join(self.parameters)}")
        half = float(t.ppf(0.5 + level / 2, self.degrees)) * self.errors[name]
        return self.parameters[name] - half, self.parameters[name] + half

    def band(self, x: Any, level: float = 0.95, kind: str = "mean") -> tuple[Array, Array]:
        """Where the law's curve lies (`kind="mean"`) or a new point would (`"prediction"`): low and high, (points).

        Delta method, with the residuals' standard deviation taken as the same everywhere (of log y for laws that are
        fitted there), and no allowance for the law being the wrong one.
        """
        from scipy.stats import t

        if kind not in ("mean", "prediction"):
            raise MeasureError(f"kind={kind!r} does not exist; choose 'mean' or 'prediction'")
        log = self.search.law.space == "log"
        u = (np.asarray(x, dtype=np.float64) - self.search.shift) / self.search.unit
        gradient = self.search.jacobian(self.solution.theta, np.atleast_1d(u))
        variance = np.einsum("nk,kl,nl->n", gradient, self.cov, gradient)
        if kind == "prediction":
            variance = variance + self.sigma**2
        half = float(t.ppf(0.5 + level / 2, self.degrees)) * np.sqrt(variance)
        middle = np.atleast_1d(self.predict(x))
        return (middle * np.exp(-half), middle * np.exp(half)) if log else (middle - half, middle + half)

    def diagnostics(self) -> dict[str, float]:
        """What the residuals still hold, each near its value for independent normal noise in brackets.

        ``durbin_watson`` (2), ``lag1`` (0), ``lag1_limit`` beyond which lag1 says that errors are not independent, and
        standard errors too small; ``spread_trend``, Spearman of their size with x (0); ``largest`` in standard
        deviations (about 3); ``normal_p``, Shapiro-Wilk.
        """
        from scipy.stats import shapiro, spearmanr

        r = self.solution.residuals
        total = float(r @ r)
        flat = total <= 0 or np.ptp(r) == 0
        return {
            "durbin_watson": float((np.diff(r) ** 2).sum()) / total if not flat else math.nan,
            "lag1": lag1(r),
            "lag1_limit": 2 / math.sqrt(len(r)),
            "spread_trend": float(spearmanr(self.curve.x, np.abs(r)).statistic) if not flat else math.nan,
            "largest": float(np.abs(r).max() / self.sigma) if self.sigma > 0 else math.nan,
            "normal_p": float(shapiro(r).pvalue) if not flat else math.nan,
        }

    def bootstrap(self, resamples: int = 200, seed: int = 0, block: int | None = None) -> Bootstrap:
        """Intervals of parameters and derived dates by refitting; see `law_checks.bootstrap`."""
        from actome.dynamics.law_checks import bootstrap

        return bootstrap(self, resamples, seed, block or block_length(self.solution.residuals))

    def control(self, permutations: int = 99, seed: int = 0) -> Control:
        """The same law on the same values in shuffled order; see `law_checks.control`."""
        from actome.dynamics.law_checks import control

        return control(self.curve.x, self.curve.y, self.search.law, permutations=permutations, seed=seed)

    def extrapolate(self, holdout: float = 0.25) -> Extrapolation:
        """The law fitted to the first points and scored on the last; see `law_checks.extrapolate`."""
        from actome.dynamics.law_checks import extrapolate

        return extrapolate(self.curve.x, self.curve.y, self.search.law, holdout=holdout, min_points=0)


def fit_law(
    x: Any,
    y: Any = None,
    law: str | Law = "power",
    *,
    sigma: Any = None,
    loss: Loss = "linear",
    starts: int = 12,
    min_points: int | None = None,
) -> LawFit:
    """Fits a law by bounded least squares from several starts.

    Starts come from a grid over the parameters that the law is not linear in, with the others solved for; the best
    `starts` of them are polished. It takes no random numbers.

    Args:
        x: (points), such as steps, tokens or parameters; or a frame with columns `step`, `value` and perhaps `seed`.
        y: (points), or (seeds, points); the mean over seeds is fitted.
        law: one of ``power``, ``logspace_power``, ``exp_log``, ``rectified``, ``sigmoid``, ``log_sigmoid``,
            ``exponential``, ``log``, ``sqrt``, ``linear``, ``loglog``; see `law_families.LAWS` for their formulas.
        sigma: standard deviation of each y, up to a factor, (points).
        loss: ``"soft_l1"`` lets residuals beyond 1.345 robust standard deviations count linearly instead of squared.
        starts: how many searches.
        min_points: how many points to insist on, instead of the law's own number. Fewer than one more than there are
            parameters are never enough; a good fit to hardly more says nothing.

    Raises:
        MeasureError: too few points (says how many are needed), values that are not finite, a constant y, x or y
            outside the law's domain, or no search that got anywhere.

    Source: Golub and Pereyra 1973 (variable projection); Huber 1981, section 7.6 (errors under a soft loss).

    >>> x = np.arange(1.0, 41.0)
    >>> fit = fit_law(x, 3 - 2 * x**-0.5 + 0.001 * np.sin(37 * x), law="power")
    >>> {name: round(value, 2) for name, value in fit.parameters.items()}, fit.r2 > 0.999
    ({'A0': 3.0, 'c': -2.0, 'a': -0.5}, True)
    """
    family = law_of(law)
    k = len(family.parameters)
    need = max(family.points if min_points is None else min_points, k + 1)
    curve = series(x, y, minimum=need, what=f"fit {family.name!r}", allow_constant=False)
    _check_domain(family, curve)
    weights = None if sigma is None else _weights(sigma, x, curve)
    search = Search(family, curve.x)
    solution = search.solve(curve.y, starts=starts, weights=weights, loss=loss)
    if solution is None or not np.isfinite(solution.theta).all():
        raise MeasureError(
            f"no search for {family.name!r} ({family.formula}) got anywhere on these {len(curve)} points"
        )
    return _result(family, curve, search, solution, weights, loss)


def _result(
    family: Law, curve: Series, search: Search, solution: Solution, weights: Array | None, loss: Loss
) -> LawFit:
    n, k = len(curve), len(family.parameters)
    w = np.ones(n) if weights is None else weights
    target = np.log(curve.y) if family.space == "log" else curve.y
    r = solution.residuals * w
    sse = max(float(r @ r), n * (1e-15 * float(np.abs(target).max())) ** 2, 1e-300)
    at_low, at_high = (np.isclose(solution.theta, end, rtol=1e-6, atol=1e-9) for end in (search.lower, search.upper))
    fixed = at_low | at_high
    theta = np.where(at_low, search.lower, np.where(at_high, search.upper, solution.theta))
    solution.theta = theta
    variance = sse / (n - k)
    sigma = math.sqrt(variance)
    if loss == "soft_l1" and math.isfinite(solution.scale):
        z = (r / solution.scale) ** 2
        psi, slope = r / np.sqrt(1 + z), (1 + z) ** -1.5
        variance = float(psi @ psi) / (n - k) / max(float(slope.mean()), 1e-3) ** 2
        sigma = 1.4826 * float(np.median(np.abs(r)))
    cov, open_ = covariance(solution.jacobian * w[:, None], variance, fixed)
    natural = family.unscale(theta, search.unit, search.shift)
    # Errors in the user's units by the derivative of the change of units.
    errors = np.sqrt(np.maximum(np.diag(_carried(family, search, theta, cov)), 0))
    errors = np.where(open_, np.inf, np.where(fixed, np.nan, errors))
    mean = float((w**2 * target).sum() / (w**2).sum())
    total = float((w**2 * (target - mean) ** 2).sum())
    # Gaussian likelihood of y itself: a fit to log y pays the change of variables.
    loglik = -0.5 * n * (math.log(2 * math.pi * sse / n) + 1) + float(np.log(w).sum())
    loglik -= float(target.sum()) if family.space == "log" else 0.0
    p = k + 1
    names = family.parameters
    return LawFit(
        family.name, family.formula, dict(zip(names, map(float, natural), strict=True)),
        dict(zip(names, map(float, errors), strict=True)), family.derived(natural, curve.x), 1 - sse / total,
        2 * p - 2 * loglik + (2 * p * (p + 1) / (n - p - 1) if n > p + 1 else math.inf), p * math.log(n) - 2 * loglik,
        sigma, tuple(np.array(names)[open_].tolist()), tuple(np.array(names)[fixed].tolist()), loss, curve, search,
        solution, cov,
    )  # fmt: skip


def _carried(family: Law, search: Search, theta: Array, cov: Array) -> Array:
    columns = []
    for i, one in enumerate(theta):
        step = 1e-6 * max(abs(one), 1e-6)
        up, down = theta.copy(), theta.copy()
        up[i], down[i] = one + step, one - step
        columns.append(
            (family.unscale(up, search.unit, search.shift) - family.unscale(down, search.unit, search.shift))
            / (2 * step)
        )
    change = np.stack(columns, 1)
    return change @ cov @ change.T


def _check_domain(family: Law, curve: Series) -> None:
    low = curve.x[0]
    if (family.domain == "positive" and low <= 0) or (family.domain == "nonnegative" and low < 0):
        wanted = "above 0" if family.domain == "positive" else "0 or above"
        raise MeasureError(
            f"{family.name!r} ({family.formula}) takes x {wanted}, and the smallest is {low:g}; leave step 0 out, or "
            "count from 1"
        )
    if family.space == "log" and curve.y.min() <= 0:
        raise MeasureError(
            f"{family.name!r} is fitted to log y, and the smallest y is {curve.y.min():g}; it suits losses and other "
            "positive quantities"
        )


def _weights(sigma: Any, x: Any, curve: Series) -> Array:
    values = np.asarray(sigma, dtype=np.float64)
    if values.shape != curve.x.shape or not np.isfinite(values).all() or values.min() <= 0:
        raise MeasureError(f"sigma has shape {values.shape}; want one positive number for each of {len(curve)} points")
    if not hasattr(x, "columns"):
        values = values[np.argsort(np.asarray(x, dtype=np.float64), kind="stable")]
    return 1 / values
