"""Whether a jump over scales is the model's or the metric's: the same outputs under a sharp metric and a smooth one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from actome.core.errors import MeasureError
from actome.dynamics.curves import emergence_score, required_items

Array = np.ndarray
Metric = Callable[[Array, Array], float]


def exact_match(outputs: Array, targets: Array) -> float:
    """Share of answers of which every token is right; about p^n, so sharp.

    >>> exact_match(np.array([[1, 2], [1, 3]]), np.array([[1, 2], [1, 2]]))
    0.5
    """
    return float((outputs == targets).all(-1).mean())


def token_accuracy(outputs: Array, targets: Array) -> float:
    """Share of tokens that are right, place by place: linear in p.

    >>> token_accuracy(np.array([[1, 2], [1, 3]]), np.array([[1, 2], [1, 2]]))
    0.75
    """
    return float((outputs == targets).mean())


def token_edit_similarity(outputs: Array, targets: Array) -> float:
    """1 - edit distance / tokens: about linear in p, and its emergence score is that of the distance but for the sign.

    >>> token_edit_similarity(np.array([[1, 2, 3, 4]]), np.array([[2, 3, 4, 1]]))
    0.5
    """
    import torch

    from actome.measures.edit_distance import edit_distance

    wrong = (outputs != targets).any(-1)
    distance = edit_distance(torch.as_tensor(outputs[wrong]), torch.as_tensor(targets[wrong])).double().sum()
    return 1 - float(distance) / targets.size


METRICS: dict[str, Metric] = {
    "exact_match": exact_match, "token_edit_similarity": token_edit_similarity, "token_accuracy": token_accuracy,
}  # fmt: skip


@dataclass(frozen=True)
class MetricSwap:
    """One family of outputs under several metrics.

    Attributes:
        curves: by metric, (scales).
        scores: emergence score of each, differences of less than one answer counted as one.
        paper_scores: the same with the paper's formula as it stands; infinite where a curve lies still.
        ratio: score of the first metric over that of the second.
        r2: how much of the exact match is explained by p^n, with p the share of tokens right at each scale.
        r2_by_place: the same by the product of the shares at each place, for places that differ in difficulty.
        sharpness: score of the second metric over that of a straight line.
        unresolved: scales at which the test has fewer items than it takes to expect one right answer (95 %).
        verdict: ``"metric"`` (the jump is made by the metric), ``"transition"`` (the smooth metric jumps as well),
            ``"too few items"``, ``"no jump"`` or ``"undecided"``; with `reason`.
    """

    scales: tuple[float, ...]
    curves: dict[str, Array] = field(repr=False)
    scores: dict[str, float]
    paper_scores: dict[str, float] = field(repr=False)
    ratio: float
    r2: float
    r2_by_place: float
    sharpness: float
    unresolved: tuple[float, ...]
    verdict: str
    reason: str


def metric_swap(
    outputs: Any, targets: Any, scales: Sequence[float], *, metrics: Mapping[str, Metric] | None = None,
    jump: float = 2.0, explained: float = 0.9, sharp: float = 3.0,
) -> MetricSwap:  # fmt: skip
    """Tests a jump over scales by changing the metric and nothing else.

    Args:
        outputs: (scales, items, tokens) of integers: what each model of the family answered.
        targets: (items, tokens), the right answers; the same for all scales.
        scales: (scales), rising: parameters, tokens or steps.
        metrics: by name, (outputs, targets) -> score of one scale, the sharp one first and the smooth one second; by
            default exact match, token edit similarity and token accuracy.
        jump: the sharp metric's score has to be this many times that of the smooth one for the jump to be the metric's.
        explained: and p^n has to explain this share of the exact match, by the better of `r2` and `r2_by_place`.
        sharp: a smooth metric with a score this many times that of a straight line jumps itself.

    A family may both jump under the smooth metric and have its exact match explained by p^n: that is a transition, for
    p itself jumps. The emergence score compares a curve's reach with its middle step, so that it is high only
    where most scales lie on a floor or a ceiling; the same law over fewer decades may show no jump.

    Raises:
        MeasureError: for fewer than five scales, scales out of order, or shapes that do not fit.

    Source: Are Emergent Abilities of Large Language Models a Mirage?

    >>> rng, scales = np.random.default_rng(0), np.geomspace(1e3, 1e10, 15)
    >>> p = np.exp(-((scales / 1e8) ** -0.15))
    >>> wrong = rng.random((15, 2000, 5)) > p[:, None, None]
    >>> metric_swap(wrong.astype(int), np.zeros((2000, 5), int), scales).verdict
    'metric'
    """
    outputs, targets = np.asarray(outputs), np.asarray(targets)
    if outputs.ndim != 3 or targets.shape != outputs.shape[1:] or len(scales) != len(outputs):
        raise MeasureError(
            f"outputs {outputs.shape}, targets {targets.shape}, {len(scales)} scales; want (scales, items, tokens), "
            "(items, tokens) and one scale a model"
        )
    if len(scales) < 5 or not (np.diff(np.asarray(scales, dtype=float)) > 0).all():
        raise MeasureError(f"{len(scales)} scales; want five or more, rising, to tell a jump from a slope")
    metrics = dict(METRICS if metrics is None else metrics)
    if len(metrics) < 2:
        raise MeasureError("give a sharp metric and a smooth one, in this order")
    items, tokens = targets.shape
    curves = {name: np.array([one(out, targets) for out in outputs]) for name, one in metrics.items()}
    scores = {name: emergence_score(curve, 1 / items) for name, curve in curves.items()}
    first, second = list(metrics)[:2]
    ratio = scores[first] / scores[second] if scores[second] else math.nan
    sharpness = abs(scores[second]) / (len(scales) - 1)

    right = outputs == targets
    whole, p, places = right.all(-1).mean(-1), right.mean((1, 2)), right.mean(1)
    r2, r2_by_place = _r2(whole, p**tokens), _r2(whole, places.prod(-1))
    missing = [p_one == 0 or items < required_items(float(p_one), tokens) for p_one in p]
    unresolved = tuple(float(scale) for scale, one in zip(scales, missing, strict=True) if one)
    verdict, reason = _verdict(
        ratio, sharpness, max(r2, r2_by_place), scores[first], (jump, explained, sharp), sum(missing), len(scales)
    )
    return MetricSwap(
        tuple(map(float, scales)), curves, scores, {name: emergence_score(curve) for name, curve in curves.items()},
        ratio, r2, r2_by_place, sharpness, unresolved, verdict, reason,
    )  # fmt: skip


def _verdict(
    ratio: float,
    sharpness: float,
    r2: float,
    score: float,
    limits: tuple[float, float, float],
    missing: int,
    scales: int,
) -> tuple[str, str]:
    jump, explained, sharp = limits
    if sharpness >= sharp:
        return "transition", f"the smooth metric itself is {sharpness:.1f} times as sudden as a straight line"
    if ratio >= jump and r2 >= explained:
        return "metric", f"{ratio:.1f} times as sudden under the sharp metric, and p^n explains {r2:.2f} of it"
    if abs(score) < jump * (scales - 1):
        return "no jump", f"the sharp metric is {abs(score) / (scales - 1):.1f} times as sudden as a straight line"
    if missing > scales / 2:
        return (
            "too few items",
            f"at {missing} of {scales} scales no right answer is to be expected of a test of this size",
        )
    return "undecided", f"ratio {ratio:.1f} (wanted {jump}) and r2 {r2:.2f} (wanted {explained}) do not agree"


def _r2(truth: Array, predicted: Array) -> float:
    total = float(((truth - truth.mean()) ** 2).sum())
    return 1 - float(((truth - predicted) ** 2).sum()) / total if total > 0 else math.nan
