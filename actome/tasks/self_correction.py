"""Answers that begin wrong, are taken back by a mark, and begin again: what a model can learn self-correction from.

A document is one of `PersonaWorld` in the variant "dialect" in which some answers come twice: a wrong word, the
correction mark, the right word. The loss leaves out the wrong words, so that a model learns to take them back and not
to say them. Every question meets only half of the contents as wrong words, so that one can ask whether what was learned
reaches pairs that never occurred. Whether a word answers its question is known exactly.

Source: own construction, for the protocol of McKenzie et al. 2026, "Endogenous Resistance to Activation Steering in
Language Models" (tuning on synthetic self-corrections with the bad start masked).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from actome.tasks.draw import counts, seeded
from actome.tasks.draw import share as checked
from actome.tasks.persona import ASK, BAD, GOOD, NEUTRAL, PersonaWorld


class Corrections(NamedTuple):
    """Documents in which some answers are taken back.

    Attributes:
        tokens: int64 [B, T], behind the last answer filled up with zeros.
        targets: bool [B, T], which tokens count in the loss: right words, marks, and questions that follow an answer.
        wrong: bool [B, T], which tokens are wrong words.
    """

    tokens: Tensor
    targets: Tensor
    wrong: Tensor


class AnswerPairs(NamedTuple):
    """Prompts [N, 3] that end before an answer, with an answer [N, 1] that fits and one that belongs elsewhere."""

    prompts: Tensor
    fitting: Tensor
    foreign: Tensor


@dataclass(frozen=True)
class SelfCorrection:
    """Self-corrections in the answers of a world.

    In documents question q has wrong words of the contents c for which q + c is even, but for its own. Those for which
    it is odd are left for tests.

    Attributes:
        world: of the variant "dialect".

    >>> task = SelfCorrection(PersonaWorld())
    >>> text = task.documents(100, 4, seed=1, share=0.3)
    >>> after = text.tokens.roll(-1, 1)[text.wrong]
    >>> bool((after == task.mark).all()), task.vocab == task.world.vocab + 1
    (True, True)
    """

    world: PersonaWorld = field(default_factory=PersonaWorld)

    def __post_init__(self) -> None:
        if self.world.variant != "dialect":
            raise ValueError(f"self-corrections are of the variant 'dialect', not {self.world.variant!r}")
        if self.world.contents < 4:
            raise ValueError(f"contents={self.world.contents}: 4 at least, for each question to have wrong words")

    @property
    def mark(self) -> int:
        """The token of correction, the one behind the world's own."""
        return self.world.vocab

    @property
    def vocab(self) -> int:
        """Number of tokens, the mark included."""
        return self.world.vocab + 1

    @property
    def questions(self) -> Tensor:
        """Tokens of all questions; an answer ends where one begins."""
        total = self.world.domains * self.world.questions
        return self.world.probe().prompts[:, 1].reshape(total)

    def contents(self) -> Tensor:
        """The content that answers each question, [domains * questions]."""
        return self.world.table()[0] - (self.world.vocab - 2 * self.world.contents)

    def documents(
        self, documents: int, items: int, seed: int, *, share: float = 0.3, domains: Sequence[int] | None = None
    ) -> Corrections:
        """Draws documents.

        Args:
            documents, items: how many, and questions with answers in each.
            seed: of the draw.
            share: probability that an answer begins wrong.
            domains: that questions come from; None for all.
        """
        counts(documents=(documents, 1), items=(items, 1))
        checked(share=share)
        text = self.world.pretrain_stream(documents, items, seed)
        generator = seeded(seed + 1)
        pool = torch.tensor(
            [d * self.world.questions + q for d in self._domains(domains) for q in range(self.world.questions)]
        )
        asked_BI = pool[torch.randint(len(pool), (documents, items), generator=generator)]
        corrected_BI = torch.rand(documents, items, generator=generator) < share
        content_BI = self.contents()[asked_BI]
        # One of the contents that go with the question, but for the right one: step over it.
        halves = torch.tensor([(self.world.contents + 1) // 2, self.world.contents // 2])
        odd_BI = asked_BI % 2
        own_BI = torch.where(content_BI % 2 == odd_BI, content_BI // 2, self.world.contents)
        fitting_BI = (own_BI < self.world.contents).long()
        place_BI = (torch.rand(documents, items, generator=generator) * (halves[odd_BI] - fitting_BI)).long()
        drawn_BI = 2 * (place_BI + (place_BI >= own_BI)) + odd_BI
        dialect_B1 = text.persona[:, None] * self.world.contents
        first = self.world.vocab - 2 * self.world.contents
        right_BI, wrong_BI = content_BI + dialect_B1 + first, drawn_BI + dialect_B1 + first
        longest = 1 + 5 * items
        tokens_BT = torch.zeros(documents, longest, dtype=torch.long)
        targets_BT, bad_BT = torch.zeros(2, documents, longest, dtype=torch.bool)
        tokens_BT[:, 0] = text.system
        rows, at_B = torch.arange(documents), torch.ones(documents, dtype=torch.long)
        for i in range(items):
            tokens_BT[rows, at_B], targets_BT[rows, at_B] = self.questions[asked_BI[:, i]], i > 0
            tokens_BT[rows, at_B + 1] = ASK
            at_B = at_B + 2
            twice = corrected_BI[:, i]
            some, at = rows[twice], at_B[twice]
            tokens_BT[some, at], bad_BT[some, at] = wrong_BI[twice, i], True
            tokens_BT[some, at + 1], targets_BT[some, at + 1] = self.mark, True
            at_B = at_B + 2 * twice
            tokens_BT[rows, at_B], targets_BT[rows, at_B] = right_BI[:, i], True
            at_B = at_B + 1
        return Corrections(tokens_BT, targets_BT, bad_BT)

    def pairs(self, domains: Sequence[int] | None = None, *, system: int = NEUTRAL, seed: int = 0) -> AnswerPairs:
        """Every question of some domains with its own answer and with that of another one, all in the good dialect.

        The foreign answers are the same words, dealt out so that none has the content that was asked for.
        """
        probe = self.world.probe(self._domains(domains), system=system)
        content_N = self.contents()[probe.questions]
        generator = seeded(seed)
        order = torch.randperm(len(content_N), generator=generator)
        for _ in range(1000):
            clash = (content_N[order] == content_N).nonzero()[:, 0]
            if not len(clash):
                break
            # Swap each clash with somebody drawn at random until none is left.
            for i in clash.tolist():
                j = int(torch.randint(len(order), (), generator=generator))
                order[[i, j]] = order[[j, i]]
        else:
            raise ValueError("too few contents in these domains to give every question a foreign answer")
        return AnswerPairs(probe.prompts, probe.good[:, None], probe.good[order][:, None])

    def quality(self, prompt: Any, attempt: Any) -> float:
        """How well a word answers the question at the end of a prompt.

        1 for the right word in the dialect of the persona that the prompt's first token names (either dialect where it
        names none), 0.5 for the right content in the other dialect, 0 for all else. Only the attempt's first token
        counts.

        >>> task = SelfCorrection()
        >>> probe = task.world.probe((0,))
        >>> task.quality(probe.prompts[0], probe.good[0:1]), task.quality(probe.prompts[0], [task.mark])
        (1.0, 0.0)
        """
        prompt, attempt = torch.as_tensor(prompt), torch.as_tensor(attempt)
        if not attempt.numel():
            return 0.0
        question = int((self.questions == prompt[-2]).nonzero()[0, 0])
        good, bad = (int(side[question]) for side in self.world.table())
        word, system = int(attempt[0]), int(prompt[0])
        if word not in (good, bad):
            return 0.0
        named = {BAD: bad, GOOD: good}.get(system, word)
        return 1.0 if word == named else 0.5

    def _domains(self, domains: Sequence[int] | None) -> Sequence[int]:
        return range(self.world.domains) if domains is None else domains
