"""How often alarms are false: on clean trainings of twenty seeds, and on noise of known kinds."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom
from watched import watched

from actome.dynamics.alarms import Alarms, CriticalSlowing, LossSpike, Reading, SpikePrecursor
from actome.dynamics.early_warning import ar1_noise

PROMISED = 0.05  # of clean runs raise any warning or critical alarm


def too_many(runs: int, rate: float) -> int:
    """The smallest number of false alarms that would come up once in a hundred times at this rate."""
    return int(binom.ppf(0.99, runs, rate)) + 1


@pytest.mark.slow
def test_twenty_clean_trainings_raise_no_more_than_promised():
    loud = {seed: run.loud for seed in range(100, 120) if (run := watched(seed, 150)).loud}
    assert len(loud) < too_many(20, PROMISED), loud


def silent(detector, measure: str, values: np.ndarray) -> bool:
    alarms = Alarms([detector])
    return not any(alarms.update(step, [Reading(measure, value)]) for step, value in enumerate(values.tolist()))


@pytest.mark.parametrize("noise", ["normal", "t3"])
def test_spikes_are_not_seen_in_noise(noise):
    rng = np.random.default_rng(0)
    draw = rng.standard_normal((20, 2000)) if noise == "normal" else rng.standard_t(3, (20, 2000))
    assert all(silent(LossSpike(), "loss", 3 + 0.05 * one) for one in draw)
    assert all(silent(SpikePrecursor(), "grad_norm", np.exp(0.3 * one)) for one in draw)


@pytest.mark.slow
@pytest.mark.parametrize("rho", [0.0, 0.6, 0.9])
def test_slowing_down_is_not_seen_in_stationary_noise(rho):
    traces = 3 + 0.02 * ar1_noise(100, 3000, rho, np.random.default_rng(1))
    false = sum(not silent(CriticalSlowing(), "loss", one) for one in traces)
    assert false < too_many(100, CriticalSlowing().alpha)
