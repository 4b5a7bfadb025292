"""[190] Tracing the Representation Geometry of Language Models from Pretraining to Post-training.

The paper follows the spectrum of the last layer's representations through training and finds three phases: the
effective rank collapses during warm-up, then grows (entropy-seeking), then shrinks (compression-seeking). A toy
explains the first two by frequency: with a cross-entropy, targets of very uneven frequency and a bottleneck, gradients
first go along a few directions that frequent targets share.

Tested on that toy: an encoder of random contexts with a bottleneck of 32 units, 300 targets of Zipf's frequencies. The
effective rank is that of the eigenvalues of the features' covariance, the exponential of its von Neumann entropy; that
of the singular values, which moves less, is told beside it. The controls take one ingredient away each: even
frequencies, the squared error, the bottleneck.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actome.dynamics.geometry_phases import geometry_phases
from actome.dynamics.tracing import trace
from actome.measures.spectrum import EffectiveRank, Spectrum
from actome.papers.registry import Entry, Scale
from actome.tasks.draw import weights_from
from actome.tasks.nets import MLP
from actome.tasks.training import log_spaced
from actome.tasks.trials import over_seeds, trial_seeds

CONTEXTS, INPUTS, TARGETS, WIDTH, EXPONENT = 600, 64, 300, 32, 1.2
FALL, BACK, SHALLOWER = 0.5, 0.8, 5.0
EVERY_SEED, ONE_SEED = ("zipf", "uniform"), ("squared error", "no bottleneck")


def test(seed: int, scale: Scale) -> tuple[dict[str, Any], dict[str, Any], dict[str, bool]]:
    seeds, steps, points = (1, 120, 12) if scale == "smoke" else (3, 3000, 30)
    found = over_seeds(lambda one: _arms(one % 2**31, steps, points), seed, seeds)
    keys = (
        "singular_start",
        "singular_least",
        "singular_end",
        "start",
        "least",
        "turn",
        "end",
        "depth",
        "p",
        "collapse_first",
        "compression",
    )
    zipf, uniform = ({key: found[f"{arm}/{key}"] for key in keys} for arm in EVERY_SEED)
    first = trial_seeds(seed, 1)[0] % 2**31
    one_seed = {arm: _arm(first, steps, points, arm) for arm in ONE_SEED}
    fall = [low / start for low, start in zip(zipf["least"], zipf["start"], strict=True)]
    back = [end / start for end, start in zip(zipf["end"], zipf["start"], strict=True)]
    shallower = [a - b for a, b in zip(zipf["depth"], uniform["depth"], strict=True)]
    figures = {**zipf, "fall": fall, "recovery": back}
    if scale == "small":
        figures["demo_model"] = _demo()
    control = {"uniform": uniform, "deeper_than_uniform": shallower, **one_seed}
    wide = one_seed["no bottleneck"]
    checks = {
        "the effective rank falls to half of its start or less": max(fall) <= FALL,
        "and comes back to 0.8 of it or more": min(back) >= BACK,
        "geometry_phases calls it a warm-up collapse and then entropy-seeking": min(zipf["collapse_first"]) == 1.0,
        "with uniform targets the dip is shallower by 5 or more (control)": min(shallower) >= SHALLOWER,
        "with the squared error it is, too (control, one seed)": zipf["depth"][0] - one_seed["squared error"]["depth"]
        >= SHALLOWER,
        "without the bottleneck the rank stays above half of its start (control, one seed)": wide["least"]
        > FALL * wide["start"],
    }
    return figures, control, checks


def _arms(seed: int, steps: int, points: int) -> dict[str, float]:
    found = {arm: _arm(seed, steps, points, arm) for arm in EVERY_SEED}
    return {f"{arm}/{key}": value for arm, some in found.items() for key, value in some.items()}


def _arm(seed: int, steps: int, points: int, arm: str) -> dict[str, float]:
    at, ranks, singular, alphas = _run(seed, steps, points, arm)
    phases = geometry_phases(at, ranks, alphas, resamples=50, seed=seed)
    low = int(np.argmin(ranks))
    return {
        "singular_start": singular[0], "singular_least": min(singular), "singular_end": singular[-1],
        "start": ranks[0], "least": ranks[low], "turn": float(at[low]), "end": ranks[-1],
        # How deep the dip is: below the lower of its two rims.
        "depth": min(ranks[0], max(ranks[low:])) - ranks[low], "p": phases.p,
        "collapse_first": float(phases.names[:2] == ["warm-up collapse", "entropy-seeking"]),
        "compression": float("compression-seeking" in phases.names),
    }  # fmt: skip


def _run(seed: int, steps: int, points: int, arm: str) -> tuple[list[int], list[float], list[float], list[float]]:
    """Steps even in log step; at these of all contexts' features the rank of eigenvalues, of singular values, alpha."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(CONTEXTS, INPUTS, generator=draw)
    frequency = torch.ones(TARGETS) if arm == "uniform" else torch.arange(1, TARGETS + 1.0) ** -EXPONENT
    y = torch.multinomial(frequency, CONTEXTS, replacement=True, generator=draw)
    width = TARGETS if arm == "no bottleneck" else WIDTH
    encoder = MLP([INPUTS, 128, width], seed=seed)
    with weights_from(seed + 1):
        readout = nn.Linear(width, TARGETS, bias=False)
    adam = torch.optim.AdamW([*encoder.parameters(), *readout.parameters()], lr=1e-3)
    wanted = F.one_hot(y, TARGETS).float() if arm == "squared error" else y
    loss = F.mse_loss if arm == "squared error" else F.cross_entropy
    kept, curves = set(log_spaced(steps, points)), []
    for step in range(steps + 1):
        if step in kept:
            curves.append(_spectrum(encoder, x))
        adam.zero_grad()
        loss(readout(encoder(x)), wanted).backward()
        adam.step()
    return sorted(kept), *map(list, zip(*curves, strict=True))


@torch.no_grad()
def _spectrum(encoder: nn.Module, x: Tensor) -> tuple[float, float, float]:
    features = encoder(x)
    centred = (features - features.mean(0))[None]
    rank, spectrum = EffectiveRank(), Spectrum()
    rank.update(centred)
    spectrum.update(centred)
    values = spectrum.compute()
    return float(values["shannon_rank"]), float(rank.compute()["effective_rank"]), float(values["alpha"])


def _demo() -> dict[str, Any]:
    """The phases of the language model that ships with actome, for comparison; no part of the claim."""
    found = trace("demo", {"blocks.3.resid.post": Spectrum()}, tokens=8192)
    phases = geometry_phases(found)
    return {"phases": phases.names, "starts": [one.start for one in phases], "rank": [float(r) for r in phases.rank]}


ENTRY = Entry(
    number=190,
    slug="geometry-phases",
    title="Tracing the Representation Geometry of Language Models from Pretraining to Post-training",
    kind="measure",
    home="actome.dynamics.geometry_phases",
    claim="With a bottleneck, cross-entropy and targets of Zipf's frequencies, the features' effective rank falls to "
    "half of its start or less in training and comes back to 0.8 of it; with uniform targets the dip is shallower by "
    "5 or more.",
    test=test,
    takes={"smoke": "seconds", "small": "about a minute"},
    open="Compression-seeking, which the toy does not have; post-training; large models.",
)  # fmt: skip
