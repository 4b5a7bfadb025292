"""Bigram text with triggers that copy: the smallest task on which a language model grows an attention sink.

Each sequence starts with a begin token. Every other token follows from the one before it by a fixed bigram table,
except after one of a few trigger tokens: what follows a trigger is the token that stood before the trigger. So one
attention head has work to do on triggers (look back by one) and none elsewhere, and where it has none, softmax still
makes it put its weight somewhere.

Source: Guo et al. 2024, "Active-Dormant Attention Heads" (the bigram-backcopy task).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from actome.tasks.draw import counts, positive, share

BEGIN = 0


@dataclass(frozen=True)
class Backcopy:
    """The bigram table and the triggers of one bigram-backcopy world.

    Token 0 is the begin token, 1 to `triggers` are the triggers, the rest are ordinary.

    Attributes:
        vocab: number of tokens, begin token and triggers among them.
        triggers: number of trigger tokens.
        trigger_share: probability that an ordinary token is followed by a trigger.
        concentration: of the Dirichlet distribution that the rows of the table are drawn from; smaller is sharper.
        seed: of the table. Two worlds of one seed are the same world.

    >>> world = Backcopy(vocab=16, triggers=2)
    >>> tokens = world.sample(4, 32, seed=1)
    >>> tokens.shape, tokens[:, 0].tolist()
    (torch.Size([4, 32]), [0, 0, 0, 0])
    >>> after = world.is_trigger(tokens[:, 1:-1])
    >>> bool((tokens[:, 2:] == tokens[:, :-2])[after].all())
    True
    """

    vocab: int = 32
    triggers: int = 3
    trigger_share: float = 0.25
    concentration: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        share(trigger_share=self.trigger_share)
        positive(concentration=self.concentration)
        if not 0 < self.triggers < self.vocab - 2:
            raise ValueError(f"triggers={self.triggers} leaves no two ordinary tokens in a vocabulary of {self.vocab}")

    def table(self) -> Tensor:
        """Next-token probabilities after the begin token and after ordinary tokens, [V, V]; zero rows for triggers."""
        generator = torch.Generator().manual_seed(self.seed)
        ordinary = self.vocab - 1 - self.triggers
        shape = torch.full((self.vocab, ordinary), self.concentration, dtype=torch.float64)
        gamma = torch._standard_gamma(shape, generator=generator) + 1e-9
        table_VV = torch.zeros(self.vocab, self.vocab, dtype=torch.float64)
        table_VV[:, self.triggers + 1 :] = (1 - self.trigger_share) * gamma / gamma.sum(1, keepdim=True)
        table_VV[:, 1 : self.triggers + 1] = self.trigger_share / self.triggers
        # The first real token is ordinary, so that a copy never reaches back to the begin token.
        table_VV[BEGIN] = 0
        table_VV[BEGIN, self.triggers + 1 :] = 1 / ordinary
        table_VV[1 : self.triggers + 1] = 0
        return table_VV

    def is_trigger(self, tokens: Tensor) -> Tensor:
        """Which tokens are triggers, bool in the shape of `tokens`."""
        return (tokens > BEGIN) & (tokens <= self.triggers)

    def sample(self, sequences: int, length: int, seed: int) -> Tensor:
        """Draws all sequences at once, one position at a time.

        Args:
            sequences: how many.
            length: tokens of each, the begin token among them; at least 2.
            seed: of the draw; the table has its own.

        Returns:
            Tokens [sequences, length], int64.
        """
        counts(sequences=(sequences, 1), length=(length, 2))
        generator = torch.Generator().manual_seed(seed)
        cumulative_VV = self.table().cumsum(1).float()
        uniform_TB = torch.rand(length, sequences, generator=generator)
        tokens_TB = torch.zeros(length, sequences, dtype=torch.long)
        for t in range(1, length):
            row_BV = cumulative_VV[tokens_TB[t - 1]]
            drawn_B = torch.searchsorted(row_BV, uniform_TB[t][:, None], right=True)[:, 0]
            # Rounding may leave the last cumulative value a little below one.
            tokens_TB[t] = drawn_B.clamp(self.triggers + 1 if t == 1 else 1, self.vocab - 1)
            if t > 1:
                tokens_TB[t] = torch.where(self.is_trigger(tokens_TB[t - 1]), tokens_TB[t - 2], tokens_TB[t])
        return tokens_TB.T.contiguous()

    def floor(self, tokens: Tensor) -> float:
        """The least possible mean next-token loss on these sequences, in nats: nobody can predict better.

        Args:
            tokens: [sequences, length], int64.
        """
        table_VV = self.table()
        entropy_V = -(table_VV * table_VV.clamp_min(1e-300).log()).sum(1)
        return float(entropy_V[tokens[:, :-1]].mean())
