"""Text that can only be predicted by finding what came before: repeated segments, and matches that are copied.

`RepeatedSegments` repeats a random segment to the end of the sequence; `MatchCopy` repeats, at each step and with some
probability, what followed the last occurrence of the current token. Neither has anything to learn but the copying, so
a head that does it is an induction head. The period varies from sequence to sequence: with a fixed one a model learns
to look a fixed distance back and never forms the previous-token head that induction is made of.

Source: Olsson et al. 2022, "In-context Learning and Induction Heads" (random repeated tokens); Hernandez et al. 2022,
"Scaling Laws and Interpretability of Learning from Repeated Data" (copying and prefix matching). Zipf tokens are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from actome.tasks.draw import counts, entropy, seeded, share

BEGIN = 0


class Copied(NamedTuple):
    """Tokens and where they come from, all [B, T].

    Attributes:
        tokens: int64.
        source: position whose token this one repeats or would repeat, -1 where there is none. An induction head that
            predicts the token at t attends from t - 1 to `source[t]`.
        predictable: whether the token can be told from those before it: by one who finds the last occurrence of the
            token before it (`MatchCopy`: up to its share of random tokens).
    """

    tokens: Tensor
    source: Tensor
    predictable: Tensor


def _zipf(vocab: int, exponent: float) -> Tensor:
    """Weights of ordinary tokens [V], the begin token's being zero."""
    weights = torch.arange(1, vocab + 1, dtype=torch.float64).sub(1).clamp_min(1).pow(-exponent)
    weights[BEGIN] = 0
    return weights / weights.sum()


@dataclass(frozen=True)
class RepeatedSegments:
    """A begin token, a random segment, and the same segment again and again to the end.

    Attributes:
        vocab: number of tokens; 0 is the begin token.
        shortest: least length of the segment, the period.
        longest: greatest. The period of a sequence is drawn uniformly from both and those between.
        zipf: exponent of the frequency of tokens by rank; 0 makes all equally frequent.
        distinct: whether the tokens of a segment all differ, so that one look back is enough to copy.

    >>> world = RepeatedSegments(vocab=64, shortest=4, longest=12)
    >>> text = world.sample(3, 40, seed=1)
    >>> rows, at = text.predictable.nonzero(as_tuple=True)
    >>> text.tokens[rows, at].equal(text.tokens[rows, text.source[rows, at]])
    True
    >>> 0 < world.floor(text.tokens) < 0.5 * torch.tensor(63.0).log().item()
    True
    """

    vocab: int = 64
    shortest: int = 8
    longest: int = 24
    zipf: float = 0.0
    distinct: bool = True

    def __post_init__(self) -> None:
        counts(vocab=(self.vocab, 3), shortest=(self.shortest, 1), longest=(self.longest, self.shortest))
        if self.zipf < 0:
            raise ValueError(f"zipf={self.zipf} is negative; give 0 for equal frequencies or a positive exponent")
        if self.distinct and self.longest > self.vocab - 1:
            raise ValueError(
                f"a segment of {self.longest} distinct tokens does not fit {self.vocab - 1} ordinary ones; "
                "shorten it or set distinct=False"
            )

    def weights(self) -> Tensor:
        """Probability of each token where it is drawn freely, [V], float64."""
        return _zipf(self.vocab, self.zipf)

    def sample(self, sequences: int, length: int, seed: int) -> Copied:
        """Draws segments and repeats them, all at once.

        Args:
            sequences: how many.
            length: tokens of each, the begin token among them; longer than `longest` + 1, so that something repeats.
            seed: of the draw.
        """
        counts(sequences=(sequences, 1), length=(length, self.longest + 2))
        generator = seeded(seed)
        period_B = torch.randint(self.shortest, self.longest + 1, (sequences,), generator=generator)
        if self.distinct:
            # Sorting by exponential waiting times draws without replacement in proportion to the weights.
            wait_BV = torch.empty(sequences, self.vocab, dtype=torch.float64).exponential_(generator=generator)
            segment_BP = (wait_BV / self.weights()).argsort(1)[:, : self.longest]
        else:
            drawn = torch.multinomial(self.weights(), sequences * self.longest, replacement=True, generator=generator)
            segment_BP = drawn.view(sequences, self.longest)
        position_T = torch.arange(length)
        tokens_BT = segment_BP.gather(1, (position_T - 1) % period_B[:, None])
        tokens_BT[:, 0] = BEGIN
        repeats_BT = position_T > period_B[:, None]
        source_BT = torch.where(repeats_BT, position_T - period_B[:, None], -1)
        # The first repeated token comes as a surprise: only after it is the period known.
        return Copied(tokens_BT, source_BT, position_T > period_B[:, None] + 1)

    def floor(self, tokens: Tensor) -> float:
        """Least possible mean next-token loss on these sequences, in nats, for one who does not know the period.

        The entropy of `predict`, averaged over all tokens after the first.
        """
        return float(torch.stack([entropy(expected).mean() for expected in self._predict(tokens[:, :-1])]).mean())

    def predict(self, tokens: Tensor) -> Tensor:
        """Exact distribution of token t + 1 after tokens 0 to t, [B, T, V], float64.

        Bayes over the periods: each one either still draws freely (without the tokens used, where they are distinct)
        or demands one token; those that a token has contradicted are out.
        """
        return torch.stack(list(self._predict(tokens)), 1)

    def _predict(self, tokens: Tensor):
        periods_P = torch.arange(self.shortest, self.longest + 1)
        alive_BP = torch.full((len(tokens), len(periods_P)), 1 / len(periods_P), dtype=torch.float64)
        weights_BV = self.weights().expand(len(tokens), -1).clone()
        for t in range(tokens.shape[1]):
            if t and self.distinct:
                weights_BV.scatter_(1, tokens[:, t : t + 1], 0)
            free_BV = weights_BV / weights_BV.sum(1, keepdim=True).clamp_min(1e-300)
            copies_P = t + 1 > periods_P
            expected_BV = alive_BP[:, ~copies_P].sum(1, keepdim=True) * free_BV
            demanded_BP = tokens[:, t + 1 - periods_P[copies_P]]
            expected_BV.scatter_add_(1, demanded_BP, alive_BP[:, copies_P])
            yield expected_BV
            if t + 1 < tokens.shape[1]:
                seen_B1 = tokens[:, t + 1 : t + 2]
                likelihood_BP = free_BV.gather(1, seen_B1).expand(-1, len(periods_P)).clone()
                likelihood_BP[:, copies_P] = (demanded_BP == seen_B1).double()
                alive_BP = alive_BP * likelihood_BP
                alive_BP = alive_BP / alive_BP.sum(1, keepdim=True)


@dataclass(frozen=True)
class MatchCopy:
    """Random tokens in which what followed the last occurrence of the current token often follows it again.

    After a token that has not occurred before, the next one is drawn uniformly. After one that has, the next is, with
    probability `copy`, the one that followed its last occurrence, and otherwise drawn uniformly.

    Attributes:
        vocab: number of tokens; there is no begin token.
        copy: probability of the copy.

    >>> world = MatchCopy(vocab=16, copy=0.8)
    >>> text = world.sample(200, 64, seed=1)
    >>> rows, at = text.predictable.nonzero(as_tuple=True)
    >>> copied = text.tokens[rows, at] == text.tokens[rows, text.source[rows, at]]
    >>> abs(copied.double().mean().item() - (0.8 + 0.2 / 16)) < 0.02
    True
    """

    vocab: int = 32
    copy: float = 0.75

    def __post_init__(self) -> None:
        counts(vocab=(self.vocab, 2))
        share(copy=self.copy)

    def sample(self, sequences: int, length: int, seed: int) -> Copied:
        """Draws all sequences at once, one position at a time.

        Args:
            sequences: how many.
            length: tokens of each; at least 2.
            seed: of the draw.
        """
        counts(sequences=(sequences, 1), length=(length, 2))
        generator = seeded(seed)
        tokens_TB = torch.randint(self.vocab, (length, sequences), generator=generator)
        copies_TB = torch.rand(length, sequences, generator=generator) < self.copy
        source_TB = torch.full((length, sequences), -1)
        last_BV = torch.full((sequences, self.vocab), -1)
        for t in range(1, length):
            before_B1 = tokens_TB[t - 1][:, None]
            found_B = last_BV.gather(1, before_B1)[:, 0]
            matched_B = found_B >= 0
            source_TB[t] = torch.where(matched_B, found_B + 1, -1)
            repeated_B = tokens_TB.gather(0, (found_B + 1)[None])[0]
            tokens_TB[t] = torch.where(matched_B & copies_TB[t], repeated_B, tokens_TB[t])
            last_BV.scatter_(1, before_B1, t - 1)
        source_BT = source_TB.T.contiguous()
        return Copied(tokens_TB.T.contiguous(), source_BT, source_BT >= 0)

    def floor(self, text: Copied) -> float:
        """Least possible mean next-token loss on this text, in nats: what precedes decides it, so nothing is hidden."""
        other = (1 - self.copy) / self.vocab
        expected_V = torch.full((self.vocab,), other, dtype=torch.float64)
        expected_V[0] += self.copy
        uniform = torch.tensor(self.vocab, dtype=torch.float64).log()
        return float(torch.where(text.predictable[:, 1:], entropy(expected_V), uniform).mean())

    def predict(self, text: Copied) -> Tensor:
        """Exact distribution of each token after the first from those before it, [B, T - 1, V], float64."""
        has_BT1 = text.predictable[:, 1:, None]
        expected = torch.where(has_BT1, (1 - self.copy) / self.vocab, 1 / self.vocab).double()
        expected = expected.repeat(1, 1, self.vocab)
        repeated_BT1 = text.tokens.gather(1, text.source[:, 1:].clamp_min(0))[..., None]
        return expected.scatter_add_(2, repeated_BT1, has_BT1 * torch.tensor(self.copy, dtype=torch.float64))
