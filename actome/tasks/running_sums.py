"""Sums of a few numbers, asked for at once or with every step written out.

Half of the prompts want the running sums before the answer, half the answer alone: the smallest model of slow and fast
thinking on the same problems, and of responses that fit their problem or do not.

Source: own construction, for Li et al. 2024, "What Happened in LLMs Layers when Trained for Fast vs. Slow Thinking: A
Gradient Perspective" (responses with and without written steps, correct and irrelevant).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from actome.tasks.draw import counts, seeded, share


class Sums(NamedTuple):
    """Prompts with responses.

    Attributes:
        tokens: [B, T]: mode, numbers, equals sign, response, END, padding.
        response: bool [B, T], which tokens are the response, END among them.
        mask: bool [B, T], which tokens are not padding.
        numbers: [B, terms].
        written: [B], whether the steps are written out.
    """

    tokens: Tensor
    response: Tensor
    mask: Tensor
    numbers: Tensor
    written: Tensor


@dataclass(frozen=True)
class RunningSums:
    """Tokens: 0 to modulus - 1, then "write", "at once", equals sign, END, padding.

    Attributes:
        terms: numbers in a problem.
        modulus: of the sums.

    >>> world = RunningSums(terms=3, modulus=5)
    >>> world.write(torch.tensor([[4, 3, 1], [4, 3, 1]]), torch.tensor([True, False])).tokens
    tensor([[5, 4, 3, 1, 7, 4, 2, 3, 8],
            [6, 4, 3, 1, 7, 3, 8, 9, 9]])
    """

    terms: int = 4
    modulus: int = 11

    def __post_init__(self) -> None:
        counts(terms=(self.terms, 2), modulus=(self.modulus, 2))

    @property
    def vocab(self) -> int:
        """Number of tokens."""
        return self.modulus + 5

    def sample(self, sequences: int, seed: int, *, written: float = 0.5) -> Sums:
        """Draws problems; `written` is the share of them with steps."""
        counts(sequences=(sequences, 1))
        share(written=written)
        generator = seeded(seed)
        numbers = torch.randint(self.modulus, (sequences, self.terms), generator=generator)
        return self.write(numbers, torch.rand(sequences, generator=generator) < written)

    def irrelevant(self, sums: Sums, seed: int) -> Sums:
        """The same prompts with the responses of fresh random problems, in the same mode."""
        other = self.sample(len(sums.numbers), seed).numbers
        return self.write(sums.numbers, sums.written, other)

    def write(self, numbers: Tensor, written: Tensor, answered: Tensor | None = None) -> Sums:
        """Problems in tokens.

        Args:
            numbers: [B, terms].
            written: bool [B].
            answered: [B, terms], the problems that the responses answer; None: those of the prompts.
        """
        write, at_once, equals, end, pad = range(self.modulus, self.modulus + 5)
        steps = (numbers if answered is None else answered).cumsum(1) % self.modulus
        written_B1 = written[:, None]
        column = torch.full_like(steps[:, :1], end)
        long = torch.cat((steps, column), 1)
        short = torch.cat((steps[:, -1:], column, torch.full_like(steps[:, 1:], pad)), 1)
        mode = torch.where(written_B1, write, at_once)
        tokens = torch.cat((mode, numbers, torch.full_like(mode, equals), torch.where(written_B1, long, short)), 1)
        mask = tokens != pad
        return Sums(tokens, mask & (torch.arange(tokens.shape[1]) > self.terms + 1), mask, numbers, written)
