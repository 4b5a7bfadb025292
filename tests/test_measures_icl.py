"""In-context measures against brute force: graph energies, regret, Bayesian averages, steps and rewards."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from actome.core.errors import MeasureError
from actome.measures import (
    DirichletEnergy,
    PerceptualReward,
    StepSegmenter,
    bma,
    bma_gap,
    icl_regret,
    regret_slope,
    ridge_prediction,
    spectral_alignment,
)
from actome.measures.dirichlet import node_means, without_means
from actome.tasks.graph_walk import GraphWalk, graph
from actome.tasks.latent_prompts import DiscreteLatents, latent_prompts

RING = graph("ring", 8)
CIRCLE = torch.stack([(torch.arange(8) * math.pi / 4).cos(), (torch.arange(8) * math.pi / 4).sin()], -1)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def values(measure, *inputs) -> dict[str, Tensor]:
    measure.update(*inputs)
    return measure.compute()


# -- energy on a graph ----------------------------------------------------------------------------------------------


def energy_by_hand(x: Tensor, nodes: Tensor, pairs: Tensor) -> float:
    seen = sorted(set(nodes.tolist()))
    h = {n: x[nodes == n].double().mean(0) for n in seen}
    distance = {(i, j): float((h[i] - h[j]).square().sum()) for i, j in itertools.combinations(seen, 2)}
    edges = [d for (i, j), d in distance.items() if pairs[i, j]]
    return np.mean(edges) / np.mean(list(distance.values())) if edges else math.nan


@pytest.mark.parametrize("hops", [1, 2])
def test_energy_is_brute_force_over_sequences_windows_and_relabellings(hops):
    walks = GraphWalk(RING).sample(6, 30, seed=1)
    x = draw(6, 30, 5)
    measure = DirichletEnergy(RING, window=12, ends=(12, 25), hops=hops, null=5)
    got = values(measure, x, walks.nodes)
    pairs = RING if hops == 1 else ((RING.int() @ RING.int()) > 0) & ~torch.eye(8, dtype=torch.bool)
    assert torch.equal(measure.graphs_RNN[0] > 0, pairs)
    for w, end in enumerate((12, 25)):
        cut = slice(end - 12, end)
        for r, one in enumerate(measure.graphs_RNN):
            wanted = np.nanmean([energy_by_hand(a[cut], n[cut], one) for a, n in zip(x, walks.nodes, strict=True)])
            found = got["energy"][w] if r == 0 else got["null"][w, r - 1]
            assert float(found) == pytest.approx(float(wanted), rel=1e-9)


def test_planted_circles_have_low_energy_and_noise_has_one():
    nodes = torch.arange(8).repeat(50, 2)
    lies = values(DirichletEnergy(RING, 16, (16,)), CIRCLE[nodes] + 0.1 * draw(50, 16, 2), nodes)
    assert float(lies["energy"]) < 0.3
    assert float(lies["below"]) <= 0.01
    assert float(lies["z"]) < -3
    noise = values(DirichletEnergy(RING, 16, (16,)), draw(200, 16, 6), nodes.repeat(4, 1))
    # 200 sequences of 28 pairs each: the mean ratio is good to about 0.02.
    assert float(noise["energy"]) == pytest.approx(1, abs=0.06)
    shrunk = values(DirichletEnergy(RING, 16, (16,)), 1e-3 * (CIRCLE[nodes] + 0.1 * draw(50, 16, 2)), nodes)
    assert float(shrunk["energy"]) == pytest.approx(float(lies["energy"]), rel=1e-6)


def test_excluding_components_takes_the_loudest_directions_out():
    nodes = torch.arange(8).repeat(20, 1)
    loud = 10 * draw(20, 8, 1)
    x = torch.cat([CIRCLE[nodes], loud], -1)
    assert float(values(DirichletEnergy(RING, 8, (8,)), x, nodes)["energy"]) > 0.7
    assert float(values(DirichletEnergy(RING, 8, (8,), exclude=1), x, nodes)["energy"]) < 0.5


def test_energy_merges_and_leaves_out_padding_and_what_is_not_finite():
    walks = GraphWalk(RING).sample(8, 20, seed=2)
    x = draw(8, 20, 4)
    whole = values(DirichletEnergy(RING, 20, (20,)), x, walks.nodes)
    one, other = DirichletEnergy(RING, 20, (20,)), DirichletEnergy(RING, 20, (20,))
    one.update(x[:3], walks.nodes[:3])
    other.update(x[3:], walks.nodes[3:])
    one.merge_state(other)
    for name, value in one.compute().items():
        torch.testing.assert_close(value, whole[name], rtol=1e-9, atol=1e-12)
    padded, nodes = torch.cat([torch.full((8, 5, 4), torch.nan), x], 1), walks.nodes
    nodes = torch.cat([torch.full((8, 5), -1), nodes], 1)
    padded[:, :2] = 1e30
    again = values(DirichletEnergy(RING, 25, (25,)), padded, nodes)
    torch.testing.assert_close(again["energy"], whole["energy"])
    half = values(DirichletEnergy(RING, 20, (20,)), x.bfloat16(), walks.nodes)
    torch.testing.assert_close(half["energy"], whole["energy"], rtol=0.01, atol=0)
    constant = values(DirichletEnergy(RING, 20, (20,)), torch.ones(8, 20, 4), walks.nodes)
    assert bool(constant["energy"].isnan().all())


def test_energy_tells_what_does_not_fit():
    with pytest.raises(MeasureError, match="symmetric"):
        DirichletEnergy(torch.eye(3).roll(1, 0), 4, (4,))
    with pytest.raises(MeasureError, match="cannot end"):
        DirichletEnergy(RING, 10, (4,))
    with pytest.raises(MeasureError, match="T >= 9"):
        DirichletEnergy(RING, 4, (9,)).update(draw(1, 8, 2), torch.zeros(1, 8, dtype=torch.long))
    with pytest.raises(MeasureError, match="not on the graph"):
        DirichletEnergy(RING, 4, (4,)).update(draw(1, 4, 2), torch.full((1, 4), 8))


def test_without_means_leaves_residuals_orthogonal_to_tokens_and_positions():
    tokens = torch.randint(0, 5, (40, 7), generator=torch.Generator().manual_seed(0))
    x = draw(40, 7, 3) + 3 * draw(5, 3, seed=1)[tokens] + draw(7, 3, seed=2)
    left = without_means(x, tokens)
    design = torch.cat([torch.nn.functional.one_hot(tokens, 5), torch.eye(7, dtype=torch.long).expand(40, 7, 7)], -1)
    design = design.double().flatten(0, 1)
    y = x.double().flatten(0, 1)
    wanted = y - design @ torch.linalg.lstsq(design, y, driver="gelsd").solution
    torch.testing.assert_close(left.flatten(0, 1), wanted, rtol=0, atol=1e-9)
    torch.testing.assert_close(without_means(x), x.double() - x.double().mean(0))


def test_node_means_and_spectral_alignment():
    x, nodes = draw(2, 9, 3), torch.tensor([[0, 1, 1, 2, 0, 1, -1, 2, 2]] * 2)
    mean, seen = node_means(x, nodes, 4)
    torch.testing.assert_close(mean[1, 1], x[1, [1, 2, 5]].mean(0))
    assert seen.tolist() == [[True, True, True, False]] * 2
    assert spectral_alignment(CIRCLE @ draw(2, 5), RING) == pytest.approx(1, abs=1e-6)
    chance = np.mean([spectral_alignment(draw(8, 20, seed=s), RING) for s in range(100)])
    assert chance == pytest.approx(2 / 7, abs=0.05)
    with pytest.raises(MeasureError, match="not connected"):
        spectral_alignment(CIRCLE, graph("cliques", 8))


# -- Bayes ----------------------------------------------------------------------------------------------------------


def test_the_average_and_its_regret_are_those_of_the_world_that_knows_them():
    world = DiscreteLatents(inputs=3, seed=2)
    prompts = world.sample(30, 40, seed=1)
    likelihood = world.log_likelihood(prompts).permute(2, 0, 1)
    average = bma(likelihood, world.tables()[:, prompts.inputs])
    torch.testing.assert_close(average.exp(), world.predict(prompts), rtol=1e-9, atol=1e-12)
    given = average.gather(-1, prompts.symbols[..., None])[..., 0]
    regret = icl_regret(given, likelihood)
    horizon = torch.arange(1, 41)
    assert float((regret * horizon).max()) <= math.log(8) + 1e-9
    by_hand = max(float(likelihood[z, 3, :7].sum()) for z in range(8)) - float(given[3, :7].sum())
    assert float(regret[3, 6]) == pytest.approx(by_hand / 7)
    # A predictor that follows one wrong hypothesis pays at every step.
    assert regret_slope(icl_regret(likelihood[0], likelihood)) > -0.5


def test_each_horizon_has_the_hypothesis_that_is_best_until_then():
    given, likelihood = (-draw(*shape, seed=7).square() for shape in ((5, 9), (4, 5, 9)))
    regret = icl_regret(given, likelihood)
    best = set()
    for b in range(5):
        for t in range(1, 10):
            paid = [-float(one[b, :t].sum()) for one in (given, *likelihood)]
            assert float(regret[b, t - 1]) == pytest.approx((paid[0] - min(paid[1:])) / t, abs=1e-6)
            best.add((b, paid.index(min(paid[1:]))))
    assert len(best) > 5  # it changes with the horizon somewhere


def test_a_prior_moves_the_average():
    log_prior = torch.tensor([0.9, 0.1]).log()
    tables = torch.tensor([[0.2, 0.8], [0.6, 0.4]])[:, None, None]
    first = bma(torch.zeros(2, 1, 1), tables, log_prior)
    assert float(first[0, 0, 1].exp()) == pytest.approx(0.9 * 0.8 + 0.1 * 0.4)


def test_bma_gap_is_the_divergence():
    p, q = draw(6, 5, 4).log_softmax(-1), draw(6, 5, 4, seed=1).log_softmax(-1)
    wanted = torch.nn.functional.kl_div(q.double(), p.double(), reduction="none", log_target=True).sum(-1).mean(0)
    torch.testing.assert_close(bma_gap(p, q), wanted, rtol=1e-6, atol=1e-9)
    mask = torch.ones(6, 5, dtype=torch.bool)
    mask[2, 3] = False
    broken = p.clone()
    broken[2, 3] = torch.nan
    keep = torch.tensor([0, 1, 3, 4, 5])
    torch.testing.assert_close(bma_gap(broken, q, mask)[3], bma_gap(p[keep], q[keep])[3])
    assert float(bma_gap(p, p).max()) == 0
    certain = torch.tensor([[[0.0, -torch.inf]]])
    assert float(bma_gap(certain, torch.tensor([[[0.5, 0.5]]]).log())) == pytest.approx(math.log(2))
    with pytest.raises(MeasureError, match="log_softmax"):
        bma_gap(draw(2, 3, 4), q[:2, :3])
    with pytest.raises(MeasureError, match="above 0"):
        icl_regret(torch.ones(1, 2), torch.zeros(1, 1, 2))
    with pytest.raises(MeasureError, match="three horizons"):
        regret_slope(torch.zeros(1, 9))


def test_ridge_is_the_posterior_mean_of_the_linear_world():
    from sklearn.linear_model import Ridge

    world = latent_prompts("linear", dim=3)
    assert world.dim == 3
    k, v, q = draw(10, 3), draw(10, 2, seed=1), draw(4, 3, seed=2)
    wanted = Ridge(alpha=0.3, fit_intercept=False).fit(k.numpy(), v.numpy()).predict(q.numpy())
    np.testing.assert_allclose(ridge_prediction(k, v, q, 0.3).numpy(), wanted, atol=1e-5)


# -- steps ----------------------------------------------------------------------------------------------------------


def cost(frames: Tensor, cuts: tuple[int, ...]) -> float:
    edges = [0, *cuts, len(frames)]
    return sum(float(frames[a:b].double().std(0, correction=0).mean()) for a, b in itertools.pairwise(edges))


def test_cuts_are_the_best_of_all():
    for seed in range(5):
        frames = draw(14, 3, seed=seed).cumsum(0)
        found = StepSegmenter(3, min_len=2).fit([frames])
        every = [(a, b) for a in range(2, 13) for b in range(a + 2, 13)]
        best = min(every, key=lambda cuts: cost(frames, cuts))
        assert found.cost_ == pytest.approx(cost(frames, best), abs=1e-7)
        assert tuple(found.cuts_[0]) == best


def test_demonstrations_of_other_lengths_share_their_steps():
    levels = 5 * draw(3, 6)
    lengths = [(4, 9, 5), (8, 3, 7), (5, 5, 10)]
    demos = [
        torch.cat([levels[s].expand(n, 6) for s, n in enumerate(one)]) + 0.1 * draw(sum(one), 6, seed=i)
        for i, one in enumerate(lengths)
    ]
    found = StepSegmenter(3, min_len=2).fit(demos)
    assert found.cuts_ == [[a, a + b] for a, b, _ in lengths]
    assert [one.bincount().tolist() for one in found.labels([18, 18, 20])] == [list(one) for one in lengths]


def test_the_reward_rises_with_the_steps_and_does_not_reward_another_end():
    levels = 3 * draw(3, 20)
    demos = [levels.repeat_interleave(8, 0) + 0.3 * draw(24, 20, seed=s) for s in range(3)]
    reward = PerceptualReward(3, top=8).fit(demos)
    scores = reward.score(levels.repeat_interleave(5, 0) + 0.3 * draw(15, 20, seed=9))
    assert float(scores[:5].max()) < float(scores[5:10].min()) < float(scores[10:].min())
    assert float(reward.score(9 * draw(4, 20, seed=8)).max()) < float(scores[5:10].min())
    steps = reward.step_scores(demos[0])
    torch.testing.assert_close(reward.score(demos[0]), 2 * steps[:, 1] + 4 * steps[:, 2])
    assert [len(one) for one in reward.units_] == [8, 8, 8]


def test_the_units_of_a_step_are_those_that_tell_it():
    demo = 0.2 * draw(30, 4)
    demo[10:20, 1] += 5
    demo[20:, 3] += 5
    found = PerceptualReward(3, top=1, min_len=8).fit([demo, demo + 0.1 * draw(30, 4, seed=1)])
    assert found.segmenter_.cuts_[0] == [10, 20]
    assert [one.tolist() for one in found.units_[1:]] == [[1], [3]]
    silent = torch.cat([torch.zeros(30, 2), demo], 1)  # units are counted among all, those that never vary too
    again = PerceptualReward(3, top=1, min_len=8).fit([silent])
    assert [one.tolist() for one in again.units_[1:]] == [[3], [5]]


def test_demonstrations_without_steps_give_no_reward():
    shuffled = [draw(30, 12, seed=s) for s in range(4)]
    assert PerceptualReward(3, min_len=8).fit(shuffled).score(shuffled[0]).tolist() == [0.0] * 30


def test_steps_tell_what_they_cannot_use():
    with pytest.raises(MeasureError, match="at least 6 frames"):
        StepSegmenter(3, 2).fit([draw(5, 2)])
    with pytest.raises(MeasureError, match="one demonstration or more"):
        StepSegmenter(2).fit([])
    with pytest.raises(MeasureError, match="one demonstration or more"):
        StepSegmenter(2).fit([draw(6, 2), draw(6, 3)])
    with pytest.raises(MeasureError, match="not finite"):
        StepSegmenter(2).fit([torch.full((6, 2), torch.nan)])
    with pytest.raises(MeasureError, match="no unit varies"):
        PerceptualReward(2).fit([torch.ones(8, 3)])
    with pytest.raises(MeasureError, match="steps=1"):
        PerceptualReward(1)
