"""How abruptly the residual stream moves from block to block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from ..core.measure import Reduction, ratio
from .depth import Movement


class Stiffness(Movement):
    r"""Neural stiffness index over depth: blocks read as Euler steps of size 1.

    For the states :math:`x_l` at the sites of a list in forward order, per real token :math:`NSI_l = \lVert x_l -
    x_{l-1} \rVert / \lVert x_{l-1} \rVert`:

    - ``stiffness``: its mean over tokens; NaN at the first site
    - ``stiffness_deviation``: its standard deviation over tokens; NaN at the first site
    - ``stiffness_variation``: mean of the total variation up to here, :math:`\sum_{k \le l} |NSI_k - NSI_{k-1}|`; the
      last site has that of the whole depth. 0 until there are two steps

    The total variation is taken token by token before the mean, so steps that are abrupt at different depths for
    different tokens do not cancel. A token that is not finite at any site, or zero at one that another follows, is left
    out at all of them. States must be those of one stream, before any norm that takes the scale away.

    Shapes: as `Movement`; every value (layer).

    Source: Huang et al. 2023, Understanding Self-attention Mechanism via Dynamical System Perspective; the
    normalisation of the index is reconstructed.

    Example:
        >>> stiffness = Stiffness()
        >>> x = torch.tensor([3.0, 4.0]).expand(1, 2, 2)
        >>> stiffness.update(torch.stack([x, 2 * x, 2 * x, 3 * x]))
        >>> values = stiffness.compute()
        >>> values["stiffness"].tolist(), values["stiffness_variation"].tolist()
        ([nan, 1.0, 0.0, 0.5], [0.0, 0.0, 1.0, 1.5])
    """

    reductions: ClassVar[dict[str, Reduction]] = {
        "tokens": "sum",
        "stiffness": "sum",
        "square": "sum",
        "variation": "sum",
    }
    value_dims: ClassVar[dict[str, tuple[str, ...]]] = {
        "stiffness": (),
        "stiffness_deviation": (),
        "stiffness_variation": (),
    }

    def site_statistics(self, x: Tensor, mask: Tensor | None = None, tokens: Tensor | None = None) -> dict[str, Tensor]:
        """All (layer): tokens, and sums over them of the index, of its square and of its variation so far."""
        norm_LBT, step_LBT = (one.flatten(1) for one in x.double().unbind(1))
        index = step_LBT[1:] / norm_LBT[:-1]
        keep = index.isfinite().all(0) & norm_LBT.isfinite().all(0)
        if mask is not None:
            keep &= mask.flatten()
        index = index[:, keep]
        nothing = index.new_zeros(1)
        variation = index.diff(dim=0).abs().cumsum(0).sum(1)
        return {
            "tokens": keep.sum().expand(len(x)).clone(),
            "stiffness": torch.cat([nothing, index.sum(1)]),
            "square": torch.cat([nothing, index.square().sum(1)]),
            "variation": torch.cat([nothing, nothing, variation])[: len(x)],
        }

    def values(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See the class."""
        mean, square = ratio(stats["stiffness"], stats["tokens"]), ratio(stats["square"], stats["tokens"])
        first = torch.arange(mean.shape[-1], device=mean.device) == 0
        return {
            "stiffness": mean.masked_fill(first, torch.nan),
            "stiffness_deviation": (square - mean.square()).clamp_min(0).sqrt().masked_fill(first, torch.nan),
            "stiffness_variation": ratio(stats["variation"], stats["tokens"]),
        }
