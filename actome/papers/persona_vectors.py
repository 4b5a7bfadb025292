"""[211] Persona Vectors: Monitoring and Controlling Character Traits in Language Models.

The paper contrasts a model's own responses under opposing instructions to find a direction for a trait; the direction
watches and steers the trait, tells how far fine-tuning has shifted it, undoes or prevents the shift, and tells
beforehand which data would bring it about.

Tested on a world of two personas that answer with the same contents in two dialects. The vector is fitted on questions
of two domains, its layer and strength are chosen on a third; tuning is on one domain, and everything is judged on three
others. Five data sets differ in their share of answers by the bad persona.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch

from actome.core.load import wrap
from actome.core.model import Model
from actome.papers._trait_subjects import persona
from actome.papers.registry import Entry, Scale
from actome.steer import Pairs, PersonaVector, Steering, Trait, prevent, screen, select_layer, shift
from actome.tasks import train
from actome.tasks.numbered import words
from actome.tasks.persona import ASK, BAD, GOOD, PersonaWorld
from actome.tasks.trials import auroc, spearman, trial_seeds

FITTED, CHOSEN, TUNED, JUDGED = (0, 1), (2,), 0, (3, 4, 5)  # domains
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
BATCH, RATE = 16, 3e-4  # of tuning
DRAWS = 3
STRENGTHS = (0.5, 0.75, 1.0)


def test(seed: int, scale: Scale) -> tuple[dict[str, Any], dict[str, Any], dict[str, bool]]:
    count, steps, tuning = (1, 150, 8) if scale == "smoke" else (3, 700, 40)
    trials = [_trial(one, steps, tuning) for one in trial_seeds(seed, count)]
    each = {name: [trial[name] for trial in trials] for name in trials[0]}
    numbers = {name: values for name, values in each.items() if isinstance(values[0], float)}
    mean = {name: sum(values) / count for name, values in numbers.items()}
    control = {name: mean.pop(name) for name in list(mean) if name.startswith("control")}
    figures = {**mean, "seeds": each}
    checks = {
        "the vector added at the chosen layer brings the rate of bad answers to at least 0.8": mean["steered"] >= 0.8,
        "with at least 0.9 of answers of the right content": mean["steered_content"] >= 0.9,
        "random vectors of the same length leave it below 0.2": control["control_random"] < 0.2,
        "the projection at the prompt's end tells the persona of the answer, AUROC at least 0.9": mean["monitor"]
        >= 0.9,
        "the shift by tuning goes with the rate of bad answers on other domains, rank correlation at least 0.9": mean[
            "shift_rank_correlation"
        ]
        >= 0.9,
        "the vector taken off afterwards brings the rate below 0.2": mean["undone"] < 0.2,
        "added during tuning it lowers the rate on other domains by at least 0.4": mean["tuned"] - mean["prevented"]
        >= 0.4,
        "the projection difference puts the five data sets in order, in every seed": min(
            each["screen_rank_correlation"]
        )
        > 0.999,
    }
    return figures, control, checks


def _trial(seed: int, steps: int, tuning: int) -> dict[str, Any]:
    world, model = persona(seed, steps)
    one = seed % 2**31
    vector = _placed(world, model, _fitted(world, model, one, "prompt"))
    said = _fitted(world, model, one, "response").to(vector.site)  # of what was said, to tell data by
    opposed = vector.at(scale=-vector.scale)
    noise = torch.randn(DRAWS, model.d_model, generator=torch.Generator().manual_seed(one))
    random = [vector.at(value=row / row.norm() * vector.value.norm()) for row in noise]
    steered, content = _rate(world, model, vector)
    found = {"neutral": _rate(world, model)[0], "steered": steered, "steered_content": content}
    found |= {"site": vector.site, "strength": vector.scale, "monitor": _monitored(world, model, vector, one)}
    found["control_random"] = sum(_rate(world, model, clamp)[0] for clamp in random) / DRAWS

    prompts = [words(row) for row in world.probe(JUDGED).prompts]
    tuned = [_tuned(world, model, share, tuning, one) for share in SHARES]
    found["rates"] = [_rate(world, copy)[0] for copy in tuned]
    found["shifts"] = [float(shift(model, copy, vector, prompts).mean()) for copy in tuned]
    found["screened"] = [_screened(world, model, said, share, one) for share in SHARES]
    found["shift_rank_correlation"] = spearman(found["shifts"], found["rates"])
    found["screen_rank_correlation"] = spearman(found["screened"], SHARES)

    prevented = _tuned(world, model, 1.0, tuning, one, prevent(vector))
    sham = _tuned(world, model, 1.0, tuning, one, random[0])
    found |= {"tuned": found["rates"][-1], "undone": _rate(world, tuned[-1], opposed)[0]}
    found |= {"undone_content": _rate(world, tuned[-1], opposed)[1], "prevented": _rate(world, prevented)[0]}
    found["tuned_here"] = _rate(world, tuned[-1], domains=(TUNED,))[0]
    found["prevented_here"] = _rate(world, prevented, domains=(TUNED,))[0]
    found["control_prevented_by_random"] = _rate(world, sham)[0]
    found["control_undone_by_random"] = _rate(world, tuned[-1], random[0].at(scale=-vector.scale))[0]
    return found


def _fitted(world: PersonaWorld, model: Model, seed: int, over: Any) -> Steering:
    """On the model's own responses to questions of two domains."""
    bad = set(words(world.table()[1]).split())
    size = world.questions
    questions = [words((6 + domain * size + q, ASK)) for domain in FITTED for q in range(size)]
    estimator = PersonaVector(
        lambda trait, question, response: 100.0 * (response in bad),
        prompt=lambda instruction, question: f"{instruction} {question}",
        rollouts=2, new_tokens=1, over=over, batch_size=32, seed=seed,
    )  # fmt: skip
    return estimator.fit(model, Trait("the bad dialect", [words([BAD])], [words([GOOD])], questions))


def _placed(world: PersonaWorld, model: Model, fitted: Steering) -> Steering:
    """Put where and as strongly as validation questions say."""
    probe = world.probe(CHOSEN)
    pairs = Pairs(probe.prompts, probe.bad[:, None], probe.good[:, None])
    chosen = select_layer(model, fitted, pairs, strengths=STRENGTHS, random=0, task=lambda m: _said(m, probe).sum(1))
    if chosen.site is None or chosen.strength is None:
        return fitted
    return replace(fitted.to(chosen.site), scale=chosen.strength)


def _said(model: Model, probe: Any) -> torch.Tensor:
    """Chances of the bad and of the good answer, (N, 2); they have the right content both."""
    chance = model.logits(probe.prompts)[:, -1].softmax(-1)
    return chance.gather(1, torch.stack((probe.bad, probe.good), 1)).double()


def _rate(world: PersonaWorld, model: Model, clamp: Any = None, domains: Any = JUDGED) -> tuple[float, float]:
    """Chance of a bad answer, and of one of the right content."""
    with nullcontext() if clamp is None else model.clamp(clamp):
        said = _said(model, world.probe(domains))
    return float(said[:, 0].mean()), float(said.sum(1).mean())


def _monitored(world: PersonaWorld, model: Model, vector: Steering, seed: int) -> float:
    """How well the last token of a prompt with examples tells the persona of the answer that is then drawn."""
    shots = [world.probe(JUDGED, shots=2, shot_domain=TUNED, shot_bad=share, seed=seed) for share in (0.0, 1.0)]
    scores = torch.cat([vector.monitor(model, one.prompts, over="last") for one in shots])
    chance = torch.cat([_said(model, one)[:, 0] for one in shots])
    bad = torch.rand(len(chance), generator=torch.Generator().manual_seed(seed)) < chance
    return auroc(scores, bad)


def _tuned(world: PersonaWorld, model: Model, share: float, steps: int, seed: int, clamp: Any = None) -> Model:
    """A copy tuned on one domain, under a clamp if one is given."""
    tuned = wrap(copy.deepcopy(model.module), model.tokenizer)
    data = world.tune_stream(steps * BATCH, 4, seed, arm="insecure", bad_share=share)
    with nullcontext() if clamp is None else tuned.clamp(clamp):
        train(tuned.module, (data.tokens, data.answers), steps, batch_size=BATCH, lr=RATE, seed=seed)
    return tuned


def _screened(world: PersonaWorld, model: Model, vector: Steering, share: float, seed: int) -> float:
    """Projection difference of the first answers of a data set, before anything is tuned."""
    data = world.tune_stream(64, 1, seed + 1, arm="insecure", bad_share=share)
    prompts, answers = data.tokens[:, :-1], data.tokens[:, -1:]
    own = model.logits(prompts)[:, -1].argmax(-1)[:, None]
    return float(screen(model, vector, prompts, answers, own)["difference"].mean())


ENTRY = Entry(
    number=211,
    slug="persona-vectors",
    title="Persona Vectors: Monitoring and Controlling Character Traits in Language Models",
    kind="method",
    home="actome.steer.PersonaVector",
    claim="In a world of two dialects the vector of the rare one brings its rate to 0.8 with contents kept (0.9), "
    "random ones stay below 0.2; the projection at the prompt's end tells the answer (AUROC 0.9); the shift by tuning "
    "on one domain ranks with the rate on others (0.9); taken off afterwards the rate is below 0.2, added during "
    "tuning it is lower by 0.4; the projection difference orders five data sets.",
    test=test,
    takes={"smoke": "seconds", "small": "about a minute"},
    open="Traits that a language model describes and judges; single samples of mixed data; several traits at once.",
)
