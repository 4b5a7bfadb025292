"""The largest activations: how far they stand out, and where they sit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ..core.errors import MeasureError
from ..core.measure import Measure, Reduction, double, ratio, real_tokens, token_norms, unit_peaks

# Activations that stay in a core's cache while their outliers are counted; a GPU takes more at once.
_CHUNK = 1 << 17
_CHUNK_ACCELERATOR = 1 << 26


class MassiveActivations(Measure):
    r"""How far the largest activation of a sequence stands above the median one, and which units and positions it has.

    Over S sequences :math:`h_x \in \mathbb{R}^{T_x \times U}` of real tokens:

    - ``massive_ratio``: :math:`\sum_x \max |h_x| \,/\, \sum_x \mathrm{median} |h_x|`, maximum and median over all
      positions and units of one sequence (of an even number of entries the lower median, as in `torch.median`)
    - ``massive_unit``, ``massive_position``: the unit and the position that carry the most maxima; no position (NaN)
      when most lie beyond those that are told apart
    - ``massive_unit_share`` for each unit, ``massive_position_share`` for each position: share of sequences whose
      maximum sits there. Positions count from the first real token; those from `positions` on share the last entry.

    Tokens with a non-finite unit are left out, and so are sequences without a token left.

    Args:
        positions: how many positions are told apart.

    Shapes: x (\*stack, batch, pos, unit); massive_ratio, massive_unit, massive_position (\*stack),
    massive_unit_share (\*stack, unit), massive_position_share (\*stack, positions + 1), the last not in tables. A site
    that is mostly zero has a median of 0 and an infinite ratio; the measure is meant for the residual stream.

    Source: ratio of means after Gallego-Feliciano et al. 2025, Hidden Dynamics of Massive Activations in Transformer
    Training; the phenomenon after Sun et al. 2024, Massive Activations in Large Language Models, who call an
    activation massive above 100 and 1000 times the median.

    Example:
        >>> massive = MassiveActivations()
        >>> h = torch.ones(1, 4, 8)
        >>> h[0, 0, 5] = -300.0
        >>> massive.update(h)
        >>> {name: float(massive.compute()[name]) for name in ("massive_ratio", "massive_unit", "massive_position")}
        {'massive_ratio': 300.0, 'massive_unit': 5.0, 'massive_position': 0.0}
    """

    reductions: ClassVar[dict[str, Reduction]] = {
        "sequences": "sum",
        "largest": "sum",
        "median": "sum",
        "units": "sum",
        "places": "sum",
    }
    value_dims: ClassVar[dict[str, tuple[str, ...]]] = {
        "massive_ratio": (),
        "massive_unit": (),
        "massive_position": (),
        "massive_unit_share": ("unit",),
        "massive_position_share": ("position",),
    }

    def __init__(self, positions: int = 64, **options: object):
        super().__init__(**options)
        if positions < 1:
            raise MeasureError(f"positions={positions}: how many first positions are counted apart, 1 or more")
        self.positions = positions

    def site_statistics(self, x: Tensor, mask: Tensor | None = None, tokens: Tensor | None = None) -> dict[str, Tensor]:
        """sequences, largest, median: scalars; units: (unit) and places: (positions + 1), counts of maxima."""
        kept = real_tokens(x, mask)
        units = x.shape[-1]
        magnitude = kept.x.abs()
        largest_B, position_B, unit_B = _largest(magnitude, unit_peaks(x, mask))
        if mask is not None:
            position_B = (mask.long().cumsum(-1) - 1).gather(1, position_B[:, None])[:, 0].clamp_min(0)
        if kept.keep is None:
            entries = [magnitude[0].numel()] * len(x)
            seen_B = torch.ones_like(unit_B)
        else:
            entries = (kept.keep.sum(-1) * units).tolist()
            seen_B = kept.keep.any(-1).long()
            magnitude = magnitude.masked_fill(~kept.keep[..., None], math.inf)
        median_B = lower_medians(magnitude.flatten(1), entries)
        counts = torch.zeros(units, dtype=torch.long, device=x.device)
        places = counts.new_zeros(self.positions + 1)
        return {
            "sequences": seen_B.sum(),
            "largest": double(largest_B).sum(),
            "median": double(median_B).sum(),
            "units": counts.index_add(0, unit_B, seen_B),
            "places": places.index_add(0, position_B.clamp_max(self.positions), seen_B),
        }

    def values(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See the class."""
        sequences = stats["sequences"]
        units, places = stats["units"], stats["places"]
        position = places.argmax(-1)
        return {
            "massive_ratio": ratio(stats["largest"], stats["median"]),
            "massive_unit": double(units.argmax(-1)).where(sequences > 0, torch.nan),
            "massive_position": double(position).where((sequences > 0) & (position < self.positions), torch.nan),
            "massive_unit_share": ratio(units, sequences[..., None]),
            "massive_position_share": ratio(places, sequences[..., None]),
        }


class OutlierChannels(Measure):
    r"""Channels (units) that stand far above the others at many tokens, not only at a massive few.

    A unit stands out at a token when :math:`|x_u| > c \sqrt{\pi/2} \; \mathrm{mean}_v |x_v|`. The right side is *c*
    times the rms if the token's units are Gaussian, and unlike the rms it hardly rises with the outliers themselves. A
    unit that does so at a share *p* of tokens or more is an outlier channel.

    - ``outlier_channels``: how many there are
    - ``outlier_energy``: share of a token's squared norm that they carry, :math:`x_u^2 / \lVert x \rVert^2` averaged
      over tokens, so that a few massive tokens do not decide it
    - ``outlier_frequency``: for each unit the share of tokens at which it stands out

    Over real tokens; those with a non-finite unit are left out.

    Args:
        factor: *c*, 6 by default.
        share: *p*, 0.06 by default.

    Shapes: x (\*stack, batch, pos, unit); outlier_channels and outlier_energy (\*stack), outlier_frequency (\*stack,
    unit). With few units one of them cannot stand out so far: below about 2 c units, lower the factor.

    Source: Dettmers et al. 2022, LLM.int8(), and Ahmadian et al. 2023, Intriguing Properties of Quantization at Scale
    (magnitude above 6 at 6 % of tokens or more); their fixed magnitude is replaced by a multiple of the token's own
    scale, so that the definition holds for models of any size. Channel against spike after Yi et al. 2025,
    Rotated Runtime Smooth.

    Example:
        >>> h = torch.randn(2, 50, 64, generator=torch.Generator().manual_seed(0))
        >>> h[..., 7] += 20.0
        >>> outliers = OutlierChannels()
        >>> outliers.update(h)
        >>> int(outliers.compute()["outlier_channels"]), int(outliers.compute()["outlier_frequency"].argmax())
        (1, 7)
    """

    reductions: ClassVar[dict[str, Reduction]] = {"tokens": "sum", "above": "sum", "energy": "sum"}
    value_dims: ClassVar[dict[str, tuple[str, ...]]] = {
        "outlier_channels": (),
        "outlier_energy": (),
        "outlier_frequency": ("unit",),
    }

    def __init__(self, factor: float = 6.0, share: float = 0.06, **options: object):
        super().__init__(**options)
        if not factor > 0 or not 0 < share <= 1:
            raise MeasureError(f"factor={factor}, share={share}: a factor above 0, and a share of tokens up to 1")
        self.factor = factor
        self.share = share

    def site_statistics(self, x: Tensor, mask: Tensor | None = None, tokens: Tensor | None = None) -> dict[str, Tensor]:
        """tokens: (); above: (unit), counts; energy: (unit), summed shares of the tokens' squared norms."""
        kept = real_tokens(x, mask)
        x_NU, norm_N = kept.x.flatten(0, 1), token_norms(x, mask).flatten()
        inverse_N1 = norm_N.reciprocal().where(norm_N > 0, 0.0)[:, None]  # a token of zeros has no energy to share out
        rows = max(1, (_CHUNK if x.device.type == "cpu" else _CHUNK_ACCELERATOR) // x.shape[-1])
        magnitude = x_NU.new_empty(min(rows, len(x_NU)), x.shape[-1])
        hit, ones = torch.empty_like(magnitude), x_NU.new_ones(len(magnitude))
        above = torch.zeros(x.shape[-1], dtype=torch.long, device=x.device)
        energy = double(x_NU.new_zeros(x.shape[-1]))
        for part, inverse in zip(x_NU.split(rows), inverse_N1.split(rows), strict=True):
            n = len(part)
            a = torch.abs(part, out=magnitude[:n])
            scale = a.mean(-1, keepdim=True) * math.sqrt(math.pi / 2)
            # Counted as products with ones, as in `count_above`.
            above += (ones[:n] @ torch.gt(a, scale * self.factor, out=hit[:n])).long()
            energy += ones[:n] @ a.mul_(inverse).square_()
        return {"tokens": kept.count, "above": above, "energy": energy}

    def values(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See the class."""
        tokens = stats["tokens"]
        frequency = ratio(stats["above"], tokens[..., None])
        outlier = frequency >= self.share
        return {
            "outlier_channels": double(outlier.sum(-1)).where(tokens > 0, torch.nan),
            "outlier_energy": ratio(double(stats["energy"]).where(outlier, 0.0).sum(-1), tokens),
            "outlier_frequency": frequency,
        }


def outlier_dimensions(frequency: Tensor, tokens: float = 0.06, layers: float = 0.25) -> list[int]:
    """The channels of the residual stream that stand out through much of a model, not only at one layer.

    Args:
        frequency: (layer, unit), share of tokens at which a unit stands out: `OutlierChannels` has it as
            ``outlier_frequency``.
        tokens: a channel stands out at a layer when it does so at this share of its tokens or more.
        layers: it is an outlier dimension when it stands out at this share of the layers or more.

    Source: Ahmadian et al. 2023, Intriguing Properties of Quantization at Scale, after Dettmers et al. 2022.

    >>> outlier_dimensions(torch.tensor([[0.0, 0.9], [0.0, 0.8], [0.05, 0.0], [0.0, 0.0]]))
    [1]
    """
    if frequency.ndim != 2:
        raise MeasureError(f"frequency is (layer, unit), not {tuple(frequency.shape)}")
    return (double(frequency >= tokens).mean(0) >= layers).nonzero().flatten().tolist()


def _largest(magnitude_BTU: Tensor, peaks_BU: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The largest magnitude of each row, its position and its unit; of several alike the first."""
    largest_B, unit_B = peaks_BU.max(-1)
    if len((peaks_BU == largest_B[:, None]).nonzero()) == len(peaks_BU):
        # It sits in one unit, so there is no need to look through the others.
        return largest_B, magnitude_BTU[torch.arange(len(unit_B), device=unit_B.device), :, unit_B].argmax(-1), unit_B
    at_B = magnitude_BTU.flatten(1).argmax(-1)
    return largest_B, at_B // peaks_BU.shape[-1], at_B % peaks_BU.shape[-1]


def lower_medians(x: Tensor, entries: list[int]) -> Tensor:
    """The lower median of the `entries` smallest numbers of each row, which it rearranges; 0 for none of them.

    >>> lower_medians(torch.tensor([[4.0, 1.0, 3.0, 2.0], [1.0, 2.0, 5.0, math.inf]]), [4, 3])
    tensor([2., 2.])
    """
    ranks = [max(n - 1, 0) // 2 for n in entries]
    if x.device.type != "cpu":
        found = [row.kthvalue(rank + 1).values for row, rank in zip(x, ranks, strict=True)]
        return torch.stack(found).where(torch.tensor(entries, device=x.device) > 0, 0.0)
    # numpy selects with vector instructions, more than ten times faster than torch.median; in place, since `x` is ours.
    rows = x.numpy()
    found = []
    for row, rank, n in zip(rows, ranks, entries, strict=True):
        row.partition(rank)
        found.append(row[rank] if n else 0.0)
    return torch.from_numpy(np.array(found, dtype=rows.dtype))
