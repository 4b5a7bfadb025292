"""A few-parameter model of an induction head, and how it comes about under gradient flow."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from actome.core.errors import MeasureError

if TYPE_CHECKING:
    import pandas as pd

PARAMETERS = ("beta1", "alpha", "beta2", "xi")


@dataclass(frozen=True)
class InductionHeadODE:
    r"""Three nested logits: a previous-token head, a match-and-copy head that reads it, and a read-out.

    For prompts of N pairs of exemplars and labels and a query of one of their classes; all exemplars and labels
    orthogonal, all labels of a prompt different. Label j stands at place 2 j (from 1).

    1. *Previous token* (:math:`\beta_1`): label j gives its exemplar the weight
       :math:`p_j = e^{\beta_1} / (e^{\beta_1} + 2j - 1)`, and so holds that much of it.
    2. *Match* (:math:`\alpha, \beta_2`): the query of class t attends to label j with the logit
       :math:`\beta_2 + \alpha p_j [j = t]`, to the N exemplars and itself with the logit 0.
    3. *Read-out* (:math:`\xi`): the logit of a label is :math:`\xi` times the weight on it, 0 for labels that are not
       in the prompt. The loss is the mean cross-entropy over t.

    Each softmax sits inside the next, and the gradient of one is small until the others do something: first
    :math:`\beta_2` and :math:`\xi` learn to answer with *some* label of the context, and what that gives is what makes
    the match, and then the previous-token head, worth learning.

    The source gives the model in outline; counting the tokens that each label sees, and averaging over t, are ours.
    What a label holds of earlier exemplars is left out: it allows a second solution, the label that does not hold it.

    Args:
        pairs: N.
        labels: L, how many there are to choose from.
        beta1, alpha, beta2, xi: where they begin.

    Raises:
        MeasureError: no pairs, or fewer labels than pairs.

    Source: Reddy 2024, The mechanistic basis of data dependence and abrupt learning in an in-context classification
    task (the phenomenological model of three nested logits).

    Example:
        >>> from actome.dynamics import first_passage
        >>> def jump(beta1):
        ...     trace = InductionHeadODE(beta1=beta1).run(200.0)
        ...     return first_passage(trace["time"], trace["target"], threshold=0.75).at
        >>> jump(-1.0) > jump(0.0)
        True
    """

    pairs: int = 4
    labels: int = 32
    beta1: float = 0.0
    alpha: float = 0.1
    beta2: float = 0.0
    xi: float = 0.1

    def __post_init__(self) -> None:
        if self.pairs < 1 or self.labels < max(2, self.pairs):
            raise MeasureError(
                f"pairs={self.pairs}, labels={self.labels}: at least one pair, and a label for each pair"
            )

    def at(self, beta1: float, alpha: float, beta2: float, xi: float) -> dict[str, float]:
        """What the head does with these parameters.

        Returns:
            ``loss`` in nats; ``target``, the probability of the right label; ``context``, that of any label of the
            prompt; ``previous_token``, mean p; ``induction``, weight on the right label minus that on the others.
        """
        p, w, v, right, wrong, loss = self._forward(beta1, alpha, beta2, xi)
        return {
            "loss": float(loss.mean()),
            "target": float(right.mean()),
            "context": float((right + wrong).mean()),
            "previous_token": float(p.mean()),
            "induction": float((w - (self.pairs - 1) * v).mean()),
        }

    def gradient(self, beta1: float, alpha: float, beta2: float, xi: float) -> np.ndarray:
        """Of the loss by (beta1, alpha, beta2, xi), (4)."""
        p, w, v, right, wrong, _ = self._forward(beta1, alpha, beta2, xi)
        by_w, by_v = -xi * (1 - right), xi * wrong  # of the loss by the weight on the right and on each wrong label
        by_match = by_w * w * (1 - w) - by_v * v * w
        on_labels = w + (self.pairs - 1) * v
        parts = (
            by_match * alpha * p * (1 - p),
            by_match * p,
            (1 - on_labels) * (by_w * w + by_v * v),
            wrong * v - (1 - right) * w,
        )
        return np.array([part.mean() for part in parts])

    def _forward(self, beta1: float, alpha: float, beta2: float, xi: float) -> tuple[np.ndarray, ...]:
        """For each class asked for, all (N): p, weight on the right label and on each wrong one, the probabilities of
        the right label and of all wrong ones of the prompt together, and the loss."""
        N = self.pairs
        p = np.exp(-np.logaddexp(0.0, np.log(2.0 * np.arange(1, N + 1) - 1) - beta1))
        match = beta2 + alpha * p
        # All but the right label: the other labels at beta2, N exemplars and the query itself at 0.
        other = np.logaddexp(beta2 + _log(N - 1), np.log(N + 1.0))
        total = np.logaddexp(match, other)
        w, v = np.exp(match - total), np.exp(beta2 - total)
        rest = np.logaddexp(xi * v + _log(N - 1), _log(self.labels - N))
        out = np.logaddexp(xi * w, rest)
        right, wrong = np.exp(xi * w - out), np.exp(xi * v + _log(N - 1) - out)
        return p, w, v, right, wrong, out - xi * w

    def run(self, time: float = 200.0, *, points: int = 400, frozen: Collection[str] = ()) -> pd.DataFrame:
        """Gradient flow: each parameter moves against its gradient, at rate one.

        Gradient descent with a small learning rate follows it, `time` being steps times learning rate.

        Args:
            time: how long.
            points: of the trace, evenly spaced.
            frozen: parameters that stay where they begin.

        Returns:
            One row for each point: time, the parameters, and everything of `at`.

        Raises:
            MeasureError: a parameter that does not exist, or a time or a number of points that is too small.
        """
        import pandas as pd
        from scipy.integrate import solve_ivp

        unknown = sorted(set(frozen) - set(PARAMETERS))
        if unknown:
            raise MeasureError(f"there is no parameter {unknown[0]!r}; there are {', '.join(PARAMETERS)}")
        if not time > 0 or points < 2:
            raise MeasureError(f"time={time}, points={points}: a time above 0 and at least 2 points")
        moves = np.array([name not in frozen for name in PARAMETERS], dtype=np.float64)

        def against_gradient(_: float, y: np.ndarray) -> np.ndarray:
            return -moves * self.gradient(*y)

        start = np.array([getattr(self, name) for name in PARAMETERS], dtype=np.float64)
        at = np.linspace(0.0, time, points)
        found = solve_ivp(against_gradient, (0.0, time), start, method="LSODA", t_eval=at, rtol=1e-8, atol=1e-10)
        if not found.success:
            raise MeasureError(f"the flow could not be followed to time={time}: {found.message}")
        trace = pd.DataFrame({"time": at} | dict(zip(PARAMETERS, found.y, strict=True)))
        return pd.concat([trace, pd.DataFrame([self.at(*y) for y in found.y.T])], axis=1)


def _log(count: int) -> float:
    """The logarithm of how many there are; of none, minus infinity."""
    return float(np.log(count)) if count else -np.inf
