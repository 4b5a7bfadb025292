"""[155] Active-Dormant Attention Heads: Mechanistically Demystifying Extreme-Token Phenomena in LLMs.

The paper shows that attention sinks, drained values and residual peaks come up together on the bigram-backcopy task,
where a head has work on a few trigger tokens and none elsewhere; that such a head does nothing where it is dormant; and
that ReLU attention, and SGD in the place of Adam, do without them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from actome.core.load import wrap
from actome.dynamics.dormant_heads import ExtremeTokens, ablation_by_query
from actome.dynamics.sink_dates import SinkEmergence, sink_emergence
from actome.papers.registry import Entry, Scale
from actome.tasks import Subject, SubjectConfig, Training, next_token_loss, train
from actome.tasks.backcopy import Backcopy
from actome.tasks.trials import trial_seeds

LENGTH, BATCH = 32, 32
DOMAINS = ("ordinary", "trigger")
SGD_RATE = 0.3


def test(seed: int, scale: Scale) -> tuple[dict[str, Any], dict[str, Any], dict[str, bool]]:
    steps, deep_steps, since, count = (120, 20, 40, 1) if scale == "smoke" else (800, 300, 100, 3)
    trials = [_trial(one % 2**31, steps, deep_steps) for one in trial_seeds(seed, count)]
    of = {
        arm: {name: [trial[arm][name] for trial in trials] for name in trials[0][arm]}
        for arm in ("softmax", "relu", "untrained", "adam", "sgd")
    }
    # The law of the logit gap is fitted from step `since` on; before it the head is still being found.
    traces = pd.concat([trial["trace"].assign(run=i) for i, trial in enumerate(trials)], ignore_index=True)
    emerged = sink_emergence(traces, "ordinary", after=since, seed=seed)
    softmax, relu = of["softmax"], of["relu"]
    peaks = list(zip(of["adam"]["peak"], of["sgd"]["peak"], strict=True))
    figures = {arm: of[arm] for arm in ("softmax", "relu", "adam", "sgd")} | {"emergence": _dates(emerged)}
    control = {
        "untrained": of["untrained"],
        "gap_law_r2_of_shuffled_steps": emerged.control.median,
        "gap_law_p": emerged.control.p,
    }
    checks = {
        "softmax: the sink of ordinary queries is at least 5 times that of triggers, in every seed": all(
            a >= 5 * b for a, b in zip(softmax["sink_ordinary"], softmax["sink_trigger"], strict=True)
        ),
        "and at least twice the uniform share": all(
            a >= 2 * b for a, b in zip(softmax["sink_ordinary"], softmax["uniform_ordinary"], strict=True)
        ),
        "the first token's value is drained with softmax, 0.5 or less (mean), and with ReLU 0.6 or more": _mean(
            softmax["value_drain"]
        )
        <= 0.5
        and _mean(relu["value_drain"]) >= 0.6,
        "ReLU: the sink of ordinary queries is below the uniform share, in every seed": all(
            a < b for a, b in zip(relu["sink_ordinary"], relu["uniform_ordinary"], strict=True)
        ),
        "softmax and ReLU reach the same loss within 0.02 nats": abs(
            _mean(softmax["loss_above_floor"]) - _mean(relu["loss_above_floor"])
        )
        <= 0.02,
        "without the head the loss rises at least 10 times as much on triggers, in every seed": all(
            a >= 10 * max(b, 0) for a, b in zip(softmax["trigger_rise"], softmax["ordinary_rise"], strict=True)
        ),
        "the logit gap grows like ln(step): r2 of 0.8 or more, 0.2 or less in shuffled order": emerged.growth.r2 >= 0.8
        and emerged.growth.parameters["b"] > 0
        and emerged.control.median <= 0.2,
        "three layers: the residual peak is higher with Adam than with SGD at the same loss, in every seed": all(
            a > b for a, b in peaks
        ),
        "control: untrained, both sinks are within 0.02 of the uniform share": all(
            abs(sink - uniform) <= 0.02
            for name in DOMAINS
            for sink, uniform in zip(of["untrained"][f"sink_{name}"], of["untrained"][f"uniform_{name}"], strict=True)
        ),
    }
    return figures, control, checks


def _trial(seed: int, steps: int, deep_steps: int) -> dict[str, Any]:
    """Figures of every arm, and the trace of the softmax one."""
    world = Backcopy(seed=seed)
    text = world.sample(256, LENGTH, seed=seed + 1)
    labels = world.is_trigger(text).long()
    softmax, relu = (_run(world, seed, steps, attention=kind) for kind in ("softmax", "relu"))
    adam, sgd = (_run(world, seed, deep_steps, layers=3, sgd=rate) for rate in (0.0, SGD_RATE))

    def above_floor(module: nn.Module) -> float:
        with torch.no_grad():
            return next_token_loss(module, text).item() - world.floor(text)

    def figures(module: nn.Module, normalise: bool = False) -> dict[str, float]:
        model = wrap(module)
        row = ExtremeTokens(DOMAINS, eps=0.2, normalise=normalise).measure(model, text, labels).iloc[0]
        without = ablation_by_query(model, text, labels, DOMAINS).iloc[0]
        found = {**row.drop(["layer", "head"]), **without.drop(["layer", "head"])}
        return {name.replace(" ", "_"): float(one) for name, one in found.items()} | {
            "loss_above_floor": above_floor(module)
        }

    def peak(module: nn.Module) -> dict[str, float]:
        frame = ExtremeTokens(DOMAINS).measure(wrap(module), text, labels)
        return {
            "peak": float(frame["residual_peak"].max()), "peak_layer": float(frame["residual_peak"].idxmax()),
            "loss_above_floor": above_floor(module),
        }  # fmt: skip

    # Adam as early as it is as good as SGD at its end, so that neither is the less trained one.
    goal = above_floor(sgd.module)
    step = min(adam.checkpoints, key=lambda one: abs(above_floor(adam.at(one)) - goal))
    return {
        "softmax": figures(softmax.module),
        "relu": figures(relu.module, normalise=True),
        "untrained": figures(softmax.at(0)),
        "adam": {**peak(adam.at(step)), "step": float(step), "peak_at_step_0": peak(adam.at(0))["peak"]},
        "sgd": peak(sgd.module),
        "trace": ExtremeTokens(DOMAINS, eps=0.2).trace(softmax, text, labels),
    }


def _run(world: Backcopy, seed: int, steps: int, *, sgd: float = 0.0, **shape: Any) -> Training:
    options = {"layers": 1, "d_mlp": 128, **shape}
    config = SubjectConfig(vocab=world.vocab, d_model=64, heads=1, context=LENGTH, **options)
    optimizer = (lambda groups: torch.optim.SGD(groups, sgd, momentum=0.9)) if sgd else None
    kept = {0, *np.geomspace(5, steps, 24).round().astype(int).tolist()}
    return train(
        Subject.fresh(config, seed), world.sample(steps * BATCH, LENGTH, seed=seed + 2), batch_size=BATCH,
        schedule="constant", optimizer=optimizer, checkpoints=kept, seed=seed,
    )  # fmt: skip


def _dates(found: SinkEmergence) -> dict[str, Any]:
    low, high = found.growth.interval("b")
    return {
        "half_way_at_step": {name: date.runs for name, date in found.dates.items()},
        "change": found.change,
        "gap_per_unit_of_ln_step": [found.growth.parameters["b"], low, high],
        "gap_law_r2": found.growth.r2,
        "gap_against_value_drain": found.reinforcement,
    }


def _mean(runs: list[float]) -> float:
    return sum(runs) / len(runs)


ENTRY = Entry(
    number=155,
    slug="active-dormant-heads",
    title="Active-Dormant Attention Heads: Mechanistically Demystifying Extreme-Token Phenomena in LLMs",
    kind="phenomenon",
    home="actome.dynamics.ExtremeTokens",
    claim="On bigram-backcopy text a softmax head's sink on ordinary queries is at least 5 times that on triggers and "
    "twice the uniform share, its first value at most half as long as the others (0.6 or more with ReLU attention, "
    "which has no sink); removing it costs 10 times as much on triggers; its logit gap grows like the logarithm of the "
    "steps; with three layers the residual peak is higher with Adam than with SGD at the same loss.",
    test=test,
    takes={"smoke": "about 4 seconds", "small": "about a minute and a half"},
    open="Pretrained models (heads active on code and dormant on prose), 256 tokens a text, the theory's exponents.",
)
