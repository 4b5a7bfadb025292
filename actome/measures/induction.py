"""Heads that look back one token, and heads that look for what followed the last time: the parts of induction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from ..core.errors import MeasureError
from ..core.measure import Measure, Reduction, double, ratio
from .attention import _real_queries


class InductionScore(Measure):
    r"""How much a head attends to the token before, and to the one that followed the last occurrence of this token.

    For a pattern A and the tokens w that were read:

    - ``previous_token``: mean of :math:`A_{i,i-1}` over the real queries that have a token before them
    - ``induction``: mean of :math:`A_{i,j+1}` over the queries i whose token occurred before, j its last occurrence
      (:math:`w_j = w_i`, :math:`j + 1 < i`); the *prefix matching* score

    Meant for random tokens that are repeated: in ordinary text what follows the last occurrence is often near, and
    attended to for other reasons. A uniform head scores about the mean of 1 / (i + 1) in both. NaN where no query
    counts, as for ``induction`` in a text without a repeated token.

    Shapes: x (\*stack, batch, head, query, key) with as many queries as keys; tokens (batch, key); mask (batch, key);
    both values (\*stack, head). A query with a non-finite weight in any head is left out.

    Raises:
        MeasureError: no tokens, or fewer queries than keys.

    Source: Olsson et al. 2022, In-context Learning and Induction Heads, appendix (prefix matching and previous-token
    scores on repeated random tokens).

    Example:
        >>> tokens = torch.tensor([[5, 6, 5]])
        >>> pattern = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.1, 0.8, 0.1]])[None, None]
        >>> score = InductionScore()
        >>> score.update(pattern, None, tokens)
        >>> {name: round(float(value), 2) for name, value in score.compute().items()}
        {'previous_token': 0.65, 'induction': 0.8}
    """

    layout = "pattern"
    reductions: ClassVar[dict[str, Reduction]] = {"behind": "sum", "previous": "sum", "repeated": "sum", "found": "sum"}
    value_dims: ClassVar[dict[str, tuple[str, ...]]] = {"previous_token": ("head",), "induction": ("head",)}

    def site_statistics(self, x: Tensor, mask: Tensor | None = None, tokens: Tensor | None = None) -> dict[str, Tensor]:
        """behind, repeated: counts of queries (); previous, found: (head), attention summed over them."""
        if tokens is None or x.shape[-1] != x.shape[-2] or tuple(tokens.shape) != (x.shape[0], x.shape[-1]):
            raise MeasureError(
                f"InductionScore reads a pattern (batch, head, pos, pos) with its tokens (batch, pos), not "
                f"{tuple(x.shape)} with {'none' if tokens is None else tuple(tokens.shape)}"
            )
        kept = _real_queries(x, mask)
        real_BT = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        behind_BQ = kept.queries & torch.nn.functional.pad(real_BT[:, :-1], (1, 0))
        previous_BHQ = torch.nn.functional.pad(kept.pattern.diagonal(-1, -2, -1), (1, 0))
        # The last earlier occurrence, whose successor still lies before the query: j + 1 < i.
        same_BQS = (tokens[:, :, None] == tokens[:, None, :]) & real_BT[:, None, :]
        same_BQS = same_BQS.tril(-2)
        place_S = torch.arange(1, x.shape[-1] + 1, device=x.device)
        last_BQ = (same_BQS * place_S).amax(-1)  # 1 + j, which is where the successor stands; 0 for none
        repeats_BQ = kept.queries & (last_BQ > 0)
        at_BHQ1 = last_BQ[:, None, :, None].expand(*x.shape[:3], 1)
        found_BHQ = kept.pattern.gather(-1, at_BHQ1)[..., 0]
        return {
            "behind": behind_BQ.sum(),
            "previous": double(previous_BHQ).mul(behind_BQ[:, None]).sum((0, 2)),
            "repeated": repeats_BQ.sum(),
            "found": double(found_BHQ).mul(repeats_BQ[:, None]).sum((0, 2)),
        }

    def values(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See the class."""
        return {
            "previous_token": ratio(stats["previous"], stats["behind"][..., None]),
            "induction": ratio(stats["found"], stats["repeated"][..., None]),
        }
