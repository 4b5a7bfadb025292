"""Which of two strategies a model in training follows, predicted from their losses and their complexity alone.

A model trained on D tasks may memorise them or generalise over their kind. Training is seen as evidence about which
of the two predictors to be: the simpler one is favoured at first, the one with the lower loss in the end. What the
model puts out is their average, weighted by the posterior.

Dims: N steps, D diversities, S samples (sequence and position), V classes (or 1 for regression).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from actome.core.errors import MeasureError

Array = np.ndarray
Distance = Literal["kl", "mse"]
ODDS = np.concatenate([[-40.0], np.linspace(-12, 12, 97), [40.0]])


def relative_distance(h: Any, g: Any, m: Any, distance: Distance = "kl") -> float:
    """Where outputs h lie between two predictors: 0 at g (generalising), 1 at m (memorising), 0.5 as far from both.

    (1 + (d(h, g) - d(h, m)) / d(g, m)) / 2, with d the mean symmetrised KL divergence, or the mean square. Outputs that
    are like neither may come out beyond 0 and 1.

    Args:
        h, g, m: probabilities (..., V), or predictions of any shape for ``"mse"``.

    Raises:
        MeasureError: shapes that differ, or two predictors that are the same.

    Source: In-Context Learning Strategies Emerge Rationally (relative distance).

    >>> g, m = np.array([[0.5, 0.5]]), np.array([[0.9, 0.1]])
    >>> relative_distance(g, g, m), relative_distance(m, g, m)
    (0.0, 1.0)
    """
    h, g, m = (_array(one) for one in (h, g, m))
    if not h.shape == g.shape == m.shape:
        raise MeasureError(f"outputs {h.shape}, predictors {g.shape} and {m.shape}; want the same shape three times")
    apart = _apart(g, m, distance)
    if apart <= 0:
        raise MeasureError("the two predictors say the same everywhere; nothing lies between them")
    return 0.5 * (1 + (_apart(h, g, distance) - _apart(h, m, distance)) / apart)


def _apart(a: Array, b: Array, distance: Distance) -> float:
    if distance == "mse":
        return float(((a - b) ** 2).mean())
    a, b = np.maximum(a, 1e-12), np.maximum(b, 1e-12)
    return float(((a - b) * (np.log(a) - np.log(b))).sum(-1).mean()) / 2


@dataclass(frozen=True)
class Strategy:
    """One predictor at every diversity.

    Attributes:
        name: of it.
        outputs: (D, S, V), what it says on the sequences that the models were asked about.
        loss: (D), its mean loss on training data, in nats (or squared error).
        bits: (D), its complexity; `description_bits` gives it.
    """

    name: str
    outputs: Array = field(repr=False)
    loss: Array
    bits: Array

    def __post_init__(self) -> None:
        outputs, loss, bits = _array(self.outputs), _array(self.loss), _array(self.bits)
        if outputs.ndim != 3 or loss.shape != outputs.shape[:1] or bits.shape != loss.shape:
            raise MeasureError(
                f"{self.name}: outputs {outputs.shape}, loss {loss.shape}, bits {bits.shape}; want (diversities, "
                "samples, classes), (diversities) and (diversities)"
            )
        if not (np.isfinite(outputs).all() and np.isfinite(loss).all()) or bits.min() <= 0:
            raise MeasureError(f"{self.name}: outputs and losses have to be finite, and bits above 0")
        for name, value in (("outputs", outputs), ("loss", loss), ("bits", bits)):
            object.__setattr__(self, name, value)


@dataclass
class StrategyPosterior:
    """The posterior over memorising and generalising as training goes on.

    log odds of the first over the second at step N:
    gamma N^(1 - alpha) (loss_2 - loss_1) - ln 2 (bits_1^beta - bits_2^beta).
    The first term is evidence, which accumulates ever more slowly; the second a prior for what is simple.

    Args:
        predictors: two `Strategy`, the memorising one first.
        distance: ``"kl"`` for probabilities, ``"mse"`` for regression.
        complexity: False fixes beta at 0, a prior of equal odds: the control.

    Attributes:
        alpha, beta, gamma: after `fit`.
        cost_: mean KL (or square) of the outputs to the average, over the fitted cells.

    Source: In-Context Learning Strategies Emerge Rationally (model of the posterior odds).
    """

    predictors: Sequence[Strategy]
    distance: Distance = "kl"
    complexity: bool = True
    alpha: float = field(default=math.nan, init=False)
    beta: float = field(default=math.nan, init=False)
    gamma: float = field(default=math.nan, init=False)
    cost_: float = field(default=math.nan, init=False)

    def __post_init__(self) -> None:
        if len(self.predictors) != 2 or self.predictors[0].outputs.shape != self.predictors[1].outputs.shape:
            raise MeasureError("want two predictors with outputs of one shape, the memorising one first")
        if self.distance not in ("kl", "mse"):
            raise MeasureError(f"distance={self.distance!r} does not exist; choose 'kl' or 'mse'")

    def fit(self, outputs: Any, steps: Any, diversities: Any, cells: Any = None) -> StrategyPosterior:
        """Finds alpha, beta and gamma by what models put out.

        Minimises the mean over cells of KL(output || average). The average depends on a cell's log odds alone, so that
        each cell's KL is tabulated once over log odds, and the three numbers are searched for in the tables.

        Args:
            outputs: (N, D, S, V), what the model trained on diversity D put out after N steps.
            steps: (N), rising, above 0.
            diversities: (D), rising; the same as those of the predictors.
            cells: (N, D), which to fit; all by default. Score on the others.

        Raises:
            MeasureError: shapes that do not fit, steps of 0, or fewer than four cells.
        """
        outputs, self.steps, self.diversities = _array(outputs), _array(steps), _array(diversities)
        memory, rule = self.predictors
        want = (len(self.steps), *memory.outputs.shape)
        if outputs.shape != want or self.diversities.shape != (want[1],):
            raise MeasureError(
                f"outputs {outputs.shape}, {len(self.steps)} steps, {len(self.diversities)} diversities; want {want} "
                "and as many steps and diversities"
            )
        for name, values in (("steps", self.steps), ("diversities", self.diversities)):
            if values.min() <= 0 or not (np.diff(values) > 0).all():
                raise MeasureError(f"{name} have to be above 0 and to rise")
        chosen = np.ones(want[:2], dtype=bool) if cells is None else np.asarray(cells, dtype=bool)
        if chosen.shape != want[:2] or chosen.sum() < 4:
            raise MeasureError(
                f"cells {chosen.shape} with {int(chosen.sum())} chosen; want {want[:2]}, four or more of them"
            )
        tables = _tables(outputs, memory.outputs, rule.outputs, self.distance, chosen)
        self.alpha, self.beta, self.gamma, self.cost_ = self._search(tables, chosen)
        return self

    def log_odds(self, steps: Any = None) -> Array:
        """Of the first predictor over the second, (N, D); at the fitted steps by default."""
        steps = self._steps(steps)
        memory, rule = self.predictors
        return _log_odds(self.alpha, self.beta, self.gamma, steps, rule.loss - memory.loss, memory.bits, rule.bits)

    def weights(self, steps: Any = None) -> Array:
        """Posterior probability of the first predictor, (N, D)."""
        return _expit(self.log_odds(steps))

    def predict(self, steps: Any = None) -> Array:
        """What the model is expected to put out, (N, D, S, V): the predictors' average."""
        w = self.weights(steps)[..., None, None]
        return w * self.predictors[0].outputs + (1 - w) * self.predictors[1].outputs

    def relative_distances(self, steps: Any = None) -> Array:
        """`relative_distance` of what is expected, (N, D)."""
        return relative_distances(self.predict(steps), self.predictors, self.distance)

    def crossover(self, diversity: float | None = None) -> Any:
        """The step at which both predictors are equally probable; infinite where the first never comes up.

        N* = [ln 2 (bits_1^beta - bits_2^beta) / (gamma (loss_2 - loss_1))]^(1 / (1 - alpha))

        Args:
            diversity: any between the fitted ones (bits are interpolated along D, losses along log D); None for all
                fitted ones, (D).

        Raises:
            MeasureError: a diversity out of the fitted range, or before `fit`.
        """
        self._steps(None)
        memory, rule = self.predictors
        gain, first, second = rule.loss - memory.loss, memory.bits, rule.bits
        if diversity is not None:
            if not self.diversities[0] <= diversity <= self.diversities[-1]:
                raise MeasureError(
                    f"diversity {diversity:g} lies outside the fitted {self.diversities[0]:g} to "
                    f"{self.diversities[-1]:g}"
                )
            gain = np.interp(math.log(diversity), np.log(self.diversities), gain)
            first, second = (np.interp(diversity, self.diversities, one) for one in (first, second))
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            price = np.maximum(math.log(2) * (first**self.beta - second**self.beta), 0)
            found = (price / (self.gamma * gain)) ** (1 / (1 - self.alpha))
        found = np.where(np.asarray(gain) > 0, found, np.inf)
        return float(found) if diversity is not None else found

    def _steps(self, steps: Any) -> Array:
        if not math.isfinite(self.alpha):
            raise MeasureError("fit the posterior to outputs first")
        return self.steps if steps is None else np.atleast_1d(_array(steps))

    def _search(self, tables: Array, chosen: Array) -> tuple[float, float, float, float]:
        from scipy.interpolate import CubicSpline
        from scipy.optimize import minimize

        memory, rule = self.predictors
        curves = CubicSpline(ODDS, tables, axis=-1)  # (cells) curves over log odds
        coefficients, count = curves.c, len(tables)
        row, gain = np.arange(count), rule.loss - memory.loss

        def cost(theta: Array) -> float:
            odds = np.clip(_log_odds(*self._named(theta), self.steps, gain, memory.bits, rule.bits)[chosen], -40, 40)
            piece = np.clip(np.searchsorted(ODDS, odds, side="right") - 1, 0, len(ODDS) - 2)
            t = odds - ODDS[piece]
            a, b, c, d = coefficients[:, piece, row]
            return float(np.mean(((a * t + b) * t + c) * t + d))

        grid = itertools.product(
            (0.05, 0.25, 0.45, 0.65, 0.8, 0.9), np.geomspace(1e-3, 1e3, 13),
            (0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8) if self.complexity else (None,),
        )  # fmt: skip
        starts = [np.array([_logit(a), math.log(g), *([math.log(b)] if b else [])]) for a, g, b in grid]
        starts = sorted(starts, key=cost)[:4]
        found = [minimize(cost, start, method="Nelder-Mead", options={"maxiter": 600}) for start in starts]
        best = min(found, key=lambda one: one.fun)
        best = minimize(cost, best.x, method="Nelder-Mead", options={"maxiter": 4000, "xatol": 1e-8, "fatol": 1e-13})
        return (*self._named(best.x), float(best.fun))

    def _named(self, theta: Array) -> tuple[float, float, float]:
        beta = math.exp(min(theta[2], 1.0)) if self.complexity else 0.0
        return float(_expit(theta[0])), beta, math.exp(min(theta[1], 50.0))


def relative_distances(outputs: Any, predictors: Sequence[Strategy], distance: Distance = "kl") -> Array:
    """`relative_distance` of every cell of outputs (N, D, S, V) between two strategies, (N, D)."""
    memory, rule = predictors
    return np.array(
        [
            [relative_distance(h, g, m, distance) for h, g, m in zip(row, rule.outputs, memory.outputs, strict=True)]
            for row in _array(outputs)
        ]
    )


def _log_odds(
    alpha: float, beta: float, gamma: float, steps: Array, gain_D: Array, first_D: Array, second_D: Array
) -> Array:
    evidence_ND = gamma * steps[:, None] ** (1 - alpha) * gain_D[None]
    return evidence_ND - math.log(2) * (first_D**beta - second_D**beta)[None]


def _logit(p: float) -> float:
    return math.log(p / (1 - p))


def _expit(x: Any) -> Any:
    from scipy.special import expit

    return expit(x)


def _tables(outputs: Array, memory: Array, rule: Array, distance: Distance, chosen: Array) -> Array:
    """Of each chosen cell, its distance to the average at each of `ODDS`, (cells, odds)."""
    rows = []
    for n, d in zip(*np.nonzero(chosen), strict=True):
        h, m, g = outputs[n, d], memory[d], rule[d]
        row = []
        for w in _expit(ODDS):
            average = w * m + (1 - w) * g
            if distance == "mse":
                row.append(float(((h - average) ** 2).mean()))
            else:
                h_safe = np.maximum(h, 1e-12)
                row.append(float((h_safe * (np.log(h_safe) - np.log(np.maximum(average, 1e-12)))).sum(-1).mean()))
        rows.append(row)
    return np.array(rows)


def _array(values: Any) -> Array:
    if hasattr(values, "detach"):
        values = values.detach().cpu().double()
    return np.asarray(values, dtype=np.float64)
