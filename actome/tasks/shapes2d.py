"""A coloured disc, large or small: pictures of a few factors whose pull on the pixels is set, and a decoder of them.

Every picture is drawn from a condition that says its factors. Some combinations of factors are never shown, so that
what a generator makes of their condition tells what it has understood of each factor by itself.

Source: Park et al. 2024, "Emergence of Hidden Capabilities: Exploring Learning Dynamics in Concept Space" (the data,
the concept signal, and underspecified conditions).

Dims: N pictures, F factors, S side, K entries of a condition.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from actome.tasks.draw import counts, seeded, share
from actome.tasks.nets import MLP

FACTORS = ("color", "size", "background")
# Places of each factor in a condition: red, green, blue, size, background.
PLACES: dict[str, tuple[int, ...]] = {"color": (0, 1, 2), "size": (3,), "background": (4,)}


class Shapes(NamedTuple):
    """Images [N, 3, S, S] from 0 to 1, conditions [N, K], and the class of each factor, combos [N, F] of 0 and 1."""

    images: Tensor
    conditions: Tensor
    combos: Tensor


@dataclass(frozen=True)
class Shapes2D:
    """Soft discs of one world: blue or red, large or small, and if wanted on a dark or a light ground.

    A condition is (red, green, blue, size) of the disc, and the grey of the ground where that is a factor. Classes of
    a factor lie at 0.5 - separation / 2 and 0.5 + separation / 2; class 1 is red, small, light.

    Attributes:
        color_sep, size_sep, background_sep: distance of the two classes of each factor, 0 to 1. Colour 0 is blue and 1
            red; size 1 reaches from the middle to the edge. With a background_sep of 0 the ground is black and no
            factor.
        jitter: standard deviation of each factor around its class.
        shift: largest displacement of the disc from the middle, in pixels; conditions do not say it.
        size: of the canvas, in pixels.

    >>> world = Shapes2D(color_sep=0.8, size_sep=0.1)
    >>> shapes = world.sample(6, seed=0, combos=[(0, 0), (1, 1)])
    >>> shapes.images.shape, shapes.conditions.shape, shapes.combos[:3].tolist()
    (torch.Size([6, 3, 12, 12]), torch.Size([6, 4]), [[0, 0], [1, 1], [0, 0]])
    """

    color_sep: float = 0.4
    size_sep: float = 0.4
    background_sep: float = 0.0
    jitter: float = 0.03
    shift: float = 0.0
    size: int = 12

    def __post_init__(self) -> None:
        share(color_sep=self.color_sep, size_sep=self.size_sep, background_sep=self.background_sep)
        counts(size=(self.size, 8))
        if self.jitter < 0 or self.shift < 0:
            raise ValueError(f"jitter={self.jitter}, shift={self.shift}: give 0 or more")

    @property
    def factors(self) -> tuple[str, ...]:
        """Names of the factors, in the order of `combos`."""
        return FACTORS if self.background_sep else FACTORS[:2]

    @property
    def separations(self) -> Tensor:
        """Distance of the classes, [F]."""
        return torch.tensor([self.color_sep, self.size_sep, self.background_sep][: len(self.factors)])

    def combinations(self, most: int | None = None) -> list[tuple[int, ...]]:
        """All combinations of classes with at most this many ones; with `most=1`, those that the paper trains on.

        >>> Shapes2D().combinations(1)
        [(0, 0), (0, 1), (1, 0)]
        """
        every = itertools.product((0, 1), repeat=len(self.factors))
        return [combo for combo in every if most is None or sum(combo) <= most]

    def values(self, combos: Tensor) -> Tensor:
        """Factors at the middle of their classes, [N, F], from 0 to 1."""
        # Class 1 of size is the small one, so that the trained neighbours of (1, 1) are red and large, blue and small.
        sign_F = torch.tensor([1.0, -1.0, 1.0])[: len(self.factors)]
        return 0.5 + sign_F * self.separations * (combos.float() - 0.5)

    def conditions(self, values_NF: Tensor) -> Tensor:
        """The condition that says these factors, [N, K]."""
        color_N = values_NF[:, 0]
        entries = [color_N, torch.full_like(color_N, 0.0), 1 - color_N, *values_NF[:, 1:].unbind(1)]
        return torch.stack(entries, 1)

    def render(self, values_NF: Tensor, shifts_N2: Tensor | None = None) -> Tensor:
        """The picture of these factors, [N, 3, S, S]: a disc with an edge one pixel soft."""
        at_S = torch.arange(self.size) + 0.5 - self.size / 2
        y_SS, x_SS = torch.meshgrid(at_S, at_S, indexing="ij")
        shifts_N2 = values_NF.new_zeros(len(values_NF), 2) if shifts_N2 is None else shifts_N2
        away_N2SS = torch.stack([x_SS, y_SS]) - shifts_N2[:, :, None, None]
        reach_N11 = values_NF[:, 1, None, None] * self.size / 2
        inside_NSS = torch.sigmoid(4 * (reach_N11 - away_N2SS.norm(dim=1)))
        disc_N3 = self.conditions(values_NF)[:, :3]
        ground_N = values_NF[:, 2] if self.background_sep else values_NF.new_zeros(len(values_NF))
        ground_N1 = ground_N[:, None]
        images = ground_N1[..., None, None] + inside_NSS[:, None] * (disc_N3 - ground_N1)[..., None, None]
        return images.clamp(0, 1)

    def sample(
        self, examples: int, seed: int, *, combos: Sequence[Sequence[int]] | None = None, masked: str = "",
        mask: float = 0.0, mask_combos: Sequence[Sequence[int]] | None = None,
    ) -> Shapes:  # fmt: skip
        """Draws pictures of the given combinations in turn, as many of each.

        Args:
            examples: how many.
            seed: of jitter, shifts and masks.
            combos: combinations of classes; those with at most one 1 by default.
            masked: a factor whose entries in the condition are set to 0 (an underspecified prompt)
            mask: with this probability,
            mask_combos: in these combinations only; all by default.

        Raises:
            ValueError: combinations of another length, or a factor that does not exist.
        """
        counts(examples=(examples, 1))
        share(mask=mask)
        chosen = self._checked(self.combinations(1) if combos is None else combos)
        generator = seeded(seed)
        combos_NF = chosen[torch.arange(examples) % len(chosen)]
        values_NF = self.values(combos_NF) + self.jitter * torch.randn(combos_NF.shape, generator=generator)
        values_NF = values_NF.clamp(0, 1)
        shifts_N2 = self.shift * (2 * torch.rand(examples, 2, generator=generator) - 1)
        conditions_NK = self.conditions(values_NF)
        if mask:
            if masked not in self.factors:
                raise ValueError(f"masked={masked!r} is no factor; choose from {', '.join(self.factors)}")
            hidden_N = torch.rand(examples, generator=generator) < mask
            if mask_combos is not None:
                of_these = (combos_NF[:, None] == self._checked(mask_combos)).all(-1).any(1)
                hidden_N = hidden_N & of_these
            conditions_NK[hidden_N[:, None] & self.is_about(masked)] = 0.0
        return Shapes(self.render(values_NF, shifts_N2), conditions_NK, combos_NF)

    def is_about(self, factor: str) -> Tensor:
        """Which entries of a condition say this factor, bool [K]."""
        if factor not in self.factors:
            raise ValueError(f"{factor!r} is no factor; choose from {', '.join(self.factors)}")
        entries = torch.zeros(2 + len(self.factors), dtype=torch.bool)
        entries[list(PLACES[factor])] = True
        return entries

    def readouts(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """What a picture [N, 3, S, S] shows of each factor, [N]; 0 and 1 at the middles of the classes.

        Colour is the contrast of the sums of red and blue; size the root mean square distance of the light from its own
        centre; both in what stands out from the ground, whose grey is the mean of the border. So none depends on the
        place of the disc, and colour and size do not depend on how bright it is.
        """
        ends_FF = torch.eye(len(self.factors)).int()
        found = {}
        for i, name in enumerate(self.factors):
            raw = {"color": _contrast, "size": _spread, "background": _border}[name]
            low, high = (
                raw(self.render(self.values(one[None]))).item() for one in (torch.zeros_like(ends_FF[i]), ends_FF[i])
            )

            def scaled(images: Tensor, raw: Callable = raw, low: float = low, high: float = high) -> Tensor:
                return (raw(images) - low) / (high - low)

            found[name] = scaled
        return found

    def _checked(self, combos: Sequence[Sequence[int]]) -> Tensor:
        wanted = torch.as_tensor(combos)
        if wanted.ndim != 2 or wanted.shape[1] != len(self.factors) or not bool(((wanted == 0) | (wanted == 1)).all()):
            raise ValueError(
                f"combos={combos!r}: give a list of combinations such as {self.combinations(1)[1]}, one 0 or 1 for "
                f"each of {', '.join(self.factors)}"
            )
        return wanted


def _border(images: Tensor) -> Tensor:
    edge = torch.cat([images[..., 0, :], images[..., -1, :], images[..., 0], images[..., -1]], -1)
    return edge.float().mean((1, 2))


def _light(images: Tensor) -> Tensor:
    """What stands out from the ground, [N, 3, S, S], without what is darker."""
    return (images.float() - _border(images)[:, None, None, None]).clamp_min(0)


def _contrast(images: Tensor) -> Tensor:
    red_N, _, blue_N = _light(images).sum((2, 3)).unbind(1)
    return (red_N - blue_N) / (red_N + blue_N).clamp_min(1e-6)


def _spread(images: Tensor) -> Tensor:
    light_NSS = _light(images).sum(1)
    light_NSS = light_NSS / light_NSS.sum((1, 2), keepdim=True).clamp_min(1e-6)
    at_S = torch.arange(images.shape[-1], device=images.device) + 0.5
    x_N, y_N = (light_NSS * at_S).sum((1, 2)), (light_NSS * at_S[:, None]).sum((1, 2))
    squares_N = (light_NSS * (at_S**2 + at_S[:, None] ** 2)).sum((1, 2))
    return (squares_N - x_N**2 - y_N**2).clamp_min(0).sqrt()


class ShapeDecoder(nn.Module):
    """A generator in two perceptrons: `encoder` makes an embedding of the condition, `decoder` a picture of that.

    The embedding is the output of the site ``module:act``.

    >>> ShapeDecoder()(torch.zeros(5, 4)).shape
    torch.Size([5, 3, 12, 12])
    """

    def __init__(self, entries: int = 4, width: int = 64, hidden: int = 128, size: int = 12, seed: int = 0):
        super().__init__()
        self.size = size
        self.encoder = MLP([entries, width, width], "gelu", seed)
        self.act = nn.GELU()
        self.decoder = MLP([width, hidden, 3 * size * size], "gelu", seed + 1)

    def forward(self, conditions_NK: Tensor) -> Tensor:
        return self.decoder(self.act(self.encoder(conditions_NK))).unflatten(-1, (3, self.size, self.size))
