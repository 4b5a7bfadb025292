"""Alarms on small trainings with planted trouble: each fires at the right site within its stated delay."""

from __future__ import annotations

import pytest
import torch
from watched import CONFIG, watched

import actome as ac
from actome.dynamics import RunStore
from actome.dynamics.alarms import Alarms, AttentionLogitGrowth, DyingUnits, MemorisationOnset, NonFinite, Stop
from actome.tasks import Subject, SubjectConfig, next_token_loss
from actome.tasks.topic_bigram import TopicBigram


def test_a_learning_rate_that_is_too_high_is_told_by_the_loss_and_by_where_it_breaks():
    run = watched(0, 60, lr=3.0)
    assert run.of("loss_divergence")[0].level == "critical"
    assert run.of("loss_divergence")[0].step <= 30
    growth = run.of("attention_logit_growth")[0]
    assert growth.level == "critical"
    assert growth.site in ("blocks.0.attn.scores", "blocks.1.attn.scores")
    assert growth.step <= 30


def test_attention_logits_that_grow_are_forecast_before_they_pass():
    run = watched(0, 110, lr=0.2, every=5)
    found = run.of("attention_logit_growth")
    assert found[0].level == "warning"
    assert found[0].site == "blocks.0.attn.scores"
    assert AttentionLogitGrowth.source in found[0].source
    assert found[0].evidence["crossing"] > found[0].step


@pytest.mark.parametrize("layer", [0, 1])
def test_a_nan_in_the_weights_is_found_at_its_site_and_step(layer):
    def plant(step, module):
        if step == 47:
            with torch.no_grad():
                module.blocks[layer].mlp.up.weight[3] = float("nan")

    run = watched(1, 50, plant=plant)
    found = run.of(NonFinite.name)
    assert [(one.step, one.site, one.level) for one in found] == [(47, f"blocks.{layer}.mlp.act", "critical")]


def test_a_unit_that_dies_is_named_at_its_site():
    """Dead from step 72 on: samples at 80, 90 and 100 see it dead, and the third tells."""

    def plant(step, module):
        if step >= 72:
            with torch.no_grad():
                module.blocks[0].mlp.up.weight[5] = 0.0

    run = watched(0, 101, plant=plant)
    at = {site: [one for one in run.of(DyingUnits.name) if one.site == site] for site in ("blocks.0.mlp.act",)}
    assert [(one.step, one.evidence["units"]) for one in at["blocks.0.mlp.act"]] == [(80, [5])]
    step = next(step for step, found in run.readings if step == 100)
    assert step - 72 <= 3 * 10


@pytest.mark.parametrize("repeated", [True, False])
def test_repeated_data_is_memorised_and_fresh_data_is_not(repeated):
    world = TopicBigram(vocab=32, seed=0)
    rows, heldout = world.sample(32, 32, seed=5).tokens, world.sample(32, 32, seed=6).tokens
    generator = torch.Generator().manual_seed(0)

    def data(step):
        return rows[torch.randint(32, (16,), generator=generator)]

    run = watched(0, 80, data=data if repeated else None, seen=rows, heldout=heldout, lr=1e-2)
    found = run.of(MemorisationOnset.name)
    assert bool(found) == repeated
    if repeated:  # the gap is beyond a tenth of the loss at step 20 or 30, and held three samples
        assert 20 <= found[0].step <= 30
        assert found[0].evidence["gap"] > 0.5


def test_a_clean_training_is_left_alone():
    assert watched(3, 100).loud == []


def test_a_watch_tells_the_same_and_stops_the_training(tmp_path):
    """Through `ac.watch`: told while it runs, written to the run, and found again in it afterwards."""
    world = TopicBigram(vocab=32, seed=0)
    module = Subject.fresh(SubjectConfig(**CONFIG), seed=0)
    optimizer = torch.optim.AdamW(module.parameters(), lr=3.0)
    probe = world.sample(8, 32, seed=1).tokens
    with ac.watch(module, text=probe, run=tmp_path / "a", every=5, actions={"loss_divergence": Stop()}) as watch:
        for step in range(60):
            optimizer.zero_grad()
            loss = next_token_loss(module, world.sample(16, 32, seed=2 + step).tokens)
            loss.backward()
            optimizer.step()
            watch.step(loss)
            if watch.should_stop:
                break
    assert watch.should_stop
    assert watch.at <= 30
    run = RunStore.open(tmp_path / "a")
    assert {"loss_divergence", "attention_logit_growth"} <= set(run.alarms["name"])
    assert run.alarms["site"].dropna().str.endswith("attn.scores").any()
    assert [(one.step, one.name) for one in Alarms().replay(run)] == [(one.step, one.name) for one in watch.alarms]
