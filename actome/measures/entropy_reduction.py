"""What each step of a reasoning is worth: how much it lowers the uncertainty of the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..core.errors import MeasureError
from .spans import Texts, spans
from .uncertainty import token_uncertainty

if TYPE_CHECKING:
    from ..core.model import Model


class SpanUncertainty(NamedTuple):
    """Uncertainty of answer spans, one entry a span, float64.

    Attributes:
        entropy: mean entropy of the predicted distributions over the tokens of the answer, in nats a token.
        nll: mean negative log-likelihood of those tokens, in nats a token.
    """

    entropy: Tensor
    nll: Tensor


def conditional_entropy(
    model: Model, contexts: Texts, answers: Texts, *, tokens: Sequence[int] | None = None, batch_size: int = 8
) -> SpanUncertainty:
    r"""Uncertainty of an answer given its context, over the whole span of the answer.

    For an answer :math:`y_1 \ldots y_m` after a context c, read by the model in one forward,

    .. math:: H = \frac{1}{m} \sum_j -\sum_v p(v \mid c, y_{<j}) \log p(v \mid c, y_{<j})

    From the second token on this conditions on the answer that is given. If that is the right answer, which nobody
    knows who does not have the key, H is an *oracle* figure: say so when you report it. The first token's entropy,
    and so that of an answer of one token, does not depend on the answer.

    Args:
        model: any model with logits over a vocabulary that predicts the next token.
        contexts, answers: texts or token ids, one answer a context.
        tokens: the ids that an answer may consist of, all others ruled out; all of the vocabulary by default.
        batch_size: rows a forward.

    Raises:
        MeasureError: an empty context or answer, or not as many of one as of the other.

    Source: Guo 2025, Measuring Reasoning Utility in LLMs via Conditional Entropy Reduction (entropy reduction over
    reasoning steps).

    >>> import actome as ac
    >>> got = conditional_entropy(ac.demo(), ["The value of"], [" the"])
    >>> got.entropy.shape, bool(got.entropy > 0)
    (torch.Size([1]), True)
    """
    parts = []
    for span in spans(contexts, answers, model.tokenizer, batch_size):
        logits = model.logits(span.batch)
        logits_NV = logits[span.before.to(logits.device)]
        targets_N = span.targets.to(logits.device)
        if tokens is not None:
            allowed = torch.as_tensor(tokens, device=logits.device)
            logits_NV, place = logits_NV[:, allowed], (targets_N[:, None] == allowed).long()
            if not bool((place.sum(-1) == 1).all()):
                raise MeasureError("an answer holds a token that `tokens` does not have, or has twice")
            targets_N = place.argmax(-1)
        u = token_uncertainty(logits_NV)
        nll_N = u.log_z - logits_NV.gather(-1, targets_N[:, None])[:, 0].to(u.log_z)
        sums = torch.zeros(2, len(span.prompt), dtype=torch.float64)
        sums.index_add_(1, span.row, torch.stack([u.entropy, nll_N]).double().cpu())
        parts.append(sums / span.response)
    return SpanUncertainty(*torch.cat(parts, 1))


@dataclass(frozen=True, eq=False)
class EntropyTrace:
    """Uncertainty of an answer after each step of a reasoning.

    Attributes:
        entropy: (steps + 1), `conditional_entropy` before the first step and after each.
        nll: (steps + 1), of the answer's tokens.
        oracle: whether the answer that was read is the right one, so that the figures could not be had without it.
    """

    entropy: Tensor
    nll: Tensor
    oracle: bool

    @property
    def utility(self) -> Tensor:
        """(steps): what each step takes off the entropy; negative where it adds to it."""
        return -self.entropy.diff()

    @property
    def slope(self) -> float:
        """Slope of the least-squares line of entropy on step, in parts of the entropy before the first step.

        NaN without a step, or when there was nothing to reduce.
        """
        h = self.entropy
        if len(h) < 2 or h[0] <= 0:
            return float("nan")
        t = torch.arange(len(h), dtype=h.dtype) - (len(h) - 1) / 2
        return float((t * h).sum() / t.square().sum() / h[0])

    @property
    def falling(self) -> float:
        """Share of steps that lower the entropy; NaN without a step."""
        return float((self.utility > 0).double().mean())

    @property
    def final(self) -> float:
        """Entropy after the last step, in nats."""
        return float(self.entropy[-1])


class EntropyReduction:
    """Reads reasonings with a model, its own or another's, and traces the uncertainty of their answers.

    Args:
        model: the reader.
        cue: what is put between the last step and the answer, such as ``" The answer is"``; text or ids, or nothing.
        batch_size: contexts a forward.
        tokens: as for `conditional_entropy`.

    Source: Guo 2025, Measuring Reasoning Utility in LLMs via Conditional Entropy Reduction.

    Example:
        >>> import actome as ac
        >>> reader = EntropyReduction(ac.demo(), cue=" so")
        >>> trace = reader.trace("The value of x", [" is one", " and two"], " three", oracle=True)
        >>> trace.entropy.shape, trace.utility.shape, trace.oracle
        (torch.Size([3]), torch.Size([2]), True)
    """

    def __init__(self, model: Model, cue: Any = None, batch_size: int = 8, tokens: Sequence[int] | None = None):
        self.model, self.cue, self.batch_size, self.tokens = model, cue, batch_size, tokens

    def trace(self, question: Any, steps: Sequence[Any], answer: Any, *, oracle: bool) -> EntropyTrace:
        """The trace of one reasoning.

        Args:
            question, steps, answer: strings, or each a list of token ids.
            oracle: whether `answer` is the reference; False for an answer that the model gave itself.
        """
        return self.traces([question], [steps], [answer], oracle=oracle)[0]

    def traces(
        self, questions: Sequence[Any], steps: Sequence[Sequence[Any]], answers: Sequence[Any], *, oracle: bool
    ) -> list[EntropyTrace]:
        """The traces of many reasonings, their contexts read together in batches; arguments as in `trace`."""
        if not len(questions) == len(steps) == len(answers):
            raise MeasureError(
                f"there are {len(questions)} questions, {len(steps)} lists of steps and {len(answers)} answers; "
                "give one of each for a reasoning"
            )
        contexts, spoken = [], []
        for question, taken, answer in zip(questions, steps, answers, strict=True):
            context = question if isinstance(question, str) else _ids(question)
            for step in [None, *taken]:
                context = _joined(context, step)
                contexts.append(_joined(context, self.cue))
                spoken.append(answer if isinstance(answer, str) else _ids(answer))
        got = conditional_entropy(self.model, contexts, spoken, tokens=self.tokens, batch_size=self.batch_size)
        lengths = [len(taken) + 1 for taken in steps]
        pairs = zip(got.entropy.split(lengths), got.nll.split(lengths), strict=True)
        return [EntropyTrace(entropy, nll, oracle) for entropy, nll in pairs]


def _ids(ids: Any) -> list[int]:
    return ids.tolist() if isinstance(ids, Tensor) else list(ids)


def _joined(context: Any, more: Any) -> Any:
    """Text and text, or ids and ids."""
    if more is None:
        return context
    if isinstance(context, str) != isinstance(more, str):
        raise MeasureError("a question, its steps and the cue are all text or all token ids, not some of each")
    return context + (more if isinstance(more, str) else _ids(more))
