"""Tables of positions and masks, made once for a length and device.

Dims: T position, Q query, S key, H head, K width of a head, D model width.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=8)
def rotary(length: int, d_head: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines (length, d_head / 2) of angles ``t * 10000^(-2i / d_head)``.

    **Source**: Su et al. 2021, "RoFormer", section 3.2.
    """
    # A table made in inference mode could not be used in training afterwards; not every device has float64.
    with torch.inference_mode(False):
        rates = 10000.0 ** (-torch.arange(0, d_head, 2, dtype=torch.float64) / d_head)
        angles_TK = torch.arange(length, dtype=torch.float64)[:, None] * rates
        return angles_TK.cos().to(device, dtype), angles_TK.sin().to(device, dtype)


def rotated(x_BHTK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns channel pairs (i, i + d_head / 2) by the angles of their positions."""
    left, right = x_BHTK.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


@lru_cache(maxsize=8)
def sinusoidal(length: int, d_model: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Sines in even channels and cosines in odd ones, (length, d_model).

    **Source**: Vaswani et al. 2017, "Attention is all you need", section 3.5.
    """
    with torch.inference_mode(False):
        channels = torch.arange(d_model)
        rates = 10000.0 ** (-(channels // 2 * 2).double() / d_model)
        angles_TD = torch.arange(length)[:, None] * rates
        return torch.where(channels % 2 == 0, angles_TD.sin(), angles_TD.cos()).to(device, dtype)


@lru_cache(maxsize=8)
def visible(queries: int, keys: int, causal: bool, slopes: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What is added to scores, (1, 1 or head, query, key): the lowest number where a query may not look, else 0.

    The last query is the last key. With `slopes` (the number of heads, or 0) what may be seen is
    lowered by ``2^(-8 h / heads)`` a step back, for h = 1 .. heads.

    **Source**: for the slopes, Press et al. 2022, "Train short, test long", section 3.
    """
    with torch.inference_mode(False):
        back_QS = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
        mask = torch.zeros(1, queries, keys, device=device)
        if slopes:
            rates = 2.0 ** (-8.0 * torch.arange(1, slopes + 1, device=device) / slopes)
            mask = -rates[:, None, None] * back_QS
        mask = mask.to(dtype)
        return mask.masked_fill(back_QS < 0, torch.finfo(dtype).min)[None] if causal else mask[None]
