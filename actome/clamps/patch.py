"""Activation patching: what another input's forward had at this place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..core.clamp import Clamp
from ..core.clamping import Place
from ..core.errors import ClampError
from ..core.recording import Recording


@dataclass(frozen=True, eq=False)
class Patch(Clamp):
    """Replaces an activation by the one that a recording holds for the same site.

    The gates choose what is replaced: ``Patch(site, clean, positions=-1, heads=[3])`` takes the last position of
    head 3 from the clean run and leaves the rest.

    Args:
        source: a `Recording` of the whole sequence, with as many rows as the batch, or one row for all.
        source_site: take another site's recording, of the same dims.

    Raises:
        ClampError: rows, positions or features differ.

    Example:
        >>> import actome as ac
        >>> model = ac.demo()
        >>> clean = model.record("import os", "blocks.1.resid.post")
        >>> with model.clamp(ac.Patch("blocks.1.resid.post", clean)):
        ...     same = model.logits("import re")

    Source: Vig et al. (2020), arXiv:2004.12265; Meng et al. (2022), arXiv:2202.05262.
    """

    source: Any = None
    source_site: str | None = None

    def transform(self, x: Tensor, place: Place) -> Tensor:
        if not isinstance(self.source, Recording):
            raise ClampError(f"Patch takes a Recording, not {type(self.source).__name__}; use Set for a tensor")
        name = self.source_site or place.site.name
        if name not in self.source:
            raise ClampError(f"the recording given to Patch does not hold {name}; it holds {', '.join(self.source)}")
        value = place.select(self.source[name].to(x))
        if value.shape[0] not in (1, x.shape[0]) or value.shape[1:] != x.shape[1:]:
            raise ClampError(
                f"{place.site.name}: the recording has shape {tuple(value.shape)} here, this forward {tuple(x.shape)}; "
                "patching needs the same positions (pad or cut the inputs to one length)"
            )
        return value.expand_as(x)
