"""Spectra: against decompositions of the whole tensor, planted spectra, closed forms and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.spatial.distance
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from measured import assert_same, generator
from torch import Tensor

import actome as ac
from actome.core.errors import MeasureError
from actome.core.sites import Site
from actome.measures import (
    EffectiveRank,
    HypersphericalEnergy,
    MatrixEntropy,
    Spectrum,
    Stiffness,
    hyperspherical_energy,
)
from actome.measures.diversity import random_energy
from actome.measures.moments import eigenvalues, moments
from actome.measures.reservoir import kept, keyed, smallest
from actome.measures.sketch import directions, nystrom, sketch
from actome.measures.spectral import Eigenvalues, power_law, scaling_fit

some = settings(max_examples=12, deadline=None)
# Exact, sketched, and subsampled: what every algebraic test goes through.
FORMS = {
    "exact": Spectrum,
    "sketch": lambda: Spectrum(max_width=8, sketch=16),
    "every": lambda: Spectrum(every=3),
    "sketch every": lambda: Spectrum(max_width=8, sketch=16, every=2),
    "entropy": MatrixEntropy,
    "entropy sketch": lambda: MatrixEntropy(order=2, max_width=8, sketch=16),
    "energy": lambda: HypersphericalEnergy(size=16),
    "energy log": lambda: HypersphericalEnergy(s=0, size=16, centre=True),
}
every_form = pytest.mark.parametrize("form", FORMS)


def values(measure, x: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    measure.update(x, mask)
    return measure.compute()


def decaying(seed: int = 0, shape=(4, 60, 24), power: float = 0.5, mean: float = 1.0) -> Tensor:
    x = torch.randn(shape, generator=generator(seed))
    return x * torch.arange(1, shape[-1] + 1.0) ** -power + mean


# -- ranks of a known matrix --------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [12, 300])
@pytest.mark.parametrize("mean", [0.0, 50.0])
def test_the_spectrum_is_that_of_numpys_covariance(width, mean):
    x = decaying(0, (4, 200, width), 0.5, mean)
    got, a = values(Spectrum(keep=1000), x), x.double().numpy().reshape(-1, width)
    eigen = np.linalg.eigvalsh(np.cov(a.T))[::-1]
    p = eigen / eigen.sum()
    hard, soft = 1 / (p**2).sum(), np.exp(scipy.stats.entropy(p))
    singular = np.linalg.svd(a, compute_uv=False)
    # Products are float32: about 1e-6 of the scatter.
    want = {
        "effective_rank": np.exp(scipy.stats.entropy(singular)),
        "participation_ratio": hard,
        "shannon_rank": soft,
        "participation_utilisation": hard / width,
        "shannon_utilisation": soft / width,
        "sui": scipy.stats.hmean([hard / width, soft / width]),
        "spectral_concentration": p[: math.ceil(0.1 * width)].sum(),
        "stable_rank": np.linalg.norm(a - a.mean(0)) ** 2 / np.linalg.norm(a - a.mean(0), 2) ** 2,
        "tokens_per_unit": 800 / width,
        "sketch_error": 0,
    }
    for name, value in want.items():
        assert float(got[name]) == pytest.approx(value, rel=2e-4), name
    np.testing.assert_allclose(got["spectrum"], p, rtol=1e-3, atol=1e-6)


def test_effective_rank_in_the_spectrum_is_the_measure_of_that_name():
    x = decaying(3, (3, 50, 40), 1.0, 5.0)
    ours, theirs = values(Spectrum(), x), values(EffectiveRank(), x)
    for name in theirs:
        assert float(ours[name]) == float(theirs[name])


@given(units=st.integers(1, 40), tokens=st.integers(1, 60), mean=st.sampled_from([0.0, 1.0, 1000.0]))
@some
def test_one_reduction_gives_the_eigenvalues_of_both_moments(units, tokens, mean):
    x = torch.randn(tokens, units, generator=generator(units), dtype=torch.float64) + mean
    total, moment = moments(x)
    centred, around_zero = eigenvalues(moment, total, torch.tensor(float(tokens)))
    scatter = (x - x.mean(0)).T @ (x - x.mean(0))
    for ours, matrix in ((centred, scatter), (around_zero, x.T @ x)):
        want = np.linalg.eigvalsh(matrix.numpy())[::-1]
        # The floor of float32 products is applied to float64 ones as well.
        atol = 1e-7 * float(scatter.norm()) + 2e-13 * float((x.T @ x).norm())
        np.testing.assert_allclose(ours, want, atol=atol, rtol=1e-9)


@pytest.mark.parametrize("measure", [Spectrum(), Spectrum(max_width=8, sketch=16)], ids=["exact", "sketch"])
def test_what_does_not_vary_has_no_spectrum_however_large_it_is(measure):
    got = values(measure, (1000 * torch.randn(24, generator=generator())).expand(2, 5, 24))
    for name in ("shannon_rank", "participation_ratio", "stable_rank", "alpha", "spectral_concentration"):
        assert math.isnan(got[name]), name
    assert float(got["effective_rank"]) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_the_exponent_of_a_planted_power_law_is_found(alpha):
    # Rows whose second moment is exactly diagonal, so that nothing is left to chance: plus and minus each axis.
    for units, fit in ((120, None), (24, None), (120, (5, 80))):
        x = torch.diag(torch.arange(1, units + 1.0) ** (-alpha / 2))
        got = values(Spectrum(fit=fit), torch.cat([x, -x])[None])
        assert float(got["alpha"]) == pytest.approx(alpha, rel=1e-4)
        assert float(got["alpha_r2"]) == pytest.approx(1, abs=1e-6)


def test_alpha_is_not_told_from_too_few_eigenvalues_nor_from_the_noise():
    assert math.isnan(values(Spectrum(), decaying(shape=(1, 9, 30)))["alpha"])
    assert not math.isnan(values(Spectrum(), decaying(shape=(1, 30, 30)))["alpha"])
    low = torch.randn(4, 100, 3, generator=generator()) @ torch.randn(3, 200, generator=generator(1))
    assert math.isnan(values(Spectrum(fit=(2, 60)), low)["alpha"])
    assert math.isnan(values(Spectrum(), low)["alpha"])


@pytest.mark.parametrize("rank", [1, 4, 11])
def test_a_planted_rank_is_seen_by_every_rank(rank):
    q = torch.linalg.qr(torch.randn(64, rank, generator=generator())).Q
    x = torch.randn(40, 64, rank, generator=generator(1)) @ q.T + 3.0
    for measure in (Spectrum(), Spectrum(max_width=8, sketch=32)):
        got = values(measure, x)
        for name in ("participation_ratio", "shannon_rank", "stable_rank"):
            # Of 2560 tokens the largest eigenvalue is up to (1 + sqrt(11 / 2560))^2 = 1.14 times the true one.
            assert float(got[name]) == pytest.approx(rank, rel=0.14)
        assert float(got["shannon_rank"]) >= float(got["participation_ratio"]) * (1 - 1e-6)
        assert float(got["sketch_error"]) == pytest.approx(0, abs=1e-6)


# -- sketches -----------------------------------------------------------------------------------------------------


def test_what_a_sketch_misses_is_told_exactly():
    x = decaying(1, (1, 500, 96), 0.7, 2.0)[0].double()
    both = directions(96, 32, 0, x.device)
    total, sketched, square = sketch(x, both)
    assert float(square) == pytest.approx(float(x.square().sum()))
    torch.testing.assert_close(sketched, x.T @ x @ both.double())
    n = torch.tensor(500.0, dtype=torch.float64)
    for eigen, rows in zip(
        nystrom(sketched, both, square, total, n, torch.tensor(500)), (x - x.mean(0), x), strict=True
    ):
        assert float(eigen.trace) == pytest.approx(float(rows.square().sum()))
    # Fewer tokens than columns: nothing is missed.
    few = x[:20]
    total, sketched, square = sketch(few, both)
    count = torch.tensor(20)
    around_zero = nystrom(sketched, both, square, total, count.double(), count)[1]
    want = np.linalg.svd(few.numpy(), compute_uv=False) ** 2
    np.testing.assert_allclose(around_zero.known[:20], want, rtol=1e-6)
    assert float(around_zero.rest) == 0


@pytest.mark.parametrize("spectrum", ["power 0.5", "power 1", "power 2", "flat", "spiked"])
def test_sketched_ranks_are_near_the_exact_ones(spectrum):
    units, k = 512, torch.arange(1, 513.0)
    eigen = {"flat": torch.ones(units), "spiked": torch.ones(units).index_fill(0, torch.arange(5), 900.0)}
    eigen |= {f"power {one}": k ** -float(one) for one in ("0.5", "1", "2")}
    x = torch.randn(8, 512, units, generator=generator()) * eigen[spectrum].sqrt() + 0.1
    exact, sketched = values(Spectrum(), x), values(Spectrum(max_width=8, sketch=128), x)
    # The documented accuracies; the sketch is a quarter of the width.
    for name, rel in {"participation_ratio": 0.05, "shannon_rank": 0.25}.items():
        assert float(sketched[name]) == pytest.approx(float(exact[name]), rel=rel), name
    if spectrum != "flat":
        assert float(sketched["stable_rank"]) == pytest.approx(float(exact["stable_rank"]), rel=0.05)
    if spectrum in ("power 1", "power 2"):
        assert float(sketched["alpha"]) == pytest.approx(float(exact["alpha"]), rel=0.1)
    assert math.isnan(sketched["spectral_concentration"]) or float(sketched["spectral_concentration"]) == pytest.approx(
        float(exact["spectral_concentration"]), rel=0.05
    )


def test_wide_sites_are_sketched_unless_that_is_refused():
    site = Site("blocks.0.mlp.act", ("batch", "pos", "d_mlp"), (None, None, 9), 0)
    assert EffectiveRank(max_width=8).fits(site) is None
    reason = EffectiveRank(max_width=8, sketch=None).fits(site)
    assert reason is not None
    assert "max_width=8" in reason
    with pytest.raises(MeasureError, match="sketch=256"):
        EffectiveRank(max_width=8, sketch=None).update(torch.ones(1, 2, 9))
    # No wider than the sketch itself: exact all the same.
    x = decaying(shape=(2, 40, 24))
    small = values(EffectiveRank(max_width=8), x)
    assert float(small["effective_rank"]) == float(values(EffectiveRank(), x)["effective_rank"])
    wide = Spectrum(max_width=8, sketch=16)
    wide.update(x)
    assert wide.moment.shape == (24, 16)


# -- the algebra --------------------------------------------------------------------------------------------------


@every_form
@given(seed=st.integers(0, 1000), cut=st.integers(1, 3))
@some
def test_merging_is_measuring_the_whole(form, seed, cut):
    x, make = decaying(seed, (4, 12, 24)), FORMS[form]
    one, other, whole = make(), make(), values(make(), x)
    one.update(x[:cut]), other.update(x[cut:])
    one.merge_state(other)
    assert_same(one.compute(), whole, rtol=1e-3, atol=1e-5)
    assert_same(values(make(), x.flip(0)), whole, rtol=1e-3, atol=1e-5)


@every_form
@given(left=st.integers(0, 3), right=st.integers(0, 3), fill=st.sampled_from([math.nan, 1e30]))
@some
def test_padding_never_changes_a_number(form, left, right, fill):
    x, make = decaying(2, (3, 12, 24)), FORMS[form]
    padded = torch.full((3, 12 + left + right, 24), fill)
    padded[:, left : left + 12] = x
    mask = torch.zeros(padded.shape[:2], dtype=torch.bool)
    mask[:, left : left + 12] = True
    assert_same(values(make(), padded, mask), values(make(), x), rtol=1e-3, atol=1e-5)


@every_form
def test_stacks_bfloat16_and_degenerate_streams(form):
    make, x = FORMS[form], decaying(4, (2, 3, 12, 24))
    stacked = make()
    stacked.update(x)
    for layer, got in enumerate(zip(*stacked.compute().values(), strict=True)):
        alone = values(make(), x[layer])
        assert_same(dict(zip(alone, got, strict=True)), alone, rtol=1e-3, atol=1e-5)
    half = x[0].bfloat16()
    assert_same(values(make(), half), values(make(), half.float()))
    for few in (x[0, :1, :1], torch.full((2, 5, 24), 3.0), torch.zeros(2, 5, 24)):
        assert not any(one.isinf().any() for one in values(make(), few).values())
    nothing = make()
    nothing.update(x[0], torch.zeros(3, 12, dtype=torch.bool))
    assert all(one.isnan().all() for name, one in nothing.compute().items() if name not in ("energy_random",))
    broken = x[0].clone()
    broken[1, 11, 3] = math.inf
    without = torch.ones(3, 12, dtype=torch.bool)
    without[1, 11] = False
    assert_same(values(make(), broken), values(make(), x[0], without), rtol=1e-3, atol=1e-5)


def test_taking_every_kth_token_weighs_the_first_as_the_whole_does():
    # A first token unlike all others: what the subsample says must not depend on how often it is taken.
    x = torch.randn(6, 40, 24, generator=generator())
    x[:, 0] += 50.0
    whole, taken = values(Spectrum(), x), values(Spectrum(every=4), x)
    assert int(taken["tokens_per_unit"] * 24) == 60
    for name in ("stable_rank", "participation_ratio"):
        assert float(taken[name]) == pytest.approx(float(whole[name]), rel=0.05)
    by_hand = torch.cat([x[:, 0], *[x[:, 4::4].flatten(0, 1)] * 4]).view(1, -1, 24)
    assert float(taken["shannon_rank"]) == pytest.approx(float(values(Spectrum(), by_hand)["shannon_rank"]), rel=1e-4)


# -- matrix entropy -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1.0, 2.0, 0.5])
@pytest.mark.parametrize(("tokens", "units"), [(30, 80), (200, 16)])
def test_matrix_entropy_is_that_of_the_gram_matrix_of_tokens(order, tokens, units):
    x = decaying(5, (1, tokens, units), 0.5)
    h = torch.nn.functional.normalize(x[0].double(), dim=1)
    eigen = np.linalg.eigvalsh((h @ h.T / tokens).numpy()).clip(1e-12)
    want = scipy.stats.entropy(eigen) if order == 1 else np.log((eigen**order).sum()) / (1 - order)
    got = values(MatrixEntropy(order=order), x)
    # Order 1/2 weighs eigenvalues near the rounding, which count as 0.
    assert float(got["matrix_entropy"]) == pytest.approx(want, rel=1e-4 if order >= 1 else 1e-3)
    assert float(got["matrix_entropy_share"]) == pytest.approx(want / np.log(min(tokens, units)), rel=1e-3)


@given(scale=st.floats(1e-3, 1e3))
@some
def test_matrix_entropy_does_not_see_norms(scale):
    x = decaying(6)
    scaled = x * scale * torch.rand(4, 60, 1, generator=generator()).add(0.1)
    torch.testing.assert_close(
        values(MatrixEntropy(), scaled)["matrix_entropy"],
        values(MatrixEntropy(), x)["matrix_entropy"],
        rtol=1e-5,
        atol=0,
    )


def test_the_fit_of_a_power_law_weighs_every_stretch_of_ranks_alike():
    law = decaying(3, (1, 400, 120)).double()[0]
    known = torch.linalg.eigvalsh(law.T @ law).flip(0)
    rank = np.arange(11, 51)
    logs = known.log().numpy()[10:50]
    slope, at = np.polyfit(np.log(rank), logs, 1, w=rank**-0.5)  # of residuals, so the root of 1/rank
    mean = np.average(logs, weights=1 / rank)
    left, all_ = (np.average((logs - fit) ** 2, weights=1 / rank) for fit in (slope * np.log(rank) + at, mean))
    alpha, good = power_law(Eigenvalues.all(known, torch.tensor(120)))
    assert float(alpha) == pytest.approx(-slope, rel=1e-9)
    assert float(good) == pytest.approx(1 - left / all_, rel=1e-9)
    plain = -np.polyfit(np.log(rank), logs, 1)[0]
    assert abs(float(alpha) - plain) > 1e-3  # or nothing would be weighed here


# -- hyperspherical energy ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("s", [0.0, 1.0, 2.0])
def test_energy_is_the_sum_over_pairs(s):
    x = decaying(7, (1, 40, 9))
    got = values(HypersphericalEnergy(s=s), x)
    distance = scipy.spatial.distance.pdist(torch.nn.functional.normalize(x[0].double(), dim=1).numpy())
    want = -np.log(distance).mean() if s == 0 else (distance**-s).mean()
    assert float(got["energy"]) == pytest.approx(want, rel=1e-6)
    assert float(hyperspherical_energy(x[0], s)) == pytest.approx(want, rel=1e-6)
    cosine = scipy.spatial.distance.pdist(x[0].numpy(), lambda a, b: abs(a @ b) / np.linalg.norm(a) / np.linalg.norm(b))
    assert float(got["mean_abs_cosine"]) == pytest.approx(cosine.mean(), rel=1e-5)


@pytest.mark.parametrize(("units", "s"), [(4, 0.0), (4, 1.0), (5, 2.0), (50, 1.0)])
def test_the_energy_of_random_directions_is_what_simulation_gives(units, s):
    v = torch.nn.functional.normalize(torch.randn(400, 512, units, generator=generator()).double(), dim=-1)
    distance = (v[:, 0] - v[:, 1:].transpose(0, 1)).norm(dim=-1)
    want = -distance.log() if s == 0 else distance**-s
    # 204 400 pairs; five standard errors, taken as if those with a common vector were 400 independent ones.
    error = 5 * float(want.mean(0).std()) / math.sqrt(len(v))
    assert random_energy(units, s) == pytest.approx(float(want.mean()), abs=error)
    x = torch.randn(1, 512, units, generator=generator(1))
    assert abs(float(values(HypersphericalEnergy(s=s), x)["energy_excess"])) < 0.05
    assert float(values(HypersphericalEnergy(s=s), x.abs())["energy_excess"]) > 0.1


@pytest.mark.parametrize("units", [24, 300])
def test_vectors_that_begin_alike_are_sampled_whatever_their_order(units):
    x = torch.randn(200, units, generator=generator())
    x[:, : units // 2] = 0.0
    order = torch.randperm(200, generator=generator(1))
    assert torch.equal(kept(keyed(x, 20)), kept(keyed(x[order], 20)))


@pytest.mark.parametrize("centre", [False, True])
def test_zero_vectors_have_no_direction(centre):
    x = torch.randn(1, 30, 8, generator=generator())
    x = x - x.mean(1, keepdim=True) if centre else x
    silent = torch.cat([x, torch.zeros(1, 30, 8)], 1)
    got, want = (values(HypersphericalEnergy(centre=centre, size=30), one) for one in (silent, x))
    assert {name: float(value) for name, value in got.items()} == {name: float(value) for name, value in want.items()}
    assert hyperspherical_energy(silent[0]) == hyperspherical_energy(x[0])
    assert values(HypersphericalEnergy(), torch.zeros(1, 9, 8))["energy"].isnan()


def test_orthogonal_filters_and_equal_ones():
    assert float(hyperspherical_energy(torch.eye(7), 2.0)) == pytest.approx(0.5)
    twice = torch.cat([torch.eye(3), torch.eye(3)])[None]
    got = values(HypersphericalEnergy(), twice)
    assert float(got["identical_pairs"]) == pytest.approx(3 / 15)
    assert float(got["energy"]) == pytest.approx(2**-0.5)
    with pytest.raises(MeasureError, match="n >= 2"):
        hyperspherical_energy(torch.ones(1, 3))


def test_a_reservoir_is_a_fair_and_bounded_sample():
    x = torch.randn(3000, 5, generator=generator())
    x[:, 0] = torch.arange(3000.0)
    sample = kept(keyed(x, 500))[:, 0]
    assert len(sample.unique()) == 500
    # Uniform over the stream: Kolmogorov-Smirnov at 500 draws, 1 in 1000.
    assert scipy.stats.kstest(sample.numpy() / 3000, "uniform").pvalue > 1e-3
    merged = smallest(torch.cat([keyed(x[:100], 500), keyed(x[100:], 500)]), 500)
    assert torch.equal(kept(merged), kept(keyed(x, 500)))


# -- stiffness ----------------------------------------------------------------------------------------------------


def test_stiffness_is_what_its_definition_says():
    x = torch.randn(6, 3, 7, 10, generator=generator()).cumsum(0)
    got, a = Stiffness(), x.double()
    got.update(x)
    got = got.compute()
    index = (a[1:] - a[:-1]).norm(dim=-1) / a[:-1].norm(dim=-1)
    np.testing.assert_allclose(got["stiffness"][1:], index.mean((1, 2)), rtol=1e-5)
    np.testing.assert_allclose(got["stiffness_deviation"][1:], index.flatten(1).std(1, correction=0), rtol=1e-4)
    want = index.diff(dim=0).abs().sum(0).mean()
    assert float(got["stiffness_variation"][-1]) == pytest.approx(float(want), rel=1e-5)
    assert got["stiffness_variation"][:2].tolist() == [0, 0]


def test_stiffness_pads_merges_and_leaves_out():
    x = torch.randn(4, 3, 6, 5, generator=generator()).cumsum(0)
    whole, parts = Stiffness(), [Stiffness(), Stiffness()]
    whole.update(x)
    parts[0].update(x[:, :1]), parts[1].update(x[:, 1:])
    parts[0].merge_state(parts[1])
    assert_same(parts[0].compute(), whole.compute())
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[1, 5] = False
    broken, masked, failing = x.clone(), Stiffness(), Stiffness()
    broken[2, 1, 5, 0] = math.nan
    masked.update(x.index_fill(2, torch.tensor([5]), 0.0).where(mask[..., None], 1e9).where(mask[..., None], x), mask)
    failing.update(broken)
    reference = Stiffness()
    reference.update(x, mask)
    assert_same(failing.compute(), reference.compute())
    one = Stiffness()
    one.update(x[:2])  # a single step has no variation
    assert one.compute()["stiffness_variation"].tolist() == [0, 0]


@pytest.mark.parametrize("make", [lambda: Spectrum(leading=0), lambda: Spectrum(fit=(5, 6)), lambda: Spectrum(every=0),
                                  lambda: MatrixEntropy(order=0), lambda: HypersphericalEnergy(s=-1)])  # fmt: skip
def test_options_without_sense_are_refused(make):
    with pytest.raises(MeasureError):
        make()


def test_a_scaling_fit_is_scipys_line_through_logarithms():
    x, y = [16.0, 32.0, 64.0, 128.0], [3.0, 4.5, 5.0, 9.0]
    line = scipy.stats.linregress(np.log(x), np.log(y))
    assert scaling_fit(x, y) == pytest.approx((line.slope, line.rvalue**2))
    with pytest.raises(MeasureError, match="3 or more"):
        scaling_fit([1.0, 2.0], [1.0, 2.0])


def test_a_model_is_measured_at_narrow_and_wide_sites_together():
    model = ac.demo()
    text = ["The value of the expression is an integer. " * 4, "A list holds references to its items. " * 4]
    table = model.measure(text, {"blocks.*.mlp.act": [Spectrum(max_width=64, sketch=128), MatrixEntropy()]})
    recorded = model.record(text, "blocks.1.mlp.act")
    x = recorded["blocks.1.mlp.act"][recorded.mask].double().numpy() if recorded.mask is not None else None
    assert x is not None
    p = np.linalg.svd(x - x.mean(0), compute_uv=False) ** 2
    # 128 columns are more than there are tokens to vary, so the sketch misses little.
    assert float(table.value("participation_ratio", "blocks.1.mlp.act")) == pytest.approx(
        p.sum() ** 2 / (p**2).sum(), rel=0.02
    )
    assert "spectrum" not in set(table.frame["measure"])
