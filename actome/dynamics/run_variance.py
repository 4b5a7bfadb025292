"""Why two runs of one recipe differ in accuracy: chance on a finite test, or better and worse networks.

Letters: R run, N item, K class.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from actome.core.errors import MeasureError

Array = np.ndarray
FEW = 50  # runs below which the split is not to be relied upon
MOST_DRAWS = 200_000_000  # of all simulations for a p together; beyond it they become fewer, 19 at least


@dataclass(frozen=True)
class RunSplit:
    """The variance of test accuracy over runs, taken apart. All variances are of accuracy as a share.

    Attributes:
        runs, items: R and N.
        mean: accuracy.
        total: V, the variance over runs on this test.
        independent: what of it comes about when, given the recipe, runs get items right independently of one another;
            it falls with 1 / items and says nothing about any run.
        distribution: what is left, scaled to an endless test: how much the runs' true accuracies differ. Without bias,
            so it may be negative; its root `distribution_sd` is cut at 0.
        low, high: bootstrap interval of `distribution` over runs.
        ks, p: largest distance of the distribution of accuracies from that under independence (Poisson-binomial), and
            the share of simulated sets of runs that are as far from theirs. A small p: runs do differ.
        halves: correlation over runs of the accuracies on two halves of the test, the mean over splits; about 0 when
            runs differ by chance alone.
    """

    runs: int
    items: int
    mean: float
    total: float
    independent: float
    distribution: float
    low: float
    high: float
    ks: float
    p: float
    halves: float

    @property
    def total_sd(self) -> float:
        return math.sqrt(self.total)

    @property
    def independent_sd(self) -> float:
        return math.sqrt(self.independent)

    @property
    def distribution_sd(self) -> float:
        return math.sqrt(max(self.distribution, 0.0))


@dataclass(frozen=True)
class Calibrated:
    """The variance that cannot be avoided, from calibration alone.

    Attributes:
        independent: forecast of `RunSplit.independent`, for any number of classes.
        two_class: error / (2 items), which is the same for two classes.
        error: mean error of a run, as the shares say.
        observed_error: of the shares' labels: one less the mean share of the true class.
        gap: expected calibration error of the shares, over 10 bins of all shares; the forecast holds as far as it is
            small.
    """

    independent: float
    two_class: float
    error: float
    observed_error: float
    gap: float

    @property
    def independent_sd(self) -> float:
        return math.sqrt(self.independent)

    @property
    def two_class_sd(self) -> float:
        return math.sqrt(self.two_class)


class RunVariance:
    r"""Takes the variance of test accuracy over runs of one recipe apart.

    With :math:`c_{ri}` whether run r got item i right and :math:`p_i` the share of runs that did,

    .. math:: V = \operatorname{var}_r\Big(\frac1N \sum_i c_{ri}\Big), \qquad
        V_{ind} = \frac{R}{R - 1} \frac{1}{N^2} \sum_i p_i (1 - p_i), \qquad
        V_{dist} = \frac{N}{N - 1} (V - V_{ind})

    :math:`V_{dist}` is an estimate without bias of the variance of the runs' accuracies on an endless test; without
    R / (R - 1) the error of :math:`p_i` itself would pass for a difference between runs. Give 50 runs or more.

    Runs are kept as bits (N / 8 bytes each); `merge` joins what several processes have seen.

    Source: Jordan 2024, On the Variance of Neural Network Training with respect to Test Sets and Distributions (first
    called Calibrated Chaos).

    >>> rng, variance = np.random.default_rng(2), RunVariance()
    >>> hard = rng.random(300)
    >>> for run in range(100):
    ...     _ = variance.update(run, rng.random(300) < hard)
    >>> found = variance.compute(resamples=100)
    >>> found.low < 0 < found.high, found.p > 0.05
    (True, True)
    """

    def __init__(self) -> None:
        self.items = 0
        self._runs: dict[Any, Array] = {}

    def __len__(self) -> int:
        return len(self._runs)

    def __repr__(self) -> str:
        return f"RunVariance({len(self)} runs, {self.items} items)"

    def update(self, run_id: Any, correct: Any) -> RunVariance:
        """Adds a run; gives itself back.

        Args:
            run_id: any name of it, each once.
            correct: (item), whether it was right; bools, or 0 and 1. The same items in the same order for every run.

        Raises:
            MeasureError: another number of items, a run twice, or values that are neither 0 nor 1.
        """
        got = _array(correct)
        if got.ndim != 1 or len(got) < 2 or (self.items and len(got) != self.items):
            wanted = f"({self.items},), the items of the runs before" if self.items else "(items), two or more"
            raise MeasureError(f"run {run_id!r}: right or wrong of shape {got.shape}; want {wanted}")
        if not np.isin(got, (0, 1)).all():
            raise MeasureError(
                f"run {run_id!r}: right or wrong is 0 or 1, and {got[~np.isin(got, (0, 1))][0]} is neither"
            )
        if run_id in self._runs:
            raise MeasureError(f"run {run_id!r} was given before")
        self.items = len(got)
        self._runs[run_id] = np.packbits(got.astype(bool))
        return self

    def merge(self, other: RunVariance) -> RunVariance:
        """Takes in the runs of another; gives itself back.

        Raises:
            MeasureError: a run that both have, or other items.
        """
        for run_id, bits in other._runs.items():
            self.update(run_id, np.unpackbits(bits, count=other.items))
        return self

    def correct(self) -> Array:
        """(run, item) bools, runs in an order that does not depend on that in which they came."""
        return np.array(
            [np.unpackbits(self._runs[key], count=self.items) for key in sorted(self._runs, key=repr)], bool
        )

    def compute(self, resamples: int = 1000, splits: int = 20, seed: int = 0) -> RunSplit:
        """The split, with its interval and checks.

        Args:
            resamples: of the bootstrap over runs, and of the simulations for p.
            splits: random halves over which their correlation is averaged.
            seed: of all three.

        Raises:
            MeasureError: with fewer than three runs.
        """
        if len(self) < 3:
            raise MeasureError(f"{len(self)} runs have no variance to take apart; give 3, or better {FEW} or more")
        right_RN = self.correct()
        rng = np.random.default_rng(seed)
        total, independent, distribution = split(right_RN)
        low, high = _interval(right_RN, resamples, rng)
        ks, p = _against_independence(right_RN, resamples, rng)
        return RunSplit(
            len(right_RN), self.items, float(right_RN.mean()), total, independent, distribution, low, high, ks, p,
            _halves(right_RN, splits, rng),
        )  # fmt: skip

    @staticmethod
    def from_calibration(probs: Any, labels: Any) -> Calibrated:
        r"""The independent part that calibration forecasts, without counting who was right.

        Where the shares :math:`p_{ik}` of runs that choose class k on item i are calibrated, a class that a share of p
        chooses is right with chance p, so

        .. math:: E[V_{ind}] = \frac1N \operatorname{mean}_i \Big[\sum_k p_{ik}^2 - \sum_k p_{ik}^3\Big]

        which for two classes is error / (2 N): as long as there is error, runs must vary. The labels only serve to
        check the calibration.

        Args:
            probs: (item, class) shares that add up to 1, see `vote_shares`; or the mean probabilities of an ensemble,
                as far as they stand for shares. An over-confident network's do not.
            labels: (item) of classes.

        Raises:
            MeasureError: shares that do not add up to 1, or labels that do not fit.
        """
        p_NK, y_N = _array(probs), _array(labels)
        p_NK = p_NK.astype(np.float64)
        if p_NK.ndim != 2 or y_N.shape != p_NK.shape[:1] or not len(y_N):
            raise MeasureError(f"shares of {p_NK.shape} and labels of {y_N.shape}; want (item, class) and (item)")
        if (p_NK < 0).any() or not np.allclose(p_NK.sum(1), 1, atol=1e-4):
            raise MeasureError("shares are not negative and add up to 1 for each item; give those, and no logits")
        if (y_N != np.round(y_N)).any():
            raise MeasureError(f"labels are whole numbers of classes; {y_N[y_N != np.round(y_N)][0]} is none")
        if y_N.min() < 0 or y_N.max() >= p_NK.shape[1]:
            raise MeasureError(f"labels from {y_N.min()} to {y_N.max()} for {p_NK.shape[1]} classes counted from 0")
        items = len(y_N)
        true_NK = np.arange(p_NK.shape[1]) == y_N[:, None]
        error = float(1 - (p_NK**2).sum(1).mean())
        return Calibrated(
            float((p_NK**2 - p_NK**3).sum(1).mean() / items),
            error / (2 * items),
            error,
            float(1 - p_NK[true_NK].mean()),
            _calibration_gap(p_NK.ravel(), true_NK.ravel()),
        )


def _array(given: Any) -> Array:
    if not hasattr(given, "detach"):
        return np.asarray(given)
    tensor = given.detach().cpu()
    # numpy has no bfloat16.
    return (tensor.float() if tensor.is_floating_point() and tensor.itemsize < 4 else tensor).numpy()


def split(right_RN: Array) -> tuple[float, float, float]:
    """Total, independent and distribution-wise variance of (run, item) bools.

    >>> [round(one, 4) for one in split(np.array([[1, 0, 1, 0], [0, 1, 0, 1], [1, 1, 1, 0]], bool))]
    [0.0208, 0.0833, -0.0833]
    """
    runs, items = right_RN.shape
    p_N = right_RN.mean(0)
    total = float(right_RN.mean(1).var(ddof=1))
    independent = float((p_N * (1 - p_N)).sum() / items**2 * runs / (runs - 1))
    return total, independent, (total - independent) * items / (items - 1)


def vote_shares(predictions: Any, classes: int) -> Array:
    """The share of runs that choose each class, (item, class), from the classes that they chose, (run, item).

    >>> vote_shares([[0, 1], [0, 2]], 3).tolist()
    [[1.0, 0.0, 0.0], [0.0, 0.5, 0.5]]
    """
    chosen_RN = _array(predictions)
    if chosen_RN.ndim != 2 or not chosen_RN.size or not np.isin(chosen_RN, np.arange(classes)).all():
        raise MeasureError(f"choices of shape {chosen_RN.shape}; want (run, item) of classes from 0 to {classes - 1}")
    return np.stack([(chosen_RN == k).mean(0) for k in range(classes)], 1)


def poisson_binomial(p_N: Array) -> Array:
    """The distribution of the number of successes of independent trials with these chances, (trials + 1).

    By products of generating functions, pair by pair through Fourier transforms: N log(N)^2 operations.

    >>> poisson_binomial(np.array([0.5, 0.5])).round(6).tolist()
    [0.25, 0.5, 0.25]
    """
    p_N = np.asarray(p_N, dtype=np.float64)
    # Trials that never succeed fill up to a power of two and change nothing.
    padded = np.concatenate([p_N, np.zeros((1 << max(len(p_N) - 1, 0).bit_length()) - len(p_N))])
    parts = np.stack([1 - padded, padded], 1)
    while len(parts) > 1:
        size = 2 * parts.shape[1] - 1
        turned = np.fft.rfft(parts, 1 << size.bit_length(), axis=1)
        parts = np.fft.irfft(turned[::2] * turned[1::2], axis=1)[:, :size]
    return parts[0, : len(p_N) + 1].clip(0)


def _interval(right_RN: Array, resamples: int, rng: np.random.Generator, level: float = 0.95) -> tuple[float, float]:
    """Of the distribution-wise variance, over runs drawn with replacement."""
    runs, items = right_RN.shape
    accuracy_R, right = right_RN.mean(1), right_RN.astype(np.float64)
    found = []
    for _ in range(resamples):
        weight_R = rng.multinomial(runs, np.full(runs, 1 / runs))
        p_N = weight_R @ right / runs
        mean = weight_R @ accuracy_R / runs
        # Drawing among R runs shrinks both parts by (R - 1) / R in the mean, which is made good at the end.
        total = weight_R @ (accuracy_R - mean) ** 2 / (runs - 1)
        independent = (p_N * (1 - p_N)).sum() / items**2 * runs / (runs - 1)
        found.append((total - independent) * runs / (runs - 1) * items / (items - 1))
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2]) if found else (math.nan, math.nan)
    return float(low), float(high)


def _against_independence(right_RN: Array, resamples: int, rng: np.random.Generator) -> tuple[float, float]:
    """Distance of the accuracies' distribution from the Poisson-binomial of the same shares, and its p by simulation.

    The shares are estimated from the runs themselves, which makes the distance smaller than a table of the test says;
    so each simulated set of runs gets shares of its own.
    """
    runs = len(right_RN)
    p_N = right_RN.mean(0)
    open_N = (p_N > 0) & (p_N < 1)
    value = _distance(right_RN)
    if not open_N.any():
        return value, 1.0
    p_N = p_N[open_N]
    count = min(resamples, 200, max(MOST_DRAWS // (runs * len(p_N)), 19))
    drawn = [_distance(rng.random((runs, len(p_N))) < p_N) for _ in range(count)]
    return value, float((1 + sum(one >= value - 1e-12 for one in drawn)) / (1 + len(drawn)))


def _distance(right_RN: Array) -> float:
    """Largest difference of the two cumulative distributions of the number right."""
    # Items that all runs get right, or none, only shift both.
    p_N = right_RN.mean(0)
    open_N = (p_N > 0) & (p_N < 1)
    if not open_N.any():
        return 0.0
    expected = poisson_binomial(p_N[open_N]).cumsum()
    counts = right_RN[:, open_N].sum(1)
    observed = np.bincount(counts, minlength=len(expected)).cumsum() / len(counts)
    return float(np.abs(observed - expected).max())


def _halves(right_RN: Array, splits: int, rng: np.random.Generator) -> float:
    """Mean correlation over runs of the accuracies on two random halves; NaN where one of them does not vary."""
    found = []
    for _ in range(splits):
        order = rng.permutation(right_RN.shape[1])
        a, b = (right_RN[:, half].mean(1) for half in np.array_split(order, 2))
        found.append(float(np.corrcoef(a, b)[0, 1]) if np.ptp(a) and np.ptp(b) else math.nan)
    return float(np.mean(found)) if found else math.nan


def _calibration_gap(share: Array, right: Array, bins: int = 10) -> float:
    """Mean distance of shares and frequencies over bins of equal width, each weighing its shares' number.

    Shares of 0 are left out: with many classes they would be nearly all, and nearly always right.
    """
    share, right = share[share > 0], right[share > 0]
    which = np.minimum((share * bins).astype(int), bins - 1)
    sums = [np.bincount(which, weights, bins) for weights in (share, right.astype(np.float64))]
    return float(np.abs(sums[0] - sums[1]).sum() / len(share))
