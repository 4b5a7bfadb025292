"""[184] Are language models aware of the road not taken? Token-level uncertainty and hidden state dynamics.

The paper resamples a language model's reasoning from every token, and finds that hidden states tell the distribution of
outcomes to come, and that steering works best where the outcome is still open.

Tested on chains of clues towards one of 12 classes. A subject learns to write whole chains, the answer among them, so
that the outcome distribution at every clue is the exact posterior of the class, and no sampling is needed. Linear maps
are fitted from the state at the t-th clue to the posterior after t clues, on chains not seen in training, and compared
with the clue's embedding and with states of another subject, which has learnt other codes. Steering adds a vector of
fixed length at one clue and asks for the answer at once; random vectors of the same length are the control, because
they too move uncertain states most. `forking_paths` samples the distribution that the posterior gives exactly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from actome.core.load import wrap
from actome.core.model import Model
from actome.decode import forking_paths
from actome.explain import outcome_probe
from actome.papers.registry import Entry, Scale
from actome.steer import Asked, outcome_vectors, steerability
from actome.tasks import Subject, SubjectConfig, train
from actome.tasks.clue_chain import Chains, ClueChain
from actome.tasks.trials import trial_seeds

OPEN = 4  # clues from which on certainty differs between chains
LAST, PENALTIES = "blocks.2.resid.post", (1e-5, 1e-4, 1e-3)
SITE, NORM = "blocks.0.resid.post", 8.0
PATHS, SAMPLES = 8, 60  # of forking paths: chains, and continuations of each alternative


def test(seed: int, scale: Scale) -> tuple[dict[str, Any], dict[str, Any], dict[str, bool]]:
    smoke = scale == "smoke"
    count, steps, chains, paths = (1, 20, 120, 1) if smoke else (3, 1000, 1600, PATHS)
    reads = (4,) if smoke else (2, 4, 6, 8)  # clues after which probes read
    # The stranger of each subject is the next one; that of the last is not looked at otherwise.
    seeds = trial_seeds(seed, count + 1)
    models = [_subject(one, steps) for one in seeds]
    trials = [_trial(one, *pair, reads, chains, paths) for one, *pair in zip(seeds, models, models[1:], strict=False)]
    each = {name: [trial[name] for trial in trials] for name in trials[0]}
    mean = {name: sum(values) / count for name, values in each.items()}
    control = {name: mean.pop(name) for name in list(mean) if name.startswith("control")}
    shown = ("kl_state", "kl_embedding", "control_kl_stranger", "rho", "rho_within", "rho_partial")
    figures = {**mean, "seeds": {name: each[name] for name in shown}}
    checks = {
        "a linear map of the state is nearer to the exact posterior than one of the clue's embedding, KL below 0.3 of "
        "that": mean["kl_state"] < 0.3 * mean["kl_embedding"],
        "and than one of the states of a subject that has learnt other codes, KL below 0.8 of that": mean["kl_state"]
        < 0.8 * control["control_kl_stranger"],
        "from the fourth clue on the gain by steering, beyond that of random vectors, grows with uncertainty, rho at "
        "least 0.3": mean["rho"] >= 0.3,
        "and does so among states with like chances of the target, rho within bins at least 0.1": mean["rho_within"]
        >= 0.1,
        "outcome distributions sampled along paths are those of the posterior, total variation at most 0.15": mean[
            "forking_total_variation"
        ]
        <= 0.15,
    }
    return figures, control, checks


def _world(seed: int) -> ClueChain:
    return ClueChain(seed=seed % 2**31)


def _subject(seed: int, steps: int) -> Model:
    """Learns to write whole chains: clues, the cue and the class."""
    world = _world(seed)
    data, init = (one % 2**31 for one in trial_seeds(seed, 2))
    chains = world.sample(steps * 64, data)
    config = SubjectConfig(vocab=world.vocab, d_model=64, layers=3, heads=4, context=world.clues + 3)
    subject = Subject.fresh(config, seed=init)
    train(subject, (chains.tokens, chains.mask), batch_size=64, lr=3e-3, seed=data)
    return wrap(subject)


def _trial(
    seed: int, model: Model, stranger: Model, reads: tuple[int, ...], count: int, paths: int
) -> dict[str, float]:
    tests, aim, draws = (one % 2**31 for one in trial_seeds(seed, 5)[2:])
    world = _world(seed)
    chains = world.sample(count, tests, shown=world.clues)
    posterior = world.posterior(chains.clues, chains.levels)
    return (
        _probes(model, stranger, world, chains, posterior, reads)
        | _steering(model, world, chains, posterior, aim)
        | _forking(model, world, chains, posterior, paths, draws)
    )


def _probes(
    model: Model, stranger: Model, world: ClueChain, chains: Chains, posterior: Tensor, reads: tuple[int, ...]
) -> dict[str, float]:
    """Held-out KL from the exact posterior, by input, after some of the clues and in the mean over them."""
    ids = chains.tokens[:, : world.clues + 1]
    read = model.record(ids, ["embed", LAST])
    other = stranger.record(ids, LAST)[LAST]
    words = torch.nn.functional.one_hot(ids, world.vocab).float()
    figures: dict[str, float] = {}
    for t in reads:
        others = {"embedding": read["embed"][:, t], "stranger": other[:, t], "all_clues": words[:, : t + 1].flatten(1)}
        found = outcome_probe({"state": read[LAST][:, t]}, posterior[:, t], others=others, penalties=PENALTIES)
        figures |= {f"kl_{name}_after_{t}": found.of(name) for name in found.kl}
    for name in ("state", "embedding", "stranger", "all_clues", "marginal"):
        key = f"kl_{name}" if name in ("state", "embedding") else f"control_kl_{name}"
        figures[key] = sum(figures[f"kl_{name}_after_{t}"] for t in reads) / len(reads)
    return figures


def _steering(model: Model, world: ClueChain, chains: Chains, posterior: Tensor, seed: int) -> dict[str, float]:
    """Gains towards a class drawn for each chain, and how they go with the entropy of the exact posterior."""
    half = len(chains.classes) // 2
    ids = chains.tokens[:, : world.clues + 1]
    states = model.record(ids[:half], SITE)[SITE]
    vectors = outcome_vectors(states, posterior[:half, -1])
    targets = torch.randint(world.classes, (len(ids) - half,), generator=torch.Generator().manual_seed(seed))
    chance = Asked([world.cue_token], range(world.classes))
    entropy = torch.special.entr(posterior[half:]).sum(-1)
    found = steerability(
        model, ids[half:], SITE, vectors, chance, targets=targets, uncertainty=entropy,
        positions=range(1, world.clues + 1), norm=NORM, seed=seed,
    )  # fmt: skip
    late, early = range(OPEN, world.clues + 1), range(1, OPEN)
    rho = found.association(late)
    free = found.association(late, gain="excess_logit")
    return {
        "gain": float(found.frame["directed"].mean()),
        "control_gain_of_random_vectors": float(found.frame["random"].mean()),
        "rho": rho["rho"],
        "rho_partial": rho["partial"],
        "rho_within": rho["within"],
        "rho_early": found.association(early)["rho"],
        "rho_of_log_odds": free["rho"],
        "rho_within_of_log_odds": free["within"],
        "control_rho_of_random_vectors": found.association(late, gain="random")["rho"],
    }


def _forking(
    model: Model, world: ClueChain, chains: Chains, posterior: Tensor, paths: int, seed: int
) -> dict[str, float]:
    """Distance of the sampled outcome distributions from the exact ones, along the chains' own clues."""
    apart, near, drift, foreign = [], [], [], []
    for i in range(paths):
        level, rest = chains.tokens[i, :1], chains.tokens[i, 1:]
        found = forking_paths(
            model, level, lambda ids: next((one for one in ids if one < world.classes), None), base=rest.tolist(),
            max_new_tokens=world.clues + 2, samples=SAMPLES, stop=range(world.classes), seed=seed,
        )  # fmt: skip
        sampled = torch.zeros(len(found.base), world.classes, dtype=torch.float64)
        for column, outcome in enumerate(found.outcomes):
            if outcome is not None:
                sampled[:, outcome] = found.distribution[:, column]
        # Before clue t + 1 is chosen t clues are known; the cue changes nothing.
        exact = posterior[i][: world.clues + 1]
        mid = sampled[: world.clues + 1]
        apart.append(float((mid - exact).abs().sum(-1).mean() / 2))
        near.append(float((torch.special.entr(mid).sum(-1) - torch.special.entr(exact).sum(-1)).abs().mean()))
        drift.append(found.changes().expected)
        foreign.append(float((mid - posterior[i - 1]).abs().sum(-1).mean() / 2))
    return {
        "forking_total_variation": sum(apart) / paths,
        "forking_entropy_error": sum(near) / paths,
        "forking_changes_a_chain": sum(drift) / paths,
        "control_forking_total_variation_from_another_chain": sum(foreign) / paths,
    }


ENTRY = Entry(
    number=184,
    slug="road-not-taken",
    title="Are language models aware of the road not taken? Token-level uncertainty and hidden state dynamics",
    kind="measure",
    home="actome.decode.forking_paths",
    claim="On clue chains a linear map of the state is nearer to the exact distribution of outcomes (KL) than 0.3 of "
    "one of the current token and 0.8 of one of another subject's states; from the fourth clue on, what steering gains "
    "beyond random vectors goes with uncertainty, rho at least 0.3, and 0.1 among states with like chances of the "
    "target; distributions sampled along paths are within 0.15 of the exact ones.",
    test=test,
    takes={"smoke": "seconds", "small": "about two minutes"},
    open="Reasoning written by a language model; change points of real chains of thought.",
)
