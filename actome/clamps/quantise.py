"""Fake quantisation: activations rounded to few bits and given back as floats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from ..core.clamp import Clamp
from ..core.clamping import Place
from ..core.errors import ClampError

Per = Literal["tensor", "token", "channel"]


@dataclass(frozen=True, eq=False)
class Quantise(Clamp):
    r"""Rounds to symmetric integers of few bits, :math:`Q(x) = s \, \mathrm{round}(x / s)`, by the largest magnitude.

    The scale :math:`s = \max |x| / (2^{b-1} - 1)` is shared by a row of the batch (``"tensor"``: what a runtime sees
    that serves one request at a time), by a token, or by a channel of a row. Padding has no part in it. The gradient
    passes as if nothing had been rounded (straight through).

    Args:
        bits: 2 or more.
        per: what shares a scale.

    Raises:
        ClampError: fewer than 2 bits, another `per`, or a site without a batch dim first.

    Source: symmetric absmax rounding to nearest as in Dettmers et al. 2022, LLM.int8(), section 2.1; ``"token"`` is the
    activations' part of their vector-wise quantisation.

    Example:
        >>> import actome as ac
        >>> from actome.clamps import Quantise
        >>> model = ac.demo()
        >>> with model.clamp(Quantise("blocks.0.mlp.act", 4)):
        ...     act = model.record("import os", "blocks.0.mlp.act")["blocks.0.mlp.act"]
        >>> len(act.unique()) <= 15
        True
    """

    needs_run: ClassVar[bool] = True

    bits: int = 8
    per: Per = "tensor"

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or self.bits < 2:
            raise ClampError(f"Quantise rounds to 2 bits or more, not {self.bits!r}")
        if self.per not in ("tensor", "token", "channel"):
            raise ClampError(f'Quantise takes per="tensor", "token" or "channel", not {self.per!r}')

    def transform(self, x: Tensor, place: Place) -> Tensor:
        # The dims of a plain module's site are not named; there the batch is first too.
        if x.ndim < 2 or (place.dims and place.dims[0] != "batch"):
            raise ClampError(f"{place.site.name}: Quantise needs a batch dim first, and the dims are {place.dims}")
        magnitude = x.detach().abs()
        mask = place.run.mask
        if mask is not None and self.per != "token" and place.dims[:2] in ((), ("batch", "pos")):
            real = mask[:, -x.shape[1] :].to(x.device)
            if real.shape != x.shape[:2]:
                raise ClampError(f"{place.site.name}: the mask is {tuple(real.shape)}, and this {tuple(x.shape)}")
            magnitude = magnitude.masked_fill(~real[(...,) + (None,) * (x.ndim - 2)], 0.0)
        over = {"tensor": tuple(range(1, x.ndim)), "token": (-1,), "channel": tuple(range(1, x.ndim - 1)) or (0,)}
        rounded = round_to(x.detach(), magnitude.amax(over[self.per], keepdim=True), self.bits)
        return x + (rounded - x.detach())


def round_to(x: Tensor, largest: Tensor, bits: int) -> Tensor:
    """`x` on the grid of symmetric integers whose highest stands for `largest`, which has a shape that broadcasts.

    Computed in float32 and given back in the dtype of `x`; what lies beyond `largest` becomes the highest integer.

    >>> import torch
    >>> round_to(torch.tensor([1.0, 0.4, -0.9]), torch.tensor(1.0), 2).tolist()
    [1.0, 0.0, -1.0]
    """
    top = 2 ** (bits - 1) - 1
    step = largest.float() / top
    per_step = step.reciprocal().where(step > 0, 0.0)
    return ((x.float() * per_step).round().clamp(-top, top) * step).to(x.dtype)
