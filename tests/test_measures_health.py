"""The measures of the health panel, against their definitions on whole tensors and against other libraries."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from measured import activations, generator, logits, pattern
from sklearn.metrics import log_loss
from torch import Tensor
from torch.nn import functional as F

from actome.core.errors import MeasureError
from actome.measures import (
    ActivationScale,
    AttentionEntropy,
    DeadUnits,
    EffectiveRank,
    MassiveActivations,
    Movement,
    NextTokenLoss,
    OutlierChannels,
    SinkScore,
    Sparsity,
    Voids,
)
from actome.measures.extremes import lower_medians
from actome.measures.sparsity import count_above
from actome.measures.spectrum import moments

some = settings(max_examples=20, deadline=None)


def values(measure, x: Tensor, mask: Tensor | None = None, tokens: Tensor | None = None) -> dict[str, Tensor]:
    measure.update(x, mask, tokens)
    return measure.compute()


# -- scale ------------------------------------------------------------------------------------------------------


def test_scale_is_what_numpy_says():
    x = torch.randn(3, 7, 50, generator=generator())
    got, a = values(ActivationScale(), x), x.double().numpy().reshape(-1, 50)
    assert float(got["rms"]) == pytest.approx(np.sqrt(np.mean(a**2)), rel=1e-6)
    assert float(got["norm"]) == pytest.approx(np.linalg.norm(a, axis=1).mean(), rel=1e-6)
    assert float(got["max_abs"]) == pytest.approx(np.abs(a).max(), rel=1e-7)
    assert float(got["non_finite"]) == 0


def test_non_finite_activations_are_counted_exactly_and_hide_nothing_else():
    x = torch.randn(2, 10, 8, generator=generator())
    whole = values(ActivationScale(), x[:, :9])
    x[:, 9, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    got = values(ActivationScale(), x)
    assert float(got["non_finite"]) == 6 / x.numel()
    for name in ("rms", "norm", "max_abs"):
        assert float(got[name]) == pytest.approx(float(whole[name]), rel=1e-6)
    assert float(values(ActivationScale(), torch.full((1, 2, 3), torch.nan))["non_finite"]) == 1


# -- sparsity ---------------------------------------------------------------------------------------------------


def test_sparsity_is_what_counting_says():
    x = F.gelu(torch.randn(4, 9, 33, generator=generator()))
    x[x.abs() < 0.05] = 0
    got, rms = values(Sparsity(near=0.2), x), x.square().mean(-1, keepdim=True).sqrt()
    active = x.abs() > 0.2 * rms
    assert float(got["zeros"]) == pytest.approx(float((x == 0).double().mean()), abs=1e-12)
    assert float(got["near_zeros"]) == pytest.approx(float((~active).double().mean()), abs=1e-12)
    assert torch.equal(got["frequency"], active.double().mean((0, 1)))


@given(scale=st.floats(1e-3, 1e3))
@some
def test_sparsity_does_not_depend_on_the_scale(scale):
    x = torch.randn(2, 5, 16, generator=generator())
    assert torch.equal(values(Sparsity(), x)["frequency"], values(Sparsity(), x * scale)["frequency"])


def test_counts_by_chunks_are_counts():
    x, threshold = torch.randn(700, 900, generator=generator()), torch.rand(700, 1, generator=generator(1))
    assert torch.equal(count_above(x, threshold), (x.abs() > threshold).sum(0))


@pytest.mark.parametrize("act", [F.relu, F.gelu, F.silu])
def test_dead_units_are_those_that_never_open(act):
    before = torch.randn(4, 64, 10, generator=generator())
    before[..., 2] -= 20  # never open
    before[..., 7] = -20
    before[1, 3, 7] = 3.0  # opens once
    got = values(DeadUnits(), act(before))
    assert (got["peak"] <= 1e-3).nonzero().flatten().tolist() == [2]
    assert float(got["dead"]) == pytest.approx(0.1)
    # The rule of three: 256 tokens without an activation.
    assert float(got["dead_bound"]) == pytest.approx(1 - 0.05 ** (1 / 256), rel=1e-9)
    assert scipy.stats.binom.cdf(0, 256, float(got["dead_bound"])) == pytest.approx(0.05)


def test_a_silent_site_is_dead_and_a_constant_one_is_not():
    assert float(values(DeadUnits(), torch.zeros(1, 3, 4))["dead"]) == 1
    assert float(values(DeadUnits(), torch.full((1, 3, 4), 2.0))["dead"]) == 0


def test_a_unit_dead_in_one_half_of_the_text_is_alive():
    first, second = torch.ones(1, 4, 3), torch.ones(1, 4, 3)
    first[..., 0] = 0
    dead = DeadUnits()
    dead.update(first)
    dead.update(second)
    assert float(dead.compute()["dead"]) == 0


# -- extremes ---------------------------------------------------------------------------------------------------


def test_massive_ratio_is_a_ratio_of_means_over_sequences():
    x = torch.randn(5, 9, 21, generator=generator())
    x[:, 0, 4] = torch.tensor([100.0, -900.0, 30.0, 50.0, 80.0])
    got, a = values(MassiveActivations(), x), x.abs().double().numpy().reshape(5, -1)
    # An odd number of entries, so that the lower median is the median.
    assert float(got["massive_ratio"]) == pytest.approx(a.max(1).mean() / np.median(a, axis=1).mean(), rel=1e-6)
    assert (int(got["massive_unit"]), int(got["massive_position"])) == (4, 0)


def test_massive_activations_are_found_where_they_sit():
    x = torch.randn(4, 10, 16, generator=generator())
    x[0, 0, 3] = x[1, 0, 3] = -500.0
    x[2, 7, 3] = 400.0
    x[3, 9, 11] = 600.0
    got = values(MassiveActivations(positions=8), x)
    assert {i: float(v) for i, v in enumerate(got["massive_unit_share"]) if v} == {3: 0.75, 11: 0.25}
    assert {i: float(v) for i, v in enumerate(got["massive_position_share"]) if v} == {0: 0.5, 7: 0.25, 8: 0.25}


def test_positions_count_from_the_first_real_token():
    x = torch.randn(1, 6, 8, generator=generator())
    x[0, 3, 5] = 99.0
    mask = torch.tensor([[False, False, False, True, True, True]])
    assert int(values(MassiveActivations(), x, mask)["massive_position"]) == 0
    broken = x.clone()
    broken[0, 1] = torch.nan  # left out, but it still takes up a position
    assert int(values(MassiveActivations(), broken)["massive_position"]) == 3


@given(st.lists(st.floats(0, 100, width=32), min_size=1, max_size=40), st.integers(0, 5))
@some
def test_lower_medians_are_those_of_torch(row, more):
    x = torch.tensor([row + [math.inf] * more], dtype=torch.float32)
    assert float(lower_medians(x, [len(row)])) == float(torch.tensor(row, dtype=torch.float32).median())


def test_outlier_channels_stand_out_at_many_tokens_and_spikes_do_not():
    x = torch.randn(8, 50, 128, generator=generator())
    x[..., 9] *= 40
    x[:, 0, 20] = 1000.0  # a spike: 1 token in 50
    got = values(OutlierChannels(), x)
    limit = 6 * math.sqrt(math.pi / 2) * x.abs().mean(-1, keepdim=True)
    above = (x.abs() > limit).double().mean((0, 1))
    torch.testing.assert_close(got["outlier_frequency"], above, atol=1e-12, rtol=0)
    assert (above >= 0.06).nonzero().flatten().tolist() == [9]
    energy = (x.square() / x.square().sum(-1, keepdim=True)).double().mean((0, 1))[9]
    assert float(got["outlier_energy"]) == pytest.approx(float(energy), rel=1e-5)


def test_gaussian_activations_have_no_outliers_and_a_known_ratio():
    x = torch.randn(4, 256, 768, generator=generator())
    assert int(values(OutlierChannels(), x)["outlier_channels"]) == 0
    # Expected maximum of 196608 half-normal numbers over their median.
    expected = scipy.stats.halfnorm.ppf(0.5 ** (1 / (256 * 768))) / scipy.stats.halfnorm.median()
    assert float(values(MassiveActivations(), x)["massive_ratio"]) == pytest.approx(expected, rel=0.1)


# -- attention --------------------------------------------------------------------------------------------------


def alpha(pattern_BHQS: Tensor, k: int = 0) -> Tensor:
    """The paper's importance of position k, by its own sum: (batch, head)."""
    length = pattern_BHQS.shape[-1]
    return sum(pattern_BHQS[..., i, k] for i in range(k, length)) / (length - k)  # type: ignore[return-value]


def test_sinks_are_what_the_paper_sums():
    x = pattern(generator(), 6, 20)
    got, raw = values(SinkScore(), x), values(SinkScore(baseline=None), x)
    uniform = sum(1 / (i + 1) for i in range(20)) / 20
    torch.testing.assert_close(got["sink"], alpha(x).mean(0).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(got["sink_excess"], alpha(x).mean(0).double() - uniform, rtol=0, atol=1e-6)
    assert torch.equal(raw["sink_rate"], (alpha(x) > 0.3).double().mean(0))
    assert torch.equal(got["sink_rate"], (alpha(x) - uniform > 0.3).double().mean(0))


def uniform(length: int, window: int | None, causal: bool) -> Tensor:
    i, j = torch.arange(length)[:, None], torch.arange(length)
    visible = (j <= i if causal else j >= 0) & ((i - j < window) if window else True)
    return (visible / visible.sum(-1, keepdim=True)).expand(2, 3, length, length).clone()


@pytest.mark.parametrize(("window", "causal"), [(None, True), (None, False), (4, True)])
def test_uniform_attention_has_no_sink_and_full_entropy(window, causal):
    x = uniform(12, window, causal)
    got = values(SinkScore(), x)
    torch.testing.assert_close(got["sink_excess"], torch.zeros(3, dtype=torch.float64), atol=1e-7, rtol=0)
    assert not got["sink_rate"].any()
    entropy = values(AttentionEntropy(), x)["attention_entropy"]
    torch.testing.assert_close(entropy, torch.ones(3, dtype=torch.float64), atol=1e-6, rtol=0)


def test_uniform_attention_over_a_short_text_is_no_sink():
    # Without the baseline, five tokens of uniform attention would be called a sink.
    x = uniform(5, None, True)
    assert values(SinkScore(baseline=None), x)["sink_rate"].all()
    assert not values(SinkScore(), x)["sink_rate"].any()


def test_entropy_is_what_scipy_says():
    x = pattern(generator(), 3, 30)
    # A query whose other keys are all rounded to zero in one head still sees them.
    x[0, 1, 10] = F.one_hot(torch.tensor(0), 30)
    got = values(AttentionEntropy(), x)["attention_entropy"]
    terms = scipy.stats.entropy(x.double().numpy(), axis=-1)[..., 1:] / np.log(np.arange(2, 31))
    np.testing.assert_allclose(got.numpy(), terms.mean((0, 2)), rtol=1e-5)


def test_attention_of_cached_queries_counts_their_own_rows():
    x = pattern(generator(), 2, 9)
    last = values(SinkScore(), x[:, :, 6:])
    torch.testing.assert_close(last["sink"], x[:, :, 6:, 0].mean((0, 2)).double(), rtol=1e-6, atol=0)


# -- spectrum ---------------------------------------------------------------------------------------------------


def rank_by_svd(x: Tensor) -> float:
    singular = np.linalg.svd(x.double().flatten(0, -2).numpy(), compute_uv=False)
    return float(np.exp(scipy.stats.entropy(singular)))


@pytest.mark.parametrize("width", [12, 300])
@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_effective_rank_is_that_of_the_singular_values(width, mean):
    x = torch.randn(4, 200, width, generator=generator()) * torch.logspace(0, -2, width) + mean
    got = values(EffectiveRank(), x)
    assert float(got["effective_rank"]) == pytest.approx(rank_by_svd(x), rel=1e-4)
    assert float(got["effective_rank_share"]) == pytest.approx(float(got["effective_rank"]) / width)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_a_low_rank_is_found_in_spite_of_rounding(rank):
    g = generator()
    x = torch.randn(4, 256, rank, generator=g) @ torch.randn(rank, 512, generator=g)
    got = EffectiveRank()
    for piece in x:
        got.update(piece[None])
    assert float(got.compute()["effective_rank"]) == pytest.approx(rank_by_svd(x), rel=1e-3)


def test_effective_rank_of_few_tokens_is_compared_with_what_they_allow():
    got = values(EffectiveRank(), torch.eye(16)[None, :4])
    assert float(got["effective_rank"]) == pytest.approx(4)
    assert float(got["effective_rank_share"]) == pytest.approx(1)


@pytest.mark.parametrize("width", [5, 256, 301])
def test_second_moments_are_sums_of_outer_products(width):
    x = torch.randn(40, width, generator=generator()) + 50
    torch.testing.assert_close(moments(x)[1], x.double().T @ x.double(), rtol=1e-6, atol=1e-3)


# -- loss -------------------------------------------------------------------------------------------------------


def test_loss_is_that_of_torch_and_of_sklearn():
    x, tokens = logits(generator(), 3, 8), torch.randint(0, 11, (3, 8), generator=generator(1))
    got = values(NextTokenLoss(), x, None, tokens)
    predicted, target = x[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    assert float(got["loss"]) == pytest.approx(float(F.cross_entropy(predicted, target)), rel=1e-6)
    by_sklearn = log_loss(target, predicted.double().softmax(-1), labels=list(range(11)))
    assert float(got["loss"]) == pytest.approx(by_sklearn, rel=1e-6)
    assert float(got["perplexity"]) == pytest.approx(math.exp(by_sklearn), rel=1e-5)
    assert float(got["log_z"]) == pytest.approx(float(x.double().logsumexp(-1).mean()), rel=1e-6)
    assert float(got["max_logit"]) == pytest.approx(float(x.abs().max()))


def test_only_real_tokens_are_predicted_from_real_tokens():
    x, tokens = logits(generator(), 2, 6), torch.randint(0, 11, (2, 6), generator=generator(1))
    mask = torch.tensor([[True, True, True, False, False, False], [False, True, True, True, True, True]])
    nll = F.cross_entropy(x[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    expected = torch.stack([nll[0, 0], nll[0, 1], *nll[1, 1:]]).mean()
    assert float(values(NextTokenLoss(), x, mask, tokens)["loss"]) == pytest.approx(float(expected), rel=1e-6)


def test_loss_over_many_chunks():
    x, tokens = torch.randn(2, 37, 60_000, generator=generator()), torch.randint(0, 60_000, (2, 37))
    expected = F.cross_entropy(x[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert float(values(NextTokenLoss(), x, None, tokens)["loss"]) == pytest.approx(float(expected), rel=1e-6)


def test_words_that_cannot_occur_are_no_large_logits():
    x, tokens = logits(generator(), 1, 6), torch.zeros(1, 6, dtype=torch.long)
    x[..., 10] = -torch.inf
    got = values(NextTokenLoss(), x, None, tokens)
    assert float(got["max_logit"]) == pytest.approx(float(x[..., :10].abs().max()))
    assert float(got["non_finite_tokens"]) == 0


def test_loss_needs_tokens():
    with pytest.raises(MeasureError, match="needs the token ids"):
        NextTokenLoss().update(torch.zeros(1, 2, 3))


# -- depth ------------------------------------------------------------------------------------------------------


def test_movement_is_what_the_states_say():
    h = torch.randn(5, 3, 7, 16, generator=generator()).cumsum(0)
    got = values(Movement(), h)
    step = (h[1:] - h[:-1]).norm(dim=-1) / h[:-1].norm(dim=-1)
    torch.testing.assert_close(got["movement"][1:], step.mean((1, 2)).double(), rtol=1e-5, atol=0)
    cosine = F.cosine_similarity(h[1:], h[:-1], dim=-1).mean((1, 2)).double()
    torch.testing.assert_close(got["cosine"][1:], cosine, rtol=1e-5, atol=1e-6)
    rms = h.square().mean((1, 2, 3)).sqrt()
    torch.testing.assert_close(got["growth"], (rms / rms[0]).double(), rtol=1e-5, atol=0)
    assert math.isnan(got["movement"][0])
    assert math.isnan(got["cosine"][0])


def test_a_small_step_is_not_rounded_away():
    h = torch.randn(1, 4, 64, generator=generator())
    got = values(Movement(), torch.stack([h, h * (1 + 1e-4)]))
    assert float(got["movement"][1]) == pytest.approx(1e-4, rel=1e-2)


@given(seed=st.integers(0, 1000), alpha=st.floats(0, 1))
@some
def test_voids_by_the_rule_written_out(seed, alpha):
    h = torch.randn(6, 2, 3, 8, generator=generator(seed)).cumsum(0)
    used = values(Voids(alpha), h)["used"]
    norms = h.norm(dim=-1).flatten(1).T.tolist()
    expected = np.zeros(5)
    for n in norms:
        change = [b - a for a, b in itertools.pairwise(n)]
        for layer, d in enumerate(change):
            earlier = change[:layer] or [d]
            expected[layer] += d >= alpha * (max(earlier) - min(earlier)) if layer else d >= 0
    # A change that meets its threshold to the last bit may fall on either side.
    assert np.abs(used[1:].numpy() - expected / len(norms)).max() <= 1 / len(norms) + 1e-9
    assert math.isnan(used[0])


def test_every_measure_survives_constants():
    x = torch.full((2, 6, 12), 3.0)
    for measure in (
        ActivationScale(),
        Sparsity(),
        DeadUnits(),
        MassiveActivations(),
        OutlierChannels(),
        EffectiveRank(),
    ):
        assert not any(value.isnan().any() for value in values(measure, x).values())
    assert float(values(EffectiveRank(), x)["effective_rank"]) == pytest.approx(1, abs=1e-6)
    assert float(values(MassiveActivations(), x)["massive_ratio"]) == 1
    assert activations(generator(), 1, 1).shape == (1, 1, 24)


def test_a_masked_word_is_no_large_logit_where_another_token_is_nan():
    x = torch.zeros(1, 3, 5)
    x[0, 0, 1], x[0, 1] = -torch.inf, torch.nan
    measure = NextTokenLoss()
    measure.update(x, None, torch.zeros(1, 3, dtype=torch.long))
    assert float(measure.compute()["max_logit"]) == 0.0
