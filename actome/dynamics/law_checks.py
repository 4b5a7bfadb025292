"""What could refute a fitted law: shuffled order, points held out, rival laws; and its bootstrap."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from actome.core.errors import MeasureError
from actome.dynamics.law_families import Array, Law, law_of
from actome.dynamics.law_search import Search
from actome.dynamics.laws import LawFit, fit_law
from actome.dynamics.series import blocks, series

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Control:
    """A law's goodness beside what it reaches on the same values in shuffled order.

    Attributes:
        r2: on the curve.
        null: on each shuffled one, (permutations).
        median: of the null; a law that bends to anything has a high one.
        p: share of shuffles that fit at least as well, the curve itself counted.
    """

    r2: float
    null: Array = field(repr=False)
    median: float
    p: float


def control(
    x: Any, y: Any = None, law: str | Law = "power", *, permutations: int = 99, seed: int = 0, starts: int = 3
) -> Control:
    """Fits a law to values in shuffled order, which is what its r2 has to be compared with.

    The curve itself is refitted with as few starts as the shuffled ones, so that both get the same search.

    >>> x = np.arange(1.0, 31.0)
    >>> control(x, np.sqrt(x), "power", permutations=19).p
    0.05
    """
    family = law_of(law)
    curve = series(x, y, minimum=len(family.parameters) + 1, what=f"fit {family.name!r}", allow_constant=False)
    search, rng = Search(family, curve.x), np.random.default_rng(seed)

    def r2(values: Array) -> float:
        found = search.solve(values, starts=starts, quick=True)
        target = np.log(values) if family.space == "log" else values
        return 1 - float(found.residuals @ found.residuals) / float(((target - target.mean()) ** 2).sum())

    observed = r2(curve.y)
    null = np.array([r2(rng.permutation(curve.y)) for _ in range(permutations)])
    p = (1 + int((null >= observed).sum())) / (1 + permutations)
    return Control(observed, null, float(np.median(null)), p)


@dataclass(frozen=True)
class Bootstrap:
    """A law refitted to resampled curves.

    Attributes:
        parameters: (resamples) by name.
        derived: (resamples) by name, numbers only.
        classes: share of resamples in each class, for laws that have them.
        block: length of the blocks of residuals; 0 when seeds were resampled.
        curves: (resamples, parameters) in the units of a fit.
    """

    parameters: dict[str, Array] = field(repr=False)
    derived: dict[str, Array] = field(repr=False)
    classes: dict[str, float]
    block: int
    search: Search = field(repr=False)
    curves: Array = field(repr=False)

    def interval(self, name: str, level: float = 0.95) -> tuple[float, float]:
        """Percentile interval of a parameter or a derived quantity; infinite ends stay infinite."""
        values = self.parameters.get(name, self.derived.get(name))
        if values is None:
            raise MeasureError(f"there is no {name!r}; there are: {', '.join([*self.parameters, *self.derived])}")
        low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2], method="inverted_cdf")
        return float(low), float(high)

    def band(self, x: Any, level: float = 0.95) -> tuple[Array, Array]:
        """Percentile band of the law's curve at any x, low and high, (points) each."""
        u = (np.atleast_1d(np.asarray(x, dtype=np.float64)) - self.search.shift) / self.search.unit
        with np.errstate(all="ignore"):
            values = np.array([self.search.law.function(u, *theta) for theta in self.curves])
        low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2], axis=0)
        return low, high


def bootstrap(fit: LawFit, resamples: int = 200, seed: int = 0, block: int = 1) -> Bootstrap:
    """Refits a law to curves resampled by seed when there are three or more, otherwise by blocks of residuals.

    Residuals are centred and inflated by sqrt(n / (n - k)), for a fit takes some of the noise with it.

    Source: Davison and Hinkley 1997, Bootstrap Methods and their Application, chapters 6 to 8.
    """
    rng, curve, search = np.random.default_rng(seed), fit.curve, fit.search
    log = search.law.space == "log"
    fitted = search.values(fit.solution.theta)
    residuals = fit.solution.residuals - fit.solution.residuals.mean()
    residuals = residuals * math.sqrt(len(curve) / max(fit.degrees, 1))
    by_seed = len(curve.runs) >= 3
    found = []
    for _ in range(resamples):
        if by_seed:
            y = curve.resampled(rng)
        else:
            y = fitted + blocks(residuals, block, rng)
            y = np.exp(y) if log else y
        found.append(search.solve(y, starts=2, loss=fit.loss, also=[fit.solution.theta], quick=True).theta)
    family = search.law
    natural = np.array([family.unscale(theta, search.unit, search.shift) for theta in found])
    derived = [family.derived(theta, curve.x) for theta in natural]
    numbers = [name for name, one in fit.derived.items() if not isinstance(one, str)]
    classes = [one["class"] for one in derived if "class" in one]
    return Bootstrap(
        dict(zip(family.parameters, natural.T, strict=True)),
        {name: np.array([one[name] for one in derived]) for name in numbers},
        {str(name): classes.count(name) / len(classes) for name in sorted(set(classes))},
        0 if by_seed else block, search, np.array(found),
    )  # fmt: skip


@dataclass(frozen=True)
class Extrapolation:
    """A law fitted to the first part of a curve and scored on the rest.

    Attributes:
        rmse: root mean square error on the points held out.
        last_value, power: the same for the last value seen, and for A0 + c x^a fitted to the same first part (NaN where
            that could not be fitted).
        skill: 1 - rmse / last_value; above 0 the law beats standing still.
        coverage: share of the points held out inside the law's 90 % prediction band.
        fitted, held_out: how many points each.
        predicted: at the points held out.
    """

    rmse: float
    last_value: float
    power: float
    skill: float
    coverage: float
    fitted: int
    held_out: int
    predicted: Array = field(repr=False)


def extrapolate(
    x: Any, y: Any = None, law: str | Law = "power", *, holdout: float = 0.25, min_points: int | None = None
) -> Extrapolation:
    """Scores what a law says of the part of a curve that it has not seen.

    Args:
        x, y, law, min_points: as `fit_law` takes them.
        holdout: share of the points, the last ones, that are not fitted.

    >>> x = np.arange(1.0, 61.0)
    >>> found = extrapolate(x, 2 + 3 * np.exp(-x / 20), "exponential", holdout=0.5)
    >>> found.rmse < 1e-6 < found.last_value, found.skill > 0.99, found.held_out
    (True, True, 30)
    """
    family = law_of(law)
    curve = series(x, y, minimum=4, what="to extrapolate", allow_constant=False)
    cut = len(curve) - max(1, round(holdout * len(curve)))
    if not 0 < holdout < 1 or cut < 2:
        raise MeasureError(f"holdout={holdout} of {len(curve)} points leaves {max(cut, 0)} to fit")
    before, after, truth = curve.x[:cut], curve.x[cut:], curve.y[cut:]
    fit = fit_law(before, curve.y[:cut], family, min_points=min_points)
    predicted = fit.predict(after)
    low, high = fit.band(after, 0.9, "prediction")

    def rmse(values: Any) -> float:
        return float(np.sqrt(np.mean((values - truth) ** 2)))

    power = math.nan
    if cut >= 4 and before[0] > 0:
        baseline = Search(law_of("power"), before)
        theta = baseline.solve(curve.y[:cut], starts=3, quick=True).theta
        power = rmse(baseline.law.function(after / baseline.unit, *theta))
    last = rmse(curve.y[cut - 1])
    error = rmse(predicted)
    skill = 1 - error / last if last > 0 else math.nan
    inside = float(np.mean((truth >= low) & (truth <= high)))
    return Extrapolation(error, last, power, skill, inside, cut, len(truth), predicted)


@dataclass(frozen=True)
class LawComparison:
    """Several laws on one curve.

    Attributes:
        best: name of the law with the lowest AICc.
        fits: by name; laws that could not be fitted are missing.
        failed: by name, why.
        table: one row a law, best first: r2, aic, bic, weight (Akaike), parameters, held-out error and skill.
    """

    best: str
    fits: dict[str, LawFit] = field(repr=False)
    failed: dict[str, str]
    table: pd.DataFrame = field(repr=False)


def compare_laws(
    x: Any, y: Any = None, laws: Sequence[str | Law] = ("power", "log", "sqrt", "exponential", "sigmoid", "linear"),
    *, holdout: float = 0.25,
) -> LawComparison:  # fmt: skip
    """Fits several laws to one curve and ranks them.

    A weight near 1 says that a law is the best of those given, and not that it is right: look at its diagnostics and at
    its error on the points held out.

    Raises:
        MeasureError: when none of them can be fitted; with the reason for each.

    >>> x = np.arange(1.0, 41.0)
    >>> compare_laws(x, np.log(x) + 0.01 * np.cos(9 * x), ["log", "sqrt", "linear"]).best
    'log'
    """
    import pandas as pd

    fits, failed, rows = {}, {}, []
    for one in laws:
        name = law_of(one).name
        try:
            fit = fits[name] = fit_law(x, y, one)
        except MeasureError as error:
            failed[name] = str(error)
            continue
        try:
            held = extrapolate(fit.curve.x, fit.curve.y, one, holdout=holdout, min_points=0)
            scores = {"held_out_rmse": held.rmse, "skill": held.skill}
        except MeasureError:
            scores = {"held_out_rmse": math.nan, "skill": math.nan}
        rows.append({"law": name, "r2": fit.r2, "aic": fit.aic, "bic": fit.bic, "k": len(fit.parameters), **scores})
    if not rows:
        raise MeasureError("none of the laws can be fitted: " + "; ".join(f"{k}: {v}" for k, v in failed.items()))
    table = pd.DataFrame(rows).sort_values("aic", ignore_index=True)
    weight = np.exp(-0.5 * (table["aic"] - table["aic"].min()))
    table.insert(4, "weight", weight / weight.sum())
    return LawComparison(str(table["law"][0]), fits, failed, table)
