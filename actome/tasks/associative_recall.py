"""Associative recall with many queries: pairs of a key and a value, and then the keys again, whose values are asked.

How many pairs a model can hold shows how much its memory takes: attention keeps every pair, a recurrent state of a
given size cannot. Each pair stands at one position, as one vector, so that nothing else has to be learned first.

Source: Arora et al. 2024, "Zoology: Measuring and Improving Recall in Efficient Language Models" (there keys and values
are tokens of their own).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from actome.tasks.draw import counts, seeded


class Recall(NamedTuple):
    """Inputs [B, T, width], the value asked for at each position [B, T], -100 where none is, and the keys [B, T]."""

    inputs: Tensor
    targets: Tensor
    keys: Tensor


@dataclass(frozen=True)
class AssociativeRecall:
    """How many keys and values there are, and how many pairs a sequence holds; it asks for every one of them.

    >>> world = AssociativeRecall(keys=32, values=8, pairs=4)
    >>> world.width, [tuple(one.shape) for one in world.sample(5, seed=0)]
    (40, [(5, 8, 40), (5, 8), (5, 8)])
    """

    keys: int = 64
    values: int = 16
    pairs: int = 16

    def __post_init__(self) -> None:
        counts(keys=(self.keys, self.pairs), values=(self.values, 2), pairs=(self.pairs, 1))

    @property
    def width(self) -> int:
        """Of an input: one entry for each key and each value."""
        return self.keys + self.values

    @property
    def length(self) -> int:
        """Of a sequence: the pairs, and then the keys in another order."""
        return 2 * self.pairs

    def sample(self, sequences: int, seed: int) -> Recall:
        """Draws sequences; keys do not repeat among the pairs of one."""
        counts(sequences=(sequences, 1))
        generator = seeded(seed)
        keys_BP = torch.rand(sequences, self.keys, generator=generator).argsort(1)[:, : self.pairs]
        values_BP = torch.randint(self.values, (sequences, self.pairs), generator=generator)
        order_BP = torch.rand(sequences, self.pairs, generator=generator).argsort(1)
        keys_BT = torch.cat([keys_BP, keys_BP.gather(1, order_BP)], 1)
        shown = torch.nn.functional.one_hot(values_BP, self.values)
        values = torch.cat([shown, torch.zeros_like(shown)], 1)
        inputs = torch.cat([torch.nn.functional.one_hot(keys_BT, self.keys), values], -1).float()
        targets = torch.cat([torch.full_like(values_BP, -100), values_BP.gather(1, order_BP)], 1)
        return Recall(inputs, targets, keys_BT)
