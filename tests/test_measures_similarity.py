"""Similarity: against textbook forms on whole matrices, scikit-learn and scipy, invariances and planted truth."""

from __future__ import annotations

import itertools
import math
import pickle

import numpy as np
import pytest
import scipy.spatial
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from measured import assert_same, generator
from torch import Tensor

import actome as ac
from actome.core.errors import MeasureError, SiteError
from actome.measures import CCA, CKA, RSA, SVCCA, LinearCKA, MutualKNN, Procrustes, compare, similarity
from actome.measures.cka import centred_gram
from actome.measures.rsa import dissimilarities
from actome.measures.similarity import METRICS

some = settings(max_examples=10, deadline=None)
FOLDS = {"cka": LinearCKA, "rsa": lambda: RSA(size=64), "cca": CCA, "svcca": SVCCA, "procrustes": Procrustes,
         "mutual_knn": lambda: MutualKNN(k=3, size=64)}  # fmt: skip


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


def rotation(units: int, seed: int = 9) -> Tensor:
    return torch.linalg.qr(randn(units, units, seed=seed)).Q


def related(seed: int = 0, n: int = 200, units: int = 6, other: int = 9) -> tuple[Tensor, Tensor]:
    """Two sets of features that share some of what they hold."""
    shared = randn(n, 3, seed=seed)
    return (
        shared @ randn(3, units, seed=seed + 1) + 0.5 * randn(n, units, seed=seed + 2) + 2.0,
        (shared @ randn(3, other, seed=seed + 3)).tanh() + 0.5 * randn(n, other, seed=seed + 4),
    )


def folded(fold, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    fold.update(x, y)
    return fold.compute()


# -- CKA: the textbook, with whole matrices and explicit sums -----------------------------------------------------


def hsic_1(K: np.ndarray, L: np.ndarray) -> float:
    """Song et al. 2012, equation 5, term by term."""
    n = len(K)
    K, L, one = K - np.diag(np.diag(K)), L - np.diag(np.diag(L)), np.ones(n)
    return (
        np.trace(K @ L) + one @ K @ one * (one @ L @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ K @ L @ one)
    ) / (n * (n - 3))


def rbf(x: np.ndarray, bandwidth: float) -> np.ndarray:
    d = scipy.spatial.distance.squareform(scipy.spatial.distance.pdist(x))
    # The lower middle one, as torch has it.
    pairs = np.sort(d[np.triu_indices(len(d), 1)])
    return np.exp(-(d**2) / (2 * (bandwidth * pairs[(len(pairs) - 1) // 2]) ** 2))


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_cka_is_the_textbook_estimate_over_its_minibatches(kernel):
    batches = [[randn(2, 37, width, seed=10 * b + width) + 3.0 for width in (5, 8, 40)] for b in range(3)]
    for batch in batches:
        batch[1][..., :5] += batch[0]
    cka = CKA(kernel=kernel, size=20, bandwidth=0.7)
    for batch in batches:
        cka.update(batch)
    hsic, tokens = np.zeros((3, 3)), 0
    for batch in batches:
        flat = [one.double().flatten(0, 1).numpy() for one in batch]
        parts = torch.randperm(74, generator=generator(74)).tensor_split(4)  # as few as hold 20 at most
        for part in parts:
            taken = [one[part.numpy()] for one in flat]
            kernels = [(a @ a.T) if kernel == "linear" else rbf(a, 0.7) for a in taken]
            n = len(kernels[0])
            tokens += n
            for i, j in itertools.product(range(3), repeat=2):
                hsic[i, j] += n * hsic_1(kernels[i], kernels[j])
    want = hsic / np.sqrt(np.outer(hsic.diagonal(), hsic.diagonal()))
    got = cka.compute()
    assert int(cka.tokens[0]) == tokens == 222
    np.testing.assert_allclose(got["cka"], want, atol=2e-5)
    np.testing.assert_allclose(got["cka_next"][:2], [want[0, 1], want[1, 2]], atol=2e-5)
    assert math.isnan(got["cka_next"][2])


@given(n=st.integers(4, 30), seed=st.integers(0, 1000))
@some
def test_centred_grams_have_the_unbiased_products(n, seed):
    x, y = randn(n, 3, seed=seed).double(), randn(n, 5, seed=seed + 1).double() + 4
    P, Q = centred_gram(x), centred_gram(y)
    assert float((P * Q).sum()) / (n * (n - 3)) == pytest.approx(
        hsic_1((x @ x.T).numpy(), (y @ y.T).numpy()), rel=1e-6, abs=1e-6
    )


@pytest.mark.parametrize("shapes", [(100, 6, 9), (30, 50, 4), (5, 3, 3)])
def test_linear_cka_in_feature_space_is_the_one_of_gram_matrices(shapes):
    n, units, other = shapes
    x, y = related(3, n, units, other)
    got = folded(LinearCKA(), x + 20, y)
    K, L = ((a @ a.T).numpy() for a in (x.double(), y.double()))
    assert float(got["cka"]) == pytest.approx(hsic_1(K, L) / math.sqrt(hsic_1(K, K) * hsic_1(L, L)), rel=1e-6)
    H = np.eye(n) - 1 / n
    K, L = H @ K @ H, H @ L @ H
    biased = (K * L).sum() / np.linalg.norm(K) / np.linalg.norm(L)
    assert float(got["cka_biased"]) == pytest.approx(biased, rel=1e-6)


def test_unrelated_features_have_no_cka_however_wide_and_the_biased_one_is_fooled():
    x, y = randn(60, 400), randn(60, 400, seed=1)
    got = folded(LinearCKA(), x, y)
    assert float(got["cka_biased"]) > 0.8
    # Of 1770 pairs of rows; four standard errors of a correlation.
    assert abs(float(got["cka"])) < 4 / math.sqrt(1770)
    cka = CKA(size=30)
    for seed in range(20):
        cka.update([randn(1, 60, 400, seed=seed), randn(1, 60, 300, seed=100 + seed)])
    assert abs(float(cka.compute()["cka"][0, 1])) < 4 / math.sqrt(20 * 2 * 435)


def test_minibatches_are_without_bias():
    x, y = related(5, 3000)
    whole = float(folded(LinearCKA(), x, y)["cka"])
    small = CKA(size=8)
    small.update([x[None], y[None]])
    assert float(small.compute()["cka"][0, 1]) == pytest.approx(whole, abs=0.02)


def test_minibatches_do_not_put_the_same_positions_together():
    # Rows of one length that share their positions: what is common to a position must weigh as in all pairs.
    position, site = randn(1, 64, 30), [randn(8, 64, 30, seed=seed) for seed in (1, 2)]
    x = [one + position for one in site]
    cka = CKA(size=128)
    cka.update(x)
    whole = folded(LinearCKA(), *(one.flatten(0, 1) for one in x))
    assert float(cka.compute()["cka"][0, 1]) == pytest.approx(float(whole["cka"]), abs=0.03)


def test_cka_takes_real_finite_tokens_only_whatever_the_padding():
    x, y = (one.view(2, 20, -1) for one in related(1, 40))
    want = CKA(size=7)
    want.update([x, y])
    mask = torch.zeros(2, 25, dtype=torch.bool)
    mask[:, 3:23] = True
    padded = []
    for one in (x, y):
        wider = torch.full((2, 25, one.shape[-1]), math.nan)
        wider[:, 3:23] = one
        padded.append(wider)
    got = CKA(size=7)
    got.update(padded, mask)
    assert_same(got.compute(), want.compute(), atol=1e-5)
    broken, whole = x.clone(), torch.ones(2, 20, dtype=torch.bool)
    broken[1, 4, 0], whole[1, 4] = math.inf, False
    failing, without = CKA(size=7), CKA(size=7)
    failing.update([broken, y])
    without.update([x, y], whole)
    assert_same(failing.compute(), without.compute(), atol=1e-5)


def test_cka_merges_batches_pickles_and_says_nothing_of_three_tokens():
    first, second = ([one.view(2, 20, -1) for one in related(seed, 40)] for seed in (1, 50))
    both, parts = CKA(), [CKA(), CKA()]
    both.update(first), both.update(second)
    parts[0].update(first), parts[1].update(second)
    parts[0].merge_state(pickle.loads(pickle.dumps(parts[1])))
    assert_same(parts[0].compute(), both.compute())
    both.update([one[:1, :3] for one in first])  # adds nothing
    assert_same(parts[0].compute(), both.compute())
    few = CKA()
    few.update([one[:1, :3] for one in first])
    assert few.compute()["cka"].isnan().all()
    half = CKA()
    half.update([one.bfloat16() for one in first])
    full = CKA()
    full.update([one.bfloat16().float() for one in first])
    assert_same(half.compute(), full.compute())


def test_every_takes_positions_and_what_was_taken_is_a_copy():
    x, y = (one.view(2, 20, -1) for one in related(1, 40))
    taken, by_hand = CKA(every=3), CKA()
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[0, 15:] = False
    taken.update([x, y], mask)
    by_hand.update([x[:, ::3], y[:, ::3]], mask[:, ::3])
    assert_same(taken.compute(), by_hand.compute())
    z = x.clone()
    kept = CKA().prepare(z, None)
    z += 1
    assert torch.equal(kept.sort(0).values, x.flatten(0, 1).sort(0).values)


def test_padding_on_the_left_takes_the_same_tokens():
    x, y = (one.view(2, 20, -1) for one in related(1, 40))
    plain, padded = CKA(every=3, size=16), CKA(every=3, size=16)
    plain.update([x, y])
    left = [torch.nn.functional.pad(one, (0, 0, 5, 0), value=torch.nan) for one in (x, y)]
    padded.update(left, torch.arange(25).expand(2, -1) >= 5)
    assert_same(padded.compute(), plain.compute())


# -- the folds against other libraries ----------------------------------------------------------------------------


def test_cca_is_scikit_learns():
    from sklearn.cross_decomposition import CCA as Theirs

    x, y = related(2, 300, 4, 5)
    got = folded(CCA(), x, y)
    a, b = Theirs(n_components=4, scale=False, max_iter=20_000, tol=1e-12).fit_transform(x.numpy(), y.numpy())
    want = [np.corrcoef(a[:, i], b[:, i])[0, 1] for i in range(4)]
    np.testing.assert_allclose(got["correlations"], want, atol=1e-3)  # theirs iterates
    assert float(got["cca"]) == pytest.approx(np.mean(want), abs=1e-3)


def test_svcca_is_cca_of_the_leading_directions():
    x, y = related(4, 400, 12, 10)
    x = x * torch.logspace(0, -3, 12)
    reduced = []
    for one in (x.double(), y.double()):
        centred = one - one.mean(0)
        u, s, _ = torch.linalg.svd(centred, full_matrices=False)
        k = int(((s**2).cumsum(0) / (s**2).sum() < 0.99).sum()) + 1
        reduced.append(u[:, :k] * s[:k])
    got, want = folded(SVCCA(), x, y), folded(CCA(), *reduced)
    assert int(got["cca_directions_x"]) == reduced[0].shape[1] < 12
    torch.testing.assert_close(got["correlations"], want["correlations"], rtol=1e-6, atol=1e-8)


def test_a_planted_shared_subspace_has_as_many_correlations():
    n, shared = 4000, 3
    z = randn(n, shared)
    x = torch.cat([z, randn(n, 5, seed=1)], 1) @ randn(8, 8, seed=2)
    y = torch.cat([z, randn(n, 7, seed=3)], 1) @ randn(10, 10, seed=4)
    got = folded(CCA(), x, y)["correlations"]
    assert bool((got[:shared] > 0.9999).all())
    # What is left is chance: the largest canonical correlation of 5 and 7 unrelated directions.
    assert float(got[shared]) < 2 * math.sqrt(12 / n)
    ridged = folded(CCA(ridge=1.0), x, y)["correlations"]
    assert float(ridged[0]) < float(got[0])


def test_procrustes_is_scipys():
    x, y = related(6, 80, 5, 5)
    _, _, disparity = scipy.spatial.procrustes(x.double().numpy(), y.double().numpy())
    got = folded(Procrustes(), x, y)
    # Theirs scales the second as well as it can, so what remains is one minus the square.
    assert 1 - float(got["procrustes"]) ** 2 == pytest.approx(disparity, rel=1e-9)
    assert float(got["procrustes_angle"]) == pytest.approx(math.acos(math.sqrt(1 - disparity)))
    narrow = folded(Procrustes(), x[:, :2], y)
    padded = folded(Procrustes(), torch.cat([x[:, :2], torch.zeros(80, 3)], 1), y)
    assert float(narrow["procrustes"]) == pytest.approx(float(padded["procrustes"]))


@pytest.mark.parametrize("distance", ["correlation", "cosine", "euclidean"])
@pytest.mark.parametrize("compare_by", ["spearman", "pearson"])
def test_rsa_is_scipys(distance, compare_by):
    x, y = related(7, 40)
    x[5] = x[4]  # a tie
    a, b = (scipy.spatial.distance.pdist(one.double().numpy(), distance) for one in (x, y))
    np.testing.assert_allclose(dissimilarities(x.double(), distance), a, atol=1e-7)
    correlate = scipy.stats.spearmanr if compare_by == "spearman" else scipy.stats.pearsonr
    got = folded(RSA(distance=distance, compare=compare_by), x, y)
    if compare_by == "spearman":  # ties are ties in spite of rounding, which scipy's distances leave to chance
        a, b = (np.round(one / one.max(), 12) for one in (a, b))
    assert float(got["rsa"]) == pytest.approx(correlate(a, b).statistic, abs=1e-6)


def test_mutual_neighbours_are_scikit_learns():
    from sklearn.neighbors import NearestNeighbors

    x, y = related(8, 50)
    sets = []
    for one in (x, y):
        found = NearestNeighbors(n_neighbors=7, metric="cosine").fit(one.numpy())
        sets.append(found.kneighbors(return_distance=False))
    want = np.mean([len(set(a) & set(b)) / 7 for a, b in zip(*sets, strict=True)])
    got = folded(MutualKNN(k=7), x, y)
    assert float(got["mutual_knn"]) == pytest.approx(want)
    unrelated = folded(MutualKNN(k=10, size=400), randn(400, 20), randn(400, 20, seed=1))
    assert float(unrelated["mutual_knn"]) == pytest.approx(float(unrelated["mutual_knn_chance"]), abs=0.01)


# -- what all have in common --------------------------------------------------------------------------------------

every = pytest.mark.parametrize("metric", METRICS)


@every
@given(seed=st.integers(0, 500), cut=st.integers(1, 59))
@some
def test_merging_is_folding_the_whole_and_order_does_not_matter(metric, seed, cut):
    x, y = related(seed, 60)
    parts, whole = [FOLDS[metric](), FOLDS[metric]()], folded(FOLDS[metric](), x, y)
    parts[0].update(x[:cut], y[:cut]), parts[1].update(x[cut:], y[cut:])
    parts[0].merge_state(parts[1])
    assert_same(parts[0].compute(), whole, rtol=1e-6, atol=1e-6)
    order = torch.randperm(60, generator=generator(seed))
    assert_same(folded(FOLDS[metric](), x[order], y[order]), whole, rtol=1e-6, atol=1e-6)


@every
def test_rotation_and_scale_do_not_matter(metric):
    x, y = related(9, 60)
    x, y = x - x.mean(0), y - y.mean(0)
    # Correlation distances are over units, which a rotation mixes.
    options = {"distance": "euclidean"} if metric == "rsa" else {"k": 5} if metric == "mutual_knn" else {}
    want = similarity(x, y, metric, **options)
    assert similarity(x @ rotation(6) * 3, y @ rotation(9), metric, **options) == pytest.approx(want, abs=2e-4)
    assert similarity(x, x @ rotation(6) * 0.1, metric, **options) == pytest.approx(1, abs=1e-4)
    assert similarity(y, x, metric, **options) == pytest.approx(want, abs=1e-6)
    assert similarity(x, y[torch.randperm(60, generator=generator())], metric, **options) < want


@every
def test_rows_that_are_not_finite_are_left_out_and_numpy_is_welcome(metric):
    x, y = related(9, 60)
    options = {"k": 5} if metric == "mutual_knn" else {}
    want = similarity(x[1:-1].numpy(), y[1:-1].numpy(), metric, **options)
    x[0, 0], y[-1, 2] = math.nan, math.inf
    assert similarity(x, y, metric, **options) == pytest.approx(want)


@pytest.mark.parametrize("rows", [7, 300, 1001])
@pytest.mark.parametrize("scale", [1.0, 1000.0])
@pytest.mark.parametrize("metric", ["cka", "rsa", "cca", "svcca", "procrustes"])
def test_features_that_are_the_same_in_every_row_are_like_nothing(metric, scale, rows):
    # None of these is a binary fraction, so that sums of many are rounded.
    same, x = scale * (3.7 + 0.1 * torch.arange(6)).expand(rows, 6), randn(rows, 4)
    for a, b in ((same, x), (x, same), (same, same)):
        if metric in ("cka", "rsa"):
            assert math.isnan(similarity(a, b, metric))
        else:
            with pytest.raises(MeasureError, match="same in every row"):
                similarity(a, b, metric)
    assert math.isnan(folded(LinearCKA(), same, x)["cka_biased"])


@pytest.mark.parametrize("metric", ["cka", "cca", "procrustes"])
def test_a_large_mean_changes_nothing_or_is_refused(metric):
    x, y = related(3, 300)
    want = similarity(x, y, metric)
    for mean in (1e2, 1e6):
        # In float64, which holds these sums: x + 1e6 rounds x to 1e-10.
        assert similarity(x.double() + mean, y.double() - mean, metric) == pytest.approx(want, rel=1e-6)
    if metric == "cka":
        with pytest.raises(MeasureError, match="subtract a constant"):
            folded(FOLDS[metric](), x.double() + 1e6, y.double())
    assert float(folded(FOLDS[metric](), x.double() + 1e2, y.double())[metric]) == pytest.approx(want, rel=1e-6)


def test_a_unit_that_never_changes_changes_nothing():
    x, y = related(3, 300)
    with_constant = torch.cat([x, torch.full((300, 1), 370.1)], 1)
    for metric in ("cka", "cca", "procrustes"):
        # 1e-16 of the fourth power of a mean of 370 deviations.
        assert similarity(with_constant, y, metric) == pytest.approx(similarity(x, y, metric), rel=1e-6)


@pytest.mark.parametrize("distance", ["correlation", "cosine", "euclidean"])
@pytest.mark.parametrize("compare_by", ["spearman", "pearson"])
def test_equal_distances_rank_nothing(distance, compare_by):
    x, corners = randn(9, 9), 3.3 * torch.eye(9)
    assert folded(RSA(distance, compare_by), corners, x)["rsa"].isnan()


@every
def test_too_few_rows_say_how_many_are_needed(metric):
    with pytest.raises(MeasureError, match=r"needed|needs? \d+"):
        similarity(randn(2, 6), randn(2, 9), metric)


def test_what_does_not_pair_is_refused():
    with pytest.raises(MeasureError, match="same rows"):
        similarity(randn(5, 3), randn(6, 3))
    with pytest.raises(MeasureError, match="no metric 'ckaa'"):
        similarity(randn(5, 3), randn(5, 3), "ckaa")
    with pytest.raises(MeasureError, match="floating"):
        similarity(torch.ones(5, 3, dtype=torch.long), randn(5, 3))
    with pytest.raises(MeasureError, match="same in every row"):
        similarity(torch.ones(50, 3), randn(50, 3), "cca")
    with pytest.raises(MeasureError, match="more than 15"):
        similarity(randn(15, 6), randn(15, 9), "cca")
    with pytest.raises(MeasureError, match="same tokens"):
        CKA().update([randn(1, 5, 3), randn(1, 6, 3)])
    with pytest.raises(MeasureError, match="kernel"):
        CKA(kernel="poly")


def test_a_reservoir_of_pairs_keeps_pairs():
    x = torch.arange(3000.0)[:, None] + torch.zeros(1, 4)
    sample = MutualKNN(size=100)
    for part in x.split(700):
        sample.update(part, -part)
    a, b = sample.rows({"sample": sample.sample, "units": sample.units})
    assert len(a) == 100
    assert torch.equal(a, -b)


# -- models -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text() -> list[str]:
    return ["The value of the expression is an integer.", "def main(): return 0", "x = [1, 2, 3]", "A longer one. " * 6]


def test_cka_of_a_model_is_that_of_its_recording(text):
    model, sites = ac.demo(), "blocks.*.resid.post"
    table = model.measure(model.read(text, 4), {sites: CKA()})
    recording = model.record(text, sites)
    by_hand = CKA()
    by_hand.update([recording[f"blocks.{i}.resid.post"] for i in range(model.layers)], recording.mask)
    result = next(iter(table))
    torch.testing.assert_close(result.values["cka"], by_hand.compute()["cka"], rtol=0, atol=1e-5)
    assert table.value("cka_next").shape == (model.layers,)


@every
def test_a_model_is_compared_with_itself_and_with_another(metric, text):
    model, other, sites = ac.demo(), ac.demo(0), ["blocks.0.resid.post", "blocks.3.resid.post"]
    # The demo is too wide for canonical correlations of so few tokens, unless only a few directions are taken.
    options = {"variance": 0.3} if metric in ("cca", "svcca") else {"k": 3} if metric == "mutual_knn" else {}
    itself = compare(model, model, text, sites, metric=metric, **options)
    assert list(itself.columns) == ["site_a", "layer_a", "site_b", "layer_b", "measure", "value"]
    same = itself[itself.site_a == itself.site_b].value
    np.testing.assert_allclose(same, 1, atol=1e-5)
    apart = compare(model, other, text, sites, sites[:1], metric=metric, **options)
    assert len(apart) == 2
    assert bool((apart.value < 1).all())


def test_a_folds_similarity_is_that_of_the_real_tokens_of_both(text):
    model, other, site = ac.demo(), ac.demo(0), "blocks.1.resid.post"
    got = compare(model, other, text, site, metric="procrustes", batch_size=2).value[0]
    x, y = (torch.cat([one.record(t, site)[site].flatten(0, 1) for t in text]) for one in (model, other))
    assert got == pytest.approx(similarity(x, y, "procrustes"), abs=1e-5)


def test_comparing_what_is_not_there_is_refused(text):
    model = ac.demo()
    with pytest.raises(SiteError):
        compare(model, model, text, "blocks.99.resid.post")
    with pytest.raises(MeasureError, match="no metric"):
        compare(model, model, text, "blocks.0.resid.post", metric="nothing")
