"""What would be lost if a site were rounded to 8 or 4 bits, and how much of it a finer scale would save."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from ..core.measure import Measure, Reduction, double, ratio, real_tokens, unit_peaks
from .sampling import checked_every, sampled

BITS = (8, 4)
SCALES = ("tensor", "token", "channel")
_KINDS = [(scale, bits) for bits in BITS for scale in SCALES]

# Activations that stay in a core's cache together with what rounding makes of them; a GPU takes more at once.
_CHUNK = 1 << 17
_CHUNK_ACCELERATOR = 1 << 23


class QuantisationError(Measure):
    r"""Error that symmetric rounding to int8 and int4 would make: one scale a tensor, a token or a channel.

    With b bits and the scale :math:`s = \max |x| / (2^{b-1} - 1)`, :math:`Q(x) = s \, \mathrm{round}(x / s)`. The
    maximum is over the row of the batch (``tensor``), over the token's units (``token``), or over the row's tokens for
    each unit (``channel``): what a runtime that quantises one request at a time would see. No scale depends on which
    rows share a batch, so that batches and shards add up exactly.

    For each of the three scales and int8 and int4:

    - ``int4_tensor_error``: mean over tokens of :math:`\lVert x_t - Q(x_t) \rVert^2 / \lVert x_t \rVert^2`. Every
      token counts alike, so a massive first token does not hide what its scale does to the others
    - ``int4_tensor_db``: signal to quantisation noise of all of it,
      :math:`10 \log_{10} \sum \lVert x_t \rVert^2 / \sum \lVert x_t - Q(x_t) \rVert^2`; 6 dB more for each bit, 20 dB
      is noise of 1 % of the power; infinite for no error at all

    - ``int4_tensor_lost``: share of the activations that are not 0 and would be rounded to it. An outlier channel
      may hold so much of the norm that the error looks harmless while all other channels are gone

    An error that is large for ``tensor`` and small for ``channel`` points to outlier channels, one small for ``token``
    to massive tokens. Channel scales of activations cannot be taken out of an integer product, so they are no
    deployment but the measure of what smoothing or rotation could gain.

    Over real tokens with a finite, nonzero vector. Static scales, fixed on other text, do worse than these.

    Args:
        every: take the error of every n-th token of a row only, counted from its first real one; the maxima are over
            all tokens. 8 by default, which makes it an estimate; 1 is exact.

    Shapes: x (\*stack, batch, pos, unit); every value (\*stack).

    Source: the quantisers of Yao et al. 2023, ZeroQuant-V2 (symmetric, absmax, round to nearest); per-channel maxima at
    run time as in Yi et al. 2025, Rotated Runtime Smooth.

    Example:
        >>> x = torch.randn(1, 64, 32, generator=torch.Generator().manual_seed(0))
        >>> x[..., 3] += 100.0
        >>> error = QuantisationError(every=1)
        >>> error.update(x)
        >>> {name: round(float(error.compute()[name]), 2) for name in ("int4_tensor_lost", "int4_channel_lost")}
        {'int4_tensor_lost': 0.97, 'int4_channel_lost': 0.16}
    """

    reductions: ClassVar[dict[str, Reduction]] = {
        "tokens": "sum",
        "power": "sum",
        **{f"relative_{scale}_{bits}": "sum" for scale, bits in _KINDS},
        **{f"noise_{scale}_{bits}": "sum" for scale, bits in _KINDS},
        "nonzero": "sum",
        **{f"kept_{scale}_{bits}": "sum" for scale, bits in _KINDS},
    }
    value_dims: ClassVar[dict[str, tuple[str, ...]]] = {
        **{f"int{bits}_{scale}_error": () for scale, bits in _KINDS},
        **{f"int{bits}_{scale}_db": () for scale, bits in _KINDS},
        **{f"int{bits}_{scale}_lost": () for scale, bits in _KINDS},
    }

    def __init__(self, every: int = 8, **options: object):
        super().__init__(**options)
        self.every = checked_every(every)

    def site_statistics(self, x: Tensor, mask: Tensor | None = None, tokens: Tensor | None = None) -> dict[str, Tensor]:
        """tokens: count; power and noise: sums of squares; relative: sums of each token's noise over power; nonzero and
        kept: entries that are not 0 before and after; all ()."""
        kept = real_tokens(x, mask)
        channel_BU = unit_peaks(x, mask)
        tensor_B = channel_BU.amax(-1)
        x_NU, row_N = sampled(kept, mask, self.every)
        power_N = double(torch.linalg.vector_norm(x_NU, dim=-1)).square()
        token_N = torch.maximum(x_NU.amax(-1), -x_NU.amin(-1))  # the norm of order infinity is 20 times slower
        largest = {"tensor": tensor_B[row_N, None], "token": token_N[:, None]}
        counts = torch.bincount(row_N, minlength=len(x)).tolist()
        noise, nonzero = {}, {}
        for scale, bits in _KINDS:
            if scale == "channel":
                parts = zip(x_NU.split(counts), channel_BU, strict=True)
                rounded = [_rounded(part, channel, bits) for part, channel in parts if len(part)]
            else:
                rounded = [_rounded(x_NU, largest[scale], bits)]
            noise[scale, bits] = torch.cat([one for one, _ in rounded]) if rounded else power_N
            nonzero[scale, bits] = sum((count for _, count in rounded), torch.zeros_like(kept.count))
        inverse_N = power_N.reciprocal().where(power_N > 0, 0.0)
        return {
            "tokens": (power_N > 0).sum(),
            "power": power_N.sum(),
            **{f"relative_{scale}_{bits}": noise[scale, bits] @ inverse_N for scale, bits in _KINDS},
            **{f"noise_{scale}_{bits}": noise[scale, bits].sum() for scale, bits in _KINDS},
            "nonzero": x_NU.count_nonzero(),
            **{f"kept_{scale}_{bits}": nonzero[scale, bits] for scale, bits in _KINDS},
        }

    def values(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See the class."""
        errors = {f"int{b}_{s}_error": ratio(stats[f"relative_{s}_{b}"], stats["tokens"]) for s, b in _KINDS}
        powers = {f"int{b}_{s}_db": 10 * ratio(stats["power"], stats[f"noise_{s}_{b}"]).log10() for s, b in _KINDS}
        kept = {f"int{b}_{s}_lost": 1 - ratio(stats[f"kept_{s}_{b}"], stats["nonzero"]) for s, b in _KINDS}
        return errors | powers | kept


def _rounded(x_NU: Tensor, largest: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The squared error of each token, (token), float64, and how many entries are not rounded to 0.

    `largest` is what the highest integer stands for: (token, 1) or (unit).
    """
    step = largest / (2 ** (bits - 1) - 1)
    # What is so small that its scale has no reciprocal is rounded to 0.
    per_step = step.reciprocal()
    per_step = per_step.where(per_step.isfinite(), 0.0)
    by_token = largest.ndim == 2
    rows = max(1, (_CHUNK if x_NU.device.type == "cpu" else _CHUNK_ACCELERATOR) // x_NU.shape[-1])
    scaled = x_NU.new_empty(min(rows, len(x_NU)), x_NU.shape[-1])
    whole = torch.empty_like(scaled)
    lengths, nonzero = [x_NU.new_zeros(0)], torch.zeros((), dtype=torch.long, device=x_NU.device)
    for at in range(0, len(x_NU), rows):
        x = x_NU[at : at + rows]
        y = torch.mul(x, per_step[at : at + rows] if by_token else per_step, out=scaled[: len(x)])
        q = torch.round(y, out=whole[: len(x)])
        y.sub_(q)
        nonzero += q.ne_(0).sum().long()  # as float32, exact for so few and several times faster than count_nonzero
        lengths.append(torch.linalg.vector_norm(y if by_token else y.mul_(step), dim=-1))
    length = double(torch.cat(lengths))
    return (length * step[:, 0] if by_token else length).square(), nonzero
