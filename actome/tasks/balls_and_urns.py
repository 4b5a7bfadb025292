"""Balls drawn from urns: guess the next colour, with the exact predictors of who knows the urns or their kind.

Each sequence is drawn with replacement from one urn. With D fixed urns one may remember them (the posterior over the D,
`memorising`) or go by what urns are like in general (counts plus the prior's, `generalising`); a model trained on D
urns lies somewhere between the two, and moves as it trains.

Source: Wurgaft et al. 2025, "In-Context Learning Strategies Emerge Rationally", balls and urns.

Dims: B sequences, T draws, V colours, Z urns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from actome.tasks.draw import Rows, counts, dirichlet, positive, seeded


class Draws(NamedTuple):
    """Colours [B, T], the urn's index [B] among the fixed ones (-1 for a fresh one) and its composition [B, V]."""

    colours: Tensor
    urn: Tensor
    composition: Tensor


@dataclass(frozen=True)
class BallsAndUrns:
    """D urns from a Dirichlet distribution over V colours.

    Attributes:
        V: number of colours.
        context: T, draws in a sequence.
        n_tasks: D, number of fixed urns.
        concentration: of the Dirichlet distribution.
        seed: of the fixed urns; those of D urns are the first of those of more.

    >>> world = BallsAndUrns(V=4, context=20, n_tasks=3)
    >>> draws = world.sample(500, seed=1)
    >>> memory, rule = (world.loss(predict(draws), draws) for predict in (world.memorising, world.generalising))
    >>> bool(memory < rule)                                        # on the urns that there are, it pays to know them
    True
    >>> fresh = world.sample(500, seed=1, fresh=True)
    >>> world.loss(world.generalising(fresh), fresh) < world.loss(world.memorising(fresh), fresh)
    True
    """

    V: int = 6
    context: int = 48
    n_tasks: int = 16
    concentration: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        counts(V=(self.V, 2), context=(self.context, 1), n_tasks=(self.n_tasks, 1))
        positive(concentration=self.concentration)

    def urns(self) -> Tensor:
        """Compositions of the fixed urns, [Z, V], float64."""
        return dirichlet((self.n_tasks, self.V), self.concentration, seeded(self.seed))

    def sample(self, sequences: int, seed: int, *, fresh: bool = False) -> Draws:
        """Draws sequences, each from one of the fixed urns, or each from an urn of its own that is none of them.

        Args:
            sequences: how many.
            seed: of the draw.
            fresh: draw each sequence's urn from the Dirichlet distribution.
        """
        counts(sequences=(sequences, 1))
        generator = seeded(seed)
        if fresh:
            table = dirichlet((sequences, self.V), self.concentration, generator)
            row_B, urn_B = torch.arange(sequences), torch.full((sequences,), -1)
        else:
            table = self.urns()
            row_B = urn_B = torch.randint(self.n_tasks, (sequences,), generator=generator)
        colours = Rows(table).draw(row_B[:, None].expand(-1, self.context).contiguous(), generator)
        return Draws(colours, urn_B, table[row_B])

    def tokens(self, draws: Draws) -> Tensor:
        """What a model reads, [B, 1 + T]: a begin token (V), then the colours; draw t is predicted at position t."""
        return torch.nn.functional.pad(draws.colours, (1, 0), value=self.V)

    def memorising(self, draws: Draws) -> Tensor:
        """p(colour | draws before) of who knows the fixed urns: their mean under the posterior, [B, T, V]."""
        urns_ZV = self.urns()
        log_BTZ = urns_ZV.log().T[draws.colours]
        before_BTZ = torch.nn.functional.pad(log_BTZ.cumsum(1)[:, :-1], (0, 0, 1, 0))
        return before_BTZ.softmax(-1) @ urns_ZV

    def generalising(self, draws: Draws) -> Tensor:
        """p(colour | draws before) of who knows the kind of urn: (count + a) / (draws + a V), [B, T, V]."""
        seen_BTV = torch.nn.functional.one_hot(draws.colours, self.V).double()
        before_BTV = torch.nn.functional.pad(seen_BTV.cumsum(1)[:, :-1], (0, 0, 1, 0)) + self.concentration
        return before_BTV / before_BTV.sum(-1, keepdim=True)

    @staticmethod
    def loss(predicted: Tensor, draws: Draws) -> float:
        """Mean -log p of the colours that came, nats a draw."""
        return float(-predicted.gather(-1, draws.colours[..., None]).log().mean())

    def floor(self, draws: Draws) -> float:
        """Least possible mean loss on sequences of the fixed urns: mean entropy of `memorising`."""
        return float(torch.special.entr(self.memorising(draws)).sum(-1).mean())
