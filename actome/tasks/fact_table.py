"""Facts of controlled exposure, and contexts that state or contradict them.

A fact gives a value to a key, a relation and an entity. A document states values for some keys, on the word of a
source, and asks for the value of a key, mostly one of them:

    BEGIN source (relation entity value) .. intent ASK relation entity value

What is stated may contradict the fact. In pretraining nobody says what to go by: how often an answer follows a
contradicting context depends on the source alone, and the slot of the intent is left open. In tuning the intent
decides, and sources mean nothing. So both answers to every prompt are known, and which of them is wanted.

Source: own construction, for knowledge conflicts with an intent as in Minder et al. 2025, "Controllable Context
Sensitivity and the Knob Behind It", section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from actome.tasks.draw import Rows, counts, positive, seeded, share

BEGIN, ASK, OPEN, CONTEXT, PRIOR = range(5)
_FIRST = 5
_SLOT = -4  # of the intent in a prompt, from its end
Intent = Literal["context", "prior", "open"]
INTENTS: dict[str, int] = {"open": OPEN, "context": CONTEXT, "prior": PRIOR}


class Documents(NamedTuple):
    """Documents with all that is known of them.

    Attributes:
        tokens: [N, T], the answer last; T is 7 and three a statement.
        facts: [N], which fact is asked for.
        sources: [N].
        about: [N, statements], the facts that the context gives a value for.
        stated: [N, statements], these values' tokens.
        relevant: [N] bool, whether the fact that is asked for is among them.
        by_context: [N], value token for one who goes by the context, which is the prior one where it is not relevant.
        by_prior: [N], value token of the fact itself.
    """

    tokens: Tensor
    facts: Tensor
    sources: Tensor
    about: Tensor
    stated: Tensor
    relevant: Tensor
    by_context: Tensor
    by_prior: Tensor

    @property
    def prompts(self) -> Tensor:
        """All but the answer, [N, T - 1]."""
        return self.tokens[:, :-1]

    @property
    def answers(self) -> Tensor:
        """Which tokens are answers, bool as `tokens`: the mask under which `train` learns them alone."""
        mask = torch.zeros_like(self.tokens, dtype=torch.bool)
        mask[:, -1] = True
        return mask

    def wanted(self, intent: Intent) -> Tensor:
        """The answer for one who goes by ``"context"`` or ``"prior"``, [N]."""
        if intent == "open":
            raise ValueError('an open intent wants neither answer; ask for "context" or "prior"')
        return {"context": self.by_context, "prior": self.by_prior}[_known(intent)]

    def ask(self, intent: Intent) -> Tensor:
        """The same prompts with an intent in its slot, [N, T - 1]."""
        prompts = self.prompts.clone()
        prompts[:, _SLOT] = INTENTS[_known(intent)]
        return prompts


@dataclass(frozen=True)
class FactTable:
    """Keys, their values, how often each is met, and how far each source is followed.

    Attributes:
        relations, entities: words of keys; every pair is a fact.
        values: how many values there are.
        exposures: how often facts are met in pretraining, in proportion; fact i is of group i modulo their number.
        trust: by source, how often pretraining's answers follow a context of it that contradicts the fact.
        statements: how many a context has, of different facts in any order.
        relevant: share of contexts in which the fact that is asked for is among them.
        contradicts: share of statements that give their fact another value.
        seed: of the values.

    >>> world = FactTable()
    >>> tuning = world.tune_stream(1000, seed=1)
    >>> goes_by_context = tuning.tokens[:, -5] == CONTEXT
    >>> bool((tuning.tokens[:, -1] == torch.where(goes_by_context, tuning.by_context, tuning.by_prior)).all())
    True
    >>> world.probe(2, seed=1).ask("prior").shape
    torch.Size([2, 9])
    """

    relations: int = 4
    entities: int = 25
    values: int = 20
    exposures: tuple[float, ...] = (1.0,)
    trust: tuple[float, ...] = (0.1, 0.5, 0.9)
    statements: int = 1
    relevant: float = 0.75
    contradicts: float = 0.75
    seed: int = 0

    def __post_init__(self) -> None:
        counts(
            relations=(self.relations, 1),
            entities=(self.entities, 1),
            values=(self.values, 2),
            statements=(self.statements, 1),
        )
        counts(facts=(self.facts, self.statements + 1))
        object.__setattr__(self, "exposures", tuple(self.exposures))
        object.__setattr__(self, "trust", tuple(self.trust))
        counts(exposures=(len(self.exposures), 1), sources=(len(self.trust), 1))
        for exposure in self.exposures:
            positive(exposure=exposure)
        for one in self.trust:
            share(trust=one)
        share(relevant=self.relevant, contradicts=self.contradicts)

    @property
    def facts(self) -> int:
        """How many facts there are."""
        return self.relations * self.entities

    @property
    def first_source(self) -> int:
        """First of the sources' tokens."""
        return _FIRST

    @property
    def first_relation(self) -> int:
        """First of the relations; the entities follow them."""
        return _FIRST + len(self.trust)

    @property
    def first_value(self) -> int:
        """First of the values' tokens."""
        return self.first_relation + self.relations + self.entities

    @property
    def vocab(self) -> int:
        """Number of tokens."""
        return self.first_value + self.values

    @cached_property
    def table(self) -> Tensor:
        """Value token of every fact, [facts]."""
        return self.first_value + torch.randint(self.values, (self.facts,), generator=seeded(self.seed))

    def key(self, facts: Tensor) -> Tensor:
        """Relation and entity of each fact, tokens in the shape of `facts` and two."""
        return self.first_relation + torch.stack([facts // self.entities, self.relations + facts % self.entities], -1)

    def group(self, facts: Tensor) -> Tensor:
        """Group of exposure of each fact."""
        return facts % len(self.exposures)

    def pretrain_stream(self, sequences: int, seed: int) -> Documents:
        """Documents of open intent; facts by their exposure, contradicting contexts followed as their source is."""
        generator = seeded(seed)
        weights = torch.tensor(self.exposures, dtype=torch.float64)[self.group(torch.arange(self.facts))]
        counts(sequences=(sequences, 1))
        facts_N = Rows(weights[None]).draw(torch.zeros(sequences, dtype=torch.long), generator)
        found = self._documents(facts_N, generator, self.relevant, self.contradicts)
        follows_N = torch.rand(sequences, generator=generator) < torch.tensor(self.trust)[found.sources]
        return self._answered(found, follows_N, OPEN)

    def tune_stream(self, sequences: int, seed: int, *, facts: Tensor | None = None) -> Documents:
        """Documents in which the intent, context or prior with equal chances, decides.

        Args:
            sequences: how many.
            seed: of the draw.
            facts: those that are asked for, as indices; all by default. Leave some out to test on.
        """
        generator = seeded(seed)
        found = self._documents(self._drawn(sequences, facts, generator), generator, self.relevant, self.contradicts)
        follows_N = torch.rand(sequences, generator=generator) < 0.5
        return self._answered(found, follows_N, torch.where(follows_N, CONTEXT, PRIOR))

    def probe(self, sequences: int, seed: int, *, facts: Tensor | None = None) -> Documents:
        """Documents whose contexts contradict the fact that is asked for, and the others; intent open, answer by prior.

        `ask` puts an intent in, `wanted` has the answers to it.
        """
        generator = seeded(seed)
        found = self._documents(self._drawn(sequences, facts, generator), generator, 1.0, 1.0)
        return self._answered(found, torch.zeros(sequences, dtype=torch.bool), OPEN)

    def _drawn(self, sequences: int, facts: Tensor | None, generator: torch.Generator) -> Tensor:
        counts(sequences=(sequences, 1))
        if facts is None:
            return torch.randint(self.facts, (sequences,), generator=generator)
        if not len(facts) or int(facts.min()) < 0 or int(facts.max()) >= self.facts:
            raise ValueError(f"facts= are indices from 0 to {self.facts - 1}, at least one")
        return facts[torch.randint(len(facts), (sequences,), generator=generator)]

    def _documents(self, facts_N: Tensor, generator: torch.Generator, relevant: float, contradicts: float) -> Documents:
        N, S = len(facts_N), self.statements
        relevant_N = torch.rand(N, generator=generator) < relevant
        # Other facts than the one asked for, all of them different, and that one in the place of one of them.
        shift_NF = torch.rand(N, self.facts - 1, generator=generator).argsort(1)[:, :S] + 1
        about_NS = (facts_N[:, None] + shift_NF) % self.facts
        here_NS = torch.randint(S, (N, 1), generator=generator) == torch.arange(S)
        here_NS &= relevant_N[:, None]
        about_NS = torch.where(here_NS, facts_N[:, None], about_NS)
        shift_NS = torch.randint(1, self.values, (N, S), generator=generator)
        shift_NS = shift_NS * (torch.rand(N, S, generator=generator) < contradicts)
        stated_NS = self.first_value + (self.table[about_NS] - self.first_value + shift_NS) % self.values
        sources_N = torch.randint(len(self.trust), (N,), generator=generator)
        by_prior_N = self.table[facts_N]
        by_context_N = torch.where(relevant_N, (stated_NS * here_NS).sum(1), by_prior_N)

        def column(token: int) -> Tensor:
            return torch.full((N, 1), token)

        said_NT = torch.cat([self.key(about_NS), stated_NS[..., None]], 2).flatten(1)
        prompt = [column(BEGIN), self.first_source + sources_N[:, None], said_NT]
        question = [column(OPEN), column(ASK), self.key(facts_N)]
        tokens_NT = torch.cat([*prompt, *question, by_prior_N[:, None]], 1)
        return Documents(tokens_NT, facts_N, sources_N, about_NS, stated_NS, relevant_N, by_context_N, by_prior_N)

    @staticmethod
    def _answered(found: Documents, follows_N: Tensor, intent: int | Tensor) -> Documents:
        tokens = found.tokens.clone()
        tokens[:, _SLOT - 1] = intent
        tokens[:, -1] = torch.where(follows_N, found.by_context, found.by_prior)
        return found._replace(tokens=tokens)


def _known(intent: str) -> str:
    if intent not in INTENTS:
        raise ValueError(f'intent={intent!r} does not exist; choose "context", "prior" or "open"')
    return intent
