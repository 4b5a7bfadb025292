"""What a curve says of a trend, of a jump, and of how many items it takes to see one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from actome.core.errors import MeasureError
from actome.dynamics.series import series

Array = np.ndarray


def emergence_score(y: Any, resolution: float = 0.0) -> float:
    """How sudden a curve over scales is.

    sign(argmax y - argmin y) (max y - min y) / sqrt(median_i (y_i - y_(i-1))^2). A straight line over n scales scores
    n - 1.

    Args:
        y: (scales), in order of scale.
        resolution: differences smaller than this count as this large. With the paper's 0, a curve that lies still for
            more than half of its steps has an infinite score, and be it for want of items; 1 / items says that less
            than one item is not seen.

    Returns:
        Negative for a curve that falls, 0 for a constant one, infinite when more than half of the steps change nothing.

    Raises:
        MeasureError: for fewer than three scales, or values that are not finite.

    Source: Are Emergent Abilities of Large Language Models a Mirage?, appendix (Emergence Score), at resolution 0.

    >>> emergence_score([0.0, 1.0, 2.0, 3.0]), emergence_score([0.0, 0.0, 0.0, 1.0]), emergence_score([3.0, 2.0, 0.0])
    (3.0, inf, -1.8973665961010275)
    """
    values = series(np.arange(np.size(y)), y, minimum=3, what="an emergence score").y
    reach = float(values.max() - values.min())
    if reach == 0:
        return 0.0
    steps = np.maximum(np.abs(np.diff(values)), resolution)
    middle = math.sqrt(float(np.median(steps**2)))
    sign = 1.0 if values.argmax() > values.argmin() else -1.0
    return sign * reach / middle if middle > 0 else sign * math.inf


def required_items(p: float, n: int, confidence: float = 0.95) -> int:
    """How many items a test of answers of `n` tokens takes before one of them is expected to come out right.

    ln(1 - confidence) / ln(1 - p^n), rounded up: about 3 / p^n at 95 %. With fewer, an accuracy of 0 says nothing.

    Args:
        p: chance that one token is right; tokens are taken as independent.
        n: tokens in an answer.
        confidence: of seeing one right answer or more.

    >>> required_items(0.5, 5), required_items(0.1, 5)
    (95, 299572)
    """
    if not 0 < p <= 1 or n < 1 or not 0 < confidence < 1:
        raise MeasureError(
            f"p={p}, n={n}, confidence={confidence}: want p in (0, 1], n of 1 or more, confidence in (0, 1)"
        )
    right = p**n
    if right >= 1:
        return 1
    needed = math.log1p(-confidence) / math.log1p(-right)
    return math.ceil(needed) if math.isfinite(needed) else 2**63 - 1


@dataclass(frozen=True)
class Trend:
    """Whether a curve goes one way.

    Attributes:
        kendall: tau-b of x and y; 1 for a curve that never falls.
        spearman: rank correlation.
        p: of tau, two-sided, of independent values. Neighbours on a smooth curve are not: see `EarlyWarning` for a null
            that allows for it.
        slope: Theil-Sen, the median of the slopes of all pairs.
        low, high: its interval.
    """

    kendall: float
    spearman: float
    p: float
    slope: float
    low: float
    high: float


def trend(x: Any, y: Any = None, level: float = 0.95) -> Trend:
    """Kendall's and Spearman's correlation of a curve with its x, and the Theil-Sen slope.

    Raises:
        MeasureError: for fewer than four points, or a constant curve.

    Source: Kendall 1938; Sen 1968.

    >>> found = trend(range(6), [0, 1, 2, 4, 3, 6])
    >>> round(found.kendall, 3), found.slope
    (0.867, 1.0)
    """
    from scipy.stats import kendalltau, spearmanr, theilslopes

    curve = series(x, y, minimum=4, what="a trend", allow_constant=False)
    tau, line = kendalltau(curve.x, curve.y), theilslopes(curve.y, curve.x, level)
    rank = float(spearmanr(curve.x, curve.y).statistic)
    return Trend(
        float(tau.statistic), rank, float(tau.pvalue), float(line.slope), float(line.low_slope), float(line.high_slope)
    )


def wilson(right: int, items: int, level: float = 0.95) -> tuple[float, float]:
    """Interval of a share, which holds near 0 and 1 where +-1.96 sqrt(s (1 - s) / n) does not.

    Source: Wilson 1927.

    >>> [round(end, 4) for end in wilson(0, 10)], [round(end, 4) for end in wilson(5, 10)]
    ([0.0, 0.2775], [0.2366, 0.7634])
    """
    from scipy.stats import norm

    if not 0 <= right <= items or items < 1 or not 0 < level < 1:
        raise MeasureError(f"{right} of {items} at level {level} is no share")
    z = float(norm.ppf(0.5 + level / 2))
    share, middle = right / items, 1 + z**2 / items
    centre = (share + z**2 / (2 * items)) / middle
    half = z / middle * math.sqrt(share * (1 - share) / items + z**2 / (4 * items**2))
    return (0.0 if right == 0 else max(0.0, centre - half)), (1.0 if right == items else min(1.0, centre + half))
