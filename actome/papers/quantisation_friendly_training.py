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

import torch
from torch import Tensor, nn

from actome.core.load import wrap
from actome.core.model import Model
from actome.dynamics.recipes import QuantisationProbe, recipe_grid
from actome.measures.extremes import MassiveActivations, OutlierChannels
from actome.measures.kurtosis import Kurtosis
from actome.papers.registry import Scale
from actome.tasks.corpus import documents
from actome.tasks.subject import Subject, SubjectConfig
from actome.tasks.training import train
from actome.tasks.trials import trial_seeds

WIDTH, CONTEXT, BATCH, LAYERS = 48, 32, 24, 2
RATE = 1e-2
GRID = {"weight_decay": [0.0, 0.1, 1.0], "clip": [None, 1.0], "dropout": [0.0, 0.3]}
PREDICTOR = "kurtosis"


def test(seed: int, scale: Scale) -> tuple[dict[str, Any], dict[str, Any], dict[str, bool]]:
    steps, count, grid = 120, 3, GRID
    if scale == "smoke":
        steps, count, grid = 20, 1, {"weight_decay": [0.0, 1.0], "clip": [1.0], "dropout": [0.0, 0.3]}

    def trained(seed: int, **recipe: Any) -> Model:
        return _trained(seed, steps, **recipe)

    stress, control = QuantisationProbe(activations=4), QuantisationProbe(activations=8, per="vector")
    weights = QuantisationProbe(weights=4)
    measures = {"blocks.*.resid.post": [Kurtosis(every=1), MassiveActivations(), OutlierChannels()]}
    held = _rows("heldout", 128, seed=0)
    found = recipe_grid(
        trained, grid, measures, [stress, control, weights], held, seeds=[s % 2**31 for s in trial_seeds(seed, count)]
    )
    return found


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
