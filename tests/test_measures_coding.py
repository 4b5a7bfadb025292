"""Codes, linear regions and filters: against brute force, closed forms of small nets, and the published formulas."""

from __future__ import annotations

import itertools
import math
import pickle

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from measured import generator
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

import actome
from actome.core.errors import MeasureError
from actome.measures.codes import ActivationCode, code_accuracy, codes_of, hamming
from actome.measures.filters import FilterQuality, convolutions, filter_drift, random_entropy, variance_entropy
from actome.measures.regions import region_diameter, regions_on_segment
from actome.tasks.nets import CNN, MLP

some = settings(max_examples=15, deadline=None)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-12, atol=1e-12, equal_nan=True)


def fold(*parts: Tensor, **options) -> ActivationCode:
    one = ActivationCode(**options)
    for part in parts:
        one.update(part)
    return one


# -- codes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("units", [4, 70])
def test_codes_are_what_a_dictionary_says(units):
    z = torch.randn(120, 6, generator=generator()) @ torch.randn(6, units, generator=generator(1))
    z[60:] = z[:60]
    z[:, 0], z[:, 1] = 1.0, -1.0
    got = fold(z[:50], z[50:]).compute()
    codes = [tuple(row) for row in (z > 0).tolist()]
    distinct = set(codes)
    assert int(got["distinct"]) == len(distinct)
    assert float(got["redundancy"]) == pytest.approx(1 - len(distinct) / 120)
    counts = [codes.count(c) for c in distinct]
    assert float(got["entropy"]) == pytest.approx(scipy.stats.entropy(counts, base=2))
    pairs = [np.mean(np.array(a) != np.array(b)) for a, b in itertools.combinations(codes, 2)]
    assert float(got["distance"]) == pytest.approx(np.mean(pairs))
    assert float(got["always_on"]) >= 1 / units
    assert float(got["always_off"]) >= 1 / units
    assert float(got["distinct_error"]) == float(got["entropy_error"]) == 0
    torch.testing.assert_close(got["frequency"], (z > 0).double().mean(0))


@given(seed=st.integers(0, 1000), cut=st.integers(1, 59), cap=st.sampled_from([16, 1 << 16]))
@some
def test_codes_merge_whatever_the_order(seed, cut, cap):
    z = torch.randn(60, 7, generator=generator(seed))
    a, b = fold(z[:cut], cap=cap), fold(z[cut:], cap=cap)
    a.merge_state(b)
    same(a.compute(), fold(z.flip(0), cap=cap).compute())
    same(pickle.loads(pickle.dumps(a)).compute(), a.compute())


def test_beyond_the_cap_counts_are_estimates_within_their_error_and_memory_is_bounded():
    z = torch.randn(30_000, 16, generator=generator())
    exact, estimate = fold(z), fold(*z.split(1000), cap=1000)
    assert len(estimate.codes) == 1001
    a, b = exact.compute(), estimate.compute()
    for name in ("distinct", "entropy"):
        assert b[f"{name}_error"] > 0
        assert abs(a[name] - b[name]) < 4 * b[f"{name}_error"]
    assert float(b["distinct_error"] / b["distinct"]) == pytest.approx(1000**-0.5, rel=0.05)
    assert a["distance"] == b["distance"]


def test_codes_of_several_layers_and_of_bad_rows():
    a, b = torch.randn(9, 3, generator=generator()), torch.randn(9, 5, generator=generator(1))
    assert torch.equal(codes_of([a, b]), torch.cat([a, b], 1) > 0)
    bad = torch.cat([a, torch.tensor([[torch.nan, 1.0, 1.0]])])
    same(fold(bad).compute(), fold(a).compute())
    same(fold(a.bfloat16()).compute(), fold(a.bfloat16().float()).compute())
    with pytest.raises(MeasureError, match="no common code"):
        codes_of([a, b[:3]])
    with pytest.raises(MeasureError, match="no finite row"):
        fold(torch.full((2, 3), torch.nan)).compute()
    assert fold(a[:1]).compute()["distance"].isnan()


def test_hamming_and_neighbours_are_those_of_scikit_learn():
    train, test = (torch.rand(n, 80, generator=generator(n)) > 0.5 for n in (200, 400))
    y = torch.randint(0, 4, (200,), generator=generator())
    direct = (test[:, None] != train[None]).sum(-1)
    assert torch.equal(hamming(test, train), direct.float())
    theirs = KNeighborsClassifier(9, metric="hamming", algorithm="brute").fit(train.numpy(), y.numpy())
    # Distances in bits tie often: where the ninth and tenth tie, the choice is free, so those rows are left out.
    ordered = direct.sort(dim=1).values
    clear = (ordered[:, 8] < ordered[:, 9]).numpy()
    assert clear.sum() > 10
    truth = torch.from_numpy(theirs.predict(test.numpy()))
    assert code_accuracy(train, y, test[clear], truth[clear]).knn == 1.0


def test_codes_of_planted_classes_are_categorised_and_random_ones_are_not():
    y = torch.arange(300) % 3
    prototypes = torch.rand(3, 40, generator=generator()) > 0.5
    flips = torch.rand(300, 40, generator=generator(1)) < 0.1
    codes = prototypes[y] ^ flips
    good = code_accuracy(codes[:200], y[:200] + 5, codes[200:], y[200:] + 5)
    assert min(good.kmeans, good.knn, good.logistic) > 0.95
    chance = code_accuracy(flips[:200], y[:200], flips[200:], y[200:])
    assert max(chance.kmeans, chance.knn, chance.logistic) < 0.6
    for bad, message in (
        (lambda: code_accuracy(codes.float(), y, codes, y), "codes are bool"),
        (lambda: code_accuracy(codes, y[:5], codes, y), "do not fit"),
        (lambda: code_accuracy(codes[:5], y[:5], codes, y), "too few"),
    ):
        with pytest.raises(MeasureError, match=message):
            bad()


# -- regions ---------------------------------------------------------------------------------------------------------


def test_regions_of_one_hidden_layer_are_counted_by_its_hyperplanes():
    net = MLP([5, 40, 3], seed=3)
    start, end = torch.randn(2, 6, 5, generator=generator(), dtype=torch.float64) * 2
    with torch.no_grad():
        a, b = (net.linear[0].double()(x) for x in (start, end))
    # Each unit's border is a hyperplane, which a line crosses once at most.
    expected = 1 + ((a > 0) != (b > 0)).sum(1)
    assert torch.equal(regions_on_segment(net.float(), start, end), expected)
    assert len(expected.unique()) > 1


def test_regions_of_a_deep_net_are_those_of_a_fine_walk():
    net = MLP([2, 12, 12, 12, 1], seed=1).double()
    start, end = torch.tensor([[-2.0, 1.0]]), torch.tensor([[2.0, -0.5]])
    t = torch.linspace(0, 1, 200_001, dtype=torch.float64)[:, None]
    with torch.no_grad():
        x, codes = start.double() + t * (end - start).double(), []
        for linear in net.linear[:-1]:
            z = linear(x)
            codes.append(z > 0)
            x = z.relu()
    code = torch.cat(codes, 1)
    walked = 1 + int((code[1:] != code[:-1]).any(1).sum())
    assert regions_on_segment(net, start, end).tolist() == [walked]
    assert walked > 8
    assert regions_on_segment(actome.wrap(net.float()), start, end).tolist() == [walked]
    with pytest.raises(MeasureError, match="more than 3"):
        regions_on_segment(net, start, end, most=3)


def test_the_diameter_of_a_square_is_the_mean_chord_through_its_middle():
    # Rectifiers of x, y and their opposites around +-1: the region of the origin is a square of half-width 1.
    net = nn.Sequential(nn.Linear(2, 4), nn.ReLU())
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]))
        net[0].bias.fill_(1.0)
    got = float(region_diameter(net, torch.zeros(1, 2), directions=1000)[0])
    # A chord at angle a has length 2 / max(|cos a|, |sin a|): the mean is (8 / pi) asinh(1).
    expected = 8 / math.pi * math.asinh(1)
    # The lengths lie between 2 and 2.83 with a deviation of 0.25.
    assert got == pytest.approx(expected, abs=4 * 0.25 / 1000**0.5)


def test_diameters_agree_with_walking():
    net, x = MLP([3, 10, 10, 2], seed=2).double(), torch.randn(1, 3, generator=generator(), dtype=torch.float64)
    v = torch.randn(x.shape, generator=generator(7), dtype=torch.float64)
    v = v / v.norm()

    def code(t):
        with torch.no_grad():
            h, out = x + t * v, []
            for linear in net.linear[:-1]:
                z = linear(h)
                out.append(z > 0)
                h = z.relu()
        return torch.cat(out, 1)

    def reach(sign):
        low, high = 0.0, 0.0
        while torch.equal(code(sign * high), code(0.0)):
            high += 1e-3
        low = high - 1e-3
        for _ in range(40):
            mid = (low + high) / 2
            low, high = (mid, high) if torch.equal(code(sign * mid), code(0.0)) else (low, mid)
        return low

    assert float(region_diameter(net, x, directions=1, seed=7)[0]) == pytest.approx(reach(1) + reach(-1), rel=1e-6)


def test_a_single_region_is_infinite_and_models_without_rectifiers_are_refused():
    flat = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with torch.no_grad():
        flat[0].weight.zero_()
    assert region_diameter(flat, torch.zeros(1, 2)).tolist() == [math.inf]
    assert regions_on_segment(flat, torch.zeros(1, 2), torch.ones(1, 2)).tolist() == [1]
    with pytest.raises(MeasureError, match="no ReLU"):
        region_diameter(MLP([2, 3, 1], "tanh"), torch.zeros(1, 2))
    with pytest.raises(MeasureError, match="to the same"):
        regions_on_segment(flat, torch.zeros(1, 2), torch.ones(2, 2))


def test_regions_leave_the_model_as_it_was():
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(inplace=True), nn.Dropout(0.5)).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    region_diameter(net, torch.zeros(1, 2))
    assert net.training
    assert net[1].inplace
    assert not net[1]._forward_pre_hooks
    for name, value in net.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(before[name], value)


# -- filters -----------------------------------------------------------------------------------------------------------


def test_filter_quality_is_what_the_published_formulas_give():
    weight = torch.randn(12, 8, 3, 3, generator=generator())
    weight[:3] *= 1e-4
    got = FilterQuality().of(weight)
    rows = weight.double().numpy().reshape(96, 9)
    assert got.filters == 96
    assert got.sparsity == np.mean(np.abs(rows).max(1) < 0.01 * np.abs(rows).max()) == 0.25
    variance = np.linalg.svd(rows - rows.mean(0), compute_uv=False) ** 2
    assert got.entropy == pytest.approx(scipy.stats.entropy(variance, base=10))
    threshold = 1.2618047 / (1 + np.exp(-0.88767525 * (np.log2(96) - 2.30436435))) - 0.31050834
    assert got.entropy_ratio == pytest.approx(got.entropy / threshold)
    flat = weight.double().numpy().reshape(12, -1)
    unit = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    cos = np.abs(unit @ unit.T)
    assert got.orthogonality == pytest.approx(1 - cos[~np.eye(12, dtype=bool)].mean())


def test_random_filters_are_random_and_one_pattern_is_one_pattern():
    for n in (128, 1024, 8192):
        entropy = variance_entropy(torch.rand(n, 9, generator=generator(n)))
        # The fit is of the least entropy that random filters have, up to 0.015 below their mean at 128.
        assert 0.99 < entropy / random_entropy(n) < 1.02
    one = torch.randn(1, 9, generator=generator()) * torch.randn(200, 1, generator=generator(1))
    assert variance_entropy(one) < 1e-6
    assert variance_entropy(torch.ones(5, 9)) == 0


def test_layers_are_listed_and_odd_ones_told():
    table = FilterQuality().measure(CNN([1, 16, 32], 10))
    assert table.layer.tolist() == ["conv.0", "conv.1"]
    assert table.filters.tolist() == [16, 512]
    assert math.isnan(table.entropy_ratio[0])
    assert 0.98 < table.entropy_ratio[1] < 1.03
    wrapped = FilterQuality().measure(actome.wrap(CNN([1, 16, 32], 10)))
    assert wrapped.equals(table)
    dead = FilterQuality().of(torch.zeros(8, 8, 3, 3))
    assert (dead.sparsity, dead.entropy) == (1.0, 0.0)
    assert math.isnan(FilterQuality().of(torch.ones(1, 64, 3, 3)).orthogonality)
    for bad, message in (
        (lambda: FilterQuality().of(torch.ones(3, 3)), "output, input"),
        (lambda: FilterQuality().of(torch.full((2, 2, 3, 3), torch.nan)), "NaN"),
        (lambda: convolutions(nn.Linear(2, 2)), "no 3x3"),
    ):
        with pytest.raises(MeasureError, match=message):
            bad()


def test_drift_is_the_weighted_symmetric_divergence():
    a, b = (
        torch.randn(400, 9, generator=generator()),
        torch.randn(300, 9, generator=generator(1)) * torch.linspace(0.2, 2, 9),
    )
    got = filter_drift(a, b)
    rows = [x.double().numpy() / np.abs(x.double().numpy()).max(1, keepdims=True) for x in (a, b)]
    both = np.concatenate(rows)
    _, s, v = np.linalg.svd(both - both.mean(0), full_matrices=False)
    ratio, total = s**2 / (s**2).sum(), 0.0
    for share, axis in zip(ratio, v, strict=True):
        along = [(one - both.mean(0)) @ axis for one in rows]
        edges = (min(x.min() for x in along), max(x.max() for x in along))
        p, q = (np.maximum(np.histogram(x, 70, edges)[0] / len(x), np.finfo(np.float32).eps) for x in along)
        total += share * (np.sum(p * np.log(p / q)) + np.sum(q * np.log(q / p)))
    # A filter on the border between two bins may be rounded to either.
    assert got == pytest.approx(total, rel=0.02)
    assert filter_drift(b, a) == pytest.approx(got, rel=0.02)
    assert filter_drift(a, 5 * a) == 0


def test_drift_grows_with_the_planted_shift_and_takes_models():
    a = torch.randn(2000, 9, generator=generator())
    shifted = [filter_drift(a, torch.randn(2000, 9, generator=generator(1)) + shift) for shift in (0.0, 0.3, 1.0)]
    assert shifted[0] < 0.2 < shifted[1] < shifted[2]
    nets = [CNN([1, 32, 32], 10, seed=seed) for seed in (0, 1)]
    assert filter_drift(*nets) < 0.5
    assert filter_drift(nets[0], nets[0]) == 0
    assert filter_drift(torch.ones(40, 9), torch.ones(50, 9)) == 0
    with pytest.raises(MeasureError, match="32 filters or more"):
        filter_drift(a[:10], a)
