"""[121] What and How does In-Context Learning Learn? Bayesian Model Averaging, Parameterization, and Generalization.

The paper shows that a perfectly pretrained model does Bayesian model averaging over what a prompt may be about, with a
regret that falls like 1 / T, and that attention can do it.

Tested with prompts from one of eight hidden distributions over four symbols: the exact average for 50 such worlds, and
a two-layer transformer trained on one.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actome.measures import bma, bma_gap, icl_regret, regret_slope, ridge_prediction
from actome.papers.registry import Entry, Scale
from actome.tasks import Subject, SubjectConfig, cached, train
from actome.tasks.latent_prompts import DiscreteLatents, Prompts, latent_prompts
from actome.tasks.trials import over_seeds

HORIZON, LENGTH = 200, 32
EARLY, LATE = slice(1, 6), slice(10, None)  # after 1 to 5 symbols, and from 10 on


def test(seed: int, scale: Scale) -> tuple[dict[str, Any], dict[str, Any], dict[str, bool]]:
    worlds, steps, count = (10, 60, 1) if scale == "smoke" else (50, 1000, 3)
    exact = over_seeds(_exact, seed, worlds)
    found = over_seeds(lambda one: _trained(one, steps), seed, count)
    figures = {
        "largest_horizon_times_regret": max(exact["most"]),
        "log_latents": math.log(8),
        "slope": [min(exact["slope"]), float(np.mean(exact["slope"])), max(exact["slope"])],
        "kl_to_averaging_late": found["late"],
        "kl_to_averaging_early": found["early"],
        "kl_to_the_most_probable_latent_early": found["early_plug_in"],
        "regret_above_averaging_at_the_end": found["excess"],
        "distance_of_kernel_attention_from_ridge_by_examples": _attention(seed),
    }
    control = {
        "kl_to_averaging_late_untrained": found["late_untrained"],
        "kl_to_averaging_late_trained_on_one_latent": found["late_one"],
    }
    checks = {
        "averaging: regret is at most log 8 / T at every horizon": max(exact["most"]) <= math.log(8) + 1e-9,
        "averaging: the slope of log regret over log T is between -1.15 and -0.85": figures["slope"][0] >= -1.15
        and figures["slope"][2] <= -0.85,
        "trained: KL to averaging is below 0.03 after 10 symbols": max(found["late"]) < 0.03,
        "trained: after 1 to 5 symbols it is below a fifth of that to the most probable latent": all(
            a < b / 5 for a, b in zip(found["early"], found["early_plug_in"], strict=True)
        ),
        "control: untrained, or trained on one latent, KL is above 0.03": min(
            found["late_untrained"] + found["late_one"]
        )
        > 0.03,
    }
    return figures, control, checks


def _exact(seed: int) -> dict[str, float]:
    world = latent_prompts("discrete", seed=seed)
    prompts = world.sample(400, HORIZON, seed + 1)
    likelihood_ZBT, log_average = world.log_likelihood(prompts).permute(2, 0, 1), _average(world, prompts)
    regret = icl_regret(log_average.gather(-1, prompts.symbols[..., None])[..., 0], likelihood_ZBT)
    horizon = torch.arange(1, HORIZON + 1)
    return {"most": float((regret * horizon).max()), "slope": regret_slope(regret, first=10)}


def _average(world: DiscreteLatents, prompts: Prompts) -> Tensor:
    """The exact Bayesian average by the measure's own formula, log probabilities (B, T, V)."""
    table_ZBTV = world.tables()[:, prompts.inputs]
    return bma(world.log_likelihood(prompts).permute(2, 0, 1), table_ZBTV)


def _trained(seed: int, steps: int) -> dict[str, float]:
    world = DiscreteLatents(seed=seed)
    config = SubjectConfig(vocab=world.vocab + 1, d_model=64, layers=2, heads=4, context=LENGTH + 1)

    def build(latent: int | None) -> Any:
        tokens = world.tokens(world.sample(64 * steps, LENGTH, seed, latent=latent))
        return train(Subject.fresh(config, seed=seed), tokens, steps, batch_size=64, seed=seed)

    key = {"config": config, "steps": steps, "seed": seed}
    name = "icl-bayesian-model-averaging"
    subject = cached(name, lambda: build(None), {**key, "latent": None}).module
    narrow_steps = max(steps // 4, 1)  # one distribution is learned at once
    narrow = train(
        Subject.fresh(config, seed=seed),
        world.tokens(world.sample(64 * narrow_steps, LENGTH, seed, latent=0)),
        narrow_steps,
        batch_size=64,
        seed=seed,
    ).module
    prompts = world.sample(1000, LENGTH, seed + 1)
    average, plug_in = _average(world, prompts), world.plug_in(prompts).log()
    predictions = {
        "": _predict(subject, world, prompts),
        "_untrained": _predict(Subject.fresh(config, seed=seed), world, prompts),
        "_one": _predict(narrow, world, prompts),
    }
    out = {}
    for arm, log_p in predictions.items():
        out[f"late{arm}"] = float(bma_gap(log_p, average)[LATE].mean())
    out["early"] = float(bma_gap(predictions[""], average)[EARLY].mean())
    out["early_plug_in"] = float(bma_gap(predictions[""], plug_in)[EARLY].mean())
    paid = [log.gather(-1, prompts.symbols[..., None])[..., 0] for log in (predictions[""], average)]
    comparator = world.log_likelihood(prompts).permute(2, 0, 1)
    of_model, of_average = (icl_regret(one, comparator).mean(0)[-1] for one in paid)
    out["excess"] = float(of_model - of_average)
    return out


@torch.no_grad()
def _predict(subject: Any, world: DiscreteLatents, prompts: Prompts) -> Tensor:
    """Log probabilities of the symbols (B, T, V), the begin token left out of the choice."""
    logits = subject(world.tokens(prompts)[:, :-1]).logits
    return logits[..., : world.vocab].double().log_softmax(-1)


def _attention(seed: int) -> dict[str, float]:
    """For linear tasks: root mean square between softmax attention over Gaussian keys and the exact average."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for examples in (8, 32, 128, 512):
        error = []
        for _ in range(50):
            k, w = torch.randn(examples, 2, generator=generator).double(), torch.randn(2, 1, generator=generator)
            v = k @ w.double() + 0.1 * torch.randn(examples, 1, generator=generator)
            q = torch.randn(8, 2, generator=generator).double()
            weights = (q @ k.T).softmax(-1)  # over many Gaussian keys their weighted mean is q itself
            error.append(float((weights @ v - ridge_prediction(k, v, q, 0.01)).square().mean()))
        out[str(examples)] = float(np.sqrt(np.mean(error)))
    return out


ENTRY = Entry(
    number=121,
    slug="icl-bayesian-model-averaging",
    title="What and How does In-Context Learning Learn? Bayesian Model Averaging, Parameterization, and Generalization",
    kind="theory",
    home="actome.measures.icl_regret",
    claim="With 8 latents, T times the regret of exact averaging is at most log 8 at every T and log regret falls with "
    "slope -1.15 to -0.85; a trained two-layer transformer is within 0.03 nats of averaging after 10 symbols, and "
    "after 1 to 5 five times nearer to it than to the most probable latent.",
    test=test,
    takes={"smoke": "about 4 seconds", "small": "about a minute, once; then from the cache"},
    open="How the pretraining error depends on the number of prompts and on depth is not measured.",
)
