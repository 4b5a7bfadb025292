"""What of the final residual stream each step of a model wrote, and how the stream turns on its way there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..core.errors import MeasureError
from ..core.measure import Measure, Reduction, double, ratio, real_tokens
from .sampling import every_nth


class Contribution(Measure):
    r"""How much each step adds to the final residual stream, in the direction in which that ends up.

    For the states :math:`h_0, \ldots, h_L` of one residual stream at the sites of a list in forward order, means over
    tokens of

    - ``contribution``: :math:`\langle h_l - h_{l-1}, h_L \rangle / \lVert h_L \rVert^2`, and
      :math:`\langle h_0, h_L \rangle / \lVert h_L \rVert^2` at the first site: they add up to one. A negative one
      writes against the outcome, one above 1 writes what later steps take back.
    - ``cosine_first``: :math:`\cos(h_l, h_0)`; ``cosine_last``: :math:`\cos(h_l, h_L)`: how far the stream has turned
      away from where it began, and how near it is to where it ends

    A step is a block for the sites ``("blocks.0.resid.pre", "blocks.*.resid.post")``, attention and MLP by turns for
    ``("blocks.0.resid.pre", "blocks.*.resid.{mid,post}")``. Tokens that are not finite at some site, or zero where it
    is divided by, are left out everywhere.

    Args:
        every: take every k-th position only. The final state has to be known before the first step can be judged, so
            the states of a batch are held until its forward ends; this divides that memory, and the time, by k.
            Counted from each row's first real token.

    Shapes: sites (batch, pos, unit), all of one width, at least two; every value (site).

    Source: projection of a term on the sum, Mickus, Paperno and Constant 2022, How to Dissect a Muppet.

    Example:
        >>> contribution = Contribution()
        >>> h = torch.tensor([[[1.0, 0.0]], [[1.0, 1.0]], [[2.0, 1.0]]])[:, None]
        >>> contribution.update(h)
        >>> [round(one, 3) for one in contribution.compute()["contribution"].tolist()]
        [0.4, 0.2, 0.4]
    """

    layout = "sites"
    reductions: ClassVar[dict[str, Reduction]] = {
        "tokens": "sum",
        "contribution": "sum",
        "cosine_first": "sum",
        "cosine_last": "sum",
    }
    value_dims: ClassVar[dict[str, tuple[str, ...]]] = {"contribution": (), "cosine_first": (), "cosine_last": ()}

    def __init__(self, every: int = 1, **options: object):
        super().__init__(**options)
        if every < 1:
            raise MeasureError(f"every={every}; 1 takes every position, 2 every other")
        self.every = every

    def prepare(self, x: Tensor, previous: Tensor | None, mask: Tensor | None = None) -> Tensor:
        """Every k-th position, (batch, pos / every, unit)."""
        # A slice that is kept would keep the whole tensor.
        return x.detach() if self.every == 1 else every_nth(x.detach(), mask, self.every).clone()

    def site_statistics(
        self, x: Sequence[Tensor], mask: Tensor | None = None, tokens: Tensor | None = None
    ) -> dict[str, Tensor]:
        """tokens: (site), all the same; contribution, cosine_first, cosine_last: sums over them, (site)."""
        shapes = {tuple(one.shape) for one in x}
        if len(x) < 2 or len(shapes) > 1:
            raise MeasureError(
                f"Contribution compares at least two sites of one residual stream, and was given {len(x)} of the "
                f"shapes {sorted(shapes)}"
            )
        if mask is not None:
            mask = every_nth(mask, mask, self.every)
        found = [real_tokens(one, mask) for one in x]
        keep = torch.ones(x[0].shape[:2], dtype=torch.bool, device=x[0].device) if mask is None else mask
        for one in found:
            keep = keep if one.keep is None else keep & one.keep
        states = [one.x for one in found]
        norms = [torch.linalg.vector_norm(h, dim=-1) for h in states]
        for norm in norms:
            keep = keep & (norm > 0)
        first, last = states[0], states[-1]
        sums: dict[str, list[Tensor]] = {name: [] for name in self.value_dims}
        before: Tensor | None = None
        for h, norm in zip(states, norms, strict=True):
            # By the difference itself: from two products a small step would be rounded away.
            step = h if before is None else h - before
            before = h
            parts = {
                "contribution": (step * last).sum(-1) / norms[-1].square(),
                "cosine_first": ((h * first).sum(-1) / (norm * norms[0])).clamp(-1, 1),
                "cosine_last": ((h * last).sum(-1) / (norm * norms[-1])).clamp(-1, 1),
            }
            for name, of in parts.items():
                sums[name].append(double(of.where(keep, 0.0)).sum())
        count = keep.sum().expand(len(x)).clone()
        return {"tokens": count, **{name: torch.stack(parts) for name, parts in sums.items()}}

    def values(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See the class."""
        return {name: ratio(stats[name], stats["tokens"]) for name in self.value_dims}
