"""Clamps: what is done to a tensor on its way through, and where. The base class and its gates.

The clamps themselves are in `actome.clamps`; each is a small frozen dataclass with one method, `transform`. How they
are put to work is in `actome.core.clamping`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import KW_ONLY, dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from .errors import ClampError

if TYPE_CHECKING:
    from .clamping import Place

Index = int | slice | range | Iterable[int]


@dataclass(frozen=True, eq=False)
class When:
    """A condition on another site's activation in the same forward.

    Args:
        site: a site that the forward reaches before the clamp's.
        test: takes that site's tensor and returns bools: one, (batch,), or (batch, pos).
        latch: while generating, judge the prompt and keep what was found for the rest of each sequence. By default
            each forward is judged anew.

    Example:
        >>> When("blocks.0.resid.post", lambda resid: resid[..., 5] > 2.0).site
        'blocks.0.resid.post'
    """

    site: str
    test: Callable[[Tensor], Tensor] | None = None
    latch: bool = False

    @property
    def parts(self) -> tuple[When, ...]:
        """The conditions on single sites that it is made of."""
        return (self,)

    @property
    def needs_run(self) -> bool:
        """Whether it has to know the padding or the step of the forward."""
        return self.latch

    def holds(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Whether it is true, bools (), (batch,) or (batch, pos), of its site's tensor and its padding (batch, pos)."""
        if self.test is None:
            raise ClampError(f"the condition at {self.site} has no test")
        return torch.as_tensor(self.test(x))

    def combine(self, flags: tuple[Tensor, ...]) -> Tensor:
        """What its parts come to."""
        return flags[0]


@dataclass(frozen=True, eq=False)
class Clamp:
    """Base of all clamps: a site (or a pattern of sites) and the gates that say where it applies.

    Args:
        site: name or pattern of the sites to change.
        positions: int, list, range, slice, or bool tensor (batch, pos); counted from each row's first real token,
            negative from its last one in the forward at hand (while generating: the newest token).
        heads: indices of heads (key-value heads at ``attn.k`` and ``attn.v``).
        units: indices in the last dim: residual channels, MLP units, a head's channels, experts, keys.
        rows: rows of the batch; give several clamps with different rows to treat rows differently.
        phase: ``"prompt"`` or ``"generated"``.
        steps: 0 is the forward that reads the prompt, k the one that reads the k-th generated token.
        when: a condition on another site, see `When`.

    A subclass whose `transform` looks at ``place.run`` (its mask, its step) says so with ``needs_run = True``;
    otherwise what it finds there may be of an earlier forward.
    """

    needs_run: ClassVar[bool] = False
    site: str
    _: KW_ONLY
    positions: Any = None
    heads: Index | None = None
    units: Index | None = None
    rows: Index | None = None
    phase: Literal["prompt", "generated"] | None = None
    steps: Index | None = None
    when: When | None = None

    @property
    def reads(self) -> tuple[str, ...]:
        """Earlier sites whose tensors of the same forward it needs, whole and unmasked; `Place.seen` has them."""
        return ()

    def transform(self, x: Tensor, place: Place) -> Tensor:
        """The new value of `x`, which is the site's tensor cut to the clamp's heads and units."""
        raise NotImplementedError

    def at(self, **gates: Any) -> Clamp:
        """The same clamp with other gates, such as ``clamp.at(positions=-1, rows=[0])``."""
        return replace(self, **gates)
