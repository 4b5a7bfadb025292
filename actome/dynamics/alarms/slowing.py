"""Critical slowing down of the loss: it forgets its own noise ever more slowly, as before a tipping point."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from actome.core.errors import MeasureError
from actome.dynamics.early_warning import EarlyWarning

from .base import Alarm, Detector, Reading
from .spikes import total

_SLOW = 1.1  # the share of alpha that look k may spend falls as k^-1.1
_BANDWIDTH = 0.1  # of a window: the Gaussian kernel that the trend is taken off with
_LEVEL = 0.05  # of the test of the variance
_JUMP = 10.0  # robust standard deviations of its steps by which a loss may move before it counts as a jump


class CriticalSlowing(Detector):
    """Autocorrelation and variance of the loss rise within a window, against AR(1) noise, at any of several windows.

    At each look the trend is taken off the last W losses (Gaussian kernel, bandwidth W / 10), and what is left is
    fitted by x_t = (a + b u_t) x_{t-1} + e_t with u from -1 to 1 over the window. Without slowing down b / (its error)
    is about standard normal. Where it stands out, the same is computed for AR(1) surrogates of the same
    autocorrelation, detrended alike, and p is that of the distance from their mean in their standard deviations. The
    variance has to rise as well: `EarlyWarning`, with its overlapping windows, against surrogates at the 5 % level.

    Repeated looks are paid for: there is a look at a window each W / 4 steps, and look k at one of m windows may spend
    alpha / (m zeta(1.1) k^1.1). All shares together add up to alpha, so that by Boole's inequality a run of any length
    raises a false alarm with probability alpha at most, however much its windows overlap, as far as its noise is
    AR(1).

    A jump of the loss, a loss that is not finite or a change of cadence begins a new stretch: a window that reaches
    over a jump finds what it looks for. An alarm says that the loss reacts to its own noise like a system near a
    tipping point. Jumps without slowing down, from a bad batch say, are not announced, and slowing down may come to
    nothing.

    Args:
        windows: losses in a window, each a multiple of 4.
        alpha: chance that a run of stationary noise ever raises it.
        surrogates: of the second test.
        seed: of the surrogates.

    Delay: it takes a window of history, and comes at the next look once the autocorrelation has risen enough.

    Source: Early warning signals: The charted and uncharted territories; Dakos et al. 2012 (indicators, surrogates).
    """

    name: ClassVar[str] = "critical_slowing"
    needs: ClassVar[tuple[str, ...]] = ("loss",)

    def __init__(
        self, windows: Sequence[int] = (256, 512, 1024), alpha: float = 0.01, surrogates: int = 199, seed: int = 0
    ):
        if not windows or min(windows) < 64 or any(one % 4 for one in windows):
            raise MeasureError(f"windows={tuple(windows)}: want multiples of 4, 64 or more")
        if not 0 < alpha < 1 or surrogates < 19:
            raise MeasureError(f"alpha={alpha}, surrogates={surrogates}: want alpha between 0 and 1, and 19 or more")
        # The shortest first: what it shows it shows soonest.
        self.windows, self.alpha, self.surrogates, self.seed = tuple(sorted(windows)), alpha, surrogates, seed
        self._looks = dict.fromkeys(windows, 0)
        self._steps: list[int] = []
        self._values: list[float] = []
        self._seen = 0  # losses of this stretch
        self._told: Alarm | None = None

    def update(self, step: int, readings: Sequence[Reading]) -> list[Alarm] | None:
        value = total(readings, "loss")
        if value is None:
            if any(one.measure == "loss" and one.site is None for one in readings):
                self._restart()
            return None
        steps, values = self._steps, self._values
        if steps and step == steps[-1]:
            return None
        if len(steps) > 1 and step - steps[-1] != steps[-1] - steps[-2]:
            self._restart()
        steps.append(step)
        values.append(value)
        self._seen += 1
        longest = self.windows[-1]
        if len(steps) >= 2 * longest:
            del steps[:-longest], values[:-longest]
        due = [one for one in self.windows if len(steps) >= one and not self._seen % (one // 4)]
        if not due:
            return None
        # The first that holds; a list, so that every look is taken and paid for.
        self._told = next((one for one in [self._look(window) for window in due] if one is not None), None)
        return [] if self._told is None else [self._told]

    def rewind(self, step: int) -> None:
        # Looks that were taken stay paid for.
        keep = sum(one < step for one in self._steps)
        self._seen -= len(self._steps) - keep
        del self._steps[keep:], self._values[keep:]
        self._told = None

    def _restart(self) -> None:
        self._steps.clear()
        self._values.clear()
        self._seen, self._told = 0, None

    def _look(self, window: int) -> Alarm | None:
        self._looks[window] += 1
        values = np.array(self._values[-window:])
        if _jumped(values):
            return None
        rest = _detrended(values[None])
        score = float(slowing(rest)[0])
        look = self._looks[window]
        allowed = share_of_look(self.alpha / len(self.windows), look)
        if _upper_tail(score) > allowed:
            return None
        if self._told is not None and self._told.evidence["window"] == window:
            return self._told  # what has been established costs no more surrogates while it stands
        tool = EarlyWarning(bandwidth=_BANDWIDTH, surrogates=self.surrogates, seed=self.seed)
        drawn = tool.null_traces(rest[0], _autocorrelation(rest[0]), np.random.default_rng(self.seed))
        null = slowing(_detrended(drawn))
        p = _upper_tail((score - float(null.mean())) / float(null.std(ddof=1)))
        if p > allowed:
            return None
        again = tool.fit(values)
        if again.p["variance"] > _LEVEL:
            return None
        quarter = window // 4
        first, last = rest[0, :quarter], rest[0, -quarter:]
        since = self._steps[-window]
        evidence: dict[str, Any] = {
            "p": p, "allowed": allowed, "look": look, "window": window, "score": score,
            "ar1_first": _autocorrelation(first), "ar1_last": _autocorrelation(last),
            "variance_times": float(last.var() / max(first.var(), 1e-300)),
            "variance_tau": again.tau["variance"], "variance_p": again.p["variance"], "ar1_p": again.p["ar1"],
        }  # fmt: skip
        return Alarm(
            since, self.name,
            f"the loss forgets its noise ever more slowly since step {since}: autocorrelation from "
            f"{evidence['ar1_first']:.2f} to {evidence['ar1_last']:.2f}, variance {evidence['variance_times']:.2g} "
            f"times (p = {p:.1g}; {allowed:.1g} allowed at look {look})",
            level="warning",
            advice="a jump may be ahead, for better or worse: save a checkpoint and sample more often; if the gradient "
            "grows as well, lower the learning rate",
            evidence=evidence, source="Early warning signals: The charted and uncharted territories",
        )  # fmt: skip


def slowing(rest: np.ndarray) -> np.ndarray:
    """How surely autocorrelation rises along detrended traces: b over its error, (traces, points) -> (traces).

    Least squares of x_t = (a + b u_t) x_{t-1} + e_t, u from -1 to 1, with errors that allow for a variance that changes
    (White 1980).

    >>> rho = np.linspace(0.0, 0.9, 400)
    >>> drive, x = np.random.default_rng(0).standard_normal(400), np.zeros(400)
    >>> for t in range(1, 400):
    ...     x[t] = rho[t] * x[t - 1] + drive[t]
    >>> bool(slowing(x[None])[0] > 4)
    True
    """
    before, now = rest[:, :-1], rest[:, 1:]
    u = np.linspace(-1, 1, before.shape[1])
    design = np.stack([before, u * before], 2)
    gram = np.einsum("bnk,bnl->bkl", design, design)
    gram = gram + 1e-12 * np.trace(gram, axis1=1, axis2=2)[:, None, None] * np.eye(2) + 1e-300 * np.eye(2)
    inverse = np.linalg.inv(gram)
    theta = np.einsum("bkl,bnl,bn->bk", inverse, design, now)
    error = now - np.einsum("bnk,bk->bn", design, theta)
    middle = np.einsum("bnk,bn,bnl->bkl", design, error**2, design)
    cov = inverse @ middle @ inverse
    return theta[:, 1] / np.sqrt(np.maximum(cov[:, 1, 1], 1e-300))


def share_of_look(alpha: float, look: int) -> float:
    """What look k = 1, 2, ... may spend of alpha; all of them together spend alpha.

    >>> sum(share_of_look(1.0, k) for k in range(1, 10**4)) < 1
    True
    """
    from scipy.special import zeta

    return alpha / (float(zeta(_SLOW)) * look**_SLOW)


def _detrended(traces: np.ndarray) -> np.ndarray:
    from scipy.ndimage import gaussian_filter1d

    width = _BANDWIDTH * traces.shape[1]
    weight = gaussian_filter1d(np.ones(traces.shape[1]), width, mode="constant")  # less at the ends
    return traces - gaussian_filter1d(traces, width, axis=1, mode="constant") / weight


def _autocorrelation(rest: np.ndarray) -> float:
    centred = rest - rest.mean()
    return float(centred[1:] @ centred[:-1] / max(float(centred @ centred), 1e-300))


def _jumped(values: np.ndarray) -> bool:
    moves = np.abs(np.diff(values))
    return bool(moves.max() > _JUMP * max(float(np.median(moves)), 1e-12 * float(np.abs(values).max())) / 0.6745)


def _upper_tail(z: float) -> float:
    return 0.5 * math.erfc(z / math.sqrt(2)) if math.isfinite(z) else 1.0
