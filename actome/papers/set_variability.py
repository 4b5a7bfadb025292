"""[212] Words Worth a Thousand Pictures.

Measuring and Understanding Perceptual Variability in Text-to-Image Generation.

The paper scores how varied the images of one prompt are by a perceptual distance on a scale calibrated with pairs, and
tells how often a prompt can be used before its images repeat.

Tested on sets of drawn digits whose spread is known, with the activations of a small digit classifier as embedding.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actome.measures import SetVariability
from actome.measures.set_variability import pair_distances
from actome.papers.registry import Entry, Scale
from actome.tasks.digit_renderer import DigitRenderer
from actome.tasks.nets import CNN, accuracy, fit
from actome.tasks.trials import over_seeds, spearman

SIGMAS = (0.05, 0.1, 0.2, 0.4, 0.7, 1.0)
MEMBERS = 60  # of a set
ALIKE = 1 / len(SIGMAS)  # the reference has all levels equally often: about as alike as the pairs of the first


def test(seed: int, scale: Scale) -> tuple[dict[str, Any], dict[str, Any], dict[str, bool]]:
    steps, count = (300, 1) if scale == "smoke" else (1000, 5)
    found = over_seeds(lambda one: _trial(one, steps), seed, count)
    mean = {name: float(np.mean(values)) for name, values in found.items()}
    reuse = [[values[i] for values in (found[f"reuse_{s}"] for s in SIGMAS)] for i in range(count)]
    figures = {
        "spearman_u_sigma": found["spearman"],
        "u_by_sigma": [mean[f"u_{s}"] for s in SIGMAS],
        "reuse_by_sigma": [float(np.median([row[i] for row in reuse])) for i in range(len(SIGMAS))],
        "kolmogorov_smirnov_of_held_out_pairs": found["ks"],
        "accuracy_of_the_embedding_network": found["accuracy"],
    }
    control = {
        "relative_distance_after_one_pixel_perceptual": found["moved_perceptual"],
        "relative_distance_after_one_pixel_pixels": found["moved_pixels"],
    }
    checks = {
        "Spearman of u and sigma is at least 0.9": min(found["spearman"]) >= 0.9,
        "the reuse count does not fall as sigma grows": all(row == sorted(row) for row in reuse),
        "distances of held-out pairs are uniform after calibration (KS at most 0.05)": max(found["ks"]) <= 0.05,
        "control: one pixel moves pixels at least 1.5 times as far as the perceptual site": all(
            pixels >= 1.5 * perceptual
            for pixels, perceptual in zip(found["moved_pixels"], found["moved_perceptual"], strict=True)
        ),
    }
    return figures, control, checks


def _trial(seed: int, steps: int) -> dict[str, float]:
    seed %= 10**6  # room for the seeds of the sets behind it
    renderer = DigitRenderer()
    parts = [renderer.sample(700, sigma, seed * 1000 + 1) for sigma in SIGMAS]
    images, labels = torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts])
    net = fit(CNN([1, 16, 32, 64], 10, pool=(0, 1), seed=seed), images, labels, steps=steps, lr=3e-3, seed=seed)
    fresh = renderer.sample(500, SIGMAS[3], seed * 1000 + 2)

    def embed(x: Tensor) -> Tensor:
        with torch.no_grad():
            return net.features(x)

    reference, judged, held_out = (_sets(renderer, seed * 1000 + at) for at in (100, 300, 500))
    scale = SetVariability(alike=ALIKE).calibrate([embed(x) for _, x in reference])
    u, sigmas, reuse = [], [], {s: [] for s in SIGMAS}
    for sigma, x in judged:
        one = scale.clone()
        one.update(embed(x))
        values = one.compute()
        u.append(float(values["u"]))
        sigmas.append(sigma)
        reuse[sigma].append(min(float(values["reuse"]), MEMBERS + 1.0))
    out = {"spearman": spearman(u, sigmas), "accuracy": accuracy(net, fresh.images, fresh.labels)}
    for sigma in SIGMAS:
        out[f"u_{sigma}"] = float(np.mean([a for a, b in zip(u, sigmas, strict=True) if b == sigma]))
        out[f"reuse_{sigma}"] = float(np.median(reuse[sigma]))
    out["ks"] = _uniformity(scale, torch.cat([pair_distances(embed(x)) for _, x in held_out]), seed)
    still = torch.cat([x for _, x in reference])[::20]
    out["moved_perceptual"] = _moved(embed, still, reference, seed)
    out["moved_pixels"] = _moved(lambda x: x.flatten(1), still, reference, seed)
    return out


def _sets(renderer: DigitRenderer, seed: int) -> list[tuple[float, Tensor]]:
    """A set for each digit and level of spread."""
    cases = [(digit, sigma) for digit in range(10) for sigma in SIGMAS]
    return [(s, renderer.sample(MEMBERS, s, seed + i, digit=digit).images) for i, (digit, s) in enumerate(cases)]


def _uniformity(scale: SetVariability, distances: Tensor, seed: int) -> float:
    from scipy.stats import kstest

    pick = torch.randperm(len(distances), generator=torch.Generator().manual_seed(seed))[:5000]
    return float(kstest(scale.quantile(distances[pick]).numpy(), "uniform").statistic)


def _moved(embed: Any, images: Tensor, reference: list[tuple[float, Tensor]], seed: int) -> float:
    """How far one pixel in a random direction moves an image, as a share of the mean distance in the reference."""
    generator = torch.Generator().manual_seed(seed)
    way = torch.randint(4, (len(images),), generator=generator)
    steps = [((1, 0)), ((-1, 0)), ((0, 1)), ((0, -1))]
    moved = torch.stack([image.roll(steps[int(w)], (-2, -1)) for image, w in zip(images, way, strict=True)])
    first, second = (torch.nn.functional.normalize(embed(x), dim=-1) for x in (images, moved))
    usual = torch.cat([pair_distances(embed(x)) for _, x in reference]).mean()
    distance = float((first - second).norm(dim=-1).mean() / usual)
    return distance if math.isfinite(distance) else float("nan")


ENTRY = Entry(
    number=212,
    slug="set-variability",
    title="Words Worth a Thousand Pictures: Measuring and Understanding Perceptual Variability in Text-to-Image "
    "Generation",
    kind="measure",
    home="actome.measures.SetVariability",
    claim="Spearman of calibrated variability and the known spread of digit sets is at least 0.9, the reuse count does "
    "not fall with the spread, and distances of held-out pairs are uniform after calibration (KS at most 0.05).",
    test=test,
    takes={"smoke": "about 4 seconds", "small": "under a minute"},
    open="Human cut-points and the regression of variability on properties of prompts need people and prompts.",
)
