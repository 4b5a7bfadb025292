"""Traces of known bifurcations, and the test of resilience on them."""

from __future__ import annotations

import numpy as np
import pytest

from actome.core.errors import MeasureError
from actome.dynamics import EarlyWarning, ou_deviance, ou_lr_test
from actome.dynamics.ou_test import Pull, fit_pull
from actome.dynamics.series import lag1
from actome.tasks.bifurcation import KINDS, bifurcation


@pytest.mark.parametrize("kind", KINDS)
def test_traces_are_of_one_length_repeatable_and_end_before_their_jump(kind):
    found = bifurcation(kind, runs=6, points=120, seed=3)
    assert found.traces.shape == (6, 120)
    assert np.isfinite(found.traces).all()
    assert np.array_equal(found.traces, bifurcation(kind, runs=6, points=120, seed=3).traces)
    assert found.jumped.all() == (kind in ("fold", "noise", "step"))
    assert (found.traces > -0.5).all()


def test_the_stationary_system_has_the_spread_and_memory_of_its_linear_part():
    """Near 1, dx = -2 (x - 1) dt + 0.05 dW: variance 0.05^2 / 4, autocorrelation exp(-2) between samples."""
    traces = bifurcation("none", runs=40, points=600, seed=0).traces
    assert traces.var() == pytest.approx(0.05**2 / 4, rel=0.15)
    # Ten Euler steps of 0.1 keep 0.8^10.
    assert np.mean([lag1(one) for one in traces]) == pytest.approx(0.8**10, abs=0.03)


def test_a_fold_slows_down_and_a_stationary_system_does_not():
    taus = {kind: EarlyWarning().taus(bifurcation(kind, 30, 300, 1).traces) for kind in ("fold", "none")}
    assert np.median(taus["fold"]["variance"]) > 0.5 > abs(np.median(taus["none"]["variance"])) + 0.2


def test_the_constant_pull_is_the_closed_form():
    """A constant pull is an autoregression, whose least squares are closed: exp(-theta) is its slope."""
    x = Pull(0.4, 0.4, 1.5, 0.7, 0.0).simulate(1, 3000, np.random.default_rng(0))[0]
    slope, intercept = np.polyfit(x[:-1], x[1:], 1)
    found, _ = fit_pull(x)
    assert np.exp(-found.first) == pytest.approx(slope, abs=2e-3)
    assert found.mu == pytest.approx(intercept / (1 - slope), abs=2e-3)
    assert (found.mu, found.sigma) == pytest.approx((1.5, 0.7), abs=0.1)


def test_the_weakening_pull_is_recovered_and_never_less_likely():
    rng = np.random.default_rng(1)
    x = Pull(1.0, 0.1, 0.0, 1.0, 0.0).simulate(1, 4000, rng)[0]
    constant, weakening = fit_pull(x)
    assert weakening.first == pytest.approx(1.0, rel=0.25)
    assert weakening.last == pytest.approx(0.1, rel=0.4)
    assert weakening.loglik > constant.loglik
    stronger = x[::-1]
    assert ou_deviance(stronger)[0] == 0.0  # a pull that grows is no loss of resilience


def test_deviance_tells_a_weakening_pull_from_a_constant_one():
    rng = np.random.default_rng(2)
    weak = ou_deviance(Pull(1.0, 0.1, 0.0, 1.0, 0.0).simulate(10, 300, rng))
    steady = ou_deviance(Pull(0.5, 0.5, 0.0, 1.0, 0.0).simulate(10, 300, rng))
    assert np.median(weak) > steady.max()


def test_bad_input_says_what_is_wanted():
    with pytest.raises(ValueError, match="kind='hopf' does not exist; choose one of 'fold'"):
        bifurcation("hopf")
    with pytest.raises(ValueError, match="points"):
        bifurcation("fold", points=3)
    with pytest.raises(MeasureError, match="40 points"):
        ou_lr_test(np.arange(10.0))
    with pytest.raises(MeasureError, match="n_boot=0"):
        ou_lr_test(np.random.default_rng(0).standard_normal(50), n_boot=0)
