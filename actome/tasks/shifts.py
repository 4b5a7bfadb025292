"""Shifts of small images, each with a severity: the same digits as a worse camera would see them.

Every shift is the identity at severity 0 and strong, but mostly readable, at 1; whatever is random in it comes from its
seed. So a domain is a list of shifts, a stream of domains is a list of lists, and every image keeps its label.

Source: the kinds follow Hendrycks and Dietterich 2019, "Benchmarking Neural Network Robustness to Common Corruptions
and Perturbations"; the strengths are ours, for 8x8 images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from actome.tasks.draw import seeded


def _noise(x: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    return x + 0.5 * severity * torch.randn(x.shape, generator=generator)


def _blur(x: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    sigma = severity
    at = torch.arange(-3.0, 4.0)
    kernel = torch.exp(-0.5 * (at / sigma) ** 2)
    kernel = kernel / kernel.sum()
    flat = x[:, None]
    flat = torch.nn.functional.conv2d(flat, kernel.view(1, 1, 1, -1), padding=(0, 3))
    return torch.nn.functional.conv2d(flat, kernel.view(1, 1, -1, 1), padding=(3, 0))[:, 0]


def _contrast(x: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    mean = x.mean((1, 2), keepdim=True)
    return mean + (1 - 0.8 * severity) * (x - mean)


def _brightness(x: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    return x + 0.5 * severity


def _inversion(x: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    # A mixture of x and 1 - x would be flat grey half-way, so severity is how many images are turned over.
    turned = torch.rand(len(x), 1, 1, generator=generator) < severity
    return torch.where(turned, 1 - x, x)


def _tilt(x: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    side = torch.randint(2, (len(x),), generator=generator) * 2 - 1
    angle = math.radians(45) * severity * side
    theta = torch.zeros(len(x), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = angle.cos()
    theta[:, 0, 1] = -angle.sin()
    theta[:, 1, 0] = angle.sin()
    # Sampling works on a square of -1 to 1; on an oblong image the axes need to be put to scale first.
    ratio = x.shape[2] / x.shape[1]
    theta[:, 0, 1] /= ratio
    theta[:, 1, 0] *= ratio
    grid = torch.nn.functional.affine_grid(theta, [len(x), 1, *x.shape[1:]], align_corners=False)
    return torch.nn.functional.grid_sample(x[:, None], grid, align_corners=False)[:, 0]


def _impulse(x: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    hit = torch.rand(x.shape, generator=generator) < 0.4 * severity
    return torch.where(hit, torch.randint(2, x.shape, generator=generator).to(x.dtype), x)


def _gamma(x: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    return x.clamp(0, 1) ** 4.0**severity


def _occlusion(x: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    height, width = x.shape[1:]
    rows, columns = (max(round(0.6 * severity * side), 1) for side in (height, width))
    top = torch.randint(height - rows + 1, (len(x), 1, 1), generator=generator)
    left = torch.randint(width - columns + 1, (len(x), 1, 1), generator=generator)
    row, column = torch.arange(height)[:, None], torch.arange(width)
    covered = (row >= top) & (row < top + rows) & (column >= left) & (column < left + columns)
    return x.masked_fill(covered, 0.5)


_Shift = Callable[[Tensor, float, torch.Generator], Tensor]

# What happens at severity 1, in images from 0 (paper) to 1 (ink): ...
SHIFTS: dict[str, _Shift] = {
    "noise": _noise,  # normal noise of standard deviation 0.5
    "blur": _blur,  # Gaussian of one pixel
    "contrast": _contrast,  # a fifth of the contrast, around the mean of the image
    "brightness": _brightness,  # half of the range is added
    "inversion": _inversion,  # 1 - x; below that in a share of the images
    "tilt": _tilt,  # turned by 45 degrees, to a random side
    "impulse": _impulse,  # 40 % of the pixels black or white
    "gamma": _gamma,  # x^4
    "occlusion": _occlusion,  # a grey box of 60 % of height and width
}


def shift(images: Tensor, kind: str, severity: float, seed: int) -> Tensor:
    """The same images under one shift, clipped to [0, 1].

    Args:
        images: [N, height, width] or [N, 1, height, width], from 0 to 1.
        kind: one of `SHIFTS`.
        severity: 0 (the images themselves) to 1.
        seed: of whatever is random in the shift.

    Raises:
        ValueError: for an unknown kind, a severity out of range, or images that are not from 0 to 1.

    >>> from actome.tasks.digits import digits
    >>> x = digits(standardise=False, images=True).test
    >>> shift(x, "noise", 0.0, seed=1).equal(x)
    True
    >>> [round((shift(x, "blur", s, seed=1) - x).abs().mean().item(), 2) for s in (0.25, 0.5, 1.0)]
    [0.0, 0.07, 0.18]
    """
    if kind not in SHIFTS:
        raise ValueError(f"shift {kind!r} does not exist; choose one of {', '.join(SHIFTS)}")
    if not 0 <= severity <= 1:
        raise ValueError(f"severity={severity} is out of range; give a number from 0 to 1")
    if not (images.ndim == 3 or (images.ndim == 4 and images.shape[1] == 1)):
        raise ValueError(f"images {tuple(images.shape)} must be [N, height, width] or [N, 1, height, width]")
    if images.numel() and not (images.min() >= 0 and images.max() <= 1):
        raise ValueError(
            f"images go from {images.min():.3g} to {images.max():.3g} but must be from 0 to 1; scale them first"
        )
    if severity == 0 or not len(images):
        return images.clone()
    flat = images.float().view(len(images), *images.shape[-2:])
    return SHIFTS[kind](flat, severity, seeded(seed)).clamp(0, 1).view(images.shape)


def domain(images: Tensor, parts: Iterable[tuple[str, float]], seed: int) -> Tensor:
    """The same images under several shifts, one after the other: `[("blur", 0.5), ("noise", 0.3)]`.

    >>> x = torch.full((1, 2, 2), 0.25)
    >>> domain(x, [("brightness", 0.5), ("inversion", 1.0)], seed=0)[0, 0]
    tensor([0.5000, 0.5000])
    """
    for number, (kind, severity) in enumerate(parts):
        # Each part draws for itself: two kinds of noise must not share their draws.
        images = shift(images, kind, severity, seed=seed + 7919 * number)
    return images
