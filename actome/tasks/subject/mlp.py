"""The MLP of a subject: plain, gated, or a sparse mixture of either.

Dims: B batch, T position, N tokens, D model width, F MLP width, E expert, C choice.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import SubjectConfig

ACTS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU, "gelu": nn.GELU}


class MLP(nn.Module):
    """``down(act(up x))``, or ``down(act(gate x) * up x)`` when gated, with gate and up in one map."""

    def __init__(self, config: SubjectConfig):
        super().__init__()
        self.gated = config.mlp == "gated"
        self.up = nn.Linear(config.d_model, config.d_mlp * (1 + self.gated), bias=config.bias)
        self.act = ACTS[config.act]()
        self.down = nn.Linear(config.d_mlp, config.d_model, bias=config.bias)
        self.down.writes = True

    def forward(self, x_BTD: Tensor) -> Tensor:
        up = self.up(x_BTD)
        if not self.gated:
            return self.down(self.act(up))
        gate, up = up.chunk(2, dim=-1)
        return self.down(self.act(gate) * up)


class Router(nn.Module):
    """Chooses `active_experts` of the experts for each token; their weights are a softmax over the chosen ones."""

    def __init__(self, config: SubjectConfig):
        super().__init__()
        self.num_experts, self.top_k = config.experts, config.active_experts
        self.weight = nn.Parameter(torch.empty(config.experts, config.d_model))

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (token, expert), weights (token, choice) and indices (token, choice)."""
        logits_NE = F.linear(x_ND, self.weight)
        top_NC, chosen_NC = logits_NE.topk(self.top_k, dim=-1)
        return logits_NE, top_NC.softmax(-1, dtype=torch.float32).to(x_ND.dtype), chosen_NC


class Experts(nn.Module):
    """The MLPs that the router chooses from, run one after the other on their tokens."""

    def __init__(self, config: SubjectConfig):
        super().__init__()
        E, D, F_ = config.experts, config.d_model, config.d_mlp
        self.gated, self.act_fn = config.mlp == "gated", ACTS[config.act]()
        # Gate and up in one when gated, as transformers' own experts have it.
        self.gate_up_proj = nn.Parameter(torch.empty(E, F_ * (1 + self.gated), D))
        self.down_proj = nn.Parameter(torch.empty(E, D, F_))

    def forward(self, x_ND: Tensor, chosen_NC: Tensor, weights_NC: Tensor) -> Tensor:
        """The weighted sum of the chosen experts' outputs, (token, d_model)."""
        flat = chosen_NC.flatten()
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=len(self.down_proj)).tolist()
        token = order // chosen_NC.shape[1]
        sent = x_ND[token].split(counts)
        done = [self._one(e, x) for e, x in enumerate(sent) if len(x)]
        out = torch.cat(done) * weights_NC.flatten()[order, None]
        return torch.zeros_like(x_ND).index_add(0, token, out.to(x_ND.dtype))

    def _one(self, e: int, x: Tensor) -> Tensor:
        up = F.linear(x, self.gate_up_proj[e])
        if self.gated:
            gate, up = up.chunk(2, dim=-1)
            return F.linear(self.act_fn(gate) * up, self.down_proj[e])
        return F.linear(self.act_fn(up), self.down_proj[e])


class SparseMLP(nn.Module):
    """A router and its experts in the place of an MLP."""

    def __init__(self, config: SubjectConfig):
        super().__init__()
        self.router, self.experts = Router(config), Experts(config)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_ND = x_BTD.flatten(0, -2)
        _, weights_NC, chosen_NC = self.router(x_ND)
        return self.experts(x_ND, chosen_NC, weights_NC).view_as(x_BTD)
