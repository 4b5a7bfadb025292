"""[91] When Attention Sink Emerges in Language Models: An Empirical View.

The paper's reading of the attention sink: softmax must put its weight somewhere, so a head with nothing to do parks it
on the first token; take the sum-to-one away, or offer a key that costs nothing, and the first token is let go.

Tested on one-head decoders trained from scratch on bigram-backcopy text, where it is known when the head has nothing
to do: at every token that is no trigger ("ordinary queries").
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from actome.core.load import wrap
from actome.measures import SinkScore
from actome.papers.registry import Entry, Scale
from actome.tasks import Subject, SubjectConfig, next_token_loss, train
from actome.tasks.backcopy import Backcopy
from actome.tasks.trials import over_seeds, trial_seeds

LENGTH, BATCH = 64, 32
ARMS = {"softmax": {}, "sigmoid": {"attention": "sigmoid"}, "key_bias": {"key_bias": True}}


def test(seed: int, scale: Scale) -> tuple[dict[str, Any], dict[str, Any], dict[str, bool]]:
    count, steps = (1, 400) if scale == "smoke" else (3, 1500)
    found = over_seeds(lambda one: _trial(one, steps), seed, count)
    figures = {arm: _of(found, arm) for arm in ARMS}
    control = _of(found, "untrained")
    mean = {arm: {name: sum(runs) / len(runs) for name, runs in figures[arm].items()} for arm in ARMS}
    share = mean["softmax"]["first"]
    checks = {
        "softmax puts at least 0.2 of the weight of ordinary queries on the first token": share >= 0.2,
        "that is at least 3 times the row-normalised share with sigmoid": share >= 3 * mean["sigmoid"]["first"],
        "softmax and sigmoid reach the same loss within 0.02 nats": abs(
            mean["softmax"]["loss_above_floor"] - mean["sigmoid"]["loss_above_floor"]
        )
        <= 0.02,
        "a key bias takes at least 2 times the weight that is left on the first token": mean["key_bias"]["bias"]
        >= 2 * mean["key_bias"]["first"],
        "the untrained model is within 0.02 of the uniform causal average": all(
            abs(first - uniform) <= 0.02 for first, uniform in zip(control["first"], control["uniform"], strict=True)
        ),
    }
    return figures, control, checks


def _trial(seed: int, steps: int) -> dict[str, float]:
    """The figures of every arm and of the untrained model, as ``ARM FIGURE``."""
    world = Backcopy(seed=seed)
    corpus, heldout = (
        world.sample(n, LENGTH, seed=one) for n, one in zip((steps * BATCH, 512), trial_seeds(seed, 2), strict=True)
    )
    found = {}
    for arm, options in ARMS.items():
        shape = SubjectConfig(vocab=world.vocab, d_model=32, layers=1, heads=1, context=LENGTH, **options)
        subject = Subject.fresh(shape, seed=seed)
        if arm == "softmax":
            found |= {f"untrained {name}": value for name, value in sink(subject, world, heldout).items()}
        train(subject, corpus, batch_size=BATCH, weight_decay=0.1, seed=seed)
        found |= {f"{arm} {name}": value for name, value in sink(subject, world, heldout).items()}
    return found


@torch.no_grad()
def sink(subject: Subject, world: Backcopy, tokens_BT: Tensor) -> dict[str, float]:
    """Where the ordinary queries of held-out text look.

    Returns:
        ``first``: mean share of a row's weight on tokens that lies on the first one. ``uniform``: what an even spread
        over the past would give, which is not zero. ``first_weight``: the weight itself, before a row is made to sum to
        one. ``row_sum``: mean weight of a row on tokens, one for softmax.
        ``bias``: mean weight on the key bias, where there is one. ``sink_rate``: the paper's own metric, over all
        queries, with rows made to sum to one; epsilon is 0.2 as suits a tiny model. ``first_value``: norm of the first
        token's value over the mean norm of the others'. ``loss_above_floor``: in nats, over the least possible.
    """
    pattern, values = "blocks.0.attn.pattern", "blocks.0.attn.v"
    recording = wrap(subject).record(tokens_BT[:, :-1], [pattern, values])
    pattern_BHQS = recording[pattern]
    value_norms_BT = recording[values][:, 0].norm(dim=-1)
    ordinary_BQ = ~world.is_trigger(tokens_BT[:, :-1])
    ordinary_BQ[:, 0] = False  # the first token can only look at itself
    rows_NS = pattern_BHQS[:, 0][ordinary_BQ]
    weight_N = rows_NS.sum(-1)
    score = SinkScore(eps=0.2)
    score.update(pattern_BHQS / pattern_BHQS.sum(-1, keepdim=True))
    past_N = ordinary_BQ.nonzero()[:, 1] + 1
    return {
        "first": float((rows_NS[:, 0] / weight_N).mean()),
        "uniform": float((1 / past_N).mean()),
        "first_weight": float(rows_NS[:, 0].mean()),
        "row_sum": float(weight_N.mean()),
        **({"bias": float((1 - weight_N).mean())} if subject.config.key_bias else {}),
        "sink_rate": float(score.compute()["sink_rate"].mean()),
        "first_value": float(value_norms_BT[:, 0].mean() / value_norms_BT[:, 1:].mean()),
        "loss_above_floor": float(next_token_loss(subject, tokens_BT)) - world.floor(tokens_BT),
    }


def _of(found: dict[str, list[float]], arm: str) -> dict[str, list[float]]:
    return {name.removeprefix(f"{arm} "): runs for name, runs in found.items() if name.startswith(f"{arm} ")}


ENTRY = Entry(
    number=91,
    slug="attention-sink-metric",
    title="When Attention Sink Emerges in Language Models: An Empirical View",
    kind="measure",
    home="actome.measures.SinkScore",
    claim="Trained with softmax, a head with nothing to do puts at least 0.2 of its weight on the first token, at "
    "least 3 times the row-normalised share with sigmoid attention at equal loss; a learned key bias takes at least "
    "twice what remains there; an untrained model spreads it evenly. Means over seeds.",
    test=test,
    takes={"smoke": "about 6 seconds", "small": "two to three minutes"},
    open="Emergence over training steps, weight decay, prefix loss and windowed attention.",
)
