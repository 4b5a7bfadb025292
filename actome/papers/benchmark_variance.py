"""[49] Quantifying Variance in Evaluation Benchmarks.

The paper measures how much benchmark scores vary over training seeds, and finds that continuous metrics (the
probability of the right answer) carry more signal and rise more steadily than discrete ones (right or wrong).

Tested on a choice of five: which of five digits, the right one and four others fixed for each item, is in a noisy
image. Ten small perceptrons that differ in initialisation and order of the data answer the same 100 items at 15
checkpoints.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from actome.dynamics.variance import EvalVariance
from actome.papers.registry import Entry, Scale
from actome.tasks.digits import Digits, digits
from actome.tasks.nets import MLP, fit
from actome.tasks.trials import trial_seeds

OPTIONS, ITEMS, CHECKPOINTS, TRAIN, TEST = 5, 100, 15, 300, 1400
NOISE = 2.0  # of the images' standard deviation, so that a trained network is right about two times in three


def test(seed: int, scale: Scale) -> tuple[dict[str, Any], dict[str, Any], dict[str, bool]]:
    count, every, resamples = (5, 10, 200) if scale == "smoke" else (10, 20, 2000)
    data = digits(seed, train=TRAIN, test=TEST)
    generator = torch.Generator().manual_seed(seed)
    asked = data.test + NOISE * torch.randn(data.test.shape, generator=generator)
    options_IO = _options(data.test_labels, generator)
    # The items of the benchmark, twice as many, and all that there are, in two halves for the seeds' own part.
    sizes = {"100": slice(0, ITEMS), "200": slice(0, 2 * ITEMS), "700": slice(0, TEST // 2), "1400": slice(0, TEST)}
    found = {name: EvalVariance(chance=1 / OPTIONS) for name in sizes}
    for one in trial_seeds(seed, count):
        for step, (right_I, p_I) in enumerate(_run(data, asked, options_IO, every, one % 2**31)):
            for name, part in sizes.items():
                found[name].update(one, step, right_I[part], p_I[part])

    tables = {name: one.compute(seed=seed).set_index("metric") for name, one in found.items()}
    drawn = found["100"].over_seeds(resamples, seed)
    wins = {
        name: float(np.mean(drawn["continuous"][name] > drawn["discrete"][name])) for name in ("snr", "monotonicity")
    }
    names = (
        "mean",
        "seed_sd",
        "seed_sd_late",
        "seed_part",
        "monotonicity",
        "snr",
        "snr_late",
        "item_ci",
        "min_difference",
    )
    figures = {
        **{metric: {name: float(tables["100"].loc[metric, name]) for name in names} for metric in drawn},
        "share_of_seed_resamples_where_continuous_is_higher": wins,
        "item_ci_over_seed_sd": float(tables["100"].item_ci["discrete"] / tables["100"].seed_sd["discrete"]),
        "item_standard_error_over_seed_sd": float(
            tables["100"].item_ci["discrete"] / 1.96 / tables["100"].seed_sd["discrete"]
        ),
        "mean_item_discrimination": float(np.nanmean(found["100"].item_discrimination())),
    }
    # Over all benchmarks of 100 or 200 items that the images give, for a single one is easier or harder by chance.
    last_SI = found["1400"].scores("discrete")[:, -1]
    item = _item_interval(last_SI, 2 * ITEMS) / _item_interval(last_SI, ITEMS)
    part = {name: float(one.seed_part["discrete"]) for name, one in tables.items()}
    own = part["1400"] / part["700"] if part["700"] else float("nan")
    control = {
        "item_ci_at_200_over_100_items": item,
        "seed_part_at_1400_over_700_items": own,
        "seed_sd_by_items": {name: float(one.seed_sd_late["discrete"]) for name, one in tables.items()},
        "seed_part_by_items": part,
        "snr_by_items": {
            name: {metric: float(one.snr_late[metric]) for metric in drawn} for name, one in tables.items()
        },
    }
    checks = {
        "signal to noise of the continuous metric is higher in 80 % of resamples of the seeds": wins["snr"] >= 0.8,
        "and so is its monotonicity": wins["monotonicity"] >= 0.8,
        "the item interval (half of it) and the spread over seeds agree within a factor of 2": bool(
            0.5 <= figures["item_ci_over_seed_sd"] <= 2
        ),
        "twice the items: item interval smaller by about 1/sqrt(2) (0.6 to 0.8; control)": 0.6 <= item <= 0.8,
        "twice the items of a large test: the seeds' own part within a third (control)": 0.75 <= own <= 1.33,
    }
    return figures, control, checks


def _run(data: Digits, asked: Tensor, options_IO: Tensor, every: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Right or wrong and probability of the right option at each checkpoint, (items) each."""
    net, out = MLP([64, 32, 10], seed=seed), []

    def on_step(done: int, loss: float) -> None:
        if done % every == 0:
            out.append(_answers(net, asked, options_IO))

    fit(
        net,
        data.train,
        data.train_labels,
        steps=every * CHECKPOINTS,
        batch_size=32,
        lr=1e-3,
        seed=seed,
        on_step=on_step,
    )
    return out


@torch.no_grad()
def _answers(net: nn.Module, x: Tensor, options_IO: Tensor) -> tuple[np.ndarray, np.ndarray]:
    p_IO = net(x).gather(1, options_IO).softmax(-1)
    return (p_IO.argmax(-1) == 0).numpy(), p_IO[:, 0].numpy()


def _item_interval(last_SI: np.ndarray, items: int) -> float:
    """Half the 95 % interval over items, mean over seeds and disjoint sets of items."""
    return float((1.96 * last_SI.reshape(len(last_SI), -1, items).std(-1) / items**0.5).mean())


def _options(labels_I: Tensor, generator: torch.Generator) -> Tensor:
    """The right class first, then four others, (items, options)."""
    order = torch.rand(len(labels_I), 10, generator=generator)
    order[torch.arange(len(labels_I)), labels_I] = -1.0
    return order.argsort(1)[:, :OPTIONS]


ENTRY = Entry(
    number=49,
    slug="benchmark-variance",
    title="Quantifying Variance in Evaluation Benchmarks",
    kind="measure",
    home="actome.dynamics.EvalVariance",
    claim="Over ten seeds on a choice of five with 100 items, signal to noise and monotonicity of a continuous metric "
    "exceed those of the discrete one in 80 % of resamples of the seeds, and the item interval is within a factor of 2 "
    "of the spread over seeds.",
    test=test,
    takes={"smoke": "seconds", "small": "about ten seconds"},
    open="Completion against letter formats, and item response theory.",
)  # fmt: skip
