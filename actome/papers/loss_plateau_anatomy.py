"""[239] What Happens During the Loss Plateau? Understanding Abrupt Learning in Transformers.

The paper finds three things on a plateau before a sudden fall of the loss: outputs that repeat, hidden states that
look alike, and an attention map that gets better all the while; and it shortens or lengthens the plateau by turning
that map up or down.

Tested on moving-window sums (16 numbers, a separator, their sums of two) by one layer with one head of linear
attention, on fresh sequences in every step. Probes are held-out sequences with the true tokens before each output
(teacher-forced).
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

import actome as ac
from actome.clamps import AttendTo
from actome.dynamics import first_passage, phase_change, steps_to
from actome.measures import AttentionProgress, RepetitionFrequency, TokenCollapse
from actome.papers.registry import Entry, Scale
from actome.tasks import Subject, SubjectConfig, train
from actome.tasks.moving_sum import MovingSum
from actome.tasks.trials import trial_seeds

EVERY, THRESHOLD = 10, 0.9
PATTERN, LAST = "blocks.0.attn.pattern", "blocks.0.resid.post"


def test(seed: int, scale: Scale) -> tuple[dict[str, Any], dict[str, Any], dict[str, bool]]:
    count, most, batch = (1, 20, 32) if scale == "smoke" else (3, 600, 96)
    arms: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    told: dict[str, list[float]] = {}
    plateaus: dict[str, list[float]] = {"window": [], "copy": []}
    for one in trial_seeds(seed, count):
        accuracy, probes = _run(one, most, batch, probe=True)
        for name, value in _anatomy(accuracy, probes).items():
            told.setdefault(name, []).append(value)
        end = first_passage(*accuracy, threshold=THRESHOLD, rising=True).at
        slow = round(min(1.55 * end, most))
        for name, curve in {
            "unclamped": accuracy,
            "needed entries times 10": _run(one, most, batch, factor=10.0)[0],
            # No further than what the claim asks about.
            "needed entries times 0.5": _run(one, slow, batch, factor=0.5)[0],
            "attention set to what is needed": _run(one, most, batch, attend=True)[0],
            "copy": _run(one, most, batch, rule="copy")[0],
        }.items():
            arms.setdefault(name, []).append(curve)
        # Training stops soon after the jump, so that the last level is seen for a few steps only.
        plateaus["window"].append(phase_change(*accuracy, least=0.005).plateau)
        plateaus["copy"].append(phase_change(*arms["copy"][-1], least=0.005).plateau)
    dates = steps_to(arms, THRESHOLD)
    times = {name: dates.ratio(name, to="unclamped") for name in arms if name != "unclamped"}
    figures = {
        "steps_to_0.9": {name: list(dates.arms[name].runs) for name in arms if name != "copy"},
        "times_unclamped_at_least": {name: list(one.at_least) for name, one in times.items() if name != "copy"},
        "plateau": plateaus["window"],
        **told,
    }
    control = {
        "steps_to_0.9": {"copy": list(dates.arms["copy"].runs)},
        "plateau": plateaus["copy"],
        "repetition_of_the_data": told.pop("data"),
    }
    del figures["data"]
    half = told["attention_progress_half_way_at"]
    checks = {
        "on the plateau outputs repeat (0.3 or more), in every seed": min(told["repetition_on_plateau"]) >= 0.3,
        "and hidden states are alike (cosine 0.9 or more)": min(told["cosine_on_plateau"]) >= 0.9,
        "after the jump repetition is 0.1 or less": max(told["repetition_after"]) <= 0.1,
        "and the cosine 0.3 or less": max(told["cosine_after"]) <= 0.3,
        "attention is half way before accuracy passes 0.5, in every seed": all(
            a < b < np.inf for a, b in zip(half, told["accuracy_passes_half_at"], strict=True)
        ),
        "needed entries times 10: 0.6 of the steps or fewer": max(times["needed entries times 10"].runs) <= 0.6,
        "needed entries times 0.5: 1.5 times the steps or more": min(times["needed entries times 0.5"].at_least) >= 1.5,
        "control: copying has a plateau of at most 0.2 of that length": all(
            b <= 0.2 * a for a, b in zip(plateaus["window"], plateaus["copy"], strict=True)
        ),
    }
    return figures, control, checks


def _run(
    seed: int, steps: int, batch: int, *, rule: Any = "window", factor: float = 1.0, attend: bool = False,
    probe: bool = False,
) -> tuple[tuple[np.ndarray, np.ndarray], dict[str, list[float]]]:  # fmt: skip
    """Accuracy on each step's fresh sequences before the step, and what probes found every few steps."""
    world = MovingSum(rule=rule)
    config = SubjectConfig(
        vocab=world.vocab, d_model=64, layers=1, heads=1, attention="linear", norm="layer", bias=True,
        context=world.length - 1,
    )  # fmt: skip
    subject = Subject.fresh(config, seed=seed)
    model, outputs = ac.wrap(subject), world.outputs()
    needed, held_out = world.needed()[:-1, :-1], world.sample(256, seed - 1)[:, :-1]
    hits: list[float] = []
    probes: dict[str, list[float]] = {}

    def loss(module: Any, tokens: torch.Tensor) -> torch.Tensor:
        logits, answers = module(tokens[:, :-1]).logits[:, outputs], tokens[:, outputs + 1]
        hits.append(float((logits.argmax(-1) == answers).float().mean()))
        return F.cross_entropy(logits.flatten(0, 1), answers.flatten())

    def on_step(step: int, loss: float, module: Any) -> bool:
        if probe and (step % EVERY == 0 or hits[-1] > 0.97):
            for name, value in {"step": float(step), **_probe(model, world, held_out, needed)}.items():
                probes.setdefault(name, []).append(value)
        return hits[-1] > 0.97

    clamps = []
    if attend:
        clamps = [AttendTo(PATTERN, needed)]
    elif factor != 1.0:
        clamps = [ac.Scale(PATTERN, torch.where(needed, factor, 1.0))]
    with model.clamp(*clamps) if clamps else nullcontext():
        train(
            subject, lambda step: world.sample(batch, seed + step), steps, loss=loss, lr=1e-3, warmup=0,
            schedule="constant", seed=seed, on_step=on_step,
        )  # fmt: skip
    return (np.arange(len(hits), dtype=float), np.array(hits)), probes


def _probe(model: ac.Model, world: MovingSum, tokens: torch.Tensor, needed: torch.Tensor) -> dict[str, float]:
    start = world.terms
    table = model.measure(
        tokens,
        {
            "logits": RepetitionFrequency(start=start),
            LAST: TokenCollapse(skip=start + 1),  # the first output is a copy of one input
            PATTERN: AttentionProgress(needed),
        },
    )
    names = {"repetition": "repetition", "data": "repetition_of_data", "cosine": "token_cosine"}
    found = {name: float(table.value(value)) for name, value in names.items()}
    return found | {"progress": float(table.value("attention_progress").max())}


def _anatomy(accuracy: tuple[np.ndarray, np.ndarray], probes: dict[str, list[float]]) -> dict[str, float]:
    """What the probes say in the middle of the plateau and at the end."""
    end = first_passage(*accuracy, threshold=THRESHOLD, rising=True).at
    steps = np.array(probes["step"])
    middle = int(np.abs(steps - min(end, steps[-1]) / 2).argmin())
    half = first_passage(*accuracy, threshold=0.5, rising=True).at
    progress = first_passage(steps, probes["progress"], share=0.5).at if len(steps) > 1 else float("inf")
    return {
        "repetition_on_plateau": probes["repetition"][middle],
        "cosine_on_plateau": probes["cosine"][middle],
        "repetition_after": probes["repetition"][-1],
        "cosine_after": probes["cosine"][-1],
        "attention_progress_first_and_last": [probes["progress"][0], probes["progress"][-1]],
        "attention_progress_half_way_at": progress,
        "accuracy_passes_half_at": half,
        "accuracy_in_the_middle_of_the_plateau": float(accuracy[1][min(int(steps[middle]), len(accuracy[1]) - 1)]),
        "data": probes["data"][-1],
    }


ENTRY = Entry(
    number=239,
    slug="loss-plateau-anatomy",
    title="What Happens During the Loss Plateau? Understanding Abrupt Learning in Transformers",
    kind="phenomenon",
    home="actome.dynamics.phase_change",
    claim="On the plateau before moving-window sums are learned, outputs repeat (0.3 or more) and hidden states are "
    "alike (0.9 or more), and both are gone after it; attention is half way before accuracy is; scaling the needed "
    "entries by 10 brings it to 0.6 of the steps or fewer, by 0.5 to 1.5 times as many or more; copying has none.",
    test=test,
    takes={"smoke": "seconds", "small": "about a minute and a half"},
    open="Softmax attention, addition of numbers, permutations, histograms; language models early in their training.",
)
