"""Layers that do nothing for a token: voids, told by how little the norm of the residual stream grows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from ..core.errors import MeasureError
from ..core.measure import Measure, Reduction, all_norms, ratio


class Voids(Measure):
    r"""How often each layer is used, a layer being a void for a token that it hardly lengthens.

    With :math:`n_l` the norm of a token's residual stream after layer *l* (:math:`n_0` before the first) and
    :math:`D_l = n_l - n_{l-1}`, layer *l* is a void for the token when

    .. math:: D_l < \alpha \, (\max_{j<l} D_j - \min_{j<l} D_j)

    where only layers that the token has already passed count, so that the rule could decide whether to go on. Before
    there are two earlier layers the right side is 0.

    - ``used``: for each layer the share of tokens for which it is no void; NaN at the stream before the first layer

    Over real tokens; those with a non-finite norm at any layer are left out.

    Args:
        alpha: :math:`\alpha`, 0.8 by default; the larger, the more layers are voids.

    Shapes: sites are the stream before the first layer and after each of them, in order, as in
    ``("blocks.0.resid.pre", "blocks.*.resid.post")``; used (layer + 1).

    Source: Shemiranifar 2025, Void in Language Models (L2 Adaptive Computation), with the threshold of its released
    code.

    Example:
        >>> import actome as ac
        >>> sites = ("blocks.0.resid.pre", "blocks.*.resid.post")
        >>> table = ac.demo().measure("The value of the expression", {sites: Voids()})
        >>> bool(((table.value("used")[1:] >= 0) & (table.value("used")[1:] <= 1)).all())
        True
    """

    layout = "depth"
    reductions: ClassVar[dict[str, Reduction]] = {"tokens": "sum", "used": "sum"}
    value_dims: ClassVar[dict[str, tuple[str, ...]]] = {"used": ()}

    def __init__(self, alpha: float = 0.8, **options: object):
        super().__init__(**options)
        if not alpha >= 0:
            raise MeasureError(f"alpha={alpha}: a share of the spread of the growth of norms, 0 or more")
        self.alpha = alpha

    def prepare(self, x: Tensor, previous: Tensor | None, mask: Tensor | None = None) -> Tensor:
        """The norms of the tokens, (1, batch, pos), in float32 or better."""
        return all_norms(x)[None]

    def statistics(self, x: Tensor, mask: Tensor | None = None, tokens: Tensor | None = None) -> dict[str, Tensor]:
        """tokens: (layer + 1) and used: (layer + 1), counts; from norms (layer + 1, 1, batch, pos)."""
        norms_LBT = x[:, 0]
        keep_BT = norms_LBT.isfinite().all(0)
        if mask is not None:
            keep_BT = keep_BT & mask
        used_LBT = ~void_layers(norms_LBT, self.alpha) & keep_BT
        count = keep_BT.sum().expand(len(x)).clone()
        return {"tokens": count, "used": torch.cat([torch.zeros_like(count[:1]), used_LBT.flatten(1).sum(1)])}

    def values(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See the class."""
        used = ratio(stats["used"], stats["tokens"])
        used[..., 0] = torch.nan
        return {"used": used}


def void_layers(norms_LBT: Tensor, alpha: float) -> Tensor:
    """Which layers are voids for which tokens.

    Args:
        norms_LBT: (layer + 1, ...) norms of the residual stream, the one before the first layer in front.
        alpha: as in `Voids`.

    Returns:
        (layer, ...) bool.

    >>> void_layers(torch.tensor([1.0, 3.0, 2.0, 3.0, 6.0]), 0.5).tolist()
    [False, True, True, False]
    """
    growth = norms_LBT.diff(dim=0)
    spread = growth.cummax(0).values - growth.cummin(0).values
    threshold = alpha * torch.cat([torch.zeros_like(spread[:1]), spread[:-1]])
    return growth < threshold
