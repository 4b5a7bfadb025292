"""Text from a hidden Markov model, with the exact distribution of every next token.

Hidden states follow a transition table, each emits a token by an emission table. What a reader can know of the next
token is given by the forward algorithm, so that a model's predictions can be compared with the best possible ones at
every position, and a probe of its states with the exact posterior over hidden states.

Source: Rabiner 1989, "A Tutorial on Hidden Markov Models and Selected Applications in Speech Recognition" (forward and
backward recursions, scaled); Xie et al. 2022, "An Explanation of In-context Learning as Implicit Bayesian Inference",
for the use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from actome.tasks.draw import Rows, counts, dirichlet, entropy, positive, seeded, share


class HiddenText(NamedTuple):
    """Tokens [B, T] and the hidden states [B, T] that emitted them."""

    tokens: Tensor
    states: Tensor


@dataclass(frozen=True)
class HiddenMarkov:
    """One hidden Markov model: uniform first state, a transition table and an emission table.

    Attributes:
        vocab: number of tokens.
        states: number of hidden states.
        stay: added probability of staying: transitions are stay * I + (1 - stay) * Dirichlet rows.
        concentration: of the Dirichlet distribution of both tables; smaller is sharper.
        seed: of the tables.

    >>> world = HiddenMarkov(vocab=8, states=3)
    >>> text = world.sample(500, 32, seed=1)
    >>> expected = world.predict(text.tokens)  # of each token, from those before it
    >>> surprise = -expected.gather(-1, text.tokens[..., None]).log().mean()
    >>> abs(surprise.item() - world.floor(text.tokens)) < 0.03
    True
    """

    vocab: int = 32
    states: int = 8
    stay: float = 0.5
    concentration: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        counts(vocab=(self.vocab, 2), states=(self.states, 1))
        share(stay=self.stay)
        positive(concentration=self.concentration)

    def transition(self) -> Tensor:
        """P(next state | state), [states, states], float64."""
        drawn = dirichlet((self.states, self.states), self.concentration, seeded(self.seed))
        return self.stay * torch.eye(self.states, dtype=torch.float64) + (1 - self.stay) * drawn

    def emission(self) -> Tensor:
        """P(token | state), [states, V], float64."""
        generator = seeded(self.seed)
        dirichlet((self.states, self.states), self.concentration, generator)  # what `transition` has drawn
        return dirichlet((self.states, self.vocab), self.concentration, generator)

    def sample(self, sequences: int, length: int, seed: int) -> HiddenText:
        """Draws the states one position at a time for all sequences, and all tokens at once.

        Args:
            sequences: how many.
            length: tokens of each; at least 1.
            seed: of the draw; the tables have their own.
        """
        counts(sequences=(sequences, 1), length=(length, 1))
        generator = seeded(seed)
        states_TB = torch.zeros(length, sequences, dtype=torch.long)
        states_TB[0] = torch.randint(self.states, (sequences,), generator=generator)
        uniform_TB = torch.rand(length, sequences, generator=generator, dtype=torch.float64)
        transition = Rows(self.transition())
        for t in range(1, length):
            states_TB[t] = transition.place(states_TB[t - 1], uniform_TB[t])
        tokens_TB = Rows(self.emission()).draw(states_TB, generator)
        return HiddenText(tokens_TB.T.contiguous(), states_TB.T.contiguous())

    def predict(self, tokens: Tensor) -> Tensor:
        """P(x[t] | x[0..t-1]) for every t, [B, T, V], float64; position 0 holds the distribution of first tokens.

        The forward algorithm: with f[t] the distribution of the state before token t is seen, the prediction is f[t]
        times the emission table, and f[t+1] = normalised(f[t] * E[:, x[t]]) times the transition table.
        """
        return torch.stack([prior_BS for prior_BS, _ in self._forward(tokens)], 1) @ self.emission()

    def posterior(self, tokens: Tensor, smoothed: bool = False) -> Tensor:
        """P(state at t | tokens up to t), or given all tokens where `smoothed`, [B, T, states], float64."""
        filtered = torch.stack([filtered_BS for _, filtered_BS in self._forward(tokens)], 1)
        if not smoothed:
            return filtered
        transition, emission_VS = self.transition(), self.emission().T
        backward_BS = torch.ones_like(filtered[:, 0])
        for t in range(tokens.shape[1] - 1, -1, -1):
            later = filtered[:, t] * backward_BS
            filtered[:, t] = later / later.sum(1, keepdim=True)
            backward_BS = (backward_BS * emission_VS[tokens[:, t]]) @ transition.T
            backward_BS = backward_BS / backward_BS.sum(1, keepdim=True)
        return filtered

    def floor(self, tokens: Tensor) -> float:
        """Least possible mean loss per token on these sequences, in nats, the first token of each included."""
        emission_SV = self.emission()
        return float(torch.stack([entropy(prior @ emission_SV).mean() for prior, _ in self._forward(tokens)]).mean())

    def log_likelihood(self, tokens: Tensor) -> Tensor:
        """log P(sequence), [B], float64, nats."""
        emission_VS = self.emission().T
        parts = [(prior * emission_VS[tokens[:, t]]).sum(1).log() for t, (prior, _) in enumerate(self._forward(tokens))]
        return torch.stack(parts).sum(0)

    def _forward(self, tokens: Tensor):
        """Yields (P(state at t | before t), P(state at t | up to t)), both [B, states], along the sequence."""
        transition, emission_VS = self.transition(), self.emission().T
        prior_BS = torch.full((len(tokens), self.states), 1 / self.states, dtype=torch.float64)
        for t in range(tokens.shape[1]):
            joint_BS = prior_BS * emission_VS[tokens[:, t]]
            filtered_BS = joint_BS / joint_BS.sum(1, keepdim=True)
            yield prior_BS, filtered_BS
            prior_BS = filtered_BS @ transition
