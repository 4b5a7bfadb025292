"""Emergence, variance of benchmarks and early warnings against closed forms, other libraries and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actome.core.errors import MeasureError
from actome.dynamics.curves import emergence_score, required_items, trend, wilson
from actome.dynamics.early_warning import INDICATORS, EarlyWarning, _kendall, ar1_noise
from actome.dynamics.mirage import exact_match, metric_swap, token_edit_similarity
from actome.dynamics.variance import EvalVariance, summary


def test_the_emergence_score_is_the_paper_s_formula():
    y = np.array([0.1, 0.15, 0.12, 0.5, 0.9, 0.92])
    steps = sorted((np.diff(y) ** 2).tolist())
    assert emergence_score(y) == pytest.approx(0.82 / math.sqrt(steps[2]))
    assert emergence_score(y[::-1]) == pytest.approx(-0.82 / math.sqrt(steps[2]))
    assert emergence_score([1, 1, 1]) == 0
    assert emergence_score([0, 0, 0, 0, 1], resolution=0.01) == pytest.approx(100)
    with pytest.raises(MeasureError, match="needs 3 points"):
        emergence_score([0, 1])
    with pytest.raises(MeasureError, match="not finite"):
        emergence_score([0, 1, math.nan])


@given(st.integers(3, 30), st.floats(0.1, 10), st.floats(-5, 5))
def test_a_straight_line_scores_its_steps_whatever_its_units(n, slope, start):
    assert emergence_score(start + slope * np.arange(n)) == pytest.approx(n - 1, rel=1e-6)


def test_required_items_against_simulation():
    p, n = 0.6, 4
    needed = required_items(p, n)
    assert (1 - p**n) ** needed <= 0.05 < (1 - p**n) ** (needed - 1)
    right = np.random.default_rng(0).random((2000, needed, n)) < p
    assert right.all(-1).any(-1).mean() == pytest.approx(0.95, abs=0.025)
    assert required_items(1.0, 3) == 1
    with pytest.raises(MeasureError, match="want p in"):
        required_items(0.0, 5)


def test_trend_is_scipy_s_and_says_when_there_is_none():
    from scipy.stats import kendalltau, spearmanr

    rng = np.random.default_rng(1)
    y = np.arange(20) * 0.1 + rng.standard_normal(20)
    found = trend(np.arange(20), y)
    assert (found.kendall, found.spearman) == (
        pytest.approx(kendalltau(range(20), y).statistic), pytest.approx(spearmanr(range(20), y).statistic),
    )  # fmt: skip
    slopes = [(y[j] - y[i]) / (j - i) for i in range(20) for j in range(i + 1, 20)]
    assert found.slope == pytest.approx(np.median(slopes))
    with pytest.raises(MeasureError, match="constant"):
        trend(range(5), [1.0] * 5)


@pytest.mark.parametrize(("right", "items"), [(0, 20), (3, 20), (20, 20), (450, 1000)])
def test_wilson_solves_its_equation(right, items):
    low, high = wilson(right, items)
    for end in (low, high):
        if 0 < end < 1:  # the ends are where |share - end| is 1.96 standard errors at the end
            assert abs(right / items - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / items), rel=1e-5)
    assert low <= right / items <= high
    with pytest.raises(MeasureError, match="no share"):
        wilson(3, 2)


def family(p_S, items=2000, tokens=5, seed=0):
    wrong = np.random.default_rng(seed).random((len(p_S), items, tokens)) > np.asarray(p_S)[:, None, None]
    return wrong.astype(int), np.zeros((items, tokens), int)


def test_a_jump_made_by_the_metric_and_one_made_by_the_model():
    scales = np.geomspace(1e3, 1e10, 15)
    outputs, targets = family(np.exp(-((scales / 1e8) ** -0.15)))
    mirage = metric_swap(outputs, targets, scales)
    assert mirage.verdict == "metric"
    assert mirage.r2 > 0.95  # of p at 1 / sqrt(items)
    assert mirage.ratio > 2
    assert mirage.curves["exact_match"][-1] == exact_match(outputs[-1], targets)
    assert (
        metric_swap(*family([0.1, 0.1, 0.11, 0.1, 0.12, 0.95, 0.97, 0.98, 0.99, 0.99]), range(10)).verdict
        == "transition"
    )
    assert metric_swap(*family(np.linspace(0.5, 0.9, 8)), range(8)).verdict == "no jump"
    few = metric_swap(outputs[:, :30], targets[:30], scales)
    assert len(few.unresolved) > 8


def test_answers_with_tokens_that_fail_together_are_not_explained_by_p_to_the_n():
    p = np.concatenate([np.linspace(0.02, 0.1, 8), np.linspace(0.2, 0.9, 4)])
    whole = np.random.default_rng(0).random((12, 4000, 1)) > p[:, None, None]
    found = metric_swap(np.repeat(whole, 5, -1).astype(int), np.zeros((4000, 5), int), range(12))
    np.testing.assert_allclose(found.curves["exact_match"], found.curves["token_accuracy"])
    assert found.r2 < 0.9
    assert found.ratio == pytest.approx(1)
    assert found.verdict != "metric"


def test_edit_similarity_forgives_a_shift():
    shifted = np.roll(np.arange(6), 1)[None]
    assert token_edit_similarity(shifted, np.arange(6)[None]) == pytest.approx(1 - 2 / 6)
    with pytest.raises(MeasureError, match="five or more"):
        metric_swap(np.zeros((3, 4, 2), int), np.zeros((4, 2), int), [1, 2, 3])
    with pytest.raises(MeasureError, match="one scale a model"):
        metric_swap(np.zeros((6, 4, 2), int), np.zeros((3, 2), int), range(6))


def planted(seeds=12, items=400, seed_sd=0.03, cont_noise=0.05, rng_seed=0, steps=8):
    """Items of one difficulty, so that the variance over seeds is seed_sd^2 + p (1 - p) / items."""
    rng, found = np.random.default_rng(rng_seed), EvalVariance(chance=0.2)
    for seed in range(seeds):
        own = seed_sd * rng.standard_normal()
        for step in range(steps):
            p = 0.3 + 0.05 * step + own
            found.update(seed, step, rng.random(items) < p, np.clip(p + cont_noise * rng.standard_normal(items), 0, 1))
    return found


def test_variance_of_a_benchmark_against_the_whole_array():
    from scipy.stats import kendalltau

    found = planted()
    table = found.compute().set_index("metric")
    scores = found.scores("discrete")
    last = scores[:, -1].mean(-1)
    row = table.loc["discrete"]
    assert row["mean"] == pytest.approx(last.mean())
    assert row["seed_sd"] == pytest.approx(last.std(ddof=1))
    assert row["snr"] == pytest.approx((last.mean() - 0.2) / last.std(ddof=1))
    tau = [kendalltau(range(8), one).statistic for one in scores.mean(-1)]
    assert row["monotonicity"] == pytest.approx(np.mean(tau))
    assert row["item_ci"] == pytest.approx(np.mean([1.96 * math.sqrt(s * (1 - s) / 400) for s in last]))
    assert row["item_low"] < last.mean() < row["item_high"]
    assert table.snr["continuous"] > table.snr["discrete"]
    drawn = found.over_seeds(50)
    assert drawn["discrete"]["snr"].shape == (50,)
    assert np.mean(drawn["continuous"]["monotonicity"] >= drawn["discrete"]["monotonicity"]) > 0.8


def test_the_seeds_own_part_is_free_of_the_items():
    parts, plain = [], []
    for i in range(20):
        one = planted(seeds=10, items=100, steps=3, rng_seed=i)
        parts.append(one.seed_part() ** 2)
        plain.append(one.scores("discrete")[:, -3:].mean(-1).var(0, ddof=1).mean())
    # 0.03^2 planted; a mean of 100 items of right or wrong adds about 0.24 / 100.
    assert np.mean(plain) == pytest.approx(0.03**2 + 0.24 / 100, rel=0.25)
    assert np.mean(parts) == pytest.approx(0.03**2, abs=0.0005)


def test_the_smallest_difference_has_its_power():
    from scipy.stats import ttest_ind

    found = planted(seeds=8, rng_seed=3)
    sd = found.scores("discrete")[:, -1].mean(-1).std(ddof=1)
    difference = found.min_detectable_difference(runs=8)
    rng = np.random.default_rng(4)
    a, b = sd * rng.standard_normal((2, 1000, 8))
    assert np.mean(ttest_ind(a, b + difference, axis=1).pvalue < 0.05) == pytest.approx(0.8, abs=0.06)
    assert found.min_detectable_difference(runs=32) < 0.6 * difference
    assert math.isfinite(found.min_detectable_difference(runs=1))


def test_discriminability_and_items():
    a, b = planted(rng_seed=5), planted(rng_seed=6)
    x, y = (one.scores("discrete")[:, -1].mean(-1) for one in (a, b))
    pooled = math.sqrt((x.var(ddof=1) + y.var(ddof=1)) / 2)
    assert a.discriminability(b) == pytest.approx(abs(x.mean() - y.mean()) / pooled)
    scores = a.scores("discrete").reshape(-1, 400)
    rest = scores.sum(1) - scores[:, 7]
    assert a.item_discrimination()[7] == pytest.approx(np.corrcoef(scores[:, 7], rest)[0, 1])
    assert summary(np.array([[0.2, 0.2, 0.2], [0.2, 0.2, 0.2]]))["monotonicity"] == 0


def test_bad_input_to_the_variance():
    one = EvalVariance()
    one.update(0, 0, [1, 0], [0.5, 0.4])
    with pytest.raises(MeasureError, match="given before"):
        one.update(0, 0, [1, 0], [0.5, 0.4])
    with pytest.raises(MeasureError, match="same items"):
        one.update(0, 1, [1, 0, 1], [0.5, 0.4, 0.1])
    with pytest.raises(MeasureError, match="not finite"):
        one.update(0, 1, [1, 0], [0.5, math.nan])
    with pytest.raises(MeasureError, match="two seeds"):
        one.compute()
    one.update(1, 1, [1, 0], [0.5, 0.4])
    with pytest.raises(MeasureError, match="are missing"):
        one.compute()
    with pytest.raises(MeasureError, match="does not exist"):
        one.scores("both")


# Early warnings


def test_indicators_are_those_of_each_window():
    rng = np.random.default_rng(0)
    trace = rng.standard_normal(120).cumsum()
    warning = EarlyWarning(surrogates=0)
    rest = warning.detrended(trace[None])
    found = warning.fit(trace)
    assert len(found.x) == 61
    assert (found.x[0], found.x[-1]) == (59, 119)
    for i in (0, 17, 60):
        window = rest[0, i : i + 60]
        assert found.indicators["variance"][i] == pytest.approx(window.var())
        assert found.indicators["ar1"][i] == pytest.approx(np.corrcoef(window[1:], window[:-1])[0, 1])
        skew = ((window - window.mean()) ** 3).mean() / window.std() ** 3
        assert found.indicators["skewness"][i] == pytest.approx(abs(skew))
    np.testing.assert_allclose(found.indicators["return_rate"], 1 - found.indicators["ar1"])
    assert set(found.tau) == set(INDICATORS)


def test_kendall_of_many_traces_is_scipy_s():
    from scipy.stats import kendalltau

    values = np.random.default_rng(1).standard_normal((5, 100))
    np.testing.assert_allclose(_kendall(values), [kendalltau(range(100), one).statistic for one in values])


@pytest.mark.parametrize("kind", ["ar1", "phase"])
def test_false_alarms_of_a_stationary_trace_are_as_promised(kind):
    rates = EarlyWarning(surrogates=59, kind=kind).false_alarms(100, 0.6, traces=60)
    # 5 % promised for each indicator; 0.15 is three and a half standard errors of 60 traces away.
    assert all(rate <= 0.15 for rate in rates.values()), rates
    assert rates["alarm"] <= min(rates["variance"], rates["ar1"])


def test_slowing_down_is_told_from_a_stationary_trace():
    rng, n = np.random.default_rng(2), 200
    slowing = np.zeros((30, n))
    for t in range(1, n):
        slowing[:, t] = (0.2 + 0.75 * t / n) * slowing[:, t - 1] + rng.standard_normal(30)
    still = ar1_noise(200, n, 0.6, rng)
    warning = EarlyWarning()
    a, b = warning.taus(slowing), warning.taus(still)
    for name in ("variance", "ar1", "low_frequency"):
        assert (a[name][:, None] > b[name]).mean() > 0.85  # area under the ROC curve
        limit = warning.threshold(n, 0.6, traces=400)[name]
        assert np.mean(a[name] > limit) > 0.4
        assert np.mean(b[name] > limit) == pytest.approx(0.05, abs=0.06)
    assert (a["return_rate"][:, None] < b["return_rate"]).mean() > 0.85


def test_an_unannounced_jump_outside_raises_no_alarm():
    """A step in the mean after the trace that is looked at leaves nothing in it."""
    trace = ar1_noise(1, 150, 0.3, np.random.default_rng(3))[0]
    assert not EarlyWarning(surrogates=99).fit(trace).alarm


def test_bad_input_to_early_warnings():
    with pytest.raises(MeasureError, match="needs 40 points"):
        EarlyWarning().fit(np.arange(20.0))
    with pytest.raises(MeasureError, match="evenly spaced"):
        EarlyWarning().fit(np.geomspace(1, 1000, 50), np.random.default_rng(0).standard_normal(50))
    with pytest.raises(MeasureError, match="constant"):
        EarlyWarning().fit(np.ones(50))
    with pytest.raises(MeasureError, match="shares"):
        EarlyWarning(window=2)
    with pytest.raises(MeasureError, match="does not exist"):
        EarlyWarning(kind="white")
