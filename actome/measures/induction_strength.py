"""Heads that do induction where the answer is known: prompts of labelled exemplars and a query."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from ..core.errors import MeasureError
from ..core.measure import Measure, Reduction, double, ratio
from .attention import _real_queries


class InductionStrength(Measure):
    r"""How much a head does of induction, on prompts :math:`x_1, \ell_1, \dots, x_N, \ell_N, q` with known matches.

    - ``induction_strength``: attention from the query to the labels beside exemplars of its own class, minus that to
      the other labels; 1 for a perfect induction head, 0 for one that cannot tell them apart. Over prompts that have
      a match
    - ``label_attention``: attention from the query to any label
    - ``exemplar_attention``: mean attention from a label to the exemplar before it, the previous-token strength; over
      all labels of all prompts

    For repeated tokens, where the tokens themselves say what matches, see `InductionScore`.

    Shapes: `update` takes x (\*stack, batch, head, query, key) with 2 N + 1 queries and keys, and ``copies`` (batch, N)
    bool, which of the pairs have the class of the query. Values (\*stack, head). Weights of linear attention are taken
    with their signs. A prompt with a non-finite weight at one of these queries in any head is left out there.

    Raises:
        MeasureError: no copies, copies of another shape, or padding: prompts have one length.

    Source: Singh et al. 2024, What needs to go right for an induction head? (induction strength and previous-token
    strength); Reddy 2024, The mechanistic basis of data dependence and abrupt learning (progress measures).

    Example:
        >>> pattern = torch.eye(5)[None, None].clone()
        >>> pattern[0, 0, 4] = torch.tensor([0.0, 0.7, 0.1, 0.2, 0.0])  # the query, between the labels at 1 and 3
        >>> strength = InductionStrength()
        >>> strength.update(pattern, copies=torch.tensor([[True, False]]))
        >>> round(float(strength.compute()["induction_strength"]), 4)
        0.5
    """

    layout = "pattern"
    reductions: ClassVar[dict[str, Reduction]] = {
        "prompts": "sum",
        "matched": "sum",
        "strength": "sum",
        "on_labels": "sum",
        "labels": "sum",
        "on_exemplars": "sum",
    }
    value_dims: ClassVar[dict[str, tuple[str, ...]]] = {
        "induction_strength": ("head",),
        "label_attention": ("head",),
        "exemplar_attention": ("head",),
    }

    def __init__(self, **options: object):
        super().__init__(**options)
        self._copies: Tensor | None = None

    def update(
        self, x: Tensor, mask: Tensor | None = None, tokens: Tensor | None = None, copies: Tensor | None = None
    ) -> None:
        """Folds one batch of patterns with the matches of its prompts; see the class."""
        self._copies = copies
        try:
            super().update(x, mask, tokens)
        finally:
            self._copies = None

    def site_statistics(self, x: Tensor, mask: Tensor | None = None, tokens: Tensor | None = None) -> dict[str, Tensor]:
        """prompts, matched (prompts with a match), labels: (); attention summed over them: (head)."""
        copies_BN = self._checked(x, mask)
        kept = _real_queries(x, None)
        query_B, labels_BN = kept.queries[:, -1], kept.queries[:, 1::2]
        on_labels_BHN = kept.pattern[:, :, -1, 1::2]
        sign_BN = torch.where(copies_BN, 1.0, -1.0).to(kept.pattern.dtype)
        matched_B = query_B & copies_BN.any(-1)
        strength_BH = double(on_labels_BHN * sign_BN[:, None]).sum(-1)
        on_exemplars_BHN = kept.pattern.diagonal(-1, -2, -1)[..., ::2]
        return {
            "prompts": query_B.sum(),
            "matched": matched_B.sum(),
            "strength": strength_BH.mul(matched_B[:, None]).sum(0),
            "on_labels": double(on_labels_BHN).sum(-1).mul(query_B[:, None]).sum(0),
            "labels": labels_BN.sum(),
            "on_exemplars": double(on_exemplars_BHN).mul(labels_BN[:, None]).sum((0, 2)),
        }

    def _checked(self, x: Tensor, mask: Tensor | None) -> Tensor:
        copies, (batch, _, queries, keys) = self._copies, x.shape
        if queries != keys or queries % 2 == 0 or queries < 3:
            raise MeasureError(
                f"a prompt of N pairs and a query has 2 N + 1 queries and keys, and the pattern {(queries, keys)}"
            )
        if copies is None or copies.dtype != torch.bool or tuple(copies.shape) != (batch, queries // 2):
            given = "none" if copies is None else f"{copies.dtype} {tuple(copies.shape)}"
            raise MeasureError(
                f"InductionStrength needs update(..., copies=matches), bools of the shape {(batch, queries // 2)}: "
                f"which pairs have the class of the query; given was {given}"
            )
        if mask is not None and not bool(mask.all()):
            raise MeasureError("InductionStrength reads prompts of one length, and some of these are padded")
        return copies.to(x.device)

    def values(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See the class."""
        return {
            "induction_strength": ratio(stats["strength"], stats["matched"][..., None]),
            "label_attention": ratio(stats["on_labels"], stats["prompts"][..., None]),
            "exemplar_attention": ratio(stats["on_exemplars"], stats["labels"][..., None]),
        }
