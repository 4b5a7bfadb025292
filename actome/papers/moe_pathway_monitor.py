"""[19] Where to Find Grokking in LLM Pretraining? Monitor Memorization-to-Generalization without Test.

The paper reads the routers of a mixture of experts on *training* samples whose loss has long converged, and finds that
their pathways become more alike, and each simpler, while the model still comes to generalise better.

Tested on one pass over text of a hidden Markov model, by a small language model of experts. The samples are rows that
it was trained on early; those count whose loss has settled by the middle one's convergence, and only checkpoints after
it. Since training alone may make pathways alike, the same model learns the same rows with their tokens in random order,
where beyond the frequencies of tokens there is nothing to learn: there the distance must fall by less than half as
much.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actome.core.load import wrap
from actome.measures import ExpertLoad, PathwayConsistency, PathwayDistance, expert_embeddings
from actome.papers.registry import Entry, Scale
from actome.tasks import Subject, SubjectConfig, train
from actome.tasks.hmm import HiddenMarkov
from actome.tasks.trials import spearman, trial_seeds

LENGTH, BATCH, SAMPLES = 32, 32, 256
EXPERTS, ACTIVE, LAYERS = 8, 2, 2
SETTLED = 0.1  # nats a token within which a row's loss stays near its last from its convergence on
SITES = "blocks.*.moe.weights"


def test(seed: int, scale: Scale) -> tuple[dict[str, Any], dict[str, Any], dict[str, bool]]:
    count, steps, looks = (1, 60, 10) if scale == "smoke" else (3, 1000, 25)
    seeds = [one % 2**31 for one in trial_seeds(seed, count)]
    runs = [_trial(one, steps, steps // looks, shuffled=False) for one in seeds]
    shuffled = [_trial(one, steps, steps // looks, shuffled=True) for one in seeds]

    def mean(runs: list[dict[str, Any]], of: Any) -> float:
        return sum(of(run) for run in runs) / len(runs)

    def associated(name: str) -> Any:
        return lambda run: spearman(run[name], run["performance"])

    figures = {
        "spearman_distance_performance": mean(runs, associated("distance")),
        "spearman_complexity_performance": mean(runs, associated("complexity")),
        "fall_of_distance": mean(runs, lambda run: _fall(run["distance"])),
        "rise_of_performance": mean(runs, lambda run: -_fall(run["performance"])),
        "load_entropy": mean(runs, lambda run: min(run["load_entropy"])),
        "runs": [_ends(run) for run in runs],
    }
    control = {
        "spearman_distance_performance_shuffled": mean(shuffled, associated("distance")),
        "fall_of_distance_shuffled": mean(shuffled, lambda run: _fall(run["distance"])),
        "rise_of_performance_shuffled": mean(shuffled, lambda run: -_fall(run["performance"])),
        "load_entropy_shuffled": mean(shuffled, lambda run: min(run["load_entropy"])),
        "runs_shuffled": [_ends(run) for run in shuffled],
    }
    fall = figures["fall_of_distance"]
    checks = {
        "pathway distance of converged samples falls as held-out performance rises, Spearman at most -0.5": figures[
            "spearman_distance_performance"
        ]
        <= -0.5,
        "with shuffled text the distance falls by less than half as much": fall > 0
        and control["fall_of_distance_shuffled"] < 0.5 * fall,
        "the experts stay in use, load entropy above 0.5": figures["load_entropy"] > 0.5,
    }
    return figures, control, checks


def _trial(seed: int, steps: int, every: int, shuffled: bool) -> dict[str, Any]:
    """What is measured at each checkpoint after the samples have converged."""
    world = HiddenMarkov(seed=seed)
    text = world.sample(steps * BATCH, LENGTH, seed + 1).tokens
    heldout = world.sample(SAMPLES, LENGTH, seed + 2).tokens
    if shuffled:
        text, heldout = _in_random_order(text, seed), _in_random_order(heldout, seed)
    # Rows of the first fifth of the pass.
    early = torch.randperm(len(text) // 5, generator=torch.Generator().manual_seed(seed))[:SAMPLES]
    samples = text[early]
    config = SubjectConfig(
        vocab=world.vocab,
        d_model=32,
        d_mlp=32,
        layers=LAYERS,
        heads=2,
        context=LENGTH,
        experts=EXPERTS,
        active_experts=ACTIVE,
    )
    subject = Subject.fresh(config, seed=seed)
    checkpoints = range(every, steps + 1, every)
    training = train(subject, text, batch_size=BATCH, lr=3e-3, checkpoints=checkpoints, seed=seed)

    modules = [training.at(step) for step in checkpoints]
    loss_CN = torch.stack([_loss(module, samples) for module in modules])
    apart = (loss_CN - loss_CN[-1]).abs() > SETTLED
    # The first checkpoint after the last at which the loss was elsewhere.
    since_N = torch.where(apart, torch.arange(1, len(modules) + 1)[:, None], 0).amax(0)
    start = min(int(since_N.median()), len(modules) - 2)
    group = samples[since_N <= start]

    rows: dict[str, Any] = {"steps": list(checkpoints)[start:], "samples": len(group)}
    for module in modules[start:]:
        model = wrap(module)
        measures = [PathwayDistance(ACTIVE), PathwayConsistency(expert_embeddings(model), ACTIVE), ExpertLoad()]
        table = model.measure(group, {SITES: measures}, batch_size=SAMPLES)
        found = {
            "performance": -float(_loss(module, heldout).mean()),
            "loss": float(_loss(module, group).mean()),
            "distance": float(table.value("pathway_distance")[-1]),
            "complexity": float(table.value("pathway_complexity")[1:].mean()),
            "load_entropy": float(table.value("load_entropy").min()),
        }
        for name, value in found.items():
            rows.setdefault(name, []).append(value)
    return rows


def _in_random_order(text: Tensor, seed: int) -> Tensor:
    """Each row with its tokens in an order of its own."""
    keys = torch.rand(text.shape, generator=torch.Generator().manual_seed(seed + 3))
    return text.gather(1, keys.argsort(1))


@torch.no_grad()
def _loss(module: nn.Module, tokens: Tensor) -> Tensor:
    """Mean next-token loss of each row."""
    logits = module(tokens[:, :-1]).logits
    return F.cross_entropy(logits.mT, tokens[:, 1:], reduction="none").mean(1)


def _fall(values: list[float]) -> float:
    """From the first fifth of the checkpoints to the last."""
    part = max(1, len(values) // 5)
    return (sum(values[:part]) - sum(values[-part:])) / part


def _ends(run: dict[str, Any]) -> dict[str, Any]:
    return {name: [one[0], one[-1]] if isinstance(one, list) else one for name, one in run.items()}


ENTRY = Entry(
    number=19,
    slug="moe-pathway-monitor",
    title="Where to Find Grokking in LLM Pretraining? Monitor Memorization-to-Generalization without Test",
    kind="measure",
    home="actome.measures.PathwayDistance",
    claim="While a small mixture of experts passes once over text of a hidden Markov model, the pathway distance of "
    "training samples whose loss has converged falls as held-out performance rises (Spearman at most -0.5), and with "
    "text in random order by less than half as much.",
    test=test,
    takes={"smoke": "seconds", "small": "about two minutes"},
    open="Delayed generalisation, as on modular addition, which did not come in pilots of 500 to 3000 steps; groups "
    "of samples by when their loss converged.",
)
