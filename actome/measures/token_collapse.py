"""What shows on a loss plateau: tokens that look alike, outputs that repeat, attention that finds its targets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from ..core.errors import MeasureError
from ..core.measure import Measure, Reduction, double, ratio, real_tokens, shared, token_norms, wide
from .next_token import OfNextToken


class TokenCollapse(Measure):
    r"""How alike the tokens of one sequence are: the mean cosine of all pairs of them.

    For the n tokens of a sequence with unit vectors :math:`u_t`, without looking at pairs,
    :math:`\frac{1}{n(n-1)} \sum_{s \ne t} u_s \cdot u_t = \frac{\lVert \sum_t u_t \rVert^2 - n}{n (n-1)}`.

    - ``token_cosine``: mean over sequences with two tokens or more

    Padding, the first `skip` real tokens of a row, tokens with a non-finite unit and zero vectors are left out.

    Args:
        skip: how many tokens at the start of a row not to look at, such as the prompt's.

    Shapes: x (\*stack, batch, pos, unit); value (\*stack).

    Source: Gopalani and Hu 2025, What Happens During the Loss Plateau? (representation collapse).

    Example:
        >>> collapse = TokenCollapse()
        >>> collapse.update(torch.tensor([[[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]]]))
        >>> round(float(collapse.compute()["token_cosine"]), 4)
        0.3333
    """

    reductions: ClassVar[dict[str, Reduction]] = {"sequences": "sum", "cosine": "sum"}
    value_dims: ClassVar[dict[str, tuple[str, ...]]] = {"token_cosine": ()}

    def __init__(self, skip: int = 0, **options: object):
        super().__init__(**options)
        if skip < 0:
            raise MeasureError(f"skip={skip}: a number of tokens, 0 or more")
        self.skip = skip

    def site_statistics(self, x: Tensor, mask: Tensor | None = None, tokens: Tensor | None = None) -> dict[str, Tensor]:
        """sequences with two tokens or more, and the sum of their mean cosines; both ()."""
        kept = real_tokens(x, mask)
        length_BT = token_norms(x, mask)
        counts_BT = length_BT > 0
        if self.skip:
            at_BT = torch.arange(x.shape[1], device=x.device) if mask is None else mask.long().cumsum(-1) - 1
            counts_BT = counts_BT & (at_BT >= self.skip)
        weight_BT = torch.where(counts_BT, length_BT.where(counts_BT, 1.0).reciprocal(), 0.0)
        total_BU = torch.bmm(weight_BT[:, None], kept.x)[:, 0]
        n_B = double(counts_BT.sum(-1))
        enough_B = n_B > 1
        cosine_B = (double(total_BU).square().sum(-1) - n_B) / (n_B * (n_B - 1)).clamp_min(1)
        return {"sequences": enough_B.sum(), "cosine": cosine_B.where(enough_B, 0.0).sum()}

    def values(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See the class."""
        return {"token_cosine": ratio(stats["cosine"], stats["sequences"])}


class RepetitionFrequency(OfNextToken):
    r"""How often two outputs in a row are the same, beside how often the text itself repeats.

    - ``repetition``: share of neighbouring positions with :math:`\hat y_t = \hat y_{t+1}`, :math:`\hat y_t` the token
      with the largest logit at t. Each prediction is made after the *true* tokens before it (teacher-forced); for
      tokens that a model generated, use `repetition`.
    - ``repetition_of_data``: share of neighbouring tokens of the input that are the same, over the same positions
      moved on by one

    Over neighbours that are both real and not before position `start`; positions with a NaN or an infinite largest
    logit are left out.

    Args:
        start: where the outputs begin, counted from the first real token.

    Shapes: x (\*stack, batch, pos, vocab); tokens (batch, pos) ids of the input, not shifted; values (\*stack).

    Source: Gopalani and Hu 2025, What Happens During the Loss Plateau? (repetition bias).

    Example:
        >>> repeats = RepetitionFrequency()
        >>> repeats.update(torch.eye(4)[torch.tensor([[1, 1, 2, 3]])], tokens=torch.tensor([[0, 1, 2, 2]]))
        >>> {name: round(float(value), 3) for name, value in repeats.compute().items()}
        {'repetition': 0.333, 'repetition_of_data': 0.5}
    """

    reductions: ClassVar[dict[str, Reduction]] = {
        "pairs": "sum",
        "repeats": "sum",
        "data_pairs": "sum",
        "data_repeats": "sum",
    }
    value_dims: ClassVar[dict[str, tuple[str, ...]]] = {"repetition": (), "repetition_of_data": ()}

    def __init__(self, start: int = 0, **options: object):
        super().__init__(**options)
        if start < 0:
            raise MeasureError(f"start={start}: the first position that counts, 0 or more")
        self.start = start

    def site_statistics(self, x: Tensor, mask: Tensor | None = None, tokens: Tensor | None = None) -> dict[str, Tensor]:
        """Counts of neighbours and of those that are the same, of predictions and of data; all ()."""
        tokens, real_BT = self._read(x, mask, tokens)
        outputs_BT = real_BT & (real_BT.long().cumsum(-1) - 1 >= self.start)
        # The maximum of a row is NaN when one of its entries is; some words may be ruled out by -inf.
        largest_BT, choice_BT = shared("choice", x, None, lambda: tuple(x.max(-1)))
        repeats, pairs = _neighbours(choice_BT, outputs_BT & largest_BT.isfinite())
        # A prediction at t is of the token at t + 1.
        targets_BT = real_BT & (real_BT.long().cumsum(-1) - 1 >= self.start + 1)
        data_repeats, data_pairs = _neighbours(tokens, targets_BT)
        return {"pairs": pairs, "repeats": repeats, "data_pairs": data_pairs, "data_repeats": data_repeats}

    def values(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See the class."""
        return {
            "repetition": ratio(stats["repeats"], stats["pairs"]),
            "repetition_of_data": ratio(stats["data_repeats"], stats["data_pairs"]),
        }


class AttentionProgress(Measure):
    r"""How much of a head's attention is on the entries that the task needs.

    ``attention_progress``: :math:`\sum_{ij} m_{ij} |A_{ij}| / \sum_{ij} |A_{ij}|`, both sums over sequences and over
    the queries i that need any key; :math:`|A|`, since linear attention has entries of either sign. For softmax
    attention this is the mean weight on the needed keys.

    Padding and queries with a non-finite entry in any head are left out.

    Args:
        target: (query, key) bool, the needed entries m; all texts have the length that it has.

    Shapes: x (\*stack, batch, head, query, key); value (\*stack, head).

    Source: Gopalani and Hu 2025, What Happens During the Loss Plateau? (attention progress).

    Example:
        >>> needs = torch.tensor([[False, False], [True, False]])
        >>> progress = AttentionProgress(needs)
        >>> progress.update(torch.tensor([[[[1.0, 0.0], [0.75, -0.25]]]]))
        >>> progress.compute()["attention_progress"].tolist()
        [0.75]
    """

    layout = "pattern"
    reductions: ClassVar[dict[str, Reduction]] = {"needed": "sum", "everything": "sum"}
    value_dims: ClassVar[dict[str, tuple[str, ...]]] = {"attention_progress": ("head",)}

    def __init__(self, target: Tensor, **options: object):
        super().__init__(**options)
        if target.ndim != 2 or target.dtype != torch.bool or not bool(target.any()):
            raise MeasureError(
                f"target is (query, key) bool with at least one entry, not {target.dtype} {tuple(target.shape)}"
            )
        self.target = target

    def site_statistics(self, x: Tensor, mask: Tensor | None = None, tokens: Tensor | None = None) -> dict[str, Tensor]:
        """needed, everything: (head), sums of magnitudes."""
        if x.shape[-2:] != self.target.shape:
            raise MeasureError(
                f"the target is {tuple(self.target.shape)} (query, key) and the pattern {tuple(x.shape[-2:])}"
            )
        target = self.target.to(x.device)
        weight = wide(x).abs()
        counts_BQ = target.any(-1).expand(len(x), -1)
        if mask is not None:
            weight = weight.masked_fill(~mask[:, None, None, :], 0.0)
            counts_BQ = counts_BQ & mask[:, mask.shape[1] - x.shape[2] :]
        finite_BQ = weight.isfinite().all(-1).all(1)
        weight = weight.masked_fill(~(counts_BQ & finite_BQ)[:, None, :, None], 0.0)
        return {
            "needed": double((weight * target).sum((-1, -2))).sum(0),
            "everything": double(weight.sum((-1, -2))).sum(0),
        }

    def values(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See the class."""
        return {"attention_progress": ratio(stats["needed"], stats["everything"])}


def repetition(ids_BT: Tensor, mask_BT: Tensor | None = None) -> float:
    """Share of neighbouring tokens that are the same, such as of what a model generated; NaN without neighbours.

    >>> repetition(torch.tensor([[3, 3, 1, 2]]))
    0.3333333333333333
    """
    if ids_BT.ndim != 2:
        raise MeasureError(f"repetition takes token ids (batch, pos), not {tuple(ids_BT.shape)}")
    real_BT = torch.ones_like(ids_BT, dtype=torch.bool) if mask_BT is None else mask_BT
    repeats, pairs = _neighbours(ids_BT, real_BT)
    return float(ratio(repeats, pairs))


def ngram_repetition(ids_BT: Tensor, n: int = 4) -> Tensor:
    """Share of each row's n-grams that stood in the row before, (B): near 0 for good text, near 1 for a loop.

    Args:
        ids_BT: what was generated, the same length in every row.
        n: length of the n-grams; of shorter rows as many tokens as there are.

    Source: Welleck et al. 2020, Neural Text Generation with Unlikelihood Training, section 6.1 (seq-rep-n).

    >>> ngram_repetition(torch.tensor([[1, 2, 1, 2, 1, 2], [1, 2, 3, 4, 5, 6]]), n=2)
    tensor([0.6000, 0.0000], dtype=torch.float64)
    """
    if ids_BT.ndim != 2 or n < 1:
        raise MeasureError(f"ngram_repetition takes token ids (batch, pos) and n >= 1, not {tuple(ids_BT.shape)}, {n}")
    length = ids_BT.shape[1]
    if not length:
        return torch.full((len(ids_BT),), float("nan"), dtype=torch.float64)
    grams = ids_BT.cpu().unfold(1, min(n, length), 1)
    unique = [len(torch.unique(row, dim=0)) for row in grams]
    return 1 - torch.tensor(unique, dtype=torch.float64) / grams.shape[1]


def _neighbours(ids_BT: Tensor, counts_BT: Tensor) -> tuple[Tensor, Tensor]:
    both = counts_BT[:, 1:] & counts_BT[:, :-1]
    return (both & (ids_BT[:, 1:] == ids_BT[:, :-1])).sum(), both.sum()
