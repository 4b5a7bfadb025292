"""[188] The Butterfly Effect: Neural Network Training Trajectories Are Highly Sensitive to Initial Conditions.

The paper nudges a copy of a network during training and continues both with the same data: early on the tiniest nudge
sends the copy to other weights, behind a loss barrier; later it does not.

Tested on a perceptron of four hidden layers for digits, with plain gradient descent. The controls are a nudge of size
zero, which must leave twins equal to the bit, and a network that differs in its seed, behind as high a barrier as
there is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F

from actome.dynamics.barrier import loss_barrier
from actome.dynamics.butterfly_effect import TrainFn, butterfly
from actome.papers.registry import Entry, Scale
from actome.tasks.digits import Digits, digits
from actome.tasks.draw import seeded
from actome.tasks.nets import MLP
from actome.tasks.trials import trial_seeds

WIDTHS = [64, 64, 64, 64, 64, 10]
RATE, BATCH = 0.1, 16
SIGMAS = (0.0, 1e-4, 1e-2)


def test(seed: int, scale: Scale) -> tuple[dict[str, Any], dict[str, Any], dict[str, bool]]:
    seeds, at, then = (1, (0, 50), 40) if scale == "smoke" else (3, (0, 50, 200, 800), 1000)
    tables, unrelated = [], []
    for one in trial_seeds(seed, seeds):
        data = digits(one, train=1297, test=500)
        sets = {"train": (data.train, data.train_labels), "test": (data.test, data.test_labels)}
        table = butterfly(
            _training(data, one % 2**31), at, SIGMAS, then, data=sets, align=("weights", "activations"),
            sites="module:act.*", swap=_swapped(data, one % 2**31), seed=one % 2**31,
        )  # fmt: skip
        tables.append(table.assign(seed=one))
        a, b = (_training(data, (one + i) % 2**31)(None, 0, max(at) + then)[0] for i in range(2))
        unrelated.append(_unrelated(a, b, sets))
    table = pd.concat(tables)
    nudged = table[table.sigma > 0]
    mean = nudged.groupby("at").mean(numeric_only=True)
    first, last = mean.iloc[0], mean.iloc[-1]
    by_size = nudged[nudged["at"] == 0].groupby("sigma").distance.mean()
    swapped = table[table.nudge == "batch"].groupby("at").mean(numeric_only=True)
    shown = [name for name in mean if name not in ("sigma", "then", "seed", "relative")]
    figures = {
        "at": list(at),
        "then": then,
        **{name: mean[name].tolist() for name in shown},
        "distance_by_sigma": {
            f"{size:g}": one.distance.tolist()
            for size, one in nudged.groupby(["sigma", "at"]).mean(numeric_only=True).groupby("sigma")
        },
        "growth_by_sigma": {
            f"{size:g}": one.growth.tolist()
            for size, one in nudged.groupby(["sigma", "at"]).mean(numeric_only=True).groupby("sigma")
        },
        "distance_first_over_last": float(first.distance / last.distance),
        "barrier_last_over_first": float(last.barrier_train / first.barrier_train) if first.barrier_train else np.nan,
        "distance_of_the_larger_nudge_over_the_smaller_at_0": float(by_size.iloc[1] / by_size.iloc[0]),
        "one_other_batch": {name: swapped[name].tolist() for name in ("distance", "barrier_train", "barrier_test")},
    }
    control = {
        "largest_distance_without_a_nudge": float(table.distance[table.sigma == 0].max()),
        "other_seeds": {name: float(np.mean([one[name] for one in unrelated])) for name in unrelated[0]},
    }
    checks = {
        "the distance of a nudge at 0 is at least three times that of the last": bool(
            figures["distance_first_over_last"] >= 3
        ),
        "the barrier of the last is at most a tenth of that at 0": bool(figures["barrier_last_over_first"] <= 0.1),
        "at 0 a hundredfold nudge changes the distance by less than a factor of 2": bool(
            0.5 < figures["distance_of_the_larger_nudge_over_the_smaller_at_0"] < 2
        ),
        "without a nudge twins are equal to the bit (control)": control["largest_distance_without_a_nudge"] == 0,
        "networks of other seeds have a higher barrier than twins nudged at 0 (control)": bool(
            control["other_seeds"]["barrier_train"] > first.barrier_train
        ),
    }
    return figures, control, checks


def _training(data: Digits, seed: int) -> TrainFn:
    """Steps of plain gradient descent, each on a batch of its own that depends on seed and step only."""

    def train(run: Any, start: int, stop: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        net, optimiser = run or _fresh(seed)
        for step in range(start, stop):
            _step(net, optimiser, data, seeded(seed * 100_003 + step))
        return net, optimiser

    return train


def _swapped(data: Digits, seed: int) -> Any:
    def swap(run: Any, step: int) -> Any:
        _step(*run, data, seeded(seed * 100_003 - 1 - step))
        return run

    return swap


def _fresh(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """He's initialisation, with which signals keep their size through the layers."""
    net, generator = MLP(WIDTHS, seed=seed), seeded(seed)
    with torch.no_grad():
        for linear in net.linear:
            linear.weight.normal_(0, (2 / linear.in_features) ** 0.5, generator=generator)
            linear.bias.zero_()
    return net, torch.optim.SGD(net.parameters(), RATE)


def _step(net: nn.Module, optimiser: torch.optim.Optimizer, data: Digits, generator: torch.Generator) -> None:
    rows = torch.randint(len(data.train), (BATCH,), generator=generator)
    optimiser.zero_grad()
    F.cross_entropy(net(data.train[rows]), data.train_labels[rows]).backward()
    optimiser.step()


def _unrelated(a: nn.Module, b: nn.Module, sets: dict[str, Any]) -> dict[str, float]:
    out = {}
    for by in (None, "weights", "activations"):
        for name, data in sets.items():
            found = loss_barrier(a, b, data, by)
            suffix = f"_{by}" if by else ""
            out[f"distance{suffix}"], out[f"barrier_{name}{suffix}"] = found.distance, found.height
    return out


ENTRY = Entry(
    number=188,
    slug="butterfly-perturbation",
    title="The Butterfly Effect: Neural Network Training Trajectories Are Highly Sensitive to Initial Conditions",
    kind="measure",
    home="actome.dynamics.butterfly",
    claim="Twins nudged at step 0 end at least 3 times as far apart as those nudged at step 800, with as many steps to "
    "go, and the latter's loss barrier is at most a tenth; at step 0 a hundredfold nudge changes the distance by less "
    "than a factor of 2.",
    test=test,
    takes={"smoke": "seconds", "small": "about a minute and a half"},
    open="Residual networks, fine-tuning from checkpoints, and how width, batch size, rate and warm-up move the date.",
)
