"""[250] Spectral Scaling Laws in Language Models: How Effectively Do Feed-Forward Networks Use Their Latent Space?

The paper asks in how many directions the hidden units of feed-forward layers vary, by a hard and a soft rank, and how
these grow with the layers' width: the soft rank faster than the hard one, both slower than the width, so that a smaller
share of a wider layer is used.

Tested on two-layer language models of growing MLP width, after the nonlinearity. The control is noise of those widths.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from actome.core.load import wrap
from actome.measures import Spectrum
from actome.measures.spectral import scaling_fit
from actome.papers.registry import Entry, Scale
from actome.tasks import Subject, SubjectConfig, train
from actome.tasks.topic_bigram import TopicBigram
from actome.tasks.trials import trial_seeds

LENGTH, BATCH = 32, 16
TOKENS_PER_UNIT = 20
NAMES = ("participation_ratio", "shannon_rank", "sui", "spectral_concentration")


def test(seed: int, scale: Scale) -> tuple[dict[str, Any], dict[str, Any], dict[str, bool]]:
    count, steps = (1, 20) if scale == "smoke" else (3, 800)
    widths = [16, 64, 128] if scale == "smoke" else [16, 32, 64, 128, 256, 512]
    figures: dict[str, Any] = {"widths": widths, "tokens": TOKENS_PER_UNIT * widths[-1]}
    for one in trial_seeds(seed, count):
        runs = [_language(one, width, steps, figures["tokens"]) for width in widths]
        for name in NAMES:  # (seed, layer, width)
            figures.setdefault(name, []).append(np.array([run[name] for run in runs]).T.tolist())
        figures.setdefault("loss", []).append([run["loss"] for run in runs])
    hard, soft = (_exponents(widths, figures[name]) for name in NAMES[:2])
    figures |= {"exponent_hard": hard[0], "exponent_soft": soft[0], "r2_hard": hard[1], "r2_soft": soft[1]}
    noise = [_noise(width, figures["tokens"], seed) for width in widths]
    control = {name: scaling_fit(widths, [one[name] for one in noise])[0] for name in NAMES[:2]}
    sui = np.array(figures["sui"]).mean((0, 1))
    ranks = [np.array(figures[name]) for name in NAMES[:2]]
    checks = {
        "the soft rank grows with a larger exponent than the hard one (mean over seeds and layers)": bool(
            np.mean(soft[0]) > np.mean(hard[0])
        ),
        "the hard rank never exceeds the soft one": bool((ranks[0] <= ranks[1] * (1 + 1e-6)).all()),
        "the utilisation index falls with width, from each to the next": bool((np.diff(sui) < 0).all()),
        "of noise both exponents are 1 within 0.05 (control)": all(abs(one - 1) <= 0.05 for one in control.values()),
    }
    return figures, control, checks


def _language(seed: int, width: int, steps: int, tokens: int) -> dict[str, Any]:
    world = TopicBigram(seed=seed)
    config = SubjectConfig(vocab=world.vocab, d_model=64, layers=2, heads=4, context=LENGTH, d_mlp=width, act="gelu")
    corpus = world.sample(steps * BATCH, LENGTH, seed=seed + 1).tokens
    heldout = world.sample(-(-tokens // LENGTH), LENGTH, seed=seed + 2).tokens
    training = train(Subject.fresh(config, seed=seed), corpus, batch_size=BATCH, seed=seed)
    table = wrap(training.module).measure(heldout, {"blocks.*.mlp.act": Spectrum()}, batch_size=64)
    return {name: table.value(name).tolist() for name in NAMES} | {"loss": float(training.losses[-50:].mean())}


def _noise(width: int, tokens: int, seed: int) -> dict[str, float]:
    spectrum = Spectrum()
    spectrum.update(torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(seed)))
    return {name: float(value) for name, value in spectrum.compute().items() if name in NAMES}


def _exponents(widths: list[int], ranks: list[list[list[float]]]) -> tuple[list[list[float]], list[list[float]]]:
    """Exponents and coefficients of determination, (seed, layer) each."""
    fits = [[scaling_fit(widths, layer) for layer in run] for run in ranks]
    return [[one[0] for one in run] for run in fits], [[one[1] for one in run] for run in fits]


ENTRY = Entry(
    number=250,
    slug="spectral-utilisation",
    title="Spectral Scaling Laws in Language Models: How Effectively Do Feed-Forward Networks Use Their Latent Space?",
    kind="measure",
    home="actome.measures.Spectrum",
    claim="Over MLP widths of a quarter to eight times the model's, the soft rank of the hidden units grows with a "
    "larger exponent than the hard one, which it always exceeds, and the utilisation index falls; of noise both "
    "exponents are 1. Means over seeds.",
    test=test,
    takes={"smoke": "a few seconds", "small": "about two minutes"},
    open="The nearly perfect power law of the soft rank, which needs larger models; before the nonlinearity; norms and "
    "optimisers.",
)
