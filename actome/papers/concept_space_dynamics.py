"""[128] Emergence of Hidden Capabilities: Exploring Learning Dynamics in Concept Space.

The paper follows a conditional generator in coordinates of the data's concepts: what moves the pixels more is learned
first, the combination that was never shown goes towards its trained neighbour and turns, and stronger prompts bring it
out before the plain one does.

Tested on small pictures of discs, blue or red and large or small, made by two perceptrons from a condition.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from actome.dynamics.concept_space import ConceptSpace, ConceptTrace, concept_signal
from actome.dynamics.elicitation import Elicitation, LatentPush, OverPrompt, elicit
from actome.papers.registry import Entry, Scale
from actome.tasks import Training, train
from actome.tasks.shapes2d import ShapeDecoder, Shapes2D
from actome.tasks.trials import trial_seeds

BRIGHT, BROAD = Shapes2D(color_sep=0.8, size_sep=0.1), Shapes2D(color_sep=0.2, size_sep=0.4)
HELD_OUT = (1, 1)
FIRST = 40  # before, the generator has not found the disc and its coordinates say nothing


def test(seed: int, scale: Scale) -> tuple[dict[str, Any], dict[str, Any], dict[str, bool]]:
    steps, count = (120, 2) if scale == "smoke" else (1600, 5)
    seeds = trial_seeds(seed, count)
    bright, broad, blind, shuffled = (
        [_run(world, one, steps, **options) for one in seeds]
        for world, options in ((BRIGHT, {}), (BROAD, {}), (BRIGHT, {"mask": 0.6}), (BRIGHT, {"shuffled": True}))
    )
    traces = {"bright": _trace(BRIGHT, bright), "broad": _trace(BROAD, broad), "shuffled": _trace(BRIGHT, shuffled)}
    asked = {name: _asked(BRIGHT, runs, seeds) for name, runs in (("bright", bright), ("blind", blind), ("shuffled", shuffled))}
    figures = {
        "signal": {name: _signal(world) for name, world in (("bright", BRIGHT), ("broad", BROAD))},
    }
    for n,t in traces.items():
        print(n, t.order(), {c: t.learned(c) for c in t.concepts})
        try: print(t.turn(HELD_OUT, after=FIRST, permutations=49))
        except Exception as e: print(e)
        print(np.round(t.path(HELD_OUT)[:, ::4], 2).tolist()[0])
    for n,a in asked.items():
        print(n, {k:v for k,v in a.dates.items()}, a.leads, a.hidden)
    print(figures)
    return figures, {}, {}


def _run(world: Shapes2D, seed: int, steps: int, *, mask: float = 0.0, shuffled: bool = False) -> Training:
    shapes = world.sample(3000, seed, masked="color" if mask else "", mask=mask, mask_combos=[(1, 0)])
    conditions = shapes.conditions
    if shuffled:
        conditions = conditions[torch.randperm(len(conditions), generator=torch.Generator().manual_seed(seed))]
    kept = [step for step in (*range(0, 400, 10), *range(400, steps + 1, 25)) if step <= steps]
    return train(
        ShapeDecoder(seed=seed % 2**31), (conditions, shapes.images), steps, batch_size=64,
        loss=lambda net, given, images: F.mse_loss(net(given), images), lr=1e-3, betas=(0.9, 0.999), warmup=0,
        schedule="constant", clip=None, checkpoints=kept, seed=seed % 2**31,
    )  # fmt: skip


def _trace(world: Shapes2D, runs: list[Training]) -> ConceptTrace:
    prompts = {combo: world.conditions(world.values(torch.tensor([combo]))) for combo in world.combinations()}
    return ConceptSpace(world.readouts()).trace(runs, prompts, held_out=[HELD_OUT])


def _asked(world: Shapes2D, runs: list[Training], seeds: list[int]) -> Elicitation:
    space = ConceptSpace(world.readouts())
    shapes = world.sample(600, seeds[0])
    prompt = world.conditions(world.values(torch.tensor([HELD_OUT])))
    small = (shapes.combos == torch.tensor([0, 1])).all(1)
    large = (shapes.combos == torch.tensor([0, 0])).all(1)
    ways = {
        "overprompt": OverPrompt(prompt, world.is_about("size"), shapes.conditions.mean(0)),
        "latent": LatentPush(prompt, "module:act", shapes.conditions[small], shapes.conditions[large]),
    }
    return elicit(space, runs, HELD_OUT, prompt, ways, pushed="size")


def _signal(world: Shapes2D) -> dict[str, float]:
    low, high = (world.values(torch.full((1, 2), one)) for one in (0, 1))
    return dict(zip(world.factors, concept_signal(world.render, low, high).tolist(), strict=True))
