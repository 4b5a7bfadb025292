"""How sure a model is of the next token, and whether it may be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..core.errors import MeasureError
from ..core.measure import Reduction, double, ratio, shared, wide
from .loss import NextTokenLoss
from .next_token import following, predicting

# Logits that stay in a core's cache between the steps of the sweep; a GPU takes more at once.
_CHUNK = 1 << 19
_CHUNK_ACCELERATOR = 1 << 27
_BINS = 15


class Uncertainty(NamedTuple):
    """What one distribution over the vocabulary says of how sure it is; every field has one entry a token.

    Attributes:
        entropy: of the distribution, in nats.
        confidence: largest probability.
        margin: largest probability minus the second largest.
        logit_margin: the same of the logits: the log odds of the two.
        purity: sum of the squared probabilities.
        log_z: log of the sum of the exponentials of the logits.
        largest: largest logit.
        peak: largest magnitude of a logit, entries of -inf left out.
    """

    entropy: Tensor
    confidence: Tensor
    margin: Tensor
    logit_margin: Tensor
    purity: Tensor
    log_z: Tensor
    largest: Tensor
    peak: Tensor


class TokenUncertainty(NextTokenLoss):
    r"""Entropy, margin, confidence, accuracy and calibration of next-token predictions, and all of `NextTokenLoss`.

    One sweep over the logits gives both, so take this *instead of* `NextTokenLoss`, not beside it. For the predicted
    distribution :math:`p_t` at position t and the token :math:`w_{t+1}` that follows, means over positions whose token
    and next token are real:

    - ``entropy``: :math:`-\sum_v p_{tv} \log p_{tv}`, in nats
    - ``confidence``: :math:`\max_v p_{tv}`
    - ``margin``: largest minus second largest probability; ``logit_margin``: the same of the logits
    - ``accuracy``: how often :math:`w_{t+1}` has the largest logit (a tie for it counts)
    - ``calibration_error``: expected calibration error over 15 equal bins of confidence,
      :math:`\sum_b \frac{n_b}{n} |\mathrm{accuracy}_b - \mathrm{confidence}_b|`
    - ``overconfidence``: confidence minus accuracy, with its sign
    - ``brier``: :math:`\sum_v (p_{tv} - [v = w_{t+1}])^2`, from 0 to 2

    ``bin_share`` of the predictions, ``bin_confidence`` and ``bin_accuracy``, one entry a bin, are the reliability
    diagram.

    Shapes: x (\*stack, batch, pos, vocab) with at least two words; tokens (batch, pos) ids of the input, not shifted;
    every value (\*stack), those of bins (\*stack, 15). Positions without a finite :math:`\log Z` are left out.

    Source: Guo et al. 2017, On Calibration of Modern Neural Networks (equation 3); Brier 1950.

    Example:
        >>> uncertainty = TokenUncertainty()
        >>> uncertainty.update(torch.zeros(1, 3, 8), tokens=torch.tensor([[1, 2, 3]]))
        >>> got = uncertainty.compute()
        >>> [round(float(got[name]), 3) for name in ("entropy", "confidence", "margin", "brier")]
        [2.079, 0.125, 0.0, 0.875]
    """

    reductions: ClassVar[dict[str, Reduction]] = NextTokenLoss.reductions | {
        "entropy": "sum",
        "margin": "sum",
        "logit_margin": "sum",
        "brier": "sum",
        "bin_tokens": "sum",
        "bin_confidence": "sum",
        "bin_right": "sum",
    }
    value_dims: ClassVar[dict[str, tuple[str, ...]]] = NextTokenLoss.value_dims | {
        "entropy": (),
        "confidence": (),
        "margin": (),
        "logit_margin": (),
        "accuracy": (),
        "calibration_error": (),
        "overconfidence": (),
        "brier": (),
        "bin_share": ("confidence",),
        "bin_confidence": ("confidence",),
        "bin_accuracy": ("confidence",),
    }

    @staticmethod
    def axis(dim: str) -> list[float]:
        """The middles of the bins."""
        return [(i + 0.5) / _BINS for i in range(_BINS)]

    def site_statistics(self, x: Tensor, mask: Tensor | None = None, tokens: Tensor | None = None) -> dict[str, Tensor]:
        """Those of `NextTokenLoss`, and sums over predictions; of bins (15), all others ()."""
        tokens, real_BT = self._read(x, mask, tokens)
        next_BT = following(tokens, x.shape[-1])
        u, choice_BT = _uncertainty(x)
        shared("choice", x, None, lambda: (u.largest, choice_BT))  # for whoever asks what would be said
        target_BT = x.gather(-1, next_BT[..., None])[..., 0].to(u.log_z.dtype)
        good_BT = real_BT & u.log_z.isfinite()
        predicts_BT = predicting(good_BT, real_BT)

        def total(of: Tensor) -> Tensor:
            return double(of.where(predicts_BT, 0.0)).sum()

        right_BT = predicts_BT & (target_BT >= u.largest)
        confidence_BT = u.confidence.where(predicts_BT, 0.0)
        bin_BT = (confidence_BT * _BINS).ceil().long().sub_(1).clamp_(0, _BINS - 1)
        bins = torch.zeros(3, _BINS, dtype=torch.float64 if x.device.type != "mps" else torch.float32, device=x.device)
        for row, of in zip(bins, (predicts_BT, confidence_BT, right_BT), strict=True):
            row.index_add_(0, bin_BT.flatten(), of.flatten().to(bins.dtype))
        return {
            "tokens": real_BT.sum(),
            "lost": (real_BT & ~good_BT).sum(),
            "predictions": predicts_BT.sum(),
            "nll": total(u.log_z - target_BT),
            "log_z": double(u.log_z.where(good_BT, 0.0)).sum(),
            "peak": u.peak.where(good_BT, 0.0).amax(),
            "entropy": total(u.entropy),
            "margin": total(u.margin),
            "logit_margin": total(u.logit_margin),
            "brier": total(u.purity + 1 - 2 * (target_BT - u.log_z).exp()),
            "bin_tokens": bins[0].long(),
            "bin_confidence": bins[1],
            "bin_right": bins[2].long(),
        }

    def values(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See the class."""
        seen = stats["predictions"]
        confidence = ratio(stats["bin_confidence"].sum(-1), seen)
        accuracy = ratio(stats["bin_right"].sum(-1), seen)
        gap = (double(stats["bin_right"]) - double(stats["bin_confidence"])).abs().sum(-1)
        return super().values(stats) | {
            "entropy": ratio(stats["entropy"], seen),
            "confidence": confidence,
            "margin": ratio(stats["margin"], seen),
            "logit_margin": ratio(stats["logit_margin"], seen),
            "accuracy": accuracy,
            "calibration_error": ratio(gap, seen),
            "overconfidence": confidence - accuracy,
            "brier": ratio(stats["brier"], seen),
            "bin_share": ratio(stats["bin_tokens"], seen[..., None]),
            "bin_confidence": ratio(stats["bin_confidence"], stats["bin_tokens"]),
            "bin_accuracy": ratio(stats["bin_right"], stats["bin_tokens"]),
        }


def token_uncertainty(logits: Tensor) -> Uncertainty:
    """How sure each of many distributions over a vocabulary is, in one sweep that copies no more than a few rows.

    Args:
        logits: (..., vocab), at least two words, of any floating precision; computed in float32 or float64.

    Returns:
        `Uncertainty`, each field (...); not finite where the logits have no finite log Z.

    Raises:
        MeasureError: fewer than two words.

    >>> token_uncertainty(torch.tensor([[0.0, 0.0, -torch.inf]])).entropy.exp()
    tensor([2.])
    """
    return _uncertainty(logits)[0]


def _uncertainty(logits: Tensor) -> tuple[Uncertainty, Tensor]:
    """As `token_uncertainty`, and the place of each largest logit, the first of several; (...) int64."""
    vocab = logits.shape[-1]
    if vocab < 2:
        raise MeasureError(f"uncertainty is about a choice, and these logits {tuple(logits.shape)} leave none")
    flat_NV = logits.detach().reshape(-1, vocab)
    count = len(flat_NV)
    rows = max(1, (_CHUNK if logits.device.type == "cpu" else _CHUNK_ACCELERATOR) // vocab)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    out = torch.empty(len(Uncertainty._fields), count, dtype=dtype, device=logits.device)
    choice = torch.empty(count, dtype=torch.long, device=logits.device)
    below, weights = torch.empty(2, min(rows, count), vocab, dtype=dtype, device=logits.device)
    for at in range(0, count, rows):
        z = wide(flat_NV[at : at + rows])
        choice[at : at + rows] = _sweep(z, below[: len(z)], weights[: len(z)], out[:, at : at + rows])
    return Uncertainty(*(field.view(logits.shape[:-1]) for field in out)), choice.view(logits.shape[:-1])


def _sweep(z: Tensor, below: Tensor, weights: Tensor, out: Tensor) -> Tensor:
    """The fields of `Uncertainty` for a few rows, into `out` (field, row), and where the largest logits are.

    `below` and `weights` are overwritten.
    """
    top, second, choice = _two_largest(z)
    low = z.amin(-1)
    torch.sub(z, top[:, None], out=below)
    if bool((low == -math.inf).any()):
        low = z.masked_fill(z == -math.inf, math.inf).amin(-1)
        below.clamp_(min=-1e4)  # their weight is 0 all the same, and 0 times -inf would be NaN
    torch.exp(below, out=weights)
    total = weights.sum(-1)
    log_total = total.log()
    out[0] = log_total - below.mul_(weights).sum(-1) / total
    out[1] = 1 / total
    out[2] = (1 - (second - top).exp()) / total
    out[3] = top - second
    out[4] = weights.square_().sum(-1) / total.square()
    out[5] = top + log_total
    out[6] = top
    out[7] = torch.maximum(top, -low)
    return choice


def _two_largest(z_NV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The two largest of each row and the place of the first, (row) each, at the cost of one maximum.

    The row is cut into as many pieces as each is long; the second largest is the largest of another piece or second in
    the piece of the largest. A sort or a maximum with its place would cost several times as much.
    """
    vocab = z_NV.shape[-1]
    width = math.isqrt(vocab)
    whole = vocab // width * width
    pieces = z_NV[:, :whole].unflatten(1, (-1, width)).amax(-1)
    if whole < vocab:
        pieces = torch.cat([pieces, z_NV[:, whole:].amax(-1, keepdim=True)], -1)
    top, piece = pieces.max(-1, keepdim=True)
    column = piece * width + torch.arange(width, device=z_NV.device)
    inside = z_NV.gather(-1, column.clamp(max=vocab - 1)).masked_fill(column >= vocab, -math.inf)
    place = inside.max(-1, keepdim=True).indices
    # Without the largest, of the same piece and of the others.
    second = torch.maximum(inside.scatter(-1, place, -math.inf).amax(-1), pieces.scatter(-1, piece, -math.inf).amax(-1))
    return top[:, 0], second, (piece * width + place)[:, 0]
