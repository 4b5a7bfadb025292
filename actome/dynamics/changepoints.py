"""When a curve changes its course: two straight lines fitted exactly, with a test and an interval for the date."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from actome.dynamics.segments import checked
from actome.dynamics.series import autoregressive, lag1

Array = np.ndarray


@dataclass(frozen=True)
class ChangePoint:
    """The one date that best parts a curve into two lines.

    Attributes:
        at: the date. Where joined lines meet; otherwise halfway between the last point before and the first after.
        low, high: bootstrap interval of it.
        index: of the first point after.
        slopes: of the line before and the one after.
        jump: of the second line over the first at the date; 0 for joined lines.
        gain: share of the straight line's squared error that parting it removes.
        p: share of series without a change, made of the straight line and noise as correlated as the curve's, that
            gain as much; the curve itself counted.
        serial: lag-1 autocorrelation of that noise; 0 where residuals looked independent.
    """

    at: float
    low: float
    high: float
    index: int
    slopes: tuple[float, float]
    jump: float
    gain: float
    p: float
    serial: float


def change_point(
    x: Any, y: Any = None, *, joined: bool = False, smallest: int = 3, level: float = 0.95,
    permutations: int = 499, resamples: int = 300, serial: float | None = None, seed: int = 0,
) -> ChangePoint:  # fmt: skip
    """The date at which one straight line becomes another, with a permutation test and a bootstrap interval.

    Args:
        x, y: (points) each, (seeds, points) for y, or a tidy frame. The mean over seeds is parted.
        joined: the lines meet (a kink) rather than being free to jump.
        smallest: points on either side.
        level: of the interval.
        permutations: of the test; 0 leaves p NaN. Residuals are permuted where they look independent; otherwise an
            autoregression of order one is run on its permuted innovations.
        resamples: of the bootstrap, of seeds where there are five or more and of residuals otherwise; 0 leaves the
            ends NaN.
        serial: lag-1 autocorrelation of the noise. By default the one at which noise without a change shows, after the
            same search for a date, what the curve's residuals show: the search itself draws that down.
        seed: of both.

    Raises:
        MeasureError: for fewer than two pieces' points, or a constant curve.

    Source: Hudson 1966 (joined lines, exact); Andrews 1993 (the largest gain over all dates as a test).

    >>> x = np.arange(40.0)
    >>> found = change_point(x, np.maximum(x - 25.5, 0) + 0.01 * np.sin(5 * x), joined=True, permutations=99)
    >>> round(found.at, 1), found.p, found.low < 25.5 < found.high
    (25.5, 0.01, True)
    """
    smallest = max(smallest, 2)
    curve = checked(x, y, 2 * smallest + 1, "find a change point", constant=False)
    rng, n = np.random.default_rng(seed), len(curve)
    u = (curve.x - curve.x.mean()) / np.ptp(curve.x)
    parts = _Parts(u, smallest)
    where = parts.joined if joined else parts.free

    line = parts.line(curve.y[None])[0]
    straight = curve.y - line
    index, at_u, error, fitted = where(curve.y)
    total = float(straight @ straight)
    gain = 1 - error / total if total > 1e-20 * float(curve.y @ curve.y) else 0.0
    # Serial correlation is judged from residuals of the parted fit: those of the straight line are bent by the change.
    rest = curve.y - fitted
    rho = parts.serial(lag1(rest), joined, rng) if serial is None else float(serial)

    p = math.nan
    if permutations:
        noise = straight if rho == 0 else rest
        drawn = np.array([autoregressive(noise, rho, rng, replace=False) for _ in range(permutations)])
        null = parts.gains(line + drawn, joined)
        p = (1 + int((null >= parts.gains(curve.y[None], joined)[0] - 1e-12).sum())) / (1 + permutations)

    low = high = math.nan
    if resamples:
        by_seed = len(curve.runs) >= 5
        rest = (rest - rest.mean()) * math.sqrt(n / max(n - 5, 1))
        dates = [
            where(curve.resampled(rng) if by_seed else fitted + autoregressive(rest, rho, rng))[1]
            for _ in range(resamples)
        ]
        low, high = _to_x(curve.x, np.quantile(dates, [(1 - level) / 2, (1 + level) / 2]))
    before, after = parts.slopes(curve.y, index, joined, at_u)
    scale = float(np.ptp(curve.x))
    jump = 0.0 if joined else parts.jump(curve.y, index, at_u)
    return ChangePoint(
        float(_to_x(curve.x, at_u)), float(low), float(high), index, (before / scale, after / scale), jump, gain, p, rho
    )


class _Parts:
    """Two-piece fits at one set of x; what depends on x alone is computed once."""

    def __init__(self, u: Array, smallest: int):
        self.u, self.smallest = u, smallest
        n = len(u)
        self.cuts = np.arange(smallest, n - smallest + 1)  # index of the first point after
        ones = np.ones(n)
        self.base = np.linalg.qr(np.stack([ones, u], 1))[0]
        self.free_q = [_blockwise(u, cut) for cut in self.cuts]
        self.knots = u[smallest - 1 : n - smallest + 1]
        self.joined_q = [np.linalg.qr(np.stack([ones, u, np.maximum(u - c, 0)], 1))[0] for c in self.knots]

    def line(self, y: Array) -> Array:
        return y @ self.base @ self.base.T

    def gains(self, y: Array, joined: bool) -> Array:
        """Largest share of the line's squared error removed over all dates at points, (series)."""
        rest = y - self.line(y)
        total = np.maximum((rest**2).sum(1), 1e-300)
        bases = self.joined_q if joined else self.free_q
        # The line lies in the span of every basis, so each removes from the line's residuals what it removes from y.
        return np.max([((rest @ q) ** 2).sum(1) for q in bases], 0) / total

    def serial(self, observed: float, joined: bool, rng: np.random.Generator, runs: int = 60) -> float:
        """The autocorrelation of noise whose residuals show the observed one in the mean; 0 where none is needed."""
        from scipy.signal import lfilter

        if not math.isfinite(observed):
            return 0.0
        bases, n = self.joined_q if joined else self.free_q, len(self.u)
        candidates = np.concatenate([np.arange(0.0, 0.9, 0.1), [0.9, 0.95, 0.98]])
        driven = rng.standard_normal((runs, n + 100))
        shown = []
        for rho in candidates:
            noise = lfilter([1.0], [1.0, -rho], driven, axis=1)[:, -n:]
            energies = np.array([((noise @ q) ** 2).sum(1) for q in bases])
            shown.append(np.mean([lag1(e - q @ (q.T @ e)) for e, q in _best(noise, energies, bases)]))
        rho = float(np.interp(observed, np.maximum.accumulate(shown), candidates))
        return rho if rho > 0.05 else 0.0

    def free(self, y: Array) -> tuple[int, float, float, Array]:
        errors = [float(((y - q @ (q.T @ y)) ** 2).sum()) for q in self.free_q]
        i = int(np.argmin(errors))
        cut, q = int(self.cuts[i]), self.free_q[i]
        return cut, float(self.u[cut - 1] + self.u[cut]) / 2, errors[i], q @ (q.T @ y)

    def joined(self, y: Array) -> tuple[int, float, float, Array]:
        """The best kink, at a point or between two where the free lines meet there (Hudson)."""
        best: tuple[float, float, Array] | None = None
        for knot, q in zip(self.knots, self.joined_q, strict=True):
            fitted = q @ (q.T @ y)
            error = float(((y - fitted) ** 2).sum())
            if best is None or error < best[0]:
                best = (error, float(knot), fitted)
        for cut, q in zip(self.cuts, self.free_q, strict=True):
            fitted = q @ (q.T @ y)
            error = float(((y - fitted) ** 2).sum())
            if error >= best[0]:
                continue
            (a0, a1), (b0, b1) = _lines(self.u, fitted, cut)
            meet = (a0 - b0) / (b1 - a1) if a1 != b1 else math.nan
            if self.u[cut - 1] <= meet <= self.u[cut]:
                best = (error, float(meet), fitted)
        index = int(np.searchsorted(self.u, best[1], side="left"))
        return index, best[1], best[0], best[2]

    def slopes(self, y: Array, index: int, joined: bool, at: float) -> tuple[float, float]:
        if joined:
            design = np.stack([np.ones_like(self.u), self.u, np.maximum(self.u - at, 0)], 1)
            _, a, d = np.linalg.lstsq(design, y, rcond=None)[0]
            return float(a), float(a + d)
        (_, a), (_, b) = _lines(self.u, self.free_q_fit(y, index), index)
        return float(a), float(b)

    def jump(self, y: Array, index: int, at: float) -> float:
        (a0, a1), (b0, b1) = _lines(self.u, self.free_q_fit(y, index), index)
        return float(b0 + b1 * at - a0 - a1 * at)

    def free_q_fit(self, y: Array, index: int) -> Array:
        q = self.free_q[index - self.smallest]
        return q @ (q.T @ y)


def _best(series_: Array, energies: Array, bases: list[Array]) -> list[tuple[Array, Array]]:
    return [(one, bases[i]) for one, i in zip(series_, energies.argmax(0), strict=True)]


def _blockwise(u: Array, cut: int) -> Array:
    after = (np.arange(len(u)) >= cut).astype(float)
    return np.linalg.qr(np.stack([1 - after, (1 - after) * u, after, after * u], 1))[0]


def _lines(u: Array, fitted: Array, cut: int) -> tuple[tuple[float, float], tuple[float, float]]:
    """Intercept and slope of each of two straight pieces of `fitted`."""
    out = []
    for part in (slice(0, cut), slice(cut, len(u))):
        slope = (fitted[part][-1] - fitted[part][0]) / (u[part][-1] - u[part][0])
        out.append((fitted[part][0] - slope * u[part][0], slope))
    return out[0], out[1]


def _to_x(x: Array, u: Any) -> Any:
    return x.mean() + np.asarray(u) * np.ptp(x)
