"""The plain edits: add, set, scale, mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..core.clamp import Clamp
from ..core.clamping import Place


@dataclass(frozen=True, eq=False)
class Add(Clamp):
    """Adds a value: ``x + scale * value``. The steering vector's clamp.

    Args:
        value: a number, or a tensor whose shape equals the site's last dims, such as (d_model,). A tensor that
            requires grad gets its gradient.
        scale: multiplies the value.

    Raises:
        ClampError: the shape does not fit the site.

    Example:
        >>> import actome as ac, torch
        >>> model = ac.demo()
        >>> with model.clamp(ac.Add("blocks.1.resid.post", torch.ones(model.d_model), scale=0.5, positions=-1)):
        ...     changed = model.logits("The file is")
    """

    value: Any = 0.0
    scale: float = 1.0

    def transform(self, x: Tensor, place: Place) -> Tensor:
        value = place.fit(self.value, x)
        return x + (value if self.scale == 1.0 else self.scale * value)


@dataclass(frozen=True, eq=False)
class Set(Clamp):
    """Sets the activation to a value.

    Args:
        value: a number, or a tensor whose shape equals the site's last dims.

    Raises:
        ClampError: the shape does not fit the site.
    """

    value: Any = 0.0

    def transform(self, x: Tensor, place: Place) -> Tensor:
        value = place.fit(self.value, x)
        return value.expand_as(x) if isinstance(value, Tensor) else x.new_full((), value).expand_as(x)


@dataclass(frozen=True, eq=False)
class Scale(Clamp):
    """Multiplies the activation by a factor: a number, or a tensor whose shape equals the site's last dims."""

    factor: Any = 1.0

    def transform(self, x: Tensor, place: Place) -> Tensor:
        return x * place.fit(self.factor, x, "factor")


@dataclass(frozen=True, eq=False)
class Mask(Clamp):
    """Keeps the activation where the mask is true and sets it to zero elsewhere.

    Args:
        keep: bool tensor whose shape equals the site's last dims, such as (d_mlp,) to keep some units. At
            ``attn.scores`` what is masked is set to the lowest number instead, so that the pattern has a zero there.
    """

    keep: Any = True

    def transform(self, x: Tensor, place: Place) -> Tensor:
        keep = place.fit(self.keep, x, "keep")
        keep = keep.bool() if isinstance(keep, Tensor) else x.new_full((), bool(keep)).bool()
        fill = (
            x.new_full((), -1e30 if x.dtype.itemsize > 2 else -6e4) if "scores" in place.site.name else x.new_zeros(())
        )
        return x.where(keep, fill)
