"""Steerability against closed forms: a chance that is a known function of the state, and a bound that is mechanical."""

import numpy as np
import pandas as pd
import pytest
import torch

import actome as ac
from actome.core.errors import MeasureError
from actome.steer import Asked, Resampled, Steerability, outcome_vectors, steerability
from actome.tasks import Subject, SubjectConfig

SITE, WIDTH = "blocks.0.resid.post", 16
COLUMNS = ["path", "pos", "target", "uncertainty", "p", "directed", "random", "excess", "share", "excess_logit"]


@pytest.fixture(scope="module")
def model():
    config = SubjectConfig(vocab=8, d_model=WIDTH, layers=2, heads=2, context=12, init=2.0)
    return ac.wrap(Subject.fresh(config, seed=0))


def drawn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


PATHS = torch.randint(8, (6, 5), generator=torch.Generator().manual_seed(1))
READ = drawn(2, WIDTH)


def read_out(model, ids, target):
    """A chance that is known in closed form: a sigmoid of one direction of the newest state."""
    state = model.record(ids, SITE)[SITE][:, -1]
    return ((state @ READ) * (1 if target == 0 else -1)).double().sigmoid()


def test_gains_are_the_closed_form(model):
    vectors = drawn(3, 2, 5, WIDTH)
    targets = torch.tensor([0, 1, 0, 1, 1, 0])
    uncertainty = drawn(4, 6, 5).double()
    found = steerability(
        model, PATHS, SITE, vectors, read_out, targets=targets, uncertainty=uncertainty, norm=3.0, batch_size=2
    )
    h = model.record(PATHS, SITE)[SITE]
    assert len(found.frame) == 30
    for row in found.frame.itertuples():
        sign = 1 if row.target == 0 else -1
        base = sign * float(h[row.path, row.pos] @ READ)
        v = vectors[row.target, row.pos]
        moved = base + sign * 3 * float(v / v.norm() @ READ)
        p, q = (1 / (1 + np.exp(-x)) for x in (base, moved))
        assert row.target == int(targets[row.path])
        assert row.uncertainty == pytest.approx(float(uncertainty[row.path, row.pos]))
        assert row.p == pytest.approx(p, abs=1e-5)
        assert row.directed == pytest.approx(q - p, abs=1e-5)
        assert row.excess == pytest.approx(row.directed - row.random)
        assert row.share == pytest.approx(row.excess / (1 - row.p))


def test_random_vectors_have_the_norm_and_no_direction(model):
    pushes = []

    def spy(model, ids, target):
        pushes.append(model.record(ids, SITE)[SITE][:, -1])
        return read_out(model, ids, target)

    steerability(model, PATHS[:1], SITE, READ, spy, positions=[4], random=50, norm=2.5)
    moved = torch.stack(pushes[1:])[:, 0] - pushes[0][0]
    torch.testing.assert_close(moved.norm(dim=-1), torch.full((51,), 2.5), rtol=1e-4, atol=1e-4)
    cosines = torch.cosine_similarity(moved, READ[None], dim=-1)
    assert float(cosines[0]) == pytest.approx(1.0, abs=1e-5)
    assert float(cosines[1:].mean().abs()) < 4 / (50 * WIDTH) ** 0.5


def test_only_one_position_is_touched_and_paths_may_differ_in_length(model):
    whole = {}

    def spy(model, ids, target):
        whole.setdefault(ids.shape[1], []).append(model.record(ids, SITE)[SITE])
        return read_out(model, ids, target)

    paths = [[1, 2, 3, 4], [5, 6]]
    found = steerability(model, paths, SITE, READ, spy, random=1)
    assert found.frame.groupby("path").size().tolist() == [4, 2]
    for length, states in whole.items():
        for one in states[1:]:
            assert one[:, : length - 1].equal(states[0][:, : length - 1])
            assert not one[:, -1].equal(states[0][:, -1])


def test_a_push_of_fixed_log_odds_looks_like_uncertainty_until_states_of_like_chance_are_compared():
    rng = np.random.default_rng(0)
    p = 1 / (1 + np.exp(-rng.normal(-2, 1.5, 4000)))
    entropy = -p * np.log(p) - (1 - p) * np.log(1 - p) + rng.normal(0, 0.05, 4000)
    push = rng.normal(0.5, 0.2, 4000)

    def made(push):
        after = 1 / (1 + np.exp(-(np.log(p / (1 - p)) + push)))
        rows = np.stack([np.arange(4000), np.zeros(4000), np.zeros(4000), entropy, p, after - p, 0 * p, after - p], 1)
        rows = np.concatenate([rows, ((after - p) / (1 - p))[:, None], push[:, None]], 1)
        return Steerability(pd.DataFrame(rows, columns=COLUMNS))

    mechanical = made(push)
    assert mechanical.association()["rho"] > 0.7
    assert abs(mechanical.association(bins=40)["within"]) < 0.15
    assert abs(mechanical.association(gain="excess_logit")["rho"]) < 0.06
    # Where uncertain states do yield more, beyond their chance, all of them say so.
    real = made(push + 4 * (entropy - (-p * np.log(p) - (1 - p) * np.log(1 - p))))
    assert real.association(bins=40)["within"] > 0.3
    assert real.association(gain="excess_logit")["within"] > 0.3
    assert real.association()["partial"] > mechanical.association()["partial"] + 0.1


def test_partial_correlation_is_that_of_residuals():
    from scipy.stats import rankdata
    from sklearn.linear_model import LinearRegression

    rng = np.random.default_rng(1)
    frame = pd.DataFrame(rng.normal(size=(200, len(COLUMNS))), columns=COLUMNS)
    frame["p"] = rng.uniform(size=200)
    frame["pos"] = np.arange(200) % 4
    some = frame[frame["pos"].isin([1, 2])]
    p = rankdata(some["p"])
    design = np.stack([p, p**2], 1)
    ranks = [rankdata(some[name]) for name in ("excess", "uncertainty")]
    y, x = (one - LinearRegression().fit(design, one).predict(design) for one in ranks)
    found = Steerability(frame).association([1, 2])
    assert found["partial"] == pytest.approx(np.corrcoef(y, x)[0, 1], abs=1e-9)
    assert found["count"] == 100


def test_directions_of_outcomes_are_differences_of_means():
    states = drawn(0, 40, 3, 5)
    outcomes = torch.arange(40) % 3
    found = outcome_vectors(states, outcomes)
    for c in range(3):
        by_hand = states[outcomes == c].mean(0) - states[outcomes != c].mean(0)
        torch.testing.assert_close(found[c], by_hand, rtol=1e-5, atol=1e-5)
    hot = torch.nn.functional.one_hot(outcomes).float()
    torch.testing.assert_close(outcome_vectors(states, hot), found)


def test_a_planted_direction_is_found_by_its_outcomes():
    planted, labels = torch.eye(12)[:2] * 4, torch.arange(300) % 2
    states = drawn(1, 300, 2, 12) + planted[labels][:, None]
    found = outcome_vectors(states, labels)
    wanted = planted[0] - planted[1]
    assert float(torch.cosine_similarity(found[0, 1], wanted, dim=0)) > 0.97


def test_asked_is_the_softmax_over_the_answers(model):
    chance = Asked([7], [1, 2, 3])
    logits = model.logits(torch.cat([PATHS, torch.full((6, 1), 7)], 1))[:, -1, [1, 2, 3]].double()
    torch.testing.assert_close(chance(model, PATHS, 2), logits.softmax(-1)[:, 2])


def test_resampled_is_how_often_an_outcome_comes(model):
    chance = Resampled(lambda ids: ids[0] > 3, outcomes=(True, False), samples=3000, max_new_tokens=1, batch_size=3000)
    p = model.logits(PATHS[:2])[:, -1].double().softmax(-1)[:, 4:].sum(-1)
    assert float((chance(model, PATHS[:2], 0) - p).abs().max()) < 0.03
    torch.testing.assert_close(chance(model, PATHS[:2], 0) + chance(model, PATHS[:2], 1), torch.ones(2).double())
    # A vector that says what comes next steers all of it there.
    push = model.module.unembed.weight[6].detach()
    found = steerability(model, PATHS[:2], "blocks.1.resid.post", push, chance, positions=[4], norm=200.0, random=1)
    assert found.frame["p"].lt(0.9).all()
    assert (found.frame["p"] + found.frame["directed"]).gt(0.95).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vectors": torch.zeros(WIDTH)}, "zeros"),
        ({"vectors": torch.ones(3, WIDTH)}, r"\(3, 16\) are not"),
        ({"targets": torch.tensor([0, 1])}, "not one number"),
        ({"targets": torch.full((6,), 1), "vectors": torch.ones(1, 5, WIDTH)}, "2 targets"),
        ({"uncertainty": torch.ones(6, 4)}, "uncertainty"),
        ({"positions": [5]}, r"\[5\] are not among the 5"),
        ({"random": 0}, "random=0"),
    ],
)
def test_what_does_not_fit_is_refused(model, options, message):
    whole = {"vectors": READ} | options
    with pytest.raises(MeasureError, match=message):
        steerability(model, PATHS, SITE, whole.pop("vectors"), read_out, **whole)


def test_associations_need_uncertainty_and_positions_that_are_there(model):
    found = steerability(model, PATHS, SITE, READ, read_out, positions=[2], random=1)
    with pytest.raises(MeasureError, match="without uncertainty="):
        found.association()
    with pytest.raises(MeasureError, match=r"no state at positions \[3\]"):
        found.association([3])
    with pytest.raises(MeasureError, match="gain='rise'"):
        found.association(gain="rise")
    with pytest.raises(MeasureError, match="target 2 is not among the 1"):
        Resampled(bool, [True])(model, PATHS, 2)
    with pytest.raises(MeasureError, match="all paths have, or none"):
        outcome_vectors(drawn(0, 4, 1, 2), torch.zeros(4, dtype=torch.long))
