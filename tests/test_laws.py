"""Laws and dates against planted truth, brute force and closed forms; shuffled order as what must fail."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
import pytest

from actome.core.errors import MeasureError
from actome.dynamics.changepoints import change_point
from actome.dynamics.dates import delay, first_passage, lead_time
from actome.dynamics.law_checks import compare_laws, control, extrapolate
from actome.dynamics.law_families import LAWS, exp_log, exp_log_peak, law_of
from actome.dynamics.law_search import Search
from actome.dynamics.laws import fit_law
from actome.dynamics.segments import segments
from actome.dynamics.series import autoregressive, block_length, lag1, series
from actome.dynamics.smoothing import smooth
from actome.dynamics.turns import plateaus, turning_points

PLANTED = {
    "power": (np.geomspace(1, 1e5, 30), (3.0, -2.0, -0.3)),
    "logspace_power": (np.geomspace(1, 1e5, 40), (0.05, 0.4, 1.0, 0.2)),
    "exp_log": (np.linspace(0, 1e5, 40), (8.0, 0.08, 4e-4, 1.0, 5.0)),
    "rectified": (np.geomspace(200, 1.6e6, 14), (30.0, 28.0, 0.5, 1.2)),
    "sigmoid": (np.linspace(0, 1e5, 40), (0.1, 0.8, 4e4, 3e3)),
    "log_sigmoid": (np.geomspace(1, 1e5, 40), (0.1, 0.8, 300.0, 3.0)),
    "exponential": (np.linspace(0, 1e5, 30), (2.0, 3.0, 5e-5)),
    "log": (np.geomspace(1, 1e5, 20), (1.0, 0.5)),
    "sqrt": (np.linspace(0, 1e4, 20), (1.0, 0.1)),
    "linear": (np.linspace(-5, 5, 20), (1.0, 2.0)),
    "loglog": (np.geomspace(1, 1e5, 20), (0.7, -0.3)),
}


@pytest.mark.parametrize("name", sorted(LAWS))
def test_every_law_finds_its_own_parameters_without_noise(name):
    x, truth = PLANTED[name]
    fit = fit_law(x, LAWS[name].function(x, *truth), law=name)
    np.testing.assert_allclose(list(fit.parameters.values()), truth, rtol=1e-3)
    assert fit.r2 > 1 - 1e-9
    assert not fit.open
    np.testing.assert_allclose(fit.predict(x * 1.1), LAWS[name].function(x * 1.1, *truth), rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "noise", "expected"), [("power", 0.02, 0.95), ("exponential", 0.05, 0.95), ("sigmoid", 0.02, 0.95)]
)
def test_intervals_and_bands_cover_the_truth_at_their_rate(name, noise, expected):
    x, truth = PLANTED[name]
    curve = LAWS[name].function(x, *truth)
    rng, runs = np.random.default_rng(0), 80
    inside, band, point = [], [], []
    for _ in range(runs):
        fit = fit_law(x, curve + noise * rng.standard_normal(len(x)), law=name, starts=2)
        inside.append(
            [low <= one <= high for one, (low, high) in zip(truth, map(fit.interval, fit.parameters), strict=True)]
        )
        low, high = fit.band(x)
        band.append(np.mean((low <= curve) & (curve <= high)))
        low, high = fit.band(x, kind="prediction")
        new = curve + noise * rng.standard_normal(len(x))
        point.append(np.mean((low <= new) & (new <= high)))
    # Binomial standard error of 80 runs at 0.95 is 0.024; three of them.
    assert np.all(np.abs(np.mean(inside, 0) - expected) < 0.075)
    assert abs(np.mean(band) - expected) < 0.06
    assert abs(np.mean(point) - expected) < 0.03


def test_linear_standard_errors_are_those_of_the_textbook():
    rng = np.random.default_rng(1)
    x = np.linspace(3, 9, 25)
    y = 2 + 0.5 * x + rng.standard_normal(25)
    design = np.stack([np.ones(25), x], 1)
    beta = np.linalg.solve(design.T @ design, design.T @ y)
    r = y - design @ beta
    errors = np.sqrt(np.diag(np.linalg.inv(design.T @ design)) * (r @ r) / 23)
    fit = fit_law(x, y, "linear")
    np.testing.assert_allclose(list(fit.parameters.values()), beta, rtol=1e-6)
    np.testing.assert_allclose(list(fit.errors.values()), errors, rtol=1e-4)
    # Gaussian likelihood at its maximum, with the variance as a third parameter.
    loglik = -12.5 * (math.log(2 * math.pi * (r @ r) / 25) + 1)
    assert fit.bic == pytest.approx(3 * math.log(25) - 2 * loglik)
    assert fit.aic == pytest.approx(6 - 2 * loglik + 24 / 21)
    assert fit.r2 == pytest.approx(1 - (r @ r) / ((y - y.mean()) ** 2).sum())


def test_weights_are_those_of_weighted_least_squares():
    rng = np.random.default_rng(2)
    x, sigma = np.linspace(0, 4, 30), np.linspace(0.1, 3, 30)
    y = 1 + 2 * x + sigma * rng.standard_normal(30)
    fit = fit_law(x[::-1], y[::-1], "linear", sigma=sigma[::-1])
    expected = np.polynomial.polynomial.polyfit(x, y, 1, w=1 / sigma)
    np.testing.assert_allclose(list(fit.parameters.values()), expected, rtol=1e-6)


def test_the_emergence_law_peaks_where_its_curve_does():
    for lam, gam, t0 in [(0.08, 40.0, 1.0), (1.0, 3.0, 0.2), (1e-3, 500.0, 2.0)]:
        t = np.linspace(0, 5 * exp_log_peak(lam, gam, t0), 200001)
        assert t[exp_log(t, 2.0, lam, gam, t0, 1.0).argmax()] == pytest.approx(exp_log_peak(lam, gam, t0), rel=1e-3)
    assert exp_log_peak(0.0, 1.0, 1.0) == math.inf


def test_the_classes_of_the_emergence_law():
    t = np.linspace(0, 1e5, 40)
    noise = 0.05 * np.random.default_rng(0).standard_normal(40)
    early = fit_law(t, exp_log(t, 8, 0.08, 4e-4, 1.0, 5) + noise, "exp_log")
    truth = exp_log_peak(0.08, 4e-4, 1.0)
    assert early.derived["class"] == "early peak"
    drawn = early.bootstrap(40, seed=0)
    low, high = drawn.interval("t_peak", 0.99)
    assert low < truth < high
    assert high - low < 0.2 * truth
    assert drawn.classes == {"early peak": 1.0}

    slow = fit_law(t, exp_log(t, 3, 0.0, 2e-4, 1.0, 5) + noise, "exp_log")
    assert slow.derived == {"t_peak": math.inf, "class": "log increase"}
    # Without decay ln(gam t + t0) = ln gam + ln(t + t0 / gam): gam, t0 and K cannot be told apart.
    assert set(slow.open) == {"gam", "t0", "K"}
    assert slow.at_bound == ("lam",)
    assert math.isinf(slow.errors["gam"])
    assert np.isfinite(slow.band(t)).all()
    trough = fit_law(t, -exp_log(t, 8, 0.08, 4e-4, 1.0, 5), "exp_log")
    assert trough.derived["class"] == "early trough"


@pytest.mark.parametrize("name", ["power", "exp_log", "sigmoid", "rectified"])
def test_shuffled_order_does_not_fit(name):
    x, truth = PLANTED[name]
    y = LAWS[name].function(x, *truth)
    y = y * np.exp(0.01 * np.random.default_rng(3).standard_normal(len(x)))
    found = control(x, y, name, permutations=19, seed=0, starts=2)
    assert found.p == pytest.approx(0.05)
    assert found.r2 > 0.9
    assert found.median < 0.5


def test_noise_does_not_pass_the_control():
    rng = np.random.default_rng(4)
    p = [control(np.arange(1.0, 25), rng.standard_normal(24), "sqrt", permutations=19, seed=i).p for i in range(60)]
    p += [control(np.arange(1.0, 25), rng.standard_normal(24), "power", permutations=9, seed=i).p for i in range(10)]
    # Uniform p-values: 0.05 is expected 3 times in 60, more than 9 times has a chance below 0.002.
    assert np.sum(np.array(p) <= 0.05) <= 9
    assert np.mean(p) > 0.3


def test_a_soft_loss_does_not_follow_outliers():
    x, truth = PLANTED["exponential"]
    rng = np.random.default_rng(5)
    y = LAWS["exponential"].function(x, *truth) + 0.02 * rng.standard_normal(len(x))
    y[[3, 11, 22]] += 4.0
    hard, soft = (fit_law(x, y, "exponential", loss=loss) for loss in ("linear", "soft_l1"))
    assert abs(soft.parameters["A0"] - 2) < 0.05 < abs(hard.parameters["A0"] - 2)
    low, high = soft.interval("r")
    assert low < 5e-5 < high


def test_extrapolation_is_scored_on_points_that_were_not_fitted():
    x, truth = PLANTED["rectified"]
    y = LAWS["rectified"].function(x, *truth)
    found = extrapolate(x, y, "rectified", holdout=0.3)
    assert (found.fitted, found.held_out) == (10, 4)
    assert found.rmse < 1e-3 < found.last_value
    assert found.skill == pytest.approx(1 - found.rmse / found.last_value)
    assert found.last_value == pytest.approx(np.sqrt(np.mean((y[10:] - y[9]) ** 2)))
    # What was held out changes the score and not the prediction.
    moved = extrapolate(x, np.where(np.arange(14) < 10, y, y + 1), "rectified", holdout=0.3)
    np.testing.assert_allclose(moved.predicted, found.predicted)
    assert moved.rmse > 0.9


def test_prediction_bands_hold_beyond_the_fitted_range():
    x, truth = PLANTED["exponential"]
    rng, curve = np.random.default_rng(6), LAWS["exponential"].function(*[x, *truth])
    inside = [
        extrapolate(x, curve + 0.05 * rng.standard_normal(len(x)), "exponential", holdout=0.3).coverage
        for _ in range(25)
    ]
    assert 0.82 < np.mean(inside) < 0.98  # 90 % promised; points of one run fall out together


def test_the_law_that_made_a_curve_wins():
    rng = np.random.default_rng(7)
    x = np.geomspace(1, 1000, 40)
    laws = ["power", "log", "sqrt", "linear"]
    for name in ("log", "sqrt"):
        y = LAWS[name].function(x, 1.0, 0.5)
        found = compare_laws(x, y + 0.05 * y.std() * rng.standard_normal(40), laws)
        assert found.best in (name, "power") or found.table.weight[0] < 0.9
        assert found.table.set_index("law").aic[name] <= found.table.aic.min() + 4
        assert found.table.weight.sum() == pytest.approx(1)
    # A fit to log y and one to y are compared as densities of y: the change of variables is paid.
    y = np.exp(0.3 + 0.5 * np.log(x) + 0.3 * rng.standard_normal(40))
    assert compare_laws(x, y, ["loglog", "linear", "sqrt"]).best == "loglog"
    found = compare_laws(np.arange(12.0), rng.standard_normal(12), ["linear", "log", "exp_log"])
    assert set(found.failed) == {"log", "exp_log"}
    with pytest.raises(MeasureError, match="none of the laws"):
        compare_laws([1, 2, 3], [1, 2, 4], ["linear", "power"])


def test_blocks_widen_the_bootstrap_of_correlated_residuals():
    x, truth = np.linspace(0, 1e5, 80), PLANTED["exponential"][1]
    e = autoregressive(np.random.default_rng(8).standard_normal(80) * 0.1, 0.8, np.random.default_rng(9))
    fit = fit_law(x, LAWS["exponential"].function(x, *truth) + e, "exponential")
    assert fit.diagnostics()["lag1"] > fit.diagnostics()["lag1_limit"]
    one, several = (np.ptp(fit.bootstrap(60, block=block).interval("A0")) for block in (1, 6))
    assert several > 1.2 * one
    assert fit.bootstrap(5, seed=1).block > 1
    independent = np.random.default_rng(0).standard_normal((40, 50))
    assert np.mean([block_length(one) == 1 for one in independent]) > 0.85  # r beyond 2 / sqrt(n): about 5 %


def test_seeds_are_averaged_and_resampled():
    x, truth = PLANTED["log"]
    rng = np.random.default_rng(10)
    runs = LAWS["log"].function(x, *truth) + 0.1 * rng.standard_normal((6, 1)) + 0.01 * rng.standard_normal((6, 20))
    frame = pd.DataFrame(
        [(s, x[i], runs[s, i]) for s in range(6) for i in range(20)], columns=["seed", "step", "value"]
    )
    fit = fit_law(frame.sample(frac=1, random_state=0), law="log")
    assert fit.parameters["a"] == pytest.approx(fit_law(x, runs.mean(0), "log").parameters["a"])
    drawn = fit.bootstrap(100)
    assert drawn.block == 0
    # Seeds differ in their level: resampling them shows it, residuals of the mean do not.
    assert np.ptp(drawn.interval("a")) > 3 * np.ptp(fit.interval("a"))


@pytest.mark.parametrize(
    ("x", "y", "law", "message"),
    [
        ([1, 2, 3], [1, 2, 3], "power", "needs 7 points"),
        (np.arange(1, 16), np.arange(15.0), "exp_log", "needs 20 points or more"),
        (np.arange(1, 11), [1.0] * 10, "power", "constant at 1"),
        (np.arange(1, 11), np.arange(10) * 1e-300, "linear", "constant"),
        (np.arange(1, 11), [1.0] * 9 + [math.nan], "power", "y is not finite at 1 of 10"),
        (np.arange(10), np.arange(10.0), "power", "takes x above 0"),
        (np.arange(1, 11), np.arange(10.0) - 3, "rectified", "log y"),
        (np.arange(1, 11), np.arange(10.0), "powr", "nearest: power"),
        (np.ones(10), np.arange(10.0), "linear", "occurs twice"),
        (np.arange(10), np.arange(9.0), "linear", "want"),
        (np.arange(10), list("abcdefghij"), "linear", "not numbers"),
    ],
)
def test_bad_input_to_a_fit_says_what_is_wrong(x, y, law, message):
    with pytest.raises(MeasureError, match=message):
        fit_law(x, y, law)


def test_bad_frames():
    frame = pd.DataFrame({"step": [1, 2, 1], "value": [1.0, 2, 3], "seed": [0, 0, 1]})
    with pytest.raises(MeasureError, match="same steps"):
        series(frame)
    with pytest.raises(MeasureError, match="a step twice"):
        series(pd.concat([frame, frame]))
    with pytest.raises(MeasureError, match="columns step, value"):
        series(frame.drop(columns="value"))
    with pytest.raises(MeasureError, match="positive number"):
        fit_law(np.arange(1, 9), np.arange(8.0), "linear", sigma=np.zeros(8))


def test_few_points_are_allowed_when_asked_for():
    x, truth = PLANTED["power"]
    fit = fit_law(x[::7], LAWS["power"].function(x[::7], *truth), "power", min_points=0)
    assert len(fit.curve) == 5
    with pytest.raises(MeasureError, match="needs 4 points"):
        fit_law(x[:3], x[:3], "power", min_points=0)


def test_starts_of_the_grid_solve_the_linear_parameters():
    x, _ = PLANTED["sigmoid"]
    search = Search(law_of("sigmoid"), x)
    y = np.random.default_rng(11).standard_normal(len(x))
    theta = search.starts(y, 1)[0]
    column = LAWS["sigmoid"].function(search.u, 0, 1, *theta[2:])
    height, floor = np.polyfit(column, y, 1)
    np.testing.assert_allclose(theta[:2], [floor, height], rtol=1e-6)


# Change points


@pytest.mark.parametrize("count", [1, 2, 3])
def test_segments_are_the_best_there_are(count):
    rng = np.random.default_rng(count)
    x, y = np.sort(rng.uniform(0, 10, 16)), rng.standard_normal(16)

    def error(cuts):
        total = 0.0
        for a, b in itertools.pairwise((0, *cuts, 16)):
            total += float(((y[a:b] - np.polyval(np.polyfit(x[a:b], y[a:b], 1), x[a:b])) ** 2).sum())
        return total

    every = [
        cuts
        for cuts in itertools.combinations(range(3, 14), count - 1)
        if min(np.diff([0, *cuts, 16]), default=16) >= 3
    ]
    best = min(every, key=error)
    found = segments(x, y, count)
    assert found.starts[1:] == best
    assert found.errors[-1] == pytest.approx(error(best))
    assert ((y - found.fitted) ** 2).sum() == pytest.approx(error(best))


def test_the_number_of_segments():
    rng, x = np.random.default_rng(0), np.arange(60.0)
    y = np.abs(x - 20) * 0.1 + np.where(x > 45, 2, 0) + 0.05 * rng.standard_normal(60)
    found = segments(x, y)
    assert found.count == 3
    np.testing.assert_allclose(found.dates, [20, 45.5], atol=1)
    assert sum(segments(x, rng.standard_normal(60)).count > 1 for _ in range(40)) <= 2


def test_a_jump_and_a_kink_against_brute_force():
    rng, x = np.random.default_rng(1), np.sort(np.random.default_rng(0).uniform(0, 30, 40))
    y = np.maximum(x - 14.3, 0) + 0.3 * rng.standard_normal(40)
    found = change_point(x, y, joined=True, permutations=0, resamples=0)
    knots = np.linspace(x[2], x[-3], 20001)

    def error(knot):
        design = np.stack([np.ones(40), x, np.maximum(x - knot, 0)], 1)
        return float(np.linalg.lstsq(design, y, rcond=None)[1][0])

    best = knots[np.argmin([error(knot) for knot in knots[::20]]) * 20]
    near = knots[np.abs(knots - best) < 0.1]
    assert found.at == pytest.approx(near[np.argmin([error(knot) for knot in near])], abs=0.005)
    np.testing.assert_allclose(found.slopes, [0, 1], atol=0.1)
    jump = change_point(x, np.where(x < 10, 1.0, 3.0), permutations=0, resamples=0)
    i = int(np.searchsorted(x, 10))
    assert (jump.index, jump.at) == (i, pytest.approx((x[i - 1] + x[i]) / 2))
    assert jump.jump == pytest.approx(2)
    assert jump.at == segments(x, np.where(x < 10, 1.0, 3.0), 2).dates[0]


def test_the_date_of_a_kink_is_covered_and_found():
    rng, x, inside, p = np.random.default_rng(2), np.arange(40.0), [], []
    for i in range(50):
        y = 0.2 * np.maximum(x - 20.3, 0) + 0.4 * rng.standard_normal(40)
        found = change_point(x, y, joined=True, permutations=19, resamples=80, seed=i)
        inside.append(found.low <= 20.3 <= found.high)
        p.append(found.p)
    assert np.mean(inside) >= 0.84  # 0.95 less three and a half standard errors of 50 runs
    assert np.mean(np.array(p) <= 0.05) > 0.9


@pytest.mark.parametrize("rho", [0.0, 0.7])
def test_noise_is_not_called_a_change_even_when_it_is_correlated(rho):
    rng, x = np.random.default_rng(3), np.arange(50.0)
    p = []
    for i in range(60):
        noise = autoregressive(rng.standard_normal(200), rho, rng)[:50]
        p.append(change_point(x, 0.05 * x + noise, permutations=39, resamples=0, seed=i).p)
    # 5 % promised; with autocorrelation estimated from 50 points up to about 10 %. 0.2 is three standard errors more.
    assert np.mean(np.array(p) <= 0.05) < (0.14 if rho == 0 else 0.2)
    unaware = change_point(x, 0.05 * x + noise, permutations=0, resamples=0, serial=0.0)
    assert unaware.serial == 0


def test_bad_input_to_change_points():
    with pytest.raises(MeasureError, match="needs 7 points"):
        change_point(range(5), [1, 2, 3, 4, 6])
    with pytest.raises(MeasureError, match="constant"):
        change_point(range(9), [2.0] * 9)
    with pytest.raises(MeasureError, match="cannot be parted"):
        segments(range(9), range(9), 4)
    with pytest.raises(MeasureError, match="average them"):
        segments(range(4000), range(4000))


# Dates


def test_first_passage_with_persistence_censoring_and_seeds():
    y = np.array([[0, 1, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0]], float)
    found = first_passage(range(6), y, threshold=0.5, rising=True, hold=2)
    assert found.runs == (2.5, 3.5, math.inf)
    assert (found.at, found.censored, found.last) == (3.5, pytest.approx(1 / 3), 5)
    assert first_passage(range(6), y[:1], threshold=0.5, hold=1, interpolate=False).at == 1
    # A curve that is beyond only at the end is not there for good yet.
    assert first_passage(range(3), [0, 0, 1], threshold=0.5, hold=2).at == math.inf
    assert first_passage([1, 2, 3], [9.0, 5.0, 1.0], share=0.75).at == 2.5
    assert first_passage([1, 2], [5.0, 6.0], threshold=4.0).at == 1
    with pytest.raises(MeasureError, match="one of the two"):
        first_passage([1, 2], [1, 2])


def test_lead_times_count_what_is_censored():
    a, b = [1.0, 2, 3, math.inf, 5], [4.0, 1, math.inf, 2, 5]
    found = lead_time(a, b)
    assert found.runs == (3.0, -1.0, math.inf, -math.inf, 0.0)
    assert (found.median, found.first_wins, found.p) == (0.0, 0.5, 1.0)
    six = lead_time(range(6), np.arange(6) + 1)
    assert six.p == pytest.approx(2 / 64)  # all six one way
    with pytest.raises(MeasureError, match="neither event"):
        lead_time([math.inf], [math.inf])
    with pytest.raises(MeasureError, match="want one of each"):
        lead_time([1], [1, 2])


def test_turning_points_are_those_of_scipy():
    from scipy.signal import find_peaks

    from actome.dynamics.turns import _extrema

    rng = np.random.default_rng(4)
    for _ in range(30):
        y = np.cumsum(rng.standard_normal(80))
        floor = 2.0
        for sign, kind in ((1, "top"), (-1, "bottom")):
            expected = set(find_peaks(sign * y, prominence=floor)[0].tolist())
            assert {i for i, one, _ in _extrema(y, floor) if one == kind} == expected


def test_the_date_of_a_turn_is_covered():
    rng, x, inside = np.random.default_rng(5), np.linspace(0, 1, 80), []
    for i in range(40):
        y = -((x - 0.43) ** 2) * 8 + 0.1 * rng.standard_normal(80)
        turns = turning_points(x, y, bandwidth=0.1, resamples=80, seed=i)
        assert [one.kind for one in turns] == ["top"]
        inside.append(turns[0].low <= 0.43 <= turns[0].high)
        assert turns[0].support > 0.9
    assert np.mean(inside) >= 0.8
    noise = [len(turning_points(x, rng.standard_normal(80), resamples=0)) for _ in range(40)]
    assert np.mean(noise) < 0.2


def test_turns_on_a_log_axis():
    x = np.geomspace(1, 1e4, 60)
    (turn,) = turning_points(x, -((np.log10(x) - 2) ** 2), axis="log", resamples=0)
    assert turn.at == pytest.approx(100, rel=0.03)
    with pytest.raises(MeasureError, match="log axis"):
        turning_points(x - 1, x, axis="log")


def test_plateaus_against_all_stretches():
    rng = np.random.default_rng(6)
    for _ in range(20):
        y = np.cumsum(rng.standard_normal(30) * (rng.random(30) < 0.4))
        y[-1] += 3
        limit = 0.1 * np.ptp(y)
        longest = max(j - i for i in range(30) for j in range(i, 30) if np.ptp(y[i : j + 1]) <= limit)
        found = plateaus(np.arange(30.0), y, least=0.0)
        assert max(one.end - one.start for one in found) == longest
        assert all(a.end < b.start for a, b in itertools.pairwise(found))
    assert plateaus(np.arange(30.0), np.arange(30.0), tolerance=0.05, least=0.1) == []


def test_delays():
    x, rng = np.linspace(0, 10, 120), np.random.default_rng(7)
    later = delay(x, np.tanh(2 * (x - 3)), np.tanh(2 * (x - 4.5)) + 0.02 * rng.standard_normal(120))
    assert later.at == pytest.approx(1.5, abs=0.15)
    assert later.p <= 0.02
    earlier = delay(x, np.tanh(2 * (x - 6)), np.tanh(2 * (x - 5)))
    assert earlier.at == pytest.approx(-1, abs=0.1)
    g = np.geomspace(1, 1e4, 100)
    factor = delay(g, np.tanh(3 * (np.log10(g) - 1.5)), np.tanh(3 * (np.log10(g) - 2.5)), axis="log")
    assert factor.at == pytest.approx(10, rel=0.1)
    p = [delay(x, rng.standard_normal(120), rng.standard_normal(120), permutations=19).p for _ in range(40)]
    assert np.mean(np.array(p) <= 0.05) < 0.16


def test_cross_correlation_is_numpy_s_at_every_lag():
    from actome.dynamics.dates import _cross_correlation

    a, b = np.random.default_rng(8).standard_normal((2, 30))
    lags = np.arange(-20, 21)
    expected = [np.corrcoef(a[max(0, -k) : 30 - max(0, k)], b[max(0, k) : 30 + min(0, k)])[0, 1] for k in lags]
    np.testing.assert_allclose(_cross_correlation(a, b, lags), expected, atol=1e-12)


def test_smoothing_keeps_lines_whatever_the_spacing():
    x = np.array([0.0, 1, 1.1, 5, 5.2, 30, 100])
    np.testing.assert_allclose(smooth(x, 3 - 2 * x, 0.05), 3 - 2 * x, atol=1e-8)
    assert lag1(np.array([1.0, -1, 1, -1])) == -0.75
