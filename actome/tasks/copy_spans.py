"""Noisy bigram text with spans that are repeated word for word: easy and hard tokens side by side.

Each stretch of text holds one span between an opening and a closing mark, and later a copy mark after which the span
comes again, closing mark included. Every token of the copy is determined, every other one is noise, so that what a
model spends on easy and on hard tokens (layers, experts, confidence) can be compared.

Source: own construction, for early exit and layer skipping, where easy tokens should need less.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from actome.tasks.draw import Rows, counts, dirichlet, entropy, positive, seeded

BEGIN, OPEN, CLOSE, COPY = 0, 1, 2, 3
_MARKS = 4
_NOISE, _MARK, _COPIED = 0, 1, 2


class Spans(NamedTuple):
    """Text with copies, all [B, T].

    Attributes:
        tokens: int64.
        source: position that a copied token repeats (the closing mark of the copy among them), else -1.
        noise: which tokens are drawn from the bigram table. Neither copied nor noise: begin token and marks.
    """

    tokens: Tensor
    source: Tensor
    noise: Tensor


@dataclass(frozen=True)
class CopySpans:
    """A bigram table and the make-up of a stretch. Tokens 0 to 3 are begin, open, close and copy marks.

    Attributes:
        vocab: number of tokens, begin token and marks among them.
        shortest: least length of a span.
        longest: greatest; the length is drawn uniformly from both and those between.
        stretch: tokens in a stretch: noise, open, span, close, noise, copy, span, close, noise.
        concentration: of the Dirichlet distribution of the rows of the table; smaller is sharper.
        seed: of the table.

    >>> world = CopySpans()
    >>> text = world.sample(3, 1 + 2 * world.stretch, seed=1)
    >>> rows, at = (text.source >= 0).nonzero(as_tuple=True)
    >>> text.tokens[rows, at].equal(text.tokens[rows, text.source[rows, at]])
    True
    """

    vocab: int = 36
    shortest: int = 4
    longest: int = 10
    stretch: int = 32
    concentration: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        counts(vocab=(self.vocab, _MARKS + 2), shortest=(self.shortest, 1), longest=(self.longest, self.shortest))
        counts(stretch=(self.stretch, 2 * self.longest + 4))
        positive(concentration=self.concentration)

    def table(self) -> Tensor:
        """Probabilities of noise tokens, [V, V]: after noise tokens by the table, after anything else uniform."""
        ordinary = self.vocab - _MARKS
        table_VV = torch.zeros(self.vocab, self.vocab, dtype=torch.float64)
        table_VV[:_MARKS, _MARKS:] = 1 / ordinary
        table_VV[_MARKS:, _MARKS:] = dirichlet((ordinary, ordinary), self.concentration, seeded(self.seed))
        return table_VV

    def sample(self, sequences: int, length: int, seed: int) -> Spans:
        """Draws where the spans stand, then all tokens, one position at a time.

        Args:
            sequences: how many.
            length: tokens of each: the begin token and whole stretches, 1 + n * stretch.
            seed: of the draw; the table has its own.
        """
        counts(sequences=(sequences, 1), length=(length, 1 + self.stretch))
        if (length - 1) % self.stretch:
            raise ValueError(f"length={length} is not 1 + n * stretch with stretch={self.stretch}")
        generator = seeded(seed)
        stretches = (length - 1) // self.stretch
        size_BN = torch.randint(self.shortest, self.longest + 1, (sequences, stretches), generator=generator)
        # What is left for noise is cut in three at two places.
        spare_BN1 = (self.stretch - 4 - 2 * size_BN)[..., None] + 1
        cuts_BN2 = (torch.rand(sequences, stretches, 2, generator=generator) * spare_BN1).long().sort(-1).values
        open_BN1 = cuts_BN2[..., :1]
        close_BN1 = open_BN1 + 1 + size_BN[..., None]
        copy_BN1 = cuts_BN2[..., 1:] + size_BN[..., None] + 2
        last_BN1 = copy_BN1 + size_BN[..., None] + 1
        at_S = torch.arange(self.stretch)

        copied = (at_S > copy_BN1) & (at_S <= last_BN1)
        back_BNS = torch.where(copied, copy_BN1 - open_BN1, 0).flatten(1)
        mark_BNS = OPEN * (at_S == open_BN1) + CLOSE * (at_S == close_BN1) + COPY * (at_S == copy_BN1)
        kind_BT = torch.nn.functional.pad((copied * _COPIED + (mark_BNS > 0) * _MARK).flatten(1), (1, 0), value=_MARK)
        marks_TB = torch.nn.functional.pad(mark_BNS.flatten(1), (1, 0), value=BEGIN).T.contiguous()
        back_TB = torch.nn.functional.pad(back_BNS, (1, 0)).T.contiguous()
        kind_TB = kind_BT.T.contiguous()

        rows = Rows(self.table())
        uniform_TB = torch.rand(length, sequences, generator=generator, dtype=torch.float64)
        tokens_TB = marks_TB.clone()
        for t in range(1, length):
            noise_B = rows.place(self._context(tokens_TB[t - 1], kind_TB[t - 1]), uniform_TB[t])
            repeated_B = tokens_TB.gather(0, (t - back_TB[t])[None])[0]
            tokens_TB[t] = torch.where(kind_TB[t] == _NOISE, noise_B, repeated_B)
        source_BT = torch.where(kind_BT == _COPIED, torch.arange(length) - back_TB.T, -1)
        return Spans(tokens_TB.T.contiguous(), source_BT, kind_BT == _NOISE)

    @staticmethod
    def _context(token: Tensor, kind: Tensor) -> Tensor:
        return torch.where(kind == _NOISE, token, BEGIN)

    def floor(self, text: Spans) -> float:
        """Least possible mean next-token loss on this text, in nats, for one who knows where marks will stand."""
        entropy_V = entropy(self.table())
        kind_BT = torch.where(text.noise, _NOISE, _MARK)
        cost_BT = entropy_V[self._context(text.tokens, kind_BT)[:, :-1]]
        return float((cost_BT * text.noise[:, 1:]).mean())
