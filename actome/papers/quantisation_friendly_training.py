"""[224] Intriguing Properties of Quantization at Scale.

The paper finds that what makes a model hard to quantise, a few outlier dimensions in its activations, is a matter of
how it was trained: high weight decay, no dropout, clipped gradients and bf16 leave small outliers, and the loss from
rounding to int8 vanishes with them.

Tested on a byte model of two layers, trained on the same text in twelve ways and three seeds each; four bits stand for
the stress that eight are at scale.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from actome.core.load import wrap
from actome.core.model import Model
from actome.dynamics.quantisation import QuantisationProbe
from actome.dynamics.recipes import recipe_grid
from actome.measures.extremes import MassiveActivations, OutlierChannels
from actome.measures.kurtosis import Kurtosis
from actome.papers.registry import Entry, Scale
from actome.tasks.corpus import documents
from actome.tasks.subject import Subject, SubjectConfig
from actome.tasks.training import train
from actome.tasks.trials import trial_seeds

WIDTH, CONTEXT, BATCH, LAYERS = 32, 32, 16, 2
RATE = 1e-2
GRID = {"weight_decay": [0.0, 0.1, 1.0], "clip": [None, 1.0], "dropout": [0.0, 0.3]}
STRESS = QuantisationProbe(activations=4)
WEIGHTS = QuantisationProbe(weights=4)
CONTROL = QuantisationProbe(activations=8, per="vector")
NEAR = 0.05  # nats, within which two clean losses count as one
FACTOR = 3.0  # of a token's scale: among 32 channels none can stand out six times
PREDICTOR = "kurtosis"
OTHERS = ("token_kurtosis", "massive_ratio", "outlier_channels", "weight_max_rms", "gain_spread")
SHOWN = ("clean", "a4_tensor_rise", "w4_tensor_rise", "a8_vector_rise", "kurtosis", "massive_ratio", "outlier_channels")


def test(seed: int, scale: Scale) -> tuple[dict[str, Any], dict[str, Any], dict[str, bool]]:
    steps, count, grid, rows = 100, 3, GRID, 128
    if scale == "smoke":
        steps, count, grid, rows = 10, 2, {"weight_decay": [0.0, 1.0], "clip": [1.0], "dropout": [0.0]}, 16

    def trained(seed: int, **recipe: Any) -> Model:
        return _trained(seed, steps, **recipe)

    measures = {"blocks.*.resid.post": [Kurtosis(every=1), MassiveActivations(), OutlierChannels(FACTOR)]}
    found = recipe_grid(
        trained,
        grid,
        measures,
        [STRESS, WEIGHTS, CONTROL],
        _rows("heldout", rows, seed=0),
        seeds=[one % 2**31 for one in trial_seeds(seed, count)],
    )
    outcome, weights, control = (f"{probe.name}_rise" for probe in (STRESS, WEIGHTS, CONTROL))
    rho, p = found.association(PREDICTOR, outcome, seed=seed)
    spread, held = found.spread(outcome, within=NEAR), found.held_out_spread(outcome, within=NEAR)
    means = found.means()
    figures = {
        "recipes": [{**{key: _named(row[key]) for key in GRID}, **{key: float(row[key]) for key in SHOWN}}
                    for row in means.to_dict("records")],
        "spearman": rho,
        "spearman_p": p,
        "spearman_of_others": {name: found.association(name, outcome, permutations=1)[0] for name in OTHERS},
        "spearman_with_w4": found.association(PREDICTOR, weights, permutations=1)[0],
        "best": {key: _named(value) for key, value in spread.best.items()},
        "worst": {key: _named(value) for key, value in spread.worst.items()},
        "ratio": spread.ratio,
        "ratio_on_seeds_that_did_not_choose": held,
        "clean_of_worst_less_best": spread.clean,
        "rise_by_setting": {
            key: {str(_named(value)): float(rise) for value, rise in found.effect(key, outcome).items()} for key in grid
        },
    }  # fmt: skip
    rises = means[control].to_numpy()
    controls = {"a8_vector_rise_least": float(rises.min()), "a8_vector_rise_greatest": float(rises.max())}
    checks = {
        f"rank correlation of {PREDICTOR} and the rise at 4 bits is 0.5 or more": rho >= 0.5,
        "recipes of one clean loss differ in it 1.5 times or more, on seeds that did not choose them": held >= 1.5,
        "eight bits a token: all recipes within 0.01 nats (control)": float(np.ptp(rises)) <= 0.01,
    }
    return figures, controls, checks


def _named(value: Any) -> Any:
    """A setting for people and for JSON; no clipping came back from the table as NaN."""
    return "none" if value is None or value != value else float(value)


@lru_cache(maxsize=2)
def _bytes(split: str) -> Tensor:
    text = "\n".join(one.text for one in documents(split, kind="english"))
    return torch.tensor(list(text.encode()), dtype=torch.long)


def _rows(split: str, count: int, seed: int) -> Tensor:
    """Pieces of the text from random places, (rows, context)."""
    text = _bytes(split)
    starts = torch.randint(len(text) - CONTEXT, (count,), generator=torch.Generator().manual_seed(seed))
    return text[starts[:, None] + torch.arange(CONTEXT)]


def _trained(seed: int, steps: int, weight_decay: float, clip: float | None, dropout: float) -> Model:
    config = SubjectConfig(vocab=256, d_model=WIDTH, layers=LAYERS, heads=4, context=CONTEXT, norm="layer")
    module = Subject.fresh(config, seed)
    hooks = [
        part.register_forward_hook(_dropped(dropout)) for block in module.blocks for part in (block.attn, block.mlp)
    ]
    rows = _rows("train", steps * BATCH, seed)
    train(module, rows, batch_size=BATCH, lr=RATE, weight_decay=weight_decay, clip=clip, seed=seed)
    for hook in hooks:
        hook.remove()
    return wrap(module)


def _dropped(p: float) -> Any:
    """What a part adds to the stream, with dropout while it is trained."""

    def hook(module: nn.Module, _: Any, out: Any) -> Any:
        if not module.training or not p:
            return None
        if isinstance(out, tuple):
            return (nn.functional.dropout(out[0], p), *out[1:])
        return nn.functional.dropout(out, p)

    return hook


ENTRY = Entry(
    number=224,
    slug="quantisation-friendly-training",
    title="Intriguing Properties of Quantization at Scale",
    kind="phenomenon",
    home="actome.dynamics.recipe_grid",
    claim="Over twelve recipes (weight decay, clipping, dropout) and three seeds, kurtosis of block outputs goes with "
    "the loss from rounding activations to 4 bits (rank correlation 0.5 or more), and recipes of one clean loss differ "
    "in it by 1.5 times or more.",
    test=test,
    takes={"smoke": "seconds", "small": "a minute and a half"},
    open="Half precision (bf16 against fp16), models beyond two layers, and rounding with GPTQ-like correction.",
)
