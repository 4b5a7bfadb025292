"""[152] Controllable Context Sensitivity and the Knob Behind It.

The paper finds a subspace of one dimension, in one layer, that decides whether a model answers from its context or from
what it knows; setting the coordinate along it to a constant turns a model to either side, models that were not tuned
for it among them.

Tested on facts that contexts contradict. A small transformer learns the facts and to follow some sources of contexts
more often than others; a copy is tuned to obey an intent in the prompt, on part of the facts. On these the layers that
carry the intent are searched and the direction is fitted. Everything is judged on the other facts, with the intent left
open, on the tuned model and on the one before tuning; control: random directions with constants found the same way.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from actome.clamps import SetCoordinate
from actome.core.load import wrap
from actome.core.model import Model
from actome.explain import layer_range_search
from actome.papers.registry import Entry, Scale
from actome.steer import RankOneDAS, RankOneSubspace
from actome.tasks import Subject, SubjectConfig, train
from actome.tasks.fact_table import Documents, FactTable, Intent
from actome.tasks.trials import over_seeds, split, trial_seeds

LAYERS, BATCH = 2, 64
PAIRS, JUDGED = 1024, 512
WAYS = (0.25, 0.5, 0.75, 1.0)  # from a relative's own mean coordinate to the tuned model's constant
RANDOM = 4  # directions of the control
OTHER: dict[Intent, Intent] = {"context": "prior", "prior": "context"}


def test(seed: int, scale: Scale) -> tuple[dict[str, Any], dict[str, Any], dict[str, bool]]:
    count, steps, tuning = (1, 60, 30) if scale == "smoke" else (3, 1200, 600)
    seeds = over_seeds(lambda one: _trial(one, steps, tuning), seed, count)
    mean = {name: sum(values) / count for name, values in seeds.items()}
    control = {name: mean.pop(name) for name in list(mean) if name.startswith("random")}
    figures = {**mean, "seeds": {name: values for name, values in seeds.items() if name not in control}}
    checks = {
        "with the knob and no intent the tuned model answers by context, 0.8": mean["knob_context"] >= 0.8,
        "with the knob and no intent the tuned model answers by prior, 0.8": mean["knob_prior"] >= 0.8,
        "random directions bring at most 0.1 to either side": all(
            control[f"random_{intent}"] <= mean[f"open_{intent}"] + 0.1 for intent in OTHER
        ),
        "the same direction moves the model before tuning, 0.2 to each side": all(
            mean[f"before_direction_{intent}"] >= mean[f"before_open_{intent}"] + 0.2 for intent in OTHER
        ),
    }
    return figures, control, checks


def _trial(seed: int, steps: int, tuning: int) -> dict[str, float]:
    data, told, pairing, asked, other, init = (one % 2**31 for one in trial_seeds(seed, 6))
    world = FactTable(relations=1, entities=100, seed=seed % 2**31)
    seen, unseen = split(world.facts, [0.6, 0.4], seed % 2**31)
    base, tuned = subjects(world, seen, steps, tuning, (init, data, told))
    before, after = wrap(base), wrap(tuned)
    judged = world.probe(JUDGED, asked, facts=unseen)

    pairs = answered_right(after, world.probe(PAIRS, pairing, facts=seen))
    inputs, sources, labels, answers, intents = swapped(pairs)
    found = layer_range_search(after, inputs, sources, labels, source_answers=answers)
    # Of the layers of the range the one whose knob does best on facts that tuning saw.
    fitted = [
        RankOneDAS(site, epochs=10, lr=5e-2, seed=other).fit(after, inputs, sources, labels, intents=intents)
        for site in found.sites[found.start : found.end + 1]
    ]
    known = world.probe(JUDGED, other, facts=seen)
    knob = max(fitted, key=lambda one: sum(_turned(after, one, known, intent) for intent in OTHER))

    figures = {"range_start": float(found.start), "range_end": float(found.end), "range_flipped": found.rate}
    figures["layer"] = float(found.sites.index(knob.site))
    for intent in OTHER:
        figures[f"told_{intent}"] = _share(after, judged.ask(intent), judged.wanted(intent))
        figures[f"open_{intent}"] = _share(after, judged.prompts, judged.wanted(intent))
        figures[f"before_open_{intent}"] = _share(before, judged.prompts, judged.wanted(intent))
        figures[f"knob_{intent}"] = _turned(after, knob, judged, intent)
        figures[f"before_knob_{intent}"] = _turned(before, knob, judged, intent)
        chosen = _constant(before, knob, known, intent)
        with before.clamp(chosen):
            figures[f"before_direction_{intent}"] = _share(before, judged.prompts, judged.wanted(intent))
        figures[f"random_{intent}"] = _random(after, after, knob, pairs, judged, intent, other)
        figures[f"random_before_{intent}"] = _random(before, after, knob, pairs, judged, intent, other)
    figures |= _swaps(after, knob, answered_right(after, judged))
    for name, model in (("", after), ("before_", before)):
        by = _answers(model, judged.prompts) == judged.by_context
        kinds = ["context" if one else "prior" for one in by.tolist()]
        figures[f"{name}separation_of_answers"] = knob.separation(model, judged.prompts, kinds)
    told_apart = torch.cat([judged.ask(intent) for intent in OTHER])
    kinds = [intent for intent in OTHER for _ in range(JUDGED)]
    return figures | {"separation_of_intents": knob.separation(after, told_apart, kinds)}


def _swaps(model: Model, knob: RankOneSubspace, judged: Documents) -> dict[str, float]:
    """The share that gives its other answer with the coordinate of a source that has the other intent, by that."""
    inputs, sources, labels, _, intents = swapped(judged)
    with model.clamp(SetCoordinate(knob.site, knob.unit, knob.coordinates(model, sources)[:, None], positions=-1)):
        right = _answers(model, inputs) == labels
    rows = {intent: torch.tensor([one == intent for one in intents]) for intent in OTHER}
    return {f"swap_to_{intent}": float(right[row].double().mean()) for intent, row in rows.items()}


def subjects(
    world: FactTable, seen: Tensor, steps: int, tuning: int, seeds: tuple[int, int, int]
) -> tuple[nn.Module, nn.Module]:
    """The model that knows the facts, and a copy that obeys the intent; half of its tuning rehearses pretraining."""
    init, data, told = seeds
    config = SubjectConfig(vocab=world.vocab, d_model=64, layers=LAYERS, heads=4, context=16)
    base = Subject.fresh(config, seed=init)
    text = world.pretrain_stream(steps * BATCH, data)
    train(base, (text.tokens, text.answers), batch_size=BATCH, seed=data)
    half = tuning * BATCH // 2
    new, old = world.tune_stream(half, told, facts=seen), world.pretrain_stream(half, told + 1)
    mixed = torch.stack([new.tokens, old.tokens], 1).flatten(0, 1)
    tuned = copy.deepcopy(base)
    train(tuned, (mixed, torch.cat([new.answers, old.answers])), batch_size=BATCH, seed=told)
    return base, tuned


def answered_right(model: Model, asked: Documents) -> Documents:
    """Those documents whose prompts are answered right under both intents; all of them where hardly any is."""
    right = [_answers(model, asked.ask(intent)) == asked.wanted(intent) for intent in OTHER]
    rows = (right[0] & right[1]).nonzero().flatten()
    rows = rows if len(rows) >= 16 else torch.arange(len(asked.facts))
    return Documents(*(field[rows] for field in asked))


def swapped(asked: Documents) -> tuple[Tensor, Tensor, Tensor, Tensor, list[str]]:
    """Base inputs, sources with the other intent about another fact, labels, the sources' answers, their intents."""
    half = len(asked.facts) // 2
    inputs, sources, labels, answers, intents = [], [], [], [], []
    for intent, wanted in OTHER.items():
        label, answer = asked.wanted(wanted)[:half], asked.wanted(wanted)[half : 2 * half]
        keep = (label != answer) & (asked.facts[:half] != asked.facts[half : 2 * half])
        inputs.append(asked.ask(intent)[:half][keep])
        sources.append(asked.ask(wanted)[half : 2 * half][keep])
        labels.append(label[keep])
        answers.append(answer[keep])
        intents += [wanted] * int(keep.sum())
    return torch.cat(inputs), torch.cat(sources), torch.cat(labels), torch.cat(answers), intents


def _turned(model: Model, knob: RankOneSubspace, asked: Documents, intent: Intent) -> float:
    """The share answered by an intent that only the knob tells."""
    with model.clamp(knob.knob(intent)):
        return _share(model, asked.prompts, asked.wanted(intent))


def _constant(model: Model, knob: RankOneSubspace, known: Documents, intent: Intent) -> SetCoordinate:
    """For a relative of the model, the constant that does best on known facts: on the way from its own mean."""
    mean = float(knob.coordinates(model, known.prompts).mean())

    def share(clamp: SetCoordinate) -> float:
        with model.clamp(clamp):
            return _share(model, known.prompts, known.wanted(intent))

    values = [mean + way * (knob.means[intent] - mean) for way in WAYS]
    return max((SetCoordinate(knob.site, knob.unit, value, positions=-1) for value in values), key=share)


def _random(
    model: Model, told: Model, knob: RankOneSubspace, pairs: Documents, judged: Documents, intent: Intent, seed: int
) -> float:
    """The share answered by an intent with random directions in the place of the fitted one, the mean over some."""
    states = told.record(pairs.ask(intent), knob.site, positions=-1)[knob.site][:, 0]
    generator = torch.Generator().manual_seed(seed)
    shares = []
    for _ in range(RANDOM):
        unit = nn.functional.normalize(torch.randn(len(knob.unit), generator=generator), dim=0)
        with model.clamp(SetCoordinate(knob.site, unit, float((states @ unit).mean()), positions=-1)):
            shares.append(_share(model, judged.prompts, judged.wanted(intent)))
    return sum(shares) / RANDOM


@torch.no_grad()
def _answers(model: Model, prompts: Tensor) -> Tensor:
    return model.logits(prompts)[:, -1].argmax(-1)


def _share(model: Model, prompts: Tensor, wanted: Tensor) -> float:
    return float((_answers(model, prompts) == wanted).double().mean())


ENTRY = Entry(
    number=152,
    slug="context-sensitivity-knob",
    title="Controllable Context Sensitivity and the Knob Behind It",
    kind="method",
    home="actome.steer.RankOneDAS",
    claim="One direction in one layer, set to a constant and with no intent in the prompt, makes a tuned model answer "
    "facts it was not tuned on by a contradicting context or by what it knows, at least 0.8 either way; random "
    "directions bring at most 0.1; the same direction moves the model before tuning by at least 0.2 to each side.",
    test=test,
    takes={"smoke": "seconds", "small": "about a minute and a half"},
    open="Models of the paper's size and natural facts; intents by examples instead of tuning; separation against "
    "accuracy over many models.",
)
