"""Forecasts of learning curves: distributions, priors, the network, the ensemble, their scores and stopping by them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.integrate import quad

from actome.core.errors import MeasureError
from actome.dynamics import (
    CURVE_FAMILIES,
    LCPFN,
    BarDistribution,
    CurveEnsemble,
    CurvePrior,
    GaussianMixture,
    LCPFNError,
    PFNConfig,
    curve_prior,
    extrapolate_curve,
    last_value_of,
    predictive_stop,
    score_extrapolations,
    stop_runs,
)
from actome.dynamics.bars import bar_log_density, tail_width

BORDERS = torch.tensor([-1.0, 0.0, 0.1, 0.5, 0.6, 1.0, 2.0], dtype=torch.float64)


def bars(seed: int = 0, *shape: int) -> BarDistribution:
    return BarDistribution(torch.randn(*shape, 6, generator=torch.Generator().manual_seed(seed)), BORDERS)


def mixture() -> GaussianMixture:
    return GaussianMixture([0.0, 1.0, 3.0], [1.0, 0.2, 0.5], [1.0, 2.0, 1.0])


# Distributions


@pytest.mark.parametrize("forecast", [bars(), mixture()], ids=["bars", "mixture"])
def test_distributions_against_numerical_integration(forecast):
    corners = [-1.0, 0.0, 0.1, 0.5, 0.6, 1.0, 2.0]

    def integral(f, low, high):
        inside = [one for one in corners if low < one < high]
        return quad(f, low, high, points=inside or None, limit=200)[0]

    def density(z):
        return float(forecast.log_prob(z).exp())

    assert integral(density, -12, 15) == pytest.approx(1, abs=1e-8)
    assert integral(lambda z: z * density(z), -12, 15) == pytest.approx(float(forecast.mean()), abs=1e-7)
    for y in (-1.7, 0.05, 0.99, 1.4):
        assert integral(density, -12, y) == pytest.approx(float(forecast.cdf(y)), abs=1e-8)
        below = integral(lambda z: float(forecast.cdf(z)) ** 2, -12, y)
        above = integral(lambda z: (1 - float(forecast.cdf(z))) ** 2, y, 15)
        assert float(forecast.crps(y)) == pytest.approx(below + above, abs=1e-7)
    for q in (1e-4, 0.03, 0.5, 0.9, 0.9999):
        assert float(forecast.cdf(forecast.quantile(q))) == pytest.approx(q, abs=1e-10)


@pytest.mark.parametrize("forecast", [bars(1, 3), mixture().affine(1.0, 0.0)], ids=["bars", "mixture"])
@pytest.mark.parametrize("scale", [2.0, -0.5])
def test_a_change_of_units_moves_everything_along(forecast, scale):
    turned = forecast.affine(scale, 3.0)
    y = torch.tensor(0.37)
    z = scale * y + 3
    torch.testing.assert_close(turned.log_prob(z), forecast.log_prob(y) - math.log(abs(scale)))
    torch.testing.assert_close(turned.cdf(z), forecast.cdf(y) if scale > 0 else 1 - forecast.cdf(y))
    torch.testing.assert_close(turned.mean(), scale * forecast.mean() + 3)
    torch.testing.assert_close(turned.crps(z), abs(scale) * forecast.crps(y))
    torch.testing.assert_close(turned.quantile(0.2), scale * forecast.quantile(0.2 if scale > 0 else 0.8) + 3)


def test_one_normal_is_scipy_s():
    one, normal = GaussianMixture([1.5], [0.7]), stats.norm(1.5, 0.7)
    assert float(one.log_prob(2.0)) == pytest.approx(normal.logpdf(2.0))
    assert float(one.cdf(2.0)) == pytest.approx(normal.cdf(2.0))
    assert float(one.quantile(0.9)) == pytest.approx(normal.ppf(0.9))
    # Gneiting and Raftery 2007, equation 21.
    z = (2.0 - 1.5) / 0.7
    closed = 0.7 * (z * (2 * stats.norm.cdf(z) - 1) + 2 * stats.norm.pdf(z) - 1 / math.sqrt(math.pi))
    assert float(one.crps(2.0)) == pytest.approx(closed)
    low, high = one.interval(0.8)
    assert (float(low), float(high)) == pytest.approx(normal.interval(0.8))


def test_the_right_forecast_has_the_best_expected_scores():
    truth = GaussianMixture([0.2], [0.5])
    y = 0.2 + 0.5 * torch.randn(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for wrong in (GaussianMixture([0.2], [0.7]), GaussianMixture([0.4], [0.5])):
        assert truth.log_prob(y).mean() > wrong.log_prob(y).mean()
        assert truth.crps(y).mean() < wrong.crps(y).mean()


def test_the_loss_of_bars_has_the_gradient_of_a_softmax():
    logits = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([-3.0, 0.05, 0.55, 1.7], dtype=torch.float64)
    bar_log_density(logits, BORDERS, y).sum().backward()
    hit = torch.eye(6, dtype=torch.float64)[[0, 1, 3, 5]]
    torch.testing.assert_close(logits.grad, hit - logits.detach().softmax(-1))
    # Tails are half-normals with half of their mass within the outer bar's width.
    assert float(bars().cdf(-1.0) / bars().cdf(0.0)) == pytest.approx(0.5)
    away = torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64)
    scales = torch.linspace(0.5, 3, 2001, dtype=torch.float64)
    best = scales[torch.distributions.HalfNormal(scales[:, None]).log_prob(away).sum(1).argmax()]
    assert float(tail_width(away)) == pytest.approx(float(best) * stats.halfnorm.ppf(0.5), rel=1e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BarDistribution(torch.zeros(5), BORDERS), "want .* bars"),
        (lambda: BarDistribution(torch.zeros(6), BORDERS.flip(0)), "to rise"),
        (lambda: bars().quantile(1.0), "strictly between"),
        (lambda: bars().interval(1.5), "probability of the interval"),
        (lambda: bars().affine(0.0, 1.0), "other than 0"),
        (lambda: GaussianMixture([0.0], [0.0]), "above 0"),
        (lambda: GaussianMixture([0.0, 1.0], [1.0, 1.0, 1.0]), "do not fit"),
    ],
)
def test_bad_distributions(make, message):
    with pytest.raises(MeasureError, match=message):
        make()


# The prior


def test_families_by_hand():
    x = np.array([1.0, 4.0])
    value = {
        "pow3": ((0.9, 0.4, 0.5), [0.5, 0.7]),
        "ilog2": ((0.8, 0.3), [0.8 - 0.3 / math.log(2), 0.8 - 0.3 / math.log(5)]),
        "janoschek": ((0.9, 0.1, 0.2, 1.5), [0.9 - 0.8 * math.exp(-0.2), 0.9 - 0.8 * math.exp(-1.6)]),
        "log_power": ((0.8, 0.0, -1.0), [0.4, 0.64]),
        "weibull": ((0.9, 0.1, 0.5, 2.0), [0.9 - 0.8 * math.exp(-0.25), 0.9 - 0.8 * math.exp(-4)]),
        "mmf": ((0.8, 0.2, 1.0, 1.0), [0.5, 0.68]),
        "vap": ((-1.0, -1.0, 0.5), [math.exp(-2), 2 * math.exp(-1.25)]),
        "loglog_linear": ((0.5, 1.5), [math.log(1.5), math.log(0.5 * math.log(4) + 1.5)]),
        "exp4": ((0.8, 1.0, 0.0, 0.5), [0.8 - math.exp(-1), 0.8 - math.exp(-2)]),
        "pow4": ((0.9, 1.0, 1.0, 1.0), [0.4, 0.7]),
        "hill3": ((0.8, 1.0, 4.0), [0.16, 0.4]),
    }
    assert set(value) == set(CURVE_FAMILIES)
    for name, (parameters, expected) in value.items():
        np.testing.assert_allclose(CURVE_FAMILIES[name].function(x, *parameters), expected)


def test_priors_of_parameters_are_scipy_s():
    expected = {
        ("pow3", "c"): stats.uniform(0, 1.25), ("pow3", "a"): stats.uniform(-0.6, 1.2),
        ("pow3", "alpha"): stats.lognorm(2), ("ilog2", "a"): stats.uniform(-0.5, 1),
        ("janoschek", "b"): stats.uniform(0, 2), ("janoschek", "k"): stats.lognorm(1, scale=math.exp(-2)),
        ("janoschek", "d"): stats.lognorm(0.5), ("vap", "c"): stats.loguniform(math.exp(-8), 1),
        ("mmf", "a"): stats.norm(0.8, 0.1),
    }  # fmt: skip
    rng = np.random.default_rng(0)
    for (family, name), wanted in expected.items():
        one = CURVE_FAMILIES[family].prior[name]
        u = one.draw(4000, rng)
        assert stats.kstest(one.value(u), wanted.cdf).pvalue > 1e-3
        # The density of u is that of the parameter times its derivative.
        u = u[:5]
        step = 1e-6
        slope = np.abs(one.value(u + step) - one.value(u - step)) / (2 * step)
        np.testing.assert_allclose(one.log_density(u), wanted.logpdf(one.value(u)) + np.log(slope), atol=1e-5)
    last = CURVE_FAMILIES["pow4"].prior["c"]
    assert stats.kstest(np.log(1 - last.value(last.draw(4000, rng))), stats.uniform(-5, 5).cdf).pvalue > 1e-3


def test_curves_of_the_prior_rise_within_the_unit_interval():
    curves = curve_prior(500, 40, seed=3)
    assert curves.clean.shape == curves.noisy.shape == (500, 40)
    assert (curves.clean >= 0).all()
    assert (curves.clean <= 1).all()
    assert (curves.clean[:, -1] > curves.clean[:, 0]).all()
    z = (curves.noisy - curves.clean) / curves.sigma[:, None]
    assert stats.kstest(z.ravel(), "norm").pvalue > 1e-3
    assert stats.kstest(np.log(curves.sigma), stats.norm(-4, 1).cdf).pvalue > 1e-3
    again = curve_prior(500, 40, seed=3)
    np.testing.assert_array_equal(curves.noisy, again.noisy)
    assert not np.array_equal(curves.noisy, curve_prior(500, 40, seed=4).noisy)


def test_a_vectorised_curve_is_the_weighted_sum_of_its_families():
    prior = CurvePrior(30)
    u, curve = prior.sample(4, np.random.default_rng(0))
    x = np.arange(1.0, 31)
    for row, seen in zip(u, curve, strict=True):
        _, w1, w2, w3, c, a, alpha, c2, a2, top, start, k, d = row
        expected = w1 * (c - a * x ** -np.exp(alpha)) + w2 * (c2 - a2 / np.log(x + 1))
        expected += w3 * (top - (top - start) * np.exp(-np.exp(k) * x ** np.exp(d)))
        np.testing.assert_allclose(seen, expected)


def test_bad_priors():
    with pytest.raises(MeasureError, match="nearest: pow"):
        curve_prior(3, families=["pow2"])
    with pytest.raises(MeasureError, match="2 steps"):
        curve_prior(3, 1)
    with pytest.raises(MeasureError, match="at least one curve"):
        curve_prior(0)


# The network


def test_the_shipped_network_knows_fresh_curves_of_the_prior():
    curves = curve_prior(400, 50, seed=4711).noisy
    forecast, truth = LCPFN.shipped().predict(curves[:, :10]), torch.from_numpy(curves[:, 10:])
    score = forecast.log_prob(truth).mean(1).numpy()
    rival = last_value_of(curve_prior(2000, 50, seed=4712).noisy, 10)
    rival_score = np.array([float(rival(row[:10], 40).log_prob(row[10:]).mean()) for row in curves])
    gain = score - rival_score
    # CARD.md says 1.81 on 2000 curves; their spread leaves a standard error of about 0.06 here.
    assert score.mean() == pytest.approx(1.81, abs=4 * score.std() / 20)
    assert gain.mean() - 3 * gain.std() / 20 > 0.2
    low, high = forecast.interval(0.9)
    assert 0.87 < float(((low <= truth) & (truth <= high)).double().mean()) < 0.94
    mixed = LCPFN.shipped().predict(np.roll(curves[:, :10], 1, axis=0))
    assert float(mixed.log_prob(truth).mean()) < score.mean() - 1


def test_order_tells_nothing_and_questions_do_not_see_each_other():
    net = LCPFN.shipped().net
    x, y = torch.rand(1, 9), torch.rand(1, 5)
    whole = net(x, y)
    turn = torch.tensor([3, 1, 4, 0, 2])
    shuffled = net(torch.cat([x[:, turn], x[:, 5:]], 1), y[:, turn])
    torch.testing.assert_close(whole, shuffled, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(whole[:, 2:3], net(torch.cat([x[:, :5], x[:, 7:8]], 1), y), atol=1e-4, rtol=1e-4)


def test_training_saves_loads_and_goes_on(tmp_path):
    small = PFNConfig(d_model=16, layers=1, heads=2, bars=20)
    seen: list[float] = []
    how = {"seq_len": 12, "steps": 60, "config": small, "lr": 1e-2, "seed": 1}
    pfn = LCPFN.pretrain(**how, on_step=lambda done, loss: seen.append(loss))
    again = LCPFN.pretrain(**how)
    assert np.mean(seen[-15:]) < np.mean(seen[:15]) - 0.2
    y = [0.2, 0.3, 0.35]
    assert torch.equal(pfn.predict(y).logits, again.predict(y).logits)
    pfn.save(tmp_path / "one.safetensors")
    loaded = LCPFN.load(tmp_path / "one.safetensors")
    assert torch.equal(loaded.predict(y).logits, pfn.predict(y).logits)
    assert (loaded.seq_len, loaded.recipe) == (12, pfn.recipe)
    before = pfn.net.read.weight.clone()
    on = LCPFN.pretrain(seq_len=12, steps=5, seed=2, start=pfn)
    assert torch.equal(pfn.net.read.weight, before)
    assert not torch.equal(on.net.read.weight, before)
    assert [one["steps"] for one in on.recipe] == [60, 5]
    pfn.save(tmp_path / "half.safetensors", torch.bfloat16)
    half = LCPFN.load(tmp_path / "half.safetensors").predict(y).mean()
    torch.testing.assert_close(half, pfn.predict(y).mean(), atol=0.05, rtol=0)


def test_a_prior_of_one_s_own():
    def flat(count: int, length: int, rng: np.random.Generator) -> np.ndarray:
        return np.repeat(rng.random((count, 1)), length, axis=1)

    pfn = LCPFN.pretrain(flat, 10, 150, config=PFNConfig(16, 1, 2, bars=20), lr=1e-2)
    guess = pfn.predict([[0.2] * 4, [0.8] * 4], 3).mean()[:, 0]
    assert abs(float(guess[0]) - 0.2) < 0.1
    assert abs(float(guess[1]) - 0.8) < 0.1
    assert pfn.recipe[0]["prior"] == "flat"
    with pytest.raises(MeasureError, match="the prior gave"):
        LCPFN.pretrain(lambda count, length, rng: np.zeros((count, 3)), 10, 1)


def test_horizons_and_lengths():
    pfn, y = LCPFN.shipped(), curve_prior(2, 50, seed=0).noisy[:, :20]
    whole = pfn.predict(y)
    assert whole.shape == (2, 30)
    torch.testing.assert_close(pfn.predict(y[0], [5, 7]).mean(), whole.mean()[0, [4, 6]], atol=1e-5, rtol=0)
    torch.testing.assert_close(pfn.predict(y[0], 5).mean(), whole.mean()[0, 4:5], atol=1e-5, rtol=0)
    assert pfn.predict(y[0], length=200).shape == (180,)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LCPFN.shipped().predict([]), "one at least"),
        (lambda: LCPFN.shipped().predict([0.1] * 50), "nothing is left"),
        (lambda: LCPFN.shipped().predict([0.1] * 10, [41]), "from 1 to 40"),
        (lambda: LCPFN.shipped().predict([2.3, 2.1]), "extrapolate_curve"),
        (lambda: LCPFN.shipped().predict([0.3, math.nan]), "goes from nan"),
        (lambda: LCPFN.pretrain("dohman"), "no prior 'dohman'"),
        (lambda: LCPFN.pretrain(seq_len=12, start=LCPFN.shipped()), "has the same"),
        (lambda: PFNConfig(d_model=10, heads=4), "no multiple"),
    ],
)
def test_bad_input_to_the_network(call, message):
    with pytest.raises(MeasureError, match=message):
        call()


def test_files_that_hold_something_else(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(LCPFNError, match="no network"):
        LCPFN.load(tmp_path / "missing.safetensors")
    save_file({"a": torch.zeros(2)}, str(tmp_path / "other.safetensors"))
    with pytest.raises(LCPFNError, match="no network"):
        LCPFN.load(tmp_path / "other.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "other.safetensors").read_bytes()[:-3])
    with pytest.raises(LCPFNError, match="truncated"):
        LCPFN.load(tmp_path / "cut.safetensors")


# The ensemble


def test_the_ensemble_is_the_posterior_by_brute_force():
    # Importance sampling: with three points and much noise, enough of 100 000 draws from the prior count.
    y, noise = np.array([0.2, 0.45, 0.5]), (-2.5, 0.5)
    u, curve = CurvePrior(10, noise=noise).sample(100_000, np.random.default_rng(0))
    sigma = np.exp(u[:, 0])
    log_w = stats.norm.logpdf(y, curve[:, :3], sigma[:, None]).sum(1)
    w = np.exp(log_w - log_w.max())
    assert w.sum() ** 2 / (w @ w) > 500
    mean = w @ curve / w.sum()
    sd = np.sqrt(w @ (curve - mean) ** 2 / w.sum())
    ensemble = CurveEnsemble(particles=2000, moves=8, length=10, noise=noise, seed=1).fit(y)
    found, sigma = ensemble.curves()
    # Within a fifth of a standard deviation, some four standard errors of either side.
    assert (np.abs(found.mean(0) - mean[3:]) < 0.2 * sd[3:]).all()
    np.testing.assert_allclose(found.std(0), sd[3:], rtol=0.2)
    assert np.log(sigma).mean() == pytest.approx(w @ u[:, 0] / w.sum(), abs=0.2)
    evidence = float(np.log(w.mean()) + log_w.max())
    assert ensemble.log_evidence_ == pytest.approx(evidence, abs=0.3)
    assert ensemble.powers_[0] == 0
    assert ensemble.powers_[-1] == 1


def test_the_ensemble_is_calibrated_and_repeatable():
    curves = curve_prior(6, 50, seed=5).noisy
    table = score_extrapolations(curves, 10, {"ensemble": "ensemble", "last": "last", "pfn": "pfn"})
    scores = table.groupby("method").log_score.mean()
    assert scores["ensemble"] > scores["last"] + 0.3
    assert scores["ensemble"] > scores["pfn"] - 0.3
    one, two = (CurveEnsemble(particles=100, seed=3).fit(curves[0, :10]).predict([4]) for _ in range(2))
    assert torch.equal(one.means, two.means)
    assert one.shape == (1,)


def test_other_families_can_be_added():
    curve = 0.8 - 0.6 / (1 + 0.2 * np.arange(1.0, 16)) + 0.001 * np.cos(np.arange(15) * 5)
    found = CurveEnsemble(["mmf", "pow4", "hill3"], particles=400, seed=0).fit(curve, length=30).predict([15])
    assert float(found.mean()) == pytest.approx(0.8 - 0.6 / 7, abs=0.06)


def test_bad_input_to_the_ensemble():
    with pytest.raises(MeasureError, match="even number"):
        CurveEnsemble(particles=21)
    with pytest.raises(MeasureError, match="no family of curves"):
        CurveEnsemble(["pow9"])
    with pytest.raises(MeasureError, match="finite"):
        CurveEnsemble().fit([0.1, math.inf])
    with pytest.raises(MeasureError, match="fit the ensemble"):
        CurveEnsemble().predict()


# Extrapolation and its scores


def test_the_last_value_and_the_power_law_by_hand():
    y = np.array([0.1, 0.4, 0.5, 0.7])
    last = extrapolate_curve(y, 3, "last")
    step = math.sqrt((0.09 + 0.01 + 0.04) / 3)
    np.testing.assert_allclose(last.mean(), 0.7)
    np.testing.assert_allclose(last.sds[:, 0], step * np.sqrt([1, 2, 3]))
    x = np.arange(1.0, 41)
    power = 3 - 2 * x**-0.5
    found = extrapolate_curve(power[:20], 20, "power")
    np.testing.assert_allclose(found.mean(), power[20:], rtol=1e-5)


@pytest.mark.parametrize("method", ["pfn", "ensemble"])
def test_a_loss_is_the_mirror_image_of_a_measure_that_rises(method):
    curve = curve_prior(1, 50, seed=8).noisy[0, :12]
    up = extrapolate_curve(curve, 5, method)
    down = extrapolate_curve(4.0 - 3.0 * curve, 5, method, goal="min", bounds=(1.0, 4.0))
    torch.testing.assert_close(down.mean(), 4.0 - 3.0 * up.mean(), atol=2e-3, rtol=0)
    torch.testing.assert_close(down.log_prob(2.0), up.log_prob(2 / 3) - math.log(3), atol=2e-2, rtol=0)


def test_scores_are_those_of_the_forecasts():
    curves = [np.linspace(0.1, 0.5, 10), np.linspace(0.2, 0.9, 20)]
    table = score_extrapolations(curves, 0.5, ["last", "pfn"])
    assert table.horizons.tolist() == [5, 5, 10, 10]
    forecast, truth = extrapolate_curve(curves[1][:10], 10, "pfn"), torch.from_numpy(curves[1][10:])
    row = table[(table.curve == 1) & (table.method == "pfn")].iloc[0]
    assert row.log_score == pytest.approx(float(forecast.log_prob(truth).mean()))
    assert row.crps == pytest.approx(float(forecast.crps(truth).mean()))
    assert row.end_error == pytest.approx(float(forecast.mean()[-1] - truth[-1]))
    low, high = forecast.interval(0.9)
    assert row.coverage == pytest.approx(float(((low <= truth) & (truth <= high)).double().mean()))


def test_a_baseline_fitted_to_other_curves():
    curves = np.cumsum(np.random.default_rng(0).normal(0.1, 0.2, (500, 6)), 1)
    forecast = last_value_of(curves, 3)(np.array([0.0, 0.1, 0.2]), 2)
    change = curves[:, 3:5] - curves[:, 2:3]
    np.testing.assert_allclose(forecast.mean(), 0.2 + change.mean(0))
    np.testing.assert_allclose(forecast.sds[:, 0], change.std(0, ddof=1))
    with pytest.raises(MeasureError, match="made for 3 points"):
        last_value_of(curves, 3)(np.zeros(4), 2)


@pytest.mark.parametrize(
    ("curve", "how", "message"),
    [
        (np.linspace(3, 1, 10), {"horizon": 5}, "falls all along.*goal='min'"),
        (np.linspace(0.1, 0.9, 10), {"horizon": 5, "goal": "min"}, "rises all along"),
        (np.linspace(10, 80, 10), {"horizon": 5}, "out of bounds"),
        (np.linspace(0.1, 0.9, 10), {"horizon": 0}, "1 or more"),
        (np.linspace(0.1, 0.9, 10), {"horizon": 5, "method": "pnf"}, "nearest: pfn"),
        (np.linspace(0.1, 0.9, 10), {"horizon": 5, "bounds": (1.0, 0.0)}, "lowest and the highest"),
        (np.linspace(0.1, 0.9, 10), {"horizon": 5, "goal": "up"}, "does not exist"),
        ([0.1], {"horizon": 5}, "two or more"),
        ([0.1, math.nan, 0.2], {"horizon": 5}, "not finite at 1 of 3"),
        (np.linspace(0.1, 0.9, 4), {"horizon": 5, "method": "power"}, "needs 5 points"),
    ],
)
def test_bad_curves_say_what_to_do(curve, how, message):
    with pytest.raises(MeasureError, match=message):
        extrapolate_curve(curve, **how)


def test_bad_scores_name_the_curve():
    with pytest.raises(MeasureError, match="curve 1, method 'pfn': the curve falls"):
        score_extrapolations([np.linspace(0, 1, 12), np.linspace(1, 0, 12)], 6, ["pfn"])
    with pytest.raises(MeasureError, match="leaves 12 to see"):
        score_extrapolations([np.linspace(0, 1, 12)], 12)


# Stopping


def test_stopping_goes_by_the_chance_of_a_single_step():
    curve = 0.6 - 0.5 * np.arange(1.0, 16.0) ** -1.5
    found = predictive_stop(curve, 0.62, length=50)
    chances = 1 - found.forecast.cdf(0.62)
    assert found.chance == pytest.approx(float(chances.max()))
    assert found.at == 16 + int(chances.argmax())
    assert bool(found) == (found.chance < 0.05)
    loss = predictive_stop(1 - curve, 1 - 0.62, length=50, goal="min", bounds=(0.0, 1.0))
    assert loss.chance == pytest.approx(found.chance, abs=1e-6)
    with pytest.raises(MeasureError, match="nothing is left to stop"):
        predictive_stop(curve, 0.6, length=15)
    with pytest.raises(MeasureError, match="chance between 0 and 1"):
        predictive_stop(curve, 0.6, 1.0, length=50)


def test_played_runs_know_only_their_past():
    x = np.arange(1.0, 41)
    runs = [0.9 - 0.5 / x, 0.4 - 0.3 / x, 0.5 - 0.4 / x]
    played = stop_runs(runs)
    assert played.best == played.best_of_all == pytest.approx(0.9 - 0.5 / 40)
    assert max(played.steps[1:]) < 20
    assert played.saved == pytest.approx(1 - sum(played.steps) / 120)
    # What comes after a run is stopped changes nothing.
    late = [runs[0], np.where(x > 30, 1.0, runs[1]), runs[2]]
    hidden = stop_runs(late)
    assert hidden.steps == played.steps
    assert hidden.regret == pytest.approx(1.0 - played.best)
    # The worst order saves nothing that would not be saved: the best run comes last, and is not stopped.
    assert stop_runs(runs[::-1]).regret == pytest.approx(0, abs=1e-3)
    with pytest.raises(MeasureError, match="runs"):
        stop_runs([])
