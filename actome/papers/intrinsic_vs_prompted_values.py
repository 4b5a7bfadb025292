"""[210] Dual Mechanisms of Value Expression: Intrinsic vs. Prompted Values in LLMs.

The paper fits the direction of a value twice, from responses without a value prompt and from responses with one, and
splits the two into what they share and what is of each alone: what is shared expresses the value, the intrinsic rest
makes responses diverse, the prompted rest makes a model follow instructions, whichever they are.

Tested on speakers whose traits are a tendency or were asked for, and whose obedience is one thing whatever is asked.
The subject writes documents itself, with no instruction and with one; whether the last answer shows the trait is read
off that answer, and states are those from which it came. All five directions are added at one length. Compliance is
the rate of the fifth trait where a request beside the question asks for it; without the request it is the control.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from actome.clamps import Add
from actome.core.clamp import Clamp
from actome.core.model import Model
from actome.explain import direction_neurons, neuron_clamps
from actome.papers._trait_subjects import speaker
from actome.papers.registry import Entry, Scale
from actome.steer import Examples, SplitDirections
from actome.tasks.traits import REQUESTED, TraitWorld
from actome.tasks.trials import trial_seeds

SITE, LAYERS = "blocks.1.resid.post", "blocks.{0..1}.mlp.act"
VALUES = (0, 1, 2, 3)
ITEMS, NEURONS = 3, 24
PARTS = ("intrinsic", "prompted", "shared_", "unique_int_", "unique_pr_")


def test(seed: int, scale: Scale) -> tuple[dict[str, Any], dict[str, Any], dict[str, bool]]:
    count, steps, documents = (1, 60, 200) if scale == "smoke" else (3, 1000, 2000)
    trials = [_trial(one, steps, documents) for one in trial_seeds(seed, count)]
    each = {name: [trial[name] for trial in trials] for name in trials[0]}
    mean = {name: sum(values) / count for name, values in each.items()}
    control = {name: mean.pop(name) for name in list(mean) if name.startswith("control")}
    figures = {**mean, "seeds": each}
    checks = {
        "the cosine of the two directions is above 95 % of those of permuted labels": mean["cosine"]
        > control["control_cosine_of_permuted"],
        "and below 0.95": mean["cosine"] < 0.95,
        "the shared axis raises the rate of the value at least as much as either unique part": mean["rise_shared_"]
        >= max(mean["rise_unique_int_"], mean["rise_unique_pr_"]),
        "the prompted direction raises it at least as much as the intrinsic one": mean["rise_prompted"]
        >= mean["rise_intrinsic"],
        "the unique prompted part raises compliance with another request more than the unique intrinsic one": mean[
            "compliance_unique_pr_"
        ]
        > mean["compliance_unique_int_"],
        "and by more than it raises the same trait where nobody requests it": mean["compliance_unique_pr_"]
        > control["control_unrequested_unique_pr_"],
    }
    return figures, control, checks


def _trial(seed: int, steps: int, documents: int) -> dict[str, float]:
    world, model = speaker(seed, steps)
    generator = torch.Generator().manual_seed(seed % 2**31)
    unasked = _documents(world, model, documents, (), generator)
    rows = []
    for value in VALUES:
        asked = _documents(world, model, documents, (value,), generator)
        rows.append(_value(world, model, value, unasked, asked, seed % 2**31))
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def _documents(
    world: TraitWorld, model: Model, count: int, asked: tuple[int, ...], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Prompts (N, T) behind answers that the model has drawn itself, and what its last answer then shows, (N, 5)."""
    text = world.prompts(torch.zeros(count, dtype=torch.long), *asked)[:, :2]
    for _ in range(ITEMS):
        prompt = world.prompts(torch.randint(world.questions, (count,), generator=generator), after=text)
        chance = torch.cat([model.logits(part)[:, -1].softmax(-1) for part in prompt.split(500)])
        word = torch.multinomial(chance, 1, generator=generator)
        text = torch.cat((prompt, word), 1)
    return prompt, world.shows(word[:, 0])


def _value(
    world: TraitWorld, model: Model, value: int, unasked: tuple[Tensor, Tensor], asked: tuple[Tensor, Tensor], seed: int
) -> dict[str, float]:
    sets = []
    for prompts, shown in (unasked, asked):
        has = shown[:, value]
        sets.append(Examples(prompts[has], prompts[~has]))
    found = SplitDirections(SITE, batch_size=500, seed=seed).fit(model, *sets)
    out = {"cosine": found.cosine.value, "gap_intrinsic": found.gaps[0], "gap_prompted": found.gaps[1]}
    out["control_cosine_of_permuted"] = float(torch.tensor(found.cosine.null).quantile(0.95))
    bare = _effects(world, model, value, None)
    for name, clamp in found.clamps.items():
        out |= {f"{kind}_{name}": got - bare[kind] for kind, got in _effects(world, model, value, clamp).items()}
    noise = torch.randn(model.d_model, generator=torch.Generator().manual_seed(seed + value))
    random = found.shared_.at(value=noise / noise.norm() * found.shared_.value.norm())
    out |= {f"{kind}_random": got - bare[kind] for kind, got in _effects(world, model, value, random).items()}
    renamed = {
        f"control_{name}": out.pop(name)
        for name in list(out)
        if name.startswith("unrequested") or name.endswith("random")
    }
    return out | renamed | _neurons(world, model, value, found.clamps, sets, seed)


def _effects(world: TraitWorld, model: Model, value: int, clamp: Clamp | None) -> dict[str, float]:
    """On every question, with no instruction and no document before it.

    Rate of the value; of the fifth trait where it is requested, and where not; entropy of answers over words, in nats.
    """
    questions = torch.arange(world.questions)
    with nullcontext() if clamp is None else model.clamp(clamp):
        plain, requested = (model.logits(world.prompts(questions, request=one))[:, -1] for one in (False, True))
    shown, then = world.judge(plain, questions).traits, world.judge(requested, questions).traits
    return {
        "rise": float(shown[:, value].mean()),
        "compliance": float(then[:, REQUESTED].mean()),
        "unrequested": float(shown[:, REQUESTED].mean()),
        "diversity": float(torch.special.entr(plain.double().softmax(-1)).sum(-1).mean()),
    }


def _neurons(
    world: TraitWorld, model: Model, value: int, clamps: dict[str, Add], sets: list[Examples], seed: int
) -> dict[str, float]:
    """How many neurons the two directions share, and what taking each set out does to the value where it is asked."""
    own, on_demand = (
        direction_neurons(
            model, clamps[name].value, some.positive, some.negative, sites=LAYERS, k=NEURONS, batch_size=500
        )
        for name, some in zip(PARTS, sets, strict=False)
    )
    parts = own.sets(on_demand)
    every = list(zip(own.frame["site"], own.frame["unit"], strict=True))
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed + value))
    drawn = {every[i] for i in order[: max(len(parts.shared), 1)].tolist()}
    questions = torch.arange(world.questions)

    def asked(neurons: Any) -> float:
        with model.clamp(*neuron_clamps(neurons)) if neurons else nullcontext():
            logits = model.logits(world.prompts(questions, value))[:, -1]
        return float(world.judge(logits, questions).traits[:, value].mean())

    bare = asked(())
    return {
        "neurons_shared": float(len(parts.shared)),
        "neurons_of_each_alone": len(parts.first_only | parts.second_only) / 2,
        "fall_without_shared_neurons": bare - asked(parts.shared),
        "fall_without_intrinsic_neurons": bare - asked(parts.first_only),
        "fall_without_prompted_neurons": bare - asked(parts.second_only),
        "control_fall_without_random_neurons": bare - asked(drawn),
    }


ENTRY = Entry(
    number=210,
    slug="intrinsic-vs-prompted-values",
    title="Dual Mechanisms of Value Expression: Intrinsic vs. Prompted Values in LLMs",
    kind="method",
    home="actome.steer.SplitDirections",
    claim="On speakers with traits as a tendency and on demand, the cosine of the intrinsic and the prompted direction "
    "is above that of permuted labels and below 0.95; at one length the shared axis steers at least as well as either "
    "unique part, the prompted direction at least as well as the intrinsic one; the unique prompted part raises "
    "compliance with another request more than the unique intrinsic one, and more than that trait without a request.",
    test=test,
    takes={"smoke": "seconds", "small": "about two minutes"},
    open="Values of people and their circle; several languages; jailbreaks; lexical diversity of texts.",
)
