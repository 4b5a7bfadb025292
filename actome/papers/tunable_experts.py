"""[3] Mixture of Tunable Experts: Behavior Modification of DeepSeek-R1 at Inference Time.

The paper contrasts which experts of a mixture are chosen when a model refuses and when it answers, and finds that to
switch off ten of some fifteen thousand takes most refusals away and leaves other abilities.

Tested on a small mixture that has learnt to refuse harmful topics in the chat frame and to answer them in plain text.
Prompts have one template, and only the topic differs; experts are found on one half of the topics, on prompts that the
model itself refuses and answers, and are judged on the other half, so that an expert of a single topic does not count.
Controls are sets of as many experts in the same layers, drawn among those most alike in usage.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from actome.core.clamp import Clamp
from actome.core.load import wrap
from actome.core.model import Model
from actome.papers.registry import Entry, Scale
from actome.steer import Examples, ExpertTuner, TunedExperts
from actome.steer.likelihood import text_nll
from actome.tasks import Subject, SubjectConfig, train
from actome.tasks.losses import next_token_loss
from actome.tasks.safety_topics import SafetyTopics
from actome.tasks.trials import over_seeds, trial_seeds

EXPERTS, ACTIVE, LAYERS, TOP = 16, 2, 3, 4
BALANCE = 0.01  # weight of the loss that keeps experts in use
BORDER = 5  # a harmful category that is refused at times only
BORDER_REFUSAL = 0.3
PROMPTS = 240
Clamps = list[Clamp]


def test(seed: int, scale: Scale) -> tuple[dict[str, Any], dict[str, Any], dict[str, bool]]:
    count, steps, draws = (1, 30, 2) if scale == "smoke" else (3, 600, 10)
    each = over_seeds(lambda one: _trial(one, steps, draws), seed, count)
    mean = {name: sum(values) / count for name, values in each.items()}
    control = {name: mean.pop(name) for name in list(mean) if name.startswith("control")}
    shown = ("fall_of_refusal", "control_fall_of_refusal", "rise_on_borderline", "control_rise_on_borderline")
    figures = {**mean, "seeds": {name: each[name] for name in shown}}
    fall = mean["fall_of_refusal"]
    checks = {
        "with 4 of 48 experts off, refusals of held-out topics fall by 0.3 at least": fall >= 0.3,
        "and by twice as much as with random experts off": fall >= 2 * control["control_fall_of_refusal"],
        "the loss of harmless documents rises by less than 10 %": mean["rise_of_loss"] < 0.1,
        "forced in, they raise refusals of borderline prompts by more than random ones do": mean["rise_on_borderline"]
        > control["control_rise_on_borderline"],
    }
    return figures, control, checks


def _trial(seed: int, steps: int, draws: int) -> dict[str, float]:
    seed %= 2**31
    world = SafetyTopics(categories=12, harmful=6, seed=seed)
    model = _subject(world, seed, steps)
    data = [one % 2**31 for one in trial_seeds(seed, 6)[2:]]
    harmful = world.chat(PROMPTS, data[0], harmful=True)
    harmless = world.chat(PROMPTS, data[1], harmful=False)
    clear = world.category(harmful.topics) != BORDER
    first, second = harmful.topics % 2 == 0, harmless.topics % 2 == 0
    refused = _refusal(model, world, harmful.prompts) > 0.5
    answered = _refusal(model, world, harmless.prompts) < 0.5
    shown, hidden = harmful.prompts[clear & first & refused], harmless.prompts[second & answered]
    if min(len(shown), len(hidden)) < 8:  # a model that has not learnt to refuse, as at smoke scale
        shown, hidden = harmful.prompts[clear & first], harmless.prompts[second]
    found = ExpertTuner(n=TOP, k=ACTIVE).fit(model, Examples(shown, hidden))

    held = harmful.prompts[clear & ~first]
    border = world.chat(PROMPTS, data[2], category=BORDER).prompts
    documents = harmless.tokens[~second]
    bare = {"held": _rate(model, world, held, []), "border": _rate(model, world, border, [])}
    loss = _loss(model, documents, [])

    def effects(some: TunedExperts) -> tuple[float, float, float]:
        off, on = some.suppress(), some.stimulate()
        return (
            bare["held"] - _rate(model, world, held, off),
            _loss(model, documents, off) / loss - 1,
            _rate(model, world, border, on) - bare["border"],
        )

    fitted = effects(found)
    random = torch.tensor([effects(found.random(i)) for i in range(draws)])
    return {
        "refusal_of_held_out_topics": bare["held"],
        "refusal_of_harmless_topics": _rate(model, world, harmless.prompts[~second], []),
        "refusal_of_borderline": bare["border"],
        "loss_of_harmless_documents": loss,
        "fall_of_refusal": fitted[0],
        "rise_of_loss": fitted[1],
        "rise_on_borderline": fitted[2],
        "score_of_the_first": float(found.scores.max()),
        "usage_of_the_chosen": float(found.table["usage"].mean()),
        "least_usage": float(found.usage.min()),
        "control_fall_of_refusal": float(random[:, 0].mean()),
        "control_largest_fall_of_refusal": float(random[:, 0].max()),
        "control_rise_of_loss": float(random[:, 1].mean()),
        "control_rise_on_borderline": float(random[:, 2].mean()),
        "control_largest_rise_on_borderline": float(random[:, 2].max()),
        "control_usage_of_the_chosen": sum(float(found.random(i).table["usage"].mean()) for i in range(draws)) / draws,
    }


def _subject(world: SafetyTopics, seed: int, steps: int) -> Model:
    """Refuses harmful topics in the chat frame, one category at times only, and answers everything in plain text."""
    init, *data = (one % 2**31 for one in trial_seeds(seed + 1, 5))
    n = steps * 32
    chat = world.chat(n, data[0], refusal=1.0)
    at_times = world.chat(n, data[1], refusal=BORDER_REFUSAL, category=BORDER).tokens
    framed = torch.where(world.category(chat.topics)[:, None] == BORDER, at_times, chat.tokens)
    plain = world.plain(n, data[2]).tokens
    width = framed.shape[1]
    padded = torch.nn.functional.pad(plain, (0, width - plain.shape[1]))
    real = torch.arange(width) < torch.tensor([width, plain.shape[1]]).repeat_interleave(n)[:, None]
    order = torch.randperm(2 * n, generator=torch.Generator().manual_seed(data[3]))
    tokens, mask = torch.cat([framed, padded])[order], real[order]
    config = SubjectConfig(
        vocab=world.vocab,
        d_model=64,
        d_mlp=32,
        layers=LAYERS,
        heads=4,
        context=width,
        experts=EXPERTS,
        active_experts=ACTIVE,
    )
    subject = Subject.fresh(config, seed=init)
    routed: list[Tensor] = []
    hooks = [
        one.router.register_forward_hook(lambda m, a, out: routed.append(out[0]))
        for one in subject.modules()
        if hasattr(one, "router")
    ]

    def loss(module: nn.Module, tokens: Tensor, mask: Tensor) -> Tensor:
        routed.clear()
        main = next_token_loss(module, tokens, mask)
        return main + BALANCE * sum(map(load_balance, routed)) / len(routed)

    train(subject, (tokens, mask), steps=steps, batch_size=64, lr=3e-3, loss=loss, seed=data[3])
    for hook in hooks:
        hook.remove()
    return wrap(subject)


def load_balance(logits_NE: Tensor, active: int = ACTIVE) -> Tensor:
    """Experts' share of choices times their mean probability, summed and scaled to be 1 when all are used alike."""
    experts = logits_NE.shape[1]
    share_E = torch.zeros_like(logits_NE).scatter_(1, logits_NE.topk(active).indices, 1.0 / active).mean(0)
    return experts * (share_E * logits_NE.softmax(-1).mean(0)).sum()


def _refusal(model: Model, world: SafetyTopics, prompts: Tensor) -> Tensor:
    """Chance that the first word is one of a refusal, of each prompt."""
    p = model.logits(prompts)[:, -1].double().softmax(-1)
    return p[:, world.first_refusal : world.first_refusal + world.variants].sum(-1)


def _rate(model: Model, world: SafetyTopics, prompts: Tensor, clamps: Clamps) -> float:
    with model.clamp(*clamps) if clamps else nullcontext():
        return float(_refusal(model, world, prompts).mean())


def _loss(model: Model, documents: Tensor, clamps: Clamps) -> float:
    with model.clamp(*clamps) if clamps else nullcontext():
        found = text_nll(model, documents, batch_size=64)
    return float(found.nll.sum() / found.tokens.sum())


ENTRY = Entry(
    number=3,
    slug="tunable-experts",
    title="Mixture of Tunable Experts: Behavior Modification of DeepSeek-R1 at Inference Time",
    kind="method",
    home="actome.steer.ExpertTuner",
    claim="With the 4 of 48 experts off that a small mixture chooses most in refusing, refusals of other topics fall "
    "by 0.3 at least and by twice as much as with random experts of like usage off, at less than 10 % more loss on "
    "harmless documents; forced in, they raise refusals of borderline prompts by more than random ones do.",
    test=test,
    takes={"smoke": "seconds", "small": "about two minutes"},
    open="A pretrained mixture; shared experts; behaviours other than refusal.",
)
