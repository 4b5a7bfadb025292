"""[207] How Do Training Methods Influence the Utilization of Vision Models?

The paper puts one layer after the other of trained image classifiers back to its initial state and finds that how
many layers a model needs depends on how it was trained: adversarial training leaves fewer critical ones.

Tested on multilayer perceptrons for handwritten digits, trained clean, against gradient-sign attacks and with noise,
and on a residual net, where a block can be skipped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actome.measures import criticality_profile, layer_criticality
from actome.papers.registry import Entry, Scale
from actome.tasks.digits import digits
from actome.tasks.nets import MLP, ResidualMLP, accuracy, fit
from actome.tasks.trials import trial_seeds

WIDTHS = [64, *[64] * 6, 10]
EPS, NOISE = 0.15, 0.3  # in pixels, which are in [0, 1]
METHODS = ("clean", "adversarial", "noise")


def test(seed: int, scale: Scale) -> tuple[dict[str, Any], dict[str, Any], dict[str, bool]]:
    steps, trials = (250, 2) if scale == "smoke" else (1500, 10)
    seeds = trial_seeds(seed, 2 if scale == "smoke" else 3)
    profiles: dict[str, list[np.ndarray]] = {method: [] for method in METHODS}
    accuracies: dict[str, list[float]] = {method: [] for method in METHODS}
    residual, unused = [], []
    for one in seeds:
        data = digits(one, standardise=False)
        for method in METHODS:
            net = MLP(WIDTHS, seed=one)
            fit(net, data.train, data.train_labels, steps=steps, prepare=_prepare(method, net, one), seed=one)
            frame = layer_criticality(net, data.test, trials=trials, seed=one)
            profiles[method].append(criticality_profile(frame)["criticality"].to_numpy())
            accuracies[method].append(accuracy(net, data.test, data.test_labels))
        net = ResidualMLP(64, 64, 6, 10, seed=one)
        fit(net, data.train, data.train_labels, steps=steps, seed=one)
        blocks = ["embed", *[f"blocks.{i}" for i in range(6)]]
        frame = layer_criticality(net, data.test, blocks, trials=trials, seed=one)
        residual.append(criticality_profile(frame)["criticality"].tolist())
        unused.append(_unused(net, data.test, one))

    mean = {method: [float(profile.mean()) for profile in profiles[method]] for method in METHODS}
    difference = float(np.mean(mean["clean"]) - np.mean(mean["adversarial"]))
    spread = max(float(np.std(mean[method], ddof=1)) for method in ("clean", "adversarial"))
    correlations = [_correlation(profiles[method]) for method in METHODS]
    figures = {
        "mean_criticality": mean,
        "profile": {method: np.mean(profiles[method], 0).tolist() for method in METHODS},
        "accuracy": accuracies,
        "clean_minus_adversarial": difference,
        "spread_between_seeds": spread,
        "residual_profile": residual,
    }
    control = {
        "profile_correlation_between_seeds": dict(zip(METHODS, correlations, strict=True)),
        "criticality_of_a_cut_off_block": unused,
    }
    checks = {
        "mean criticality is at least 0.1 lower after adversarial training": difference >= 0.1,
        "that difference exceeds three times the spread between seeds": difference > 3 * spread,
        "in every residual net a middle block is below 0.2 and the first layer above 0.5": all(
            min(profile[2:-1]) < 0.2 and profile[0] > 0.5 for profile in residual
        ),
        "control: profiles of two seeds of a method correlate above 0.7": min(correlations) > 0.7,
        "control: a block that is cut off has no criticality": max(map(abs, unused)) < 1e-9,
    }
    return figures, control, checks


def _prepare(method: str, net: nn.Module, seed: int) -> Callable[[Tensor, Tensor], Tensor] | None:
    generator = torch.Generator().manual_seed(seed)

    def attack(x: Tensor, y: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(net(x), y), x)
        return (x + EPS * gradient.sign()).detach().clamp(0, 1)

    def noise(x: Tensor, y: Tensor) -> Tensor:
        return (x + NOISE * torch.randn(x.shape, generator=generator)).clamp(0, 1)

    return {"clean": None, "adversarial": attack, "noise": noise}[method]


def _correlation(profiles: list[np.ndarray]) -> float:
    """The least correlation between the profiles of any two seeds."""
    table = np.corrcoef(np.stack(profiles))
    return float(table[~np.eye(len(table), dtype=bool)].min())


def _unused(net: ResidualMLP, x: Tensor, seed: int) -> float:
    """The criticality of the first layer in a randomly chosen block whose second layer is pruned to nothing."""
    block = int(torch.randint(len(net.blocks), (1,), generator=torch.Generator().manual_seed(seed)))
    with torch.no_grad():
        for parameter in net.blocks[block][3].parameters():
            parameter.zero_()
    frame = layer_criticality(net, x, [f"blocks.{block}.1"], trials=1, seed=seed)
    return float(frame["criticality"].max())


ENTRY = Entry(
    number=207,
    slug="layer-criticality",
    title="How Do Training Methods Influence the Utilization of Vision Models?",
    kind="measure",
    home="actome.measures.layer_criticality",
    claim="Mean criticality of a six-layer digits MLP is at least 0.1 lower after gradient-sign adversarial training "
    "than after clean training, by more than 3 standard deviations between seeds; in a residual net a middle block is "
    "below 0.2 while the first layer is above 0.5.",
    test=test,
    takes={"smoke": "about 4 seconds", "small": "about a minute"},
    open="The paper's findings on early and late layers of ImageNet networks need those networks.",
)
