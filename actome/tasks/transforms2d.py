"""Small pictures of an object on a background, under known transformations: Transforms-2D.

Objects are coloured glyphs, one shape and colour a class, or digits; backgrounds are smooth textures. Each sample draws
one transformation from every active family, and says which one and how much of it, so that invariance to a family can
be trained in, measured, or made the label itself.

Source: Speicher, Nanda and Gummadi 2024, "Understanding the Role of Invariance in Transfer Learning" (Transforms-2D).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from actome.tasks.draw import counts, seeded

FAMILIES: dict[str, tuple[str, ...]] = {
    "geometric": ("translate", "rotate", "scale", "shear", "flip"),
    "photometric": ("hue", "brightness", "grayscale", "invert"),
    "corruption": ("noise", "blur", "pixelate"),
}
_MASTER = 32  # side of the mask that glyphs are drawn on


class Drawn(NamedTuple):
    """The transformation of one family: kind [N], an index into `FAMILIES[family]`, and amount [N] from -1 to 1.

    Only the size of the amount counts for grayscale, noise, blur and pixelate; only its sign for flip (negative is
    upside down, else mirrored); nothing for invert.
    """

    kind: Tensor
    amount: Tensor


class Pictures(NamedTuple):
    """Images [N, 3, S, S] from 0 to 1, object and background of each [N], and what was drawn, by family."""

    images: Tensor
    objects: Tensor
    backgrounds: Tensor
    drawn: dict[str, Drawn]


@dataclass(frozen=True)
class Transforms2D:
    """Objects and backgrounds of one world.

    Attributes:
        objects: number of classes.
        backgrounds: number of textures.
        families: active families, from `FAMILIES`.
        size: of the canvas, in pixels.
        source: "glyphs" (shapes made for the seed) or "digits" (at most 10 classes; a random one of its class each
            time).
        seed: of shapes, colours and textures.

    >>> world = Transforms2D(objects=8, families=("geometric",))
    >>> same = [world.sample(5, seed=1, transform_seed=s) for s in (1, 2)]
    >>> same[0].objects.equal(same[1].objects), same[0].images.equal(same[1].images), same[0].images.shape
    (True, False, torch.Size([5, 3, 16, 16]))
    """

    objects: int = 8
    backgrounds: int = 16
    families: Sequence[str] = ("geometric", "photometric", "corruption")
    size: int = 16
    source: Literal["glyphs", "digits"] = "glyphs"
    seed: int = 0

    def __post_init__(self) -> None:
        counts(objects=(self.objects, 2), backgrounds=(self.backgrounds, 1), size=(self.size, 8))
        for family in self.families:
            if family not in FAMILIES:
                raise ValueError(f"family {family!r} does not exist; choose from {', '.join(FAMILIES)}")
        if self.source not in ("glyphs", "digits"):
            raise ValueError(f"source={self.source!r} does not exist; choose 'glyphs' or 'digits'")
        if self.source == "digits" and self.objects > 10:
            raise ValueError(f"objects={self.objects}: there are 10 digits; use glyphs for more")

    @cached_property
    def masks(self) -> Tensor:
        """Shapes of the glyphs, [objects, 1, 32, 32] from 0 to 1: closed curves in polar coordinates, with a hole."""
        generator = seeded(self.seed)
        at = (torch.arange(_MASTER) + 0.5) / _MASTER * 2 - 1
        y, x = torch.meshgrid(at, at, indexing="ij")
        radius, angle = (x**2 + y**2).sqrt(), torch.atan2(y, x)
        order_K = torch.arange(1, 6)
        height_OK = torch.rand(self.objects, 5, generator=generator) * 0.45 / order_K.sqrt()
        phase_OK = torch.rand(self.objects, 5, generator=generator) * 2 * math.pi
        wave = torch.cos(order_K[:, None, None] * angle + phase_OK[..., None, None])
        edge = (0.6 + (height_OK[..., None, None] * wave).sum(1)).clamp(0.2, 0.95)
        hole_O2 = torch.rand(self.objects, 2, generator=generator) - 0.5
        hole = ((x - hole_O2[:, :1, None]) ** 2 + (y - hole_O2[:, 1:, None]) ** 2).sqrt() - 0.2
        return (torch.sigmoid((edge - radius) * 20) * torch.sigmoid(hole * 20))[:, None]

    @cached_property
    def colours(self) -> Tensor:
        """Colour of each object, [objects, 3], bright."""
        return 0.5 + 0.5 * torch.rand(self.objects, 3, generator=seeded(self.seed + 1))

    @cached_property
    def textures(self) -> Tensor:
        """Backgrounds, [backgrounds, 3, size, size]: smooth and dim."""
        coarse = torch.rand(self.backgrounds, 3, 4, 4, generator=seeded(self.seed + 2))
        fine = torch.nn.functional.interpolate(coarse, (self.size, self.size), mode="bicubic", align_corners=False)
        return 0.5 * fine.clamp(0, 1)

    def sample(self, examples: int, seed: int, *, transform_seed: int | None = None) -> Pictures:
        """Draws pictures, all at once.

        Args:
            examples: how many.
            seed: of objects and backgrounds.
            transform_seed: of the transformations; None takes `seed` + 1. The same seed with another transform seed
                gives the same scenes under other transformations.
        """
        counts(examples=(examples, 1))
        generator = seeded(seed)
        objects_N = torch.randint(self.objects, (examples,), generator=generator)
        backgrounds_N = torch.randint(self.backgrounds, (examples,), generator=generator)
        masks = self.masks[objects_N] if self.source == "glyphs" else self._digits(objects_N, generator)
        generator = seeded(seed + 1 if transform_seed is None else transform_seed)
        drawn = {
            family: Drawn(
                torch.randint(len(kinds), (examples,), generator=generator),
                2 * torch.rand(examples, generator=generator) - 1,
            )
            for family, kinds in FAMILIES.items()  # inactive ones draw too, so that active ones do not change
        }
        noise = torch.randn(examples, 3, self.size, self.size, generator=generator)
        drawn = {family: drawn[family] for family in FAMILIES if family in self.families}
        alpha = self._place(masks, drawn.get("geometric"))
        images = alpha * self.colours[objects_N][..., None, None] + (1 - alpha) * self.textures[backgrounds_N]
        if "photometric" in drawn:
            images = _recolour(images, drawn["photometric"])
        if "corruption" in drawn:
            images = _corrupt(images, drawn["corruption"], noise)
        return Pictures(images.clamp(0, 1), objects_N, backgrounds_N, drawn)

    @staticmethod
    def _digits(objects_N: Tensor, generator: torch.Generator) -> Tensor:
        from actome.tasks.digits import digits

        data = digits(standardise=False, images=True)
        pick_N = torch.rand(len(objects_N), generator=generator)
        order, start = data.train_labels.argsort(stable=True), data.train_labels.bincount(minlength=10).cumsum(0)
        size = data.train_labels.bincount(minlength=10)
        index = start[objects_N] - size[objects_N] + (pick_N * size[objects_N]).long()
        return torch.nn.functional.interpolate(data.train[order[index]], (_MASTER, _MASTER), mode="bilinear")

    def _place(self, masks: Tensor, drawn: Drawn | None) -> Tensor:
        """Masks on the canvas, [N, 1, size, size]; an object at rest fills the middle 60 %."""
        count = len(masks)
        theta = torch.eye(2, 3).repeat(count, 1, 1) / 0.6
        if drawn is not None:
            kind, a = drawn
            turn, back = a * math.pi, torch.zeros(count)
            # Sampling asks where each pixel comes from, so these are the inverse maps.
            maps = {
                "translate": ((1, 0), (0, 1)),
                "rotate": ((turn.cos(), turn.sin()), (-turn.sin(), turn.cos())),
                "scale": ((1.6**a, back), (back, 1.6**a)),
                "shear": ((back + 1, a), (back, back + 1)),
                "flip": ((torch.where(a < 0, 1.0, -1.0), back), (back, torch.where(a < 0, -1.0, 1.0))),
            }
            for index, name in enumerate(FAMILIES["geometric"]):
                if name == "translate":
                    # To a place on a circle: the amount goes once around.
                    to = torch.stack((turn.cos(), turn.sin()), 1) * 0.35
                    theta[:, :, 2] = torch.where((kind == index)[:, None], -to / 0.6, theta[:, :, 2])
                    continue
                matrix = torch.stack([torch.stack(row, -1) for row in maps[name]], 1)
                chosen = (kind == index)[:, None, None]
                theta[:, :, :2] = torch.where(chosen, matrix / 0.6, theta[:, :, :2])
        grid = torch.nn.functional.affine_grid(theta, [count, 1, self.size, self.size], align_corners=False)
        return torch.nn.functional.grid_sample(masks, grid, align_corners=False)


def _recolour(images: Tensor, drawn: Drawn) -> Tensor:
    """Hue turns by up to half a circle around grey; brightness shifts by up to 0.4; grey mixes in by half or more."""
    kind, a = drawn[0], drawn[1][:, None, None, None]
    angle = drawn[1] * math.pi
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None] / 3**0.5
    cross = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]])
    turn = cos * torch.eye(3) + (1 - cos) / 3 + sin * cross
    grey = images.mean(1, keepdim=True)
    strength = 0.5 + 0.5 * a.abs()
    options = torch.stack(
        (
            torch.einsum("nij,njhw->nihw", turn, images),
            images + 0.4 * a,
            images + strength * (grey - images),
            1 - images,
        )
    )
    return options[kind, torch.arange(len(images))]


def _corrupt(images: Tensor, drawn: Drawn, noise: Tensor) -> Tensor:
    """Noise of a standard deviation up to 0.2; a mixture with a 5x5 mean; a mixture with blocks of 4x4."""
    kind, a = drawn[0], drawn[1].abs()[:, None, None, None]
    side = images.shape[-1]
    blurred = torch.nn.functional.avg_pool2d(images, 5, stride=1, padding=2, count_include_pad=False)
    blocks = torch.nn.functional.interpolate(torch.nn.functional.adaptive_avg_pool2d(images, side // 4), (side, side))
    options = torch.stack((images + 0.2 * a * noise, images + a * (blurred - images), images + a * (blocks - images)))
    return options[kind, torch.arange(len(images))]
