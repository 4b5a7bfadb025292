"""A curve as every fit and date of this package takes it: two arrays, or a tidy frame with several seeds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from actome.core.errors import MeasureError

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Series:
    """A curve in order of `x`.

    Attributes:
        x: (points), rising, each once.
        y: (points); the mean over seeds where there are several.
        runs: (seeds, points), one row a seed; a single row without seeds.
    """

    x: np.ndarray
    y: np.ndarray
    runs: np.ndarray

    def __len__(self) -> int:
        return len(self.x)

    def resampled(self, rng: np.random.Generator) -> np.ndarray:
        """The mean of as many seeds drawn with replacement, (points)."""
        return self.runs[rng.integers(0, len(self.runs), len(self.runs))].mean(0)


def series(x: Any, y: Any = None, *, minimum: int = 2, what: str = "this", allow_constant: bool = True) -> Series:
    """Reads a curve and refuses what would make a fit or a date wrong.

    Args:
        x: (points), in any order; or a frame with columns `step`, `value` and, when it has several runs, `seed`.
        y: (points), or (seeds, points) with one row a run; left out when `x` is a frame.
        minimum: how many different `x` are needed.
        what: needs them; for the message.
        allow_constant: whether a constant `y` says anything.

    Raises:
        MeasureError: for lengths that differ, values that are not finite, an `x` that a run has twice or lacks, or too
            few points.

    >>> import pandas as pd
    >>> frame = pd.DataFrame({"step": [2, 1, 2, 1], "value": [3.0, 1.0, 5.0, 1.0], "seed": [0, 0, 1, 1]})
    >>> curve = series(frame)
    >>> curve.y.tolist(), curve.runs.shape
    ([1.0, 4.0], (2, 2))
    """
    if y is None:
        x, runs = _from_frame(x)
    else:
        x, runs = _array(x, "x"), np.atleast_2d(_array(y, "y"))
        if x.ndim != 1 or runs.ndim != 2 or runs.shape[1] != len(x):
            raise MeasureError(
                f"x has shape {x.shape} and y {np.shape(y)}; want (points) and (points) or (seeds, points)"
            )
    for name, values in (("x", x), ("y", runs)):
        bad = np.flatnonzero(~np.isfinite(np.atleast_2d(values)).all(0))
        if len(bad):
            raise MeasureError(
                f"{name} is not finite at {len(bad)} of {len(x)} points (first at index {bad[0]}); drop these points "
                "first, and say so, for a run that ended in NaN is not the same as one that was stopped"
            )
    order = np.argsort(x, kind="stable")
    x, runs = x[order], runs[:, order]
    if len(x) > 1 and not (np.diff(x) > 0).all():
        twice = x[1:][np.diff(x) == 0][0]
        raise MeasureError(f"x={twice:g} occurs twice; give several runs as rows of y, or a frame with a column `seed`")
    if len(x) < minimum:
        raise MeasureError(f"{what} needs {minimum} points or more at different x, and was given {len(x)}")
    mean = runs.mean(0)
    # Below 1e-150 squares are lost, and a curve is as good as constant.
    if not allow_constant and np.ptp(mean) <= max(1e-12 * np.abs(mean).max(), 1e-150):
        raise MeasureError(f"y is constant at {mean[0]:g}; there is nothing to {what}")
    return Series(x, mean, runs)


def frame_of_runs(frame: pd.DataFrame) -> list[tuple[Any, Series]]:
    """Each seed's curve of a tidy frame by itself, with the steps that this seed has."""
    _columns(frame)
    if "seed" not in frame:
        return [(None, series(frame["step"], frame["value"]))]
    return [(seed, series(one["step"], one["value"])) for seed, one in frame.groupby("seed", sort=True)]


def _from_frame(frame: Any) -> tuple[np.ndarray, np.ndarray]:
    _columns(frame)
    if "seed" not in frame:
        return _array(frame["step"], "step"), np.atleast_2d(_array(frame["value"], "value"))
    if frame.duplicated(["seed", "step"]).any():
        raise MeasureError("a seed has a step twice; select one site, layer and measure of the table first")
    wide = frame.pivot(index="seed", columns="step", values="value")
    expected = frame.groupby(["seed", "step"]).size().unstack()
    if expected.isna().to_numpy().any():
        raise MeasureError("seeds were not measured at the same steps; keep the steps that all of them have")
    return _array(wide.columns, "step"), wide.to_numpy(np.float64)


def _columns(frame: Any) -> None:
    have = list(getattr(frame, "columns", []))
    if not {"step", "value"} <= set(have):
        raise MeasureError(f"give x and y, or one frame with columns step, value and perhaps seed; got columns {have}")


def _array(values: Any, name: str) -> np.ndarray:
    if hasattr(values, "detach"):
        values = values.detach().cpu().double()
    try:
        return np.array(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise MeasureError(f"{name} is not numbers: {error}") from error


def blocks(residuals: np.ndarray, length: int, rng: np.random.Generator) -> np.ndarray:
    """Residuals drawn with replacement in circular blocks of `length`, which keeps their serial correlation.

    Source: Politis and Romano 1992, A circular block-resampling procedure for stationary data.
    """
    n = len(residuals)
    starts = rng.integers(0, n, -(-n // length))
    return residuals[(starts[:, None] + np.arange(length)) % n].ravel()[:n]


def block_length(residuals: np.ndarray) -> int:
    """How long blocks should be for residuals of this lag-1 autocorrelation; 1 when they look independent.

    1.1447 (n 4 r^2 / (1 - r^2)^2)^(1/3), where r is beyond what independent residuals show (2 / sqrt(n)).

    Source: Andrews 1991, Heteroskedasticity and Autocorrelation Consistent Covariance Matrix Estimation (the window
    of Bartlett with an autoregression of order one).
    """
    n = len(residuals)
    r = lag1(residuals)
    if not abs(r) > 2 / np.sqrt(n):
        return 1
    r = min(abs(r), 0.97)
    return int(np.clip(round(1.1447 * (n * 4 * r**2 / (1 - r**2) ** 2) ** (1 / 3)), 2, max(2, n // 4)))


def lag1(values: np.ndarray) -> float:
    """Autocorrelation at lag one; NaN for a constant."""
    centred = values - values.mean()
    total = float(centred @ centred)
    return float(centred[1:] @ centred[:-1]) / total if total > 0 else float("nan")


def autoregressive(residuals: np.ndarray, rho: float, rng: np.random.Generator, replace: bool = True) -> np.ndarray:
    """Noise of autocorrelation `rho` from the residuals' own innovations, with or without replacement, (points)."""
    from scipy.signal import lfilter

    n = len(residuals)
    if rho == 0:
        return residuals[rng.integers(0, n, n)] if replace else rng.permutation(residuals)
    innovations = residuals[1:] - rho * residuals[:-1]
    innovations = innovations - innovations.mean()
    # A run-in of as many steps lets the series forget that it began at 0.
    drawn = (
        rng.choice(innovations, 2 * n) if replace else np.concatenate([rng.permutation(innovations) for _ in range(3)])
    )
    return lfilter([1.0], [1.0, -rho], drawn)[-n:]
