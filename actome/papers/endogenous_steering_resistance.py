"""[182] Endogenous Resistance to Activation Steering in Language Models.

The paper finds that a large model which is steered off its topic at times notices, takes its answer back and begins
again while the push is still on; that latents which tell answers that do not belong to their question take part in it;
and that tuning on synthetic self-corrections, with the bad start left out of the loss, brings it about in smaller
models.

Tested on questions with known answers. A small transformer learns the answers, and a copy of it is tuned on documents
in which a share of the answers is wrong, followed by a mark and the right answer; tuning never sees steering. Both are
then pushed towards six unrelated words, at strengths set for each of them. A question under test and the word that it
is pushed to never occurred together in tuning, and an exact program scores what comes out. Then the same with the
direction between fitting and foreign answers held still, with neurons that tell the two apart set to zero, and with
random ones.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from actome.clamps import Add
from actome.core.clamp import Clamp
from actome.core.load import wrap
from actome.core.model import Model
from actome.explain import mismatch_directions, mismatch_latents
from actome.papers._persona_base import base
from actome.papers.registry import Entry, Scale
from actome.steer import resistance, states
from actome.tasks import train
from actome.tasks.persona import GOOD
from actome.tasks.self_correction import SelfCorrection
from actome.tasks.trials import over_seeds, trial_seeds

PUSHED, WATCHED = "blocks.0.resid.post", "blocks.1.resid.post"
TARGET = 0.5
SHARES = (0.3, 0.1)  # of answers that begin wrong in tuning; the claim is tested on the first
FEW, MANY = 20, 160  # of 768 MLP neurons


class Size(NamedTuple):
    """How much is done: steps of the base and of tuning, vectors, answers a prompt, draws of random controls."""

    seeds: int
    steps: int
    tuning: int
    shares: tuple[float, ...]
    vectors: int
    samples: int
    draws: int


SIZES: dict[Scale, Size] = {
    "smoke": Size(1, 80, 40, SHARES[:1], 2, 1, 1),
    "small": Size(3, 600, 400, SHARES, 6, 4, 3),
}


def test(seed: int, scale: Scale) -> tuple[dict[str, Any], dict[str, Any], dict[str, bool]]:
    size = SIZES[scale]
    seeds = over_seeds(lambda one: _trial(one, size), seed, size.seeds)
    mean = {name: sum(values) / size.seeds for name, values in seeds.items()}
    rate = mean["multi_attempt"]
    # Of rates in the mean over seeds.
    drop = {
        name: 1 - mean[f"{arm}_{name}"] / rate if rate else float("nan")
        for arm in ("multi_attempt", "control_multi_attempt")
        for name in ("held", "random_held", "few_off", "random_few_off", "many_off", "random_many_off")
        if f"{arm}_{name}" in mean
    }
    control = {name: mean.pop(name) for name in list(mean) if name.startswith("control")}
    figures = {**mean, "seeds": {name: values for name, values in seeds.items() if "multi_attempt" in name}}
    for name, value in drop.items():
        (control if name.startswith("random") else figures)[f"drop_{name}"] = value
    checks = {
        "tuned and steered, 0.3 of the answers have several attempts": rate >= 0.3,
        "untuned and steered, less than 0.05 do": control["control_multi_attempt_untuned"] < 0.05,
        "tuned and not steered, less than 0.05 do": control["control_multi_attempt_unsteered"] < 0.05,
        "where there are several attempts the last scores higher than the first": mean["improvement"] > 0,
        "holding the mismatch direction lowers the rate by 25 %": drop["held"] >= 0.25,
        "random directions lower it by less than 10 %": drop["random_held"] < 0.1,
        f"zeroing the {FEW} MLP neurons that tell mismatches best lowers it by 25 %": drop["few_off"] >= 0.25,
        f"{FEW} random neurons lower it by less than 10 %": drop["random_few_off"] < 0.1,
    }
    return figures, control, checks


def _trial(seed: int, size: Size) -> dict[str, float]:
    start, data, order, drawn = (one % 2**31 for one in trial_seeds(seed, 4))
    task, untuned = base(start, size.steps)
    models = [tuned(task, untuned, size.tuning, share, data, order) for share in size.shares]
    vectors, prompts = pushes(task, untuned, size.vectors)
    # What has not learned enough for the target, as at smoke scale, is pushed to a third of what it can do.
    able = min(_able(model, task, prompts) for model in (untuned, *models))
    options: dict[str, Any] = {
        "prompts": prompts,
        "marks": [task.mark],
        "stop": task.questions.tolist(),
        "new_tokens": 6,
    }
    options |= {
        "calibrate": TARGET if able > 0.8 else able / 3,
        "samples": size.samples,
        "seed": drawn,
        "tolerance": 0.25,
    }
    plain, found, *others = (resistance(model, vectors, task.quality, **options) for model in (untuned, *models))

    pairs = task.pairs(seed=drawn, system=GOOD)
    kinds = ((pairs.prompts, pairs.fitting), (pairs.prompts, pairs.foreign))
    directions = mismatch_directions(models[0], WATCHED, *kinds)
    latents = mismatch_latents(models[0], "blocks.*.mlp.act", *kinds)

    def again(*arms: list[Clamp]) -> float:
        """Mean rate beside each of some sets of clamps, at the strengths found without them."""
        options["calibrate"] = found
        reports = (resistance(models[0], vectors, task.quality, beside=clamps, **options) for clamps in arms)
        return sum(report.multi_attempt[0] for report in reports) / len(arms)

    def at_answers(clamps: list[Clamp]) -> list[Clamp]:
        # The direction, and the place along it where fitting answers are, are those of states at answers.
        return [clamp.at(phase="generated") for clamp in clamps]

    figures = {
        "first_attempt": found.first[0],
        "multi_attempt": found.multi_attempt[0],
        "esr": found.esr[0],
        "improvement": found.improvement[0],
        "scale": float(found.table["scale"].mean()),
        "vectors_reached": float(found.table["reached"].sum()),
        "multi_attempt_held": again(at_answers(directions.ablate())),
        "mismatch_d": float(directions.table["d"].iloc[0]),
        "mismatch_auroc": float(directions.table["auroc"].iloc[0]),
        "mismatch_auroc_untuned": float(mismatch_directions(untuned, WATCHED, *kinds).table["auroc"].iloc[0]),
        "control_multi_attempt_untuned": plain.multi_attempt[0],
        "control_first_attempt_untuned": plain.first[0],
        "control_scale_untuned": float(plain.table["scale"].mean()),
        "control_multi_attempt_unsteered": found.control["multi_attempt"][0],
        "control_first_attempt_unsteered": found.control["first"][0],
        "control_multi_attempt_random_held": again(*map(at_answers, directions.random(size.draws, seed=drawn))),
    }
    for name, top in (("few_off", FEW), ("many_off", MANY)):
        figures[f"multi_attempt_{name}"] = again(latents.ablate(top))
        figures[f"control_multi_attempt_random_{name}"] = again(*latents.random(top, size.draws, seed=drawn))
    for share, report in zip(size.shares[1:], others, strict=True):
        figures[f"multi_attempt_at_share_{share:g}"] = report.multi_attempt[0]
        figures[f"esr_at_share_{share:g}"] = report.esr[0]
    return figures


def pushes(task: SelfCorrection, model: Model, count: int) -> tuple[list[Add], Tensor]:
    """Vectors towards contents of even number, and odd questions that none of these contents answers."""
    probe, content = task.world.probe(system=GOOD), task.contents()
    state = states(model, probe.prompts, PUSHED, batch_size=len(probe.prompts))[PUSHED]
    known = [c for c in range(0, task.world.contents, 2) if bool((content == c).any())][:count]
    vectors = [Add(PUSHED, state[content == c].mean(0) - state.mean(0)) for c in known]
    odd = torch.arange(len(content)) % 2 == 1
    return vectors, probe.prompts[odd & ~torch.isin(content, torch.tensor(known))]


def tuned(task: SelfCorrection, model: Model, steps: int, share: float, data: int, order: int) -> Model:
    """A copy that was tuned on self-corrections."""
    text = task.documents(steps * 64, 2, data, share=share)
    module = copy.deepcopy(model.module)
    train(module, (text.tokens, text.targets), batch_size=64, lr=3e-3, seed=order)
    return wrap(module)


def _able(model: Model, task: SelfCorrection, prompts: Tensor) -> float:
    """Expected score of answers without steering: the mean probability of the right word."""
    probe = task.world.probe(system=GOOD)
    right = dict(zip(probe.prompts[:, 1].tolist(), probe.good.tolist(), strict=True))
    words = torch.tensor([right[question] for question in prompts[:, 1].tolist()])
    p = model.logits(prompts)[:, -1].softmax(-1)
    return float(p[torch.arange(len(words)), words].mean())


ENTRY = Entry(
    number=182,
    slug="endogenous-steering-resistance",
    title="Endogenous Resistance to Activation Steering in Language Models",
    kind="phenomenon",
    home="actome.steer.resistance",
    claim="Tuned on self-corrections a model that is steered off its answers, at strengths that leave first attempts a "
    "score of 0.5, takes back at least 0.3 of them and does better then; untuned under 0.05 are taken back, and tuned "
    "without steering under 0.05. Holding the direction of mismatch lowers the rate by 25 %, random directions by less "
    "than 10 %; the same for the 20 MLP neurons that tell mismatches best.",
    test=test,
    takes={"smoke": "seconds", "small": "about two minutes"},
    open="That it comes about without tuning, in large models; prompts that ask for self-monitoring; latents of a "
    "sparse autoencoder, which `mismatch_latents` takes as a function.",
)
