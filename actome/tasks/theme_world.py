"""Short texts of several themes, in which a new fact can be told whose keyword was rare, common, or anything between.

A text is a few context words of one theme, a relation, and an attribute of that relation: "sand dune camel colour
brown". Which attributes are likely depends on the theme, by Zipf's law in an order of its own. At times an attribute is
followed by a link and a second attribute that goes with the first whatever the theme, which makes a way by which an
unlikely attribute can be reached in two likely steps.

Source: own construction for Sun et al. 2025, "How new data permeates LLM knowledge and how to dilute it" (keywords of a
few kinds, thematic prefixes, stepping stones), with the world's own probabilities in place of a pretrained model's.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from actome.tasks.draw import Rows, counts, positive, seeded, share

BEGIN, LINK = 0, 1


@dataclass(frozen=True)
class ThemeWorld:
    """Themes, relations and attributes of one world.

    Token 0 begins a text and 1 is the link; then come the context words, theme by theme, the relations, and the
    attributes, relation by relation.

    Attributes:
        themes, words: how many, and context words of each.
        relations, attributes: how many, and attributes of each.
        context: words of a text before its relation.
        zipf: exponent of the attributes' probabilities, rank^-zipf.
        linked: share of texts that go on with a link and a second attribute.
        seed: of the orders of attributes. Two worlds of one seed are the same world.

    >>> world = ThemeWorld()
    >>> text = world.sample(100, seed=1)
    >>> text.shape, world.vocab, bool((text[:, 0] == 0).all())
    (torch.Size([100, 9]), 166, True)
    >>> bool((world.probability(0, 0).sort(descending=True).values == world.zipf_law).all())
    True
    """

    themes: int = 8
    words: int = 10
    relations: int = 4
    attributes: int = 20
    context: int = 4
    zipf: float = 1.7
    linked: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        counts(
            themes=(self.themes, 2), words=(self.words, 2), relations=(self.relations, 1),
            attributes=(self.attributes, 3), context=(self.context, 1),
        )  # fmt: skip
        positive(zipf=self.zipf)
        share(linked=self.linked)

    @property
    def vocab(self) -> int:
        return 2 + self.themes * self.words + self.relations * (1 + self.attributes)

    @property
    def zipf_law(self) -> Tensor:
        """Probability of each rank, [attributes], float64."""
        weight_A = torch.arange(1, self.attributes + 1, dtype=torch.float64) ** -self.zipf
        return weight_A / weight_A.sum()

    @cached_property
    def ranks(self) -> Tensor:
        """Rank of every attribute, 0 the most likely, for each theme and relation [themes, relations, attributes]."""
        draw = torch.rand(self.themes, self.relations, self.attributes, generator=seeded(self.seed))
        return draw.argsort(-1).argsort(-1)

    @cached_property
    def goes_with(self) -> Tensor:
        """P(second attribute | first one and a link), [relations, attributes, attributes], float64.

        By Zipf's law in an order of each first one's own, whatever the theme; an attribute never goes with itself.
        """
        draw = torch.rand(self.relations, self.attributes, self.attributes, generator=seeded(self.seed + 1))
        table_RAA = self.zipf_law[draw.argsort(-1).argsort(-1)]
        table_RAA.diagonal(dim1=1, dim2=2).zero_()
        return table_RAA / table_RAA.sum(-1, keepdim=True)

    def probability(self, theme: int, relation: int) -> Tensor:
        """P(attribute | theme, relation), [attributes], float64."""
        return self.zipf_law[self.ranks[theme, relation]]

    def word(self, theme: int | Tensor, index: int | Tensor) -> int | Tensor:
        """The token of a context word."""
        return 2 + theme * self.words + index

    def relation(self, relation: int | Tensor) -> int | Tensor:
        """The token of a relation."""
        return 2 + self.themes * self.words + relation

    def attribute(self, relation: int | Tensor, index: int | Tensor) -> int | Tensor:
        """The token of an attribute."""
        return 2 + self.themes * self.words + self.relations + relation * self.attributes + index

    def prefixes(self, count: int, theme: int, relation: int, seed: int) -> Tensor:
        """Texts of a theme up to and with a relation, [count, context + 2], int64: what an attribute follows."""
        counts(count=(count, 1))
        words_NC = torch.randint(self.words, (count, self.context), generator=seeded(seed))
        return self._prefixes(torch.full((count,), theme), torch.full((count,), relation), words_NC)

    def sample(self, sequences: int, seed: int) -> Tensor:
        """Texts, [sequences, context + 5], int64; those without a link end in begin tokens.

        Themes, relations and context words are equally frequent.
        """
        counts(sequences=(sequences, 1))
        generator = seeded(seed)
        theme_N = torch.randint(self.themes, (sequences,), generator=generator)
        relation_N = torch.randint(self.relations, (sequences,), generator=generator)
        words_NC = torch.randint(self.words, (sequences, self.context), generator=generator)
        table = self.zipf_law[self.ranks].flatten(0, 1)
        first_N = Rows(table).draw(theme_N * self.relations + relation_N, generator)
        second_N = Rows(self.goes_with.flatten(0, 1)).draw(relation_N * self.attributes + first_N, generator)
        linked_N = torch.rand(sequences, generator=generator) < self.linked
        end_N3 = torch.stack(
            [
                self.attribute(relation_N, first_N),
                torch.where(linked_N, LINK, BEGIN),
                torch.where(linked_N, self.attribute(relation_N, second_N), BEGIN),
            ],
            1,
        )
        return torch.cat([self._prefixes(theme_N, relation_N, words_NC), end_N3], 1)

    def _prefixes(self, theme_N: Tensor, relation_N: Tensor, words_NC: Tensor) -> Tensor:
        return torch.cat(
            [
                torch.full((len(theme_N), 1), BEGIN),
                self.word(theme_N[:, None], words_NC),
                self.relation(relation_N)[:, None],
            ],
            1,
        )
