"""How well the next token is predicted, and how large the logits are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from ..core.measure import Reduction, double, ratio, wide
from .next_token import OfNextToken, following, predicting

# Logits that stay in a core's cache while their maximum and their exponentials are taken; a GPU takes more at once.
_CHUNK = 1 << 19
_CHUNK_ACCELERATOR = 1 << 28


class NextTokenLoss(OfNextToken):
    r"""Cross entropy of the next token, and the scale of the logits, in one pass over them.

    For logits :math:`z_t` at position t of a row and :math:`\log Z_t = \log \sum_v \exp z_{tv}`:

    - ``loss``: mean of :math:`\log Z_t - z_{t, w_{t+1}}` in nats, over positions whose token and next token are real
    - ``perplexity``: :math:`\exp(\mathrm{loss})`
    - ``log_z``: mean of :math:`\log Z_t` over real positions
    - ``max_logit``: largest :math:`|z_{tv}|` at a real position; entries of -inf, which some models give to words that
      cannot occur, are not counted
    - ``non_finite_tokens``: share of real positions without a finite :math:`\log Z_t` (a NaN or +inf among its logits);
      they are left out of the others

    Shapes: x (\*stack, batch, pos, vocab); tokens (batch, pos) ids of the input, not shifted; every value (\*stack).
    For models that predict the next token only.

    Source: standard; the scale of logits and :math:`\log Z` after Wortsman et al. 2024, Small-scale proxies for
    large-scale Transformer training instabilities.

    Example:
        >>> loss = NextTokenLoss()
        >>> loss.update(torch.zeros(1, 3, 8), tokens=torch.tensor([[1, 2, 3]]))
        >>> round(float(loss.compute()["perplexity"]), 4)
        8.0
    """

    reductions: ClassVar[dict[str, Reduction]] = {
        "tokens": "sum",
        "lost": "sum",
        "predictions": "sum",
        "nll": "sum",
        "log_z": "sum",
        "peak": "max",
    }
    value_dims: ClassVar[dict[str, tuple[str, ...]]] = {
        "loss": (),
        "perplexity": (),
        "log_z": (),
        "max_logit": (),
        "non_finite_tokens": (),
    }

    def site_statistics(self, x: Tensor, mask: Tensor | None = None, tokens: Tensor | None = None) -> dict[str, Tensor]:
        """tokens, lost (not finite), predictions: counts; nll and log_z: sums over them; peak: largest; all ()."""
        tokens, real_BT = self._read(x, mask, tokens)
        next_BT = following(tokens, x.shape[-1])
        log_z_BT, peak_BT, target_BT = _scan(x, next_BT)
        good_BT = real_BT & log_z_BT.isfinite()
        predicts_BT = predicting(good_BT, real_BT)
        return {
            "tokens": real_BT.sum(),
            "lost": (real_BT & ~good_BT).sum(),
            "predictions": predicts_BT.sum(),
            "nll": double((log_z_BT - target_BT).where(predicts_BT, 0.0)).sum(),
            "log_z": double(log_z_BT.where(good_BT, 0.0)).sum(),
            "peak": peak_BT.where(good_BT, 0.0).amax(),
        }

    def values(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See the class."""
        seen = stats["tokens"] - stats["lost"]
        loss = ratio(stats["nll"], stats["predictions"])
        return {
            "loss": loss,
            "perplexity": loss.exp(),
            "log_z": ratio(stats["log_z"], seen),
            "max_logit": double(stats["peak"]).where(seen > 0, torch.nan),
            "non_finite_tokens": ratio(stats["lost"], stats["tokens"]),
        }


def _scan(logits_BTV: Tensor, next_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log Z, the largest finite magnitude, and the next token's logit, each (batch, pos), a few rows at a time."""
    batch, length, vocab = logits_BTV.shape
    rows = max(1, (_CHUNK if logits_BTV.device.type == "cpu" else _CHUNK_ACCELERATOR) // vocab)
    dtype = torch.float64 if logits_BTV.dtype == torch.float64 else torch.float32
    log_z, peak, target = torch.empty(3, batch, length, dtype=dtype, device=logits_BTV.device)
    exponentials = torch.empty(min(rows, length), vocab, dtype=dtype, device=logits_BTV.device)
    for b in range(batch):
        for at in range(0, length, rows):
            some = slice(at, min(at + rows, length))
            z = wide(logits_BTV[b, some])
            top, low = z.amax(-1, keepdim=True), z.amin(-1, keepdim=True)
            # Not by the smallest of all, which is NaN where one token is.
            if bool((low == -math.inf).any()):
                low = z.masked_fill(z == -math.inf, math.inf).amin(-1, keepdim=True)
            total = torch.sub(z, top, out=exponentials[: len(z)]).exp_().sum(-1)
            log_z[b, some] = total.log_().add_(top[:, 0])
            peak[b, some] = torch.maximum(top, -low)[:, 0]
            target[b, some] = z.gather(-1, next_BT[b, some, None])[:, 0]
    return log_z, peak, target
