"""[168] Calibrated Chaos: Variance Between Runs of Neural Network Training is Harmless and Inevitable.

The paper takes the variance of test accuracy over runs apart: most of it is which items of a finite test a run happens
to get right, and the runs hardly differ on the distribution behind it. As long as ensembles are calibrated, that part
cannot vanish while there is error.

Tested on two hundred small perceptrons for digits, on a test of 300 images and another set of 1000 that stands for the
distribution. The controls: runs that do differ (trained on subsets of very different size), and runs that only differ
by independent errors.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from actome.dynamics.run_variance import RunSplit, RunVariance, split, vote_shares
from actome.papers.registry import Entry, Scale
from actome.tasks.digits import Digits, digits
from actome.tasks.many import ManyMLPs, fit_many
from actome.tasks.trials import trial_seeds

WIDTHS, CLASSES = [64, 32, 10], 10
TRAIN, TEST, POPULATION = 400, 300, 1000
RATE, BATCH = 3e-3, 64


def test(seed: int, scale: Scale) -> tuple[dict[str, Any], dict[str, Any], dict[str, bool]]:
    runs, few, steps, resamples = (30, 16, 40, 20) if scale == "smoke" else (200, 100, 1000, 500)
    data = digits(seed, train=TRAIN, test=TEST + POPULATION)
    seeds = [one % 2**31 for one in trial_seeds(seed, runs)]
    chosen_RN = _runs(data, seeds, seeds, steps)
    right_RN = chosen_RN == data.test_labels
    found = _split(right_RN[:, :TEST], resamples, seed)
    population = _split(right_RN[:, TEST:], resamples, seed)
    forecast = RunVariance.from_calibration(vote_shares(chosen_RN[:, :TEST], CLASSES), data.test_labels[:TEST])
    two_class = math.sqrt((1 - found.mean) / (2 * TEST))  # of the error that one run shows

    # Fewer runs for the sources of randomness taken one by one, and for the controls.
    some, same = seeds[:few], [seeds[0]] * few
    sources = {
        "all": right_RN[:few],
        "order of the data alone": _runs(data, same, some, steps) == data.test_labels,
        "initialisation alone": _runs(data, some, same, steps) == data.test_labels,
        "one weight, by one float step": _runs(data, same, same, steps, nudge=True) == data.test_labels,
    }
    figures = {
        "accuracy": found.mean,
        "test": _told(found),
        "population": _told(population),
        "total_over_distribution_wise": _ratio(found.total_sd, found.distribution_sd),
        "estimate_over_population": _ratio(found.distribution_sd, population.distribution_sd),
        "forecast_of_two_classes": two_class,
        "forecast_over_observed": _ratio(two_class, found.total_sd),
        "forecast_of_many_classes_from_shares": forecast.independent_sd,
        "calibration_gap": forecast.gap,
        "sd_by_source": {name: math.sqrt(split(right.numpy())[0]) for name, right in sources.items()},
    }
    half = few // 2
    poor = _runs(data, seeds[few : few + half], some[:half], steps, train=100) == data.test_labels
    uneven = _split(torch.cat([right_RN[:half], poor])[:, :TEST], resamples, seed)
    chance = _split(_independent(right_RN[:, :TEST], seed), resamples, seed)
    control = {"half_of_the_runs_on_100_images": _told(uneven), "independent_errors": _told(chance)}
    checks = {
        "the spread on the test is at least twice that on the distribution": found.total_sd
        >= 2 * found.distribution_sd,
        "the estimate from the test agrees with the population within a factor of 1.5": _within(
            figures["estimate_over_population"]
        ),
        "sqrt(error / 2N) agrees with the observed spread within a factor of 1.5": _within(
            figures["forecast_over_observed"]
        ),
        "runs that do differ are told: spread mostly of the distribution, p below 0.05 (control)": bool(
            uneven.distribution_sd > 0.7 * uneven.total_sd and uneven.p < 0.05
        ),
        "independent errors are not taken for a difference: interval holds 0, p above 0.05 (control)": bool(
            chance.low <= 0 <= chance.high and chance.p > 0.05
        ),
    }
    return figures, control, checks


def _runs(
    data: Digits, init: list[int], order: list[int], steps: int, train: int = TRAIN, nudge: bool = False
) -> Tensor:
    """The class that each run chooses for each item, (run, item)."""
    many = ManyMLPs(WIDTHS, seeds=init)
    if nudge:
        with torch.no_grad():
            # Of an image's middle, another unit's in each run; pixels at the rim are always dark.
            at = torch.arange(len(init)), torch.arange(len(init)) % WIDTHS[1], 28 + torch.arange(len(init)) % 4
            many.weight[0][at] = many.weight[0][at].nextafter(torch.tensor(torch.inf))
    x, y = data.train[:train], data.train_labels[:train]
    return fit_many(many, x, y, steps=steps, seeds=order, lr=RATE, batch_size=BATCH).predict(data.test)


def _split(right_RN: Tensor, resamples: int, seed: int) -> RunSplit:
    found = RunVariance()
    for run, right_N in enumerate(right_RN):
        found.update(run, right_N)
    return found.compute(resamples, seed=seed)


def _independent(right_RN: Tensor, seed: int) -> Tensor:
    """Runs with the same chances for each item, but independent of one another."""
    order = torch.rand(right_RN.shape, generator=torch.Generator().manual_seed(seed)).argsort(0)
    return right_RN.gather(0, order)


def _told(found: RunSplit) -> dict[str, float]:
    return {
        "total_sd": found.total_sd, "independent_sd": found.independent_sd, "distribution_sd": found.distribution_sd,
        "distribution_sd_low": math.sqrt(max(found.low, 0.0)), "distribution_sd_high": math.sqrt(max(found.high, 0.0)),
        "ks": found.ks, "p": found.p, "correlation_of_halves": found.halves,
    }  # fmt: skip


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.inf


def _within(ratio: float, factor: float = 1.5) -> bool:
    return bool(1 / factor <= ratio <= factor)


ENTRY = Entry(
    number=168,
    slug="calibrated-chaos",
    title="Calibrated Chaos: Variance Between Runs of Neural Network Training is Harmless and Inevitable",
    kind="measure",
    home="actome.dynamics.RunVariance",
    claim="Over 200 runs, the spread of accuracy on 300 test images is at least twice what the runs differ by on the "
    "distribution; that estimate agrees within a factor of 1.5 with a population of 1000 images, and sqrt(error / 2N) "
    "within 1.5 with the observed spread.",
    test=test,
    takes={"smoke": "seconds", "small": "about a minute"},
    open="Fine-tuning, distribution shift, augmentation and learning rate; networks as large as the paper's.",
)
