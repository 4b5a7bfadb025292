"""What each block does to the residual stream."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from ..core.errors import MeasureError
from ..core.measure import Measure, Reduction, all_norms, double, ratio, shared, wide


class Movement(Measure):
    r"""How far each block moves the residual stream, in which direction, and how the stream grows.

    For the states :math:`h_l` at the sites of a list in forward order (before the first block, then after each), per
    real token:

    - ``movement``: mean of :math:`\lVert h_l - h_{l-1} \rVert / \lVert h_{l-1} \rVert`
    - ``cosine``: mean of :math:`\cos(h_l, h_{l-1})`
    - ``growth``: rms of :math:`h_l` over that of the first site, :math:`\sqrt{\overline{\lVert h_l \rVert^2} /
      \overline{\lVert h_0 \rVert^2}}`

    movement and cosine of the first site, which nothing comes before, are NaN. A token that is not finite at a site, or
    is zero where it is divided by, is left out there and at the next site, and nowhere else.

    Shapes: `prepare` takes (batch, pos, unit) twice; `update` the states (layer, batch, pos, unit); every value
    (layer).

    Source: relative block contribution and cosine as in Liu et al. 2023, Deja Vu, and Gromov et al. 2024, The
    Unreasonable Ineffectiveness of the Deeper Layers.

    Example:
        >>> movement = Movement()
        >>> h = torch.tensor([3.0, 4.0]).expand(1, 2, 2)
        >>> movement.update(torch.stack([h, 2 * h, 2 * h]))
        >>> movement.compute()["movement"].tolist(), movement.compute()["growth"].tolist()
        ([nan, 1.0, 0.0], [1.0, 2.0, 2.0])
    """

    layout = "depth"
    reductions: ClassVar[dict[str, Reduction]] = {
        "tokens": "sum",
        "square": "sum",
        "pairs": "sum",
        "movement": "sum",
        "turns": "sum",
        "cosine": "sum",
    }
    value_dims: ClassVar[dict[str, tuple[str, ...]]] = {"movement": (), "cosine": (), "growth": ()}

    def prepare(self, x: Tensor, previous: Tensor | None, mask: Tensor | None = None) -> Tensor:
        """The norm of each token and of its difference from the site before: (2, batch, pos)."""
        return shared("step", x, previous, lambda: _step(x, previous))

    def site_statistics(self, x: Tensor, mask: Tensor | None = None, tokens: Tensor | None = None) -> dict[str, Tensor]:
        """All (layer): tokens and square of the states; pairs, movement, turns and cosine of the steps."""
        norm_LBT, step_LBT = double(x).unbind(1)
        before_LBT = torch.cat([torch.full_like(norm_LBT[:1], torch.nan), norm_LBT[:-1]])
        there = norm_LBT.isfinite() if mask is None else norm_LBT.isfinite() & mask
        pair = there & (before_LBT > 0) & before_LBT.isfinite()
        turn = pair & (norm_LBT > 0)
        cosine = (norm_LBT.square() + before_LBT.square() - step_LBT.square()) / (2 * norm_LBT * before_LBT)
        return {
            "tokens": there.sum((1, 2)),
            "square": norm_LBT.square().where(there, 0.0).sum((1, 2)),
            "pairs": pair.sum((1, 2)),
            "movement": (step_LBT / before_LBT).where(pair, 0.0).sum((1, 2)),
            "turns": turn.sum((1, 2)),
            "cosine": cosine.clamp(-1, 1).where(turn, 0.0).sum((1, 2)),
        }

    def values(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See the class."""
        rms = ratio(stats["square"], stats["tokens"]).sqrt()
        return {
            "movement": ratio(stats["movement"], stats["pairs"]),
            "cosine": ratio(stats["cosine"], stats["turns"]),
            "growth": rms / rms[..., :1],
        }


def _step(x: Tensor, previous: Tensor | None) -> Tensor:
    norm_BT = all_norms(x)
    if previous is None:
        return torch.stack([norm_BT, torch.full_like(norm_BT, torch.nan)])
    if x.shape != previous.shape:
        raise MeasureError(
            f"the states of two sites are compared and have the shapes {tuple(previous.shape)} and {tuple(x.shape)}; "
            "choose sites of one residual stream"
        )
    # By the difference itself: from three norms a small step would be rounded away.
    return torch.stack([norm_BT, torch.linalg.vector_norm(wide(x) - wide(previous), dim=-1)])
