"""How large attention logits get: what comes before an attention that sees one key only, and a diverging run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from ..core.measure import Measure, Reduction, double, wide


class AttentionLogitMax(Measure):
    r"""The largest attention logit of each head: what enters the softmax, scaled and masked.

    - ``attention_logit_max``: :math:`\max_{b,i,j} q_i \cdot k_j / \sqrt{d}` over the real queries i and keys j of all
      sequences

    A query with a NaN or +inf among its logits in any head is left out; masked entries (-inf, or the lowest number of
    the dtype) are never the largest. NaN where no query is left.

    Shapes: x (\*stack, batch, head, query, key), the site ``attn.scores``; mask (batch, key); value (\*stack, head).

    Source: Wortsman et al. 2024, Small-scale proxies for large-scale Transformer training instabilities, section 3.1,
    where runs became unstable once it had grown past about 10^4.

    Example:
        >>> scores = torch.tensor([[[[1.0, -torch.inf], [5.0, 2.0]]]])
        >>> logits = AttentionLogitMax()
        >>> logits.update(scores)
        >>> logits.compute()["attention_logit_max"].tolist()
        [5.0]
    """

    layout = "pattern"
    reductions: ClassVar[dict[str, Reduction]] = {"peak": "max"}
    value_dims: ClassVar[dict[str, tuple[str, ...]]] = {"attention_logit_max": ("head",)}

    def site_statistics(self, x: Tensor, mask: Tensor | None = None, tokens: Tensor | None = None) -> dict[str, Tensor]:
        """peak: (head), -inf where nothing counts."""
        scores = wide(x)
        if mask is not None:
            # With a cache there are more keys than queries, and the queries are the last.
            queries_BQ = mask[:, mask.shape[1] - x.shape[2] :]
            scores = scores.masked_fill(~(queries_BQ[:, None, :, None] & mask[:, None, None, :]), -torch.inf)
        largest_BHQ = scores.amax(-1)
        if not math.isfinite(largest_BHQ.amax()):
            lost_BQ = (largest_BHQ.isnan() | (largest_BHQ == torch.inf)).any(1)
            largest_BHQ = largest_BHQ.masked_fill(lost_BQ[:, None], -torch.inf)
        return {"peak": double(largest_BHQ.amax(-1).amax(0))}

    def values(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See the class."""
        # Where every key of every query is masked, what is left is the mask's own number.
        seen = stats["peak"] > torch.finfo(torch.float16).min
        return {"attention_logit_max": stats["peak"].where(seen, torch.nan)}
