"""[183] Tracing the Traces: Latent Temporal Signals for Efficient and Accurate Reasoning.

The paper cuts a reasoning into segments and finds that the states of traces with a right answer travel further (net
change), by fewer detours (cumulative change) and more directly (aligned change) than those with a wrong one.

Tested where difficulty is known: a small transformer reads chains of clues and is asked for the class. After each clue
the state at the answer cue is taken, in all layers; a trace is correct when the model's own most probable answer after
the last clue is. All chains have the same length, for length leaks into cumulative change. Noisier chains are wrong
more often *and* move the state less, so the association is also told within one noise level, where difficulty is held
still, and beside that of the output's confidence.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from actome.core.load import wrap
from actome.core.model import Model
from actome.measures import trajectory_signals
from actome.papers.registry import Entry, Scale
from actome.tasks import Subject, SubjectConfig, train
from actome.tasks.clue_chain import Chains, ClueChain
from actome.tasks.trials import auroc, over_seeds, trial_seeds

MEDIUM = 1
SAMPLES, EARLY = 8, 4  # traces a question, and clues after which one of them is chosen


class Read(NamedTuple):
    """Chains as the model read them: states at the cue (layer, chain, step, width) and answers (chain, step, class)."""

    states: Tensor
    answers: Tensor


def test(seed: int, scale: Scale) -> tuple[dict[str, Any], dict[str, Any], dict[str, bool]]:
    count, steps, traces = (1, 150, 600) if scale == "smoke" else (3, 1500, 3000)
    seeds = over_seeds(lambda one: _trial(one, steps, traces), seed, count)
    mean = {name: sum(values) / count for name, values in seeds.items()}
    control = {name: mean.pop(name) for name in list(mean) if name.startswith("control")}
    figures = {**mean, "seeds": {name: seeds[name] for name in ("auc_net", "auc_net_within_medium", "gain_of_choice")}}
    # A choice reads the first clues of all traces and the rest of one; a vote reads all of all.
    clues = ClueChain().clues
    figures["steps_saved_against_voting"] = 1 - (SAMPLES * EARLY + clues - EARLY) / (SAMPLES * clues)
    chosen = mean["gain_of_choice"] >= 0.03 and figures["steps_saved_against_voting"] >= 0.4
    untrained = control["control_auc_net_within_medium_untrained"]
    checks = {
        "net change tells right from wrong traces, AUC at least 0.7": mean["auc_net"] >= 0.7,
        "and above 0.55 within the medium noise level": mean["auc_net_within_medium"] > 0.55,
        "one of 8 traces chosen by its net change after 4 clues is right more often than a random one, by 0.03": chosen,
        "before training it tells nothing within the medium level (AUC within 0.1 of a half)": abs(untrained - 0.5)
        < 0.1,
    }
    return figures, control, checks


def _trial(seed: int, steps: int, traces: int) -> dict[str, float]:
    data, tests, groups, init = trial_seeds(seed, 4)
    world = ClueChain(seed=seed)
    config = SubjectConfig(vocab=world.vocab, d_model=64, layers=3, heads=4, context=world.clues + 3)
    subject = Subject.fresh(config, seed=init % 2**31)
    untrained = wrap(Subject.fresh(config, seed=init % 2**31))
    train(subject, _lessons(world, steps * 64, data), batch_size=64, lr=3e-3, seed=seed % 2**31)
    model = wrap(subject)

    chains = world.sample(traces, tests, shown=world.clues)
    read = _read(model, world, chains)
    correct = read.answers[:, -1].argmax(-1) == chains.classes
    scores = _scores(read) | {"confidence": read.answers[:, -1].amax(-1)}
    medium = chains.levels == MEDIUM
    figures = {f"auc_{name}": auroc(score, correct) for name, score in scores.items()}
    figures |= {f"auc_{name}_within_medium": auroc(of[medium], correct[medium]) for name, of in scores.items()}
    exact = world.posterior(chains.clues, chains.levels)[:, -1]
    figures["kl_from_exact_posterior"] = float(
        (exact * (exact.clamp_min(1e-12) / read.answers[:, -1]).log()).sum(-1).mean()
    )
    figures["accuracy"] = float(correct.float().mean())
    figures |= _choice(model, world, traces // SAMPLES, groups, MEDIUM)
    mixed = _choice(model, world, traces // SAMPLES, groups, None)
    figures["gain_of_choice_among_levels"] = mixed["gain_of_choice"]
    still = _scores(_read(untrained, world, chains))["net"]
    figures["control_auc_net_untrained"] = auroc(still, correct)
    figures["control_auc_net_within_medium_untrained"] = auroc(still[medium], correct[medium])
    return figures


def _lessons(world: ClueChain, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Chains cut off anywhere, of which the answer alone is learnt."""
    chains = world.sample(count, seed)
    return chains.tokens, torch.arange(chains.tokens.shape[1]) == (chains.cue + 1)[:, None]


@torch.no_grad()
def _read(model: Model, world: ClueChain, chains: Chains) -> Read:
    """Asks for the answer after every clue."""
    states, answers = [], []
    cue = torch.full((len(chains.levels), 1), world.cue_token)
    for step in range(world.clues + 1):
        ids = torch.cat([chains.tokens[:, : step + 1], cue], 1)
        states.append(model.record(ids, "blocks.*.resid.post", positions=-1)["blocks.*.resid.post"])
        answers.append(model.logits(ids)[:, -1, : world.classes].softmax(-1))
    states_LBSD = torch.stack([one.flatten(2) for one in states], 2)
    return Read(states_LBSD, torch.stack(answers, 1).double())


def _scores(read: Read, steps: int | None = None) -> dict[str, Tensor]:
    """The signals of each trace in the direction of the claim, means over layers; of the first steps only, if given."""
    signals = trajectory_signals(read.states[:, :, : None if steps is None else steps + 1])
    return {
        "net": signals.net.mean(0),
        "cumulative": -signals.cumulative.mean(0),
        "aligned": signals.aligned.mean(0),
        "net_last_layer": signals.net[-1],
    }


def _choice(model: Model, world: ClueChain, questions: int, seed: int, level: int | None) -> dict[str, float]:
    """Accuracy with several traces a question, of one noise level or of any: by a vote, at random, chosen early."""
    # Traces of one question are chains of one class, of which up to seven of each class are left over.
    drawn = world.sample((questions + world.classes) * SAMPLES, seed, shown=world.clues, level=level)
    order = drawn.classes.argsort(stable=True)
    groups = [part[: len(part) // SAMPLES * SAMPLES] for part in order.split(torch.bincount(drawn.classes).tolist())]
    groups = torch.cat(groups).view(-1, SAMPLES)
    some = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed % 2**31))[:questions]
    index = groups[some].flatten()
    chains = Chains(*(field[index] for field in drawn))
    read = _read(model, world, chains)
    right = (read.answers[:, -1].argmax(-1) == chains.classes).view(-1, SAMPLES)
    votes = torch.nn.functional.one_hot(read.answers[:, -1].argmax(-1).view(-1, SAMPLES), world.classes).sum(1)
    chosen = _scores(read, EARLY)["net"].view(-1, SAMPLES).argmax(1)
    by_choice = float(right.gather(1, chosen[:, None]).float().mean())
    at_random = float(right.float().mean())
    voted = float((votes.argmax(-1) == chains.classes.view(-1, SAMPLES)[:, 0]).float().mean())
    return {
        "accuracy_chosen": by_choice,
        "accuracy_random": at_random,
        "accuracy_vote": voted,
        "gain_of_choice": by_choice - at_random,
    }


ENTRY = Entry(
    number=183,
    slug="latent-trajectory-signals",
    title="Tracing the Traces: Latent Temporal Signals for Efficient and Accurate Reasoning",
    kind="measure",
    home="actome.measures.LatentTrajectory",
    claim="On clue chains, the net change of the state at the answer cue tells right from wrong traces with an AUC of "
    "at least 0.7, above 0.55 within one noise level; and one of 8 traces chosen by it after half of the clues is "
    "right more often than a random choice by 0.03, with at least 40 % fewer steps than a vote.",
    test=test,
    takes={"smoke": "seconds", "small": "about two minutes"},
    open="Generated reasoning of a language model; thresholds by cross-validation and stopping after the first "
    "accepted trace come with decoding.",
)
