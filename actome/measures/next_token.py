"""What measures of next-token logits share: which sites they fit, the token ids they need, and what predicts what."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.errors import MeasureError
from ..core.measure import Measure
from ..core.sites import Site


class OfNextToken(Measure):
    """A measure of the logits (batch, pos, vocab) with which each position predicts the token after it."""

    layout = "logits"

    def fits(self, site: Site) -> str | None:
        """A model that sees the token to be predicted does not predict it."""
        return None if site.causal else "its positions see the tokens that come after them"

    def _read(self, x: Tensor, mask: Tensor | None, tokens: Tensor | None) -> tuple[Tensor, Tensor]:
        """The ids on the device of the logits, and which of them are real, (batch, pos) each."""
        if tokens is None or tokens.shape != x.shape[:2]:
            given = "none" if tokens is None else tuple(tokens.shape)
            raise MeasureError(
                f"{type(self).__name__} needs the token ids (batch, pos) of its logits {tuple(x.shape)}, not {given}"
            )
        tokens = tokens.to(x.device)
        return tokens, torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask


def following(tokens_BT: Tensor, vocab: int) -> Tensor:
    """The token after each, (batch, pos); clamped, since a padded position may hold any id, and the last has none."""
    return tokens_BT.roll(-1, 1).clamp(0, vocab - 1)


def predicting(good_BT: Tensor, real_BT: Tensor) -> Tensor:
    """Which good positions have a real token after them."""
    predicts_BT = good_BT.clone()
    predicts_BT[:, :-1] &= real_BT[:, 1:]
    predicts_BT[:, -1] = False
    return predicts_BT
