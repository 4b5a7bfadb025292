"""Information measures: against brute force, closed forms, scikit-learn, and channels whose information is known."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from measured import generator
from sklearn.feature_selection import mutual_info_regression
from sklearn.metrics import mutual_info_score
from torch import Tensor

from actome.core.errors import MeasureError
from actome.measures.feature_information import FeatureInformation
from actome.measures.mutual_information import AdaptiveEdges, MutualInformation, compression
from actome.measures.rows import finite_rows
from actome.measures.screening import screen
from actome.measures.tally import kept, mixed, packed, row_hashes, tallied
from actome.measures.v_information import v_information

some = settings(max_examples=15, deadline=None)


def entropy_bits(symbols: list) -> float:
    counts = np.array(list({s: symbols.count(s) for s in symbols}.values())) / len(symbols)
    return float(-(counts * np.log2(counts)).sum())


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-12, atol=1e-12, equal_nan=True)


# -- tallies -----------------------------------------------------------------------------------------------------


def test_mixing_is_splitmix64():
    # The first outputs of splitmix64 with seed 0 (reference implementation by Vigna), as unsigned numbers.
    got = [int(mixed(torch.tensor([0]))[0]) % 2**64]
    assert got == [0xE220A8397B1DCDAF]


def test_hashes_tell_rows_apart_also_in_order_and_beyond_63_bits():
    bits = torch.rand(3000, 130, generator=generator()) > 0.5
    rows = {tuple(row) for row in bits.tolist()}
    assert len(row_hashes(packed(bits)).unique()) == len(rows)
    changed = bits[:1].clone()
    changed[0, 129] ^= True
    assert row_hashes(packed(bits[:1])) != row_hashes(packed(changed))
    assert row_hashes(torch.tensor([[1, 2]])) != row_hashes(torch.tensor([[2, 1]]))
    assert row_hashes(torch.tensor([[1]])) != row_hashes(torch.tensor([[1, 0]]))


def test_a_full_tally_keeps_exact_counts_of_a_sample_of_symbols_however_the_stream_is_cut():
    symbols = torch.randint(0, 3000, (20_000, 1), generator=generator())
    rows = torch.stack([row_hashes(symbols), torch.ones(20_000, dtype=torch.int64)], -1)
    whole = tallied(rows, 500)
    cut = rows[:0]
    for part in rows[torch.randperm(20_000, generator=generator(1))].split(3000):
        cut = tallied(torch.cat([cut, tallied(part, 500)]), 500)
    assert torch.equal(whole, cut)
    hashes, counts = rows[:, 0].unique(return_counts=True)
    assert torch.equal(whole, torch.stack([hashes, counts], -1)[:501])
    sample = kept(whole, 500)
    total, error = sample.total(torch.ones(500, dtype=torch.float64))
    true = len(hashes)
    assert 0.02 * true < error < 0.06 * true  # about 1 / sqrt(500)
    assert abs(total - true) < 4 * error


# -- mutual information ---------------------------------------------------------------------------------------------


def edges_of(x: Tensor, bins: int = 30, **options) -> Tensor:
    one = AdaptiveEdges(bins, **options)
    one.update(x)
    return one.compute()["edges"]


def test_edges_hold_equally_many_unique_values_and_zeros_have_a_bin():
    x = torch.randn(400, 5, generator=generator()).relu()
    edges = edges_of(x, 7)
    assert float(edges[0]) == float(x[x > 0].min())
    unique = x[x > 0].unique()
    counts = torch.bucketize(unique, edges, right=True).bincount()[1:]
    assert int(counts.max() - counts.min()) <= 1
    assert bool((torch.bucketize(x[x == 0], edges, right=True) == 0).all())


@given(seed=st.integers(0, 1000), cut=st.integers(1, 29), cap=st.sampled_from([16, 1 << 16]))
@some
def test_edges_merge(seed, cut, cap):
    x = torch.randn(30, 3, generator=generator(seed))
    parts = [AdaptiveEdges(4, cap), AdaptiveEdges(4, cap)]
    parts[0].update(x[:cut]), parts[1].update(x[cut:])
    parts[0].merge_state(parts[1])
    assert torch.equal(parts[0].compute()["edges"], edges_of(x.flip(0), 4, cap=cap))


def test_sampled_edges_are_near_the_exact_ones():
    x = torch.randn(200_000, 1, generator=generator())
    exact, sampled = edges_of(x, 10, cap=1 << 18), edges_of(x, 10, cap=4096)
    ranks = [float((x < e).double().mean()) for e in sampled[1:]]
    # Two standard errors are at most 1 / sqrt(4096); four of them for nine edges at once.
    assert max(abs(r - k / 10) for k, r in enumerate(ranks, 1)) < 2 / 64
    assert not torch.equal(exact, sampled)


@pytest.mark.parametrize("estimator", ["ebab", "fixed"])
def test_binned_information_is_that_of_the_symbols(estimator):
    x = torch.randn(300, 2, generator=generator()).tanh()
    y = (x[:, 0] + 0.3 * torch.randn(300, generator=generator(1)) > 0).long()
    edges = edges_of(x, 5) if estimator == "ebab" else None
    one = MutualInformation(estimator, num_classes=2, edges=edges, bins=5)
    one.update(x[:100], y[:100]), one.update(x[100:], y[100:])
    got = one.compute()
    inner = edges.numpy() if edges is not None else np.linspace(-1, 1, 6)[1:-1].astype(np.float32)
    symbols = [tuple(row) for row in np.digitize(x.numpy(), inner)]
    names = {s: i for i, s in enumerate(set(symbols))}
    assert float(got["i_xt"]) == pytest.approx(entropy_bits(symbols), rel=1e-12)
    assert float(got["i_ty"]) == pytest.approx(
        mutual_info_score([names[s] for s in symbols], y) / math.log(2), rel=1e-10
    )
    assert float(got["ceiling"]) == pytest.approx(math.log2(300))
    assert float(got["h_y"]) == pytest.approx(entropy_bits(y.tolist()))
    assert float(got["error"]) == 0


@pytest.mark.parametrize("estimator", ["ebab", "akde"])
@given(seed=st.integers(0, 1000), cut=st.integers(1, 29))
@some
def test_information_merges_and_padding_rows_do_not_exist(estimator, seed, cut):
    x = torch.randn(30, 2, generator=generator(seed))
    y = torch.randint(0, 3, (30,), generator=generator(seed))
    edges = edges_of(x, 4) if estimator == "ebab" else None

    def fold(*parts):
        one = MutualInformation(estimator, num_classes=3, edges=edges)
        for part in parts:
            one.update(x[part], y[part])
        return one

    a, b = fold(slice(0, cut)), fold(slice(cut, 30))
    a.merge_state(b)
    whole = fold(slice(0, 30))
    same(a.compute(), whole.compute())
    bad = torch.tensor([[torch.nan, 1.0], [1e30, torch.inf]])
    whole.update(bad, torch.tensor([0, 1]))
    same(whole.compute(), a.compute())
    same(pickle.loads(pickle.dumps(a)).compute(), a.compute())


def test_akde_is_the_double_sum_and_does_not_see_the_scale():
    x = torch.randn(40, 3, generator=generator(), dtype=torch.float64)
    y = torch.arange(40) % 2

    def values(t):
        one = MutualInformation("akde", num_classes=2, noise=0.05, unit="nats")
        one.update(t, y)
        return one.compute()

    got = values(x)
    variance = 0.05 * float(x.abs().max()) ** 2

    def brute(t, scale):
        total = 0.0
        for a in t:
            total -= math.log(sum(math.exp(-float(((a - b) ** 2).sum()) / scale) for b in t) / len(t)) / len(t)
        return total

    assert float(got["i_xt"]) == pytest.approx(brute(x, 2 * variance), rel=1e-9)
    assert float(got["i_xt_lower"]) == pytest.approx(brute(x, 8 * variance), rel=1e-9)
    within = sum(brute(x[y == c], 2 * variance) for c in (0, 1)) / 2
    assert float(got["i_ty"]) == pytest.approx(float(got["i_xt"]) - within, rel=1e-8)
    for name, value in values(1000 * x).items():
        torch.testing.assert_close(value, got[name], rtol=1e-9, atol=1e-9)


def test_akde_bounds_hold_for_far_clusters():
    # Four far points, noise that hardly reaches: exactly two bits, both bounds.
    x = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]).repeat(5, 1)
    one = MutualInformation("akde", num_classes=2, noise=1e-4)
    one.update(x, (x[:, 0] > 0.5).long())
    got = one.compute()
    for name, bits in (("i_xt", 2), ("i_xt_lower", 2), ("i_ty", 1)):
        assert float(got[name]) == pytest.approx(bits, abs=1e-9)


def test_more_symbols_than_the_cap_are_estimated_within_the_stated_error():
    x = torch.randint(0, 5, (6000, 4), generator=generator()).float()
    y = (x.sum(1) > 8).long()

    def values(cap):
        one = MutualInformation("fixed", num_classes=2, limits=(0.0, 5.0), bins=5, max_symbols=cap)
        one.update(x, y)
        return one.compute()

    exact, estimate = values(1 << 17), values(200)
    assert exact["error"] == 0
    assert 0 < estimate["error"] < 1.0
    assert abs(exact["h_t"] - estimate["h_t"]) < 4 * estimate["error"]
    assert abs(exact["i_ty"] - estimate["i_ty"]) < 0.1


def test_bfloat16_and_constant_layers():
    x = torch.randn(50, 2, generator=generator()).bfloat16()
    y = torch.arange(50) % 2
    edges = edges_of(x, 4)
    a, b = (MutualInformation(num_classes=2, edges=edges) for _ in range(2))
    a.update(x, y), b.update(x.float(), y)
    same(a.compute(), b.compute())
    for estimator in ("ebab", "akde"):
        one = MutualInformation(estimator, num_classes=2, edges=edges if estimator == "ebab" else None)
        one.update(torch.zeros(20, 2), y[:20])
        got = one.compute()
        assert float(got["i_xt"]) == pytest.approx(0, abs=1e-12)
        assert float(got["i_ty"]) == pytest.approx(0, abs=1e-12)


def test_information_refuses_what_it_cannot_say():
    with pytest.raises(MeasureError, match="'ebab', 'fixed' or 'akde'"):
        MutualInformation("kde", num_classes=2)
    with pytest.raises(MeasureError, match="AdaptiveEdges"):
        MutualInformation("ebab", num_classes=2)
    with pytest.raises(MeasureError, match="'bits' or 'nats'"):
        MutualInformation("akde", num_classes=2, unit="digits")
    one = MutualInformation("akde", num_classes=2, max_rows=10)
    with pytest.raises(MeasureError, match="max_rows=10"):
        one.update(torch.randn(6, 1), torch.zeros(6).long()), one.update(torch.randn(6, 1), torch.zeros(6).long())
    with pytest.raises(MeasureError, match="labels 0 to 1"):
        MutualInformation("akde", num_classes=2).update(torch.randn(2, 1), torch.tensor([0, 2]))
    lonely = MutualInformation("akde", num_classes=2)
    lonely.update(torch.randn(1, 1), torch.tensor([0]))
    with pytest.raises(MeasureError, match="two rows"):
        lonely.compute()
    with pytest.raises(MeasureError, match="exactly 0"):
        edges_of(torch.zeros(5, 2))
    with pytest.raises(MeasureError, match=r"together with \(3,\)"):
        finite_rows("X", torch.ones(2, 2), torch.ones(3))


def test_compression():
    trace = torch.tensor([[1.0, 0.0], [4.0, 0.0], [1.0, 0.0]])
    got = compression(trace)
    assert got[0] == 0.75
    assert got[1].isnan()
    assert compression(torch.tensor([0.0, 1.0, 2.0])) == 0
    with pytest.raises(MeasureError, match="two epochs"):
        compression(torch.ones(1, 3))


# -- screening ---------------------------------------------------------------------------------------------------------


def test_kde_information_of_a_gaussian_pair_is_that_of_the_smoothed_gaussian():
    rho, n = 0.8, 20_000
    x = torch.randn(n, 1, generator=generator())
    y = rho * x[:, 0] + (1 - rho**2) ** 0.5 * torch.randn(n, generator=generator(1))
    one = FeatureInformation("kde", unit="nats", grid=128)
    one.update(x, y)
    # Smoothing adds h^2 to both variances: a correlation of rho / (1 + h^2) is left. The rest is sampling.
    left = rho / (1 + n ** (-1 / 3))
    assert float(one.compute()["information"]) == pytest.approx(-0.5 * math.log(1 - left**2), abs=0.02)


def test_kde_information_against_a_direct_sum_over_all_pairs():
    n, grid = 60, 32
    x, y = torch.randn(n, 1, generator=generator()), torch.randn(n, generator=generator(1))
    one = FeatureInformation("kde", unit="nats", grid=grid)
    one.update(x, y)
    h, points = n ** (-1 / 6), np.linspace(-4.5, 4.5, grid)
    zx, zy = (((v - v.mean()) / v.std()).double().numpy() for v in (x[:, 0], y))
    kx, ky = (np.exp(-0.5 * ((points[:, None] - z) / h) ** 2) for z in (zx, zy))
    p = kx @ ky.T / (kx @ ky.T).sum()
    direct = (p * np.log(p / np.outer(p.sum(1), p.sum(0)))).sum()
    # Linear binning on points 0.29 apart under a kernel of 0.5 is a small blur of its own.
    assert float(one.compute()["information"]) == pytest.approx(direct, rel=0.1)


def test_kde_information_about_classes_against_a_direct_sum():
    n, grid = 300, 256
    y = (torch.arange(n) % 3 == 0).long()
    x = torch.randn(n, 1, generator=generator()) + 1.5 * y[:, None]
    one = FeatureInformation("kde", num_classes=2, unit="nats", grid=grid)
    one.update(x, y)
    z, points = ((x - x.mean()) / x.std()).double().numpy()[:, 0], np.linspace(-4.5, 4.5, grid)
    by_class = [z[y.numpy() == c] for c in (0, 1)]
    densities = [np.exp(-0.5 * ((points[:, None] - v) * len(v) ** 0.2) ** 2).sum(1) for v in by_class]
    p = np.stack([d / d.sum() * len(v) / n for d, v in zip(densities, by_class, strict=True)], -1)
    direct = (p * np.log(p / np.outer(p.sum(1), p.sum(0)))).sum()
    # Points 0.035 apart under kernels of 0.35 and 0.4; a kernel of n^(-1/6) would give some 5 % less.
    assert float(one.compute()["information"]) == pytest.approx(direct, rel=5e-3)


def test_bins_are_equally_frequent_and_give_the_information_of_the_table():
    x, y = torch.randn(800, 3, generator=generator()), torch.randn(800, generator=generator(1))
    x[:, 1] = y**2
    one = FeatureInformation("bin", bins=8, unit="nats")
    one.update(x, y)
    inner = np.arange(1, 8) / 8
    cut = [np.digitize(v, np.quantile(v.astype(np.float64), inner)) for v in (*x.numpy().T, y.numpy())]
    for feature, got in enumerate(one.compute()["information"]):
        assert float(got) == pytest.approx(mutual_info_score(cut[feature], cut[-1]), abs=1e-9)
    assert np.bincount(cut[0]).tolist() == [100] * 8


def test_knn_is_that_of_scikit_learn():
    x, y = torch.randn(100, 4, generator=generator()), torch.randn(100, generator=generator(1))
    x[:, 2] += 2 * y
    got = screen(x, y, "knn", permutations=0, unit="nats", seed=3)
    direct = mutual_info_regression(x.double().numpy(), y.numpy(), n_neighbors=3, random_state=3)
    np.testing.assert_allclose(got.all_information, direct)
    assert int(got.indices[0]) == 2
    assert got.p.isnan().all()


@pytest.mark.parametrize(("method", "classes"), [("kde", None), ("kde", 3), ("bin", None), ("bin", 3)])
def test_histograms_merge_given_limits_and_are_refused_without(method, classes):
    x, y = torch.randn(90, 4, generator=generator()), torch.randn(90, generator=generator(1))
    y = y if classes is None else torch.arange(90) % 3
    make = lambda limits=None: FeatureInformation(method, num_classes=classes, grid=16, bins=4, limits=limits)  # noqa: E731
    limits = make().limits_of(x, y)
    whole, a, b = make(limits), make(limits), make(limits)
    whole.update(x, y), a.update(x[:30], y[:30]), b.update(x[30:], y[30:])
    a.merge_state(b)
    same(a.compute(), whole.compute())
    first, second, empty = make(), make(), make()
    first.update(x[:30], y[:30]), second.update(x[30:], y[30:])
    before = first.table.clone()
    with pytest.raises(MeasureError, match="different limits"):
        first.merge_state(second)
    assert torch.equal(first.table, before)
    empty.merge_state(second)
    same(empty.compute(), second.compute())
    second.merge_state(make())
    same(empty.compute(), second.compute())


def test_screening_finds_planted_squares_that_correlation_misses():
    x = torch.randn(500, 2000, generator=generator())
    y = x[:, 11] ** 2 + x[:, 1500] ** 2 + 0.5 * torch.randn(500, generator=generator(1))
    for outcome, method in ((y, "kde"), (y, "bin"), ((y > y.median()).long(), "kde"), ((y > y.median()).long(), "bin")):
        found = screen(x, outcome, method, top=2, permutations=19)
        assert set(found.indices.tolist()) == {11, 1500}
        assert found.p.tolist() == [0.05, 0.05]


def test_screening_of_nothing_gives_p_that_chance_gives():
    x, y = torch.randn(200, 40, generator=generator()), torch.randn(200, generator=generator(1))
    found = screen(x, y, "bin", top=40, permutations=39)
    # 40 values that are uniform: their mean is 0.5 within four standard errors.
    assert abs(float(found.p.mean()) - 0.5) < 4 * (1 / 12 / 40) ** 0.5


def test_screening_of_odd_features():
    x = torch.randn(300, 3, generator=generator())
    y = x[:, 0].clone()
    x[:, 1] = 5.0
    x[:, 2] = 0.01 * x[:, 2]
    x[0, 2] = 1e4
    one = FeatureInformation("kde")
    one.update(x, y)
    got = one.compute()
    assert float(got["information"][1]) == 0
    assert float(got["clipped"][2]) == pytest.approx(1 / 300)
    bins = FeatureInformation("bin")
    bins.update(x, y)
    assert float(bins.compute()["information"][1]) == pytest.approx(0, abs=1e-12)
    x[5] = torch.nan
    bins.update(x[5:6], y[5:6])
    assert int(bins.rows) == 300
    with pytest.raises(MeasureError, match="num_classes"):
        one.update(x, torch.zeros(300).long())
    with pytest.raises(MeasureError, match="the outcome holds NaN"):
        one.update(x, torch.full((300,), torch.nan))
    with pytest.raises(MeasureError, match="'kde', 'bin' or 'knn'"):
        screen(x, y, "tree")


def test_mass_at_the_border_of_the_grid_is_not_lost():
    x = torch.cat([torch.full((50, 1), -3.0), torch.full((50, 1), 3.0)])
    one = FeatureInformation("kde", num_classes=2, unit="bits", limits=torch.tensor([[0.0, 0.6666667], [0.0, 0.0]]))
    one.update(x, torch.arange(100) // 50)
    # Two bumps at either end of the grid, one a class: all of the class is known.
    assert float(one.compute()["information"]) == pytest.approx(1, abs=1e-3)


# -- usable information ------------------------------------------------------------------------------------------------


def test_v_information_of_a_gaussian_channel():
    n = 4000
    y = torch.randint(0, 2, (n,), generator=generator())
    x = 2 * y[:, None] + torch.randn(n, 1, generator=generator(1))
    found = v_information(x, y)
    # Exact: 1 - E[log2(1 + exp(-2 z))], z ~ N(1, 1) the signed distance from the boundary times the slope 2.
    z = np.random.default_rng(0).normal(1, 1, 1_000_000)
    exact = 1 - np.log2(1 + np.exp(-2 * z)).mean()
    assert found.information == pytest.approx(exact, abs=0.04)
    assert abs(found.control) < 0.02
    assert float(found.pointwise.mean()) == pytest.approx(found.information)
    assert found.entropy == pytest.approx(1, abs=0.01)


def test_what_is_usable_depends_on_the_probe():
    x = torch.randn(1500, 2, generator=generator())
    y = (x[:, 0] * x[:, 1] > 0).long()
    assert v_information(x, y, "logistic").information < 0.02
    assert v_information(x, y, "knn").information > 0.5
    assert v_information(x, y, "tree").information > 0.5
    bits, nats = (v_information(x, y, "knn", unit=unit).information for unit in ("bits", "nats"))
    assert nats == pytest.approx(bits * math.log(2))


def test_v_information_refuses():
    x, y = torch.randn(100, 2, generator=generator()), torch.arange(100) % 2
    for bad, message in (
        (lambda: v_information(x, y.float()), "integer labels"),
        (lambda: v_information(x, torch.zeros(100).long()), "nothing to know"),
        (lambda: v_information(x[:12], y[:12]), "10 each"),
        (lambda: v_information(x, y, "mlp"), "does not exist"),
        (lambda: v_information(x, y, object()), "predict_proba"),
    ):
        with pytest.raises(MeasureError, match=message):
            bad()


@pytest.mark.parametrize("probe", ["knn", "tree"])
def test_a_probe_that_is_sure_knows_no_more_than_there_is(probe):
    y = torch.arange(80) % 2
    found = v_information(torch.randn(80, 2, generator=generator()) + 20 * y[:, None], y, probe)
    # What it says has to sum to one: 0.999 + 0.001 / 2 at most, a surprise of 0.0007 bits.
    assert found.conditional == pytest.approx(-math.log2(0.9995), rel=0.2)
    assert found.information < found.entropy
