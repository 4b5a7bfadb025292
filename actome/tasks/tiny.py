"""A tiny decoder to train from scratch, with its attention as a switch, and the loop that trains it.

Every tensor that one would want to look at passes through a module of its own, so that `actome.wrap` reaches it by
module path: `module:blocks.0.attn.pattern`, `module:blocks.1.resid_post`, and so on.

Dims: B batch, T position, Q query position, S key position, H head, K width of a head, D model width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class TinyConfig:
    """The shape of a tiny decoder.

    Attributes:
        vocab, d_model, layers, heads, context: the usual numbers.
        d_mlp: width of the feed-forward layer; None is four times `d_model`.
        attention: "softmax", or "sigmoid" without normalisation: each weight is a sigmoid of its own score.
        key_bias: give each head one more key that it learns, with a value of zero: a place to attend to that adds
            nothing. Softmax only.
    """

    vocab: int
    d_model: int = 64
    layers: int = 1
    heads: int = 1
    context: int = 64
    d_mlp: int | None = None
    attention: Literal["softmax", "sigmoid"] = "softmax"
    key_bias: bool = False

    def __post_init__(self) -> None:
        if self.attention not in ("softmax", "sigmoid"):
            raise ValueError(f"attention={self.attention!r} does not exist; choose 'softmax' or 'sigmoid'")
        if self.key_bias and self.attention != "softmax":
            raise ValueError("a key bias takes weight from the other keys, which sigmoid attention does not share out")
        if self.d_model % self.heads:
            raise ValueError(f"d_model={self.d_model} is no multiple of heads={self.heads}")


class Attention(nn.Module):
    """Causal attention. `pattern` sees the weights on tokens, [B, H, Q, S]; a key bias holds what rows lack to one."""

    def __init__(self, config: TinyConfig):
        super().__init__()
        self.config = config
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model, bias=False)
        self.out = nn.Linear(config.d_model, config.d_model, bias=False)
        if config.key_bias:
            # Of the size that torch gives to the bias key of its own attention.
            size = math.sqrt(2 / (1 + config.d_model))
            self.bias_key_HK = nn.Parameter(torch.randn(config.heads, config.d_model // config.heads) * size)
        self.pattern = nn.Identity()

    def forward(self, x_BTD: Tensor) -> Tensor:
        q_BHTK, k_BHTK, v_BHTK = (
            part.unflatten(-1, (self.config.heads, -1)).transpose(1, 2) for part in self.qkv(x_BTD).chunk(3, dim=-1)
        )
        scale = 1 / math.sqrt(q_BHTK.shape[-1])
        scores_BHQS = q_BHTK @ k_BHTK.mT * scale
        T = x_BTD.shape[1]
        future_QS = torch.ones(T, T, dtype=torch.bool, device=x_BTD.device).triu(1)
        scores_BHQS = scores_BHQS.masked_fill(future_QS, float("-inf"))
        if self.config.attention == "sigmoid":
            pattern_BHQS = scores_BHQS.sigmoid()
        elif self.config.key_bias:
            bias_BHQ1 = (q_BHTK * self.bias_key_HK[:, None]).sum(-1, keepdim=True) * scale
            pattern_BHQS = torch.cat([scores_BHQS, bias_BHQ1], dim=-1).softmax(-1)[..., :-1]
        else:
            pattern_BHQS = scores_BHQS.softmax(-1)
        z_BHTK = self.pattern(pattern_BHQS) @ v_BHTK
        return self.out(z_BHTK.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(self, config: TinyConfig):
        super().__init__()
        d_mlp = config.d_mlp or 4 * config.d_model
        self.norm_attn, self.norm_mlp = nn.RMSNorm(config.d_model), nn.RMSNorm(config.d_model)
        self.attn = Attention(config)
        self.up, self.down = nn.Linear(config.d_model, d_mlp), nn.Linear(d_mlp, config.d_model)
        self.resid_pre, self.mlp_act, self.resid_post = nn.Identity(), nn.Identity(), nn.Identity()

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = self.resid_pre(x_BTD)
        x_BTD = x_BTD + self.attn(self.norm_attn(x_BTD))
        hidden = self.mlp_act(F.gelu(self.up(self.norm_mlp(x_BTD))))
        return self.resid_post(x_BTD + self.down(hidden))


class Tiny(nn.Module):
    """A decoder with learned positions: tokens [B, T] to logits [B, T, V].

    >>> model = Tiny(TinyConfig(vocab=16, d_model=8, context=12))
    >>> model(torch.zeros(2, 12, dtype=torch.long)).shape
    torch.Size([2, 12, 16])
    """

    def __init__(self, config: TinyConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab, config.d_model)
        self.positions = nn.Embedding(config.context, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.d_model)
        self.unembed = nn.Linear(config.d_model, config.vocab, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02 if isinstance(module, nn.Embedding) else 0.05)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTD = self.embed(tokens_BT) + self.positions(torch.arange(tokens_BT.shape[1], device=tokens_BT.device))
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return self.unembed(self.norm(x_BTD))


def loss(model: nn.Module, tokens_BT: Tensor) -> Tensor:
    """Mean next-token cross-entropy, in nats."""
    logits_BTV = model(tokens_BT[:, :-1])
    return F.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT[:, 1:].flatten())


def train(
    model: nn.Module,
    tokens_NT: Tensor,
    batch_size: int = 32,
    lr: float = 3e-3,
    weight_decay: float = 0.1,
    progress: Callable[[int, float], None] | None = None,
) -> nn.Module:
    """One pass over the sequences with AdamW, a short warm-up and a cosine to zero; changes and returns the model.

    Args:
        model: anything that gives logits [B, T, V] for tokens [B, T].
        tokens_NT: every sequence is seen once, so the number of steps is N / batch_size.
        progress: called after each step with the steps done and the loss.
    """
    steps = len(tokens_NT) // batch_size
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    model.train()
    for step in range(steps):
        batch_loss = loss(model, tokens_NT[step * batch_size : (step + 1) * batch_size])
        optimizer.zero_grad()
        batch_loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(step + 1, batch_loss.item())
    return model.eval()
