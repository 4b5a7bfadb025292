"""Addition modulo p, with a held-out part, and the same sums with shuffled answers as control.

Mirrored pairs (a, b) and (b, a) are always on the same side of the split: with one in training, the other would be no
test of anything but commutativity.

Source: Power et al. 2022, "Grokking: Generalization Beyond Overfitting on Small Algorithmic Datasets"; Nanda et al.
2023, "Progress measures for grokking via mechanistic interpretability".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from actome.tasks.draw import counts, seeded


@dataclass(frozen=True)
class ModularAddition:
    """All sums modulo p. Tokens: numbers 0 to p - 1, then the equals sign, p.

    Attributes:
        p: the modulus.
        train: share of the unordered pairs that are in training; above 0 and below 1.
        shuffled: whether answers are shuffled over the unordered pairs: as frequent as before, without any rule. What
            a model gets right on the held-out part of these is chance; nothing but storing can be learned.
        seed: of the split and of the shuffling.

    >>> world = ModularAddition(p=7, train=0.5)
    >>> rows = world.pairs("train")
    >>> rows.shape[1], bool(((rows[:, 0] + rows[:, 1]) % 7 == rows[:, 3]).all())
    (4, True)
    >>> len(rows) + len(world.pairs("heldout"))
    49
    """

    p: int = 53
    train: float = 0.4
    shuffled: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        counts(p=(self.p, 3))
        unordered = self.p * (self.p + 1) // 2
        if not 0 < round(self.train * unordered) < unordered:
            raise ValueError(f"train={self.train} leaves one side of the split empty; give a share between 0 and 1")

    @property
    def vocab(self) -> int:
        """Number of tokens."""
        return self.p + 1

    def pairs(self, split: Literal["train", "heldout", "all"]) -> Tensor:
        """Every sum of a split once, [N, 4]: a, b, equals sign, answer; in a fixed order."""
        if split not in ("train", "heldout", "all"):
            raise ValueError(f"split={split!r} does not exist; choose 'train', 'heldout' or 'all'")
        generator = seeded(self.seed)
        low, high = torch.triu_indices(self.p, self.p)
        answer_U = (low + high) % self.p
        order_U = torch.randperm(len(low), generator=generator)
        if self.shuffled:
            answer_U = answer_U[torch.randperm(len(low), generator=generator)]
        in_train_U = torch.zeros(len(low), dtype=torch.bool)
        in_train_U[order_U[: round(self.train * len(low))]] = True

        number_PP = torch.zeros(self.p, self.p, dtype=torch.long)  # of the unordered pair of each ordered one
        number_PP[low, high] = number_PP[high, low] = torch.arange(len(low))
        a, b = torch.cartesian_prod(torch.arange(self.p), torch.arange(self.p)).T
        number = number_PP[a, b]
        rows = torch.stack((a, b, torch.full_like(a, self.p), answer_U[number]), 1)
        if split == "all":
            return rows
        return rows[in_train_U[number] == (split == "train")]

    def sample(self, sequences: int, seed: int, split: Literal["train", "heldout", "all"] = "train") -> Tensor:
        """Draws sums of a split with replacement, [sequences, 4]."""
        counts(sequences=(sequences, 1))
        rows = self.pairs(split)
        return rows[torch.randint(len(rows), (sequences,), generator=seeded(seed))]
