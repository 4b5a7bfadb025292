"""Balls and urns, strategies over training, the rectified scaling law and the selection of models by it."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from actome.core.errors import MeasureError
from actome.dynamics import (
    RectifiedLaw,
    Strategy,
    StrategyPosterior,
    accept_then_stop,
    description_bits,
    rank_models,
    relative_distance,
    relative_distances,
    selection_scores,
)
from actome.tasks.balls_and_urns import BallsAndUrns

# Balls and urns


def test_predictors_are_posterior_means_by_hand():
    world = BallsAndUrns(V=3, context=6, n_tasks=4, seed=2)
    draws, urns = world.sample(5, seed=1), world.urns()
    memory, rule = world.memorising(draws), world.generalising(draws)
    for b, t in itertools.product(range(5), range(6)):
        seen = draws.colours[b, :t]
        likelihood = urns[:, seen].prod(1)
        torch.testing.assert_close(memory[b, t], likelihood @ urns / likelihood.sum())
        counts = torch.bincount(seen, minlength=3).double()
        torch.testing.assert_close(rule[b, t], (counts + 1) / (t + 3))


def test_urns_are_nested_and_draws_have_their_frequencies():
    few, many = BallsAndUrns(n_tasks=4, seed=3), BallsAndUrns(n_tasks=64, seed=3)
    torch.testing.assert_close(few.urns(), many.urns()[:4], atol=0, rtol=0)
    draws = few.sample(4000, seed=1)
    for urn in range(4):
        mine = draws.colours[draws.urn == urn]
        share = torch.bincount(mine.flatten(), minlength=6).double() / mine.numel()
        torch.testing.assert_close(share, few.urns()[urn], atol=0.01, rtol=0)  # five standard errors of 48000 draws
    assert draws.composition.equal(few.urns()[draws.urn])
    assert few.sample(20, 1).colours.equal(few.sample(20, 1).colours)
    assert not few.sample(20, 1).colours.equal(few.sample(20, 2).colours)
    tokens = few.tokens(draws)
    assert bool((tokens[:, 0] == 6).all())
    assert tokens[:, 1:].equal(draws.colours)


def test_each_predictor_is_best_on_its_own_urns():
    world = BallsAndUrns(V=5, context=30, n_tasks=3)
    own, fresh = world.sample(2000, 1), world.sample(2000, 1, fresh=True)
    # The mean surprise of the one who knows is its entropy, within five standard errors of 60 000 draws.
    assert world.loss(world.memorising(own), own) == pytest.approx(world.floor(own), abs=0.015)
    assert world.loss(world.memorising(own), own) < world.loss(world.generalising(own), own)
    assert world.loss(world.generalising(fresh), fresh) < world.loss(world.memorising(fresh), fresh)
    assert bool((fresh.urn == -1).all())


@pytest.mark.parametrize("bad", [{"V": 1}, {"context": 0}, {"n_tasks": 0}, {"concentration": 0.0}])
def test_worlds_that_cannot_be(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        BallsAndUrns(**bad)


# Strategies


def planted(alpha, beta, gamma, noise=0.0, distance="kl", seed=0):
    """Outputs of models that follow the theory, their strategies, steps and diversities."""
    steps, diversities = np.array([30.0, 80, 200, 600, 2000, 6000]), np.array([4, 16, 64, 256])
    rng = np.random.default_rng(seed)
    classes = 5 if distance == "kl" else 1
    outputs = rng.dirichlet(np.ones(classes), (2, 4, 60)) if distance == "kl" else rng.standard_normal((2, 4, 60, 1))
    memory = Strategy("memorising", outputs[0], [1.40, 1.46, 1.50, 1.52], [2600, 3600, 7000, 19000])
    rule = Strategy("generalising", outputs[1], [1.55, 1.56, 1.555, 1.55], [2200] * 4)
    evidence = gamma * steps[:, None] ** (1 - alpha) * (rule.loss - memory.loss)
    odds = evidence - math.log(2) * (memory.bits**beta - rule.bits**beta)
    w = 1 / (1 + np.exp(-odds))[..., None, None]
    out = w * memory.outputs + (1 - w) * rule.outputs
    if noise:
        out = out * np.exp(noise * rng.standard_normal(out.shape)) if distance == "kl" else out + noise
        out = out / out.sum(-1, keepdims=True) if distance == "kl" else out
    return out, (memory, rule), steps, diversities


@pytest.mark.parametrize("distance", ["kl", "mse"])
@pytest.mark.parametrize("truth", [(0.6, 0.3, 2.0), (0.75, 0.2, 1.5)])
def test_planted_alpha_beta_gamma_are_found(distance, truth):
    out, predictors, steps, diversities = planted(*truth, distance=distance)
    found = StrategyPosterior(predictors, distance=distance).fit(out, steps, diversities)
    assert (found.alpha, found.beta) == pytest.approx(truth[:2], abs=0.02)
    assert found.gamma == pytest.approx(truth[2], rel=0.1)
    np.testing.assert_allclose(found.predict(), out, atol=5e-3)


def test_the_crossover_is_where_both_are_equally_probable():
    out, predictors, steps, diversities = planted(0.6, 0.3, 2.0)
    found = StrategyPosterior(predictors).fit(out, steps, diversities)
    crossings = found.crossover()
    for d, step in enumerate(crossings):
        assert found.weights([step])[0, d] == pytest.approx(0.5)
    assert (np.diff(np.log(crossings)) > np.diff(np.log(diversities))).all()  # faster than linearly
    assert found.crossover(16) == pytest.approx(crossings[1])
    assert crossings[1] < found.crossover(30) < crossings[2]
    with pytest.raises(MeasureError, match="outside the fitted 4 to 256"):
        found.crossover(1000)
    never = Strategy("memorising", predictors[0].outputs, predictors[1].loss + 0.1, predictors[0].bits)
    assert np.isinf(StrategyPosterior([never, predictors[1]]).fit(out, steps, diversities).crossover()).all()


def test_held_out_cells_are_predicted_and_not_without_complexity():
    out, predictors, steps, diversities = planted(0.6, 0.3, 2.0, noise=0.2)
    field = np.add.outer(np.arange(6), np.arange(4)) % 2 == 0
    measured = relative_distances(out, predictors)
    score = {}
    for complexity in (True, False):
        found = StrategyPosterior(predictors, complexity=complexity).fit(out, steps, diversities, field)
        score[complexity] = np.corrcoef(found.relative_distances()[~field], measured[~field])[0, 1]
    assert score[True] > 0.98
    assert score[False] < score[True] - 0.05
    assert found.beta == 0


def test_the_fit_is_the_least_of_the_mean_divergence():
    out, predictors, steps, diversities = planted(0.6, 0.3, 2.0, noise=0.3)
    found = StrategyPosterior(predictors).fit(out, steps, diversities)

    def cost(average):
        return float((out * np.log(out / average)).sum(-1).mean())

    assert found.cost_ == pytest.approx(cost(found.predict()), rel=1e-3)
    for name, step in itertools.product(("alpha", "beta", "gamma"), (0.97, 1.03)):
        other = StrategyPosterior(predictors).fit(out, steps, diversities)
        setattr(other, name, getattr(other, name) * step)
        assert cost(other.predict()) > found.cost_ - 1e-6


def test_relative_distance_by_hand():
    g, m = np.array([[0.5, 0.5]]), np.array([[0.8, 0.2]])
    h = np.array([[0.6, 0.4]])

    def apart(a, b):
        return 0.5 * float((a * np.log(a / b)).sum() + (b * np.log(b / a)).sum())

    expected = 0.5 * (1 + (apart(h, g) - apart(h, m)) / apart(g, m))
    assert relative_distance(h, g, m) == pytest.approx(expected)
    assert relative_distance(torch.tensor(h), g, m) == pytest.approx(expected)
    assert relative_distance([0.0], [0.0], [2.0], "mse") == 0
    assert relative_distance([1.0], [0.0], [2.0], "mse") == 0.5
    with pytest.raises(MeasureError, match="nothing lies between"):
        relative_distance(h, g, g)
    with pytest.raises(MeasureError, match="same shape"):
        relative_distance(h, g, m[0])


def test_bits_grow_with_what_has_to_be_stored():
    rng = np.random.default_rng(0)
    numbers = rng.random((64, 6))
    bits = description_bits("code", numbers)
    # No compressor gets below the entropy of a thousand equally probable numbers, and none should need its 16 bits.
    assert 64 * 6 * math.log2(1000) < bits - description_bits("code") < 64 * 6 * 16
    assert description_bits("code", numbers, decimals=6) > 1.5 * bits
    assert description_bits("code", np.full((64, 6), 0.5)) < description_bits("code") + 400
    assert description_bits(BallsAndUrns.memorising) > description_bits("def f(x): return x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"outputs": np.zeros((5, 4, 60, 5))}, "want \\(6, 4, 60, 5\\)"),
        ({"steps": [0.0, 80, 200, 600, 2000, 6000]}, "above 0 and to rise"),
        ({"cells": np.zeros((6, 4))}, "four or more"),
        ({"cells": np.ones((4, 6))}, "want \\(6, 4\\)"),
    ],
)
def test_bad_input_to_the_posterior(change, message):
    out, predictors, steps, diversities = planted(0.6, 0.3, 2.0)
    given = {"outputs": out, "steps": steps, "diversities": diversities, **change}
    with pytest.raises(MeasureError, match=message):
        StrategyPosterior(predictors).fit(**given)
    with pytest.raises(MeasureError, match="two predictors"):
        StrategyPosterior(predictors[:1])
    with pytest.raises(MeasureError, match="fit the posterior"):
        StrategyPosterior(predictors).predict()
    with pytest.raises(MeasureError, match="bits above 0"):
        Strategy("one", np.zeros((2, 3, 4)), [1, 1], [0, 5])


# The rectified law and selection

SIZES = 200.0 * 2 ** np.arange(10)


def test_the_rectified_law_recovers_what_was_planted():
    law = RectifiedLaw().fit(SIZES, 500 / (300 + SIZES**0.7) + 0.4)
    assert (law.pre_learned, law.beta, law.floor) == pytest.approx((300, 0.7, 0.4), rel=1e-3)
    assert law.transition() == pytest.approx(300 ** (1 / 0.7), rel=1e-3)
    np.testing.assert_allclose(law.predict([1e6, 1e7]), 500 / (300 + np.array([1e6, 1e7]) ** 0.7) + 0.4, rtol=1e-4)
    zero = RectifiedLaw().fit([0, *SIZES], [500 / 300 + 0.4, *(500 / (300 + SIZES**0.7) + 0.4)])
    assert zero.pre_learned == pytest.approx(300, rel=1e-3)
    assert law.fit_.control(9).p == 0.1


def test_without_pre_learning_it_is_the_plain_law():
    losses = 30 / SIZES**0.5 + 0.2
    plain, free = RectifiedLaw(pre_learned_size=False).fit(SIZES, losses), RectifiedLaw().fit(SIZES, losses)
    assert plain.pre_learned == 0
    assert plain.transition() == 0
    assert (plain.beta, plain.floor) == pytest.approx((0.5, 0.2), rel=1e-4)
    np.testing.assert_allclose(free.predict(1e6), plain.predict(1e6), rtol=1e-3)
    bent = RectifiedLaw(pre_learned_size=False).fit(SIZES, 500 / (300 + SIZES**0.7) + 0.4)
    assert np.abs(np.log(bent.predict(SIZES) / (500 / (300 + SIZES**0.7) + 0.4))).max() > 0.05


def test_the_rectified_law_refuses():
    with pytest.raises(MeasureError, match="no value at D = 0"):
        RectifiedLaw(pre_learned_size=False).fit([0, 1, 2, 4, 8], [5, 4, 3, 2, 1])
    with pytest.raises(MeasureError, match="needs 5 points"):
        RectifiedLaw().fit([1, 2, 4], [3, 2, 1])
    with pytest.raises(MeasureError, match="fit the law"):
        RectifiedLaw().predict(3)


def test_accept_then_stop_by_hand():
    D = np.array([1.0, 2, 4, 8, 16, 32])
    # From 4 on a line of slope -1 with residuals; 2 is accepted, 1 lies far off.
    y = np.array([0.0, -1.1, -2.15, -3.1, -4.0, -5.0]) * math.log(2) + 3
    y[0] = y[1]  # pre-power: flat
    table = accept_then_stop({"one": (D, np.exp(y))}, target=1024, k=3, delta=5).table.iloc[0]
    x, used = np.log(D), 3
    while used < 6:
        slope, start = np.polyfit(x[-used:], y[-used:], 1)
        spread = np.std(y[-used:] - slope * x[-used:] - start)
        off = abs(y[-used - 1] - slope * x[-used - 1] - start) / spread
        if off > 5:
            break
        used += 1
    assert table.used == used == 5
    assert table.stopped_at == pytest.approx(1.0)
    assert table.ratio == pytest.approx(off)
    assert table.predicted == pytest.approx(math.exp(slope * math.log(1024) + start))
    # With a larger delta all are accepted; the order of the sizes and repeated sizes make no difference.
    everything = accept_then_stop({"one": (D, np.exp(y))}, 1024, delta=1e3).table.iloc[0]
    assert everything.used == 6
    assert math.isnan(everything.stopped_at)
    turned = accept_then_stop({"one": (np.r_[D[::-1], D], np.exp(np.r_[y[::-1], y]))}, 1024).table.iloc[0]
    assert turned.predicted == pytest.approx(table.predicted)


def test_points_on_a_line_do_not_stop_at_once():
    D = SIZES
    exact = accept_then_stop({"one": (D, 7 / D**0.3)}, 1e6).table.iloc[0]
    assert exact.used == len(D)
    assert exact.predicted == pytest.approx(7 / 1e6**0.3)


def test_rules_rank_by_what_they_say():
    curves = {
        "rising star": (SIZES, 900 / (700 + SIZES**0.8) + 0.01), "early bird": (SIZES, 1.2 / SIZES**0.15 + 0.02),
        "slow": (SIZES, 3.0 / SIZES**0.1 + 0.3),
    }  # fmt: skip
    truth = {name: one[1][-1] for name, one in curves.items()}
    truth = {
        "rising star": 900 / (700 + 1e7**0.8) + 0.01, "early bird": 1.2 / 1e7**0.15 + 0.02, "slow": 3.0 / 1e7**0.1 + 0.3
    }  # fmt: skip
    assert rank_models(curves, 1e7, "largest_subset").best == "rising star"
    cut = {name: (D[:6], L[:6]) for name, (D, L) in curves.items()}
    assert rank_models(cut, 1e7, "largest_subset").best == "early bird"
    assert rank_models(cut, 1e7, "rectified").best == "rising star"
    assert rank_models(cut, 1e7).best == "rising star"
    zero = {"rising star": 3.0, "early bird": 2.0, "slow": 1.0}
    assert rank_models(cut, 1e7, "zero_shot", scores=zero).order == ("slow", "early bird", "rising star")
    assert rank_models(cut, 1e7, "size", scores=zero).order == ("rising star", "early bird", "slow")
    scores = selection_scores(rank_models(cut, 1e7, "rectified").predicted(), truth)
    assert scores["relative_accuracy"] == 1
    assert scores["pearson"] > 0.99


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: accept_then_stop({}, 10), "no models"),
        (lambda: accept_then_stop({"a": ([1, 2], [2, 1])}, 10), "'a' has 2 sizes"),
        (lambda: accept_then_stop({"a": ([1, 2, 4], [2, 1, 1])}, 10, k=2), "3 or more"),
        (lambda: accept_then_stop({"a": ([0, 2, 4], [2, 1, 1])}, 10), "logarithms"),
        (lambda: accept_then_stop({"a": ([1, 2, 4], [2, 1])}, 10), "want \\(n\\)"),
        (lambda: accept_then_stop({"a": ([1, 2, 4], [2, 1, 1])}, 0), "size of the whole data"),
        (lambda: rank_models({"a": ([1, 2, 4], [2, 1, 1])}, 10, "sise"), "nearest: size"),
        (lambda: rank_models({"a": ([1, 2, 4], [2, 1, 1])}, 10, "size"), "none for a"),
        (lambda: selection_scores({"a": 1.0}, {"b": 1.0}), "same three or more"),
    ],
)
def test_bad_input_to_selection(call, message):
    with pytest.raises(MeasureError, match=message):
        call()
