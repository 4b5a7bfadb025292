"""Sums of a sequence that a model has to write after it, on which training stands still before it jumps.

x_1 ... x_n, a separator, then y_1 ... y_n: sums of two neighbours, prefix sums, a copy, or the sequence reversed. For
each output it is known which inputs have to be attended to, so progress of attention can be seen before the loss falls.

Source: Gopalani and Hu 2025, "What Happens During the Loss Plateau? Understanding Abrupt Learning in Transformers"
(moving-window sum, and the other tasks).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from actome.tasks.draw import counts, seeded


@dataclass(frozen=True)
class MovingSum:
    """Sequences of one rule. Tokens: 0 to modulus - 1, then the separator.

    Attributes:
        terms: n, length of the inputs and of the outputs.
        rule: "window" (y_1 = x_1, y_i = x_{i-1} + x_i), "prefix" (y_i = x_1 + ... + x_i), "copy" or "reverse"; sums are
            modulo `modulus`. The last two are controls without a plateau.
        modulus: inputs are 1 to modulus - 1.

    >>> world = MovingSum(terms=3, modulus=5)
    >>> world.answers(torch.tensor([[4, 3, 1]]))
    tensor([[4, 2, 4]])
    >>> world.sample(2, seed=1).shape, world.needed().shape
    (torch.Size([2, 7]), torch.Size([7, 7]))
    """

    terms: int = 16
    rule: Literal["window", "prefix", "copy", "reverse"] = "window"
    modulus: int = 17

    def __post_init__(self) -> None:
        counts(terms=(self.terms, 2), modulus=(self.modulus, 3))
        if self.rule not in ("window", "prefix", "copy", "reverse"):
            raise ValueError(f"rule={self.rule!r} does not exist; choose 'window', 'prefix', 'copy' or 'reverse'")

    @property
    def separator(self) -> int:
        """Token between inputs and outputs."""
        return self.modulus

    @property
    def vocab(self) -> int:
        """Number of tokens."""
        return self.modulus + 1

    @property
    def length(self) -> int:
        """Tokens of a sequence: inputs, separator, outputs."""
        return 2 * self.terms + 1

    def answers(self, inputs: Tensor) -> Tensor:
        """Outputs [B, n] of inputs [B, n]."""
        if self.rule == "copy":
            return inputs.clone()
        if self.rule == "reverse":
            return inputs.flip(1)
        if self.rule == "prefix":
            return inputs.cumsum(1) % self.modulus
        return (inputs + torch.nn.functional.pad(inputs[:, :-1], (1, 0))) % self.modulus

    def sample(self, sequences: int, seed: int) -> Tensor:
        """Draws sequences, [sequences, length]."""
        counts(sequences=(sequences, 1))
        inputs = torch.randint(1, self.modulus, (sequences, self.terms), generator=seeded(seed))
        return torch.cat((inputs, torch.full((sequences, 1), self.separator), self.answers(inputs)), 1)

    def outputs(self) -> Tensor:
        """Positions whose next token is an output, [n]: the separator and all outputs but the last."""
        return torch.arange(self.terms, 2 * self.terms)

    def needed(self) -> Tensor:
        """Which keys each query has to attend to, bool [length, length]; rows are the positions of `outputs`.

        "window": x_{i-1} and x_i. "prefix": x_i and y_{i-1}, which stands at the query itself (a model may also sum all
        of x_1 to x_i). "copy", "reverse": the one input. Rows that predict no output are empty.
        """
        mask_QS = torch.zeros(self.length, self.length, dtype=torch.bool)
        rows, term = self.outputs(), torch.arange(self.terms)
        mask_QS[rows, term.flip(0) if self.rule == "reverse" else term] = True
        if self.rule == "window":
            mask_QS[rows[1:], term[:-1]] = True
        if self.rule == "prefix":
            mask_QS[rows[1:], rows[1:]] = True
        return mask_QS
