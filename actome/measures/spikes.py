"""Two kinds of outliers: channels that are always large, and single entries that are for once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ..core.errors import MeasureError
from ..core.measure import Measure, Reduction, double, ratio, real_tokens
from .sampling import checked_every, sampled

# With more zeros than this, medians are no scale.
_ZEROS = 0.1


class Spikes(Measure):
    r"""Outliers of a row's activations, told apart by kind: persistent channels, and spikes of single tokens.

    With medians of absolute values over one row of the batch, :math:`r_t` over the units of token t, :math:`c_u` over
    the tokens for unit u, and m the median of all :math:`r_t`:

    - a **channel** is an outlier when :math:`c_u > k_c \, m`. It is large throughout, so a scale for each channel
      (smoothing) tames it
    - an entry is a **spike** when :math:`|x_{tu}| > k_s \max(r_t, c_u)`. It exceeds its token and its channel alike, so
      no scale fits it; rotation spreads it over the token

    Values:

    - ``channel_outliers``: how many outlier channels a row has, averaged over rows
    - ``spike_tokens``: share of tokens that hold a spike
    - ``spikes``: spikes a token
    - ``spike_ratio``: largest :math:`|x_{tu}| / \max(r_t, c_u)` of any entry
    - ``channel_outlier_share``: for each unit, share of rows in which it is an outlier channel

    The first real token of a row is left out: what it carries, `MassiveActivations` and `ResidualPeak` say. Over rows
    with at least two tokens that are real, finite and taken. Where many entries are exactly zero (ReLU units)
    medians say nothing of what is usual: rows with more than a tenth of zeros are left out. Medians are the lower of
    two, as in `torch.median`.

    Args:
        channel: :math:`k_c`, 6 by default.
        spike: :math:`k_s`, 20 by default: 13 standard deviations of a Gaussian unit, which none reaches by chance.
        every: take every n-th token of a row only, from its second real one on; 8 by default, and the shares are of
            those taken. 1 for all tokens.

    Shapes: x (\*stack, batch, pos, unit); channel_outlier_share (\*stack, unit), others (\*stack).

    Source: Yi et al. 2025, Rotated Runtime Smooth (channel-wise and spike outliers); the medians as references are a
    reading of its figures.

    Example:
        >>> x = torch.randn(1, 64, 32, generator=torch.Generator().manual_seed(0))
        >>> x[..., 5] += 30.0
        >>> x[0, 10, 7] = 200.0
        >>> spikes = Spikes(every=1)
        >>> spikes.update(x)
        >>> float(spikes.compute()["channel_outliers"]), float(spikes.compute()["spike_tokens"]) * 63
        (1.0, 1.0)
    """

    reductions: ClassVar[dict[str, Reduction]] = {
        "rows": "sum",
        "tokens": "sum",
        "channels": "sum",
        "spikes": "sum",
        "spiked": "sum",
        "peak": "max",
    }
    value_dims: ClassVar[dict[str, tuple[str, ...]]] = {
        "channel_outliers": (),
        "spike_tokens": (),
        "spikes": (),
        "spike_ratio": (),
        "channel_outlier_share": ("unit",),
    }

    def __init__(self, channel: float = 6.0, spike: float = 20.0, every: int = 8, **options: object):
        super().__init__(**options)
        if not channel > 0 or not spike > 0:
            raise MeasureError(f"channel={channel}, spike={spike}: multiples of a median, both above 0")
        self.channel = channel
        self.spike = spike
        self.every = checked_every(every)

    def site_statistics(self, x: Tensor, mask: Tensor | None = None, tokens: Tensor | None = None) -> dict[str, Tensor]:
        """rows, tokens, spikes, spiked (tokens): counts; channels: (unit), rows in which it is one; peak: ()."""
        kept = real_tokens(x, mask)
        x_NU, row_N = sampled(kept, mask, self.every, start=1)
        rows, count, spikes, spiked = (torch.zeros((), dtype=torch.long, device=x.device) for _ in range(4))
        channels = torch.zeros(x.shape[-1], dtype=torch.long, device=x.device)
        peak = torch.zeros((), device=x.device)
        sizes = torch.bincount(row_N, minlength=len(x)).tolist()
        for part in x_NU.abs().split(sizes):
            if len(part) < 2:
                continue
            token_T1, unit_U = _medians(part)[:, None], _medians(part.T.contiguous())
            middle = token_T1.flatten().median()
            if not middle > 0 or part.count_nonzero() < (1 - _ZEROS) * part.numel():
                continue
            reference = torch.maximum(token_T1, unit_U)
            times = part.div_(reference.clamp_min_(torch.finfo(part.dtype).tiny))
            hit = times > self.spike
            rows += 1
            count += len(part)
            spikes += hit.sum()
            spiked += hit.any(-1).sum()
            channels += unit_U > self.channel * middle
            peak = torch.maximum(peak, times.max().to(peak.dtype))
        return {
            "rows": rows,
            "tokens": count,
            "channels": channels,
            "spikes": spikes,
            "spiked": spiked,
            "peak": peak,
        }

    def values(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See the class."""
        rows, tokens = stats["rows"], stats["tokens"]
        return {
            "channel_outliers": ratio(stats["channels"].sum(-1), rows),
            "spike_tokens": ratio(stats["spiked"], tokens),
            "spikes": ratio(stats["spikes"], tokens),
            "spike_ratio": double(stats["peak"]).where(rows > 0, torch.nan),
            "channel_outlier_share": ratio(stats["channels"], rows[..., None]),
        }


def _medians(x_RC: Tensor) -> Tensor:
    """The lower median of each row, (row); the tensor itself stays as it is."""
    rank = (x_RC.shape[-1] - 1) // 2
    if x_RC.device.type != "cpu":
        return x_RC.kthvalue(rank + 1, dim=-1).values
    # numpy selects with vector instructions, several times faster than torch.median.
    return torch.from_numpy(np.partition(x_RC.numpy(), rank, axis=-1)[:, rank].copy())
