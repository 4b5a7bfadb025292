"""Images of nothing in particular: gratings, and planes of nearly one grey.

Gratings hold one kind of structure only, orientation; planes hold none at all. They are the two ends between which
filters trained on photographs or digits lie.

Source: own construction, for Gavrikov and Keuper 2022, "CNN Filter DB: An Empirical Investigation of Trained
Convolutional Filters".
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from actome.tasks.draw import counts, seeded


class Patterns(NamedTuple):
    """Images [N, 1, S, S] from 0 to 1 with labels [N]."""

    images: Tensor
    labels: Tensor


def gratings(examples: int, seed: int, *, size: int = 8, orientations: int = 10, noise: float = 0.05) -> Patterns:
    """Sine gratings of random wavelength (3 to 6 pixels), phase and contrast; the label is the orientation.

    Args:
        examples: how many.
        seed: of everything.
        size: of the images in pixels.
        orientations: number of classes, evenly over half a turn.
        noise: standard deviation of normal pixel noise.

    >>> gratings(4, seed=0).images.shape
    torch.Size([4, 1, 8, 8])
    """
    counts(examples=(examples, 1), size=(size, 2), orientations=(orientations, 2))
    generator = seeded(seed)
    labels_N = torch.randint(orientations, (examples,), generator=generator)
    wavelength, phase, contrast = (torch.rand(examples, generator=generator)[:, None, None] for _ in range(3))
    at = torch.arange(size, dtype=torch.float32)
    angle = (labels_N * math.pi / orientations)[:, None, None]
    across = angle.cos() * at + angle.sin() * at[:, None]
    wave = torch.sin(2 * math.pi * (across / (3 + 3 * wavelength) + phase))
    images = 0.5 + 0.5 * (0.5 + 0.5 * contrast) * wave
    images = images + noise * torch.randn(images.shape, generator=generator)
    return Patterns(images.clamp(0, 1)[:, None], labels_N)


def planes(examples: int, seed: int, *, size: int = 8, classes: int = 10, noise: float = 0.01) -> Patterns:
    """Images of one grey, the same for all but for noise; labels are random, so there is nothing to learn.

    Args:
        examples: how many.
        seed: of everything.
        size: of the images in pixels.
        classes: number of labels.
        noise: standard deviation of normal pixel noise, around 0.5; small, or the noise itself becomes structure.

    >>> planes(1000, seed=0).images.std().item() < 0.011
    True
    """
    counts(examples=(examples, 1), size=(size, 1), classes=(classes, 1))
    generator = seeded(seed)
    labels_N = torch.randint(classes, (examples,), generator=generator)
    images = 0.5 + noise * torch.randn(examples, 1, size, size, generator=generator)
    return Patterns(images.clamp(0, 1), labels_N)
