"""A linear map as it would be with other weights, without touching the weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.clamp import Clamp
from ..core.clamping import Place
from ..core.errors import ClampError


@dataclass(frozen=True, eq=False)
class WeightUpdate(Clamp):
    r"""Adds what a change of a linear map's weights would add to its output: :math:`m (\Delta W x + \Delta b)`.

    The site is the output of the map, `read` its input; the clamped model computes
    :math:`y = (W + m \Delta W) x + b + m \Delta b` while its weights stay as they are. Weights and bias at strengths of
    their own are two of these clamps, one with each.

    Args:
        read: the site that is the map's input: ``mlp.act`` for ``mlp.out``, ``attn.z`` for ``attn.out``,
            ``module:PATH@in`` for ``module:PATH``. Dims behind (batch, pos), such as heads, are taken as one.
        weight: (out, in), :math:`\Delta W`; or
        down, up: (rank, in) and (out, rank), whose product it is.
        bias: (out), :math:`\Delta b`.
        scale: the multiplier :math:`m`.

    Raises:
        ClampError: nothing to add, both forms of the weights, or shapes that do not fit the map.

    >>> import actome as ac
    >>> model = ac.demo()
    >>> width = model.table["blocks.1.mlp.act"].size("d_mlp")
    >>> update = WeightUpdate("blocks.1.mlp.out", read="blocks.1.mlp.act", weight=torch.zeros(model.d_model, width))
    >>> with model.clamp(update):
    ...     same = model.logits("The file is")
    >>> torch.equal(same, model.logits("The file is"))
    True

    Source: the one form of weight edits, LoRA and added vectors is that of Why Steering Works: Toward a Unified View of
    Language Model Parameter Dynamics.
    """

    read: str = ""
    weight: Tensor | None = None
    down: Tensor | None = None
    up: Tensor | None = None
    bias: Tensor | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        if (self.down is None) != (self.up is None):
            raise ClampError(
                "WeightUpdate takes both factors of a low-rank change: down= (rank, in) and up= (out, rank)"
            )
        if self.weight is not None and self.down is not None:
            raise ClampError("WeightUpdate takes the change as weight= or as down= and up=, not as both")
        if self.weight is None and self.down is None and self.bias is None:
            raise ClampError("WeightUpdate has nothing to add; give weight=, down= with up=, or bias=")
        if self.reads and not self.read:
            raise ClampError("WeightUpdate needs read=, the site of the map's input, such as blocks.1.mlp.act")
        for name, dims in (("weight", 2), ("down", 2), ("up", 2), ("bias", 1)):
            value = getattr(self, name)
            if value is not None and value.ndim != dims:
                shape = {1: "(out)", 2: "a matrix"}[dims]
                raise ClampError(f"WeightUpdate: {name} has the shape {tuple(value.shape)}; it is {shape}")
        if self.down is not None and self.up is not None and len(self.down) != self.up.shape[1]:
            raise ClampError(
                f"WeightUpdate: down is {tuple(self.down.shape)} and up {tuple(self.up.shape)}; their ranks differ"
            )

    @property
    def reads(self) -> tuple[str, ...]:
        """The map's input, where the change depends on it."""
        return () if self.weight is None and self.down is None else (self.read,)

    def transform(self, x: Tensor, place: Place) -> Tensor:
        added = self._of_input(x, place) if self.reads else None
        if self.bias is not None:
            bias = _on(self.bias, x)
            added = bias if added is None else added + bias
        assert added is not None
        if place.choices:
            added = place.select(added.expand(*x.shape[:-1], -1))
        if added.shape[-1] != x.shape[-1]:
            raise ClampError(
                f"{place.site.name}: the update gives {added.shape[-1]} numbers at each position, and the site has "
                f"{x.shape[-1]}"
            )
        return x + (self.scale * added).to(x.dtype)

    def _of_input(self, x: Tensor, place: Place) -> Tensor:
        """What the change of the weights gives for this forward's input, in float32."""
        read = place.seen[self.read]
        read = read.flatten(x.ndim - 1) if read.ndim > x.ndim else read
        first = self.weight if self.weight is not None else self.down
        assert first is not None
        if read.shape[:-1] != x.shape[:-1] or read.shape[-1] != first.shape[1]:
            raise ClampError(
                f"{self.read} has the shape {tuple(read.shape)} where {place.site.name} has {tuple(x.shape)}; the "
                f"update takes {first.shape[1]} numbers at each position"
            )
        out = F.linear(read.float(), _on(first, x))
        return out if self.up is None else F.linear(out, _on(self.up, x))


def _on(value: Tensor, x: Tensor) -> Tensor:
    return value.to(device=x.device, dtype=torch.float32)
