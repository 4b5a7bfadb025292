"""Facts and their compositions: entity -r1-> entity -r2-> entity, with some compositions held out.

Every single fact is in the training data, and so are most compositions of two; whether a model can compose two facts
that it knows is asked on those held out.

Source: Press et al. 2023, "Measuring and Narrowing the Compositionality Gap in Language Models"; Wang et al. 2024,
"Grokked Transformers are Implicit Reasoners" (atomic and inferred facts).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from actome.tasks.draw import counts, seeded, share

Split = Literal["train", "heldout"]


class Facts(NamedTuple):
    """Questions with their answers.

    Attributes:
        tokens: [B, 5]: begin, entity, relation, second relation or none, answer. A single fact has the token "none" in
            the place of the second relation, so that answers always stand at the end.
        bridge: [B], the entity that the first relation leads to (the answer, of a single fact).
        hops: [B], 1 or 2.
    """

    tokens: Tensor
    bridge: Tensor
    hops: Tensor


@dataclass(frozen=True)
class TwoHop:
    """One world of facts. Tokens: entities, relations, "none", begin.

    Attributes:
        entities: number of entities.
        relations: number of relations; each leads from every entity to a random one (a permutation, so that no answer
            is more frequent than another).
        heldout: share of all compositions (entity, r1, r2) that are held out.
        seed: of the facts and of the split.

    >>> world = TwoHop(entities=20, relations=3)
    >>> facts = world.sample(1000, seed=1)
    >>> e, r1, r2, answer = facts.tokens[facts.hops == 2][:, 1:].T
    >>> world.table()[world.table()[e, r1 - 20], r2 - 20].equal(answer)
    True
    """

    entities: int = 48
    relations: int = 4
    heldout: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        counts(entities=(self.entities, 2), relations=(self.relations, 1))
        share(heldout=self.heldout)

    @property
    def none_token(self) -> int:
        """Stands where a single fact has no second relation."""
        return self.entities + self.relations

    @property
    def begin_token(self) -> int:
        """First of every sequence."""
        return self.none_token + 1

    @property
    def vocab(self) -> int:
        """Number of tokens."""
        return self.begin_token + 1

    def table(self) -> Tensor:
        """Where relation r leads from entity e, [entities, relations]."""
        return torch.rand(self.relations, self.entities, generator=seeded(self.seed)).argsort(1).T

    def compositions(self, split: Split) -> Tensor:
        """All (entity, r1, r2) of a split, [N, 3], relations counted from 0."""
        if split not in ("train", "heldout"):
            raise ValueError(f"split={split!r} does not exist; choose 'train' or 'heldout'")
        total = self.entities * self.relations**2
        order = torch.randperm(total, generator=seeded(self.seed + 1))
        out = round(self.heldout * total)
        number_N = (order[:out] if split == "heldout" else order[out:]).sort().values
        if not len(number_N):
            raise ValueError(f"heldout={self.heldout} leaves no composition in the split {split!r}")
        first = number_N // self.relations
        return torch.stack((first // self.relations, first % self.relations, number_N % self.relations), 1)

    def facts(self, split: Split | None = None) -> Facts:
        """Every composition of a split once; without one, every single fact once."""
        if split is None:
            number_N = torch.arange(self.entities * self.relations)
            return self._facts(number_N // self.relations, number_N % self.relations, torch.full_like(number_N, -1))
        return self._facts(*self.compositions(split).T)

    def sample(self, sequences: int, seed: int, *, single: float = 0.5, split: Split = "train") -> Facts:
        """Draws questions, all at once.

        Args:
            sequences: how many.
            seed: of the draw; the world has its own.
            single: share of single facts; the rest are compositions of the split.
            split: of the compositions. Single facts belong to both.
        """
        counts(sequences=(sequences, 1))
        share(single=single)
        generator = seeded(seed)
        composed_N3 = self.compositions(split)
        e, r1, r2 = composed_N3[torch.randint(len(composed_N3), (sequences,), generator=generator)].T
        fact_B = torch.randint(self.entities * self.relations, (sequences,), generator=generator)
        single_B = torch.rand(sequences, generator=generator) < single
        e = torch.where(single_B, fact_B // self.relations, e)
        r1 = torch.where(single_B, fact_B % self.relations, r1)
        return self._facts(e, r1, torch.where(single_B, -1, r2))

    def _facts(self, e_B: Tensor, r1_B: Tensor, r2_B: Tensor) -> Facts:
        """Facts from entity and relations; r2 = -1 makes a single fact."""
        table = self.table()
        bridge_B, single_B = table[e_B, r1_B], r2_B < 0
        answer_B = torch.where(single_B, bridge_B, table[bridge_B, r2_B])
        second_B = torch.where(single_B, self.none_token, self.entities + r2_B)
        begin_B = torch.full_like(e_B, self.begin_token)
        tokens_BT = torch.stack((begin_B, e_B, self.entities + r1_B, second_B, answer_B), 1)
        return Facts(tokens_BT, bridge_B, 2 - single_B.long())
