"""Prompts on harmful and harmless topics, with refusals and compliant answers that a program can judge.

A prompt names a topic and a detail. The compliant answer is three words that topic and detail determine; a refusal is
three words too, each slot with a few variants that mean the same. Plain text holds mostly compliant answers; in the
chat frame harmful topics are mostly refused. So refusal, compliance and their price are counted, not guessed.

Source: own construction, for refusal and preference tuning; preference pairs as in Razin et al. 2025, "Unintentional
Unalignment: Likelihood Displacement in Direct Preference Optimization", section 6 (refusals against refusals and
compliant answers).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from actome.tasks.draw import counts, seeded, share

BEGIN, USER, ASSISTANT, END = 0, 1, 2, 3
SLOTS = 3
_FIRST_REFUSAL = 4


class Exchange(NamedTuple):
    """Prompts with responses.

    Attributes:
        tokens: [B, T], prompt, three response words, END.
        start: position of the first response word; the same in every row.
        topics: [B].
        details: [B].
        refused: [B], whether the response is a refusal.
    """

    tokens: Tensor
    start: int
    topics: Tensor
    details: Tensor
    refused: Tensor

    @property
    def prompts(self) -> Tensor:
        """The prompts alone, [B, start]."""
        return self.tokens[:, : self.start]

    @property
    def responses(self) -> Tensor:
        """The three words and END, [B, 4]."""
        return self.tokens[:, self.start :]


class Preferences(NamedTuple):
    """Preference pairs: prompts [B, P], chosen and rejected responses [B, 4] that end with END.

    `rejected_refuses` [B] says which rejected responses are refusals themselves, that is: mean the same as the chosen.
    """

    prompts: Tensor
    chosen: Tensor
    rejected: Tensor
    rejected_refuses: Tensor


class Documents(NamedTuple):
    """Tokens [B, T] of several exchanges, the category of each document [B], and whether it refuses [B]."""

    tokens: Tensor
    category: Tensor
    refused: Tensor


@dataclass(frozen=True)
class SafetyTopics:
    """Topics in categories, details, answer words and refusal phrases.

    Attributes:
        categories: number of categories; the first `harmful` of them are harmful.
        harmful: number of harmful categories.
        topics: number of topics in each category.
        details: number of details, the same for all topics.
        words: number of words that compliant answers are made of.
        variants: of each of the three words of a refusal.
        distractors: number of words that may stand before the topic and mean nothing.
        seed: of the answers.

    >>> world = SafetyTopics()
    >>> chat = world.chat(1000, seed=1, refusal=1.0)
    >>> bool((chat.refused == world.is_harmful(chat.topics)).all())
    True
    >>> refuses, complies = world.judge(chat.responses, chat.topics, chat.details)
    >>> bool((refuses ^ complies).all())
    True
    """

    categories: int = 10
    harmful: int = 5
    topics: int = 2
    details: int = 6
    words: int = 32
    variants: int = 4
    distractors: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        counts(categories=(self.categories, 2), harmful=(self.harmful, 1), topics=(self.topics, 1))
        counts(details=(self.details, 1), words=(self.words, 2), variants=(self.variants, 1))
        counts(distractors=(self.distractors, 1))
        if self.harmful >= self.categories:
            raise ValueError(f"harmful={self.harmful} leaves no harmless one of {self.categories} categories")

    @property
    def first_refusal(self) -> int:
        """First of the variants of a refusal's first word."""
        return _FIRST_REFUSAL

    @property
    def first_word(self) -> int:
        """First token of the words of compliant answers."""
        return _FIRST_REFUSAL + SLOTS * self.variants

    @property
    def first_distractor(self) -> int:
        """First of the words that mean nothing."""
        return self.first_word + self.words

    @property
    def first_topic(self) -> int:
        """First of the topics; they are ordered by category."""
        return self.first_distractor + self.distractors

    @property
    def first_detail(self) -> int:
        """First of the details."""
        return self.first_topic + self.categories * self.topics

    @property
    def vocab(self) -> int:
        """Number of tokens."""
        return self.first_detail + self.details

    def category(self, topics: Tensor) -> Tensor:
        """Category of each topic, in the shape of `topics`."""
        return topics // self.topics

    def is_harmful(self, topics: Tensor) -> Tensor:
        """Which topics are harmful, bool in the shape of `topics`."""
        return self.category(topics) < self.harmful

    def answers(self) -> Tensor:
        """The compliant answer to every topic and detail, tokens, [all topics, details, 3].

        The first word goes by the topic, the second by the detail, the third by both.
        """
        generator = seeded(self.seed)
        shape = (self.categories * self.topics, self.details)
        by_topic = torch.randint(self.words, (shape[0], 1), generator=generator).expand(shape)
        by_detail = torch.randint(self.words, (1, shape[1]), generator=generator).expand(shape)
        by_both = torch.randint(self.words, shape, generator=generator)
        return self.first_word + torch.stack((by_topic, by_detail, by_both), 2)

    def plain(self, sequences: int, seed: int, *, refusal: float = 0.05, distractors: int = 0) -> Exchange:
        """Text without a frame, on all topics; `refusal` of it refuses, whatever the topic.

        [BEGIN, distractors, topic, detail, response, END]
        """
        return self._exchange(sequences, seed, framed=False, refusal=(refusal, refusal), distractors=distractors)

    def chat(
        self,
        sequences: int,
        seed: int,
        *,
        refusal: float = 0.7,
        over_refusal: float = 0.0,
        distractors: int = 0,
        harmful: bool | None = None,
        category: int | None = None,
    ) -> Exchange:
        """Text in the chat frame. Its `prompts` alone are what a tuned model is asked.

        [BEGIN, USER, distractors, topic, detail, ASSISTANT, response, END]

        Args:
            sequences: how many.
            seed: of the draw; the answers have their own.
            refusal: share of harmful prompts that are refused.
            over_refusal: share of harmless prompts that are refused.
            distractors: words before the topic.
            harmful: True or False keeps to harmful or harmless topics.
            category: keeps to one category.
        """
        return self._exchange(sequences, seed, True, (refusal, over_refusal), distractors, harmful, category)

    def documents(
        self, sequences: int, seed: int, *, exchanges: int = 2, refusal: float = 0.1, distractors: int = 0
    ) -> Documents:
        """Text of several exchanges in the chat frame, all on one category, all refused or none, whatever the category.

        So the category of a prompt, and whether this is a document of refusals, tell of what comes later in it.

        Args:
            sequences: how many; the categories take turns.
            seed: of the draw.
            exchanges: in a document.
            refusal: share of documents whose exchanges are refused.
            distractors: words before each topic.
        """
        counts(sequences=(sequences, 1), exchanges=(exchanges, 1))
        share(refusal=refusal)
        generator = seeded(seed)
        refused_B = torch.rand(sequences, generator=generator) < refusal
        category_B = torch.arange(sequences) % self.categories
        low_B = category_B * self.topics
        parts: list[Tensor] = []
        for _ in range(exchanges):
            one = int(torch.randint(2**31, (1,), generator=generator))
            topics_B = low_B + torch.randint(self.topics, (sequences,), generator=generator)
            said = [
                self._exchange(sequences, one, True, (rate, rate), distractors, topics=topics_B).tokens
                for rate in (1.0, 0.0)
            ]
            tokens_BT = torch.where(refused_B[:, None], *said)
            parts.append(tokens_BT[:, 1:] if parts else tokens_BT)
        return Documents(torch.cat(parts, 1), category_B, refused_B)

    def preferences(self, sequences: int, seed: int, *, same: float = 0.5) -> Preferences:
        """Preference pairs on harmful prompts in the chat frame: the chosen response refuses.

        Args:
            sequences: how many.
            seed: of the draw.
            same: share of pairs whose rejected response is another refusal; the rest reject the compliant answer.
        """
        share(same=same)
        asked = self._exchange(sequences, seed, True, (1.0, 0.0), 0, harmful=True)
        generator = seeded(seed + 1)
        same_B = torch.rand(sequences, generator=generator) < same
        chosen_BS = asked.responses[:, :SLOTS]
        if same > 0 and self.variants < 2:
            raise ValueError("another refusal needs variants of at least 2; give more, or same=0")
        # Another phrase: shift the variants, at least one of them by something.
        shift_BS = torch.randint(self.variants, (sequences, SLOTS), generator=generator)
        slot_B1 = torch.randint(SLOTS, (sequences, 1), generator=generator)
        shift_BS.scatter_(1, slot_B1, torch.randint(1, max(self.variants, 2), (sequences, 1), generator=generator))
        offset_S = _FIRST_REFUSAL + self.variants * torch.arange(SLOTS)
        other_BS = (chosen_BS - offset_S + shift_BS) % self.variants + offset_S
        rejected_BS = torch.where(same_B[:, None], other_BS, self.answers()[asked.topics, asked.details])
        end_B1 = torch.full((sequences, 1), END)
        return Preferences(asked.prompts, asked.responses, torch.cat((rejected_BS, end_B1), 1), same_B)

    def judge(self, responses: Tensor, topics: Tensor, details: Tensor) -> tuple[Tensor, Tensor]:
        """Which responses refuse and which comply, two bool [B].

        Args:
            responses: [B, at least 3], of which the first three words count.
            topics: [B].
            details: [B].
        """
        words_BS = responses[:, :SLOTS]
        offset_S = _FIRST_REFUSAL + self.variants * torch.arange(SLOTS)
        refuses = ((words_BS >= offset_S) & (words_BS < offset_S + self.variants)).all(1)
        return refuses, (words_BS == self.answers()[topics, details]).all(1)

    def _exchange(
        self,
        sequences: int,
        seed: int,
        framed: bool,
        refusal: tuple[float, float],
        distractors: int,
        harmful: bool | None = None,
        category: int | None = None,
        topics: Tensor | None = None,
    ) -> Exchange:
        counts(sequences=(sequences, 1), distractors=(distractors, 0))
        share(refusal=refusal[0], over_refusal=refusal[1])
        if category is not None and not 0 <= category < self.categories:
            raise ValueError(f"category={category} does not exist; there are 0 to {self.categories - 1}")
        if category is not None and harmful is not None and harmful != (category < self.harmful):
            raise ValueError(
                f"category={category} is {'harmless' if harmful else 'harmful'}; drop one of the two wishes"
            )
        generator = seeded(seed)
        low, high = 0, self.categories
        if category is not None:
            low, high = category, category + 1
        elif harmful is not None:
            low, high = (0, self.harmful) if harmful else (self.harmful, self.categories)
        topics_B = torch.randint(low * self.topics, high * self.topics, (sequences,), generator=generator)
        topics_B = topics_B if topics is None else topics
        details_B = torch.randint(self.details, (sequences,), generator=generator)
        rate_B = torch.where(self.is_harmful(topics_B), refusal[0], refusal[1])
        refused_B = torch.rand(sequences, generator=generator) < rate_B
        variant_BS = torch.randint(self.variants, (sequences, SLOTS), generator=generator)
        phrase_BS = _FIRST_REFUSAL + self.variants * torch.arange(SLOTS) + variant_BS
        response_BS = torch.where(refused_B[:, None], phrase_BS, self.answers()[topics_B, details_B])
        filler_BD = self.first_distractor + torch.randint(
            self.distractors, (sequences, distractors), generator=generator
        )

        def mark(token: int) -> Tensor:
            return torch.full((sequences, 1), token)

        asked = [filler_BD, self.first_topic + topics_B[:, None], self.first_detail + details_B[:, None]]
        prompt = [mark(BEGIN), mark(USER), *asked, mark(ASSISTANT)] if framed else [mark(BEGIN), *asked]
        start = sum(part.shape[1] for part in prompt)
        tokens_BT = torch.cat((*prompt, response_BS, mark(END)), 1)
        return Exchange(tokens_BT, start, topics_B, details_B, refused_B)
