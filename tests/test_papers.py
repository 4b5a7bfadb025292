"""The papers registry, its reproductions at smoke scale, and the world that one of them is made of."""

import json
import math

import pytest
import torch

from actome.papers import PaperError, entries, find, run
from actome.papers.lac_voids import used_layers
from actome.tasks.backcopy import Backcopy


def test_entries_are_complete_and_found_by_slug_and_number():
    for entry in entries():
        assert find(entry.slug) is entry
        assert find(str(entry.number)) is entry
        assert all((entry.title, entry.kind, entry.home, entry.claim, entry.takes))
        json.dumps(entry.to_dict(), allow_nan=False)


def test_unknown_papers_and_scales_are_refused_with_the_nearest():
    with pytest.raises(PaperError, match="nearest: lac-voids"):
        find("lac-void")
    with pytest.raises(PaperError, match="smoke or small"):
        run("lac-voids", scale="large")


@pytest.mark.parametrize("slug", [entry.slug for entry in entries()])
def test_a_reproduction_measures_against_a_control_and_is_repeatable(slug):
    first, again = run(slug, seed=3), run(slug, seed=3)
    # As JSON, in which what is not a number is None and equal to itself.
    assert first.to_dict()["figures"] == again.to_dict()["figures"]
    assert first.to_dict()["control"] == again.to_dict()["control"]
    assert first.held == all(first.checks.values())
    assert (first.slug, first.seed, first.scale, first.claim) == (slug, 3, "smoke", find(slug).claim)
    data = first.to_dict()
    json.dumps(data, allow_nan=False)
    assert data["held"] is first.held
    assert math.isfinite(first.seconds)


def test_homes_exist():
    import importlib

    for entry in entries():
        module, _, name = entry.home.rpartition(".")
        assert hasattr(importlib.import_module(module), name)


def test_voids_by_hand():
    # Growths 2, -1, 1, 3: thresholds 0, 0, 3a, 3a.
    norms = torch.tensor([1.0, 3.0, 2.0, 3.0, 6.0])[:, None, None]
    assert used_layers(norms, 0.0).tolist() == [1, 0, 1, 1]
    assert used_layers(norms, 0.5).tolist() == [1, 0, 0, 1]
    assert used_layers(norms, 1.0).tolist() == [1, 0, 0, 1]


# -- bigram-backcopy --------------------------------------------------------------------------------------------------


def test_backcopy_follows_its_rules():
    world = Backcopy(seed=5)
    tokens = world.sample(2000, 32, seed=1)
    trigger = world.is_trigger(tokens)
    assert bool((tokens[:, 0] == 0).all())
    assert not bool((tokens[:, 1:] == 0).any())
    assert torch.equal(tokens[:, 2:][trigger[:, 1:-1]], tokens[:, :-2][trigger[:, 1:-1]])
    assert torch.equal(tokens, world.sample(2000, 32, seed=1))
    assert not torch.equal(tokens, world.sample(2000, 32, seed=2))
    assert not torch.equal(world.table(), Backcopy(seed=6).table())


def test_backcopy_bigrams_have_the_frequencies_of_its_table():
    world = Backcopy(vocab=8, triggers=2, seed=1)
    tokens = world.sample(20_000, 16, seed=0)
    counts = torch.zeros(8, 8, dtype=torch.float64)
    counts.index_put_(
        (tokens[:, :-1].flatten(), tokens[:, 1:].flatten()),
        torch.ones(tokens[:, 1:].numel(), dtype=torch.float64),
        True,
    )
    ordinary = [0, *range(3, 8)]
    # Some 30000 draws a row: the standard error of a frequency is at most 0.003.
    frequencies = counts[ordinary] / counts[ordinary].sum(1, keepdim=True)
    assert torch.allclose(frequencies, world.table()[ordinary], atol=0.015)


def test_backcopy_floor_is_the_loss_of_the_one_who_knows():
    world = Backcopy(seed=2)
    tokens = world.sample(4000, 32, seed=3)
    table, nats = world.table(), []
    for t in range(1, 32):
        before = tokens[:, t - 1]
        known = world.is_trigger(before)
        chance = table[before, tokens[:, t]]
        nats.append(torch.where(known, 0.0, -chance.log()))
    # Realised surprise against its expectation, over 124000 tokens.
    assert float(torch.stack(nats).mean()) == pytest.approx(world.floor(tokens), abs=0.01)


def test_backcopy_refuses_a_world_without_ordinary_tokens():
    with pytest.raises(ValueError, match="no two ordinary tokens"):
        Backcopy(vocab=4, triggers=3)
