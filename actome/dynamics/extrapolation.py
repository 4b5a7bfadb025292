"""Where a learning curve is going: one question, four ways to answer it, and their scores on curves that went on.

Dims: C points seen, Q points to come.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from actome.core.errors import MeasureError, nearest
from actome.dynamics.curve_ensemble import CurveEnsemble
from actome.dynamics.forecast import Forecast, GaussianMixture
from actome.dynamics.laws import fit_law
from actome.dynamics.lcpfn import LCPFN

if TYPE_CHECKING:
    import pandas as pd

Array = np.ndarray
Goal = Literal["max", "min"]
Method = Literal["pfn", "ensemble", "power", "last"]
Extrapolator = Callable[[Array, int], Forecast]


def extrapolate_curve(
    curve: Any, horizon: int, method: Method = "pfn", *, goal: Goal = "max", bounds: tuple[float, float] | None = None,
    pfn: LCPFN | None = None, ensemble: CurveEnsemble | None = None,
) -> Forecast:  # fmt: skip
    """The distribution of a learning curve's next values, in the curve's own units, noise included.

    Args:
        curve: (C), the values so far at equally spaced steps, the first first.
        horizon: Q, how many more there are; the run has C + Q in all.
        method: ``"pfn"``, one pass of `LCPFN`; ``"ensemble"``, the posterior of parametric curves by `CurveEnsemble`
            (about a second); ``"power"``, A0 + c x^a by least squares with its prediction band, taken as normal; or
            ``"last"``, the last value with the spread of a random walk of the curve's own differences.
        goal: ``"max"`` for measures that rise, such as accuracy; ``"min"`` for losses.
        bounds: lowest and highest value that the measure can take; the first two methods know curves that rise within
            [0, 1], and the curve is brought there by (y - low) / (high - low), or (high - y) / (high - low) for a loss.
            By default (0, 1) for measures that rise, and (0, largest value so far) for losses: a loss of 0 is the best
            there is, and it does not get worse than it has been. Where the floor is known, such as the entropy of the
            data, give it. The last two methods need no bounds.
        pfn, ensemble: others than `LCPFN.shipped()` and the ensemble of three families.

    Returns:
        A `Forecast` of shape (Q).

    Raises:
        MeasureError: too few points (2; 5 for ``"power"``), values that are not finite, bounds that the curve leaves,
            or a curve that falls although `goal` says that it rises, and the other way round.

    Source: Efficient Bayesian Learning Curve Extrapolation using Prior-Data Fitted Networks; Domhan, Springenberg and
    Hutter 2015 (ensemble); Hyndman and Athanasopoulos 2021, Forecasting, section 5.5 (spread of the last value).

    >>> loss = 2.0 + 3.0 * np.arange(1.0, 21.0) ** -0.7
    >>> forecast = extrapolate_curve(loss, 20, goal="min", bounds=(1.0, 5.0))
    >>> low, high = forecast.interval(0.9)
    >>> truth = 2.0 + 3.0 * 40.0**-0.7
    >>> bool(low[-1] < truth < high[-1]), forecast.shape
    (True, torch.Size([20]))
    """
    y_C = _curve(curve)
    if isinstance(horizon, bool) or not isinstance(horizon, int | np.integer) or horizon < 1:
        raise MeasureError(f"horizon={horizon!r}: give how many more values there are, 1 or more")
    if method == "last":
        return _last(y_C, horizon)
    if method == "power":
        return _power(y_C, horizon)
    if method not in ("pfn", "ensemble"):
        known = ("pfn", "ensemble", "power", "last")
        raise MeasureError(f"there is no method {method!r}{nearest(str(method), known)}; there are: {', '.join(known)}")
    scale, shift = _to_unit(y_C, goal, bounds)
    unit_C = (y_C - shift) / scale
    length = len(y_C) + horizon
    if method == "pfn":
        found: Forecast = (pfn or LCPFN.shipped()).predict(unit_C, length=length)
    else:
        found = (ensemble or CurveEnsemble()).fit(unit_C, length=length).predict()
    return found.affine(scale, shift)


def score_extrapolations(
    curves: Any, cut: int | float, methods: Sequence[str] | Mapping[str, str | Extrapolator] = ("pfn", "power", "last"),
    *, goal: Goal = "max", bounds: tuple[float, float] | None = None, level: float = 0.9,
) -> pd.DataFrame:  # fmt: skip
    """Scores forecasts of the rest of curves against what came, one row a curve and method.

    The truth is the curve's own values, with their noise, and so is what the methods forecast. The curves must not have
    been used to train, fit or choose a method; nothing here can check that.

    Args:
        curves: (N, T), or a sequence of curves of different lengths.
        cut: how many points are seen, or which share of each curve (a float below 1).
        methods: of `extrapolate_curve`; or, by name, such a method or a function (points seen, horizon) -> `Forecast`.
        goal, bounds: as in `extrapolate_curve`.
        level: of the interval whose coverage is counted.

    Returns:
        Columns ``curve``, ``method``, ``horizons``, ``log_score`` (mean log density, nats, in the curve's units; higher
        is better), ``crps`` and ``error`` (of the mean, absolute; lower is better), ``coverage`` (share of values in
        the interval, to be compared with `level`), ``width`` of the interval and ``end_error``, signed, at the end.

    Raises:
        MeasureError: a cut that leaves nothing to see or to forecast, or what `extrapolate_curve` refuses (with the
            curve's number).

    >>> from actome.dynamics import curve_prior
    >>> table = score_extrapolations(curve_prior(20, 50, seed=99).noisy, cut=10, methods=["pfn", "last"])
    >>> scores = table.groupby("method").log_score.mean()
    >>> bool(scores["pfn"] > scores["last"])
    True
    """
    import pandas as pd

    methods = [methods] if isinstance(methods, str) else methods
    named = dict(methods) if isinstance(methods, Mapping) else {one: one for one in methods}
    rows = []
    for number, curve in enumerate(curves):
        y = _curve(curve)
        seen = round(cut * len(y)) if isinstance(cut, float) and cut < 1 else int(cut)
        if not 1 <= seen < len(y):
            raise MeasureError(f"cut={cut} of curve {number} with {len(y)} points leaves {seen} to see; want 1 or more")
        before, truth = y[:seen], torch.from_numpy(y[seen:])
        for name, method in named.items():
            try:
                if callable(method):
                    forecast = method(before, len(truth))
                else:
                    forecast = extrapolate_curve(before, len(truth), method, goal=goal, bounds=bounds)  # type: ignore[arg-type]
            except MeasureError as error:
                raise MeasureError(f"curve {number}, method {name!r}: {error}") from error
            low, high = forecast.interval(level)
            middle = forecast.mean()
            rows.append({
                "curve": number, "method": name, "horizons": len(truth),
                "log_score": float(forecast.log_prob(truth).mean()), "crps": float(forecast.crps(truth).mean()),
                "error": float((middle - truth).abs().mean()),
                "coverage": float(((low <= truth) & (truth <= high)).double().mean()),
                "width": float((high - low).mean()), "end_error": float(middle[-1] - truth[-1]),
            })  # fmt: skip
    return pd.DataFrame(rows)


def last_value_of(curves: Any, cut: int) -> Extrapolator:
    """The last value plus, for each horizon, a normal change fitted to other curves: a baseline that has seen many.

    Args:
        curves: (N, T), other curves than those to be forecast.
        cut: how many points will be seen.

    >>> from actome.dynamics import curve_prior
    >>> baseline = last_value_of(curve_prior(500, 50, seed=1).noisy, 10)
    >>> baseline(np.linspace(0.1, 0.5, 10), 40).shape
    torch.Size([40])
    """
    curves = np.asarray(curves, dtype=np.float64)
    if curves.ndim != 2 or len(curves) < 3 or not 1 <= cut < curves.shape[1]:
        raise MeasureError(f"curves {curves.shape}, cut={cut}: want three curves or more that go on beyond the cut")
    change = curves[:, cut:] - curves[:, cut - 1 : cut]
    mean, sd = change.mean(0), change.std(0, ddof=1)

    def forecast(before: Array, horizon: int) -> GaussianMixture:
        if len(before) != cut or horizon > len(mean):
            raise MeasureError(
                f"{len(before)} points and horizon {horizon}; it was made for {cut} points and {len(mean)}"
            )
        return _normal(before[-1] + mean[:horizon], sd[:horizon])

    return forecast


def _curve(curve: Any) -> Array:
    if hasattr(curve, "detach"):
        curve = curve.detach().cpu().double()
    try:
        y = np.asarray(curve, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise MeasureError(f"a curve is (points) numbers, not {type(curve).__name__}: {error}") from error
    if y.ndim != 1 or len(y) < 2:
        raise MeasureError(f"a curve of shape {y.shape}; want (points), two or more at equally spaced steps")
    bad = np.flatnonzero(~np.isfinite(y))
    if len(bad):
        raise MeasureError(f"the curve is not finite at {len(bad)} of {len(y)} points (first at index {bad[0]})")
    return y


def _normal(mean: Array, sd: Array) -> GaussianMixture:
    return GaussianMixture(torch.from_numpy(mean)[:, None], torch.from_numpy(sd)[:, None])


def _least(y_C: Array) -> float:
    """A standard deviation below which a forecast from these points would be pretending."""
    return max(1e-4 * float(np.ptp(y_C)), 1e-12 * float(np.abs(y_C).max()), 1e-12)


def _last(y_C: Array, horizon: int) -> GaussianMixture:
    step = max(float(np.sqrt(np.mean(np.diff(y_C) ** 2))), _least(y_C))
    return _normal(np.full(horizon, y_C[-1]), step * np.sqrt(np.arange(1, horizon + 1)))


def _power(y_C: Array, horizon: int) -> GaussianMixture:
    from scipy.stats import t

    x = np.arange(1.0, len(y_C) + horizon + 1)
    later = x[len(y_C) :]
    fit = fit_law(x[: len(y_C)], y_C, "power", starts=4, min_points=5)
    low, high = fit.band(later, 0.9, "prediction")
    # Half the band in standard deviations of Student's t; a normal of that t's variance stands for it.
    spread = (
        (high - low) / 2 / float(t.ppf(0.95, fit.degrees)) * math.sqrt(max(fit.degrees / max(fit.degrees - 2, 1), 1))
    )
    return _normal(fit.predict(later), np.maximum(spread, _least(y_C)))


def _to_unit(y_C: Array, goal: Goal, bounds: tuple[float, float] | None) -> tuple[float, float]:
    """Scale and shift with y = scale * unit + shift, the unit's curve rising within [0, 1]."""
    if goal not in ("max", "min"):
        raise MeasureError(f"goal={goal!r} does not exist; choose 'max' for measures that rise or 'min' for losses")
    _check_direction(y_C, goal)
    if bounds is None:
        bounds = (0.0, 1.0) if goal == "max" else (0.0, float(y_C.max()))
    try:
        low, high = map(float, bounds)
    except (TypeError, ValueError) as error:
        raise MeasureError(f"bounds={bounds!r}: want two numbers, (lowest, highest)") from error
    if not low < high or not math.isfinite(high - low):
        raise MeasureError(f"bounds={bounds}: want the lowest and the highest value that the measure can take")
    middle, room = float(np.median(y_C)), 0.25 * (high - low)  # single values may be out for their noise
    if not low - room <= middle <= high + room:
        raise MeasureError(
            f"the curve goes from {y_C.min():g} to {y_C.max():g}, out of bounds ({low:g}, {high:g}); give "
            "bounds=(lowest, highest) that the measure can take"
        )
    return (high - low, low) if goal == "max" else (low - high, high)


def _check_direction(y_C: Array, goal: Goal) -> None:
    """Refuses a curve that clearly goes the other way: the prior has only curves that rise."""
    from scipy.stats import spearmanr

    if len(y_C) < 5 or np.ptp(y_C) == 0:
        return
    rising = float(spearmanr(np.arange(len(y_C)), y_C).statistic)
    if (rising < -0.9) if goal == "max" else (rising > 0.9):
        verb, other = ("falls", "min") if goal == "max" else ("rises", "max")
        raise MeasureError(f"the curve {verb} all along, and goal={goal!r} was given; did you mean goal={other!r}?")
