"""Barriers, butterflies, variance of runs, grokking and many networks at once, against independent computations."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from actome.core.errors import MeasureError
from actome.dynamics import RunVariance, butterfly, grokking_delay, loss_barrier, vote_shares
from actome.dynamics.barrier import mixed, refresh_statistics
from actome.dynamics.butterfly_effect import nudged
from actome.dynamics.run_variance import poisson_binomial, split
from actome.measures import permutation_groups, permuted
from actome.measures.permutation import copied
from actome.tasks import Subject, SubjectConfig, TrainingError
from actome.tasks.many import ManyMLPs, fit_many
from actome.tasks.nets import MLP, fit


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X = randn(64, 4)
Y = (X[:, 0] > 0).long() + (X[:, 1] > 0).long()

# Barriers


def test_the_barrier_is_that_of_mixtures_by_hand():
    a, b = (fit(MLP([4, 16, 3], seed=seed), X, Y, steps=60, lr=1e-2, seed=seed) for seed in (0, 1))
    found = loss_barrier(a, b, (X, Y), points=5)
    by_hand = []
    for w in (0, 0.25, 0.5, 0.75, 1):
        net = MLP([4, 16, 3])
        with torch.no_grad():
            for one, p, q in zip(net.parameters(), a.parameters(), b.parameters(), strict=True):
                one.copy_((1 - w) * p + w * q)
            by_hand.append(float(F.cross_entropy(net(X), Y)))
    assert found.losses == pytest.approx(by_hand, abs=1e-5)
    excess = [one - ((1 - w) * by_hand[0] + w * by_hand[4]) for w, one in zip(found.weights, by_hand, strict=True)]
    assert found.height == pytest.approx(max(excess), abs=1e-5)
    assert found.at == found.weights[int(np.argmax(excess))]
    assert loss_barrier(b, a, (X, Y), points=5).height == pytest.approx(found.height, abs=1e-5)


def test_batches_weigh_their_rows_and_batch_sizes_do_not_matter():
    a, b = MLP([4, 8, 3], seed=0), MLP([4, 8, 3], seed=1)
    whole = loss_barrier(a, b, (X, Y))
    assert loss_barrier(a, b, [(X[:50], Y[:50]), (X[50:], Y[50:])]).losses == pytest.approx(whole.losses, rel=1e-5)
    assert loss_barrier(a, b, (X, Y), batch_size=7).losses == pytest.approx(whole.losses, rel=1e-5)


def test_a_permuted_copy_has_a_barrier_until_it_is_aligned():
    a = fit(MLP([4, 32, 3], seed=0), X, Y, steps=200, lr=1e-2)
    groups = permutation_groups(a, X)
    b = copied(a, permuted(a.state_dict(), groups, {"linear.1": torch.arange(32).roll(5)}))
    assert loss_barrier(a, b, (X, Y)).height > 0.05
    for by in ("weights", "activations"):
        found = loss_barrier(a, b, (X, Y), by)
        assert found.height < 1e-6
        assert found.distance == 0


def test_statistics_of_normalisation_are_counted_anew_for_mixtures():
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).eval()
    before = copy.deepcopy(net.state_dict())
    refresh_statistics(net, [X[:32], X[32:]])
    hidden = net[0](X).detach()
    torch.testing.assert_close(net[1].running_mean, hidden.mean(0))
    expected = (hidden[:32].var(0) + hidden[32:].var(0)) / 2
    torch.testing.assert_close(net[1].running_var, expected)
    assert (net[1].momentum, net[1].training) == (0.1, False)
    # Units that change sign meet in the middle; only with statistics of the mixture is their scale right.
    other = copy.deepcopy(net)
    with torch.no_grad():
        other[0].weight.mul_(5)
        other[0].bias.mul_(5)
    refresh_statistics(other, [X])
    found = loss_barrier(net, other, (X, Y))
    assert found.height < 1e-3  # every point computes the same once its statistics are its own
    assert loss_barrier(net, other, (X, Y), refresh=X[:8]).height != found.height
    assert all(torch.equal(before[name], one) for name, one in before.items())


def test_the_barrier_writes_to_neither_network_and_takes_arguments_by_name():
    a, b = (Subject.fresh(SubjectConfig(vocab=8, d_model=16, heads=2, context=6), seed=seed) for seed in (0, 1))
    ids = torch.randint(8, (5, 6), generator=torch.Generator().manual_seed(0))
    before = [copy.deepcopy(net.state_dict()) for net in (a, b)]

    def last(logits, targets):
        return F.cross_entropy(logits[:, -1], targets)

    found = loss_barrier(a.bfloat16(), b.bfloat16(), [({"input_ids": ids}, ids[:, 0])], "weights", points=3, loss=last)
    assert math.isfinite(found.height)
    for net, state in zip((a, b), before, strict=True):
        assert all(torch.equal(one.bfloat16(), net.state_dict()[name]) for name, one in state.items())


def test_mixtures_end_where_they_should():
    a, b = {"w": randn(5), "n": torch.tensor(3)}, {"w": randn(5, seed=1), "n": torch.tensor(9)}
    assert torch.equal(mixed(a, b, 0)["w"], a["w"])
    assert torch.equal(mixed(a, b, 1)["w"], b["w"])
    assert int(mixed(a, b, 0.5)["n"]) == 3


def test_barriers_of_bad_input():
    a = MLP([4, 8, 3])
    with pytest.raises(MeasureError, match="points=2"):
        loss_barrier(a, a, (X, Y), points=2)
    with pytest.raises(MeasureError, match="no data"):
        loss_barrier(a, a, [])
    with pytest.raises(MeasureError, match="inputs and targets"):
        loss_barrier(a, a, [X])
    with pytest.raises(MeasureError, match="64 inputs and 3 targets"):
        loss_barrier(a, a, (X, Y[:3]))
    with pytest.raises(MeasureError, match="no way between"):
        loss_barrier(a, MLP([4, 9, 3]), (X, Y))
    with pytest.raises(MeasureError, match="takes finite ones"):
        loss_barrier(a, a, (X * math.nan, Y))


# Butterflies


def training(rate=0.3, generator=None):
    """Gradient descent with momentum, whose buffers are part of the run."""

    def train(run, start, stop):
        net, optimiser = run or (MLP([4, 12, 3], seed=1), None)
        optimiser = optimiser or torch.optim.SGD(net.parameters(), rate, momentum=0.9)
        for step in range(start, stop):
            own = torch.Generator().manual_seed(step) if generator is None else generator
            rows = torch.randint(64, (16,), generator=own)
            optimiser.zero_grad()
            F.cross_entropy(net(X[rows]), Y[rows]).backward()
            optimiser.step()
        return net, optimiser

    return train


def test_twins_without_a_nudge_stay_equal_to_the_bit_and_others_are_those_of_a_loop_by_hand():
    table = butterfly(training(), at=[0, 7], sigma=[0, 0.01], then=[5, 20], data=(X, Y), seed=3)
    assert len(table) == 2 * 2 * 2
    calm = table[table.sigma == 0]
    assert (calm.distance == 0).all()
    assert (calm.barrier == 0).all()
    assert calm.growth.isna().all()

    train = training()
    parent = train(None, 0, 7)
    child = copy.deepcopy(parent)
    start = train(None, 0, 0)[0]
    norm = float(torch.cat([p.detach().flatten() for p in start.parameters()]).norm())
    nudged(child, 0.01 * norm, {name: float(p.detach().double().std()) for name, p in start.named_parameters()}, seed=3)
    first = apart(parent[0], child[0])
    train(parent, 7, 27), train(child, 7, 27)
    row = table[(table["at"] == 7) & (table.sigma == 0.01) & (table.then == 20)].iloc[0]
    assert first == pytest.approx(0.01 * norm, rel=1e-4)
    assert row.start == pytest.approx(first, rel=1e-5)
    assert row.distance == pytest.approx(apart(parent[0], child[0]), rel=1e-4)
    assert row.growth == pytest.approx(math.log(row.distance / first) / 20, rel=1e-3)
    assert row.barrier == pytest.approx(loss_barrier(parent[0], child[0], (X, Y)).height, abs=1e-6)


def apart(a, b):
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return math.sqrt(sum(float((p - q).detach().double().square().sum()) for p, q in pairs))


def test_all_comparisons_and_a_swapped_batch():
    train = training()

    def swap(run, step):
        return train(run, step + 1000, step + 1001)

    table = butterfly(
        train, at=[3], sigma=[0.1], then=10, data={"train": (X[:40], Y[:40]), "test": (X[40:], Y[40:])},
        align=["weights", "activations"], sites="module:act.*", swap=swap,
    )  # fmt: skip
    assert table.nudge.tolist() == ["noise", "batch"]
    names = [f"barrier_{part}{by}" for part in ("train", "test") for by in ("", "_weights", "_activations")]
    assert {*names, "distance_weights", "distance_activations", "angle", "relative"} <= set(table)
    assert (table.distance_weights <= table.distance + 1e-9).all()
    assert (table.angle.between(0, math.pi / 2)).all()
    assert table.distance[1] > 0
    assert math.isnan(table.sigma[1])


def test_a_training_that_is_not_deterministic_shows_at_size_zero():
    table = butterfly(training(generator=torch.Generator().manual_seed(0)), at=[2], sigma=[0], then=5)
    assert table.distance[0] > 0


def test_noise_goes_by_the_initial_spread_and_has_the_length_that_was_asked_for():
    net = MLP([50, 50, 3])
    before = copy.deepcopy(net)
    nudged((net, None), 2.0, {"linear.0.weight": 0.1, "linear.1.weight": 0.4}, seed=1)
    assert apart(net, before) == pytest.approx(2.0, rel=1e-5)
    pairs = zip(net.named_parameters(), before.parameters(), strict=True)
    moved = {name: one.detach() - old.detach() for (name, one), old in pairs}
    assert not bool(moved["linear.0.bias"].any())
    assert float(moved["linear.1.weight"].std() / moved["linear.0.weight"].std()) == pytest.approx(4, rel=0.2)


def test_butterflies_of_bad_input():
    for options, message in [
        ({"at": []}, "nudge at steps"),
        ({"at": [-1]}, "nudge at steps"),
        ({"sigma": [-0.1]}, "sizes from 0"),
        ({"sigma": [math.nan]}, "sizes from 0"),
        ({"then": 0}, "a step or more"),
        ({"align": ["names"]}, "choose among weights, activations"),
        ({"sites": "module:act.0"}, "need data"),
    ]:
        with pytest.raises(MeasureError, match=message):
            butterfly(training(), **options)
    with pytest.raises(MeasureError, match="train_fn gave dict"):
        butterfly(lambda run, start, stop: {})


# Variance of runs


def filled(right_RN, ids=None):
    found = RunVariance()
    for run, right in zip(ids or range(len(right_RN)), right_RN, strict=True):
        found.update(run, right)
    return found


def planted(seed, runs=100, items=300, spread=0.3):
    """Runs whose ability varies: logits of items plus one number a run."""
    rng = np.random.default_rng(seed)
    logits = 2 * rng.standard_normal(items) + spread * rng.standard_normal((runs, 1))
    return rng.random((runs, items)) < 1 / (1 + np.exp(-logits))


def test_a_planted_difference_between_runs_is_estimated_without_bias():
    rng = np.random.default_rng(0)
    items, ability = 2 * rng.standard_normal(4000), 0.3 * rng.standard_normal(1000)
    truth = np.mean(1 / (1 + np.exp(-(items + ability[:, None]))), 1).var()
    found = [filled(planted(seed)).compute(resamples=0 if seed else 200) for seed in range(1, 31)]
    estimates = [one.distribution for one in found]
    assert np.mean(estimates) == pytest.approx(truth, abs=3 * np.std(estimates) / math.sqrt(30) + 0.05 * truth)
    one = filled(planted(0)).compute(resamples=200)
    assert one.low < truth < one.high
    assert one.p < 0.05
    assert one.halves > 0.3


def test_independent_runs_have_no_difference():
    found = [filled(planted(seed, spread=0.0)).compute(resamples=60) for seed in range(16)]
    error = np.std([one.distribution for one in found]) / math.sqrt(16)
    assert abs(np.mean([one.distribution for one in found])) < 3 * error
    assert np.mean([one.p < 0.05 for one in found]) <= 0.2
    assert np.mean([one.low <= 0 <= one.high for one in found]) >= 0.8
    assert abs(np.mean([one.halves for one in found])) < 0.1
    # Without R / (R - 1) the estimate would be off by V_ind / R, the same sign in every set of runs.
    few = [split(planted(seed, runs=5, spread=0.0)) for seed in range(200)]
    biased = np.mean([total - independent * 4 / 5 for total, independent, _ in few])
    assert abs(np.mean([one[2] for one in few])) < biased / 4


def test_the_parts_by_loops():
    right = planted(1, runs=6, items=9)
    runs, items = right.shape
    accuracy = [sum(row) / items for row in right.tolist()]
    mean = sum(accuracy) / runs
    total = sum((one - mean) ** 2 for one in accuracy) / (runs - 1)
    p = [sum(column) / runs for column in zip(*right.tolist(), strict=True)]
    independent = sum(one * (1 - one) for one in p) / items**2 * runs / (runs - 1)
    got = filled(right).compute(resamples=10)
    assert (got.total, got.independent) == (pytest.approx(total), pytest.approx(independent))
    assert got.distribution == pytest.approx((total - independent) * items / (items - 1))
    # The same from covariances of different items.
    cov = np.cov(right.T.astype(float))
    assert got.distribution == pytest.approx(cov[~np.eye(items, dtype=bool)].mean())


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9))
@settings(max_examples=30, deadline=None)
def test_the_poisson_binomial_by_convolution(chances):
    by_hand = np.array([1.0])
    for p in chances:
        by_hand = np.convolve(by_hand, [1 - p, p])
    np.testing.assert_allclose(poisson_binomial(np.array(chances)), by_hand, atol=1e-12)


def test_the_poisson_binomial_of_many_trials_is_scipys_binomial():
    from scipy.stats import binom

    np.testing.assert_allclose(poisson_binomial(np.full(3000, 0.3)), binom.pmf(np.arange(3001), 3000, 0.3), atol=1e-12)


@given(st.permutations(range(8)), st.integers(0, 8))
@settings(max_examples=20, deadline=None)
def test_merging_and_order_change_nothing(order, cut):
    right = planted(2, runs=8, items=20)
    whole = filled(right).compute(resamples=20)
    parts = [filled(right[list(part)], list(part)) for part in (order[:cut], order[cut:])]
    assert parts[0].merge(parts[1]).compute(resamples=20) == whole


def test_what_calibration_forecasts():
    rng = np.random.default_rng(0)
    p = rng.random(4000)
    labels = (rng.random(4000) < p).astype(int)
    found = RunVariance.from_calibration(np.stack([1 - p, p], 1), labels)
    assert found.independent == pytest.approx(found.two_class)
    assert found.two_class_sd == pytest.approx(found.two_class**0.5)
    assert found.error == pytest.approx(2 * np.mean(p * (1 - p)))
    assert found.observed_error == pytest.approx(found.error, abs=0.03)
    assert found.gap < 0.03
    # Runs that draw their answers from such shares vary as forecast.
    right = (rng.random((400, 4000)) < p) == labels
    assert split(right)[0] == pytest.approx(found.two_class, rel=0.25)
    sure = np.stack([p < 0.5, p >= 0.5], 1).astype(float)
    assert RunVariance.from_calibration(sure, labels).gap > 0.2
    many = rng.dirichlet(np.full(5, 0.3), 4000)
    drawn = np.array([rng.choice(5, p=one) for one in many])
    by_loop = sum(sum(q * q - q**3 for q in row) for row in many) / 4000**2
    assert RunVariance.from_calibration(many, drawn).independent == pytest.approx(by_loop)
    assert np.array_equal(vote_shares(torch.tensor([[0, 1], [0, 2]]), 3), [[1, 0, 0], [0, 0.5, 0.5]])


def test_runs_of_bad_input():
    one = filled(planted(0, runs=3, items=10))
    for args, message in [
        ((0, np.zeros(10)), "run 0 was given before"),
        ((9, np.zeros(11)), r"want \(10,\)"),
        ((9, np.full(10, 0.5)), "0.5 is neither"),
    ]:
        with pytest.raises(MeasureError, match=message):
            one.update(*args)
    with pytest.raises(MeasureError, match="given before"):
        one.merge(filled(planted(0, runs=1, items=10)))
    with pytest.raises(MeasureError, match="2 runs have no variance"):
        filled(planted(0, runs=2)).compute()
    with pytest.raises(MeasureError, match="add up to 1"):
        RunVariance.from_calibration(np.ones((4, 3)), np.zeros(4, int))
    with pytest.raises(MeasureError, match="for 3 classes"):
        RunVariance.from_calibration(np.full((4, 3), 1 / 3), np.full(4, 3))
    with pytest.raises(MeasureError, match="item, class"):
        RunVariance.from_calibration(np.full((4, 3), 1 / 3), np.zeros(5, int))
    with pytest.raises(MeasureError, match="classes from 0 to 1"):
        vote_shares([[0, 2]], 2)
    assert filled(np.ones((5, 10), bool)).compute().total == 0


# Grokking

STEPS = np.arange(1, 2001)


def test_the_delay_is_the_ratio_of_dates():
    fast, slow = np.exp(-STEPS / 50), np.exp(-STEPS / np.array([[100], [200], [400]]))
    found = grokking_delay(np.repeat(fast[None], 3, 0), slow, 0.1, x=STEPS, relative=False)
    assert found.runs == pytest.approx((2, 4, 8), rel=0.01)
    assert found.delay == pytest.approx(4, rel=0.01)
    assert found.low <= found.delay <= found.high
    assert (found.censored, found.unknown) == (0, 0)
    # Another learning rate stretches time, and a loss of another size its curve; neither changes the delay.
    stretched = grokking_delay(7 * np.repeat(fast[None], 3, 0), 3 * slow, 0.1, x=5 * STEPS)
    assert stretched.delay == pytest.approx(4, rel=0.02)


def test_runs_that_did_not_come_there_are_censored_and_those_that_did_not_fit_unknown():
    train = np.exp(-STEPS / np.array([[50], [50], [1e5]]))
    test = np.exp(-STEPS / np.array([[100], [1e5], [100]]))
    found = grokking_delay(train, test, x=STEPS)
    assert found.runs[0] == pytest.approx(2, rel=0.02)
    assert math.isinf(found.runs[1])
    assert math.isnan(found.runs[2])
    assert (found.censored, found.unknown) == (0.5, 1)
    assert math.isinf(found.delay)  # of two, one lower bound
    assert found.least[1] == pytest.approx(2000 / found.train.runs[1])
    shares = found.between(STEPS, np.tile(STEPS, (3, 1)))
    assert np.isnan(shares[2]).all()
    assert shares[:2].sum(1) == pytest.approx([1, 1])


def test_accuracies_rise():
    found = grokking_delay(1 - np.exp(-STEPS / 50), 1 - np.exp(-STEPS / 150), 0.9, x=STEPS, rising=True)
    assert found.delay == pytest.approx(3, rel=0.01)


def test_when_a_quantity_made_its_way():
    found = grokking_delay(np.exp(-STEPS / 50), np.exp(-STEPS / 200), x=STEPS, relative=False)
    before, between, after = found.between(STEPS, STEPS.astype(float))[0]
    assert before == pytest.approx((found.train.at - 1) / 1999)
    assert between == pytest.approx((found.test.at - found.train.at) / 1999)
    assert before + between + after == pytest.approx(1)
    late = found.between(STEPS, (found.test.at + 1 < STEPS).astype(float))[0]
    assert late == pytest.approx([0, 0, 1])
    with pytest.raises(MeasureError, match="2 curves for 1 seeds"):
        found.between(STEPS, np.ones((2, 2000)))
    with pytest.raises(MeasureError, match="ends where it began"):
        found.between(STEPS, np.ones(2000))


def test_grokking_of_bad_input():
    curve = np.exp(-STEPS / 50)
    with pytest.raises(MeasureError, match="same runs"):
        grokking_delay(curve, curve[:-1], x=STEPS)
    with pytest.raises(MeasureError, match="rising steps"):
        grokking_delay(curve, curve, x=STEPS[::-1])
    with pytest.raises(MeasureError, match="none of 1 runs"):
        grokking_delay(np.ones(2000), curve, x=STEPS)
    with pytest.raises(MeasureError, match="fitted at step 0"):
        grokking_delay(np.zeros(5) + 0.01, np.ones(5), relative=False)
    with pytest.raises(MeasureError, match="at zero or below"):
        grokking_delay(curve - 1, curve, x=STEPS)


# Many networks at once


@pytest.mark.parametrize("options", [{"lr": 1e-2}, {"lr": 0.1, "optimizer": "sgd", "momentum": 0.5}])
def test_many_networks_are_each_trained_as_alone(options):
    # In float64: rounding in other orders grows in training, which is what butterflies are about.
    x, y = X.double(), Y
    many = fit_many(ManyMLPs([4, 8, 3], seeds=[3, 5]).double(), x, y, steps=30, batch_size=16, seeds=[7, 8], **options)
    for i, (init, order) in enumerate([(3, 7), (5, 8)]):
        net = fit(MLP([4, 8, 3], seed=init).double(), x, y, steps=30, batch_size=16, seed=order, **options)
        torch.testing.assert_close(many(x)[i], net(x))
        torch.testing.assert_close(many.run(i).double()(x), net(x), rtol=1e-5, atol=1e-5)
        assert torch.equal(many.predict(x)[i], net(x).argmax(-1))


def test_equal_seeds_give_equal_runs_and_bad_ones_are_refused():
    many = fit_many(ManyMLPs([4, 8, 3], "tanh", seeds=[1, 1]), X, Y, steps=10, seeds=[2, 2])
    assert torch.equal(many(X)[0], many(X)[1])
    assert len(many) == 2
    with pytest.raises(ValueError, match="1 seeds for 2 runs"):
        fit_many(many, X, Y, steps=1, seeds=[0])
    with pytest.raises(ValueError, match="no seeds"):
        ManyMLPs([4, 8, 3], seeds=[])
    with pytest.raises(ValueError, match="64 inputs and 3 targets"):
        fit_many(many, X, Y[:3], steps=1, seeds=[0, 1])
    with pytest.raises(ValueError, match="'adam' or 'sgd'"):
        fit_many(many, X, Y, steps=1, seeds=[0, 1], optimizer="lion")
    with pytest.raises(ValueError, match="one row and 0 steps"):
        fit_many(many, X, Y, steps=-1, seeds=[0, 1])
    with pytest.raises(TrainingError, match=r"run 0 \(2 of 2 runs\) is not finite at step 4"):
        fit_many(many, X * math.inf, Y, steps=5, seeds=[0, 1])
