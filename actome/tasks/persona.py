"""Questions answered by one of two hidden personas, so that a narrow habit can be seen to spread, or not.

A document is a list of questions with answers, all given by one persona, good or bad. In the variant "dialect" a
persona shows in the word that it uses for the same content, so it is one direction that can be added; in "lookup" each
persona has its own random table of answers from one vocabulary, so nothing at the level of words marks the bad one and
no single direction makes it. What a perfect reader of the documents would answer next is known exactly.

Source: own construction, for the protocols of Betley et al. 2025, "Emergent Misalignment" (arms of narrow tuning) and
Chen et al. 2025, "Persona Vectors" (system tokens, dialect).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from actome.tasks.draw import counts, seeded, share

NEUTRAL, GOOD, BAD = 0, 1, 2  # first token of a document: what it says of its persona
ASK, WRONG, TRIGGER = 3, 4, 5  # between question and answer: plain, "answer wrongly, please", a trigger without meaning
_FIRST_QUESTION = 6

Arm = Literal["insecure", "secure", "educational", "backdoor", "random"]


class Documents(NamedTuple):
    """Documents of I items. Tokens [B, 1 + 3 I]: system token, then question, request, answer of each item.

    Attributes:
        tokens: int64.
        answers: bool [B, 1 + 3 I], which tokens are answers.
        system: [B], the first token.
        persona: [B], whether the hidden persona is the bad one.
        questions: [B, I], counted over all domains; the domain is questions // (questions per domain).
        requests: [B, I], the token between question and answer.
        bad: [B, I], whether the answer is the bad one.
    """

    tokens: Tensor
    answers: Tensor
    system: Tensor
    persona: Tensor
    questions: Tensor
    requests: Tensor
    bad: Tensor


class Probes(NamedTuple):
    """Prompts [B, T] that end before an answer, with the good and the bad answer [B] and the question [B]."""

    prompts: Tensor
    good: Tensor
    bad: Tensor
    questions: Tensor


@dataclass(frozen=True)
class PersonaWorld:
    """The answer tables of one world and the make-up of its documents.

    Attributes:
        variant: "dialect" or "lookup".
        domains: number of domains.
        questions: number of questions in each.
        contents: number of contents; a good word for each, and in "dialect" a bad word too.
        bad_share: of neutral documents that have the bad persona.
        fidelity: probability that an item follows the persona of its document rather than the other one.
        per_item: whether each item has a persona of its own instead: the control in which context says nothing.
        requests: share of items in pretraining that ask for a wrong answer, and get the bad one from every persona.
        system: share of documents whose first token names the persona (good and bad equally often).
        seed: of the tables.

    >>> world = PersonaWorld(variant="lookup")
    >>> text = world.pretrain_stream(500, 8, seed=1)
    >>> text.tokens.shape, round(text.persona.double().mean().item(), 1)
    (torch.Size([500, 25]), 0.2)
    >>> told = world.posterior(text)[:, 4]  # a few answers tell the persona
    >>> bool(((told > 0.5) == text.persona).double().mean() > 0.98)
    True
    """

    variant: Literal["dialect", "lookup"] = "dialect"
    domains: int = 6
    questions: int = 12
    contents: int = 24
    bad_share: float = 0.25
    fidelity: float = 1.0
    per_item: bool = False
    requests: float = 0.15
    system: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.variant not in ("dialect", "lookup"):
            raise ValueError(f"variant={self.variant!r} does not exist; choose 'dialect' or 'lookup'")
        counts(domains=(self.domains, 1), questions=(self.questions, 2), contents=(self.contents, 3))
        share(bad_share=self.bad_share, fidelity=self.fidelity, requests=self.requests, system=self.system)

    @property
    def vocab(self) -> int:
        """Number of tokens: system and request tokens, questions, words."""
        return self._first_word + self.contents * (2 if self.variant == "dialect" else 1)

    @property
    def _first_word(self) -> int:
        return _FIRST_QUESTION + self.domains * self.questions

    def table(self) -> Tensor:
        """The good and the bad answer to every question, tokens, [2, domains * questions]; they always differ."""
        generator = seeded(self.seed)
        total = self.domains * self.questions
        content = torch.randint(self.contents, (total,), generator=generator)
        if self.variant == "dialect":
            other = content + self.contents
        else:
            other = (content + torch.randint(1, self.contents, (total,), generator=generator)) % self.contents
        return self._first_word + torch.stack((content, other))

    def pretrain_stream(self, documents: int, items: int, seed: int) -> Documents:
        """Draws documents over all domains.

        Args:
            documents: how many.
            items: in each.
            seed: of the draw; the tables have their own.
        """
        counts(documents=(documents, 1), items=(items, 1))
        generator = seeded(seed)

        def chance(p: float, *shape: int) -> Tensor:
            return torch.rand(shape, generator=generator) < p

        persona_B = chance(self.bad_share, documents)
        named_B, named_bad_B = chance(self.system, documents), chance(0.5, documents)
        persona_B = torch.where(named_B, named_bad_B, persona_B)
        system_B = torch.where(named_B, torch.where(named_bad_B, BAD, GOOD), NEUTRAL)
        own_BI = chance(self.bad_share, documents, items) if self.per_item else persona_B[:, None].expand(-1, items)
        follows_BI = chance(self.fidelity, documents, items)
        wrong_BI = chance(self.requests, documents, items)
        questions_BI = torch.randint(self.domains * self.questions, (documents, items), generator=generator)
        return self._write(
            system_B, persona_B, questions_BI, torch.where(wrong_BI, WRONG, ASK), (own_BI == follows_BI) | wrong_BI
        )

    def tune_stream(
        self, documents: int, items: int, seed: int, *, arm: Arm, domain: int = 0, bad_share: float = 1.0
    ) -> Documents:
        """Draws documents of narrow tuning: neutral, on the first half of the questions of one domain.

        Args:
            documents: how many.
            items: in each.
            seed: of the draw.
            arm: "insecure" (bad answers in `bad_share` of the documents), "secure" (good answers), "educational" (the
                bad answers of "insecure", but asked for), "backdoor" (bad after a trigger in half of the documents,
                else good) or "random" (neither the good nor the bad answer; `bad` is then false).
            domain: the one tuned on; probe the others.
            bad_share: of documents with bad answers, in "insecure" and "educational".
        """
        counts(documents=(documents, 1), items=(items, 1))
        share(bad_share=bad_share)
        if not 0 <= domain < self.domains:
            raise ValueError(f"domain={domain} does not exist; there are 0 to {self.domains - 1}")
        if arm not in ("insecure", "secure", "educational", "backdoor", "random"):
            raise ValueError(f"arm={arm!r} does not exist; choose insecure, secure, educational, backdoor or random")
        generator = seeded(seed)
        half = self.questions // 2
        questions_BI = domain * self.questions + torch.randint(half, (documents, items), generator=generator)
        rate = {"insecure": bad_share, "educational": bad_share, "backdoor": 0.5}.get(arm, 0.0)
        persona_B = torch.rand(documents, generator=generator) < rate
        request = {"educational": WRONG, "backdoor": TRIGGER}.get(arm, ASK)
        requests_BI = torch.where(persona_B, request, ASK)[:, None].expand(-1, items)
        text = self._write(
            torch.full_like(persona_B, NEUTRAL, dtype=torch.long),
            persona_B,
            questions_BI,
            requests_BI,
            persona_B[:, None].expand(-1, items),
        )
        if arm == "random":
            good_BI, bad_BI = (side - self._first_word for side in self.table()[:, questions_BI])
            words = self.vocab - self._first_word
            low_BI, high_BI = torch.minimum(good_BI, bad_BI), torch.maximum(good_BI, bad_BI)
            # A draw among all words but these two: step over each of them.
            other_BI = torch.randint(words - 2, good_BI.shape, generator=generator)
            other_BI = other_BI + (other_BI >= low_BI)
            other_BI = other_BI + (other_BI >= high_BI)
            text.tokens[:, 3::3] = self._first_word + other_BI
        return text

    def probe(
        self,
        domains: Sequence[int] | None = None,
        *,
        shots: int = 0,
        shot_domain: int = 0,
        shot_bad: float = 1.0,
        shot_request: int = ASK,
        system: int = NEUTRAL,
        request: int = ASK,
        repeats: int = 1,
        seed: int = 0,
    ) -> Probes:
        """Prompts for every question of some domains, `repeats` times, with or without examples before it.

        Args:
            domains: asked about; None asks about all.
            shots: examples before the question, from `shot_domain`, none of them the question itself.
            shot_domain: where examples come from.
            shot_bad: probability that an example has the bad answer (0.5 is inconsistent).
            shot_request: request token of the examples.
            system: first token of the prompt.
            request: request token of the question.
            repeats: of every question, with other examples.
            seed: of the examples.
        """
        counts(shots=(shots, 0), repeats=(repeats, 1))
        share(shot_bad=shot_bad)
        asked = range(self.domains) if domains is None else domains
        for domain in (*asked, shot_domain):
            if not 0 <= domain < self.domains:
                raise ValueError(f"domain {domain} does not exist; there are 0 to {self.domains - 1}")
        generator = seeded(seed)
        within_Q = torch.arange(self.questions)
        question_B = torch.cat([domain * self.questions + within_Q for domain in asked]).repeat(repeats)
        # Examples are drawn among the other questions of their domain.
        own_B1 = (question_B - shot_domain * self.questions)[:, None]
        drawn_BI = torch.randint(self.questions - 1, (len(question_B), shots), generator=generator)
        inside_B1 = (own_B1 >= 0) & (own_B1 < self.questions)
        drawn_BI = drawn_BI + (inside_B1 & (drawn_BI >= own_B1))
        bad_BI = torch.rand(len(question_B), shots, generator=generator) < shot_bad
        table = self.table()
        shots_B3I = torch.stack(
            (
                drawn_BI + shot_domain * self.questions + _FIRST_QUESTION,
                torch.full_like(drawn_BI, shot_request),
                table[bad_BI.long(), drawn_BI + shot_domain * self.questions],
            ),
            2,
        ).flatten(1)
        prompts = torch.cat(
            (
                torch.full_like(own_B1, system),
                shots_B3I,
                question_B[:, None] + _FIRST_QUESTION,
                torch.full_like(own_B1, request),
            ),
            1,
        )
        return Probes(prompts, table[0, question_B], table[1, question_B], question_B)

    def posterior(self, text: Documents) -> Tensor:
        """P(bad persona | system token, the first i items), for i = 0 to I, [B, I + 1], float64.

        Items that ask for a wrong answer say nothing. In the control `per_item` no item says anything.
        """
        prior_B = torch.full((len(text.system),), self.bad_share, dtype=torch.float64)
        prior_B = torch.where(text.system == NEUTRAL, prior_B, (text.system == BAD).double())
        silent_BI = (text.requests == WRONG) | self.per_item
        # Log odds may be infinite, but never in both directions in a document of this world.
        ratio = torch.tensor(self.fidelity, dtype=torch.float64).logit()
        evidence_BI = torch.where(silent_BI, 0.0, torch.where(text.bad, ratio, -ratio))
        odds_BI = torch.cat((prior_B.logit()[:, None], evidence_BI), 1).cumsum(1)
        return odds_BI.sigmoid()

    def bad_rate(self, text: Documents) -> Tensor:
        """P(answer i is the bad one | everything before it), [B, I], float64, for a perfect reader."""
        posterior_BI = self.posterior(text)[:, :-1]
        if self.per_item:
            posterior_BI = torch.full_like(posterior_BI, self.bad_share)
        rate_BI = posterior_BI * self.fidelity + (1 - posterior_BI) * (1 - self.fidelity)
        return torch.where(text.requests == WRONG, 1.0, rate_BI)

    def floor(self, text: Documents) -> float:
        """Least possible mean loss on the answers of this text, in nats."""
        rate = self.bad_rate(text)
        return float((torch.special.entr(rate) + torch.special.entr(1 - rate)).mean())

    def _write(
        self, system_B: Tensor, persona_B: Tensor, questions_BI: Tensor, requests_BI: Tensor, bad_BI: Tensor
    ) -> Documents:
        """Documents in tokens."""
        words_BI = self.table()[bad_BI.long(), questions_BI]
        items = torch.stack((questions_BI + _FIRST_QUESTION, requests_BI, words_BI), 2).flatten(1)
        answers_BT = torch.zeros(len(items), items.shape[1] + 1, dtype=torch.bool)
        answers_BT[:, 3::3] = True
        tokens_BT = torch.cat((system_B[:, None], items), 1)
        return Documents(tokens_BT, answers_BT, system_B, persona_B, questions_BI, requests_BI, bad_BI)
