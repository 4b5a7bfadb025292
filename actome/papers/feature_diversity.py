"""[186] Feature diversity in self-supervised learning.

The paper follows how evenly features spread over the sphere (their hyperspherical energy, low when they do) through
width, depth and training of self-supervised networks.

Tested on a small convolutional network trained on digits without labels, by telling which two changed images come from
the same one (SimCLR). Energies of different widths are not comparable by themselves, so the one in excess of random
directions of that width is reported beside them. The control is the same network untrained.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actome.measures import EffectiveRank, HypersphericalEnergy
from actome.papers.registry import Entry, Scale
from actome.tasks.digits import Digits, digits
from actome.tasks.nets import CNN, fit
from actome.tasks.trials import spearman, trial_seeds

WIDTHS = (8, 16, 32)
LAYERS, BATCH, TEMPERATURE = 3, 128, 0.5


def test(seed: int, scale: Scale) -> tuple[dict[str, Any], dict[str, Any], dict[str, bool]]:
    count, epochs = (1, 1) if scale == "smoke" else (3, 20)
    figures: dict[str, Any] = {"widths": list(WIDTHS)}
    control: dict[str, Any] = {"widths": list(WIDTHS)}
    for one in trial_seeds(seed, count):
        data = digits(one, images=True)
        for into, trained in ((figures, epochs), (control, 0)):
            runs = [_run(data, width, trained, one) for width in WIDTHS]
            for name in runs[0]:
                into.setdefault(name, []).append([run[name] for run in runs])
    energy, untrained = (np.array(one["energy"])[..., -1] for one in (figures, control))  # (seed, width), last layer
    by_width = [spearman(WIDTHS, -row) for row in energy]
    figures["diversity_over_width"] = by_width
    control["diversity_over_width"] = [spearman(WIDTHS, -row) for row in untrained]
    figures["excess_over_width"] = [spearman(WIDTHS, -np.array(row)[:, -1]) for row in figures["energy_excess"]]
    layers = np.array(figures["energy"]).mean((0, 1))
    checks = {
        "the last layer is more diverse the wider it is (rank correlation at least 0.8 in the mean)": bool(
            np.mean(by_width) >= 0.8
        ),
        "the last layer is the most diverse at the end": bool(layers.argmin() == LAYERS - 1),
        "the last layer is more diverse than untrained at every width (control)": bool(
            (energy.mean(0) < untrained.mean(0)).all()
        ),
    }
    return figures, control, checks


def _run(data: Digits, width: int, epochs: int, seed: int) -> dict[str, Any]:
    net = CNN([1] + [width] * LAYERS, 32, pool=[0], seed=seed % 2**31)
    generator = torch.Generator().manual_seed(seed)
    path: list[float] = []
    if epochs:
        steps = epochs * (len(data.train) // BATCH)
        every = max(1, steps // 5)

        def on_step(done: int, loss: float) -> None:
            if done % every == 0:
                path.append(float(_measured(net, data.test)[-1]["energy"]))

        fit(
            net, data.train, data.train, steps=steps, batch_size=BATCH, lr=2e-3, loss=contrast, seed=seed % 2**31,
            prepare=lambda x, _: torch.cat([_changed(x, generator), _changed(x, generator)]), on_step=on_step,
        )  # fmt: skip
    layers = _measured(net, data.test)
    return {
        "energy": [float(one["energy"]) for one in layers],
        "energy_excess": [float(one["energy_excess"]) for one in layers],
        "mean_abs_cosine": [float(one["mean_abs_cosine"]) for one in layers],
        "effective_rank": [float(one["effective_rank"]) for one in layers],
        "probe_error": _probe_error(net, data),
        **({"last_layer_energy_during_training": path} if epochs else {}),
    }


def contrast(out: Tensor, _: Tensor) -> Tensor:
    """SimCLR's loss of two views of every image, one batch below the other."""
    z = F.normalize(out, dim=1)
    scores = (z @ z.T / TEMPERATURE).masked_fill(torch.eye(len(z), dtype=torch.bool), -torch.inf)
    return F.cross_entropy(scores, torch.arange(len(z)).roll(len(z) // 2))


def _changed(x: Tensor, generator: torch.Generator) -> Tensor:
    """Shifted by up to a pixel, with noise, and pixels left out."""
    up, left = torch.randint(-1, 2, (2, len(x)), generator=generator)
    rows = (torch.arange(8) + up[:, None])[:, None, :, None].clamp(0, 7).expand(-1, 1, -1, 8)
    columns = (torch.arange(8) + left[:, None])[:, None, None, :].clamp(0, 7).expand(-1, 1, 8, -1)
    x = x.gather(2, rows).gather(3, columns)
    kept = torch.rand(x.shape, generator=generator) > 0.2
    return (x + 0.3 * torch.randn(x.shape, generator=generator)) * kept


@torch.no_grad()
def _features(net: CNN, x: Tensor) -> list[Tensor]:
    """Of each layer, averaged over the image: (image, channel)."""
    found: list[Tensor] = []
    hooks = [act.register_forward_hook(lambda _, __, out: found.append(out.mean((-2, -1)))) for act in net.act]
    net.features(x)
    for hook in hooks:
        hook.remove()
    return found


def _measured(net: nn.Module, x: Tensor) -> list[dict[str, Tensor]]:
    layers = []
    for features in _features(net, x):
        energy, rank = HypersphericalEnergy(s=1), EffectiveRank()
        energy.update(features[None]), rank.update(features[None])
        layers.append({**energy.compute(), **rank.compute()})
    return layers


def _probe_error(net: CNN, data: Digits) -> float:
    """Test error of a linear probe of the last layer."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    train, held_out = (_features(net, x)[-1].numpy() for x in (data.train, data.test))
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500)).fit(train, data.train_labels.numpy())
    return 1 - float(probe.score(held_out, data.test_labels.numpy()))


ENTRY = Entry(
    number=186,
    slug="feature-diversity",
    title="Feature diversity in self-supervised learning",
    kind="measure",
    home="actome.measures.HypersphericalEnergy",
    claim="In networks trained on digits by SimCLR the diversity of the last layer (its negative hyperspherical "
    "energy) rises with width (rank correlation 0.8 or more), and the last layer is the most diverse; untrained it is "
    "less so.",
    test=test,
    takes={"smoke": "a few seconds", "small": "about a minute and a half"},
    open="Depth, the regression of test error on width, depth, epochs and diversity, and other self-supervised losses.",
)
