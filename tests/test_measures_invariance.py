"""Invariance, feature shares and set variability against brute force, scipy, scikit-learn and planted truth."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest
from torch import Tensor

import actome as ac
from actome.core.errors import MeasureError
from actome.measures import FeatureVariance, Invariance, SetVariability, feature_rsa, measure_invariance
from actome.measures.set_variability import pair_distances

some = settings(max_examples=15, deadline=None)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def values(measure, *inputs) -> dict[str, Tensor]:
    measure.update(*inputs)
    return measure.compute()


# -- invariance -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["l2", "cos"])
def test_invariance_over_all_pairs_is_brute_force(metric):
    a, b = draw(7, 5).abs(), draw(7, 5, seed=1).abs()
    got = values(Invariance(metric, shifts=99), a, b)

    def compare(x, y):
        return float((x - y).norm() if metric == "l2" else torch.cosine_similarity(x, y, dim=0))

    same = np.mean([compare(x, y) for x, y in zip(a, b, strict=True)])
    different = np.mean([compare(a[i], b[j]) for i, j in itertools.permutations(range(7), 2)])
    assert float(got["same"]) == pytest.approx(same, rel=1e-6)
    assert float(got["different"]) == pytest.approx(different, rel=1e-6)
    assert float(got["sensitivity"]) == pytest.approx(same / different, rel=1e-6)


def test_invariance_is_0_for_the_identity_and_1_for_unrelated_copies():
    z = draw(400, 16)
    assert float(values(Invariance(), z, z)["sensitivity"]) == 0
    # 400 distances that spread by a tenth: their mean is good to well under a percent.
    assert float(values(Invariance(), z, draw(400, 16, seed=1))["sensitivity"]) == pytest.approx(1, abs=0.03)
    few = values(Invariance(shifts=4), z, z + 0.1)["different"]
    assert float(few) == pytest.approx(float(values(Invariance(shifts=399), z, z + 0.1)["different"]), rel=0.03)


@pytest.mark.parametrize("metric", ["l2", "cka"])
def test_a_site_that_is_the_same_for_every_input_is_not_called_invariant(metric):
    dead = (3.7 + 0.1 * torch.arange(6)).expand(300, 6)
    found = values(Invariance(metric), dead, dead)
    assert found["sensitivity" if metric == "l2" else "cka"].isnan()


def test_linear_cka_is_its_definition_on_the_whole_tensor():
    a, b = draw(50, 6) + 3, draw(50, 6, seed=1) @ draw(6, 6, seed=2) + draw(50, 6)
    x, y = (one.double() - one.double().mean(0) for one in (a, b))
    wanted = (x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())
    measure = Invariance("cka")
    measure.update(a[:20], b[:20])
    measure.update(a[20:], b[20:])
    assert float(measure.compute()["cka"]) == pytest.approx(float(wanted), rel=1e-9)
    turn = torch.linalg.qr(draw(6, 6))[0]
    assert float(values(Invariance("cka"), a, 3 * a @ turn)["cka"]) == pytest.approx(1, abs=1e-5)


@some
@given(st.integers(0, 1000), st.sampled_from(["l2", "cos", "cka"]))
def test_invariance_merges_as_updates_in_one_stream_do(seed, metric):
    a, b = draw(2, 9, 4, seed=seed), draw(2, 9, 4, seed=seed + 1)
    one, other, stream = (Invariance(metric) for _ in range(3))
    one.update(a[0], b[0])
    other.update(a[1], b[1])
    one.merge_state(other)
    for i in range(2):
        stream.update(a[i], b[i])
    for name, value in one.compute().items():
        assert float(value) == pytest.approx(float(stream.compute()[name]), rel=1e-9)


def test_invariance_leaves_out_what_is_not_finite_and_takes_bf16():
    a, b = draw(8, 4), draw(8, 4, seed=1)
    whole = values(Invariance(shifts=99), a, b)
    a_, b_ = torch.cat([a, torch.full((1, 4), torch.nan)]), torch.cat([b, torch.ones(1, 4)])
    assert float(values(Invariance(shifts=99), a_, b_)["sensitivity"]) == float(whole["sensitivity"])
    half = values(Invariance(shifts=99), a.bfloat16(), b.bfloat16())
    assert float(half["sensitivity"]) == pytest.approx(float(whole["sensitivity"]), rel=0.01)  # 8 bits of mantissa
    assert math.isnan(float(values(Invariance(), a[:1], b[:1])["sensitivity"]))
    with pytest.raises(MeasureError, match="two copies"):
        Invariance().update(a, b[:, :2])
    with pytest.raises(MeasureError, match="'l1'"):
        Invariance("l1")


def test_the_invariance_of_a_model_finds_the_layer_that_ignores_the_transformation():
    net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 6))
    with torch.no_grad():
        net[0].weight[:, 0] = 0.0  # blind to the first input
    model = ac.wrap(net)

    def shift(which: int):
        def transform(x: Tensor, generator: torch.Generator) -> Tensor:
            moved = torch.randn(len(x), generator=generator)
            return x + moved[:, None] * torch.eye(4)[which]

        return transform

    batches = list(draw(2, 20, 4))
    blind = measure_invariance(model, batches, shift(0), "module:*", pool="flat").set_index("site")["sensitivity"]
    seen = measure_invariance(model, batches, shift(1), "module:*", pool="flat").set_index("site")["sensitivity"]
    assert blind["module:0"] == pytest.approx(0, abs=1e-6)
    assert 0.05 < seen["module:1"] < 1


# -- feature variance -----------------------------------------------------------------------------------------------


def r2(x: Tensor, *labels: Tensor) -> float:
    """Share of variance by least squares on indicators."""
    design = torch.cat([torch.nn.functional.one_hot(one).double() for one in labels], 1).numpy()
    y = x.double().numpy() - x.double().numpy().mean(0)
    fitted = design @ np.linalg.lstsq(design, y, rcond=None)[0]
    return float((fitted**2).sum() / (y**2).sum())


def labelled(n: int = 200, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    labels = torch.stack([torch.randint(0, 2, (n,), generator=g), torch.randint(0, 3, (n,), generator=g)], -1)
    x = 5 + draw(n, 6, seed=seed) + labels[:, :1] * draw(6, seed=1) + 2 * draw(3, 6, seed=2)[labels[:, 1]]
    return x, labels


def test_shares_are_least_squares_on_the_whole_tensor():
    x, labels = labelled()
    labels[:, 0] |= (labels[:, 1] == 2).long()  # dependent features
    got = values(FeatureVariance([2, 3]), x, labels)
    assert float(got["share"][0]) == pytest.approx(r2(x, labels[:, 0]), rel=1e-9)
    assert float(got["share"][1]) == pytest.approx(r2(x, labels[:, 1]), rel=1e-9)
    both = r2(x, labels[:, 0], labels[:, 1])
    assert float(got["joint"]) == pytest.approx(both, rel=1e-9)
    assert float(got["unique"][0]) == pytest.approx(both - r2(x, labels[:, 1]), abs=1e-9)
    correlation = np.corrcoef(labels[:, 0].numpy(), x[:, 2].numpy())[0, 1]
    assert float(got["unit_share"][0, 2]) == pytest.approx(correlation**2, rel=1e-5)


def test_shares_of_independent_features_add_up_and_planted_ones_are_found():
    grid = torch.cartesian_prod(torch.arange(2), torch.arange(3))
    x = torch.zeros(6, 4)
    x[:, 0] = 2 * (2 * grid[:, 0] - 1)  # variance 4
    x[:, 1] = grid[:, 1] - 1.0  # variance 2/3
    got = values(FeatureVariance([2, 3]), x, grid)
    assert got["share"].tolist() == pytest.approx([4 / (4 + 2 / 3), (2 / 3) / (4 + 2 / 3)])
    assert float(got["joint"]) == pytest.approx(1)
    assert got["unique"].tolist() == pytest.approx(got["share"].tolist())
    assert got["density"].tolist() == [0.25, 0.25]
    assert bool(got["unit_share"][:, 2:].isnan().all())


@some
@given(st.integers(0, 1000), st.integers(1, 199))
def test_shares_merge_as_if_all_came_at_once(seed, cut):
    x, labels = labelled(seed=seed)
    whole = values(FeatureVariance([2, 3]), x, labels)
    one, other = FeatureVariance([2, 3]), FeatureVariance([2, 3])
    one.update(x[:cut], labels[:cut])
    other.update(x[cut:], labels[cut:])
    one.merge_state(other)
    for name, value in one.compute().items():
        torch.testing.assert_close(value, whole[name], rtol=1e-8, atol=1e-10)


def test_rows_without_a_label_or_a_finite_unit_do_not_count():
    x, labels = labelled()
    whole = values(FeatureVariance([2, 3]), x, labels)
    more_x = torch.cat([x, torch.full((1, 6), torch.nan), torch.full((1, 6), 1e30)])
    more_labels = torch.cat([labels, torch.tensor([[0, 0], [-1, 1]])])
    got = values(FeatureVariance([2, 3]), more_x[None], more_labels[None])
    assert all(torch.equal(value, whole[name]) for name, value in got.items())
    half = values(FeatureVariance([2, 3]), x.bfloat16(), labels)
    torch.testing.assert_close(half["share"], whole["share"], rtol=0, atol=5e-3)
    constant = values(FeatureVariance(2), torch.full((10, 3), 0.1), labels[:10, 0])
    assert bool(constant["share"].isnan().all())


def test_density_is_the_share_of_units_whose_correlation_is_above_the_threshold():
    labels = torch.arange(200) % 2
    x = labels[:, None] * torch.tensor([0.0, 0.35, 1.0, 2.0, 4.0]) + draw(200, 5)
    measure = FeatureVariance(2, threshold=0.3)
    measure.update(x, labels)
    found = [abs(np.corrcoef(unit.numpy(), labels.numpy())[0, 1]) for unit in x.T]
    assert [one > 0.3 for one in found] == [False, False, True, True, True]
    assert found[1] > 0.09
    assert float(measure.compute()["density"][0]) == pytest.approx(3 / 5)


def test_feature_variance_tells_bad_labels():
    x, labels = labelled(20)
    with pytest.raises(MeasureError, match="up to"):
        FeatureVariance([2, 2]).update(x, labels)
    with pytest.raises(MeasureError, match="do not fit"):
        FeatureVariance([2]).update(x, labels)
    with pytest.raises(MeasureError, match="two classes"):
        FeatureVariance([1])
    with pytest.raises(MeasureError, match="class numbers"):
        FeatureVariance([2, 3]).update(x, labels.float())


def test_similarity_analysis_sees_the_feature_with_the_variance():
    labels = torch.cartesian_prod(torch.arange(2), torch.arange(2)).repeat(10, 1)
    x = torch.stack([10.0 * labels[:, 0], 0.1 * labels[:, 1]], -1) + 0.01 * draw(40, 2)
    loud, soft = feature_rsa(x, labels).tolist()
    assert loud > 0.8 > 0.5 > soft
    assert math.isnan(float(feature_rsa(x, torch.zeros(40, dtype=torch.long))[0]))
    with pytest.raises(MeasureError, match="three rows"):
        feature_rsa(x[:2], labels[:2])


# -- set variability ------------------------------------------------------------------------------------------------


def calibrated(**options) -> SetVariability:
    return SetVariability(**options).calibrate([draw(60, 5, seed=s) + 2 * s for s in range(4)])


def test_the_mean_distance_is_that_of_all_pairs():
    x = draw(12, 5)
    unit = (x / x.norm(dim=-1, keepdim=True)).double()
    wanted = np.mean([float((a - b).norm()) for a, b in itertools.combinations(unit, 2)])
    got = values(calibrated(), x)
    assert float(got["mean"]) == pytest.approx(wanted, rel=1e-6)
    assert float(got["w1kp"]) == pytest.approx(1 - float(got["u"]))


def test_calibration_is_the_empirical_distribution_with_both_ends():
    sets = [draw(15, 4, seed=s) for s in range(2)]
    scale = SetVariability().calibrate(sets)
    distances = torch.cat([pair_distances(x) for x in sets])
    at = float(distances.sort().values[99])
    assert float(scale.quantile(torch.tensor(at, dtype=torch.double))) == pytest.approx(100 / (len(distances) + 1))
    assert scale.quantile(torch.tensor([0.0, 2.0])).tolist() == [0, 1]
    grid = scale.quantile(torch.linspace(0, 2, 500))
    assert bool((grid.diff() >= 0).all())
    # Fresh pairs from the same source are uniform, those of narrower sets are not.
    fresh = torch.cat([pair_distances(draw(60, 5, seed=100 + s) + 2 * s) for s in range(4)])
    assert kstest(calibrated().quantile(fresh).numpy(), "uniform").statistic < 0.06
    assert kstest(calibrated().quantile(fresh / 4).numpy(), "uniform").statistic > 0.3


def test_reuse_is_what_random_orders_give():
    measure = calibrated(alike=0.6)
    x = draw(30, 5, seed=50) + 1
    got = values(measure, x)
    unit = torch.nn.functional.normalize(x, dim=-1).double()
    alike = measure.quantile(torch.cdist(unit, unit)) <= 0.6
    rng = np.random.default_rng(0)
    chance = {}
    for k in range(2, 31):
        hits = [bool(alike[(o := rng.permutation(30))[k - 1], o[: k - 1]].any()) for _ in range(1500)]
        chance[k] = np.mean(hits)
    k = int(got["reuse"])
    assert chance[k] > 0.45  # 1500 orders: good to 0.04
    assert k == 2 or chance[k - 1] < 0.55


def test_all_alike_repeat_at_once_and_all_different_never():
    assert float(values(calibrated(), torch.ones(20, 5) + 1e-4 * draw(20, 5))["reuse"]) == 2
    basis = torch.eye(5)
    assert math.isinf(float(values(calibrated(alike=0.05), torch.cat([basis, -basis]))["reuse"]))


def test_set_variability_merges_and_keeps_a_bounded_choice_that_order_does_not_change():
    x = draw(300, 5)
    whole = values(calibrated(keep=100), x)
    one, other = calibrated(keep=100), calibrated(keep=100)
    one.update(x[170:])
    other.update(x[:120])
    other.update(x[120:170])
    one.merge_state(other)
    assert one.embeddings.shape == (100, 5)
    for name, value in one.compute().items():
        assert float(value) == pytest.approx(float(whole[name]), rel=1e-9)
    assert float(whole["mean"]) == pytest.approx(float(values(calibrated(), x)["mean"]), rel=0.03)


def test_set_variability_tells_what_is_missing():
    got = values(SetVariability(), draw(4, 5))
    assert float(got["mean"]) > 0
    assert math.isnan(float(got["u"]))
    assert math.isnan(float(got["reuse"]))
    with pytest.raises(MeasureError, match="at least 2"):
        values(calibrated(), draw(1, 5))
    with pytest.raises(MeasureError, match="at least 100"):
        SetVariability().calibrate([draw(5, 3)])
    assert float(values(calibrated(), torch.cat([draw(4, 5), torch.full((1, 5), torch.nan)]))["mean"]) > 0
