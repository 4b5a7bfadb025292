"""[15] The Lazy Neuron Phenomenon: On Emergence of Activation Sparsity in Transformers.

The paper's finding: of the units in a transformer's ReLU MLPs about half are active at a token before training, and
only a few per cent after it; not because units die, and with random labels as well, so that it is no matter of what is
learned. At the initial weights the loss already pulls activations towards zero.

Tested on three-layer models trained on topic-bigram text, with the true next tokens and with fixed random ones. A small
MLP on digits, which does not get sparse, is the control: the phenomenon is not one of every ReLU network.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from actome.core.load import wrap
from actome.measures import NextTokenLoss
from actome.measures.gradient_sign import gradient_sign
from actome.measures.sparsity import UnitFrequency
from actome.papers.registry import Entry, Scale
from actome.tasks import Subject, SubjectConfig, train
from actome.tasks.digits import digits
from actome.tasks.nets import MLP, accuracy, fit
from actome.tasks.topic_bigram import TopicBigram
from actome.tasks.trials import trial_seeds

SITES = "blocks.*.mlp.act"
LENGTH, BATCH = 32, 16
RANDOM_ROWS = 512


def test(seed: int, scale: Scale) -> tuple[dict[str, Any], dict[str, Any], dict[str, bool]]:
    steps, count, digit_steps = (40, 1, 100) if scale == "smoke" else (500, 3, 2000)
    figures: dict[str, Any] = {}
    control: dict[str, Any] = {}
    for one in trial_seeds(seed, count):
        for name, value in _language(one, steps).items():
            figures.setdefault(name, []).append(value)
        for name, value in _digits(one, digit_steps).items():
            control.setdefault(name, []).append(value)
    before, after, shuffled = (
        _layer_means(figures[f"nonzero_{name}"]) for name in ("before", "after", "random_targets")
    )
    checks = {
        "the share of nonzero units falls to 0.6 times what it was or less, every seed": all(
            b <= 0.6 * a for a, b in zip(before, after, strict=True)
        ),
        "fewer than 5 % of the units were never active, every seed": max(figures["never_active"]) < 0.05,
        "it falls with random targets too, every seed": all(b < a for a, b in zip(before, shuffled, strict=True)),
        "digits MLPs keep more than 0.6 times the share that they began with, every seed (control)": all(
            b > 0.6 * a for a, b in zip(control["digits_nonzero_before"], control["digits_nonzero_after"], strict=True)
        ),
    }
    return figures, control, checks


def _language(seed: int, steps: int) -> dict[str, Any]:
    world = TopicBigram(seed=seed)
    corpus = world.sample(steps * BATCH, LENGTH, seed=seed + 1).tokens
    heldout = world.sample(256, LENGTH, seed=seed + 2).tokens
    config = SubjectConfig(vocab=world.vocab, d_model=64, layers=3, heads=4, context=LENGTH, d_mlp=256, act="relu")
    subject = Subject.fresh(config, seed=seed)
    fresh = _measured(subject, heldout)
    pull = gradient_sign(wrap(subject), heldout, SITES, batch_size=64)
    trained = _measured(train(subject, corpus, batch_size=BATCH, seed=seed).module, heldout)
    rows = corpus[:RANDOM_ROWS]
    targets = torch.randint(world.vocab, rows.shape, generator=torch.Generator().manual_seed(seed + 3))
    other = train(Subject.fresh(config, seed=seed), (rows, targets), steps, batch_size=BATCH, seed=seed)
    return {
        "nonzero_before": fresh["active"].tolist(),
        "nonzero_after": trained["active"].tolist(),
        "nonzero_random_targets": _measured(other.module, heldout)["active"].tolist(),
        "never_active": float(trained["never_active"].mean()),
        "silence_of_dead": float(trained["silence_of_dead"].mean()),
        "pull_before": pull["pull"].tolist(),
        "pull_error_before": pull["pull_error"].tolist(),
        "loss_before": float(fresh["loss"]),
        "loss_after": float(trained["loss"]),
        "loss_of_random_targets": float(other.losses[-1]),
    }


def _measured(module: torch.nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    table = wrap(module).measure(tokens, {SITES: UnitFrequency(), "logits": NextTokenLoss()}, batch_size=64)
    return {name: table.value(name) for name in ("active", "never_active", "silence_of_dead", "loss")}


def _digits(seed: int, steps: int) -> dict[str, float]:
    data = digits(seed)
    net = MLP([64, 256, 10], seed=seed)
    before = _share(net, data.test)
    fit(net, data.train, data.train_labels, steps=steps, seed=seed)
    return {
        "digits_nonzero_before": before,
        "digits_nonzero_after": _share(net, data.test),
        "digits_accuracy": accuracy(net, data.test, data.test_labels),
    }


def _share(net: torch.nn.Module, x: Tensor) -> float:
    return float(wrap(net).measure([x], {"module:act.0": UnitFrequency()}).value("active"))


def _layer_means(runs: list[list[float]]) -> list[float]:
    return [sum(layers) / len(layers) for layers in runs]


ENTRY = Entry(
    number=15,
    slug="lazy-neuron",
    title="The Lazy Neuron Phenomenon: On Emergence of Activation Sparsity in Transformers",
    kind="phenomenon",
    home="actome.measures.sparsity",
    claim="Trained for 500 steps, a three-layer ReLU language model has at most 0.6 times the share of nonzero MLP "
    "units that it had before, in every seed, with fewer than 5 % of its units dead; the share falls with random "
    "targets too; a small MLP on digits does not show it.",
    test=test,
    takes={"smoke": "about 5 seconds", "small": "about two minutes"},
    open="The grid of widths and depths, and top-k transformers: robustness and calibration when trained with top-k.",
)
