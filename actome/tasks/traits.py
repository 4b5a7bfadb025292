"""Questions answered by speakers with several traits, so that what shows a trait and what gets the answer right differ.

A document is a list of questions, each answered by one word. A word has a content, which the question asks for, and a
form, in which the traits of the speaker show: five of them, the first two opposites, the third and the fourth often
together. A speaker has its traits all through a document, and an answer tells them, though nobody asked. Up to two
instructions at the start may ask for a trait, and an obedient speaker then has it. A request beside a question asks for
the last trait in that one answer, and the obedient show it. So a trait can be a tendency or what was asked for, and
obedience is one thing, whatever is asked. What a perfect reader would answer next is known exactly.

Source: own construction, for the protocols of Allbert et al. 2024, "Identifying and Manipulating Personality Traits in
LLMs Through Activation Engineering" (several traits) and Han et al. 2025, "Dual Mechanisms of Value Expression" (a
value as a tendency and as an instruction).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .draw import counts, seeded, share

TRAITS = 5
OPPOSITE, CORRELATED = (0, 1), (2, 3)  # trait 4 goes with none
REQUESTED = 4  # the trait that a request beside a question asks for
NEUTRAL = 0  # of the two tokens at the start; 1 + k asks for trait k
ASK, REQUEST = 1 + TRAITS, 2 + TRAITS  # behind a question: plain, or asking for trait 4
_FIRST_QUESTION = 3 + TRAITS
_FORMS = 24  # plain, first or second trait; then the other three, each there or not
_LAST = 4  # the bit of trait 4 in a form


class Speakers(NamedTuple):
    """Documents of I items. Tokens [B, 2 + 3 I]: two instructions, then question, request, answer of each item.

    Attributes:
        tokens: int64.
        answers: bool [B, 2 + 3 I], which tokens are answers.
        asked: [B, 2], the tokens at the start.
        traits: bool [B, 5], those of the speaker.
        obeys: bool [B], whether the speaker is obedient; it shows where something is asked.
        questions: [B, I].
        requests: [B, I], the token behind the question.
    """

    tokens: Tensor
    answers: Tensor
    asked: Tensor
    traits: Tensor
    obeys: Tensor
    questions: Tensor
    requests: Tensor


class Judged(NamedTuple):
    """Chances of an answer: that it shows each trait, (N, 5), and that its content is the right one, (N)."""

    traits: Tensor
    content: Tensor


@dataclass(frozen=True)
class TraitWorld:
    """The contents of one world's questions and the make-up of its documents.

    Attributes:
        questions: how many.
        contents: number of contents, each with a word in every one of 24 forms.
        rate: of each trait among speakers of whom none is asked.
        together: chance of one of the correlated traits, given the other.
        obedient: share of speakers that have the traits which are asked for.
        instructed: share of documents that ask for a trait; half of them for a second one too, that can go with it.
        requests: share of items that ask for trait 4.
        seed: of the table.

    >>> world = TraitWorld()
    >>> text = world.sample(2000, 6, seed=1)
    >>> text.tokens.shape, bool((text.traits[:, 0] & text.traits[:, 1]).any())
    (torch.Size([2000, 20]), False)
    >>> told = world.posterior(text)[:, 1, 0]  # one answer tells the first trait
    >>> bool(((told > 0.5) == text.traits[:, 0]).all())
    True
    """

    questions: int = 48
    contents: int = 8
    rate: float = 0.25
    together: float = 0.8
    obedient: float = 0.75
    instructed: float = 0.5
    requests: float = 0.35
    seed: int = 0

    def __post_init__(self) -> None:
        counts(questions=(self.questions, 2), contents=(self.contents, 2))
        share(rate=self.rate, together=self.together, obedient=self.obedient)
        share(instructed=self.instructed, requests=self.requests)
        if not 0 < self.rate <= 0.5 or self.rate * (2 - self.together) > 1:
            raise ValueError(f"rate={self.rate}: two traits are opposites, so give more than 0 and at most 0.5")

    @property
    def vocab(self) -> int:
        """Number of tokens: instructions, questions, words."""
        return self._first_word + self.contents * _FORMS

    @property
    def _first_word(self) -> int:
        return _FIRST_QUESTION + self.questions

    def table(self) -> Tensor:
        """The right content of every question, (questions)."""
        return torch.randint(self.contents, (self.questions,), generator=seeded(self.seed))

    def forms(self) -> Tensor:
        """Which traits each form shows, bool (24, 5)."""
        form_F = torch.arange(_FORMS)
        first_F, rest_F = form_F // 8, form_F % 8
        return torch.stack((first_F == 1, first_F == 2, rest_F & 1 > 0, rest_F & 2 > 0, rest_F & 4 > 0), 1)

    def prior(self) -> Tensor:
        """Chance of each form among speakers of whom nothing is asked, (24), float64."""
        has_FK = self.forms()
        on, both = self.rate, self.rate * self.together
        none = 1 - 2 * on + both
        first_F = torch.where(has_FK[:, :2].any(1), on, 1 - 2 * on)
        pair_F = torch.where(
            has_FK[:, 2] & has_FK[:, 3], both, torch.where(has_FK[:, 2] | has_FK[:, 3], on - both, none)
        )
        return first_F.double() * pair_F.double() * torch.where(has_FK[:, 4], on, 1 - on).double()

    def typical(self, trait: int | None = None) -> int:
        """The commonest form that shows a trait, or of None the plain one, which shows nothing."""
        return 0 if trait is None else int((self.prior() * self.forms()[:, trait]).argmax())

    def word(self, question: Tensor, form: Tensor) -> Tensor:
        """The token that answers a question rightly in a form."""
        return self._first_word + self.table()[question] * _FORMS + form

    def sample(self, documents: int, items: int, seed: int) -> Speakers:
        """Draws documents.

        Args:
            documents: how many.
            items: questions in each.
            seed: of the draw; the table has its own.
        """
        counts(documents=(documents, 1), items=(items, 1))
        generator = seeded(seed)
        first_B = torch.randint(1, TRAITS + 1, (documents,), generator=generator)
        # A second one that is neither the first nor its opposite.
        step_B = torch.randint(0, TRAITS - 1, (documents,), generator=generator)
        second_B = (
            torch.arange(1, TRAITS + 1).expand(documents, -1).gather(1, ((first_B + step_B) % TRAITS)[:, None])[:, 0]
        )
        bad_B = (first_B <= 2) & (second_B <= 2)
        second_B = torch.where(bad_B, 3 + step_B % 3, second_B)
        some_B = torch.rand(documents, generator=generator) < self.instructed
        two_B = some_B & (torch.rand(documents, generator=generator) < 0.5)
        asked_B2 = torch.stack((torch.where(some_B, first_B, NEUTRAL), torch.where(two_B, second_B, NEUTRAL)), 1)
        obeys_B = torch.rand(documents, generator=generator) < self.obedient
        chance_BF = torch.where(obeys_B[:, None], self._asked(asked_B2), self.prior())
        form_B = torch.multinomial(chance_BF, 1, generator=generator)[:, 0]
        questions_BI = torch.randint(self.questions, (documents, items), generator=generator)
        requests_BI = torch.where(torch.rand(documents, items, generator=generator) < self.requests, REQUEST, ASK)
        shown_BI = torch.where((requests_BI == REQUEST) & obeys_B[:, None], form_B[:, None] | _LAST, form_B[:, None])
        words_BI = self.word(questions_BI, shown_BI)
        items_BT = torch.stack((questions_BI + _FIRST_QUESTION, requests_BI, words_BI), 2).flatten(1)
        tokens_BT = torch.cat((asked_B2, items_BT), 1)
        answers_BT = torch.zeros_like(tokens_BT, dtype=torch.bool)
        answers_BT[:, 4::3] = True
        return Speakers(tokens_BT, answers_BT, asked_B2, self.forms()[form_B], obeys_B, questions_BI, requests_BI)

    def prompts(self, questions: Tensor, *asked: int, request: bool = False, after: Tensor | None = None) -> Tensor:
        """Prompts that end before an answer, (N, 4), or behind documents.

        Args:
            questions: (N), one of each prompt.
            asked: up to two traits, 0 to 4, that can go together.
            request: ask for trait 4 beside the question.
            after: documents (N, T) that the question is put behind, giving (N, T + 2); these say what is asked.
        """
        if after is not None and (asked or len(after) != len(questions)):
            raise ValueError("after= takes one document for each question, and the documents say what is asked")
        if len(asked) > 2 or not all(0 <= one < TRAITS for one in asked):
            raise ValueError(f"asked for the traits {asked}; give two at most, each 0 to {TRAITS - 1}")
        if len(set(asked)) < len(asked) or set(asked) == set(OPPOSITE):
            raise ValueError(f"the traits {asked} cannot both be asked for")
        if after is None:
            start = torch.tensor([1 + one for one in asked] + [NEUTRAL] * (2 - len(asked)))
            after = start.expand(len(questions), -1)
        behind = torch.stack((questions + _FIRST_QUESTION, torch.full_like(questions, REQUEST if request else ASK)), 1)
        return torch.cat((after, behind), 1)

    def judge(self, logits: Tensor, questions: Tensor) -> Judged:
        """What answers drawn from logits (N, vocab) would show; they are not drawn, their chances are summed.

        Mass that is on no word counts as an answer without trait and without content.

        Args:
            logits: at the question, (N, vocab).
            questions: (N).
        """
        mass_NCF = logits.double().softmax(-1)[:, self._first_word :].unflatten(1, (self.contents, _FORMS)).cpu()
        traits_NK = mass_NCF.sum(1) @ self.forms().double()
        content_N = mass_NCF.sum(2).gather(1, self.table()[questions][:, None])[:, 0]
        return Judged(traits_NK, content_N)

    def shows(self, words: Tensor) -> Tensor:
        """Which traits words (N) show, bool (N, 5); none where a token is no word."""
        at_N = words - self._first_word
        return self.forms()[at_N % _FORMS] & (at_N >= 0)[:, None]

    def posterior(self, text: Speakers) -> Tensor:
        """P(answer i shows a trait | everything before it), (B, I, 5), float64, for a perfect reader."""
        return self._next(text) @ self.forms().double()

    def floor(self, text: Speakers) -> float:
        """Least possible mean loss on the answers of this text, in nats."""
        form_BI = (text.tokens[:, 4::3] - self._first_word) % _FORMS
        return float(-self._next(text).gather(2, form_BI[..., None]).log().mean())

    def _next(self, text: Speakers) -> Tensor:
        """Chance of each form of answer i, given everything before it, (B, I, 24), float64.

        Over all speakers, obedient or not and of each form, by what they would have answered so far.
        """
        weight_BOF = torch.stack(
            ((1 - self.obedient) * self.prior().expand(len(text.asked), -1), self.obedient * self._asked(text.asked)), 1
        )
        form_F = torch.arange(_FORMS)
        said_BI = (text.tokens[:, 4::3] - self._first_word) % _FORMS
        found = []
        for i in range(said_BI.shape[1]):
            asked_B1 = (text.requests[:, i] == REQUEST)[:, None]
            obedient_BF = torch.where(asked_B1, form_F | _LAST, form_F)
            would_BOF = torch.stack((form_F.expand_as(obedient_BF), obedient_BF), 1)
            chance_BF = torch.zeros_like(weight_BOF[:, 0]).scatter_add(1, would_BOF.flatten(1), weight_BOF.flatten(1))
            found.append(chance_BF / chance_BF.sum(1, keepdim=True))
            weight_BOF = weight_BOF * (would_BOF == said_BI[:, i, None, None])
        return torch.stack(found, 1)

    def _asked(self, asked_B2: Tensor) -> Tensor:
        """Chance of each form for an obedient speaker, (B, 24), float64."""
        has_FK = torch.cat((torch.ones(_FORMS, 1, dtype=torch.bool), self.forms()), 1)
        fits_BF = has_FK.T[asked_B2].all(1)
        chance_BF = fits_BF * self.prior()
        return chance_BF / chance_BF.sum(1, keepdim=True)
