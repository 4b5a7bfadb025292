"""How large a difference of scores must be to mean something, and which metric of a benchmark says the most."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from actome.core.errors import MeasureError

if TYPE_CHECKING:
    import pandas as pd

Array = np.ndarray
Metric = Literal["discrete", "continuous"]
METRICS: tuple[Metric, ...] = ("discrete", "continuous")


class EvalVariance:
    """Scores of one benchmark over seeds, checkpoints and items, under a discrete and a continuous metric.

    All seeds answer the same items; otherwise what items differ in would pass for what seeds differ in.

    Args:
        chance: score of guessing, by metric or one number for both; taken off the mean in `snr`.
        late: over how many last checkpoints `seed_sd_late` averages.

    Source: Quantifying Variance in Evaluation Benchmarks.

    >>> rng, variance = np.random.default_rng(0), EvalVariance(chance=0.2)
    >>> for seed in range(4):
    ...     for step in range(6):
    ...         p = np.clip(0.2 + 0.12 * step + 0.1 * rng.standard_normal(100), 0.01, 0.99)
    ...         variance.update(seed, step, rng.random(100) < p, p)
    >>> table = variance.compute().set_index("metric")
    >>> bool(table.snr["continuous"] > table.snr["discrete"]), int(table["items"]["discrete"])
    (True, 100)
    """

    def __init__(self, chance: float | Mapping[str, float] = 0.0, late: int = 3):
        self.chance = {name: float(chance[name] if isinstance(chance, Mapping) else chance) for name in METRICS}
        self.late = late
        self._scores: dict[tuple[Any, float], tuple[Array, Array]] = {}

    def __repr__(self) -> str:
        seeds, steps = ({key[i] for key in self._scores} for i in (0, 1))
        return f"EvalVariance({len(seeds)} seeds, {len(steps)} checkpoints)"

    def update(self, seed: Any, step: float, item_scores_disc: Any, item_scores_cont: Any) -> None:
        """Adds one checkpoint of one run.

        Args:
            seed: of the run.
            step: of the checkpoint.
            item_scores_disc: (items), such as right or wrong.
            item_scores_cont: (items), such as the probability of the right answer, for the same format of answer.

        Raises:
            MeasureError: for another number of items than before, values that are not finite, or a checkpoint twice.
        """
        pair = tuple(np.array(one, dtype=np.float64) for one in (item_scores_disc, item_scores_cont))
        items = len(next(iter(self._scores.values()))[0]) if self._scores else len(np.atleast_1d(pair[0]))
        if any(one.shape != (items,) for one in pair) or items < 2:
            raise MeasureError(
                f"item scores of shapes {pair[0].shape} and {pair[1].shape}; want ({items},) for both: the same items "
                "for every seed and step, two or more"
            )
        if not all(np.isfinite(one).all() for one in pair):
            raise MeasureError(
                f"seed {seed}, step {step}: item scores that are not finite; score such an item as wrong"
            )
        if (seed, step) in self._scores:
            raise MeasureError(f"seed {seed}, step {step} was given before")
        self._scores[seed, step] = pair

    def scores(self, metric: Metric) -> Array:
        """(seeds, steps, items).

        Raises:
            MeasureError: when a seed lacks a step that another has, or there are fewer than two seeds or three steps.
        """
        if metric not in METRICS:
            raise MeasureError(f"metric={metric!r} does not exist; choose 'discrete' or 'continuous'")
        seeds, steps = (sorted({key[i] for key in self._scores}) for i in (0, 1))
        missing = [(seed, step) for seed in seeds for step in steps if (seed, step) not in self._scores]
        if missing:
            raise MeasureError(
                f"{len(missing)} checkpoints are missing, first: seed {missing[0][0]}, step {missing[0][1]}"
            )
        if len(seeds) < 2 or len(steps) < 3:
            raise MeasureError(
                f"{len(seeds)} seeds and {len(steps)} checkpoints; want two seeds and three checkpoints or more"
            )
        which = METRICS.index(metric)
        return np.array([[self._scores[seed, step][which] for step in steps] for seed in seeds])

    def compute(self, resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
        """One row a metric.

        Columns: ``mean`` at the last checkpoint; ``seed_sd`` there, over seeds; ``seed_sd_late``, its mean over the
        last checkpoints; ``seed_part``, see there; ``monotonicity``, Kendall's tau-b of score and checkpoint, mean over
        seeds, and ``monotonicity_of_mean`` of the mean curve; ``snr`` = (mean - chance) / seed_sd and
        ``snr_late``; ``item_ci``, half the 95 % interval over items, 1.96 sd / sqrt(items), which for right or wrong is
        1.96 sqrt(S (1 - S) / items), in the mean over seeds; ``item_low``, ``item_high``, of the mean by bootstrap over
        items; ``min_difference``, see `min_detectable_difference`; ``seeds``, ``steps``, ``items``.
        """
        import pandas as pd

        rows = []
        for metric in METRICS:
            scores_SCI = self.scores(metric)
            curves_SC = scores_SCI.mean(-1)
            last_SI = scores_SCI[:, -1]
            found = summary(curves_SC, self.chance[metric], self.late)
            items = last_SI.shape[1]
            drawn = last_SI.mean(0)[np.random.default_rng(seed).integers(0, items, (resamples, items))].mean(1)
            low, high = np.quantile(drawn, [0.025, 0.975])
            rows.append(
                {
                    "metric": metric, **found, "item_ci": float((1.96 * last_SI.std(1) / math.sqrt(items)).mean()),
                    "item_low": float(low), "item_high": float(high),
                    "seed_part": self.seed_part(metric),
                    "min_difference": self.min_detectable_difference(metric=metric),
                    "seeds": len(curves_SC), "steps": curves_SC.shape[1], "items": items,
                }
            )  # fmt: skip
        return pd.DataFrame(rows)

    def over_seeds(self, resamples: int = 1000, seed: int = 0) -> dict[str, dict[str, Array]]:
        """The figures of `summary` with seeds drawn with replacement, the same draw for both metrics, (resamples) each.

        A draw of one seed only has no spread, and is drawn again.
        """
        curves = {metric: self.scores(metric).mean(-1) for metric in METRICS}
        count, rng = len(curves["discrete"]), np.random.default_rng(seed)
        out: dict[str, dict[str, list[float]]] = {metric: {} for metric in METRICS}
        for _ in range(resamples):
            draw = rng.integers(0, count, count)
            while len(set(draw.tolist())) < 2:
                draw = rng.integers(0, count, count)
            for metric in METRICS:
                for name, value in summary(curves[metric][draw], self.chance[metric], self.late).items():
                    out[metric].setdefault(name, []).append(value)
        return {metric: {name: np.array(values) for name, values in one.items()} for metric, one in out.items()}

    def min_detectable_difference(
        self, alpha: float = 0.05, power: float = 0.8, runs: int | None = None, metric: Metric = "discrete"
    ) -> float:
        """The smallest difference of two models' mean scores that a two-sided test finds, from the spread of seeds.

        (t(1 - alpha / 2) + t(power)) sd sqrt(2 / runs), with 2 (runs - 1) degrees of freedom; for one run a model,
        those of the spread over seeds, which is then known from here only.

        Args:
            alpha, power: of the test.
            runs: of each model; as many as there are seeds by default.
            metric: ``"discrete"`` or ``"continuous"``.
        """
        from scipy.stats import t

        scores = self.scores(metric)[:, -1].mean(-1)
        runs = len(scores) if runs is None else runs
        if runs < 1 or not 0 < alpha < 1 or not 0 < power < 1:
            raise MeasureError(f"runs={runs}, alpha={alpha}, power={power}: want a run or more, and shares")
        degrees = 2 * (runs - 1) or len(scores) - 1
        factor = float(t.ppf(1 - alpha / 2, degrees) + t.ppf(power, degrees))
        return factor * float(scores.std(ddof=1)) * math.sqrt(2 / runs)

    def seed_part(self, metric: Metric = "discrete") -> float:
        """Standard deviation over seeds of the score on all items that there could be; 0 when none can be told.

        The variance of the seeds' means holds some of the items' as well: which items a seed gets right is in part
        chance. By analysis of variance with a seed, an item and a remainder that is left over,
        var(seed means) = seed_part^2 + var(remainder) / items. The mean over the last checkpoints is given.
        """
        scores_SCI = self.scores(metric)[:, -self.late :]
        seeds, _, items = scores_SCI.shape
        rest = scores_SCI - scores_SCI.mean(0) - scores_SCI.mean(-1, keepdims=True) + scores_SCI.mean((0, -1))[:, None]
        remainder_C = (rest**2).sum((0, -1)) / ((seeds - 1) * (items - 1))
        own_C = scores_SCI.mean(-1).var(0, ddof=1) - remainder_C / items
        return math.sqrt(max(float(own_C.mean()), 0.0))

    def discriminability(self, other: EvalVariance, metric: Metric = "discrete") -> float:
        """|difference of means| / pooled standard deviation over seeds, of two models at their last checkpoints.

        Infinite for two models without any spread that differ.
        """
        a, b = (one.scores(metric)[:, -1].mean(-1) for one in (self, other))
        freedom = len(a) + len(b) - 2
        pooled = math.sqrt((a.var(ddof=1) * (len(a) - 1) + b.var(ddof=1) * (len(b) - 1)) / freedom)
        difference = abs(float(a.mean() - b.mean()))
        return difference / pooled if pooled else (math.inf if difference else 0.0)

    def item_discrimination(self, metric: Metric = "discrete") -> Array:
        """Correlation of each item's score with the rest of the test over all seeds and checkpoints, (items).

        The point-biserial correlation, the item itself left out of the total; NaN for an item that all score alike. The
        paper finds that choosing items by it does little against variance.
        """
        scores_NI = self.scores(metric).reshape(-1, self.scores(metric).shape[-1])
        rest_NI = scores_NI.sum(1, keepdims=True) - scores_NI
        a, b = (one - one.mean(0) for one in (scores_NI, rest_NI))
        size = np.sqrt((a**2).sum(0) * (b**2).sum(0))
        with np.errstate(all="ignore"):
            return np.where(size > 1e-12, (a * b).sum(0) / size, np.nan)


def summary(curves_SC: Array, chance: float = 0.0, late: int = 3) -> dict[str, float]:
    """What seeds say of a metric, from its mean score a seed and checkpoint, (seeds, checkpoints).

    >>> {name: round(value, 3) for name, value in summary(np.array([[0.2, 0.4, 0.6], [0.2, 0.5, 0.8]]), 0.2, 1).items()}
    {'mean': 0.7, 'seed_sd': 0.141, 'seed_sd_late': 0.141, 'monotonicity': 1.0, 'monotonicity_of_mean': 1.0,
     'snr': 3.536, 'snr_late': 3.536}
    """
    mean, sd = float(curves_SC[:, -1].mean()), float(curves_SC[:, -1].std(ddof=1))
    sd_late = float(curves_SC[:, -late:].std(0, ddof=1).mean())
    above = mean - chance
    return {
        "mean": mean, "seed_sd": sd, "seed_sd_late": sd_late, "monotonicity": float(np.mean(_tau_b(curves_SC))),
        "monotonicity_of_mean": float(_tau_b(curves_SC.mean(0)[None])[0]),
        "snr": _ratio(above, sd), "snr_late": _ratio(above, sd_late),
    }  # fmt: skip


def _ratio(above: float, sd: float) -> float:
    return above / sd if sd > 0 else math.copysign(math.inf, above) if above else math.nan


def _tau_b(curves_SC: Array) -> Array:
    """Kendall's tau-b of each curve with time, 0 for a constant one, (curves)."""
    i, j = np.triu_indices(curves_SC.shape[1], 1)
    # Means over items that are equal may differ by rounding.
    difference = curves_SC[:, j] - curves_SC[:, i]
    sign = np.sign(np.where(np.abs(difference) < 1e-12, 0, difference))
    untied = np.abs(sign).sum(1)
    return sign.sum(1) / np.sqrt(np.maximum(untied, 1) * len(i))
