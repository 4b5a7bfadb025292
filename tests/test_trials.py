"""Seeds, intervals and nulls against what statistics promise of them; digits and small nets."""

import numpy as np
import pytest
import torch

from actome.tasks.digits import digits
from actome.tasks.losses import TrainingError
from actome.tasks.nets import CNN, MLP, ResidualMLP, accuracy, fit
from actome.tasks.trials import auroc, null, over_seeds, paired, spearman, split, trial_seeds


def test_trials_have_seeds_of_their_own():
    assert len(set(trial_seeds(0, 50) + trial_seeds(1, 50))) == 100
    assert over_seeds(lambda seed: {"s": seed}, 4, 3)["s"] == trial_seeds(4, 3)
    with pytest.raises(ValueError, match="at least one"):
        over_seeds(lambda seed: {}, 0, 0)
    names = iter(("a", "b"))
    with pytest.raises(ValueError, match="different figures"):
        over_seeds(lambda seed: {next(names): 0.0}, 0, 2)


def test_the_bootstrap_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for i in range(200):
        noise = rng.normal(0.3, 1.0, 30)
        got = paired(noise, np.zeros(30), resamples=400, seed=i)
        covered += got.low <= 0.3 <= got.high
    # A percentile interval of 30 pairs covers about 93 %; three standard errors of 200 trials are 5 points.
    assert 0.87 <= covered / 200 <= 0.99


def test_pairs_are_compared_pair_by_pair():
    got = paired([1.0, 5.0, 2.0], [0.0, 5.0, 3.0])
    assert got.mean == 0.0
    assert got.wins == 0.5
    with pytest.raises(ValueError, match="at least one pair"):
        paired([], [])


def test_a_null_is_uniform_without_an_effect_and_small_with_one():
    def correlation(a, b):
        return float(torch.corrcoef(torch.stack([a, b]))[0, 1])

    generator = torch.Generator().manual_seed(0)
    ps = []
    for i in range(60):
        x, y = torch.randn(2, 25, generator=generator)
        ps.append(null(correlation, x, y, permutations=49, seed=i).p)
    # Sixty uniform numbers have a mean of 0.5 with a standard error of 0.037.
    assert 0.37 < np.mean(ps) < 0.63
    x = torch.randn(25, generator=generator)
    related = null(correlation, x, x + 0.1 * torch.randn(25, generator=generator), permutations=99)
    assert related.p == 0.01
    assert related.z > 3
    with pytest.raises(ValueError, match="cannot be paired"):
        null(correlation, x, x[:3])


def test_parts_do_not_overlap():
    parts = split(100, [0.5, 0.2, 0.3], seed=1)
    assert sorted(torch.cat(parts).tolist()) == list(range(100))
    assert [len(part) for part in parts] == [50, 20, 30]
    with pytest.raises(ValueError, match="parts of a whole"):
        split(10, [0.8, 0.5])


def test_ranks_agree_with_scikit_learn():
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(1)
    scores, labels = rng.integers(0, 5, 80) / 5, rng.integers(0, 2, 80)
    assert auroc(scores, labels) == pytest.approx(roc_auc_score(labels, scores))
    assert np.isnan(auroc([1.0, 2.0], [1, 1]))
    assert np.isnan(spearman([1.0, 1.0], [1.0, 2.0]))


def test_digits_are_split_without_overlap_and_standardised_by_the_training_part():
    data = digits(3, standardise=False)
    rows = {tuple(row) for row in data.train.tolist()}
    # Two of the images are equal to others.
    assert sum(tuple(row) in rows for row in data.test.tolist()) <= 2
    assert len(data.train) + len(data.test) == 1797
    scaled = digits(3)
    assert scaled.train.mean(0).abs().max() < 1e-5
    assert scaled.train.std() == pytest.approx(1.0, abs=1e-3)
    assert torch.equal(digits(3, images=True).test.flatten(1), scaled.test)
    assert not torch.equal(digits(4).train, scaled.train)
    with pytest.raises(ValueError, match="do not fit"):
        digits(train=1700, test=100)


@pytest.mark.parametrize(
    ("net", "images"),
    [(MLP([64, 32, 10]), False), (ResidualMLP(64, 32, 2, 10), False), (CNN([1, 8, 16], 10, pool=[0]), True)],
    ids=["mlp", "residual", "cnn"],
)
def test_small_nets_learn_digits(net, images):
    data = digits(0, images=images)
    fit(net, data.train, data.train_labels, steps=250, lr=1e-2)
    assert accuracy(net, data.test, data.test_labels) > 0.85


@pytest.mark.parametrize("options", [{}, {"optimizer": "sgd", "momentum": 0.9, "lr": 0.05}], ids=["adam", "sgd"])
@pytest.mark.parametrize("seed", [0, 2**31 + 7])
def test_fitting_is_the_plain_loop_to_the_last_bit(seed, options):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(50, 64, generator=generator), torch.randint(10, (50,), generator=generator)
    by_hand, seen = MLP([64, 16, 10], seed=3), []
    rule = (
        torch.optim.SGD(by_hand.parameters(), 0.05, momentum=0.9, weight_decay=0.1)
        if options
        else torch.optim.AdamW(by_hand.parameters(), 1e-3, weight_decay=0.1)
    )
    generator = torch.Generator().manual_seed(seed)
    for step in range(9):  # three epochs of 16 + 16 + 16 rows, two left over
        if step % 3 == 0:
            order = torch.randperm(50, generator=generator)
        rows = order[step % 3 * 16 : step % 3 * 16 + 16]
        loss = torch.nn.functional.cross_entropy(by_hand(x[rows] + y[rows, None]), y[rows])
        rule.zero_grad()
        loss.backward()
        rule.step()
        seen.append((step + 1, loss.item()))
    told = []
    net = fit(
        MLP([64, 16, 10], seed=3), x, y, steps=9, batch_size=16, weight_decay=0.1, seed=seed,
        prepare=lambda rows, targets: rows + targets[:, None], on_step=lambda *one: told.append(one), **options,
    )  # fmt: skip
    assert told == seen
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), by_hand.parameters(), strict=True))


def test_training_is_repeatable_and_leaves_the_global_generator_alone():
    data = digits(0)
    before = torch.random.get_rng_state()
    nets = [
        fit(MLP([64, 16, 10], seed=5), data.train, data.train_labels, steps=30, optimizer="sgd", lr=0.1, seed=2)
        for _ in range(2)
    ]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(*(net.parameters() for net in nets), strict=True))
    with pytest.raises(ValueError, match="one at least"):
        fit(nets[0], data.train[:0], data.train_labels[:0], steps=1)
    with pytest.raises(ValueError, match="batch_size=0"):
        fit(nets[0], data.train, data.train_labels, steps=1, batch_size=0)
    with pytest.raises(TrainingError, match="step 0 is nan"):
        fit(nets[0], data.train[:5] * torch.nan, data.train_labels[:5], steps=1)
    with pytest.raises(ValueError, match="choose 'adam' or 'sgd'"):
        fit(nets[0], data.train, data.train_labels, steps=1, optimizer="lion")
    with pytest.raises(ValueError, match="two widths"):
        MLP([3])
