"""[206] Identifying and Manipulating Personality Traits in LLMs Through Activation Engineering.

The paper finds a direction for each of many personality adjectives by contrasting prompts, adds it to give a model the
trait, takes it out to remove it, and looks at how the directions lie to one another.

Tested on speakers with five known traits, of which two are opposites and two go together. A direction is the
difference of means at the end of prompts that ask for the trait and of the same questions without. Where it is added,
how strongly, and whose direction is taken out is chosen on questions held back for that, by the preference for answers
that show the trait while the answers' content stays right; all is judged on further questions, trait and content apart.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from actome.clamps import Add, Project
from actome.core.clamp import Clamp
from actome.core.model import Model
from actome.papers._trait_subjects import speaker
from actome.papers.registry import Entry, Scale
from actome.steer import Contrast, Examples, LayerChoice, Pairs, Steering, cosines, select_layer
from actome.tasks.traits import CORRELATED, OPPOSITE, TRAITS, TraitWorld
from actome.tasks.trials import split, trial_seeds

MIDDLE = "blocks.1.resid.post"  # where all directions are compared
DRAWS = 3
STRENGTHS = (1.0, 2.0, 3.0)


def test(seed: int, scale: Scale) -> tuple[dict[str, Any], dict[str, Any], dict[str, bool]]:
    count, steps = (1, 60) if scale == "smoke" else (3, 1000)
    trials = [_trial(one, steps) for one in trial_seeds(seed, count)]
    numbers = {name: [trial[name] for trial in trials] for name in trials[0] if name != "sites"}
    mean = {name: sum(values) / count for name, values in numbers.items()}
    control = {name: mean.pop(name) for name in list(mean) if name.startswith("control")}
    figures = {**mean, "sites": [trial["sites"] for trial in trials], "seeds": numbers}
    checks = {
        "adding a direction raises the rate of its trait by at least 0.5": mean["rise"] >= 0.5,
        "with the accuracy of contents down by less than 0.1": mean["content_lost"] < 0.1,
        "a random direction of the same length changes the rate by less than 0.1": abs(control["control_rise"]) < 0.1,
        "taking a direction out lowers the rate of its trait, where it is asked for, by at least 0.4": mean["fall"]
        >= 0.4,
        "the directions of the opposite traits have a negative cosine": mean["cosine_opposite"] < 0,
        "those of the traits that go together have a larger one than others in the mean": mean["cosine_correlated"]
        > mean["cosine_others"],
    }
    return figures, control, checks


def _trial(seed: int, steps: int) -> dict[str, Any]:
    world, model = speaker(seed, steps)
    fit, choose, judge = split(world.questions, [0.5, 0.25, 0.25], seed % 2**31)
    rows, clamps, sites = [], {}, []
    for trait in range(TRAITS):
        examples = Examples(world.prompts(fit, trait), world.prompts(fit))
        clamp = Contrast().fit(model, examples)
        adding, ablating = (_chosen(world, model, clamp, choose, trait, how) for how in ("add", "ablate"))
        sites.append({"add": adding.site, "strength": adding.strength, "ablate": ablating.site})
        clamps[trait] = clamp.to(MIDDLE)
        rows.append(_judged(world, model, judge, trait, adding.clamp, ablating.clamp, seed))
        neutral = float(clamp.to(MIDDLE).monitor(model, world.prompts(fit), over="last").mean())
        levelled = [clamp.to(MIDDLE).ablate(), Add(MIDDLE, neutral * clamp.to(MIDDLE).unit)]
        rows[-1]["fall_to_neutral"] = rows[-1]["rate_asked"] - _rate(world, model, judge, trait, levelled, trait)[0]
    found = {name: sum(row[name] for row in rows) / TRAITS for name in rows[0]}
    return {**found, **_angles(clamps), "sites": sites}


def _chosen(world: TraitWorld, model: Model, clamp: Steering, questions: Tensor, trait: int, how: Any) -> LayerChoice:
    """On questions that serve for nothing else."""
    shown, plain = (world.word(questions, torch.tensor(world.typical(one)))[:, None] for one in (trait, None))
    asked = () if how == "add" else (trait,)
    prompts = world.prompts(questions, *asked)
    pairs = Pairs(prompts, shown, plain) if how == "add" else Pairs(prompts, plain, shown)
    return select_layer(
        model,
        clamp,
        pairs,
        how=how,
        strengths=STRENGTHS,
        random=0,
        task=lambda m: world.judge(m.logits(prompts)[:, -1], questions).content,
    )


def _judged(
    world: TraitWorld, model: Model, questions: Tensor, trait: int, add: Clamp | None, ablate: Clamp | None, seed: int
) -> dict[str, float]:
    """Rates of a trait and of right contents; where nothing was recommended nothing is done."""

    def rate(clamp: Clamp | None, *asked: int) -> tuple[float, float]:
        return _rate(world, model, questions, trait, [] if clamp is None else [clamp], *asked)

    bare, content = rate(None)
    steered, steered_content = rate(add)
    asked, asked_content = rate(None, trait)
    removed, removed_content = rate(ablate, trait)
    noise = torch.randn(DRAWS, model.d_model, generator=torch.Generator().manual_seed(seed % 2**31 + trait))
    pushed = [] if add is None else [add.at(value=one / one.norm() * add.value.norm()) for one in noise]
    without = [] if ablate is None else [Project(ablate.site, one) for one in noise]
    return {
        "rate": bare,
        "rise": steered - bare,
        "content": content,
        "content_lost": content - steered_content,
        "rate_asked": asked,
        "fall": asked - removed,
        "content_lost_by_ablation": asked_content - removed_content,
        "control_rise": sum(rate(one)[0] - bare for one in pushed) / DRAWS,
        "control_fall": sum(asked - rate(one, trait)[0] for one in without) / DRAWS,
    }


def _rate(
    world: TraitWorld, model: Model, questions: Tensor, trait: int, clamps: list[Any], *asked: int
) -> tuple[float, float]:
    with model.clamp(*clamps) if clamps else nullcontext():
        got = world.judge(model.logits(world.prompts(questions, *asked))[:, -1], questions)
    return float(got.traits[:, trait].mean()), float(got.content.mean())


def _angles(clamps: dict[Any, Steering]) -> dict[str, float]:
    table = cosines(clamps)
    pairs = {(a, b): float(table.loc[a, b]) for a in range(TRAITS) for b in range(a + 1, TRAITS)}
    opposite, correlated = pairs.pop(OPPOSITE), pairs.pop(CORRELATED)
    return {
        "cosine_opposite": opposite,
        "cosine_correlated": correlated,
        "cosine_others": sum(pairs.values()) / len(pairs),
    }


ENTRY = Entry(
    number=206,
    slug="personality-directions",
    title="Identifying and Manipulating Personality Traits in LLMs Through Activation Engineering",
    kind="method",
    home="actome.steer.select_layer",
    claim="On speakers with five traits, adding a trait's direction where validation questions say raises its rate by "
    "at least 0.5 with content accuracy down by less than 0.1, a random one by less than 0.1; taking it out lowers a "
    "trait that is asked for by at least 0.4; opposite traits have a negative cosine, and the correlated pair a larger "
    "one than the mean of others.",
    test=test,
    takes={"smoke": "seconds", "small": "about a minute"},
    open="Questionnaires, and whether directions of many adjectives group like them; generation of long texts.",
)
