"""Digits drawn from strokes, with a spread that is set: sets of images whose variety is known.

Each digit is a few straight strokes; turn, thickness, size and place vary with one number, sigma. At sigma 0 all images
of a digit are the same.

Source: own construction, for Tang et al. 2024, "Words Worth a Thousand Pictures: Measuring and Understanding
Perceptual Variability in Text-to-Image Generation", which asks for sets of known variability.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from actome.tasks.draw import counts, positive, seeded

# Corners of each digit as a path of straight strokes, x to the right and y down, from -1 to 1.
_A, _B, _C, _D, _E, _F = (-0.5, -0.9), (0.5, -0.9), (-0.5, 0.0), (0.5, 0.0), (-0.5, 0.9), (0.5, 0.9)
_PATHS = (
    (_A, _B, _F, _E, _A),
    ((-0.3, -0.5), (0.1, -0.9), (0.1, 0.9)),
    (_A, _B, _D, _E, _F),
    (_A, _B, (0.0, -0.1), _D, _F, _E),
    ((0.2, 0.9), (0.2, -0.9), (-0.6, 0.3), (0.6, 0.3)),
    (_B, _A, _C, _D, _F, _E),
    (_B, _C, _E, _F, _D, _C),
    (_A, _B, (-0.2, 0.9)),
    (_A, _B, _D, _C, _A, _E, _F, _D),
    (_D, _C, _A, _B, _D, _E),
)
_STROKES = max(map(len, _PATHS)) - 1
# Standard deviations at sigma 1: radians, log thickness, log size, and shares of the half canvas.
_SCALES = (0.5, 0.35, 0.15, 0.2, 0.2)


class Rendered(NamedTuple):
    """Images [N, 1, S, S] from 0 to 1, labels [N], and parameters [N, 5]: turn, log thickness, log size, x, y."""

    images: Tensor
    labels: Tensor
    parameters: Tensor


@dataclass(frozen=True)
class DigitRenderer:
    """A canvas and a pen.

    Attributes:
        size: of the canvas in pixels.
        thickness: of a stroke, as a share of the half canvas.

    >>> renderer = DigitRenderer()
    >>> [round(renderer.sample(200, s, seed=1, digit=3).images.std(0).mean().item(), 2) for s in (0.0, 0.5, 1.0)]
    [0.0, 0.22, 0.31]
    """

    size: int = 16
    thickness: float = 0.14

    def __post_init__(self) -> None:
        counts(size=(self.size, 6))
        positive(thickness=self.thickness)

    def sample(self, examples: int, sigma: float, seed: int, *, digit: int | None = None) -> Rendered:
        """Draws digits whose parameters have standard deviations of `sigma` times (0.5, 0.35, 0.15, 0.2, 0.2).

        Args:
            examples: how many.
            sigma: spread; 0 or more, up to about 1 for digits that can be read.
            seed: of the draw. The same seed with another sigma varies the same images more, or less.
            digit: the only one drawn; None draws all.
        """
        counts(examples=(examples, 1))
        if sigma < 0:
            raise ValueError(f"sigma={sigma} is negative; 0 makes all images of a digit the same")
        if digit is not None and not 0 <= digit <= 9:
            raise ValueError(f"digit={digit} does not exist; there are 0 to 9")
        generator = seeded(seed)
        labels_N = torch.randint(10, (examples,), generator=generator)
        if digit is not None:
            labels_N = torch.full_like(labels_N, digit)
        parameters_N5 = sigma * torch.tensor(_SCALES) * torch.randn(examples, 5, generator=generator)
        return Rendered(self.render(labels_N, parameters_N5), labels_N, parameters_N5)

    def render(self, labels: Tensor, parameters: Tensor) -> Tensor:
        """Images [N, 1, S, S] of digits [N] with parameters [N, 5]: ink by the distance to the nearest stroke."""
        paths = torch.tensor([path + path[-1:] * (_STROKES + 1 - len(path)) for path in _PATHS])
        corners = paths[labels]
        turn, thick, size, x, y = parameters.unbind(1)
        turned = torch.stack((torch.stack((turn.cos(), -turn.sin()), 1), torch.stack((turn.sin(), turn.cos()), 1)), 1)
        corners = 0.75 * size.exp()[:, None, None] * torch.einsum("nij,nkj->nki", turned, corners)
        corners = corners + torch.stack((x, y), 1)[:, None]
        at = (torch.arange(self.size) + 0.5) / self.size * 2 - 1
        pixels_P2 = torch.stack(torch.meshgrid(at, at, indexing="xy"), -1).flatten(0, 1)
        start, along = corners[:, :-1, None], (corners[:, 1:] - corners[:, :-1])[:, :, None]
        offset = pixels_P2 - start
        part = ((offset * along).sum(-1) / along.square().sum(-1).clamp_min(1e-9)).clamp(0, 1)
        distance = (offset - part[..., None] * along).norm(dim=-1).amin(1)
        ink = torch.sigmoid((self.thickness * thick.exp()[:, None] - distance) * 2 * self.size)
        return ink.view(-1, 1, self.size, self.size)
