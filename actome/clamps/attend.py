"""Attention set to what one knows it should be, while everything around it learns or works as it does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..core.clamp import Clamp
from ..core.clamping import Place
from ..core.errors import ClampError

_NAMED = ("previous", "self")


@dataclass(frozen=True, eq=False)
class AttendTo(Clamp):
    """Sets rows of an attention pattern: each query puts its weight on the keys that it is told to.

    The pattern that was there passes no gradient on; values, the other heads and everything else do, so a model can be
    trained around a head that already does its part (the "artificial optogenetics" of the source).

    Args:
        keys: ``"previous"``: the token before, and itself for the first real one; ``"self"``; a tensor
            (query, key) or (batch, query, key), bools that share a query's weight out evenly or the weights
            themselves; or a function that is given the pattern (batch, head, query, key) and returns such a tensor, for
            targets that change with the batch. A query without any key keeps the pattern that it has.

    Raises:
        ClampError: a site that is no pattern, a name that does not exist, or a tensor that does not fit.

    Example:
        >>> import actome as ac
        >>> model = ac.demo()
        >>> with model.clamp(AttendTo("blocks.0.attn.pattern", "previous", heads=[1])):
        ...     seen = model.record("The file is", "blocks.0.attn.pattern")["blocks.0.attn.pattern"]
        >>> seen[0, 1].diagonal(-1).tolist() == [1.0] * (seen.shape[-1] - 1)
        True

    Source: Singh et al. 2024, What needs to go right for an induction head? (clamping of patterns).
    """

    needs_run: ClassVar[bool] = True  # padding says which token is the first
    keys: str | Tensor | Callable[[Tensor], Tensor] = "previous"

    def __post_init__(self) -> None:
        if isinstance(self.keys, str):
            if self.keys not in _NAMED:
                raise ClampError(f"AttendTo takes 'previous', 'self', a tensor or a function, not {self.keys!r}")
        elif not isinstance(self.keys, Tensor) and not callable(self.keys):
            raise ClampError(f"AttendTo takes 'previous', 'self', a tensor or a function, not {self.keys!r}")

    def transform(self, x: Tensor, place: Place) -> Tensor:
        if not place.site.name.endswith(".pattern"):
            raise ClampError(f"{place.site.name} is no attention pattern; AttendTo sets attn.pattern")
        if isinstance(self.keys, str):
            if ".cross." in place.site.name:
                raise ClampError(f"{place.site.name} looks at another text, with no {self.keys!r} token; give keys")
            mask_BS = place.run.source if place.site.stack == "encoder" else place.run.mask
            wanted = _named(self.keys, x, mask_BS)
        else:
            wanted = self.keys if isinstance(self.keys, Tensor) else self.keys(x)
        B, _, Q, S = x.shape
        if tuple(wanted.shape) not in ((Q, S), (B, Q, S)):
            raise ClampError(
                f"{place.site.name}: keys of the shape {tuple(wanted.shape)} do not fit; give (query, key) = {(Q, S)} "
                f"or (batch, query, key) = {(B, Q, S)}"
            )
        weight = wanted.to(x.device, x.dtype)
        if wanted.dtype == torch.bool:
            weight = weight / weight.sum(-1, keepdim=True).clamp_min(1)
        told = (weight != 0).any(-1, keepdim=True)
        if weight.ndim == 3:
            weight, told = weight[:, None], told[:, None]
        return torch.where(told, weight, x)


def _named(keys: str, x: Tensor, mask_BS: Tensor | None) -> Tensor:
    """(query, key) or, with padding, (batch, query, key) bools; the queries are the last of the keys."""
    Q, S = x.shape[-2:]
    place_Q = torch.arange(S - Q, S, device=x.device)
    if keys == "self":
        return torch.nn.functional.one_hot(place_Q, S).bool()
    before_QS = torch.nn.functional.one_hot((place_Q - 1).clamp_min(0), S).bool()
    if mask_BS is None:
        return before_QS
    mask_BS = mask_BS.to(x.device).bool()
    first_BQ = place_Q == mask_BS.long().argmax(-1, keepdim=True)
    own_QS = torch.nn.functional.one_hot(place_Q, S).bool()
    seen_BQS = torch.where(first_BQ[..., None], own_QS, before_QS)
    return seen_BQS & mask_BS[:, S - Q :, None]  # padding is left as it is
