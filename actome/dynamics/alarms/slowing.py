"""Critical slowing down of the loss: it forgets its own noise ever more slowly, as before a tipping point."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from actome.core.errors import MeasureError
from actome.dynamics.early_warning import EarlyWarning
from actome.dynamics.series import lag1

from .base import Alarm, Detector, Reading
from .spikes import total

_SLOW = 1.1  # the share of alpha that look k may spend falls as k^-1.1
_JUMP = 10.0  # standard deviations by which the mean of a block may move before it counts as a jump


class CriticalSlowing(Detector):
    """Variance and lag-1 autocorrelation of the loss rise together, block after block.

    The losses of each step are cut into blocks, one after the other and without overlap; a parabola is taken off each.
    Of the last `count` blocks the ranks of variance and autocorrelation are added, and Kendall's tau of the sum with
    time is tested one-sided. Under any stationary noise whose memory is short next to a block, blocks are exchangeable,
    and the null distribution of tau is exact, whatever the shape and autocorrelation of the noise. There is one look
    a block, and look k may spend alpha / (zeta(1.1) k^1.1): the shares of all looks add up to alpha, so that a run of
    any length raises a false alarm with probability alpha at most. What passes is tested once more, with the overlapping
    windows of `EarlyWarning` against AR(1) surrogates at the 10 % level, which also covers noise with a long memory.

    A jump (a mean that moves by 10 standard deviations from one block to the next, a loss that is not finite, a change
    of cadence) begins a new stretch: a window that reaches over a jump finds what it looks for.

    An alarm says that the loss reacts to its own noise like a system near a tipping point. Jumps without slowing down,
    from a bad batch say, are not announced, and slowing down may come to nothing.

    Args:
        block: losses in a block.
        count: blocks in a look.
        alpha: chance that a run without slowing down ever raises it.
        surrogates: of the second test.
        seed: of the surrogates.

    Delay: at least `block` times `count` steps of history.

    Source: Early warning signals: The charted and uncharted territories; Dakos et al. 2012 (indicators); Kendall 1938
    (exact null).
    """

    name: ClassVar[str] = "critical_slowing"
    needs: ClassVar[tuple[str, ...]] = ("loss",)

    def __init__(
        self, block: int = 24, count: int = 16, alpha: float = 0.01, surrogates: int = 199, seed: int = 0
    ):
        if block < 12 or count < 8 or not 0 < alpha < 1 or surrogates < 19:
            raise MeasureError(
                f"block={block}, count={count}, alpha={alpha}, surrogates={surrogates}: want 12, 8 and 19 or more, and "
                "alpha between 0 and 1"
            )
        self.block, self.count, self.alpha, self.surrogates, self.seed = block, count, alpha, surrogates, seed
        self.looks: list[int] = []  # the steps at which the last looks were taken
        self.looks_before = 0
        self._steps: list[int] = []
        self._values: list[float] = []

    def update(self, step: int, readings: Sequence[Reading]) -> list[Alarm] | None:
        value = total(readings, "loss")
        if value is None:
            if any(one.measure == "loss" and one.site is None for one in readings):
                self._restart()
            return None
        steps = self._steps
        if steps and step == steps[-1]:
            self._values[-1] = value
            return None
        if len(steps) > 1 and step - steps[-1] != steps[-1] - steps[-2]:
            self._restart()
        steps.append(step)
        self._values.append(value)
        if len(steps) % self.block:
            return None
        if len(steps) >= 2 * self.block and self._jumped():
            del steps[: -self.block], self._values[: -self.block]
            return None
        if len(steps) < self.block * self.count:
            return None
        found = self._look(step)
        del steps[: self.block], self._values[: self.block]
        return found

    def rewind(self, step: int) -> None:
        keep = sum(one < step for one in self._steps)
        del self._steps[keep:], self._values[keep:]
        self.looks = [one for one in self.looks if one < step]

    def _restart(self) -> None:
        self._steps.clear()
        self._values.clear()

    def _jumped(self) -> bool:
        before, last = np.array(self._values[-2 * self.block :]).reshape(2, -1)
        return abs(last.mean() - before.mean()) > _JUMP * max(_rest(before).std(), _rest(last).std())

    def _look(self, step: int) -> list[Alarm]:
        self.looks = [*self.looks, step]
        if len(self.looks) > 1000:
            self.looks_before += 1
            del self.looks[0]
        look = self.looks_before + len(self.looks)
        rest = np.array([_rest(one) for one in np.array(self._values).reshape(self.count, self.block)])
        variance, ar1 = rest.var(1), np.array([lag1(one) for one in rest])
        if not (variance > 0).all():
            return []
        p, taus = joint_trend(variance, ar1)
        spent = share_of_look(self.alpha, look)
        if p > spent or min(taus) <= 0:
            return []
        again = EarlyWarning(surrogates=self.surrogates, seed=self.seed, alpha=0.1).fit(self._values)
        if not again.alarm:
            return []
        evidence: dict[str, Any] = {
            "p": p, "allowed": spent, "looks": look, "tau_variance": taus[0], "tau_ar1": taus[1],
            "variance_times": float(np.median(variance[-3:]) / np.median(variance[:3])),
            "ar1_first": float(np.median(ar1[:3])), "ar1_last": float(np.median(ar1[-3:])),
            "surrogate_p": {name: again.p[name] for name in ("variance", "ar1")},
        }  # fmt: skip
        return [
            Alarm(
                self._steps[0], self.name,
                f"the loss forgets its noise ever more slowly since step {self._steps[0]}: autocorrelation from "
                f"{evidence['ar1_first']:.2f} to {evidence['ar1_last']:.2f}, variance {evidence['variance_times']:.2g} "
                f"times (p = {p:.1g}, {spent:.1g} allowed at look {look})",
                level="warning",
                advice="a jump may be ahead, for better or worse: save a checkpoint and sample more often; if the "
                "gradient grows as well, lower the learning rate",
                evidence=evidence, source="Early warning signals: The charted and uncharted territories",
            )
        ]  # fmt: skip


def joint_trend(variance: np.ndarray, ar1: np.ndarray) -> tuple[float, tuple[float, float]]:
    """One-sided exact p that the added ranks of two indicators rise, and the tau of each.

    Ties of the sum are broken by the rank of the variance, which keeps the blocks exchangeable and the null exact.

    >>> p, taus = joint_trend(np.arange(8.0), np.arange(8.0))
    >>> round(p * math.factorial(8)), [round(tau, 6) for tau in taus]     # the one order of all that rises throughout
    (1, [1.0, 1.0])
    """
    from scipy.stats import kendalltau, rankdata

    n = len(variance)
    first, second = rankdata(variance), rankdata(ar1)
    score = first + second + first / (n + 1) / 2
    time = np.arange(n)
    p = float(kendalltau(time, score, method="exact", alternative="greater").pvalue)
    return p, (float(kendalltau(time, first).statistic), float(kendalltau(time, second).statistic))


def share_of_look(alpha: float, look: int) -> float:
    """What look k = 1, 2, ... may spend of alpha; all of them together spend alpha.

    >>> sum(share_of_look(1.0, k) for k in range(1, 10**4)) < 1
    True
    """
    from scipy.special import zeta

    return alpha / (float(zeta(_SLOW)) * look**_SLOW)


def _rest(block: np.ndarray) -> np.ndarray:
    """A block without its parabola."""
    u = np.linspace(-1, 1, len(block))
    return block - np.polynomial.polynomial.polyval(u, np.polynomial.polynomial.polyfit(u, block, 2))
