"""Inputs with an easy and a hard feature that play equal roles: one bit, and the parity of several.

Both features are independent, equally frequent, spread over equally many input units, and both have to be told. What
differs is how hard they are to compute, how often they are present, and which one is asked for first; so what a network
then gives more of its activations to is its own bias.

Source: Lampinen, Chan and Hermann 2024, "Learned feature representations are biased by complexity, learning order,
position, and more".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from actome.tasks.draw import counts, seeded


class Pairs(NamedTuple):
    """Inputs [N, width] of -1, 0 and 1; labels easy and hard, [N], 0 or 1, -1 where the feature is absent.

    `bits` [N, bits] are the bits whose parity is the hard feature.
    """

    inputs: Tensor
    easy: Tensor
    hard: Tensor
    bits: Tensor


@dataclass(frozen=True)
class FeaturePairs:
    """The make-up of the inputs: `redundancy` units for the easy bit, as many for the bits of the hard one.

    Attributes:
        bits: of the parity; 1 makes it as easy as the other, 2 is XOR.
        redundancy: input units that each feature is spread over; a multiple of `bits`.
        prevalence: shares of examples in which the easy and the hard feature are present; the units of one that is
            absent are zero.
        order: which feature is asked for first where examples are written as tokens.

    >>> world = FeaturePairs()
    >>> pairs = world.sample(1000, seed=1)
    >>> pairs.inputs.shape, bool((pairs.bits.sum(1) % 2 == pairs.hard).all())
    (torch.Size([1000, 40]), True)
    """

    bits: int = 4
    redundancy: int = 20
    prevalence: tuple[float, float] = (1.0, 1.0)
    order: tuple[str, str] = ("easy", "hard")

    def __post_init__(self) -> None:
        counts(bits=(self.bits, 1), redundancy=(self.redundancy, 1))
        if self.redundancy % self.bits:
            raise ValueError(f"redundancy={self.redundancy} is no multiple of bits={self.bits}; bits would be unequal")
        if len(self.prevalence) != 2 or not all(0 < p <= 1 for p in self.prevalence):
            raise ValueError(f"prevalence={self.prevalence} must be two shares above 0 and up to 1")
        if sorted(self.order) != ["easy", "hard"]:
            raise ValueError(f"order={self.order} must be ('easy', 'hard') or ('hard', 'easy')")

    @property
    def width(self) -> int:
        """Number of input units; the first half carries the easy feature."""
        return 2 * self.redundancy

    def sample(self, examples: int, seed: int) -> Pairs:
        """Draws examples, all at once."""
        counts(examples=(examples, 1))
        generator = seeded(seed)
        easy_N1 = torch.randint(2, (examples, 1), generator=generator)
        bits_NM = torch.randint(2, (examples, self.bits), generator=generator)
        present_N2 = torch.rand(examples, 2, generator=generator) < torch.tensor(self.prevalence)
        signs = [
            (2 * easy_N1 - 1).expand(-1, self.redundancy) * present_N2[:, :1],
            (2 * bits_NM - 1).repeat_interleave(self.redundancy // self.bits, 1) * present_N2[:, 1:],
        ]
        return Pairs(
            torch.cat(signs, 1).float(),
            torch.where(present_N2[:, 0], easy_N1[:, 0], -1),
            torch.where(present_N2[:, 1], bits_NM.sum(1) % 2, -1),
            bits_NM,
        )

    def tokens(self, pairs: Pairs) -> Tensor:
        """The examples for a sequence model, [N, 1 + bits + 3]: easy bit, bits, "asked", first and second label.

        Tokens: 0 and 1 for bits and labels, 2 for what is absent, 3 for "asked". Labels stand in the order of `order`.
        """
        easy_N1 = torch.where(pairs.easy < 0, 2, pairs.easy)[:, None]
        hard_N1 = torch.where(pairs.hard < 0, 2, pairs.hard)[:, None]
        bits_NM = torch.where(pairs.hard[:, None] < 0, 2, pairs.bits)
        labels = {"easy": easy_N1, "hard": hard_N1}
        asked = torch.full_like(easy_N1, 3)
        return torch.cat((easy_N1, bits_NM, asked, labels[self.order[0]], labels[self.order[1]]), 1)
