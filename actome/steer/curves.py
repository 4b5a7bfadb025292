r"""What preference and utility do as an intervention gets stronger: curves fitted to a sweep, and methods compared.

Preference is a gain along the direction times the validity that is left of the states, utility is that validity:

.. math:: P(m) = (\alpha m + \beta) D(m) + b, \quad U(m) = \beta_u D(m) + b_u,

with a decay :math:`D(m) = (1 + (m - c)^2 / w^2)^{-p}` (``"rational"``) or :math:`e^{-(m - c)^2 / w^2}`
(``"gaussian"``), whose centre, width and power may differ between positive and negative multipliers. It is scaled to 1
at zero, which the constants before it take up, so that the two sides meet.

Source: Why Steering Works: Toward a Unified View of Language Model Parameter Dynamics (the two curves and the
rational decay); the Gaussian one is its limit for large powers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from actome.core.errors import MeasureError

if TYPE_CHECKING:
    import pandas as pd

Kind = Literal["rational", "gaussian"]
KINDS: tuple[Kind, ...] = ("rational", "gaussian")


@dataclass(frozen=True)
class Decay:
    """One side of the validity decay, 1 at zero.

    Attributes:
        centre, width: in multiples of the strength.
        power: of the rational form; infinite for the Gaussian one.
    """

    centre: float
    width: float
    power: float

    def __call__(self, m: np.ndarray) -> np.ndarray:
        """The validity left at multipliers of this side's sign."""

        def log(x: Any) -> Any:
            square = ((x - self.centre) / self.width) ** 2
            return -square if np.isinf(self.power) else -self.power * np.log1p(square)

        # Far from a narrow decay the scaling to 1 at zero alone would overflow.
        return np.exp(np.clip(log(np.asarray(m, dtype=np.float64)) - log(0.0), -700, 50))


@dataclass(frozen=True)
class Curve:
    r"""A fitted curve: :math:`(\alpha m + \beta) D(m) + b`.

    Attributes:
        gain: :math:`\alpha`, log-odds a unit of strength; 0 for utility.
        level, floor: :math:`\beta` and :math:`b`; their sum is the curve's value at zero.
        decay: for multipliers of at least zero.
        below: for negative ones; None where the sweep had none.
        r2: share of the variance of the sweep that the curve takes.
        points: how many there were.
    """

    gain: float
    level: float
    floor: float
    decay: Decay
    below: Decay | None
    r2: float
    points: int

    def __call__(self, multipliers: Any) -> np.ndarray:
        """Log-odds at these multipliers."""
        m = np.asarray(multipliers, dtype=np.float64)
        left = self.decay(m)
        if self.below is not None:
            left = np.where(m < 0, self.below(m), left)
        return (self.gain * m + self.level) * left + self.floor

    def r2_of(self, multipliers: Any, values: Any) -> float:
        """Share of the variance of other points that the curve takes; may be negative."""
        values = np.asarray(values, dtype=np.float64)
        return _r2(values, self(multipliers))


@dataclass(frozen=True)
class Curves:
    """Both curves of a sweep; `kind` is the form of their decay."""

    preference: Curve
    utility: Curve
    kind: Kind


def fit_curves(sweep: pd.DataFrame, kind: Kind = "rational") -> Curves:
    """Fits both curves to a sweep over multipliers, by least squares from several starts.

    Args:
        sweep: with the columns multiplier, preference and utility, as `preference_utility` gives it. The rational form
            has 6 numbers for preference and 5 for utility, and 3 more each where there are negative multipliers.
        kind: of the decay.

    Raises:
        MeasureError: an unknown kind; fewer points than the curve has numbers; values that are not finite or all equal.

    >>> import pandas as pd
    >>> m = np.linspace(0, 4, 17)
    >>> sweep = pd.DataFrame({"multiplier": m, "preference": 2 * m * np.exp(-(m**2) / 9), "utility": 5 / (1 + m**2)})
    >>> found = fit_curves(sweep)
    >>> found.preference.r2 > 0.999, found.utility.r2 > 0.999
    (True, True)
    """
    if kind not in KINDS:
        raise MeasureError(f"kind={kind!r} does not exist; choose {' or '.join(KINDS)}")
    m = sweep["multiplier"].to_numpy(dtype=np.float64)
    fitted = {name: _fit(m, sweep[name].to_numpy(dtype=np.float64), name, kind) for name in ("preference", "utility")}
    return Curves(fitted["preference"], fitted["utility"], kind)


def equal_preference(sweeps: Mapping[str, pd.DataFrame], preference: float | None = None) -> pd.DataFrame:
    """Methods compared where they give the same preference, which equal multipliers do not.

    Args:
        sweeps: by method, with the columns multiplier, preference and utility, and zero among the multipliers.
        preference: log-odds at which to compare; the highest that all methods reach, unless given.

    Returns:
        A row a method: method, preference, multiplier, utility. The multiplier is the smallest of at least zero at
        which the preference is reached, by straight lines between the points of the sweep; so is the utility.

    Raises:
        MeasureError: a method that does not reach the preference, or that starts beyond it.

    >>> import pandas as pd
    >>> weak = pd.DataFrame({"multiplier": [0, 1, 2], "preference": [0, 1, 2], "utility": [6, 5, 4]})
    >>> strong = pd.DataFrame({"multiplier": [0, 1, 2], "preference": [0, 2, 4], "utility": [6, 5, 0]})
    >>> equal_preference({"weak": weak, "strong": strong}).round(2).values.tolist()
    [['weak', 2.0, 2.0, 4.0], ['strong', 2.0, 1.0, 5.0]]
    """
    import pandas as pd

    if not sweeps:
        raise MeasureError("there is no sweep to compare")
    upper = {}
    for name, sweep in sweeps.items():
        part = sweep[sweep["multiplier"] >= 0].sort_values("multiplier")
        if part.empty or part["multiplier"].iloc[0] != 0:
            raise MeasureError(f"the sweep of {name} has no multiplier of 0, from which strength is counted")
        upper[name] = part
    reached = {name: float(part["preference"].max()) for name, part in upper.items()}
    target = min(reached.values()) if preference is None else float(preference)
    rows = []
    for name, part in upper.items():
        m, p, u = (part[column].to_numpy(dtype=np.float64) for column in ("multiplier", "preference", "utility"))
        if target > reached[name] or target < p[0]:
            raise MeasureError(
                f"{name} goes from a preference of {p[0]:.3g} to {reached[name]:.3g} and has none of {target:.3g}; "
                "compare elsewhere or widen the sweep"
            )
        end = int(np.argmax(p >= target))
        share = 0.0 if end == 0 else (target - p[end - 1]) / (p[end] - p[end - 1])
        at = [x[end] if end == 0 else x[end - 1] + share * (x[end] - x[end - 1]) for x in (m, u)]
        rows.append((name, target, float(at[0]), float(at[1])))
    return pd.DataFrame(rows, columns=["method", "preference", "multiplier", "utility"])


def _fit(m: np.ndarray, y: np.ndarray, name: str, kind: Kind) -> Curve:
    from scipy.optimize import least_squares

    sides = 2 if (m < 0).any() else 1
    linear = 3 if name == "preference" else 2
    numbers = linear + sides * (3 if kind == "rational" else 2)
    if len(m) < numbers:
        raise MeasureError(f"{len(m)} points are too few for a curve of {name} with {numbers} numbers")
    if not (np.isfinite(m).all() and np.isfinite(y).all()):
        raise MeasureError(f"the sweep has values of {name} that are not finite")
    if np.ptp(y) == 0 or np.ptp(m) == 0:
        raise MeasureError(f"the values of {name} are all the same; there is no curve to fit")
    reach = float(np.abs(m).max())

    def decays(free: np.ndarray) -> list[Decay]:
        power = (lambda row: np.exp(row[2])) if kind == "rational" else (lambda row: np.inf)
        return [Decay(row[0] * reach, np.exp(row[1]) * reach, power(row)) for row in free.reshape(sides, -1)]

    def solved(free: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The constants before the decay, which are a linear problem once it is given, and what is left over."""
        left = _left(m, decays(free))
        columns = [m * left, left, np.ones_like(m)] if linear == 3 else [left, np.ones_like(m)]
        a = np.stack(columns, 1)
        # A tiny ridge: far away decays make columns alike.
        scale = np.linalg.norm(a, axis=0) + 1e-12
        b = np.concatenate([y, np.zeros(linear)])
        constants = np.linalg.lstsq(np.concatenate([a / scale, 1e-6 * np.eye(linear)]), b, rcond=None)[0] / scale
        return constants, a @ constants - y

    best: Any = None
    spread = float(y.std())
    powers = (np.log(0.5), np.log(2.0)) if kind == "rational" else (None,)
    for width in (0.15, 0.5, 1.5):
        for centre in (0.0, 0.3):
            for power in powers:
                one = [centre, np.log(width)] + ([power] if power is not None else [])
                start = np.array(one + ([-centre, *one[1:]] if sides == 2 else []))
                low = np.tile([-2.0, np.log(0.01)] + ([np.log(0.05)] if power is not None else []), sides)
                high = np.tile([2.0, np.log(20.0)] + ([np.log(20.0)] if power is not None else []), sides)
                found = least_squares(lambda free: solved(free)[1] / spread, start, bounds=(low, high), max_nfev=200)
                if best is None or found.cost < best.cost:
                    best = found
    constants, residual = solved(best.x)
    gain, level, floor = constants if linear == 3 else (0.0, *constants)
    above, *below = decays(best.x)
    r2 = _r2(y, y + residual)
    return Curve(float(gain), float(level), float(floor), above, below[0] if below else None, r2, len(m))


def _left(m: np.ndarray, decays: list[Decay]) -> np.ndarray:
    left = decays[0](m)
    return left if len(decays) == 1 else np.where(m < 0, decays[1](m), left)


def _r2(y: np.ndarray, fitted: np.ndarray) -> float:
    around = float(((y - y.mean()) ** 2).sum())
    return 1 - float(((y - fitted) ** 2).sum()) / around if around > 0 else float("nan")
