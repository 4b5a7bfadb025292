"""Extreme tokens by domain of query against loops over single weights, planted emergence, and a head made by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

import actome as ac
from actome.core.errors import MeasureError
from actome.dynamics.dormant_heads import ExtremeTokens, ablation_by_query
from actome.dynamics.sink_dates import sink_emergence
from actome.tasks import Subject, SubjectConfig, train
from actome.tasks.backcopy import Backcopy

DOMAINS = ("ordinary", "trigger")


@pytest.fixture(scope="module")
def subject():
    return Subject.fresh(SubjectConfig(vocab=16, d_model=16, layers=2, heads=2, context=12, init=1.5))


@pytest.fixture(scope="module")
def text():
    world = Backcopy(vocab=16, triggers=2)
    tokens = world.sample(6, 12, seed=0)
    return tokens, world.is_trigger(tokens).long()


def test_every_measure_is_the_loop_over_single_queries(subject, text):
    tokens, labels = text
    model = ac.wrap(subject)
    frame = ExtremeTokens(DOMAINS, batch_size=4).measure(model, tokens, labels)
    assert len(frame) == 4
    sites = ["blocks.1.attn.pattern", "blocks.1.attn.scores", "blocks.1.attn.v", "blocks.1.resid.post"]
    pattern, scores, v, stream = (model.record(tokens, sites)[site].double() for site in sites)
    row = frame[(frame.layer == 1) & (frame["head"] == 1)].iloc[0]
    for c, name in enumerate(DOMAINS):
        sink, uniform, gap = [], [], []
        for n in range(6):
            for q in range(1, 12):
                if labels[n, q] == c:
                    sink.append(float(pattern[n, 1, q, 0]))
                    uniform.append(1 / (q + 1))
                    gap.append(float(scores[n, 1, q, 0] - scores[n, 1, q, 1 : q + 1].mean()))
        assert row[f"sink {name}"] == pytest.approx(np.mean(sink), rel=1e-4)
        assert row[f"uniform {name}"] == pytest.approx(np.mean(uniform))
        assert row[f"logit_gap {name}"] == pytest.approx(np.mean(gap), rel=1e-4, abs=1e-5)
    norms = v[:, 1].norm(dim=-1)
    assert row["value_drain"] == pytest.approx(float(norms[:, 0].mean() / norms[:, 1:].mean()), rel=1e-4)
    lengths = stream.norm(dim=-1)
    assert row["residual_peak"] == pytest.approx(float(lengths[:, 0].mean() / lengths[:, 1:].mean()), rel=1e-4)


def test_labels_of_minus_one_are_left_out_and_rows_can_be_made_to_sum_to_one(subject, text):
    tokens, labels = text
    model = ac.wrap(subject)
    some = labels.clone()
    some[3:] = -1
    part, whole = (
        ExtremeTokens(DOMAINS).measure(model, *given) for given in ((tokens, some), (tokens[:3], labels[:3]))
    )
    names = [name for name in part if "sink" in name or "gap" in name]
    assert np.allclose(part[names], whole[names], atol=1e-5)
    relu = Subject.fresh(SubjectConfig(vocab=16, d_model=16, layers=1, heads=2, context=12, attention="relu", init=1.5))
    frame = ExtremeTokens(DOMAINS, normalise=True).measure(ac.wrap(relu), tokens, labels)
    pattern = ac.wrap(relu).record(tokens, "blocks.0.attn.pattern")["blocks.0.attn.pattern"]
    rows = pattern[:, 0] / pattern[:, 0].sum(-1, keepdim=True).clamp_min(1e-9)
    here = (labels == 0) & (torch.arange(12) > 0)
    assert frame["sink ordinary"][0] == pytest.approx(float(rows[..., 0][here].mean()), rel=1e-4)


def test_ablation_is_the_loss_without_the_head_and_zero_for_a_head_that_writes_nothing(subject, text):
    tokens, labels = text
    config = SubjectConfig(vocab=16, d_model=16, layers=1, heads=2, context=12, init=1.5)
    lame = Subject.fresh(config)
    lame.blocks[0].attn.out.weight.data[:, :8] = 0  # head 0 writes nothing
    frame = ablation_by_query(ac.wrap(lame), tokens, labels, DOMAINS)
    assert frame[["ordinary rise", "trigger rise"]].iloc[0].abs().max() < 1e-9
    without = Subject.fresh(config)
    without.blocks[0].attn.out.weight.data.zero_()
    for c, name in enumerate(DOMAINS):
        losses = []
        for module in (lame, without):
            with torch.no_grad():
                log_p = module(tokens).logits.double().log_softmax(-1)
            here = (labels == c) & (torch.arange(12) > 0)
            here[:, -1] = False
            loss = -log_p[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
            losses.append(float(loss[here[:, :-1]].mean()))
        assert frame[f"{name} loss"][1] == pytest.approx(losses[0], rel=1e-6)
        assert frame[f"{name} rise"][1] == pytest.approx(losses[1] - losses[0], rel=1e-5)


def _planted(runs: int = 4) -> pd.DataFrame:
    rng, steps = np.random.default_rng(0), np.unique(np.geomspace(1, 1000, 30).round())

    def passed(middle: float) -> np.ndarray:
        return 1 / (1 + np.exp(-np.log(steps / middle) / 0.2))

    parts = [
        pd.DataFrame(
            {
                "run": run, "step": steps, "layer": 0, "head": 0, "sink idle": 0.6 * passed(50),
                "logit_gap idle": 0.3 + 0.5 * np.log(steps) + 0.02 * rng.standard_normal(len(steps)),
                "value_drain": 1 - 0.7 * passed(200), "residual_peak": 1 + 0.5 * (steps > 500),
            }
        )
        for run in range(runs)
    ]  # fmt: skip
    return pd.concat(parts, ignore_index=True)


def test_planted_emergence_is_dated_ordered_and_its_logarithm_found():
    found = sink_emergence(_planted(), "idle")
    assert found.order == ("sink", "value_drain", "residual_peak")
    assert found.dates["sink"].at == pytest.approx(50, rel=0.1)
    assert found.dates["value_drain"].at == pytest.approx(200, rel=0.1)
    assert found.leads["value_drain"].median == pytest.approx(150, rel=0.15)
    assert found.leads["residual_peak"].first_wins == 1
    low, high = found.growth.interval("b")
    assert low < 0.5 < high
    assert found.growth.r2 > 0.99
    assert found.control.p == 0.01
    assert found.control.median < 0.2
    assert found.reinforcement < -0.9
    assert found.change == pytest.approx({"sink": 0.6, "value_drain": -0.7, "residual_peak": 0.5}, abs=0.01)


def test_a_trace_has_the_measures_of_each_checkpoint(text):
    tokens, labels = text
    training = train(
        Subject.fresh(SubjectConfig(vocab=16, d_model=16, layers=1, heads=1, context=12)), tokens, 3, batch_size=6,
        checkpoints=[0, 3],
    )  # fmt: skip
    extreme = ExtremeTokens(DOMAINS)
    frame = extreme.trace([training, {0: training.at(0), 3: ac.wrap(training.at(3))}], tokens, labels)
    assert frame.columns[:4].tolist() == ["run", "step", "layer", "head"]
    assert frame[["run", "step"]].to_numpy().tolist() == [[0, 0], [0, 3], [1, 0], [1, 3]]
    last = extreme.measure(ac.wrap(training.at(3)), tokens, labels).iloc[0]
    assert np.allclose(frame.iloc[3][last.index].astype(float), last.astype(float))


def test_bfloat16_gives_nearly_the_same(subject, text):
    tokens, labels = text
    half = Subject.fresh(subject.config).to(torch.bfloat16)
    one, other = (ExtremeTokens(DOMAINS).measure(ac.wrap(module), tokens, labels) for module in (half, subject))
    # Three significant digits of bfloat16, through two layers.
    assert np.allclose(one, other, rtol=0.05, atol=0.05)
    without = ablation_by_query(ac.wrap(half), tokens, labels, DOMAINS)
    assert np.allclose(without, ablation_by_query(ac.wrap(subject), tokens, labels, DOMAINS), atol=0.05)


def test_bad_input_is_refused(subject, text):
    tokens, labels = text
    model = ac.wrap(subject)
    for domains, given, message in (
        ("code", labels, "give their names"),
        (DOMAINS, labels.float(), "labels are integers in the shape of the tokens"),
        (DOMAINS, labels[:2], "labels are integers in the shape of the tokens"),
        (DOMAINS, torch.zeros_like(labels), "no query is labelled 1 \\('trigger'\\)"),
    ):
        with pytest.raises(MeasureError, match=message):
            ExtremeTokens(domains).measure(model, tokens, given)
    with pytest.raises(MeasureError, match="has no heads"):
        ablation_by_query(model, tokens, labels, DOMAINS, "blocks.*.resid.post")
    with pytest.raises(MeasureError, match="is no domain of this frame; there are idle"):
        sink_emergence(_planted(1), "busy")
    with pytest.raises(MeasureError, match="layer 3 has no head 0"):
        sink_emergence(_planted(1), "idle", layer=3)
