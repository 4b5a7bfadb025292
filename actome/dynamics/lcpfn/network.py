"""The network of a prior-data fitted network over one input: a set of seen points in, log densities at others out.

Dims: B curves, C seen points (context), Q points asked for, T = C + Q, D width, H head, K bars.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actome.core.errors import MeasureError


@dataclass(frozen=True)
class PFNConfig:
    """Shape of the network: width, layers, heads, width of the MLP in multiples of the width, and bars."""

    d_model: int = 64
    layers: int = 3
    heads: int = 4
    mlp: int = 2
    bars: int = 100

    def __post_init__(self) -> None:
        least = {"d_model": 1, "layers": 1, "heads": 1, "mlp": 1, "bars": 3}
        for name, value in least.items():
            if not isinstance(getattr(self, name), int) or getattr(self, name) < value:
                raise MeasureError(f"{name}={getattr(self, name)}: give a whole number of at least {value}")
        if self.d_model % self.heads:
            raise MeasureError(f"d_model={self.d_model} is no multiple of heads={self.heads}")


class PFNBlock(nn.Module):
    """Attention over the seen points and itself, then an MLP; each reads a norm of the stream and adds to it."""

    def __init__(self, config: PFNConfig):
        super().__init__()
        d = config.d_model
        self.heads = config.heads
        self.norm_attn, self.norm_mlp = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.mlp = nn.Sequential(nn.Linear(d, config.mlp * d), nn.GELU(), nn.Linear(config.mlp * d, d))

    def forward(self, x_BTD: Tensor, seen_TT: Tensor) -> Tensor:
        b, t, d = x_BTD.shape
        qkv = self.qkv(self.norm_attn(x_BTD)).view(b, t, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        z = F.scaled_dot_product_attention(q, k, v, attn_mask=seen_TT)
        x_BTD = x_BTD + self.out(z.transpose(1, 2).reshape(b, t, d))
        return x_BTD + self.mlp(self.norm_mlp(x_BTD))


class PFN(nn.Module):
    """Seen points as linear(x) + linear(y), points asked for as linear(x); no positions, so that order tells nothing.

    Source: Transformers Can Do Bayesian Inference, section 4; Efficient Bayesian Learning Curve Extrapolation using
    Prior-Data Fitted Networks, section 4. Norms stand before attention and MLP here, and there is no dropout.
    """

    def __init__(self, config: PFNConfig):
        super().__init__()
        self.config = config
        self.embed_x, self.embed_y = nn.Linear(1, config.d_model), nn.Linear(1, config.d_model)
        self.blocks = nn.ModuleList(PFNBlock(config) for _ in range(config.layers))
        self.norm, self.read = nn.LayerNorm(config.d_model), nn.Linear(config.d_model, config.bars)

    def forward(self, x_BT: Tensor, y_BC: Tensor) -> Tensor:
        """Logits (B, Q, K) at the last Q of x, given y at the first C; x in (0, 1], y as in the prior."""
        t, c = x_BT.shape[1], y_BC.shape[1]
        # Uniform x and y of mean 0 and variance 1.
        x_BTD = self.embed_x((x_BT[..., None] - 0.5) * 12**0.5)
        y_BCD = self.embed_y((y_BC[..., None] - 0.5) * 12**0.5)
        x_BTD = torch.cat([x_BTD[:, :c] + y_BCD, x_BTD[:, c:]], 1)
        index = torch.arange(t, device=x_BT.device)
        seen_TT = (index[None] < c) | (index[None] == index[:, None])
        for block in self.blocks:
            x_BTD = block(x_BTD, seen_TT)
        return self.read(self.norm(x_BTD[:, c:]))
