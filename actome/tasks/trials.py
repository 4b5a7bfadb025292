"""Several seeds, and what may be said from them: paired bootstrap, permutation nulls, and data held out.

Every reproduction runs through `over_seeds`; a difference between two arms is told with `paired`, an association or a
score with the distribution that chance gives it (`null`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


def over_seeds(trial: Callable[[int], dict[str, float]], seed: int, count: int) -> dict[str, list[float]]:
    """The figures of `count` independent trials, each of a seed derived from one.

    Args:
        trial: from a seed to figures by name; the same names each time.
        seed: of the whole; the trials' seeds are drawn from it, so that those of seed 0 and seed 1 share none.
        count: how many trials.

    >>> over_seeds(lambda seed: {"positive": float(seed > 0)}, seed=3, count=3)
    {'positive': [1.0, 1.0, 1.0]}
    """
    if count < 1:
        raise ValueError(f"count={count}; at least one trial is needed")
    figures: dict[str, list[float]] = {}
    for one in trial_seeds(seed, count):
        got = trial(one)
        if figures and set(got) != set(figures):
            raise ValueError(f"trials gave different figures: {sorted(set(got) ^ set(figures))}")
        for name, value in got.items():
            figures.setdefault(name, []).append(value)
    return figures


def trial_seeds(seed: int, count: int) -> list[int]:
    """Seeds of independent trials; the first of `count` are the same whatever `count` is.

    >>> trial_seeds(0, 3)[:2] == trial_seeds(0, 2), set(trial_seeds(0, 3)) & set(trial_seeds(1, 3))
    (True, set())
    """
    return [int(one.generate_state(1)[0]) for one in np.random.SeedSequence(seed).spawn(count)]


@dataclass(frozen=True)
class Paired:
    """The mean of paired differences with its bootstrap interval.

    Attributes:
        mean: of the differences.
        low, high: the interval.
        wins: share of pairs with a positive difference; a tie counts as half.
    """

    mean: float
    low: float
    high: float
    wins: float


def paired(
    a: Sequence[float], b: Sequence[float], *, level: float = 0.95, resamples: int = 4000, seed: int = 0
) -> Paired:
    """How much larger `a` is than `b`, pair by pair, with a percentile bootstrap over the pairs.

    With three seeds an interval is little more than the range; it is given all the same.

    Args:
        a, b: one figure a pair, in the same order.
        level: of the interval.

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13.

    >>> paired([1.0, 2.0, 3.0], [0.0, 1.0, 2.0])
    Paired(mean=1.0, low=1.0, high=1.0, wins=1.0)
    """
    difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    if difference.ndim != 1 or not difference.size:
        raise ValueError("paired() takes two sequences of the same length, at least one pair")
    mean, low, high = interval(difference, seed, level=level, resamples=resamples)
    wins = float(np.mean(difference > 0) + 0.5 * np.mean(difference == 0))
    return Paired(mean, low, high, wins)


def interval(
    values: Any, seed: int = 0, weights: Any = None, *, level: float = 0.95, resamples: int = 1000
) -> tuple[float, float, float]:
    """Mean with its percentile bootstrap over rows, as (mean, low, high); NaN without rows.

    Args:
        values: one a row.
        weights: of the rows, such as numbers of tokens: the figure is then a sum over a sum.

    >>> interval([1.0, 1.0]), interval([3.0, 3.0], weights=[3, 3])
    ((1.0, 1.0, 1.0), (1.0, 1.0, 1.0))
    """
    rows = np.asarray(values, dtype=np.float64)
    if not len(rows):
        return (float("nan"),) * 3
    drawn = np.random.default_rng(seed).integers(0, len(rows), (resamples, len(rows)))
    if weights is None:
        mean, means = rows.mean(), rows[drawn].mean(1)
    else:
        heavy = np.asarray(weights, dtype=np.float64)
        mean, means = rows.sum() / heavy.sum(), rows[drawn].sum(1) / heavy[drawn].sum(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(mean), float(low), float(high)


@dataclass(frozen=True)
class Null:
    """A figure beside what chance gives.

    Attributes:
        value: the figure.
        null: of the permutations, (permutations).
        p: share of permutations with at least this figure, the figure itself counted, so never 0.
        z: distance from the null's mean in its standard deviations.
    """

    value: float
    null: np.ndarray
    p: float
    z: float


def null(
    statistic: Callable[[Tensor, Tensor], float], x: Tensor, y: Tensor, *, permutations: int = 200, seed: int = 0
) -> Null:
    """A statistic of pairs against its values when the pairing is broken by permuting `y`; large is extreme.

    Source: Phipson and Smyth 2010, Permutation P-values Should Never Be Zero (the p-value counts the observed figure).

    >>> x = torch.arange(20.0)
    >>> null(lambda a, b: float((a * b).mean()), x, x, permutations=99).p
    0.01
    """
    if len(x) != len(y):
        raise ValueError(f"{len(x)} and {len(y)} rows cannot be paired")
    generator = torch.Generator().manual_seed(seed)
    value = float(statistic(x, y))
    values = np.array(
        [float(statistic(x, y[torch.randperm(len(y), generator=generator)])) for _ in range(permutations)]
    )
    spread = values.std()
    return Null(
        value,
        values,
        float((1 + (values >= value).sum()) / (1 + permutations)),
        float((value - values.mean()) / spread) if spread > 0 else float("nan"),
    )


def split(count: int, shares: Sequence[float], seed: int = 0) -> list[Tensor]:
    """Random parts that do not overlap, such as for fitting, choosing and testing: indices of each.

    >>> [len(part) for part in split(10, [0.6, 0.2, 0.2])]
    [6, 2, 2]
    """
    if not shares or min(shares) < 0 or sum(shares) > 1 + 1e-9:
        raise ValueError(f"shares {list(shares)} are not parts of a whole")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    ends = [round(count * sum(shares[: i + 1])) for i in range(len(shares))]
    return [order[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]


def spearman(a: Any, b: Any) -> float:
    """Rank correlation; NaN when one of the two is constant.

    >>> spearman([1, 2, 3], [10, 20, 40])
    1.0
    """
    from scipy.stats import spearmanr

    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.size < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(spearmanr(a, b).statistic)


def auroc(scores: Any, positive: Any) -> float:
    """Chance that a positive scores above a negative, ties half; NaN when one of the two is missing.

    >>> auroc([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1])
    0.75
    """
    from scipy.stats import rankdata

    scores, positive = np.asarray(scores, dtype=np.float64), np.asarray(positive, dtype=bool)
    n, m = int(positive.sum()), int((~positive).sum())
    if not n or not m:
        return float("nan")
    return float((rankdata(scores)[positive].sum() - n * (n + 1) / 2) / (n * m))
