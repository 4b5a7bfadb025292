"""[10] What needs to go right for an induction head? A mechanistic study of in-context learning circuits.

The paper holds parts of an induction circuit at what they should be *while the network trains*, and sees which of
them the phase change of the loss was waiting for.

Tested on prompts x1, l1, x2, l2, q of 50 classes whose five labels are drawn anew for each prompt, so that only copying
from the context answers them. Every step has fresh prompts; its accuracy is taken before the step and under the clamp.
The match is clamped to the likeness of exemplars, which does not know the answer; beside it stand clamps of the same
kind to something wrong.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

import actome as ac
from actome.clamps import AttendTo, pattern_preserving_ablation
from actome.dynamics import RankOneTensor, phase_change, steps_to
from actome.measures import InductionStrength
from actome.papers.registry import Entry, Scale
from actome.tasks import Subject, SubjectConfig, train
from actome.tasks.in_context_classification import InContextClassification, Labelled
from actome.tasks.trials import trial_seeds

HEADS, BATCH, WINDOW, THRESHOLD = 4, 64, 10, 0.9
FIRST, SECOND = "blocks.0.attn.pattern", "blocks.1.attn.pattern"
# What is clamped throughout training, and for how many steps at most.
ARMS = {
    "unclamped": 800,
    "previous token": 800,
    "match": 400,
    "copy": 800,
    "one head of layer 2": 1000,
    "attend to itself": 600,
    "match of another prompt": 600,
}
WRONG = ("attend to itself", "match of another prompt")


def test(seed: int, scale: Scale) -> tuple[dict[str, Any], dict[str, Any], dict[str, bool]]:
    count, share = (1, 0.05) if scale == "smoke" else (3, 1.0)
    runs: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {name: [] for name in ARMS}
    strengths, alone = [], []
    for one in trial_seeds(seed, count):
        for name, most in ARMS.items():
            curve, model = _trained(name, one, round(share * most))
            runs[name].append(curve)
            if name == "unclamped":
                strength, accuracies = _heads(model, one)
                strengths.append(strength)
                alone.append(accuracies)
    dates = steps_to(runs, THRESHOLD)
    ratios = {name: dates.ratio(name, to="unclamped") for name in ARMS if name != "unclamped"}
    phases = [phase_change(*curve, bandwidth=0.01) for curve in runs["unclamped"]]
    toy = {len(held): _toy(held, seed, 300 if scale == "smoke" else 3000) for held in ((), (2,), (1, 2))}
    figures = {
        "steps_to_0.9": {name: list(dates.arms[name].runs) for name in ARMS if name not in WRONG},
        "times_unclamped": {name: list(one.runs) for name, one in ratios.items() if name not in WRONG},
        "plateau_over_transition": [one.ratio for one in phases],
        "induction_strength_of_layer_2": strengths,
        "accuracy_of_one_head_of_the_trained_model": alone,
        "toy_plateau_over_transition_by_clamped_parts": toy,
    }
    control = {
        "steps_to_0.9": {name: list(dates.arms[name].runs) for name in WRONG},
        "best_accuracy": {name: [float(y.max()) for _, y in runs[name]] for name in WRONG},
    }
    one_head = dates.arms["one head of layer 2"]
    checks = {
        "with the match clamped it takes 0.6 of the steps or fewer, in every seed": all(
            one <= 0.6 for one in ratios["match"].runs
        ),
        "with a previous-token head clamped it takes fewer steps, in every seed": all(
            one < 1 for one in ratios["previous token"].runs
        ),
        "two or more heads of layer 2 end with a strength above 0.2, in every seed": all(
            sum(one > 0.2 for one in row) >= 2 for row in strengths
        ),
        "one head of layer 2 alone learns it too, in every seed": one_head.censored == 0,
        "and takes longer, in every seed": all(one > 1 for one in ratios["one head of layer 2"].at_least),
        "toy: clamping two of three parts takes the plateau away": toy[2] < 0.2 < 2 < toy[0],
        "control: attending to itself does not shorten it, in any seed": all(
            one >= 1 for one in ratios["attend to itself"].at_least
        ),
        "control: the match of another prompt does not shorten it, in any seed": all(
            one >= 1 for one in ratios["match of another prompt"].at_least
        ),
    }
    return figures, control, checks


def _trained(arm: str, seed: int, steps: int) -> tuple[tuple[np.ndarray, np.ndarray], ac.Model]:
    """The running accuracy over steps, and the model."""
    world, now, hits = InContextClassification(), {}, []
    config = SubjectConfig(
        vocab=world.vocab, d_model=64, layers=2, heads=HEADS, mlp="none", norm="layer", context=5, init=1.0
    )
    subject = Subject.fresh(config, seed=seed)
    model = ac.wrap(subject)

    def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        now["prompts"] = world.sample(BATCH, seed + step)
        return now["prompts"].tokens, now["prompts"].labels[:, -1]

    def loss(module: Any, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = module(tokens, logits_to_keep=1).logits[:, -1]
        if arm == "copy":
            logits, labels = world.copied(now["prompts"], now["pattern"]), labels
        else:
            labels = labels + world.classes
        hits.append(float((logits.argmax(-1) == labels).float().mean()))
        return F.cross_entropy(logits, labels)

    def learned(step: int, loss: float, module: Any) -> bool:
        return len(hits) >= WINDOW and float(np.mean(hits[-WINDOW:])) > 0.99

    clamps = {
        "previous token": [AttendTo(FIRST, "previous", heads=[0])],
        "match": [AttendTo(SECOND, lambda _: now["prompts"].matches(temperature=0.1))],
        "one head of layer 2": [ac.Ablate("blocks.1.attn.z", heads=range(1, HEADS))],
        "attend to itself": [AttendTo(FIRST, "self")],
        "match of another prompt": [AttendTo(SECOND, lambda _: now["prompts"].matches(temperature=0.1).roll(1, 0))],
    }.get(arm)
    pattern = model.match(SECOND)[0].address
    taps = [(pattern, lambda x: now.update(pattern=x), "keep")] if arm == "copy" else []
    with model.clamp(*clamps) if clamps else nullcontext(), model.tap(taps):
        train(subject, batch, steps, loss=loss, lr=1e-3, warmup=0, schedule="constant", seed=seed, on_step=learned)
    running = np.convolve(hits, np.full(WINDOW, 1 / WINDOW), "valid")
    return (np.arange(WINDOW, WINDOW + len(running), dtype=float), running), model


def _heads(model: ac.Model, seed: int) -> tuple[list[float], list[float]]:
    """Of each head of layer 2: its induction strength, and the accuracy with it alone, patterns as they were."""
    world = InContextClassification()
    prompts = world.sample(1000, seed - 1)
    strength = InductionStrength()
    strength.update(model.record(prompts.tokens, SECOND)[SECOND], copies=prompts.copies)

    def alone(head: int) -> float:
        with model.clamp(*pattern_preserving_ablation(model, prompts.tokens, {1: [head]}, which="only")):
            return _accuracy(model, world, prompts)

    return strength.compute()["induction_strength"].tolist(), [alone(head) for head in range(HEADS)]


def _accuracy(model: ac.Model, world: InContextClassification, prompts: Labelled) -> float:
    chosen = model.logits(prompts.tokens)[:, -1].argmax(-1) - world.classes
    return float((chosen == prompts.labels[:, -1]).float().mean())


def _toy(held: tuple[int, ...], seed: int, steps: int) -> float:
    curve = RankOneTensor(seed=seed).run(steps, clamped=held)
    return phase_change(curve["step"], curve["loss"], least=0.01).ratio


ENTRY = Entry(
    number=10,
    slug="training-time-clamping-of-induction-circuits",
    title="What needs to go right for an induction head? A mechanistic study of in-context learning circuits and their "
    "formation",
    kind="method",
    home="actome.clamps.AttendTo",
    claim="With the match of layer 2 clamped to the likeness of exemplars, learning in context takes 0.6 of the steps "
    "or fewer; with a previous-token head clamped in layer 1, fewer; clamps to something wrong do not shorten it. "
    "Several heads of layer 2 take part, and one alone learns it later.",
    test=test,
    takes={"smoke": "seconds", "small": "about a minute and a half"},
    open="The source's learning rate of 1e-5 and image embeddings; clamping the keys of layer 2 instead of the pattern "
    "of layer 1.",
)
