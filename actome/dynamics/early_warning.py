"""Whether a jump was announced: critical slowing down, against surrogates, with its rate of false alarms measured.

A system near a fold recovers ever more slowly from what disturbs it, so its variance and its autocorrelation rise
before it goes over. Jumps that noise or an outside force makes are not announced, and a system may slow down without a
jump.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from actome.core.errors import MeasureError
from actome.dynamics.series import series

Array = np.ndarray
Surrogate = Literal["ar1", "phase"]
INDICATORS = ("variance", "ar1", "skewness", "return_rate", "low_frequency")


@dataclass(frozen=True)
class Warnings:
    """The indicators of one trace.

    Attributes:
        x: of each window's last point, (windows).
        indicators: by name, (windows) each.
        tau: Kendall's tau of each indicator with time.
        p: share of surrogates with at least as high a tau (as low a one for the return rate), the trace itself counted.
        alarm: whether variance and autocorrelation both have a p of at most `alpha`.
        ar1: autocorrelation of the detrended trace that the surrogates have.
    """

    x: Array = field(repr=False)
    indicators: dict[str, Array] = field(repr=False)
    tau: dict[str, float]
    p: dict[str, float]
    alarm: bool
    ar1: float


@dataclass(frozen=True)
class EarlyWarning:
    """Indicators of critical slowing down in a moving window, and their trend against surrogates.

    The trace has to end before the jump: a window that reaches past it finds what it looks for. Choosing traces because
    they jumped raises false alarms as well; choose window and bandwidth once for all traces.

    Args:
        window: length of the moving window, as a share of the trace.
        bandwidth: standard deviation of the Gaussian kernel that the trend is taken off with, as a share of the trace.
        surrogates: how many.
        kind: ``"ar1"``, stationary noise with the autocorrelation of the detrended trace, or ``"phase"``, its own
            spectrum with random phases. Either is detrended again, as the trace was.
        alpha: level of the alarm.
        seed: of the surrogates.

    Source: Dakos et al. 2012, Methods for Detecting Early Warnings of Critical Transitions (indicators, surrogates);
    Boettiger et al. 2013, Early warning signals: the charted and uncharted territories (their limits).

    >>> rng, state, trace = np.random.default_rng(0), 0.0, []
    >>> for step in range(300):                                    # forgets ever more slowly
    ...     state = state * (0.2 + 0.75 * step / 300) + rng.standard_normal()
    ...     trace.append(state)
    >>> found = EarlyWarning(surrogates=99).fit(trace)
    >>> found.tau["variance"] > 0.5, found.p["variance"] <= 0.05
    (True, True)
    """

    window: float = 0.5
    bandwidth: float = 0.1
    surrogates: int = 199
    kind: Surrogate = "ar1"
    alpha: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.window < 1 or not 0 < self.bandwidth <= 1 or self.surrogates < 0:
            raise MeasureError(
                f"window={self.window} and bandwidth={self.bandwidth} are shares; surrogates={self.surrogates}"
            )
        if self.kind not in ("ar1", "phase"):
            raise MeasureError(f"kind={self.kind!r} does not exist; choose 'ar1' or 'phase'")

    def fit(self, x: Any, y: Any = None) -> Warnings:
        """Indicators of an evenly spaced trace.

        Args:
            x: the trace itself, (points); or its times, with `y` the trace; or a frame with columns `step` and `value`.

        Raises:
            MeasureError: for fewer than 40 points, a constant trace, or times that are not evenly spaced.
        """
        if y is None and not hasattr(x, "columns"):
            x, y = np.arange(np.size(x)), x
        curve = series(x, y, minimum=40, what="an early warning", allow_constant=False)
        gaps = np.diff(curve.x)
        if gaps.max() > 1.01 * gaps.min():
            raise MeasureError("times are not evenly spaced; interpolate first, or use the steps that are")
        rest = self.detrended(curve.y[None])
        rho = float(_lag1(rest)[0])
        found = self._indicators(rest)
        taus = {name: float(_kendall(values)[0]) for name, values in found.items()}
        p = dict.fromkeys(taus, float("nan"))
        if self.surrogates:
            drawn = self.detrended(self.null_traces(rest[0], rho, np.random.default_rng(self.seed)))
            for name, values in self._indicators(drawn).items():
                null, own = _kendall(values), taus[name]
                more = (null <= own) if name == "return_rate" else (null >= own)
                p[name] = (1 + int(more.sum())) / (1 + self.surrogates)
        alarm = bool(max(p["variance"], p["ar1"]) <= self.alpha)
        last = curve.x[len(curve) - len(found["variance"][0]) :]
        return Warnings(last, {name: values[0] for name, values in found.items()}, taus, p, alarm, rho)

    def taus(self, traces: Any) -> dict[str, Array]:
        """Kendall's tau of each indicator for many traces of one length at once, (traces, points) -> (traces) each."""
        found = self._indicators(self.detrended(np.atleast_2d(np.asarray(traces, dtype=np.float64))))
        return {name: _kendall(values) for name, values in found.items()}

    def false_alarms(self, points: int, ar1: float = 0.5, *, traces: int = 200, seed: int = 1) -> dict[str, float]:
        """How often a stationary trace raises an alarm here: the rate of p <= alpha by indicator, and of `alarm`.

        Args:
            points, ar1: length and autocorrelation of the stationary traces.
            traces: how many; the rate has a standard error of sqrt(rate (1 - rate) / traces).
            seed: of the traces.
        """
        rng = np.random.default_rng(seed)
        found = [self.fit(one) for one in ar1_noise(traces, points, ar1, rng)]
        rates = {name: float(np.mean([one.p[name] <= self.alpha for one in found])) for name in INDICATORS}
        return {**rates, "alarm": float(np.mean([one.alarm for one in found]))}

    def threshold(
        self, points: int, ar1: float = 0.5, *, rate: float = 0.05, traces: int = 1000, seed: int = 1
    ) -> dict[str, float]:
        """The tau above which (below, for the return rate) a share `rate` of stationary traces of this length lie."""
        found = self.taus(ar1_noise(traces, points, ar1, np.random.default_rng(seed)))
        return {
            name: float(np.quantile(values, rate if name == "return_rate" else 1 - rate))
            for name, values in found.items()
        }

    def detrended(self, traces: Array) -> Array:
        """Traces without their slow part, (traces, points)."""
        n = traces.shape[1]
        offset = (np.arange(n)[None] - np.arange(n)[:, None]) / (self.bandwidth * n)
        kernel = np.exp(-0.5 * offset**2)
        return traces - traces @ (kernel / kernel.sum(1, keepdims=True)).T

    def null_traces(self, rest: Array, rho: float, rng: np.random.Generator) -> Array:
        """Surrogates of a detrended trace of this autocorrelation, before they are detrended: (surrogates, points)."""
        n = len(rest)
        if self.kind == "ar1":
            # Detrending draws the autocorrelation down; surrogates get what they need to show the same after it.
            candidates = np.linspace(0, 0.98, 15)
            shown = [
                _lag1(self.detrended(ar1_noise(40, n, one, np.random.default_rng(self.seed)))).mean()
                for one in candidates
            ]
            return ar1_noise(self.surrogates, n, float(np.interp(rho, np.maximum.accumulate(shown), candidates)), rng)
        spectrum = np.fft.rfft(rest)
        phases = rng.uniform(0, 2 * np.pi, (self.surrogates, len(spectrum)))
        phases[:, 0] = 0
        if n % 2 == 0:
            phases[:, -1] = 0
        return np.fft.irfft(np.abs(spectrum) * np.exp(1j * phases), n)

    def _indicators(self, rest: Array) -> dict[str, Array]:
        """(traces, points) -> (traces, windows) each, from running sums."""
        w = max(10, round(self.window * rest.shape[1]))
        # Unit scale, so that running sums of cubes stay exact enough.
        z = rest / np.maximum(rest.std(1, keepdims=True), 1e-300)
        s1, s2, s3 = (_rolling(z**k, w) / w for k in (1, 2, 3))
        variance = np.maximum(s2 - s1**2, 1e-12)
        cross = _rolling(z[:, 1:] * z[:, :-1], w - 1)
        first, second = _rolling(z[:, :-1], w - 1), _rolling(z[:, 1:], w - 1)
        m = w - 1
        top = cross / m - first * second / m**2
        before = np.maximum(_rolling(z[:, :-1] ** 2, m) / m - (first / m) ** 2, 1e-12)
        after = np.maximum(_rolling(z[:, 1:] ** 2, m) / m - (second / m) ** 2, 1e-12)
        ar1 = top / np.sqrt(before * after)
        skewness = (s3 - 3 * s1 * s2 + 2 * s1**3) / variance**1.5
        # Differences hold the fast part of the power: var(dz) / (4 var z) is the mean of sin^2(omega / 2).
        fast = _rolling(np.diff(z, axis=1) ** 2, m) / m / (4 * variance)
        size = rest.std(1, keepdims=True) ** 2
        return {
            "variance": variance * size, "ar1": ar1, "skewness": np.abs(skewness), "return_rate": 1 - ar1,
            "low_frequency": 1 - fast,
        }  # fmt: skip


def ar1_noise(traces: int, points: int, rho: float, rng: np.random.Generator) -> Array:
    """Stationary autoregressive noise, (traces, points)."""
    from scipy.signal import lfilter

    drive = rng.standard_normal((traces, points + 200))
    return lfilter([1.0], [1.0, -rho], drive, axis=1)[:, 200:]


def _rolling(values: Array, width: int) -> Array:
    total = np.cumsum(np.pad(values, ((0, 0), (1, 0))), axis=1)
    return total[:, width:] - total[:, :-width]


def _lag1(traces: Array) -> Array:
    centred = traces - traces.mean(1, keepdims=True)
    return (centred[:, 1:] * centred[:, :-1]).sum(1) / np.maximum((centred**2).sum(1), 1e-300)


def _kendall(values: Array, most: int = 128) -> Array:
    """Kendall's tau with time, (traces, windows) -> (traces), at up to `most` evenly spaced windows.

    Neighbouring windows share all but one point, so that leaving some out loses next to nothing.
    """
    n = values.shape[1]
    chosen = values[:, np.unique(np.linspace(0, n - 1, min(n, most)).astype(int))]
    i, j = np.triu_indices(chosen.shape[1], 1)
    return np.sign(chosen[:, j] - chosen[:, i]).mean(1)
