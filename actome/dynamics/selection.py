"""Which of many models to fine-tune, from runs on small parts of the data: accept-then-stop and its rivals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from actome.core.errors import MeasureError, nearest
from actome.dynamics.rectified import RectifiedLaw

if TYPE_CHECKING:
    import pandas as pd

Array = np.ndarray
Curves = Mapping[str, tuple[Any, Any]]
Rule = Literal["accept_then_stop", "rectified", "vanilla", "largest_subset", "zero_shot", "size"]
RULES: tuple[str, ...] = ("accept_then_stop", "rectified", "vanilla", "largest_subset", "zero_shot", "size")


@dataclass(frozen=True)
class Ranking:
    """Candidates in the order in which they are expected to do.

    Attributes:
        order: names, best first.
        table: one row a candidate, best first: ``model``, ``predicted`` (loss at the target; the score itself for rules
            that predict none), and what the rule has to say of it.
    """

    order: tuple[str, ...]
    table: pd.DataFrame = field(repr=False)

    @property
    def best(self) -> str:
        """The candidate to fine-tune."""
        return self.order[0]

    def predicted(self) -> dict[str, float]:
        """By name."""
        return dict(zip(self.table["model"], map(float, self.table["predicted"]), strict=True))


@dataclass(frozen=True)
class Accepted:
    """One candidate's points under accept-then-stop.

    Attributes:
        predicted: loss at the target.
        slope, intercept: of log L over log D.
        used: how many points, the largest ones.
        stopped_at: the size that was found to belong to the pre-power phase; NaN when none was.
        ratio: its residual in standard deviations of the fit's.
    """

    predicted: float
    slope: float
    intercept: float
    used: int
    stopped_at: float
    ratio: float


def accept_then_stop(curves: Curves, target: float, k: int = 3, delta: float = 5.0, *, floor: float = 1e-6) -> Ranking:
    """Ranks models by their loss at a size that none of them was run on, from their power phases alone.

    For each model: a line of log L over log D through the `k` largest sizes; then size by size downwards, the next one
    is accepted and the line refitted, unless it lies more than `delta` standard deviations of the line's residuals
    away. That one, and all below it, belong to the pre-power phase. The last line is continued to the target.

    Args:
        curves: by model, sizes (n) and losses (n), above 0; usually sizes that halve. Repeated sizes are averaged.
        target: the size of the whole data.
        k: how many points are accepted untested; 3 or more, for two points lie on a line whatever they are.
        delta: in standard deviations. Choose it before the curves are looked at.
        floor: the least standard deviation of log L that is believed, so that three points on a line by chance do not
            stop at once.

    Raises:
        MeasureError: no models, fewer than `k` sizes (names the model), sizes or losses of 0 or less, or k < 3.

    Source: Selecting Large Language Model to Fine-tune via Rectified Scaling Law, algorithm 1.

    >>> D = 200.0 * 2 ** np.arange(8)
    >>> noise = np.array([0, 1, -1, 1, -1, 1, -1, 1]) * 0.003
    >>> curves = {"plain": (D, 9 / D**0.2 * np.exp(noise)), "learned": (D, 90 / (300 + D**0.7) * np.exp(noise))}
    >>> ranking = accept_then_stop(curves, target=1e6)
    >>> ranking.order, ranking.table.used.tolist()                  # a pre-power phase in one
    (('learned', 'plain'), [3, 8])
    """
    if k < 3 or k != int(k) or not delta > 0 or not floor > 0:
        raise MeasureError(
            f"k={k}, delta={delta}, floor={floor}: want a whole number of 3 or more, and numbers above 0"
        )
    rows = []
    for name, (D, L) in _checked(curves, target).items():
        if len(D) < k:
            raise MeasureError(f"{name!r} has {len(D)} sizes, and k={k} are needed")
        found = _accept(np.log(D), np.log(L), math.log(target), k, delta, floor)
        rows.append({"model": name, **vars(found)})
    return _ranked(rows)


def _accept(x: Array, y: Array, target: float, k: int, delta: float, floor: float) -> Accepted:
    """Points in order of x, largest last."""
    used, stopped, ratio = k, math.nan, math.nan
    while True:
        slope, intercept = np.polyfit(x[-used:], y[-used:], 1)
        if used == len(x):
            break
        sd = max(float(np.std(y[-used:] - slope * x[-used:] - intercept)), floor)
        off = abs(float(y[-used - 1] - slope * x[-used - 1] - intercept)) / sd
        if off > delta:
            stopped, ratio = float(np.exp(x[-used - 1])), off
            break
        used += 1
    predicted = float(np.exp(slope * target + intercept))
    return Accepted(predicted, float(slope), float(intercept), used, stopped, ratio)


def rank_models(
    curves: Curves, target: float, rule: Rule = "accept_then_stop", *, scores: Mapping[str, float] | None = None,
    k: int = 3, delta: float = 5.0,
) -> Ranking:  # fmt: skip
    """Ranks models to fine-tune by one of several rules.

    Args:
        curves, target, k, delta: as in `accept_then_stop`.
        rule: ``"accept_then_stop"``; ``"rectified"`` and ``"vanilla"``, the law with and without a pre-power phase
            fitted to all sizes; ``"largest_subset"``, the loss at the largest size; ``"zero_shot"``, `scores` as they
            are, lower first; ``"size"``, `scores` largest first (parameters).
        scores: by model, for the last two rules.

    Raises:
        MeasureError: a rule that does not exist, scores that are missing, or what `accept_then_stop` refuses.

    >>> D = 200.0 * 2 ** np.arange(8)
    >>> curves = {"fast": (D, 60 / D**0.5 + 0.01), "slow": (D, 20 / (900 + D) ** 0.25)}
    >>> rank_models(curves, 1e6, "largest_subset").order
    ('fast', 'slow')
    >>> rank_models(curves, 1e6, "size", scores={"fast": 1, "slow": 7}).best
    'slow'
    """
    if rule not in RULES:
        raise MeasureError(f"there is no rule {rule!r}{nearest(str(rule), RULES)}; there are: {', '.join(RULES)}")
    if rule == "accept_then_stop":
        return accept_then_stop(curves, target, k, delta)
    checked = _checked(curves, target)
    if rule in ("zero_shot", "size"):
        missing = sorted(set(checked) - set(scores or {}))
        if missing:
            raise MeasureError(f"rule {rule!r} ranks by scores=, which has none for {', '.join(missing)}")
        sign = 1 if rule == "zero_shot" else -1
        return _ranked([{"model": name, "predicted": sign * float(scores[name])} for name in checked])  # type: ignore[index]
    rows = []
    for name, (D, L) in checked.items():
        row: dict[str, Any] = {"model": name}
        if rule == "largest_subset":
            row["predicted"] = float(L[-1])
        else:
            law = RectifiedLaw(pre_learned_size=rule == "rectified").fit(D, L)
            row |= {"predicted": float(law.predict(target)), "pre_learned": law.pre_learned, "beta": law.beta}
        rows.append(row)
    return _ranked(rows)


def selection_scores(predicted: Mapping[str, float], truth: Mapping[str, float]) -> dict[str, float]:
    """How good a ranking was, once the full losses are known.

    Returns:
        ``pearson`` between predictions and full losses, and ``relative_accuracy`` of the pick: (worst - picked) /
        (worst - best), 1 for the best and 0 for the worst.

    Raises:
        MeasureError: not the same models in both, or fewer than three.

    >>> found = selection_scores({"a": 1.0, "b": 2.0, "c": 4.0}, {"a": 1.2, "b": 1.0, "c": 3.0})
    >>> round(found["pearson"], 3), round(found["relative_accuracy"], 3)
    (0.911, 0.9)
    """
    if set(predicted) != set(truth) or len(truth) < 3:
        raise MeasureError(
            f"{len(predicted)} predictions, {len(truth)} full losses, {len(set(predicted) & set(truth))} models in "
            "both; want the same three or more"
        )
    names = sorted(truth)
    a, b = (np.array([float(one[name]) for name in names]) for one in (predicted, truth))
    flat = np.ptp(a) == 0 or np.ptp(b) == 0
    pearson = math.nan if flat else float(np.corrcoef(a, b)[0, 1])
    span = float(b.max() - b.min())
    return {"pearson": pearson, "relative_accuracy": (float(b.max()) - float(b[a.argmin()])) / span if span else 1.0}


def _checked(curves: Curves, target: float) -> dict[str, tuple[Array, Array]]:
    """Sizes rising, each once."""
    if not isinstance(curves, Mapping) or not curves:
        raise MeasureError(f"there are no models to rank in {curves!r:.60}; give curves={{name: (sizes, losses)}}")
    if not isinstance(target, Real) or not 0 < target < math.inf:
        raise MeasureError(f"target={target!r}: give the size of the whole data, a number above 0")
    out = {}
    for name, pair in curves.items():
        try:
            D, L = (np.asarray(one, dtype=np.float64) for one in pair)
        except (TypeError, ValueError) as error:
            raise MeasureError(f"{name!r} is not (sizes, losses), two lists of numbers: {error}") from error
        if D.ndim != 1 or D.shape != L.shape or not len(D):
            raise MeasureError(f"{name!r} has sizes {D.shape} and losses {L.shape}; want (n) and (n)")
        if not (np.isfinite(D).all() and np.isfinite(L).all() and D.min() > 0 and L.min() > 0):
            raise MeasureError(f"{name!r} has a size or a loss that is not finite and above 0; logarithms are fitted")
        unique, index = np.unique(D, return_inverse=True)
        out[name] = (unique, np.bincount(index, L) / np.bincount(index))
    return out


def _ranked(rows: list[dict[str, Any]]) -> Ranking:
    import pandas as pd

    table = pd.DataFrame(rows).sort_values("predicted", kind="stable", ignore_index=True)
    return Ranking(tuple(table["model"]), table)
