"""Attention of a subject: softmax, sigmoid, ReLU or linear, through transformers' registry of attention functions.

Dims: B batch, T position, Q query, S key, H head, K width of a head, D model width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from actome.core.attention import weighs

from .config import SubjectConfig
from .positions import rotated, visible


@weighs
def _each_on_its_own(scores_BHQS: Tensor, kind: str, scale: str) -> Tensor:
    """The pattern of scores where no key takes weight from another; hidden keys, whose score is lowest, get zero."""
    hidden = scores_BHQS <= torch.finfo(scores_BHQS.dtype).min / 2
    if kind == "sigmoid":
        pattern = scores_BHQS.sigmoid()
    elif kind == "relu":
        pattern = scores_BHQS.relu()
    else:
        pattern = scores_BHQS.masked_fill(hidden, 0.0)
    if scale == "keys":
        return pattern / (~hidden).sum(-1, keepdim=True).clamp_min(1)
    if scale == "sum":
        return pattern / pattern.abs().sum(-1, keepdim=True).clamp_min(1e-6)
    return pattern


def eager_attention_forward(
    module: Attention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention step by step, in the form that transformers' registry wants.

    Args:
        query, key, value: (batch, head, query or key, d_head).
        attention_mask: what is added to the scores, broadcastable to (batch, head, query, key); ``None`` is causal
            where the module is.

    Returns:
        z (batch, query, head, d_head) and the pattern (batch, head, query, key).
    """
    scaling = module.scaling if scaling is None else scaling
    queries, keys = query.shape[-2], key.shape[-2]
    if attention_mask is None and module.is_causal and queries > 1:
        attention_mask = visible(queries, keys, True, 0, query.dtype, query.device)
    scores_BHQS = torch.matmul(query, key.transpose(-1, -2)) * scaling
    if attention_mask is not None:
        scores_BHQS = scores_BHQS + attention_mask
    if module.key_bias is not None:
        free_BHQ1 = (query * module.key_bias[:, None]).sum(-1, keepdim=True) * scaling
        scores_BHQS = torch.cat([scores_BHQS, free_BHQ1], dim=-1)
    if module.kind == "softmax":
        pattern_BHQS = F.softmax(scores_BHQS, dim=-1, dtype=torch.float32).to(query.dtype)
    else:
        pattern_BHQS = _each_on_its_own(scores_BHQS, module.kind, module.scale)
    pattern_BHQS = pattern_BHQS[..., :keys]
    return torch.matmul(pattern_BHQS, value).transpose(1, 2), pattern_BHQS


class Attention(nn.Module):
    """Self-attention with fused queries, keys and values.

    Plain softmax goes through whatever implementation the model was given (SDPA by default); the rest is eager.
    """

    def __init__(self, config: SubjectConfig, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        self.kind, self.scale, self.is_causal = config.attention, config.attention_scale, config.causal
        self.d_head = config.d_head
        self.scaling = config.d_head**-0.5
        width = config.heads * config.d_head
        self.qkv = nn.Linear(config.d_model, 3 * width, bias=config.bias)
        self.out = nn.Linear(width, config.d_model, bias=config.bias)
        self.out.writes = True
        if config.qk_norm:
            self.q_norm, self.k_norm = nn.RMSNorm(config.d_head), nn.RMSNorm(config.d_head)
        self.key_bias = nn.Parameter(torch.empty(config.heads, config.d_head)) if config.key_bias else None
        self.fused = config.attention == "softmax" and not config.key_bias

    def forward(
        self, x_BTD: Tensor, mask: Tensor | None, turn: tuple[Tensor, Tensor] | None, cache: Any = None
    ) -> tuple[Tensor, Tensor | None]:
        """What attention adds to the stream (batch, pos, d_model), and the pattern where it was computed."""
        qkv = self.qkv(x_BTD).unflatten(-1, (3, -1, self.d_head))
        q_BHTK, k_BHTK, v_BHTK = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.config.qk_norm:
            q_BHTK, k_BHTK = self.q_norm(q_BHTK), self.k_norm(k_BHTK)
        if turn is not None:
            q_BHTK, k_BHTK = rotated(q_BHTK, *turn), rotated(k_BHTK, *turn)
        if cache is not None:
            k_BHTK, v_BHTK = cache.update(k_BHTK, v_BHTK, self.layer)
        # The registry is asked also where only the eager function will do: that is where taps stand.
        name = self.config._attn_implementation if self.fused else "eager"
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
        z, pattern = attend(self, q_BHTK, k_BHTK, v_BHTK, mask, dropout=0.0, scaling=self.scaling)
        return self.out(z.flatten(2)), pattern
