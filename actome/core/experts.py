"""Taps inside a sparse mixture of experts: router logits, combine weights, choices, and each expert's output.

The seams are the router module, whose forward returns (logits, weights, indices), and the experts module, which is
called with (hidden, indices, weights). Tokens arrive flattened there; taps see (batch, pos, ...).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .errors import ClampError
from .taps import Point, mode_during

Tokens = Callable[[], tuple[int, int]]


def _by_token(x: Tensor, tokens: Tokens) -> Tensor:
    return x if x.ndim > 2 else x.view(*tokens(), x.shape[-1])


class RouterPoint(Point):
    """Router logits (batch, pos, expert).

    A write is made where the router computes them, so that its own softmax, top k and normalisation follow from it.
    """

    needs_tokens = True

    def __init__(self, module: nn.Module, tokens: Tokens):
        super().__init__()
        self.module, self.tokens = module, tokens

    def install(self) -> Callable[[], None]:
        return mode_during(self.module, lambda: _RouterMode(self))


class _RouterMode(TorchFunctionMode):
    """Sees the first linear map of a router's forward: its logits."""

    def __init__(self, point: RouterPoint):
        self.point, self.seen = point, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.seen or func is not F.linear:
            return out
        self.seen = True
        logits = _by_token(out, self.point.tokens)
        new = self.point.write(logits)
        self.point.read(new)
        return out if new is logits and not self.point.keeps else new.reshape(out.shape)


class WeightsPoint(Point):
    """The dense combine weights (batch, pos, expert), zero where an expert was not chosen.

    A write may change or zero the weight of a chosen expert; to have another expert chosen, clamp ``moe.router``.
    """

    needs_tokens = True

    def __init__(self, module: nn.Module, tokens: Tokens, experts: int, part: str = "weights"):
        super().__init__()
        self.module, self.tokens, self.experts, self.part = module, tokens, experts, part

    def install(self) -> Callable[[], None]:
        return self.module.register_forward_hook(self._after).remove

    def _after(self, module: nn.Module, args: Any, out: Any) -> Any:
        logits, weights, indices = out
        if self.part == "chosen":
            self.read(_by_token(indices, self.tokens))
            return None
        flat = weights.reshape(-1, weights.shape[-1])
        index = indices.reshape(-1, indices.shape[-1])
        dense = torch.zeros(flat.shape[0], self.experts, dtype=flat.dtype, device=flat.device).scatter(1, index, flat)
        seen = _by_token(dense, self.tokens)
        new = self.write(seen)
        self.read(new)
        if new is seen and not self.keeps:
            return None
        new = new.reshape(dense.shape)
        if bool((new.scatter(1, index, 0.0) != 0).any()):
            raise ClampError(
                "moe.weights: a weight was given to an expert that the router did not choose; "
                "clamp moe.router to change which experts are chosen"
            )
        return logits, new.gather(1, index).view_as(weights), indices


class ExpertsPoint(Point):
    """The chosen experts' outputs before weighting, (batch, pos, choice, d_model).

    The experts module only gives their weighted sum, so each choice is computed again on its own: reading costs as
    much as the experts themselves.
    """

    needs_tokens = True

    def __init__(self, module: nn.Module, tokens: Tokens):
        super().__init__()
        self.module, self.tokens = module, tokens

    def install(self) -> Callable[[], None]:
        return self.module.register_forward_hook(self._after, with_kwargs=True).remove

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> Any:
        hidden, indices, weights = (*args, *kwargs.values())[:3]
        one = torch.ones_like(weights[:, :1])
        choices = [module.forward(hidden, indices[:, c : c + 1], one) for c in range(indices.shape[-1])]
        outputs = torch.stack(choices, dim=-2).view(*self.tokens(), len(choices), hidden.shape[-1])
        new = self.write(outputs)
        self.read(new)
        if new is outputs and not self.keeps:
            return None
        return (new.flatten(0, 1) * weights[..., None]).sum(dim=-2).to(out.dtype).view_as(out)
