"""Facts that contexts contradict: every document is read again, word by word."""

import math

import pytest
import torch

from actome.tasks.fact_table import ASK, BEGIN, CONTEXT, OPEN, PRIOR, FactTable

WORLDS = [FactTable(seed=1), FactTable(relations=1, entities=30, values=5, statements=3, trust=(0.0, 1.0), seed=2)]


def near(counted, expected, draws):
    """Within five standard errors."""
    return abs(float(counted) - expected) <= 5 * math.sqrt(max(expected * (1 - expected), 1e-9) / draws)


def read(world, row):
    """Source, statements by key, intent, key that is asked for, and the answer of a row of tokens."""
    row = row.tolist()
    assert row[0] == BEGIN
    S = world.statements
    said = [row[2 + 3 * i : 5 + 3 * i] for i in range(S)]
    intent, ask, *key, answer = row[2 + 3 * S :]
    assert ask == ASK
    return row[1] - world.first_source, {tuple(one[:2]): one[2] for one in said}, intent, tuple(key), answer


@pytest.mark.parametrize("world", WORLDS)
def test_documents_say_what_is_known_of_them(world):
    facts = {tuple(world.key(torch.tensor(i)).tolist()): int(world.table[i]) for i in range(world.facts)}
    assert len(facts) == world.facts
    for draw in (world.pretrain_stream(200, 3), world.tune_stream(200, 3), world.probe(200, 3)):
        for i, row in enumerate(draw.tokens):
            source, said, intent, key, answer = read(world, row)
            assert len(said) == world.statements  # of different facts
            assert set(said) <= set(facts)
            assert source == draw.sources[i]
            assert facts[key] == draw.by_prior[i]
            assert (key in said) == bool(draw.relevant[i])
            assert said.get(key, facts[key]) == draw.by_context[i]
            assert answer in (draw.by_prior[i], draw.by_context[i])
            assert list(said.values()) == draw.stated[i].tolist()
            if intent == PRIOR:
                assert answer == draw.by_prior[i]
            if intent == CONTEXT:
                assert answer == draw.by_context[i]


def test_the_largest_token_is_a_value():
    for world in WORLDS:
        tokens = world.pretrain_stream(3000, 1).tokens
        assert int(tokens.max()) == world.vocab - 1
        assert int(tokens[:, -1].min()) >= world.first_value


def test_shares_are_those_of_the_world():
    world = FactTable(statements=2, relevant=0.6, contradicts=0.7, seed=3)
    text = world.pretrain_stream(20_000, 4)
    assert near(text.relevant.double().mean(), 0.6, 20_000)
    wrong = text.stated != world.table[text.about]
    assert near(wrong.double().mean(), 0.7, 40_000)
    assert bool((text.tokens[:, -5] == OPEN).all())
    fights = text.by_context != text.by_prior
    for source, trust in enumerate(world.trust):
        rows = fights & (text.sources == source)
        assert near((text.tokens[rows, -1] == text.by_context[rows]).double().mean(), trust, int(rows.sum()))
    tuning = world.tune_stream(20_000, 4)
    assert near((tuning.tokens[:, -5] == CONTEXT).double().mean(), 0.5, 20_000)
    # In tuning the source says nothing about the intent.
    for source in range(3):
        rows = tuning.sources == source
        assert near((tuning.tokens[rows, -5] == CONTEXT).double().mean(), 0.5, int(rows.sum()))


def test_exposure_is_as_asked():
    world = FactTable(exposures=(1.0, 4.0, 0.25), seed=0)
    text = world.pretrain_stream(30_000, 1)
    share = torch.bincount(world.group(text.facts), minlength=3) / 30_000
    groups = torch.bincount(world.group(torch.arange(world.facts)), minlength=3)
    expected = groups * torch.tensor([1.0, 4.0, 0.25])
    for got, wanted in zip(share, expected / expected.sum(), strict=True):
        assert near(got, float(wanted), 30_000)


def test_probes_contradict_and_hold_both_answers():
    world = FactTable(seed=5)
    some = torch.arange(0, 100, 7)
    asked = world.probe(500, 1, facts=some)
    assert set(asked.facts.tolist()) == set(some.tolist())
    assert bool(asked.relevant.all())
    assert bool((asked.wanted("context") != asked.wanted("prior")).all())
    told = asked.ask("prior")
    assert bool((told[:, -4] == PRIOR).all())
    assert torch.equal(told[:, :-4], asked.prompts[:, :-4])
    assert bool((asked.prompts[:, -4] == OPEN).all())
    assert asked.answers.sum(1).eq(1).all()
    assert bool(asked.answers[:, -1].all())


def test_the_same_seed_gives_the_same_documents():
    world = FactTable()
    for draw in (world.pretrain_stream, world.tune_stream, world.probe):
        assert torch.equal(draw(50, 1).tokens, draw(50, 1).tokens)
        assert not torch.equal(draw(50, 1).tokens, draw(50, 2).tokens)
    assert not torch.equal(FactTable(seed=1).table, FactTable(seed=2).table)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FactTable(relations=0), "relations=0"),
        (lambda: FactTable(values=1), "values=1"),
        (lambda: FactTable(relations=1, entities=2, statements=2), "facts=2"),
        (lambda: FactTable(trust=(0.1, 1.2)), "trust=1.2"),
        (lambda: FactTable(exposures=(1.0, 0.0)), "exposure=0.0"),
        (lambda: FactTable(exposures=()), "exposures=0"),
        (lambda: FactTable().probe(5, 1, facts=torch.tensor([100])), "0 to 99"),
        (lambda: FactTable().probe(5, 1).ask("neither"), "choose"),
        (lambda: FactTable().probe(5, 1).wanted("open"), "wants neither answer"),
        (lambda: FactTable().pretrain_stream(0, 1), "sequences=0"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
