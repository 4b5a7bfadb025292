"""[14] Void in Language Models.

The paper marks, token by token, the layers that hardly lengthen the residual stream ("voids"), and finds that a model
uses other layers while it reads a prompt than while it writes.

Tested on the demo model with real text that it was not trained on. Generated tokens stand further back than the
prompt's, so the true continuation of each prompt, read at the same positions, is measured as well: what it shows of
the difference is the position's doing and not the generation's.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from actome.core.text import Text
from actome.measures import Voids
from actome.papers.registry import Entry, Scale
from actome.tasks.corpus import documents
from actome.tasks.demo import demo

SITES = ["blocks.0.resid.pre", "blocks.*.resid.post"]
PROMPT, NEW = 64, 64
ALPHAS = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
ALPHA = 0.8


def test(seed: int, scale: Scale) -> tuple[dict[str, Any], dict[str, Any], dict[str, bool]]:
    prompts, splits = (32, 200) if scale == "smoke" else (256, 1000)
    generator = torch.Generator().manual_seed(seed)
    model = demo()
    text_BT = _passages(model.tokenizer, prompts, PROMPT + NEW, generator)
    written = model.generate(
        text_BT[:, :PROMPT], NEW + 1, record=SITES, do_sample=True, seed=seed, min_new_tokens=NEW + 1
    ).recording
    read = model.record(text_BT, SITES)
    norms_LBT, read_LBT = (_norms(recording) for recording in (written, read))

    sweep = [_overall(used_layers(norms_LBT, alpha)) for alpha in ALPHAS]
    prompt, new = used_layers(norms_LBT[..., :PROMPT], ALPHA), used_layers(norms_LBT[..., PROMPT:], ALPHA)
    distance = float((prompt - new).abs().sum())
    null = _split_half(norms_LBT[..., :PROMPT], splits, generator)
    figures = {
        "alphas": ALPHAS,
        "share_of_layers_used": sweep,
        "used_by_layer_prompt": prompt.tolist(),
        "used_by_layer_generated": new.tolist(),
        "distance_prompt_generated": distance,
        "overlap_prompt_generated": float(torch.minimum(prompt, new).sum() / torch.maximum(prompt, new).sum()),
    }
    control = {
        "distance_between_halves_of_the_prompts_95_percent": float(null.quantile(0.95)),
        "distance_prompt_true_continuation": float((prompt - used_layers(read_LBT[..., PROMPT:], ALPHA)).abs().sum()),
        "share_of_layers_used_untrained": _overall(used_layers(_norms(demo(0).record(text_BT, SITES)), ALPHA)),
    }
    checks = {
        "the share of layers used falls as alpha grows": all(
            later <= earlier for earlier, later in itertools.pairwise(sweep)
        )
        and sweep[-1] < sweep[0],
        "prompt and generated tokens differ more than 95 % of random halves of the prompts do": distance
        > control["distance_between_halves_of_the_prompts_95_percent"],
    }
    return figures, control, checks


def used_layers(norms_LBT: Tensor, alpha: float) -> Tensor:
    """Share of tokens for which each layer is no void, (layer)."""
    voids = Voids(alpha)
    return voids.values(voids.statistics(norms_LBT[:, None]))["used"][1:]


def _norms(recording: Any) -> Tensor:
    """(layer + 1, batch, pos), from the stream before the first layer on."""
    states = [recording["blocks.0.resid.pre"], *recording["blocks.*.resid.post"]]
    return torch.stack([state[:, : PROMPT + NEW].norm(dim=-1) for state in states])


def _overall(used_L: Tensor) -> float:
    return float(used_L.mean())


def _split_half(norms_LBT: Tensor, splits: int, generator: torch.Generator) -> Tensor:
    """L1 distances between the frequencies of random halves of the rows, (splits)."""
    used_BL = torch.stack([used_layers(norms_LBT[:, i : i + 1], ALPHA) for i in range(norms_LBT.shape[1])])
    half = len(used_BL) // 2
    orders = [torch.randperm(len(used_BL), generator=generator) for _ in range(splits)]
    return torch.stack(
        [(used_BL[order[:half]].mean(0) - used_BL[order[half:]].mean(0)).abs().sum() for order in orders]
    )


def _passages(tokenizer: Any, count: int, length: int, generator: torch.Generator) -> Tensor:
    """Random stretches of held-out text, each from the start of a row as the model was trained, [count, length]."""
    heldout = [(one.title, one.text) for one in documents("heldout")]
    rows = [batch.ids for batch in Text(heldout, tokenizer, context=length, batch_size=1)]
    full = torch.cat([ids for ids in rows if ids.shape[1] == length])
    return full[torch.randperm(len(full), generator=generator)[:count]]


ENTRY = Entry(
    number=14,
    slug="lac-voids",
    title="Void in Language Models",
    kind="measure",
    home="actome.measures.Voids",
    claim="The share of layers used falls monotonically in alpha, and at alpha = 0.8 prompt and generated tokens use "
    "the layers in other shares than random halves of the prompts do (L1 distance, 95 % of halves).",
    test=test,
    takes={"smoke": "seconds", "small": "about half a minute"},
    open="Bypassing voids, and its accuracy against random bypassing of as many layers, come with layer skipping.",
)
