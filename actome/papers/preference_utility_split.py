"""[195] Why Steering Works: Toward a Unified View of Language Model Parameter Dynamics.

The paper puts edits of weights, LoRA and added vectors into one form, a change of one linear map, and measures on one
scale of log-odds what they gain (preference for the wanted answer over its opposite) and what they cost (utility, the
mass left on either of them). With growing strength preference first rises linearly and then bends, utility falls
as states leave the manifold of clean ones, and both follow a gain times a decay of validity. SPLIT trains for both.

Tested on a persona that shows in the word used for the same content. The wanted answer is the word of the bad persona,
its opposite that of the good one; prompts name neither. Interventions enter after the MLP of the middle block, are
fitted on questions of three domains; learning rates and SPLIT's margin are chosen on a fourth, and curves are taken on
the last two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from actome.clamps import Add
from actome.core.clamp import Clamp
from actome.core.model import Model
from actome.papers._persona_base import base
from actome.papers.registry import Entry, Scale
from actome.steer import SPLIT, Contrast, Examples, Manifold, Pairs, equal_preference, fit_curves, states
from actome.steer import preference_utility as sweep
from actome.steer.preference import scaled
from actome.tasks.persona import BAD, GOOD, NEUTRAL, PersonaWorld
from actome.tasks.trials import over_seeds, paired, trial_seeds

if TYPE_CHECKING:
    import pandas as pd

SITE, AFTER, END = "blocks.1.mlp.out", "blocks.1.resid.post", "blocks.2.resid.post"
FIT, CHOOSE, TEST = (0, 1, 2), (3,), (4, 5)
LEVELS = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)  # preferences at which methods are compared, log-odds
MARGINS, RATES = (4.0, 8.0), (0.05, 0.1, 0.2)  # candidates of SPLIT; the rates are those of its rival too
COARSE, FINE = np.linspace(0, 4, 17).tolist(), np.linspace(0, 4, 65).tolist()
SFT: dict[str, Any] = {"gamma": 0.0, "lam_n": 0.0}
KINDS = ("means", "sft", "lora")


def test(seed: int, scale: Scale) -> tuple[dict[str, Any], dict[str, Any], dict[str, bool]]:
    count, steps, fitting = (1, 80, 12) if scale == "smoke" else (3, 600, 150)
    seeds = over_seeds(lambda one: _trial(one, steps, fitting, scale), seed, count)
    mean = {name: sum(values) / count for name, values in seeds.items()}
    control = {name: mean.pop(name) for name in list(mean) if name.startswith("control")}
    gain = paired(seeds["utility_split"], seeds["utility_sft"])
    figures = {
        **mean,
        "split_over_sft": gain.mean,
        "split_over_sft_interval": [gain.low, gain.high],
        "seeds": {name: seeds[name] for name in ("utility_split", "utility_sft", "rate_split", "margin", "rate_sft")},
    }
    r2 = {name: min(mean[f"r2_{curve}_{name}"] for curve in ("preference", "utility")) for name in KINDS}
    checks = {
        "preference rises with every step up to a multiplier of 1, in all three methods and seeds": all(
            min(seeds[f"least_step_{name}"]) > 0 for name in KINDS
        ),
        "at a multiplier of 4 utility is lower than at 0 by 1 nat, in all three": all(
            mean[f"cost_at_4_{name}"] >= 1 for name in KINDS
        ),
        "gain times decay takes 0.9 of the variance of both curves, in all three": min(r2.values()) >= 0.9,
        "states are further from the manifold at every next multiplier of 0, 1, 2, 3, 4, in all three": all(
            mean[f"off_manifold_at_{m + 1}_{name}"] > mean[f"off_manifold_at_{m}_{name}"]
            for name in KINDS
            for m in range(4)
        ),
        "at equal preference SPLIT leaves at least the utility of supervised tuning": gain.mean >= 0,
    }
    return figures, control, checks


def _trial(seed: int, steps: int, fitting: int, scale: Scale) -> dict[str, float]:
    start, order, drawn = (one % 2**31 for one in trial_seeds(seed, 3))
    task, model = base(start, steps)
    fit, choose, judge = (_pairs(task.world, domains) for domains in (FIT, CHOOSE, TEST))
    manifold = Manifold.fit(
        _ends(model, torch.cat([task.world.probe((*FIT, *CHOOSE), system=s).prompts for s in (NEUTRAL, GOOD, BAD)]))
    )
    common: dict[str, Any] = {"steps": fitting, "batch_size": len(fit), "seed": order}

    def trained(**options: Any) -> Clamp:
        return SPLIT(SITE, **(common | {"lr": 0.1} | options)).fit(model, fit)

    clamps = {
        "means": Contrast(AFTER).fit(model, Examples(*(_shown(task.world, bad) for bad in (1.0, 0.0)))),
        "sft": trained(**SFT),
        "lora": trained(form="lora", **(SFT | {"lr": 0.01})),
    }
    figures: dict[str, float] = {}
    for name, clamp in clamps.items():
        figures |= {f"{key}_{name}": value for key, value in _curve(model, clamp, judge, manifold).items()}

    # Chosen where nothing is fitted, and judged where nothing is chosen.
    margins, rates = (MARGINS[-1:], RATES[-1:]) if scale == "smoke" else (MARGINS, RATES)
    arms = {
        "split": {(rate, margin): trained(lr=rate, theta=margin) for rate in rates for margin in margins},
        "sft": {(rate, 0.0): trained(lr=rate, **SFT) for rate in rates},
    }
    best = {
        name: max(arm, key=lambda one, arm=arm: _worth(sweep(model, arm[one], choose, FINE, batch_size=64)))
        for name, arm in arms.items()
    }
    figures |= {"rate_split": best["split"][0], "margin": best["split"][1], "rate_sft": best["sft"][0]}
    curves = {
        name: sweep(model, clamp, judge, FINE, batch_size=64)
        for name, clamp in ((name, arm[best[name]]) for name, arm in arms.items())
    }
    levels = [level for level in LEVELS if level <= min(curve["preference"].max() for curve in curves.values())]
    for name, curve in curves.items():
        at = {level: _utility(curve, level) if level in levels else float("nan") for level in LEVELS}
        figures |= {f"utility_{name}_at_{level:g}": value for level, value in at.items()}
        figures[f"utility_{name}"] = sum(at[level] for level in levels) / len(levels) if levels else float("nan")
        one = curve[curve["multiplier"] == 1.0].iloc[0]
        figures |= {f"{column}_{name}_at_multiplier_1": float(one[column]) for column in ("preference", "utility")}
    return figures | _controls(model, clamps["sft"], judge, drawn)


def _curve(model: Model, clamp: Clamp, pairs: Pairs, manifold: Manifold) -> dict[str, float]:
    """What preference, utility and the distance to clean states do over the multipliers."""
    curve = sweep(model, clamp, pairs, COARSE, batch_size=64)
    found, every_second = fit_curves(curve), fit_curves(curve.iloc[::2])
    rest = curve.iloc[1::2]
    preference, utility = curve["preference"].to_numpy(), curve["utility"].to_numpy()
    distances = []
    for multiplier in (0.0, 1.0, 2.0, 3.0, 4.0):
        with model.clamp(scaled(clamp, multiplier)):
            distances.append(float(manifold.distance(_ends(model, pairs.prompts)).mean()))
    small = preference[np.asarray(COARSE) <= 1]
    return {
        "least_step": float(np.diff(small).min()),
        "preference_at_0": float(preference[0]),
        "preference_at_1": float(small[-1]),
        "preference_at_4": float(preference[-1]),
        "cost_at_4": float(utility[0] - utility[-1]),
        "r2_preference": found.preference.r2,
        "r2_utility": found.utility.r2,
        "r2_preference_between": every_second.preference.r2_of(rest["multiplier"], rest["preference"]),
        "r2_utility_between": every_second.utility.r2_of(rest["multiplier"], rest["utility"]),
    } | {f"off_manifold_at_{m}": distance for m, distance in enumerate(distances)}


def _controls(model: Model, clamp: Any, pairs: Pairs, seed: int) -> dict[str, float]:
    """Random vectors as long as the fitted one, and curves whose values are dealt out anew."""
    generator = torch.Generator().manual_seed(seed)
    gains = []
    for _ in range(3):
        noise = torch.randn(clamp.value.shape, generator=generator)
        other = Add(SITE, noise / noise.norm() * clamp.value.norm())
        curve = sweep(model, other, pairs, (0.0, 1.0), batch_size=64)
        gains.append(float(np.diff(curve["preference"])[0]))
    curve = sweep(model, clamp, pairs, COARSE, batch_size=64)
    mixed = curve.iloc[torch.randperm(len(curve), generator=generator).numpy()].assign(multiplier=COARSE)
    dealt = fit_curves(mixed)
    return {
        "control_preference_gained_by_random_vectors": max(gains),
        "control_r2_preference_dealt_anew": dealt.preference.r2,
        "control_r2_utility_dealt_anew": dealt.utility.r2,
    }


def _utility(curve: pd.DataFrame, level: float) -> float:
    """Utility where the preference is first reached."""
    return float(equal_preference({"": curve}, level)["utility"].iloc[0])


def _worth(curve: pd.DataFrame) -> float:
    """Mean utility over the levels of preference; of a curve that does not reach all of them, less than all others."""
    if curve["preference"].max() < LEVELS[-1]:
        return float(curve["preference"].max()) - 1e6
    return float(np.mean([_utility(curve, level) for level in LEVELS]))


def _pairs(world: PersonaWorld, domains: tuple[int, ...]) -> Pairs:
    probe = world.probe(domains)
    return Pairs(probe.prompts, probe.bad[:, None], probe.good[:, None])


def _shown(world: PersonaWorld, bad: float) -> Tensor:
    """Prompts behind one answer of a persona."""
    return world.probe(FIT, shots=1, shot_domain=FIT[0], shot_bad=bad, repeats=2).prompts


def _ends(model: Model, prompts: Any) -> Tensor:
    return states(model, prompts, END, batch_size=64)[END]


ENTRY = Entry(
    number=195,
    slug="preference-utility-split",
    title="Why Steering Works: Toward a Unified View of Language Model Parameter Dynamics",
    kind="method",
    home="actome.steer.SPLIT",
    claim="Along the multiplier of a difference of means, a tuned vector and LoRA, preference rises steadily up to 1, "
    "utility is lower by 1 nat at 4, a gain times a decay fits both with R2 of 0.9, and states move away from the "
    "manifold of clean ones; at equal preference a vector trained by SPLIT leaves at least as much utility as one by "
    "supervised tuning.",
    test=test,
    takes={"smoke": "seconds", "small": "about two minutes"},
    open="Changes of all weights and LoRA trained by SPLIT (the forms are there); answers of many tokens, generated "
    "text and judges; real models.",
)
