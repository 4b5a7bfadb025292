"""Kurtosis, spikes, drains, dormant heads and quantisation errors, against their definitions and other libraries."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch
from measured import generator, pattern
from torch import Tensor

import actome as ac
from actome.core.errors import MeasureError
from actome.measures import AttentionEntropy, OutlierChannels, SinkScore
from actome.measures.drains import ResidualPeak, ValueDrain, extreme_tokens
from actome.measures.extremes import outlier_dimensions
from actome.measures.heads import DormantHeads, dormant_heads, head_ablation_by_domain
from actome.measures.kurtosis import Kurtosis
from actome.measures.quantisation import BITS, SCALES, QuantisationError
from actome.measures.sampling import sampled
from actome.measures.spikes import Spikes


def values(measure, x: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    measure.update(x, mask)
    return measure.compute()


# -- which tokens are taken ---------------------------------------------------------------------------------------


def test_every_third_token_counts_from_the_first_real_one():
    x = torch.arange(24.0).view(2, 12, 1)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, :2] = False
    x[1, 3] = torch.nan
    taken = sampled(ac.core.measure.real_tokens(x, mask), mask, 3)
    assert taken.x.flatten().tolist() == [2, 5, 8, 11, 12, 18, 21]
    assert taken.row.tolist() == [0, 0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("make", [Kurtosis, Spikes, QuantisationError])
@pytest.mark.parametrize("every", [0, -1, 1.5])
def test_a_step_that_is_none_is_an_error(make, every):
    with pytest.raises(MeasureError, match="every is"):
        make(every=every)


# -- kurtosis -----------------------------------------------------------------------------------------------------


def test_kurtosis_is_what_scipy_says():
    x = torch.randn(3, 40, 30, generator=generator()) ** 3 + 5
    got, a = values(Kurtosis(every=1), x), x.double().numpy().reshape(-1, 30)
    assert float(got["kurtosis"]) == pytest.approx(scipy.stats.kurtosis(a, axis=None), rel=1e-9)
    assert float(got["token_kurtosis"]) == pytest.approx(scipy.stats.kurtosis(a, axis=1).mean(), rel=1e-9)
    np.testing.assert_allclose(got["unit_kurtosis"], scipy.stats.kurtosis(a, axis=0), rtol=1e-9)


def test_kurtosis_survives_a_mean_of_hundreds_of_standard_deviations():
    x = 300 + torch.randn(1, 4000, 2, generator=generator())
    # Both have the same rounded float32 input; fourth powers of 300 leave 6 of the 16 digits of float64.
    want = scipy.stats.kurtosis(x.double().numpy().reshape(-1, 2), axis=0)
    np.testing.assert_allclose(values(Kurtosis(every=1), x)["unit_kurtosis"], want, atol=1e-3)


def test_a_constant_has_no_kurtosis():
    x = torch.randn(1, 50, 8, generator=generator())
    x[..., 3] = 0.1
    x[0, 7] = 2.7
    assert not values(Kurtosis(every=1), x)["unit_kurtosis"].isnan().any()
    x[0, 7, 3] = 0.1
    assert values(Kurtosis(every=1), x)["unit_kurtosis"].isnan().nonzero().flatten().tolist() == [3]
    assert values(Kurtosis(every=1), torch.full((1, 9, 4), 0.1))["token_kurtosis"].isnan()


@pytest.mark.parametrize("units", [3, 7, 10, 49])
def test_rounding_gives_a_constant_no_kurtosis(units):
    # The mean of equal float64 numbers need not be that number.
    x = torch.stack([torch.full((units,), one, dtype=torch.float64) for one in (0.1, 0.7, 1e9 / 3)])[None]
    assert values(Kurtosis(every=1), x)["token_kurtosis"].isnan()


@pytest.mark.parametrize(("tokens", "channels"), [(6, 1), (5, 0)])
def test_an_outlier_channel_stands_out_at_the_given_share_or_more(tokens, channels):
    x = torch.ones(1, 100, 64)
    x[0, :tokens, 7] = 100.0
    got = values(OutlierChannels(share=0.06), x)
    assert int(got["outlier_channels"]) == channels
    assert float(got["outlier_frequency"][7]) == tokens / 100


def test_measures_leave_what_they_measure_as_it_was():
    for dtype in (torch.float32, torch.float64):
        x = torch.randn(2, 32, 16, generator=generator(), dtype=dtype)
        before = x.clone()
        for make in (Kurtosis, Spikes, QuantisationError):
            values(make(every=1), x)
            values(make(), x)
        assert torch.equal(x, before)


# -- spikes -------------------------------------------------------------------------------------------------------


def test_spikes_and_channels_are_what_medians_say():
    x = torch.randn(2, 34, 21, generator=generator())
    x[:, 0] = 1000.0
    x[0, :, 4] += 25.0
    x[:, :, 9] *= 1.5
    x[1, 5, [2, 7]] = torch.tensor([80.0, -90.0])
    x[1, 12, 4] = 300.0
    got = values(Spikes(every=1), x)
    a = x[:, 1:].abs().numpy()  # without the first token
    times = np.maximum(np.median(a, axis=2)[:, :, None], np.median(a, axis=1)[:, None, :])  # odd counts: lower = middle
    hit = a / times > 20
    middle = np.median(np.median(a, axis=2), axis=1)
    channels = np.median(a, axis=1) > 6 * middle[:, None]
    assert (int(channels.sum()), int(hit.sum())) == (1, 3)
    assert float(got["channel_outliers"]) == pytest.approx(channels.sum(1).mean())
    np.testing.assert_allclose(got["channel_outlier_share"], channels.mean(0))
    assert float(got["spikes"]) == pytest.approx(hit.sum() / 66)
    assert float(got["spike_tokens"]) == pytest.approx(hit.any(2).sum() / 66)
    assert float(got["spike_ratio"]) == pytest.approx((a / times).max(), rel=1e-6)


def test_gaussian_activations_have_neither_kind():
    got = values(Spikes(every=1), torch.randn(8, 128, 256, generator=generator()))
    assert float(got["channel_outliers"]) == 0
    assert float(got["spikes"]) == 0


def test_a_row_that_is_mostly_zero_is_not_judged():
    x = torch.zeros(1, 20, 10)
    x[0, 3, 3] = 5.0
    assert values(Spikes(every=1), x)["spikes"].isnan()


def test_outlier_dimensions_stand_out_through_the_model():
    x = torch.randn(8, 2, 100, 64, generator=generator())
    x[2:, ..., 7] += 30.0  # in 6 of 8 layers
    x[0, ..., 9] += 30.0  # in one
    outliers = OutlierChannels()
    outliers.update(x)
    assert outlier_dimensions(outliers.compute()["outlier_frequency"]) == [7]
    assert outlier_dimensions(outliers.compute()["outlier_frequency"], layers=0.1) == [7, 9]
    with pytest.raises(MeasureError, match="layer, unit"):
        outlier_dimensions(torch.zeros(4))


# -- first tokens -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [SinkScore, AttentionEntropy])
def test_with_a_cache_the_queries_are_the_last_of_the_keys(make):
    # Three queries over two cached tokens and their own; the first of all is padding.
    x = torch.rand(2, 4, 3, 5, generator=generator())
    x[..., 0] = 1e9
    x[..., 1:] /= x[..., 1:].sum(-1, keepdim=True)
    got = values(make(), x, torch.tensor([[False, True, True, True, True]] * 2))
    want = values(make(), x[..., 1:])
    for name in want:
        torch.testing.assert_close(got[name], want[name])


def test_residual_peak_is_a_ratio_of_mean_norms():
    x = torch.randn(5, 9, 12, generator=generator())
    x[:, 0] *= 7
    got, norm = values(ResidualPeak(positions=4), x), x.double().norm(dim=-1)
    assert float(got["residual_peak"]) == pytest.approx(float(norm[:, 0].mean() / norm[:, 1:].mean()), rel=1e-6)
    want = [*norm.mean(0)[:4].tolist(), float(norm[:, 4:].mean())]
    np.testing.assert_allclose(got["residual_norms"], want, rtol=1e-6)


def test_the_first_token_is_the_first_real_one():
    x = torch.ones(2, 6, 3)
    x[0, 2] = 10.0
    x[1, 0] = 10.0
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[0, :2] = False
    assert float(values(ResidualPeak(), x, mask)["residual_peak"]) == pytest.approx(10)


def test_rows_of_one_token_have_no_others():
    assert values(ResidualPeak(), torch.ones(3, 1, 4))["residual_peak"].isnan()


def test_value_drain_tells_heads_apart():
    x = torch.randn(4, 10, 3, 5, generator=generator())
    x[:, 0, 1] *= 0.05
    norm = x.double().norm(dim=-1)
    got = values(ValueDrain(heads=3), x.flatten(2))["value_drain"]
    np.testing.assert_allclose(got, norm[:, 0].mean(0) / norm[:, 1:].mean((0, 1)), rtol=1e-6)
    with pytest.raises(MeasureError, match="no 4 heads"):
        values(ValueDrain(heads=4), x.flatten(2))


def test_extreme_tokens_of_a_model_are_those_of_its_recording():
    model = ac.demo()
    ids = torch.randint(5, 400, (3, 20), generator=generator())
    table = extreme_tokens(model, ids)
    v = model.record(ids, "blocks.*.attn.v")["blocks.1.attn.v"].double().norm(dim=-1)
    want = v[:, :, 0].mean(0) / v[:, :, 1:].mean((0, 2))
    torch.testing.assert_close(table.value("value_drain", "blocks.1.attn.v"), want, rtol=1e-5, atol=1e-6)


# -- heads by domain ----------------------------------------------------------------------------------------------


def test_labels_sort_rows_as_separate_measures_would():
    x, labels = pattern(generator(), 6, 9), torch.tensor([0, 1, 1, -1, 0, 1])
    heads = DormantHeads(("a", "b"), eps=0.1)
    heads.update(x[:4], domains=labels[:4])
    heads.update(x[4:], domains=labels[4:])
    got = heads.compute()
    for domain in (0, 1):
        alone = values(SinkScore(eps=0.1), x[labels == domain])
        torch.testing.assert_close(got["domain_sink"][domain], alone["sink_excess"])
        torch.testing.assert_close(got["dormant_rate"][domain], alone["sink_rate"])


def test_labels_of_queries_sort_queries():
    x = pattern(generator(), 3, 8)
    labels = torch.randint(2, (3, 8), generator=generator(1))
    heads = DormantHeads(("ordinary", "trigger"))
    heads.update(x, domains=labels)
    excess = x[..., 0].double() - 1 / torch.arange(1, 9)
    for domain in (0, 1):
        want = torch.stack([head[labels == domain].mean() for head in excess.unbind(1)])
        torch.testing.assert_close(heads.compute()["domain_sink"][domain], want, rtol=1e-5, atol=1e-6)


def test_padding_does_not_change_a_head_and_merging_adds_rows():
    x, labels = pattern(generator(), 4, 6), torch.tensor([0, 1, 1, 0])
    padded = torch.full((4, 3, 9, 9), torch.nan)
    padded[..., 2:8, 2:8] = x
    mask = torch.zeros(4, 9, dtype=torch.bool)
    mask[:, 2:8] = True
    one, other, whole = (DormantHeads(("a", "b")) for _ in range(3))
    one.update(padded[:3], mask[:3], domains=labels[:3])
    other.update(padded[3:], mask[3:], domains=labels[3:])
    one.merge_state(other)
    whole.update(x, domains=labels)
    for name, value in whole.compute().items():
        torch.testing.assert_close(one.compute()[name], value)


@pytest.mark.parametrize(
    ("labels", "what"),
    [
        (None, "needs update"),
        (torch.zeros(3, dtype=torch.long), "shape"),
        (torch.zeros(2), "shape"),
        (torch.tensor([0, 2]), "there are the domains"),
    ],
)
def test_labels_that_do_not_fit_are_told(labels, what):
    with pytest.raises(MeasureError, match=what):
        DormantHeads(("a", "b")).update(pattern(generator(), 2, 5), domains=labels)


def test_dormant_heads_of_a_model_are_those_of_each_text():
    model = ac.demo()
    texts = {name: torch.randint(5, 400, (2, 24), generator=generator(i)) for i, name in enumerate("ab")}
    heads = dormant_heads(model, texts, eps=0.05, apart=0.4)
    for name, ids in texts.items():
        score = model.measure(ids, {"blocks.*.attn.pattern": SinkScore(eps=0.05)}).value("sink_rate")
        for row in heads.itertuples():
            assert heads.loc[row.Index, f"{name} dormant_rate"] == float(score[row.layer, row.head])
    spread = (heads["a dormant_rate"] - heads["b dormant_rate"]).abs() >= 0.4
    assert (heads["kind"] == "active-dormant").equals(spread)
    with pytest.raises(MeasureError, match="two or more"):
        dormant_heads(model, {"a": texts["a"]})


def test_ablating_a_head_costs_what_a_clamp_says():
    model = ac.demo()
    ids = torch.randint(5, 400, (2, 24), generator=generator())
    got = head_ablation_by_domain(model, {"a": ids}, "blocks.2.attn.z").set_index("head")["a rise"]
    losses = []
    for clamps in ([], [ac.Ablate("blocks.2.attn.z", "zero", heads=[1])]):
        if clamps:
            with model.clamp(*clamps):
                logits = model.logits(ids)
        else:
            logits = model.logits(ids)
        losses.append(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
    # Two float32 losses of about 10 nats.
    assert got[1] == pytest.approx(float(losses[1] - losses[0]), abs=1e-5)


# -- quantisation -------------------------------------------------------------------------------------------------


def fake_quantised(x: np.ndarray, bits: int, scale: str) -> np.ndarray:
    """(batch, pos, unit) rounded row by row with numpy in float64."""
    axis = {"tensor": (1, 2), "token": 2, "channel": 1}[scale]
    step = np.abs(x).max(axis=axis, keepdims=True) / (2 ** (bits - 1) - 1)
    return np.round(x / np.where(step > 0, step, 1)) * step


@pytest.mark.parametrize("every", [1, 4])
def test_quantisation_errors_are_those_of_rounding(every):
    x = torch.randn(3, 30, 17, generator=generator())
    x[..., 3] *= 20
    x[:, 0] *= 50
    x[1, 4] = 0
    got, a = values(QuantisationError(every=every), x), x.double().numpy()
    taken = a[:, ::every]
    power = (taken**2).sum(-1)
    for bits in BITS:
        for scale in SCALES:
            q = fake_quantised(a, bits, scale)[:, ::every]
            noise = ((taken - q) ** 2).sum(-1)
            some = power > 0
            name = f"int{bits}_{scale}"
            # Scales in float32: an entry on the edge between two steps may go either way, with the same error.
            assert float(got[f"{name}_error"]) == pytest.approx((noise[some] / power[some]).mean(), rel=1e-4)
            assert float(got[f"{name}_db"]) == pytest.approx(10 * np.log10(power.sum() / noise.sum()), rel=1e-4)
            assert float(got[f"{name}_lost"]) == pytest.approx(1 - (q != 0).sum() / (taken != 0).sum(), abs=2e-3)


def test_uniform_noise_theory_holds_for_a_flat_signal():
    # Uniform on [-1, 1]: power 1/3, step 1/127, noise step^2 / 12.
    x = torch.rand(1, 400, 500, generator=generator()) * 2 - 1
    want = 10 * np.log10((1 / 3) / ((1 / 127) ** 2 / 12))
    assert float(values(QuantisationError(every=1), x)["int8_tensor_db"]) == pytest.approx(want, abs=0.05)


def test_each_scale_cures_its_own_kind_of_outlier():
    x = torch.randn(2, 64, 64, generator=generator())
    channel, massive = x.clone(), x.clone()
    channel[..., 5] += 200.0
    massive[:, 0] *= 300
    lost = {
        name: {scale: float(values(QuantisationError(every=1), y)[f"int4_{scale}_lost"]) for scale in SCALES}
        for name, y in (("clean", x), ("channel", channel), ("massive", massive))
    }
    assert lost["channel"]["channel"] < 1.5 * lost["clean"]["channel"]
    assert lost["massive"]["token"] < 1.5 * lost["clean"]["token"]
    for name in ("channel", "massive"):
        assert lost[name]["tensor"] > 0.9
    assert lost["channel"]["token"] > 0.9
    assert lost["massive"]["channel"] > 0.9


def test_sampling_estimates_the_exact_error():
    x = torch.randn(8, 512, 64, generator=generator())
    exact, estimate = values(QuantisationError(every=1), x), values(QuantisationError(), x)
    for name, value in exact.items():
        # 512 of 4096 tokens; some 440 of the entries taken are rounded to 0 at int8, give or take 21.
        assert float(estimate[name]) == pytest.approx(float(value), rel=0.15)


def test_a_channel_too_small_for_a_scale_is_rounded_to_nothing():
    x = torch.randn(1, 20, 8, generator=generator())
    x[..., 3] *= 1e-39  # no float32 holds 127 over its largest
    silent = x.clone()
    silent[..., 3] = 0.0
    got, want = (values(QuantisationError(every=1), one) for one in (x, silent))
    for name in got:
        assert math.isfinite(float(got[name]))
        if not name.endswith("lost"):
            assert float(got[name]) == pytest.approx(float(want[name]), rel=1e-6)


def test_silence_and_single_tokens_are_rounded_without_harm():
    zeros = values(QuantisationError(), torch.zeros(1, 4, 8))
    assert all(value.isnan() for value in zeros.values())
    one = values(QuantisationError(), torch.tensor([[[1.0, -1.0, 0.0]]]))
    assert float(one["int4_tensor_error"]) < 1e-12  # the rounding of float32, squared
    assert float(one["int4_tensor_db"]) > 120
