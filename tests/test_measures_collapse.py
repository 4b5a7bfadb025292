"""Collapse measures: against brute force on whole tensors, planted collapse, and optima that are known."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from measured import generator
from torch import Tensor
from torch.distributions import Normal, kl_divergence

import actome
from actome.core.errors import MeasureError
from actome.measures.neural_collapse import (
    CentreAgreement,
    NeuralCollapse,
    layerwise_collapse,
    nc1,
    near_collapse_model,
)
from actome.measures.posterior_collapse import PosteriorCollapse, forecast_from_covariance, linear_vae_forecast
from actome.measures.token_collapse import AttentionProgress, RepetitionFrequency, TokenCollapse, repetition
from actome.tasks.nets import MLP

some = settings(max_examples=15, deadline=None)


def same(a: dict[str, Tensor], b: dict[str, Tensor], rtol: float = 1e-9, atol: float = 1e-10) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=rtol, atol=atol, equal_nan=True)


def classes(seed: int = 0, rows: int = 90, units: int = 12, k: int = 4) -> tuple[Tensor, Tensor]:
    y = torch.randint(0, k, (rows,), generator=generator(seed))
    return 2 * torch.randn(k, units, generator=generator(seed))[y] + torch.randn(
        rows, units, generator=generator(seed + 1)
    ), y


# -- neural collapse -----------------------------------------------------------------------------------------------


def brute(x: Tensor, y: Tensor, k: int) -> dict[str, float]:
    x, y = x.double().numpy(), y.numpy()
    n, mean = len(x), x.mean(0)
    within, between = np.zeros((x.shape[1],) * 2), np.zeros((x.shape[1],) * 2)
    means = np.stack([x[y == c].mean(0) for c in range(k)])
    for row, c in zip(x, y, strict=True):
        within += np.outer(row - means[c], row - means[c]) / n
        between += np.outer(means[c] - mean, means[c] - mean) / n
    m = (means - means.mean(0)).T
    gram = m.T @ m
    simplex = (np.eye(k) - np.ones((k, k)) / k) / math.sqrt(k - 1)
    length = np.linalg.norm(m, axis=0)
    cos = (gram / np.outer(length, length))[~np.eye(k, dtype=bool)]
    return {
        "nc1": np.trace(within) / np.trace(between),
        "nc1_pinv": np.trace(within @ np.linalg.pinv(between, rcond=1e-8)) / k,
        "nc2": np.linalg.norm(gram / np.linalg.norm(gram) - simplex),
        "equinorm": length.std() / length.mean(),
        "equiangle": cos.std(),
        "max_angle": np.abs(cos + 1 / (k - 1)).mean(),
    }


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_neural_collapse_is_what_numpy_says(offset):
    x, y = classes()
    x = x + offset
    one = NeuralCollapse(4)
    for part in (slice(0, 17), slice(17, 90)):
        one.update(x[part], y[part])
    got = one.compute()
    for name, value in brute(x, y, 4).items():
        assert float(got[name]) == pytest.approx(value, rel=1e-6), name
    assert (int(got["classes"]), int(got["singletons"])) == (4, 0)
    assert nc1(x, y) == pytest.approx(float(got["nc1"]))


def test_a_planted_simplex_has_collapsed_and_its_dual_weights_too():
    k, units = 5, 20
    simplex = (torch.eye(k) - 1 / k) @ torch.linalg.qr(torch.randn(units, k, generator=generator()))[0].T
    y = torch.arange(50) % k
    x = 3 * simplex[y] + 7.0
    one = NeuralCollapse(k, weights=0.2 * simplex)
    one.update(x, y)
    got = one.compute()
    # float32 features of size 7 carry 1e-7 of rounding each.
    for name in ("nc1", "nc1_pinv", "nc2", "equinorm", "equiangle", "max_angle", "nc3"):
        assert float(got[name]) < 1e-5, name
    turned = NeuralCollapse(k, weights=0.2 * simplex.roll(1, 0))
    turned.update(x, y)
    assert float(turned.compute()["nc3"]) > 1


@given(seed=st.integers(0, 1000), cut=st.integers(1, 89))
@some
def test_neural_collapse_merges_and_ignores_rows_that_are_not_finite(seed, cut):
    x, y = classes(seed)

    def fold(*parts):
        one = NeuralCollapse(4)
        for part in parts:
            one.update(x[part], y[part])
        return one

    a, b, whole = fold(slice(0, cut)), fold(slice(cut, 90)), fold(slice(0, 90))
    a.merge_state(b)
    same(a.compute(), whole.compute())
    whole.update(torch.full((2, 12), torch.nan), torch.tensor([0, 1]))
    same(whole.compute(), a.compute())
    same(pickle.loads(pickle.dumps(a)).compute(), a.compute())


def test_absent_classes_and_classes_of_one_are_told_and_do_not_count():
    x, y = classes(k=3)
    full = NeuralCollapse(3)
    full.update(x, y)
    wide = NeuralCollapse(7)
    wide.update(x, y)
    same(wide.compute(), full.compute())
    wide.update(torch.randn(1, 12, generator=generator(5)), torch.tensor([6]))
    got = wide.compute()
    assert (int(got["classes"]), int(got["singletons"])) == (4, 1)
    for name in ("nc1", "nc1_pinv"):
        assert float(got[name]) == pytest.approx(float(full.compute()[name]), rel=1e-9)
    assert float(got["nc2"]) != pytest.approx(float(full.compute()["nc2"]), rel=1e-3)


def test_neural_collapse_without_enough_to_say():
    one = NeuralCollapse(3)
    one.update(torch.randn(5, 2, generator=generator()), torch.zeros(5).long())
    got = one.compute()
    assert all(got[name].isnan() for name in ("nc1", "nc1_pinv", "nc2", "equinorm"))
    same_means = NeuralCollapse(2)
    same_means.update(torch.tensor([[1.0], [-1.0], [1.0], [-1.0]]), torch.tensor([0, 0, 1, 1]))
    got = same_means.compute()
    assert got["nc1"].isinf()
    assert got["nc1_pinv"].isnan()
    for bad, message in (
        (lambda: NeuralCollapse(1), "two classes"),
        (lambda: NeuralCollapse(3, weights=torch.ones(2, 4)), "3 classes"),
        (lambda: NeuralCollapse(3, max_width=4).update(torch.ones(2, 5), torch.tensor([0, 1])), "max_width"),
        (lambda: NeuralCollapse(2).update(torch.ones(2, 5), torch.tensor([0, 2])), "labels 0 to 1"),
        (lambda: NeuralCollapse(2).update(torch.ones(2, 5).long(), torch.tensor([0, 1])), "floating-point"),
        (lambda: NeuralCollapse(2).means, "seen nothing"),
    ):
        with pytest.raises(MeasureError, match=message):
            bad()


def test_bfloat16_features_are_widened():
    x, y = classes()
    a, b = NeuralCollapse(4), NeuralCollapse(4)
    a.update(x.bfloat16(), y), b.update(x.bfloat16().double(), y)
    same(a.compute(), b.compute())


def test_nc4_by_hand_and_merged():
    x, y = classes()
    first = NeuralCollapse(4)
    first.update(x, y)
    outputs = torch.randn(90, 4, generator=generator(9))
    parts = [CentreAgreement(first.means) for _ in range(2)]
    parts[0].update(x[:40], y[:40], outputs[:40]), parts[1].update(x[40:], y[40:], outputs[40:])
    parts[0].merge_state(parts[1])
    got = parts[0].compute()
    means = np.stack([x[y == c].double().numpy().mean(0) for c in range(4)])
    nearest = np.array([np.linalg.norm(means - row, axis=1).argmin() for row in x.double().numpy()])
    assert float(got["nc4"]) == pytest.approx((nearest != outputs.argmax(1).numpy()).mean())
    assert float(got["nearest_mean_accuracy"]) == pytest.approx((nearest == y.numpy()).mean())
    absent = NeuralCollapse(5)
    absent.update(x, y)
    fifth = CentreAgreement(absent.means)
    fifth.update(x, y, torch.cat([outputs, torch.full((90, 1), -9.0)], 1))
    assert fifth.compute()["nc4"] == got["nc4"]
    with pytest.raises(MeasureError, match="do not fit"):
        fifth.update(x, y, outputs)


def test_layers_of_a_model_are_those_of_its_features():
    x, y = classes(units=6)
    net = MLP([6, 9, 9, 4])
    got = layerwise_collapse(actome.wrap(net), [(x[:40], y[:40]), (x[40:], y[40:])], "module:act.*", 4)
    assert list(got) == ["module:act.0", "module:act.1"]
    with torch.no_grad():
        features = net.linear[0](x).relu()
    assert float(got["module:act.0"]["nc1"]) == pytest.approx(nc1(features, y), rel=1e-6)


# -- near collapse -------------------------------------------------------------------------------------------------


def test_the_near_collapse_model_is_at_a_stationary_point():
    x, y = classes(rows=60, units=8)
    beta, lam = 0.1, 5e-3
    found = near_collapse_model(x, y, beta, lam, steps=5000, tolerance=1e-13)
    h, w = found.features.T.clone().requires_grad_(), found.weights.clone().requires_grad_()
    k, total = 4, x.shape[0]
    one_hot = torch.nn.functional.one_hot(y, 4).double().T
    loss = ((w @ h - one_hot) ** 2).sum() / (2 * total) + lam * (w**2).sum() / (2 * k)
    loss = loss + beta * ((h - x.double().T) ** 2).sum() / (2 * total)
    assert float(loss.detach()) == pytest.approx(found.loss, rel=1e-12)
    grads = torch.autograd.grad(loss, (h, w))
    assert max(float(g.abs().max()) for g in grads) < 1e-8


def test_beta_goes_from_the_given_features_to_collapse():
    x, y = classes(rows=80, units=10)
    values = [nc1(near_collapse_model(x, y, beta, steps=1000).features, y) for beta in (1e4, 1e-1, 1e-3)]
    assert values[0] == pytest.approx(nc1(x, y), rel=1e-3)
    assert values[0] > values[1] > values[2]
    # Free features from a start of small size collapse all but completely.
    free = near_collapse_model(1e-3 * x, y, 1e-6, steps=5000)
    assert nc1(free.features, y) < 1e-3
    with pytest.raises(MeasureError, match="no row"):
        near_collapse_model(x, y * 2, 1.0)
    with pytest.raises(MeasureError, match="above 0"):
        near_collapse_model(x, y, 0.0)


# -- tokens ------------------------------------------------------------------------------------------------------------


def pairwise(x_TU: Tensor) -> float:
    unit = x_TU.double() / x_TU.double().norm(dim=1, keepdim=True)
    gram = unit @ unit.T
    return float(gram[~torch.eye(len(gram), dtype=torch.bool)].mean())


@pytest.mark.parametrize("skip", [0, 2])
def test_token_cosine_is_the_mean_over_pairs_with_padding_on_either_side(skip):
    x = torch.randn(3, 7, 5, generator=generator()) + 1
    mask = torch.tensor([[True] * 7, [False] * 2 + [True] * 5, [True] * 4 + [False] * 3])
    rows = [x[0], x[1, 2:], x[2, :4]]
    padded = x.masked_fill(~mask[..., None], torch.nan)
    padded[1, 0] = 1e30
    one = TokenCollapse(skip)
    one.update(padded[:1], mask[:1]), one.update(padded[1:], mask[1:])
    assert float(one.compute()["token_cosine"]) == pytest.approx(np.mean([pairwise(r[skip:]) for r in rows]), rel=1e-5)


def test_token_cosine_of_odd_sequences():
    def value(x, mask=None, **options):
        one = TokenCollapse(**options)
        one.update(x, mask)
        return float(one.compute()["token_cosine"])

    assert math.isnan(value(torch.ones(1, 1, 3)))
    assert math.isnan(value(torch.ones(1, 4, 3), torch.zeros(1, 4).bool()))
    assert value(torch.ones(1, 4, 3)) == pytest.approx(1)
    assert value(torch.tensor([[[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]])) == pytest.approx(0.5**0.5)
    # The non-finite token is left out, the rest stays.
    assert value(torch.tensor([[[1.0, 0.0], [torch.nan, 0.0], [1.0, 1.0]]])) == pytest.approx(0.5**0.5)
    x = torch.randn(2, 3, 6, 4, generator=generator()).bfloat16()
    one = TokenCollapse()
    one.update(x)
    got = one.compute()["token_cosine"]
    assert got.shape == (2,)
    assert float(got[1]) == pytest.approx(np.mean([pairwise(r) for r in x[1].double()]), rel=1e-5)
    with pytest.raises(MeasureError, match="skip"):
        TokenCollapse(-1)


def test_repetition_by_hand():
    logits = torch.nn.functional.one_hot(torch.tensor([[2, 2, 2, 1, 1], [0, 0, 3, 3, 3]]), 4).float()
    tokens = torch.tensor([[1, 1, 1, 2, 3], [9, 9, 9, 9, 9]])
    mask = torch.tensor([[True] * 5, [False, True, True, True, False]])
    one = RepetitionFrequency()
    one.update(logits.masked_fill(~mask[..., None], torch.nan), mask, tokens)
    got = one.compute()
    # Row 1: 2 2 2 1 1 has three of four; row 2, its three real positions: 0 3 3 has one of two.
    assert float(got["repetition"]) == pytest.approx(4 / 6)
    # Targets are tokens 1 on: 1 1 2 3 has one of three; 9 9 has one of one.
    assert float(got["repetition_of_data"]) == pytest.approx(2 / 4)
    late = RepetitionFrequency(start=2)
    late.update(logits[:1], None, tokens[:1])
    assert float(late.compute()["repetition"]) == pytest.approx(1 / 2)
    assert float(late.compute()["repetition_of_data"]) == 0
    assert repetition(tokens, mask) == pytest.approx(4 / 6)
    assert math.isnan(repetition(tokens[:, :1]))
    with pytest.raises(MeasureError, match="token ids"):
        RepetitionFrequency().update(logits)


def test_a_position_with_a_nan_logit_predicts_nothing():
    logits = torch.nn.functional.one_hot(torch.tensor([[2, 2, 2, 2]]), 4).float()
    logits[0, 1, 3] = torch.nan
    one = RepetitionFrequency()
    one.update(logits, None, torch.zeros(1, 4).long())
    assert (int(one.pairs), int(one.repeats)) == (1, 1)


def test_attention_progress_by_hand_and_merged():
    g = generator()
    pattern = torch.randn(4, 3, 6, 6, generator=g).tril()
    target = torch.zeros(6, 6, dtype=torch.bool)
    target[3, 1] = target[4, [0, 2]] = True
    share = pattern.abs()[..., target].sum((0, 2)) / pattern[:, :, [3, 4]].abs().sum((0, 2, 3))
    parts = [AttentionProgress(target) for _ in range(2)]
    parts[0].update(pattern[:1]), parts[1].update(pattern[1:])
    parts[0].merge_state(parts[1])
    torch.testing.assert_close(parts[0].compute()["attention_progress"], share.double(), rtol=1e-5, atol=0)
    # A padded first key, and a query whose row is broken in one head.
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[0, 0] = False
    broken = pattern.clone()
    broken[0, :, :, 0] = torch.nan
    broken[1, 2, 4, 0] = torch.inf
    one = AttentionProgress(target)
    one.update(broken, mask)
    clean = pattern.clone()
    clean[0, :, :, 0], clean[1, :, 4] = 0.0, 0.0
    share = clean.abs()[..., target].sum((0, 2)) / clean[:, :, [3, 4]].abs().sum((0, 2, 3))
    torch.testing.assert_close(one.compute()["attention_progress"], share.double(), rtol=1e-5, atol=0)
    with pytest.raises(MeasureError, match=r"\(6, 6\)"):
        one.update(torch.ones(1, 3, 5, 5))
    with pytest.raises(MeasureError, match="at least one entry"):
        AttentionProgress(torch.zeros(3, 3).bool())


# -- posterior collapse --------------------------------------------------------------------------------------------


def posteriors(seed: int = 0, rows: int = 200) -> tuple[Tensor, Tensor]:
    g = generator(seed)
    scale = torch.tensor([0.0, 1.0, 0.05, 0.0])
    mu = scale * torch.randn(rows, 4, generator=g)
    logvar = torch.tensor([0.0, -2.0, 0.0, 0.0]).expand(rows, 4).clone()
    # The last unit speaks of 1 input in 20 only, and then loudly.
    mu[::20, 3], logvar[::20, 3] = 4.0, -3.0
    return mu, logvar


def test_posterior_collapse_is_what_torch_distributions_says():
    mu, logvar = posteriors()
    one = PosteriorCollapse(eps=(0.001, 0.02, 10.0), delta=0.02)
    one.update(mu[:70], logvar[:70]), one.update(mu[70:], logvar[70:])
    got = one.compute()
    kl = kl_divergence(Normal(mu.double(), (logvar.double() / 2).exp()), Normal(0.0, 1.0))
    torch.testing.assert_close(got["kl"], kl.mean(0), rtol=1e-6, atol=1e-9)
    below = torch.stack([(kl < eps).double().mean(0) for eps in (0.001, 0.02, 10.0)])
    torch.testing.assert_close(got["below"], below)
    torch.testing.assert_close(got["mean_variance"], mu.double().var(0, correction=0), rtol=1e-9, atol=1e-12)
    assert got["collapsed"].tolist() == (below >= 0.98).double().mean(1).tolist()
    assert got["collapsed"].tolist()[0] == 0.25
    assert int(got["active"]) == int((mu.var(0, correction=0) > 0.01).sum())


def test_a_unit_that_exceeds_the_threshold_at_just_the_share_allowed_has_collapsed():
    # KL of 0 for half of the rows and of 1/2 for the other half.
    mu = torch.tensor([[0.0], [1.0], [0.0], [1.0]])
    for delta, share in ((0.5, 1.0), (0.25, 0.0)):
        one = PosteriorCollapse(0.01, delta=delta)
        one.update(mu, torch.zeros(4, 1))
        assert one.compute()["collapsed"].tolist() == [share]


def test_a_unit_that_speaks_rarely_is_not_collapsed_unless_delta_says_so():
    mu, logvar = posteriors()
    strict, loose = PosteriorCollapse(0.01, delta=0.02), PosteriorCollapse(0.01, delta=0.06)
    strict.update(mu, logvar), loose.update(mu, logvar)
    assert float(loose.compute()["collapsed"][0]) > float(strict.compute()["collapsed"][0])


@given(seed=st.integers(0, 1000), cut=st.integers(1, 199))
@some
def test_posterior_collapse_merges(seed, cut):
    mu, logvar = posteriors(seed)
    a, b, whole = PosteriorCollapse(), PosteriorCollapse(), PosteriorCollapse()
    a.update(mu[:cut], logvar[:cut]), b.update(mu[cut:], logvar[cut:]), whole.update(mu, logvar)
    a.merge_state(b)
    whole.update(torch.full((1, 4), torch.nan), torch.zeros(1, 4))
    same(a.compute(), whole.compute())


def test_tiny_kl_keeps_its_digits():
    # 0.5 (sigma^2 - ln sigma^2 - 1) = logvar^2 / 4 + ...: lost to cancellation if computed from exp(logvar).
    one = PosteriorCollapse()
    one.update(torch.zeros(3, 1), torch.full((3, 1), 1e-4))
    assert float(one.compute()["kl"][0]) == pytest.approx(2.5e-9, rel=1e-3)
    with pytest.raises(MeasureError, match="different shapes"):
        one.update(torch.zeros(3, 1), torch.zeros(2, 1))
    with pytest.raises(MeasureError, match="above 0"):
        PosteriorCollapse(0.0)


def test_the_forecast_is_the_optimum_of_the_linear_objective():
    """L-BFGS on the exact loss, from a random start, ends at the forecast."""
    covariance = torch.diag(torch.tensor([4.0, 2.0, 0.8], dtype=torch.float64))
    beta, eta = 1.5, 0.8
    forecast = forecast_from_covariance(covariance, beta=beta, eta=eta)
    encoder, decoder = (torch.randn(3, 3, generator=generator(s), dtype=torch.float64).requires_grad_() for s in (0, 1))
    logvar = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([encoder, decoder, logvar], max_iter=500, line_search_fn="strong_wolfe")

    def kl():
        return 0.5 * (torch.einsum("ui,ij,uj->u", encoder, covariance, encoder) + logvar.exp() - logvar - 1)

    def loss():
        solver.zero_grad()
        left = torch.eye(3, dtype=torch.float64) - decoder @ encoder
        error = torch.einsum("ui,ij,uj->", left, covariance, left) + (decoder.square() * logvar.exp()).sum()
        value = error / (2 * eta**2) + beta * kl().sum()
        value.backward()
        return value

    solver.step(loss)
    with torch.no_grad():
        torch.testing.assert_close(torch.linalg.svdvals(decoder).square(), forecast.omega2, rtol=0, atol=1e-4)
        torch.testing.assert_close(kl().sort(descending=True).values, forecast.kl, rtol=0, atol=1e-4)
    assert forecast.collapsed() == 1


def test_a_condition_takes_what_it_explains():
    x = torch.randn(5000, 2, generator=generator(), dtype=torch.float64)
    noise = torch.randn(5000, 2, generator=generator(1), dtype=torch.float64)
    y = torch.tensor([2.0, 3.0]) * (0.9 * x + (1 - 0.81) ** 0.5 * noise)
    alone, given_x = linear_vae_forecast(y), linear_vae_forecast(y, x)
    residual = y - x @ torch.linalg.lstsq(x - x.mean(0), y - y.mean(0)).solution
    expected = torch.linalg.eigvalsh(torch.cov(residual.T, correction=0)).flip(0)
    torch.testing.assert_close(given_x.theta2, expected)
    assert (alone.collapsed(), given_x.collapsed()) == (0, 1)
    # A condition with a direction twice changes nothing.
    torch.testing.assert_close(linear_vae_forecast(y, torch.cat([x, x], 1)).theta2, expected)
    surplus = linear_vae_forecast(y, latents=5)
    assert surplus.collapsed() == 3
    assert len(surplus.kl) == 5
    with pytest.raises(MeasureError, match="above 0"):
        linear_vae_forecast(y, beta=0.0)
    with pytest.raises(MeasureError, match="rows of data"):
        linear_vae_forecast(y, x[:-1])
