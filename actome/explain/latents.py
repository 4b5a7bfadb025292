"""Latents of a dictionary, such as a sparse autoencoder, taken out of a state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from actome.core.clamp import Clamp
from actome.core.clamping import Place
from actome.core.errors import ClampError

Encode = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class AblateLatents(Clamp):
    r"""Takes latents of a dictionary out of a state: :math:`x - \sum_{k} z_k(x) \, w_k`.

    What the dictionary does not reconstruct stays as it is.

    Args:
        encode: gives the latents (..., K) of states (..., D).
        decoder: (K, D), what each latent adds to a state.
        latents: which to take out.

    Raises:
        ClampError: no encoder, decoder or latent; a latent that the decoder does not have; another width than the site.

    >>> import actome as ac
    >>> model = ac.demo()
    >>> first = AblateLatents("blocks.1.resid.post", torch.relu, torch.eye(model.d_model), (0, 1))
    >>> with model.clamp(first):
    ...     without = model.record("import os", "blocks.1.resid.post")["blocks.1.resid.post"]
    >>> bool((without[..., :2] <= 0).all())
    True
    """

    encode: Encode | None = None
    decoder: Tensor | None = None
    latents: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.encode is None or self.decoder is None or not self.latents:
            raise ClampError("AblateLatents takes encode=, decoder= (latents, width) and the latents to take out")
        if not all(-len(self.decoder) <= one < len(self.decoder) for one in self.latents):
            raise ClampError(
                f"AblateLatents: the decoder has {len(self.decoder)} latents, and {self.latents} are asked for"
            )

    def transform(self, x: Tensor, place: Place) -> Tensor:
        assert self.encode is not None
        assert self.decoder is not None
        index = list(self.latents)
        if self.decoder.shape[1] != x.shape[-1]:
            raise ClampError(
                f"{place.site.name}: the decoder is {tuple(self.decoder.shape)}, and the site is {x.shape[-1]} wide"
            )
        z = self.encode(x)[..., index].float()
        return x - (z @ self.decoder.to(x.device, torch.float32)[index]).to(x.dtype)
