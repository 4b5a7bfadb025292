"""Ablation: take away what an activation says, by zero, by its mean, or by that of other inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..core.clamp import Clamp
from ..core.clamping import Place
from ..core.errors import ClampError
from ..core.recording import Recording


@dataclass(frozen=True, eq=False)
class Ablate(Clamp):
    """Replaces an activation by something that carries no information about this input.

    Args:
        how: ``"zero"``; ``"mean"``: the mean over the tokens of `source`; ``"resample"``: the activations of other,
            randomly drawn tokens of `source`.
        source: a `Recording` that has the site, or a tensor (tokens, *features). Without one the batch at hand
            serves: the mean over its real tokens, or, for ``"resample"``, another row of it at the same positions.
        seed: of the draws of ``"resample"``.

    Raises:
        ClampError: the source does not fit, or a batch of one row is to be resampled from itself.

    Example:
        >>> import actome as ac
        >>> ac.Ablate("blocks.2.attn.z", "zero", heads=[3]).how
        'zero'

    Source: zero and mean ablation as in Wang et al. (2023), arXiv:2211.00593; resampling as in Chan et al. (2022),
    "Causal scrubbing".
    """

    needs_run: ClassVar[bool] = True  # the mean is over real tokens
    how: Literal["zero", "mean", "resample"] = "zero"
    source: Any = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.how not in ("zero", "mean", "resample"):
            raise ClampError(f'Ablate takes "zero", "mean" or "resample", not {self.how!r}')

    def transform(self, x: Tensor, place: Place) -> Tensor:
        if self.how == "zero":
            return torch.zeros_like(x)
        if self.source is not None:
            rows = self._reference(x, place)
            if self.how == "mean":
                return rows.mean(dim=0).to(x.dtype).expand_as(x)
            draw = torch.randint(len(rows), (x.shape[0], x.shape[1]), generator=self._generator())
            return rows[draw.to(rows.device)].to(x.dtype)
        if self.how == "mean":
            return _batch_mean(x, place)
        if x.shape[0] < 2:
            raise ClampError(f"{place.site.name}: a batch of one row has no other row to resample from; give source=")
        shift = int(torch.randint(1, x.shape[0], (), generator=self._generator()))
        return x.roll(shift, dims=0)

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def _reference(self, x: Tensor, place: Place) -> Tensor:
        if place.dims[:2] != ("batch", "pos"):
            raise ClampError(
                f"{place.site.name} has dims {', '.join(place.dims)}; a source serves sites by position only"
            )
        rows = self.source.flat(place.site.name) if isinstance(self.source, Recording) else self.source
        rows = place.select(rows.to(x.device)[None])[0]
        if rows.shape[1:] != x.shape[2:] or not len(rows):
            raise ClampError(
                f"{place.site.name}: source has features {tuple(rows.shape[1:])}, the site {tuple(x.shape[2:])}"
            )
        return rows.float()


def _batch_mean(x: Tensor, place: Place) -> Tensor:
    mask = place.run.mask
    if place.dims[:2] != ("batch", "pos") or mask is None or mask.shape[1] < x.shape[1]:
        leading = tuple(i for i, d in enumerate(place.dims) if d in ("batch", "pos", "query"))
        return x.float().mean(dim=leading, keepdim=True).to(x.dtype).expand_as(x)
    real = mask[:, -x.shape[1] :].to(x.device)
    return x[real].float().mean(dim=0).to(x.dtype).expand_as(x)
