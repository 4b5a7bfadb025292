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
from actome.dynamics.path_turns import PathTurn
from actome.papers.registry import Entry, Scale
from actome.tasks import Training, train
from actome.tasks.shapes2d import ShapeDecoder, Shapes2D
from actome.tasks.trials import trial_seeds

BRIGHT, BROAD = Shapes2D(color_sep=0.8, size_sep=0.1), Shapes2D(color_sep=0.2, size_sep=0.4)
HELD_OUT = (1, 1)
FIRST = 40  # before, the generator has not found the disc and its coordinates say nothing


def test(seed: int, scale: Scale) -> tuple[dict[str, Any], dict[str, Any], dict[str, bool]]:
    steps, count, fewer = (120, 2, 1) if scale == "smoke" else (1200, 5, 3)
    seeds = trial_seeds(seed, count)
    bright, broad = ([_run(world, one, steps) for one in seeds] for world in (BRIGHT, BROAD))
    masked, shuffled = (
        [_run(BRIGHT, one, steps, **options) for one in seeds[:fewer]]
        for options in ({"mask": 0.6}, {"shuffled": True})
    )
    traces = {"bright": _trace(BRIGHT, bright), "broad": _trace(BROAD, broad), "shuffled": _trace(BRIGHT, shuffled)}
    turns = {name: one.turn(HELD_OUT, after=FIRST) for name, one in traces.items()}
    asked = {name: _asked(runs, seeds[0]) for name, runs in (("bright", bright), ("masked", masked))}
    nothing = _asked(shuffled, seeds[0])
    dates = {name: {one: trace.learned(one).runs for one in trace.concepts} for name, trace in traces.items()}
    ratio = [size / color for size, color in zip(dates["bright"]["size"], dates["bright"]["color"], strict=True)]
    color_RS = traces["broad"].path(HELD_OUT, "color")[:, traces["broad"].steps >= FIRST]
    lowest = color_RS.min(1)
    highest_later = [float(run[run.argmin() :].max()) for run in color_RS]
    figures = {
        "signal": {name: _signal(world) for name, world in (("bright", BRIGHT), ("broad", BROAD))},
        "learned_at_step": {name: dates[name] for name in ("bright", "broad")},
        "size_over_color_date_bright": ratio,
        "broad_lowest_color_of_11": lowest.tolist(),
        "broad_highest_color_of_11_afterwards": highest_later,
        "broad_turn": _turn(turns["broad"]),
        "end_of_11": {name: traces[name].path(HELD_OUT)[:, -1].mean(0).tolist() for name in ("bright", "broad")},
        "first_11_at_step": {
            name: {way: one.runs for way, one in found.dates.items()} for name, found in asked.items()
        },
        "hidden_share": {name: found.hidden for name, found in asked.items()},
    }
    control = {
        "bright_turn": _turn(turns["bright"]),
        "shuffled_turn": _turn(turns["shuffled"]),
        "shuffled_learned_at_step": dates["shuffled"],
        "shuffled_first_11_at_step": {way: one.runs for way, one in nothing.dates.items()},
    }
    naive, pushed = (asked["bright"].dates[way].runs for way in ("naive", "overprompt"))
    checks = {
        "bright: colour is learned at least 5 times earlier than size (median)": 5 <= float(np.median(ratio)) < np.inf,
        "broad: size is learned before colour in every run": all(
            size < color for size, color in zip(dates["broad"]["size"], dates["broad"]["color"], strict=True)
        ),
        "broad: the colour of 11 falls below 0.2 and then passes 0.9 (median run)": float(np.median(lowest)) < 0.2
        and float(np.median(highest_later)) > 0.9,
        "broad: that turn is beyond shuffled steps (p <= 0.05)": turns["broad"].p <= 0.05,
        "bright: over-prompting gives 11 no later than the plain prompt in every run, and does give it": all(
            a <= b and np.isfinite(a) for a, b in zip(pushed, naive, strict=True)
        ),
        "control: with shuffled conditions no concept is learned, 11 is not given, and no turn stands out": bool(
            np.isinf([*dates["shuffled"]["color"], *dates["shuffled"]["size"]]).all()
            and all(one.censored == 1 for one in nothing.dates.values())
            and turns["shuffled"].p > 0.05
        ),
    }
    return figures, control, checks


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


def _asked(runs: list[Training], seed: int) -> Elicitation:
    """11 of the bright world by every way; the pushes are of its slow concept."""
    space, shapes = ConceptSpace(BRIGHT.readouts()), BRIGHT.sample(600, seed)
    prompt = BRIGHT.conditions(BRIGHT.values(torch.tensor([HELD_OUT])))
    small, large = ((shapes.combos == torch.tensor(combo)).all(1) for combo in ((0, 1), (0, 0)))
    ways = {
        "overprompt": OverPrompt(prompt, BRIGHT.is_about("size"), shapes.conditions.mean(0)),
        "latent": LatentPush(prompt, "module:act", shapes.conditions[small], shapes.conditions[large]),
    }
    return elicit(space, runs, HELD_OUT, prompt, ways, pushed="size")


def _signal(world: Shapes2D) -> dict[str, float]:
    low, high = (world.values(torch.full((1, 2), one)) for one in (0, 1))
    return dict(zip(world.factors, concept_signal(world.render, low, high).tolist(), strict=True))


def _turn(found: PathTurn) -> dict[str, Any]:
    return {"step": found.at, "runs": found.runs, "angle": found.angle, "detour": found.detour,
            "shuffled_detour": found.control, "p": found.p}  # fmt: skip


ENTRY = Entry(
    number=128,
    slug="concept-space-dynamics",
    title="Emergence of Hidden Capabilities: Exploring Learning Dynamics in Concept Space",
    kind="phenomenon",
    home="actome.dynamics.ConceptSpace",
    claim="With classes (0.8, 0.1) apart in colour and size, colour is learned at least 5 times earlier; at (0.2, 0.4) "
    "size comes first, and the colour of the combination that was never shown falls below 0.2 and then passes 0.9, a "
    "turn beyond shuffled steps. Over-prompting gives that combination no later than the plain prompt, in every run. "
    "Control: with shuffled conditions nothing is learned and nothing turns.",
    test=test,
    takes={"smoke": "about 3 seconds", "small": "about a minute"},
    open="Diffusion models and 32x32 pictures; CelebA; the lead of latent interventions is reported, not claimed.",
)
