"""How far a model predicts what an unsmoothed n-gram model of its training text does.

Letters: B row, T position.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from actome.core.errors import MeasureError

if TYPE_CHECKING:
    from actome.core.model import Model


class Agreement(NamedTuple):
    """A model beside an n-gram model, over the tokens whose context the latter has met.

    Attributes:
        rho: Spearman's correlation of the probabilities that the two give to the tokens that come.
        agreement: share of the tokens at which both have the same favourite.
        covered: share of the tokens that count.
        tokens: how many.
    """

    rho: float
    agreement: float
    covered: float
    tokens: int


class InfinityGram:
    r"""The next token after the longest ending of the context that the training text holds, by plain counts.

    :math:`p(w | c) = n(c' w) / n(c')`, c' the longest suffix of c that was met with a token after it, of at most `most`
    tokens. Nothing is smoothed.

    Args:
        rows: token ids (B, T) of the training text; contexts do not cross rows.
        most: tokens of a context that are looked at.

    Source: Liu et al. 2024, Infini-gram: Scaling Unbounded n-gram Language Models to a Trillion Tokens, bounded here.

    >>> grams = InfinityGram([[1, 2, 3, 1, 2, 4, 1, 2, 3]], most=2)
    >>> p, favourite, length = grams.predict([[0, 1, 2, 3]])
    >>> [round(float(x), 2) for x in p[0]], favourite[0].tolist(), length[0].tolist()
    ([0.0, 1.0, 0.67], [-1, 2, 3], [0, 1, 2])
    """

    def __init__(self, rows: Any, most: int = 5):
        rows = np.asarray(rows)
        if rows.ndim != 2 or most < 1 or not np.issubdtype(rows.dtype, np.integer):
            raise MeasureError(f"n-grams are of token ids (B, T), with most of 1 or more, not {rows.shape}, {most}")
        self.most = most
        self.counts: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        for row in rows.tolist():
            for at in range(1, len(row)):
                for n in range(1, min(most, at) + 1):
                    self.counts[tuple(row[at - n : at])][row[at]] += 1

    def predict(self, rows: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For each token but the first: its probability, the favourite, and the length of the context that was met.

        Where no context was met the probability is 0, the favourite -1 and the length 0; (B, T - 1) each.
        """
        rows = np.asarray(rows)
        shape = (len(rows), rows.shape[1] - 1)
        p, favourite, length = np.zeros(shape), np.full(shape, -1), np.zeros(shape, int)
        for i, row in enumerate(rows.tolist()):
            for at in range(1, len(row)):
                for n in range(min(self.most, at), 0, -1):
                    seen = self.counts.get(tuple(row[at - n : at]))
                    if seen:
                        p[i, at - 1] = seen[row[at]] / seen.total()
                        favourite[i, at - 1], length[i, at - 1] = seen.most_common(1)[0][0], n
                        break
        return p, favourite, length


def ngram_agreement(model: Model, rows: Any, grams: InfinityGram, batch_size: int = 16) -> Agreement:
    """How alike a model's next-token predictions and those of an n-gram model of its training text are.

    Args:
        model: that gives logits for token ids.
        rows: token ids (B, T), text that was not counted.
        grams: of the training text.

    Source: Li et al. 2025, Tracing the Representation Geometry of Language Models (their distributional memorisation).
    """
    import torch

    from actome.tasks.trials import spearman

    rows = torch.as_tensor(rows)
    theirs, favourite, length = grams.predict(rows.cpu().numpy())
    mine, best = [], []
    for batch in rows.split(batch_size):
        p = model.logits(batch)[:, :-1].float().softmax(-1).cpu()
        mine.append(p.gather(-1, batch[:, 1:, None].cpu())[..., 0])
        best.append(p.argmax(-1))
    met = length > 0
    if met.sum() < 2:
        raise MeasureError(f"{int(met.sum())} of {met.size} tokens have a context that the n-grams have met; give more")
    p, choice = torch.cat(mine).double().numpy(), torch.cat(best).numpy()
    rho = spearman(p[met], theirs[met])
    return Agreement(rho, float((choice == favourite)[met].mean()), float(met.mean()), int(met.sum()))
