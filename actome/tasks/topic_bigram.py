"""Text of several topics: each topic has its own bigram table, and the topic is not said.

Each sequence begins with a begin token and then follows the bigram table of its topic. A reader has to infer the topic
from the tokens, which is the simplest reason for a head to be of use in one domain and idle in another. The exact
posterior over topics is one line of Bayes per token, so the least possible loss is known, with the topic told and
without.

Source: the mixture of Dirichlet tables follows the toy language of Xie et al. 2022, "An Explanation of In-context
Learning as Implicit Bayesian Inference", with chains in place of hidden Markov models; domains as in Guo et al. 2024,
"Active-Dormant Attention Heads".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from actome.tasks.draw import Rows, counts, dirichlet, entropy, positive, seeded, share

BEGIN = 0


class TopicText(NamedTuple):
    """Tokens [B, T] and, in the same shape, the topic each token was drawn under (the begin token: the first topic)."""

    tokens: Tensor
    topics: Tensor


@dataclass(frozen=True)
class TopicBigram:
    """The bigram tables of one world of topics. Token 0 is the begin token.

    Attributes:
        vocab: number of tokens, the begin token among them.
        topics: number of topics; all are equally frequent.
        concentration: of the Dirichlet distribution that the rows of the tables are drawn from; smaller is sharper.
        switch: probability that the topic is drawn anew (from all topics) before a token; 0 keeps one per sequence.
        seed: of the tables. Two worlds of one seed are the same world.

    >>> world = TopicBigram(vocab=16)
    >>> text = world.sample(200, 32, seed=1)
    >>> text.tokens.shape, text.tokens[0, 0].item(), bool((text.topics == text.topics[:, :1]).all())
    (torch.Size([200, 32]), 0, True)
    >>> world.floor(text) < world.bayes_floor(text.tokens)
    True
    >>> (world.posterior(text.tokens)[:, -1].argmax(-1) == text.topics[:, -1]).double().mean().item() > 0.95
    True
    """

    vocab: int = 32
    topics: int = 4
    concentration: float = 0.3
    switch: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        counts(vocab=(self.vocab, 3), topics=(self.topics, 1))
        positive(concentration=self.concentration)
        share(switch=self.switch)

    def tables(self) -> Tensor:
        """Next-token probabilities [topics, V, V] of each topic; the begin token never follows anything."""
        tables_ZVV = torch.zeros(self.topics, self.vocab, self.vocab, dtype=torch.float64)
        shape = (self.topics, self.vocab, self.vocab - 1)
        tables_ZVV[..., 1:] = dirichlet(shape, self.concentration, seeded(self.seed))
        return tables_ZVV

    def sample(self, sequences: int, length: int, seed: int) -> TopicText:
        """Draws all sequences at once, one position at a time.

        Args:
            sequences: how many.
            length: tokens of each, the begin token among them; at least 2.
            seed: of the draw; the tables have their own.

        Returns:
            TopicText of two [sequences, length] tensors, int64.
        """
        counts(sequences=(sequences, 1), length=(length, 2))
        generator = seeded(seed)
        rows = Rows(self.tables().flatten(0, 1))
        topics_TB = torch.randint(self.topics, (1, sequences), generator=generator).repeat(length, 1)
        if self.switch:
            fresh_TB = torch.randint(self.topics, (length, sequences), generator=generator)
            changes_TB = torch.rand(length, sequences, generator=generator) < self.switch
            # The first token is drawn under the first topic, and so is what stands for the begin token.
            changes_TB[:2] = False
            latest_TB = torch.where(changes_TB, torch.arange(length)[:, None], 0).cummax(0).values
            topics_TB = torch.where(latest_TB > 0, fresh_TB.gather(0, latest_TB), topics_TB)
        uniform_TB = torch.rand(length, sequences, generator=generator, dtype=torch.float64)
        tokens_TB = torch.zeros(length, sequences, dtype=torch.long)
        for t in range(1, length):
            tokens_TB[t] = rows.place(topics_TB[t] * self.vocab + tokens_TB[t - 1], uniform_TB[t])
        return TopicText(tokens_TB.T.contiguous(), topics_TB.T.contiguous())

    def posterior(self, tokens: Tensor) -> Tensor:
        """P(topic of the token at t | tokens up to and with t), [B, T, topics], float64."""
        return torch.stack([filtered for _, filtered in self._filter(tokens)], 1)

    def predict(self, tokens: Tensor) -> Tensor:
        """What a reader who knows the tables expects of token t + 1 after tokens 0 to t, [B, T, V], float64.

        p(x[t+1] | x[..t]) = sum_z P(z at t + 1 | x[..t]) P_z[x[t], x[t+1]]
        """
        tables_ZVV = self.tables()
        return torch.stack(
            [
                torch.einsum("bz,zbv->bv", self._next_topic(filtered, t), tables_ZVV[:, tokens[:, t]])
                for t, (_, filtered) in enumerate(self._filter(tokens))
            ],
            1,
        )

    def floor(self, text: TopicText) -> float:
        """Least possible mean next-token loss on this text, in nats, for one who is told the topic of every token."""
        entropy_ZV = entropy(self.tables())
        return float(entropy_ZV[text.topics[:, 1:], text.tokens[:, :-1]].mean())

    def bayes_floor(self, tokens: Tensor) -> float:
        """Least possible mean next-token loss on these tokens, in nats, for one who has to infer the topic."""
        tables_ZVV = self.tables()
        total = torch.zeros((), dtype=torch.float64)
        for t, (_, filtered) in enumerate(self._filter(tokens[:, :-1])):
            expected = torch.einsum("bz,zbv->bv", self._next_topic(filtered, t), tables_ZVV[:, tokens[:, t]])
            total += entropy(expected).mean()
        return float(total / (tokens.shape[1] - 1))

    def _next_topic(self, filtered_BZ: Tensor, t: int) -> Tensor:
        # No switch before the first token: the begin token says nothing that a switch could undo anyway.
        return filtered_BZ * (1 - self.switch) + self.switch / self.topics if t else filtered_BZ

    def _filter(self, tokens: Tensor):
        """Yields (t, P(topic at t | tokens up to t) [B, topics]) along the sequence."""
        tables_ZVV = self.tables()
        filtered_BZ = torch.full((len(tokens), self.topics), 1 / self.topics, dtype=torch.float64)
        yield 0, filtered_BZ
        for t in range(1, tokens.shape[1]):
            likelihood_BZ = tables_ZVV[:, tokens[:, t - 1], tokens[:, t]].T
            joint_BZ = self._next_topic(filtered_BZ, t - 1) * likelihood_BZ
            filtered_BZ = joint_BZ / joint_BZ.sum(1, keepdim=True)
            yield t, filtered_BZ
