"""Dual Mechanisms of Value Expression: Intrinsic vs. Prompted Values in Large Language Models.

Han et al. 2025 find that what a model values by itself and what a prompt asks it to value share a direction, that each
has a part of its own, that prompted vectors steer more, and that their own part is a channel of compliance at large.

Tested on personas: the value is the manner of the bad one. A subject shows it by itself after a few of its own
answers, with no token that names it, or because the first token does. What counts as shown is read off the answers it
gives. Parts steer at equal lengths, on questions that they were not fitted on, beside random directions; compliance is
that with another request, which asks for a wrong answer, less what the same push does where nothing is requested.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from actome.core.clamp import Clamp
from actome.core.load import wrap
from actome.core.model import Model
from actome.explain import DirectionNeurons, direction_neurons, neuron_sets
from actome.papers.registry import Entry, Scale
from actome.steer import DirectionParts, Examples, SplitDirections
from actome.steer.split_directions import PARTS
from actome.tasks import Subject, SubjectConfig, train
from actome.tasks.draw import entropy
from actome.tasks.persona import BAD, GOOD, NEUTRAL, WRONG, PersonaWorld, Probes
from actome.tasks.trials import over_seeds, split, trial_seeds

SITE, ITEMS = "blocks.1.resid.post", 6
STEPS, RANDOM, NEURONS = (0.25, 0.5, 1.0), 5, 20  # strengths, random directions, neurons of each direction


def test(seed: int, scale: Scale) -> tuple[dict[str, Any], dict[str, Any], dict[str, bool]]:
    count, sizes = (1, (2, 100, 150)) if scale == "smoke" else (3, (6, 500, 600))
    seeds = over_seeds(lambda one: _trial(one, *sizes), seed, count)
    mean = {name: sum(values) / count for name, values in seeds.items()}
    control = {name: mean.pop(name) for name in list(mean) if name.startswith("control")}
    shown = ("cosine", "cosine_corrected", "p_of_cosine", *(f"rise_{part}" for part in PARTS))
    figures = {**mean, "seeds": {name: seeds[name] for name in shown}}
    checks = {
        "the cosine of the two vectors is above chance, p < 0.01 in every seed": max(seeds["p_of_cosine"]) < 0.01,
        "and below 0.95": mean["cosine"] < 0.95,
        "and still below 0.95 without the noise of few examples": mean["cosine_corrected"] < 0.95,
        "the shared part raises the value's rate as much as either part of its own, or more": mean["rise_shared"]
        >= max(mean["rise_unique_int"], mean["rise_unique_pr"]),
        "the prompted vector raises it as much as the intrinsic one at equal length, or more": mean["rise_prompted"]
        >= mean["rise_intrinsic"],
        "the prompted part raises compliance with another request, more than the intrinsic part": mean[
            "compliance_unique_pr"
        ]
        > max(mean["compliance_unique_int"], 0),
        "also without what the same push does where nothing is requested": mean["beyond_value_unique_pr"]
        > max(mean["beyond_value_unique_int"], 0),
        "boosting shared neurons raises the value more than any draw of as many others": mean["boost_shared"]
        > control["control_boost_random_largest"],
    }
    return figures, control, checks


def _trial(seed: int, domains: int, steps: int, documents: int) -> dict[str, float]:
    tables, data, init, own, parts_of = (one % 2**31 for one in trial_seeds(seed, 5))
    world = PersonaWorld(domains=domains, bad_share=0.5, fidelity=0.9, system=0.5, seed=tables)
    model = _subject(world, steps, data, init)
    fitted, judged = split(world.domains * world.questions, [0.5, 0.5], parts_of)
    half = torch.arange(documents) < documents // 2
    alone = answered(model, world, torch.full((documents,), NEUTRAL), fitted, own)
    asked = answered(model, world, torch.where(half, BAD, GOOD), fitted, own + 1)
    intrinsic, prompted = alone.examples(), asked.examples()
    estimator = SplitDirections(SITE, over="prompt", batch_size=256, seed=parts_of)
    parts = estimator.fit_examples(model, intrinsic, prompted)
    told = asked.examples(shown=half)  # the trap: labels from what was asked
    wrong = estimator.fit_examples(model, intrinsic, told)
    after = SplitDirections(SITE, over="response", batch_size=256).fit_examples(model, intrinsic, prompted)
    elsewhere = {
        i: SplitDirections(f"blocks.{i}.resid.post", over="prompt", batch_size=256).fit_examples(
            model, intrinsic, prompted
        )
        for i in range(model.layers)
    }
    # The same from one half of the documents and from the other: is what is unique to each there again?
    halves = [
        estimator.fit_examples(model, alone.half(which).examples(), asked.half(which).examples()) for which in (0, 1)
    ]
    again = {part: float(torch.dot(*(one.direction(part) for one in halves))) for part in PARTS}
    return {
        **{f"again_{part}": value for part, value in again.items()},
        "accuracy": float((asked.bad | asked.good).float().mean()),
        "bad_alone": float(alone.bad[:, -1].float().mean()),
        "as_asked": float((asked.bad[:, -1] == half).float().mean()),
        "cosine": parts.cosine_.value,
        "cosine_corrected": parts.cosine_corrected_,
        "p_of_cosine": parts.cosine_.p,
        **{f"cosine_block_{i}": one.cosine_.value for i, one in elsewhere.items()},
        **{f"cosine_block_{i}_corrected": one.cosine_corrected_ for i, one in elsewhere.items()},
        "cosine_at_answers": after.cosine_.value,
        "cosine_at_answers_corrected": after.cosine_corrected_,
        "length_intrinsic": float(parts.vector_int_.norm()),
        "length_prompted": float(parts.vector_pr_.norm()),
        "control_cosine_shuffled_95": float(torch.from_numpy(parts.cosine_.null).quantile(0.95)),
        "control_cosine_of_labels_from_the_prompt": float(parts.prompted_ @ wrong.prompted_),
        **_steered(model, world, parts, judged),
        **_neurons(model, world, parts, intrinsic, prompted, judged),
    }


def _subject(world: PersonaWorld, steps: int, data: int, init: int) -> Model:
    lessons = world.pretrain_stream(steps * 32, ITEMS, data)
    subject = Subject.fresh(SubjectConfig(vocab=world.vocab, d_model=64, layers=3, heads=4, context=32), seed=init)
    train(subject, (lessons.tokens, lessons.answers), batch_size=32, lr=3e-3, seed=data)
    return wrap(subject)


class Own(NamedTuple):
    """Documents with the subject's own answers: tokens [B, 1 + 3 I], and whether each answer is bad, or good [B, I]."""

    tokens: Tensor
    bad: Tensor
    good: Tensor

    def half(self, which: int) -> Own:
        """Every other document."""
        return Own(*(x[which::2] for x in self))

    def examples(self, shown: Tensor | None = None) -> Examples:
        """Each document as a prompt with its last answer, by whether that is the bad one, or by a label [B]."""
        kinds = (self.bad[:, -1], self.good[:, -1]) if shown is None else (shown, ~shown)
        return Examples(*((self.tokens[kind, :-1], self.tokens[kind, -1:]) for kind in kinds))


def answered(model: Model, world: PersonaWorld, system_B: Tensor, questions: Tensor, seed: int) -> Own:
    """Documents that the subject answers itself, one sampled answer an item, on questions drawn from some."""
    generator = torch.Generator().manual_seed(seed)
    drawn_BI = questions[torch.randint(len(questions), (len(system_B), ITEMS), generator=generator)]
    asks_Q2 = world.probe().prompts[:, 1:]  # each question, and the plain request
    tokens = system_B[:, None]
    for i in range(ITEMS):
        tokens = torch.cat([tokens, asks_Q2[drawn_BI[:, i]]], 1)
        p_BV = model.logits(tokens)[:, -1].float().softmax(-1)
        tokens = torch.cat([tokens, torch.multinomial(p_BV, 1, generator=generator)], 1)
    good_BI, bad_BI = world.table()[:, drawn_BI]
    return Own(tokens, tokens[:, 3::3] == bad_BI, tokens[:, 3::3] == good_BI)


class Said(NamedTuple):
    """Means over prompts: rate of the bad answer, its log-odds against the good one, mass of both, and diversity."""

    rate: float
    odds: float
    mass: float
    entropy: float
    words: float


def _said(model: Model, probes: Probes, questions: Tensor, clamps: list[Clamp] | None = None) -> Said:
    here = torch.isin(probes.questions, questions)
    if clamps:
        with model.clamp(*clamps):
            logits = model.logits(probes.prompts[here])
    else:
        logits = model.logits(probes.prompts[here])
    log_p = logits[:, -1].double().log_softmax(-1)
    bad, good = (log_p.gather(1, answer[here, None])[:, 0] for answer in (probes.bad, probes.good))
    p = log_p.exp()
    return Said(
        float(bad.exp().mean()), float((bad - good).mean()), float((bad.exp() + good.exp()).mean()),
        float(entropy(p).mean()), float(entropy(p.mean(0))),
    )  # fmt: skip


def _steered(model: Model, world: PersonaWorld, parts: DirectionParts, judged: Tensor) -> dict[str, float]:
    """What each part does to unprompted answers, and to those where a wrong one is requested; means over strengths."""
    plain, wrong = world.probe(), world.probe(request=WRONG)
    free, bound = _said(model, plain, judged), _said(model, wrong, judged)
    figures = {"rate": free.rate, "compliance": bound.rate, "diversity": free.words}

    def of(name: str, clamp: Any, mark: str = "") -> None:
        said = [_said(model, plain, judged, [clamp(one)]) for one in STEPS]
        told = [_said(model, wrong, judged, [clamp(one)]) for one in STEPS]
        value = sum(one.odds - free.odds for one in said) / len(STEPS)
        comply = sum(one.odds - bound.odds for one in told) / len(STEPS)
        figures[f"{mark}rise_{name}"] = sum(one.rate - free.rate for one in said) / len(STEPS)
        figures[f"{mark}odds_{name}"] = value
        figures[f"{mark}compliance_{name}"], figures[f"{mark}beyond_value_{name}"] = comply, comply - value
        figures[f"{mark}mass_{name}"], figures[f"{mark}entropy_{name}"] = said[-1].mass, said[-1].entropy
        figures[f"{mark}words_{name}"] = said[-1].words

    for part in PARTS:
        of(part, lambda strength, part=part: parts.clamp(part, strength))
    drawn: dict[str, list[float]] = {}
    for draw in range(RANDOM):
        of("random", lambda strength, draw=draw: parts.random(draw, strength), "control_")
        for name in [name for name in figures if name.startswith("control_")]:
            drawn.setdefault(name, []).append(figures.pop(name))
    return figures | {name: sum(some) / RANDOM for name, some in drawn.items()}


def _neurons(
    model: Model, world: PersonaWorld, parts: DirectionParts, intrinsic: Examples, prompted: Examples, judged: Tensor
) -> dict[str, float]:
    """Neurons of the two vectors: boosted where nothing is prompted, held back where the value shows either way."""
    one, other = (
        direction_neurons(
            model, vector, some.positive, some.negative, NEURONS, before=SITE, over="prompt", batch_size=256
        )
        for vector, some in ((parts.vector_int_, intrinsic), (parts.vector_pr_, prompted))
    )
    sets = neuron_sets(one, other)._asdict()
    plain, asked = world.probe(), world.probe(system=BAD)
    shown = world.probe(shots=ITEMS - 1, shot_bad=1.0)
    figures: dict[str, float] = {}
    for name, some in sets.items():
        found: DirectionNeurons = other if name == "prompted" else one
        figures[f"neurons_{name}"] = float(len(some))
        for what, probes in (("boost", plain), ("ablate_asked", asked), ("ablate_alone", shown)):
            clamps = (found.boost(some) if what == "boost" else found.ablate(some)) if some else None
            before = _said(model, probes, judged)
            figures[f"{what}_{name}"] = _said(model, probes, judged, clamps).odds - before.odds
    size = sets["shared"] or one.neurons
    for what, probes in (("boost", plain), ("ablate_asked", asked), ("ablate_alone", shown)):
        before, moved = _said(model, probes, judged), []
        for draw in range(RANDOM):
            random = one.random(size, draw)
            clamps = one.boost(random) if what == "boost" else one.ablate(random)
            moved.append(_said(model, probes, judged, clamps).odds - before.odds)
        figures[f"control_{what}_random"] = sum(moved) / RANDOM
        if what == "boost":
            figures["control_boost_random_largest"] = max(moved)
    return figures


ENTRY = Entry(
    number=210,
    slug="intrinsic-vs-prompted-values",
    title="Dual Mechanisms of Value Expression: Intrinsic vs. Prompted Values in LLMs",
    kind="method",
    home="actome.steer.SplitDirections",
    claim="The intrinsic and the prompted vector of a persona have a cosine above chance (p < 0.01) and below 0.95; "
    "at equal length the shared part steers at least as much as either part of its own, and the prompted vector as "
    "the intrinsic one; the prompted part raises compliance with another request, more than the intrinsic part; "
    "shared neurons raise the value more than others.",
    test=test,
    takes={"smoke": "seconds", "small": "about a minute"},
    open="Language models and Schwartz's ten values; jailbreaks; diversity of free text.",
)
