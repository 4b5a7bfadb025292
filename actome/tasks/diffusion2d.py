"""Spots on two rings, and a diffusion model of them: a picture of two numbers whose content and style are known.

A point lies near one of a few spots. Which one, its angle, is the content; on which of two rings, its radius, is the
style. A denoiser learns the noise in noised points, given both, and new points are drawn from it step by step. So the
style that a change of its activations brings about, and what becomes of content, are read off the points.

Source: own construction; noise prediction and ancestral sampling as in Ho et al. 2020, "Denoising Diffusion
Probabilistic Models" (algorithms 1 and 2), the schedule as in Nichol and Dhariwal 2021 (equation 17).

Dims: N points, K entries of a condition.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actome.tasks.draw import counts, positive, seeded
from actome.tasks.nets import MLP

INNER, OUTER = 0, 1
_WAVES = 4  # sines and cosines that tell the noise level


class Points(NamedTuple):
    """Points [N, 2], their contents [N] and styles [N]."""

    points: Tensor
    contents: Tensor
    styles: Tensor


@dataclass(frozen=True)
class Rings2D:
    """Spots at equal angles on an inner and an outer ring.

    Attributes:
        contents: number of angles.
        radii: of the inner and the outer ring.
        spread: standard deviation around a spot.

    >>> world = Rings2D()
    >>> drawn = world.sample(100, seed=0)
    >>> contents, styles = world.read(drawn.points)
    >>> bool((contents == drawn.contents).all() & (styles == drawn.styles).all())
    True
    """

    contents: int = 6
    radii: tuple[float, float] = (0.7, 1.7)
    spread: float = 0.08

    def __post_init__(self) -> None:
        counts(contents=(self.contents, 2))
        positive(inner=self.radii[0], spread=self.spread, between=self.radii[1] - self.radii[0])

    @property
    def width(self) -> int:
        """Entries of a condition: one for each content, and one for each style."""
        return self.contents + 2

    def condition(self, contents: Tensor, styles: Tensor) -> Tensor:
        """What the denoiser is told, [N, K], from contents and styles [N]."""
        return torch.cat((F.one_hot(contents, self.contents), F.one_hot(styles, 2)), 1).float()

    def sample(self, points: int, seed: int) -> Points:
        """Points of all contents and styles, equally often but for chance."""
        counts(points=(points, 1))
        generator = seeded(seed)
        contents_N = torch.randint(self.contents, (points,), generator=generator)
        styles_N = torch.randint(2, (points,), generator=generator)
        angle_N = 2 * math.pi * contents_N / self.contents
        ring_N1 = torch.tensor(self.radii)[styles_N][:, None]
        spot_N2 = ring_N1 * torch.stack((angle_N.cos(), angle_N.sin()), 1)
        return Points(spot_N2 + self.spread * torch.randn(points, 2, generator=generator), contents_N, styles_N)

    def read(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest content and style of points [N, 2], each [N]."""
        turn_N = torch.atan2(points[:, 1], points[:, 0]) / (2 * math.pi) * self.contents
        return turn_N.round().long() % self.contents, (points.norm(dim=1) > sum(self.radii) / 2).long()

    def noised(self, points: int, seed: int) -> tuple[Tensor, Tensor]:
        """What a denoiser learns from: inputs [N, 3 + K] (noisy point, noise level, condition) and the noise [N, 2]."""
        drawn = self.sample(points, seed)
        generator = seeded(seed + 1)
        level_N1 = torch.rand(points, 1, generator=generator)
        noise_N2 = torch.randn(points, 2, generator=generator)
        kept_N1 = signal(level_N1)
        noisy_N2 = kept_N1.sqrt() * drawn.points + (1 - kept_N1).sqrt() * noise_N2
        return torch.cat((noisy_N2, level_N1, self.condition(drawn.contents, drawn.styles)), 1), noise_N2


def signal(level: Tensor) -> Tensor:
    """The share of a point's variance that is left of the signal at a noise level from 0 to 1; never all or nothing.

    >>> [round(float(signal(torch.tensor(level))), 2) for level in (0.0, 0.5, 1.0)]
    [1.0, 0.49, 0.0]
    """
    return torch.cos((level + 0.008) / 1.008 * math.pi / 2).square().clamp(1e-4, 0.9999)


class Denoiser(nn.Module):
    """Predicts the noise in points of a world; its sites are ``module:net.act.0`` and so on.

    >>> Denoiser(Rings2D(), seed=0)(torch.zeros(5, 11)).shape
    torch.Size([5, 2])
    """

    def __init__(self, world: Rings2D, width: int = 64, layers: int = 3, seed: int = 0):
        super().__init__()
        self.net = MLP([2 + 2 * _WAVES + world.width, *[width] * layers, 2], act="silu", seed=seed)

    def forward(self, x: Tensor) -> Tensor:
        """Noise [N, 2] in inputs [N, 3 + K]."""
        wave = x[:, 2:3] * math.pi * torch.arange(1, _WAVES + 1, device=x.device) / 2
        return self.net(torch.cat((x[:, :2], wave.sin(), wave.cos(), x[:, 3:]), 1))


@torch.no_grad()
def draw(denoise: Callable[[Tensor], Tensor], condition: Tensor, seed: int, *, steps: int = 30) -> Tensor:
    """New points [N, 2] for conditions [N, K], drawn from noise in so many steps.

    Args:
        denoise: gives the noise in inputs [N, 3 + K]; a `Denoiser`, or a model's forward under clamps.
        condition: see `Rings2D.condition`.
        seed: of all noise.
        steps: from noise to points, at equal distances of the level.
    """
    counts(steps=(steps, 2))
    generator = seeded(seed)
    points_N2 = torch.randn(len(condition), 2, generator=generator)
    levels = torch.linspace(1.0, 0.0, steps + 1)
    for now, then in itertools.pairwise(levels):
        noise_N2 = denoise(torch.cat((points_N2, now.expand(len(condition), 1), condition), 1))
        kept, left = signal(now), signal(then)
        ratio = kept / left
        mean_N2 = (points_N2 - (1 - ratio) / (1 - kept).sqrt() * noise_N2) / ratio.sqrt()
        spread = ((1 - left) / (1 - kept) * (1 - ratio)).sqrt()
        points_N2 = mean_N2 + (spread if then > 0 else 0.0) * torch.randn(len(condition), 2, generator=generator)
    return points_N2
