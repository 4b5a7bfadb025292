"""Bounds: clip activations, or keep only the largest ones of each token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..core.clamp import Clamp
from ..core.clamping import Place
from ..core.errors import ClampError


@dataclass(frozen=True, eq=False)
class Clip(Clamp):
    """Bounds every value to [low, high], or each vector's norm in the last dim to at most `norm`.

    Args:
        low, high: bounds in the activation's own units; either may be left out.
        norm: largest Euclidean norm of the last dim; longer vectors are shortened, their direction kept.

    Raises:
        ClampError: no bound was given, or low is above high.
    """

    low: float | None = None
    high: float | None = None
    norm: float | None = None

    def __post_init__(self) -> None:
        if self.low is None and self.high is None and self.norm is None:
            raise ClampError("Clip needs low=, high= or norm=")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ClampError(f"Clip: low {self.low} is above high {self.high}")

    def transform(self, x: Tensor, place: Place) -> Tensor:
        if self.low is not None or self.high is not None:
            x = x.clamp(self.low, self.high)
        if self.norm is not None:
            length = x.float().norm(dim=-1, keepdim=True)
            x = x * (self.norm / length.clamp_min(1e-12)).clamp_max(1.0).to(x.dtype)
        return x


@dataclass(frozen=True, eq=False)
class TopK(Clamp):
    """Keeps the k largest entries of the last dim of each token and sets the others to zero.

    Gradients flow through the kept ones.

    Args:
        k: how many to keep; exactly k, ties broken by index.
        by: ``"abs"`` compares magnitudes, ``"value"`` signed values.

    Raises:
        ClampError: k is not between 1 and the size of the last dim.
    """

    k: int = 1
    by: Literal["abs", "value"] = "abs"

    def transform(self, x: Tensor, place: Place) -> Tensor:
        if not 1 <= self.k <= x.shape[-1]:
            raise ClampError(f"{place.site.name}: TopK keeps 1 to {x.shape[-1]} units, not {self.k}")
        key = x.detach().abs() if self.by == "abs" else x.detach()
        index = key.topk(self.k, dim=-1).indices
        return x * torch.zeros_like(x).scatter(-1, index, 1.0)
