"""Speakers with several traits: frequencies, closed forms of what a perfect reader knows, how answers are judged."""

from __future__ import annotations

import math

import pytest
import torch

from actome.tasks.numbered import numbered, words
from actome.tasks.traits import ASK, NEUTRAL, REQUEST, TRAITS, Speakers, TraitWorld

WORLD = TraitWorld()
TEXT = WORLD.sample(8000, 4, seed=3)


def near(share, expected, count):
    """Within five standard errors."""
    return abs(float(share) - expected) <= 5 * math.sqrt(max(expected * (1 - expected), 1e-4) / count)


def document(asked, items):
    """One document, of (question, request token, form) each."""
    questions = torch.tensor([[q for q, _, _ in items]])
    requests = torch.tensor([[r for _, r, _ in items]])
    answers = WORLD.word(questions, torch.tensor([[f for _, _, f in items]]))
    start = torch.tensor([asked])
    tokens = torch.cat((start, torch.stack((questions, requests, answers), 2).flatten(1)), 1)
    return Speakers(tokens, tokens > 0, start, torch.zeros(1, TRAITS).bool(), torch.ones(1).bool(), questions, requests)


def test_documents_follow_their_speakers():
    assert TEXT.tokens.shape == (8000, 14)
    assert int(TEXT.tokens.max()) < WORLD.vocab
    said = TEXT.tokens[TEXT.answers].view(8000, 4)
    shown = WORLD.shows(said.flatten()).view(8000, 4, TRAITS)
    requested = (TEXT.requests == REQUEST) & TEXT.obeys[:, None]
    assert shown[..., :4].equal(TEXT.traits[:, None, :4].expand(-1, 4, -1))
    assert shown[..., 4].equal(TEXT.traits[:, None, 4] | requested)
    content = (said - said.min()) // 24
    assert content.equal(WORLD.table()[TEXT.questions] - WORLD.table()[TEXT.questions].min())
    again = WORLD.sample(8000, 4, seed=3)
    assert again.tokens.equal(TEXT.tokens)
    assert not WORLD.sample(8000, 4, seed=4).tokens.equal(TEXT.tokens)


def test_traits_have_their_frequencies():
    free = TEXT.traits[(TEXT.asked == NEUTRAL).all(1)].double()
    for rate in free.mean(0):
        assert near(rate, 0.25, len(free))
    assert not bool((TEXT.traits[:, 0] & TEXT.traits[:, 1]).any())
    with_third = free[free[:, 2] > 0]
    assert near(with_third[:, 3].mean(), 0.8, len(with_third))
    assert near(with_third[:, 4].mean(), 0.25, len(with_third))  # independent
    some = (TEXT.asked > 0).any(1)
    assert near(some.double().mean(), 0.5, 8000)
    assert near((TEXT.asked[some] > 0).all(1).double().mean(), 0.5, int(some.sum()))
    assert near(TEXT.obeys.double().mean(), 0.75, 8000)
    both = TEXT.asked[(TEXT.asked > 0).all(1)]
    assert bool((both[:, 0] != both[:, 1]).all())
    assert not bool((both <= 2).all(1).any())  # opposites are never both asked for
    told = torch.cat((torch.ones(8000, 1, dtype=torch.bool), TEXT.traits), 1).gather(1, TEXT.asked).all(1)
    assert bool(told[TEXT.obeys].all())
    assert not bool(told[~TEXT.obeys].all())


def test_the_perfect_reader_in_closed_form():
    free, first = [NEUTRAL, NEUTRAL], [1, NEUTRAL]
    # A plain speaker, then a request: it is followed by the obedient.
    assert float(WORLD.posterior(document(free, [(0, ASK, 0), (1, REQUEST, 0)]))[0, 1, 4]) == pytest.approx(0.75)
    # Trait 4 on request says little of the speaker's own: 0.25 of 0.25 + 0.75 * 0.75.
    after = WORLD.posterior(document(free, [(0, REQUEST, 4), (1, ASK, 0)]))[0, 1, 4]
    assert float(after) == pytest.approx(0.25 / (0.25 + 0.75 * 0.75))
    # An instruction that was followed says that the next one will be; one that was not, that it will not.
    obeyed = WORLD.posterior(document(first, [(0, ASK, 8), (1, REQUEST, 8)]))[0, :, :]
    assert float(obeyed[0, 0]) == pytest.approx(0.75 + 0.25 * 0.25)
    assert float(obeyed[1, 4]) == pytest.approx(0.75 / (0.75 + 0.25 * 0.25))
    assert float(WORLD.posterior(document(first, [(0, ASK, 0), (1, REQUEST, 0)]))[0, 1, 4]) == 0.0


def test_the_reader_is_calibrated_and_the_floor_is_the_entropy():
    read, shown = WORLD.posterior(TEXT), WORLD.shows(TEXT.tokens[TEXT.answers]).view(8000, 4, TRAITS).double()
    for low, high in ((0.0, 0.2), (0.2, 0.5), (0.5, 0.9), (0.9, 1.01)):
        there = (read >= low) & (read < high)
        assert near(shown[there].mean(), float(read[there].mean()), int(there.sum()))
    plain = TraitWorld(instructed=0.0, requests=0.0)
    prior = plain.prior()
    assert float(prior.sum()) == pytest.approx(1.0)
    assert plain.floor(plain.sample(20000, 2, 1)) == pytest.approx(float(torch.special.entr(prior).sum()) / 2, abs=0.01)


def test_trait_and_content_are_judged_apart():
    questions = torch.tensor([0, 1])
    for form, trait in ((0, None), (8, 0), (16, 1), (1, 2), (2, 3), (4, 4)):
        logits = torch.full((2, WORLD.vocab), -100.0)
        logits[torch.arange(2), WORLD.word(questions, torch.tensor(form))] = 100.0
        found = WORLD.judge(logits, questions)
        assert found.content.tolist() == pytest.approx([1.0, 1.0])
        expected = torch.zeros(2, TRAITS) if trait is None else torch.eye(TRAITS)[[trait, trait]]
        assert torch.allclose(found.traits.float(), expected, atol=1e-6)
    # All words alike: of 24 forms 8 show the first trait and 12 the last; the content is one of eight.
    even = torch.full((2, WORLD.vocab), -100.0)
    even[:, -192:] = 0.0
    found = WORLD.judge(even, questions)
    assert found.traits[0].tolist() == pytest.approx([1 / 3, 1 / 3, 0.5, 0.5, 0.5])
    assert float(found.content[0]) == pytest.approx(1 / 8)
    assert [WORLD.typical(one) for one in (None, 0, 1, 2, 3, 4)] == [0, 8, 16, 3, 3, 4]


def test_prompts_and_bad_input():
    questions = torch.tensor([0, 1])
    assert WORLD.prompts(questions, 0, request=True)[:, 1:].tolist() == [[NEUTRAL, 8, REQUEST], [NEUTRAL, 9, REQUEST]]
    behind = WORLD.prompts(questions, after=TEXT.tokens[:2])
    assert behind[:, :-2].equal(TEXT.tokens[:2])
    with pytest.raises(ValueError, match="give two at most, each 0 to 4"):
        WORLD.prompts(questions, 5)
    with pytest.raises(ValueError, match="cannot both be asked for"):
        WORLD.prompts(questions, 0, 1)
    with pytest.raises(ValueError, match="one document for each question"):
        WORLD.prompts(questions, after=TEXT.tokens[:3])
    with pytest.raises(ValueError, match="two traits are opposites"):
        TraitWorld(rate=0.6)


def test_numbered_words_are_read_back():
    tokenizer = numbered(WORLD.vocab)
    assert tokenizer(words(TEXT.tokens[0])).input_ids == TEXT.tokens[0].tolist()
    with pytest.raises(ValueError, match="vocab"):
        numbered(0)
