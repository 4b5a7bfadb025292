"""The distribution of activations: counts of their magnitudes on fixed bins, exact to merge."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from ..core.measure import Measure, Reduction, ratio, real_tokens

# Bins reach from 2^-LIMIT to 2^LIMIT: from what float16 rounds to zero to far beyond what it can hold.
_LIMIT = 24
_PER_DOUBLING = 4
_BINS = 2 * _LIMIT * _PER_DOUBLING
# Sign, exponent and the first two bits of the mantissa of a float32 are its first 11 bits: 2^10 bins for each sign.
_SHIFT = 21
_CODES = 1 << 10
_FIRST = (127 - _LIMIT) * _PER_DOUBLING
# Codes that stay in a core's cache between the shift and the count.
_CHUNK = 1 << 16
_CHUNK_ACCELERATOR = 1 << 26

QUANTILES = {"abs_p50": 0.5, "abs_p90": 0.9, "abs_p99": 0.99, "abs_p999": 0.999}


class Histogram(Measure):
    r"""How large the activations are: their magnitudes on bins that double every four, signs, zeros and quantiles.

    A magnitude belongs to the bin :math:`[2^k (1 + m/4),\ 2^k (1 + (m+1)/4))` with :math:`m \in \{0, 1, 2, 3\}` and
    :math:`-24 \le k < 24`; in float32 these are the numbers that share the exponent and the first two bits of the
    mantissa, so that counting needs no logarithm and no comparison. One more bin on each side takes what is smaller
    (and not zero) and what is larger.

    - ``histogram``: for each bin, share of all activations; with ``exact_zeros`` they sum to one. `axis` gives the
      lower edges.
    - ``exact_zeros``: share that is 0, or below :math:`2^{-128}`, which float32 hardly holds
    - ``positive``: share of the others that is above 0
    - ``abs_p50``, ``abs_p90``, ``abs_p99``, ``abs_p999``: quantiles of the magnitude, zeros counted. What is given is
      the geometric middle of the bin that holds the quantile, so it is off by a factor of :math:`\sqrt{5/4}` at most
      (12 %); 0 when zeros reach that far; NaN in the bins at the ends, which have no middle.

    Over real tokens and all their units; tokens with a non-finite unit are left out. Numbers of float64 are rounded to
    float32 first.

    Shapes: x (\*stack, batch, pos, unit); histogram (\*stack, bin) with 194 bins, not in tables; the others (\*stack).

    Source: logarithmic bins with linear steps within a doubling as in HdrHistogram (Tene); the measure is ours.

    Example:
        >>> histogram = Histogram()
        >>> histogram.update(torch.tensor([[[0.0, 1.1, -1.2, 300.0]]]))
        >>> shares = histogram.compute()["histogram"]
        >>> [(Histogram.axis("bin")[i], float(shares[i])) for i in shares.nonzero().flatten()]
        [(1.0, 0.5), (256.0, 0.25)]
        >>> float(histogram.compute()["positive"])
        0.6666666666666666
    """

    reductions: ClassVar[dict[str, Reduction]] = {"magnitudes": "sum", "zero": "sum", "above": "sum"}
    value_dims: ClassVar[dict[str, tuple[str, ...]]] = {
        "histogram": ("bin",),
        "exact_zeros": (),
        "positive": (),
        **dict.fromkeys(QUANTILES, ()),
    }

    @staticmethod
    def axis(dim: str) -> list[float]:
        """The lower edges of the bins; the first is 0, of what lies below the others."""
        steps = torch.arange(_BINS, dtype=torch.float64)
        powers = 2.0 ** (steps // _PER_DOUBLING - _LIMIT) * (1 + steps % _PER_DOUBLING / _PER_DOUBLING)
        return [0.0, *powers.tolist(), 2.0**_LIMIT]

    def site_statistics(self, x: Tensor, mask: Tensor | None = None, tokens: Tensor | None = None) -> dict[str, Tensor]:
        """magnitudes: (bin); zero and above: (), exact zeros and what is above 0; all counts."""
        kept = real_tokens(x, mask)
        codes_SC = _count_codes(kept.x).view(2, _CODES)
        both_C = codes_SC.sum(0)
        # Tokens left out were made zero, and must not count as zeros.
        left_out = x.shape[0] * x.shape[1] - kept.count
        inside = both_C[_FIRST : _FIRST + _BINS]
        under, over = both_C[1:_FIRST].sum(), both_C[_FIRST + _BINS :].sum()
        return {
            "magnitudes": torch.cat([under[None], inside, over[None]]),
            "zero": both_C[0] - left_out * x.shape[-1],
            "above": codes_SC[0, 1:].sum(),
        }

    def values(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See the class."""
        counts, zero = stats["magnitudes"], stats["zero"]
        nonzero = counts.sum(-1)
        entries = nonzero + zero
        found = {
            "histogram": ratio(counts, entries[..., None]),
            "exact_zeros": ratio(zero, entries),
            "positive": ratio(stats["above"], nonzero),
        }
        return found | {name: _quantile(counts, zero, q) for name, q in QUANTILES.items()}


def _count_codes(x: Tensor) -> Tensor:
    """How many numbers have each of the 2048 leading patterns of 11 bits, sign first: int64."""
    bits = x.reshape(-1).float().view(torch.int32)
    total = torch.zeros(2 * _CODES, dtype=torch.long, device=x.device)
    for some in bits.split(_CHUNK if x.device.type == "cpu" else _CHUNK_ACCELERATOR):
        total += torch.bincount((some >> _SHIFT) & (2 * _CODES - 1), minlength=2 * _CODES)
    return total


def _quantile(counts: Tensor, zero: Tensor, q: float) -> Tensor:
    """The middle of the bin that holds the smallest magnitude with a share `q` of all at or below it."""
    below = torch.cat([zero[..., None], counts], -1).cumsum(-1)
    wanted = (below[..., -1:] * q).ceil().clamp_min(1)
    at = (below < wanted).sum(-1, keepdim=True).clamp_max(below.shape[-1] - 1)
    lower = torch.tensor(Histogram.axis("bin")[1:], dtype=torch.float64, device=counts.device)
    middle = (lower[:-1] * lower[1:]).sqrt()
    nan = middle.new_full((1,), torch.nan)
    points = torch.cat([torch.zeros_like(nan), nan, middle, nan])
    return points[at[..., 0]].where(below[..., -1] > 0, torch.nan)
