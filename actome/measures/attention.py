"""Where attention goes: sinks, and how widely it spreads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from ..core.errors import MeasureError
from ..core.measure import Measure, Reduction, double, ratio, shared, wide

# Weights whose logarithms stay in a core's cache; all at once on an accelerator.
_CHUNK = 1 << 17
# Below it a weight times its logarithm is 0 next to the entropy of any query.
_LEAST = 1e-30


class SinkScore(Measure):
    r"""Attention to the first token, beyond what uniform attention would give it.

    For a pattern A of T real tokens, per sequence and head:
    :math:`\alpha_0 = \frac{1}{T} \sum_{i=0}^{T-1} A_{i0}`, averaged over the queries that are real. Uniform attention
    over the keys that each query can see also gives the first token a share, :math:`\frac{1}{T} \sum_i 1/(i+1) \approx
    \ln T / T` if causal, which is subtracted.

    - ``sink``: mean over sequences of :math:`\alpha_0`
    - ``sink_excess``: mean of :math:`\alpha_0` minus the share under uniform attention
    - ``sink_rate``: share of sequences whose excess is above :math:`\epsilon`; averaged over heads and layers this is
      :math:`\mathrm{Sink}_0^\epsilon`

    A query with a non-finite weight in any head is left out of its sequence. Keys that a query can see are those that
    any head gives a weight to, so causal, windowed and bidirectional attention are told apart by the pattern itself.

    Args:
        eps: :math:`\epsilon`, 0.3 by default; 0.2 suits models of one or two layers.
        baseline: ``"uniform"``, or ``None`` for the rate of the paper's released code, which subtracts nothing.

    Shapes: x (\*stack, batch, head, query, key), rows summing to one; mask (batch, key); every value (\*stack, head).
    The first token is the first real one of each row.

    Source: Gu et al. 2025, When Attention Sink Emerges in Language Models, section 3.2.

    Example:
        >>> pattern = torch.eye(4).expand(1, 2, 4, 4).clone()
        >>> pattern[0, 1] = torch.tensor([1.0, 0.0, 0.0, 0.0])
        >>> sinks = SinkScore()
        >>> sinks.update(pattern)
        >>> sinks.compute()["sink"].tolist()
        [0.25, 1.0]
    """

    layout = "pattern"
    reductions: ClassVar[dict[str, Reduction]] = {"sequences": "sum", "alpha": "sum", "excess": "sum", "sinks": "sum"}
    value_dims: ClassVar[dict[str, tuple[str, ...]]] = {
        "sink": ("head",),
        "sink_excess": ("head",),
        "sink_rate": ("head",),
    }

    def __init__(self, eps: float = 0.3, baseline: Literal["uniform"] | None = "uniform", **options: object):
        super().__init__(**options)
        if baseline not in ("uniform", None) or not 0 <= eps <= 1:
            raise MeasureError(f"eps={eps}, baseline={baseline!r}: a share of attention, and 'uniform' or None")
        self.eps = eps
        self.baseline = baseline

    def site_statistics(self, x: Tensor, mask: Tensor | None = None, tokens: Tensor | None = None) -> dict[str, Tensor]:
        """sequences: (); alpha, excess and sinks (sequences above eps): (head)."""
        kept = _real_queries(x, mask)
        visible_BQS = kept.visible
        if mask is None:
            first_BHQ, sees_BQ = kept.pattern[..., 0], visible_BQS[..., 0]
        else:
            at = mask.long().argmax(-1)[:, None, None]
            first_BHQ = kept.pattern.gather(-1, at[..., None].expand(*x.shape[:3], 1))[..., 0]
            sees_BQ = visible_BQS.gather(-1, at.expand(*visible_BQS.shape[:2], 1))[..., 0]
        uniform_BQ = sees_BQ / visible_BQS.sum(-1).clamp_min(1)
        queries_B = kept.queries.sum(-1)
        alpha_BH = double(first_BHQ).sum(-1) / queries_B[:, None].clamp_min(1)
        excess_BH = alpha_BH - (double(uniform_BQ).sum(-1) / queries_B.clamp_min(1))[:, None]
        seen_B1 = (queries_B > 0)[:, None]
        return {
            "sequences": seen_B1.sum(),
            "alpha": alpha_BH.sum(0),
            "excess": excess_BH.sum(0),
            "sinks": (((excess_BH if self.baseline else alpha_BH) > self.eps) & seen_B1).sum(0),
        }

    def values(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See the class."""
        sequences = stats["sequences"][..., None]
        return {
            "sink": ratio(stats["alpha"], sequences),
            "sink_excess": ratio(stats["excess"], sequences),
            "sink_rate": ratio(stats["sinks"], sequences),
        }


class AttentionEntropy(Measure):
    r"""How widely a head spreads its attention: 0 for one key, 1 for all visible keys alike.

    ``attention_entropy``: :math:`-\sum_j A_{ij} \ln A_{ij} / \ln n_i`, :math:`n_i` the number of keys that query i can
    see, averaged over the real queries that see two or more. Visible keys and non-finite weights are treated as in
    `SinkScore`. Rows that do not sum to one (attention with a sink logit, sigmoid attention) are taken as they are.

    Shapes: x (\*stack, batch, head, query, key); mask (batch, key); value (\*stack, head).

    Source: entropy of attention as in Ghader and Monz 2017; normalised so that early queries, which see few keys, and
    texts of different lengths compare.

    Example:
        >>> entropy = AttentionEntropy()
        >>> entropy.update(torch.full((1, 1, 3, 3), 1 / 3))
        >>> round(float(entropy.compute()["attention_entropy"]), 6)
        1.0
    """

    layout = "pattern"
    reductions: ClassVar[dict[str, Reduction]] = {"queries": "sum", "entropy": "sum"}
    value_dims: ClassVar[dict[str, tuple[str, ...]]] = {"attention_entropy": ("head",)}

    def site_statistics(self, x: Tensor, mask: Tensor | None = None, tokens: Tensor | None = None) -> dict[str, Tensor]:
        """queries: () with two visible keys or more; entropy: (head), summed over them."""
        kept = _real_queries(x, mask)
        visible_BQS = kept.visible
        count_BQ = visible_BQS.sum(-1)
        weight_BQ = torch.where(count_BQ > 1, count_BQ.double().log().reciprocal(), 0.0).to(kept.pattern.dtype)
        return {
            "queries": ((count_BQ > 1) & kept.queries).sum(),
            "entropy": double(torch.einsum("bhq,bq->h", _entropy(kept.pattern, visible_BQS), weight_BQ)),
        }

    def values(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See the class."""
        return {"attention_entropy": ratio(stats["entropy"], stats["queries"][..., None])}


class _Pattern(NamedTuple):
    pattern: Tensor  # (batch, head, query, key), zero at padding and at queries left out
    queries: Tensor  # (batch, query) bool, those that count
    visible: Tensor  # (batch, query, key) bool, the keys that a query sees


def _real_queries(pattern_BHQS: Tensor, mask_BS: Tensor | None) -> _Pattern:
    return shared("queries", pattern_BHQS, mask_BS, lambda: _read(pattern_BHQS, mask_BS))


def _read(pattern_BHQS: Tensor, mask_BS: Tensor | None) -> _Pattern:
    pattern = wide(pattern_BHQS)
    if mask_BS is None:
        queries = torch.ones(pattern.shape[0], pattern.shape[2], dtype=torch.bool, device=pattern.device)
    else:
        # With a cache there are more keys than queries, and the queries are the last.
        queries = mask_BS[:, mask_BS.shape[1] - pattern.shape[2] :]
        pattern = pattern.masked_fill(~(queries[:, None, :, None] & mask_BS[:, None, None, :]), 0.0)
    if not math.isfinite(pattern.sum()):
        finite = pattern.isfinite().all(-1).all(1)
        queries = queries & finite
        pattern = pattern.masked_fill(~queries[:, None, :, None], 0.0)
    # One head may round a key's weight down to zero; all heads of a site see the same keys.
    return _Pattern(pattern, queries, pattern.amax(1) > 0)


def _entropy(pattern_BHQS: Tensor, visible_BQS: Tensor) -> Tensor:
    """-sum A ln A over keys, (batch, head, query), by blocks of queries that leave out the keys after them."""
    batch, heads, queries, keys = pattern_BHQS.shape
    if pattern_BHQS.device.type != "cpu":
        return torch.special.entr(pattern_BHQS).sum(-1)
    last_Q = (visible_BQS.any(0) * torch.arange(1, keys + 1)).amax(-1).tolist()
    rows = max(1, _CHUNK // (batch * heads * keys))
    out = pattern_BHQS.new_empty(batch, heads, queries)
    room = pattern_BHQS.new_empty(batch * heads * min(rows, queries) * keys)
    for at in range(0, queries, rows):
        block = pattern_BHQS[:, :, at : at + rows, : max(last_Q[at : at + rows])]
        if block.numel() and not block.amin() >= 0:
            out[:, :, at : at + rows] = torch.special.entr(block).sum(-1)
            continue
        # Logarithms of 0 are slow; the least weight that is told from 0 makes 0 of it all the same.
        logs = torch.clamp_min(block, _LEAST, out=room[: block.numel()].view(block.shape)).log_()
        torch.sum(logs.mul_(block), -1, out=out[:, :, at : at + rows]).neg_()
    return out
