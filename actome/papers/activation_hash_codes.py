"""[92] Neural networks behave as hash encoders: An empirical study.

Which units of a layer are on is a code of the example: with enough units each example has its own, and training makes
codes of one class alike.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

import actome
from actome.measures.codes import ActivationCode, code_accuracy, codes_of
from actome.measures.regions import region_diameter
from actome.papers.registry import Entry, Scale
from actome.tasks.digits import Digits, digits
from actome.tasks.nets import MLP, fit
from actome.tasks.trials import over_seeds

WIDTHS = [8, 24, 96]
BATCH, RATE, MOMENTUM = 32, 0.05, 0.9
ARMS = ["trained", "at init", "random labels"]


def test(seed: int, scale: Scale) -> tuple[dict[str, Any], dict[str, Any], dict[str, bool]]:
    seeds, epochs, rows = (1, 5, 400) if scale == "smoke" else (3, 40, 1297)
    got = over_seeds(lambda one: _trial(one, epochs, rows), seed, seeds)
    mean = {name: sum(value) / seeds for name, value in got.items()}

    def by_width(arm: str, name: str) -> list[float]:
        return [mean[f"{arm}, {width}, {name}"] for width in WIDTHS]

    names = ["redundancy", "kmeans", "knn", "logistic", "always on or off", "region diameter"]
    figures = {"widths": WIDTHS} | {f"trained: {name}": by_width("trained", name) for name in names}
    control = {f"{arm}: {name}": by_width(arm, name) for arm in ARMS[1:] for name in names}
    redundancy = figures["trained: redundancy"]
    knn, init, random = (by_width(arm, "knn") for arm in ARMS)
    checks = {
        "redundancy falls with width, to at most 0.01 at 96": all(b < a for a, b in itertools.pairwise(redundancy))
        and redundancy[-1] <= 0.01,
        "Hamming neighbours gain 0.04 over the untrained net at widths 8 and 24": all(
            a >= b + 0.04 for a, b in zip(knn[:2], init[:2], strict=True)
        ),
        "and 0.1 over training on random labels": all(a >= b + 0.1 for a, b in zip(knn[:2], random[:2], strict=True)),
    }
    return figures, control, checks


def _trial(seed: int, epochs: int, rows: int) -> dict[str, float]:
    data = digits(seed, train=rows)
    shuffled = data.train_labels[torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))]
    out: dict[str, float] = {}
    for width, arm in itertools.product(WIDTHS, ARMS):
        net = MLP([64, width, 10], "relu", seed=seed)
        if arm != "at init":
            labels = data.train_labels if arm == "trained" else shuffled
            fit(net, data.train, labels, steps=epochs * (len(data.train) // BATCH), batch_size=BATCH, lr=RATE,
                momentum=MOMENTUM, optimizer="sgd", seed=seed)  # fmt: skip
        out |= {f"{arm}, {width}, {name}": value for name, value in _scores(net, data, seed).items()}
    return out


def _scores(net: MLP, data: Digits, seed: int) -> dict[str, float]:
    model = actome.wrap(net)

    def before_the_rectifier(x: Tensor) -> Tensor:
        return model.record(x, "module:linear.0")["module:linear.0"]

    train, test = (before_the_rectifier(x) for x in (data.train, data.test))
    code = ActivationCode()
    code.update(train)
    found = code.compute()
    accuracy = code_accuracy(codes_of(train), data.train_labels, codes_of(test), data.test_labels, seed=seed)
    return {
        "redundancy": float(found["redundancy"]),
        "kmeans": accuracy.kmeans,
        "knn": accuracy.knn,
        "logistic": accuracy.logistic,
        "always on or off": float(found["always_on"] + found["always_off"]),
        "region diameter": float(region_diameter(model, data.test[:100], directions=8, seed=seed).median()),
    }


ENTRY = Entry(
    number=92,
    slug="activation-hash-codes",
    title="Neural networks behave as hash encoders: An empirical study",
    kind="measure",
    home="actome.measures.ActivationCode",
    claim="Codes of one hidden layer on digits: redundancy falls with width (8, 24, 96) to at most 0.01; the accuracy "
    "of Hamming nearest neighbours on test codes gains at least 0.04 over the untrained net at widths 8 and 24, and "
    "0.1 over training on random labels (three seeds).",
    test=test,
    takes={"smoke": "seconds", "small": "about a minute"},
    open="The sweep over sample sizes and the phase chart; data sets beyond digits.",
)
