"""[109] Analyzing Fine-tuning Representation Shift for Multimodal LLMs Steering.

The paper decomposes the states of a multimodal model into concepts, before and after fine-tuning, and finds that adding
to each concept the mean change of its samples brings it close to a concept of the tuned model, the more so the more
alike these changes are; and that differences of mean states steer answers.

Tested on pictures of objects. A small transformer learns to name objects in captions and to answer for colours and
places; copies are tuned on captions that begin with the first object's colour, or with the place. States are those
after which a caption begins. Shifts come from one half of the pictures, the tuned model's own concepts from the other.
Control: each concept with the shift of another.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from actome.core.clamp import Clamp
from actome.core.load import wrap
from actome.core.model import Model
from actome.papers.registry import Entry, Scale
from actome.shift import ConceptShift, coarse
from actome.tasks import Subject, SubjectConfig, train
from actome.tasks.caption_grid import About, CaptionGrid, Pictures, Told
from actome.tasks.trials import over_seeds, spearman, trial_seeds

BATCH, LAYERS, CONCEPTS = 64, 2, 20
SITE = f"blocks.{LAYERS - 1}.resid.post"
TUNED: tuple[About, ...] = ("colours", "places")
STRENGTHS = tuple(0.5 + 0.05 * step for step in range(16))
PERMUTATIONS = 8


def test(seed: int, scale: Scale) -> tuple[dict[str, Any], dict[str, Any], dict[str, bool]]:
    count, steps, tuning, pictures, every = (1, 80, 20, 200, 5) if scale == "smoke" else (3, 800, 150, 3000, 1)
    seeds = over_seeds(lambda one: _trial(one, steps, tuning, pictures, every), seed, count)
    # Where every concept gains as much there is no rank correlation; such a tuning counts in no mean.
    mean = {name: float(np.nanmean(values)) if np.isfinite(values).any() else 0.0 for name, values in seeds.items()}
    control = {name: mean.pop(name) for name in list(mean) if name.startswith(("permuted", "common"))}
    gain = float(np.mean([mean[f"overlap_{about}"] - mean[f"unshifted_{about}"] for about in TUNED]))
    without = float(np.mean([control[f"permuted_{about}"] - mean[f"unshifted_{about}"] for about in TUNED]))
    associated = float(np.mean([mean[f"spearman_{about}"] for about in TUNED]))
    figures = {"gain": gain, "spearman": associated} | mean
    figures["seeds"] = {name: values for name, values in seeds.items() if name not in control}
    control["gain_permuted"] = without
    checks = {
        "shifted concepts share their top word with their match more often than unshifted ones, by 0.15": gain >= 0.15,
        "the shifts of other concepts gain less than 0.15": without < 0.15,
        "concepts whose samples move alike gain more, Spearman above 0": associated > 0,
        "a coarse vector raises the rate of the target answer by 0.4": mean["steered_gain"] >= 0.4,
        "other answers lose less than 0.05 of accuracy to it": mean["steered_loss"] < 0.05,
    }
    return figures, control, checks


def _trial(seed: int, steps: int, tuning: int, count: int, every: int) -> dict[str, float]:
    data, told, init, shown, chosen, judged = (one % 2**31 for one in trial_seeds(seed, 6))
    strengths = STRENGTHS[::every]
    world = CaptionGrid(places=6, colours=8, seed=seed % 2**31)
    config = SubjectConfig(vocab=world.vocab, d_model=64, layers=LAYERS, heads=4, context=16)
    base = Subject.fresh(config, seed=init)
    train(base, world.stream(steps * BATCH, data), batch_size=BATCH, seed=data)
    model = wrap(base)
    pictures = world.pictures(count, shown)
    captions = world.caption(pictures)
    states = _states(model, captions)
    figures = {"accuracy_captions": _share(model, captions, captions.first)}
    for about in TUNED:
        tuned = copy.deepcopy(base)
        train(tuned, world.stream(tuning * BATCH, told, about), batch_size=BATCH, lr=1e-3, seed=told)
        after, wanted = wrap(tuned), world.caption(pictures, about)
        figures[f"accuracy_{about}"] = _share(after, wanted, wanted.first)
        figures |= {f"{name}_{about}": value for name, value in _shifted(tuned, states, _states(after, wanted)).items()}
    return figures | _steered(
        world, model, pictures, world.pictures(count, chosen), world.pictures(count, judged), strengths
    )


def _shifted(tuned: nn.Module, base_states: Tensor, tuned_states: Tensor) -> dict[str, float]:
    """Overlap of concepts with their match in the tuned model, with their shift, without it, and with others'."""

    def words(vectors: Tensor) -> Tensor:
        return tuned.unembed(tuned.norm(vectors))  # type: ignore[operator]

    found = ConceptShift(k=CONCEPTS, top=1).fit(base_states, tuned_states, words)
    same = found.overlap(found.concepts_, found.match_)
    others = [found.overlap(found.permuted(one), found.match_).mean() for one in range(PERMUTATIONS)]
    common = found.concepts_ + found.shifts_.mean(0)
    five = ConceptShift(k=CONCEPTS, top=5).fit(base_states, tuned_states, words)
    return {
        "overlap": float(found.overlap_.mean()),
        "unshifted": float(same.mean()),
        "unshifted_own_match": float(found.overlap(found.concepts_).mean()),
        "spearman": spearman(found.consistency_, found.overlap_ - same),
        "consistency": float(found.consistency_.nanmean()),
        "permuted": float(torch.stack(others).mean()),
        "common": float(found.overlap(common, found.match_).mean()),
        "overlap_top5": float(five.overlap_.mean()),
        "unshifted_top5": float(five.overlap(five.concepts_, five.match_).mean()),
        "permuted_top5": float(five.overlap(five.permuted(), five.match_).mean()),
    }


def _steered(
    world: CaptionGrid,
    model: Model,
    fit: Pictures,
    chosen: Pictures,
    judged: Pictures,
    strengths: Sequence[float],
) -> dict[str, float]:
    """What coarse vectors towards each colour do to questions for colours, and to others.

    The strength of each is the largest at which other answers lose less than 0.05, on pictures used for nothing else.
    """
    asked = world.question(fit)
    states = _states(model, asked)

    def steered(pictures: Pictures) -> Callable[[Clamp, Tensor], tuple[float, float]]:
        """How much a clamp adds to the rate of a target, and what others lose, on these pictures."""
        question, others = world.question(pictures), (world.where(pictures), world.caption(pictures))
        usual = sum(_share(model, told, told.first) for told in others) / 2
        before = _words(model, question)

        def effect(clamp: Clamp, target: Tensor) -> tuple[float, float]:
            with model.clamp(clamp):
                gain = _share(model, question, target) - float((before == target).double().mean())
                return gain, usual - sum(_share(model, told, told.first) for told in others) / 2

        return effect

    choose = steered(Pictures(*(field[: min(len(field) // 4, 200)] for field in chosen)))
    judge = steered(Pictures(*(field[:500] for field in judged)))
    found = []
    for target in world.colour_word(torch.arange(world.colours)):
        clamp = coarse(SITE, states, asked.first == target)
        strength = min(strengths)
        for one in strengths:
            if choose(clamp.at(scale=one), target)[1] >= 0.05:
                break
            strength = one
        found.append((strength, *judge(clamp.at(scale=strength), target)))
    strength, gain, loss = (sum(values) / len(values) for values in zip(*found, strict=True))
    return {"strength": strength, "steered_gain": gain, "steered_loss": loss}


def _states(model: Model, told: Told) -> Tensor:
    return model.record(told.prompts, SITE, positions=-1)[SITE][:, 0]


@torch.no_grad()
def _words(model: Model, told: Told) -> Tensor:
    return model.logits(told.prompts)[:, -1].argmax(-1)


def _share(model: Model, told: Told, words: Tensor) -> float:
    """How often the first word of the answer is this one."""
    return float((_words(model, told) == words).double().mean())


ENTRY = Entry(
    number=109,
    slug="concept-shift-vectors",
    title="Analyzing Fine-tuning Representation Shift for Multimodal LLMs Steering alignment",
    kind="method",
    home="actome.shift.ConceptShift",
    claim="Concepts of a base model, moved by the mean change of their samples, share their top word with their match "
    "among the tuned model's concepts more often than before by at least 0.15, more so where changes are consistent, "
    "while the shifts of other concepts gain less than that; a coarse vector raises the rate of a target answer by at "
    "least 0.4 and costs other answers less than 0.05 of accuracy.",
    test=test,
    takes={"smoke": "seconds", "small": "about a minute and a half"},
    open="Multimodal models of real size; fine vectors between concepts as a steering result; captions steered as a "
    "whole.",
)
