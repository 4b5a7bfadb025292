"""The laws that `fit_law` fits: formula, parameters, bounds, and where a search for them begins.

Most laws are linear in some of their parameters once the others are set. A search therefore lays a grid over the others
only, and solves for the linear ones exactly at each of its points (variable projection, Golub and Pereyra 1973).

Inside a fit, x is measured from `shift` in units of `unit` (its largest value; its range for laws that any x suits);
`unscale` brings the parameters back to the user's units.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from actome.core.errors import MeasureError, nearest

Array = np.ndarray
TINY = 1e-12


@dataclass(frozen=True)
class Law:
    """One family of curves.

    Attributes:
        name, formula: for people.
        parameters: in the order that `function` takes them.
        function: (x, *parameters) -> y.
        linear: which parameters the curve is linear in.
        log_linear: a parameter that enters as a factor exp(it) of all that is not linear.
        lower, upper: bounds of the parameters, in the units of a fit.
        grid: values of each nonlinear parameter to begin from, in the units of a fit.
        unscale: (parameters in the units of a fit, unit, shift) -> parameters in the user's units.
        points: how many points it takes before a good fit says anything.
        domain: which x it is defined for.
        space: whether squared errors are of y or of log y.
        derived: (parameters, x) -> what else follows, such as dates.
        source: of the law.
    """

    name: str
    formula: str
    parameters: tuple[str, ...]
    function: Callable[..., Array]
    linear: tuple[str, ...]
    lower: tuple[float, ...]
    upper: tuple[float, ...]
    grid: dict[str, tuple[float, ...]]
    unscale: Callable[[Array, float, float], Array]
    points: int
    log_linear: str = ""
    domain: Literal["any", "positive", "nonnegative"] = "any"
    space: Literal["linear", "log"] = "linear"
    derived: Callable[[Array, Array], dict[str, float | str]] = lambda theta, x: {}
    source: str = ""


def exp_log(t: Array, A: float, lam: float, gam: float, t0: float, K: float) -> Array:
    """A exp(-lam x) ln(x) + K with x = gam t + t0."""
    x = gam * t + t0
    return A * np.exp(-lam * x) * np.log(x) + K


def exp_log_peak(lam: float, gam: float, t0: float) -> float:
    """When the emergence law peaks: (exp(W(1/lam)) - t0) / gam; infinite for lam = 0.

    The derivative of exp(-lam x) ln x vanishes where x ln x = 1/lam, and x = exp(W(1/lam)) solves that.

    Source: Hidden Dynamics of Massive Activations in Transformer Training.

    >>> round(exp_log_peak(lam=1.0, gam=1.0, t0=0.0), 4)           # x ln x = 1
    1.7632
    """
    from scipy.special import lambertw

    if lam <= 0:
        return float("inf")
    # W(1/lam) itself, for 1/lam may overflow: W(z) = ln z - ln ln z + ... is what lambertw gives for finite z.
    return float((np.exp(lambertw(min(1 / lam, 1e300)).real) - t0) / gam)


def _exp_log_derived(theta: Array, x: Array) -> dict[str, float | str]:
    A, lam, gam, t0, _ = theta
    peak = exp_log_peak(lam, gam, t0)
    inside = x.min() < peak < x.max()
    if inside:
        kind = "early peak" if A > 0 else "early trough"
    else:
        rising = (A > 0) == (peak >= x.max())
        kind = "log increase" if rising else "log decrease"
    return {"t_peak": peak, "class": kind}


def _power_unscale(theta: Array, unit: float, shift: float) -> Array:
    A0, c, a = theta
    return np.array([A0, c * unit**-a, a])


def _logspace_unscale(theta: Array, unit: float, shift: float) -> Array:
    c, a, b, A0 = theta
    return np.array([c * unit**-a, a, b, A0])


def _rectified_unscale(theta: Array, unit: float, shift: float) -> Array:
    B, D_l, beta, E = theta
    return np.array([B * unit**beta, D_l * unit**beta, beta, E])


def _log_sigmoid(x: Array, floor: float, height: float, x0: float, h: float) -> Array:
    from scipy.special import expit

    return floor + height * expit(h * (np.log(x) - np.log(x0)))


def _sigmoid(x: Array, floor: float, height: float, x0: float, width: float) -> Array:
    from scipy.special import expit

    return floor + height * expit((x - x0) / width)


INF = float("inf")
_LAWS = [
    Law(
        "power", "A0 + c x^a", ("A0", "c", "a"), lambda x, A0, c, a: A0 + c * x**a, ("A0", "c"),
        (-INF, -INF, -8.0), (INF, INF, 8.0),
        {"a": (-4.0, -2.0, -1.0, -0.6, -0.3, -0.1, 0.1, 0.3, 0.6, 1.0, 1.5, 2.5, 4.0)},
        _power_unscale, 7, domain="positive",
        source="Sparsing Law: Towards Large Language Models with Greater Activation Sparsity (rising branch)",
    ),
    Law(
        "logspace_power", "exp(-c x^a + b) + A0", ("c", "a", "b", "A0"),
        lambda x, c, a, b, A0: np.exp(b - c * x**a) + A0, ("A0",),
        (0.0, 0.01, -60.0, -INF), (200.0, 8.0, 60.0, INF),
        {"c": (0.1, 0.5, 1.5, 4.0, 10.0, 30.0), "a": (0.1, 0.3, 0.6, 1.0, 1.6)}, _logspace_unscale, 9, "b", "positive",
        source="Sparsing Law: Towards Large Language Models with Greater Activation Sparsity (falling branch)",
    ),
    Law(
        "exp_log", "A exp(-lam x) ln(x) + K, x = gam t + t0", ("A", "lam", "gam", "t0", "K"), exp_log, ("A", "K"),
        (-INF, 0.0, 1e-3, 1e-6, -INF), (INF, 50.0, 1e4, 1e3, INF),
        {
            "lam": (0.0, 1e-3, 0.01, 0.05, 0.2, 0.6), "gam": (0.3, 1.0, 3.0, 10.0, 40.0, 200.0),
            "t0": (0.02, 0.3, 1.0, 3.0),
        },
        lambda theta, unit, shift: theta * np.array([1, 1, 1 / unit, 1, 1]), 20, domain="nonnegative",
        derived=_exp_log_derived,
        source="Hidden Dynamics of Massive Activations in Transformer Training",
    ),
    Law(
        "rectified", "B / (D_l + x^beta) + E", ("B", "D_l", "beta", "E"),
        lambda x, B, D_l, beta, E: B / (D_l + x**beta) + E, ("B", "E"),
        (0.0, 0.0, 0.01, 0.0), (INF, 1e6, 8.0, INF),
        {"D_l": (0.0, 1e-3, 0.01, 0.1, 0.5, 2.0), "beta": (0.15, 0.3, 0.5, 0.8, 1.2, 2.0)},
        _rectified_unscale, 6, domain="nonnegative", space="log",
        derived=lambda theta, x: {"transition": float(theta[1] ** (1 / theta[2]))},
        source="Selecting Large Language Model to Fine-tune via Rectified Scaling Law",
    ),
    Law(
        "sigmoid", "floor + height / (1 + exp(-(x - x0) / width))", ("floor", "height", "x0", "width"), _sigmoid,
        ("floor", "height"), (-INF, -INF, -2.0, 1e-4), (INF, INF, 3.0, 5.0),
        {"x0": tuple(np.linspace(0.02, 1.0, 18)), "width": (0.005, 0.02, 0.06, 0.2)},
        lambda theta, unit, shift: np.array([theta[0], theta[1], theta[2] * unit + shift, theta[3] * unit]), 9,
        derived=lambda theta, x: {"rise_10_90": float(2 * np.log(9) * theta[3])},
    ),
    Law(
        "log_sigmoid", "floor + height / (1 + (x / x0)^-h)", ("floor", "height", "x0", "h"), _log_sigmoid,
        ("floor", "height"), (-INF, -INF, 1e-9, 0.05), (INF, INF, 1e3, 200.0),
        {"x0": tuple(np.geomspace(1e-3, 1.0, 18)), "h": (0.7, 2.0, 6.0, 20.0)},
        lambda theta, unit, shift: np.array([theta[0], theta[1], theta[2] * unit, theta[3]]), 9, domain="positive",
    ),
    Law(
        "exponential", "A0 + c exp(-r x)", ("A0", "c", "r"), lambda x, A0, c, r: A0 + c * np.exp(-r * x), ("A0", "c"),
        (-INF, -INF, -20.0), (INF, INF, 1e3),
        {"r": (-8.0, -3.0, -1.0, 0.1, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 40.0, 120.0)},
        lambda theta, unit, shift: np.array([theta[0], theta[1] * np.exp(theta[2] * shift / unit), theta[2] / unit]), 6,
        derived=lambda theta, x: {"half_life": float(np.log(2) / theta[2]) if theta[2] > 0 else INF},
    ),
    Law(
        "log", "a + b ln x", ("a", "b"), lambda x, a, b: a + b * np.log(x), ("a", "b"), (-INF, -INF), (INF, INF), {},
        lambda theta, unit, shift: np.array([theta[0] - theta[1] * np.log(unit), theta[1]]), 5, domain="positive",
    ),
    Law(
        "sqrt", "a + b sqrt(x)", ("a", "b"), lambda x, a, b: a + b * np.sqrt(x), ("a", "b"), (-INF, -INF), (INF, INF),
        {},
        lambda theta, unit, shift: np.array([theta[0], theta[1] / np.sqrt(unit)]), 5, domain="nonnegative",
    ),
    Law(
        "linear", "a + b x", ("a", "b"), lambda x, a, b: a + b * x, ("a", "b"), (-INF, -INF), (INF, INF), {},
        lambda theta, unit, shift: np.array([theta[0] - theta[1] * shift / unit, theta[1] / unit]), 5,
    ),
    Law(
        "loglog", "exp(a) x^b, a line of log y in log x", ("a", "b"), lambda x, a, b: np.exp(a) * x**b, (),
        (-700.0, -50.0), (700.0, 50.0), {"b": (-2.0, -0.5, 0.5, 2.0)},
        lambda theta, unit, shift: np.array([theta[0] - theta[1] * np.log(unit), theta[1]]), 5, "a", "positive", "log",
    ),
]  # fmt: skip
LAWS: dict[str, Law] = {law.name: law for law in _LAWS}


def law_of(law: str | Law) -> Law:
    """A law by its name, or itself.

    Raises:
        MeasureError: for a name that there is not.

    >>> law_of("rectified").formula
    'B / (D_l + x^beta) + E'
    """
    if isinstance(law, Law):
        return law
    if law not in LAWS:
        raise MeasureError(f"there is no law {law!r}{nearest(law, LAWS)}; there are: {', '.join(LAWS)}")
    return LAWS[law]
