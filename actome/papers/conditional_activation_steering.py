"""[232] Programming Refusal with Conditional Activation Steering.

The paper steers a language model towards refusal only when the prompt's own activations lie along a direction that
stands for a category of prompts, with rules over several such conditions.

Tested on topics in five categories. A subject learns documents of two exchanges in the chat frame: both on one
category, both refused in a tenth of the documents, whatever the category. So it can refuse, and hardly ever does by
itself. The behaviour is the first component of pairs of documents that differ in the first answer, a refusal or the
right one, read at the end of the second prompt; its site and strength are chosen on validation prompts without any
condition. Each category's condition is fitted on pairs of prompts that differ in the topic alone. Judged is what is
generated for new prompts. Controls: the behaviour without a condition, a random behaviour of the same length under the
true condition, and conditions fitted on shuffled labels.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from actome.clamps import Add
from actome.core.clamp import Clamp, When
from actome.core.load import wrap
from actome.core.model import Model
from actome.papers.registry import Entry, Scale
from actome.steer import Condition, Contrast, Examples, Rule, Steering, when
from actome.steer.conditions import before
from actome.tasks import Subject, SubjectConfig, train
from actome.tasks.safety_topics import Exchange, SafetyTopics
from actome.tasks.trials import over_seeds, trial_seeds

CATEGORIES, FILLERS = 5, 2
BEHAVIOUR, STRENGTHS = "blocks.{1..2}.resid.post", (1.0, 1.5, 2.0)
CONDITIONS, PROMPTS = "blocks.{0..1}.resid.{mid,post}", 600
# Over three of the five conditions: which categories each rule asks to refuse.
RULES = {"c0 or c1": {0, 1}, "not c2": {0, 1, 3, 4}}


def test(seed: int, scale: Scale) -> tuple[dict[str, Any], dict[str, Any], dict[str, bool]]:
    smoke = scale == "smoke"
    count, steps, prompts = (1, 20, 60) if smoke else (3, 500, 400)
    each = over_seeds(lambda one: _trial(one, steps, prompts), seed, count)
    mean = {name: sum(values) / count for name, values in each.items()}
    control = {name: mean.pop(name) for name in list(mean) if name.startswith("control")}
    shown = ("target", "others", "worst_target", "worst_others", *(f"rule {rule}" for rule in RULES))
    figures = {**mean, "seeds": {name: each[name] for name in shown}}
    checks = {
        "by itself the model refuses less than 0.2": mean["base"] < 0.2,
        "with a condition on one category it refuses at least 0.8 of its prompts": mean["target"] >= 0.8,
        "and of the others at most 0.1 more than by itself": mean["others"] <= mean["base_others"] + 0.1,
        "without a condition it refuses at least 0.5 of the others": control["control_unconditional_others"] >= 0.5,
        **{
            f"under the rule '{rule}' balanced accuracy is at least 0.85": mean[f"rule {rule}"] >= 0.85
            for rule in RULES
        },
        "conditions of shuffled labels tell at most 0.3 of what true ones do, in the difference of the two rates": abs(
            control["control_shuffled_target"] - control["control_shuffled_others"]
        )
        <= 0.3 * (mean["target"] - mean["others"]),
    }
    return figures, control, checks


def _trial(seed: int, steps: int, count: int) -> dict[str, float]:
    data, init, fit, choose, judge, draw = (one % 2**31 for one in trial_seeds(seed, 6))
    world = SafetyTopics(categories=CATEGORIES, harmful=1, seed=seed % 2**31)
    text = world.documents(steps * 64, data, distractors=FILLERS)
    config = SubjectConfig(vocab=world.vocab, d_model=64, layers=3, heads=4, context=32, positions="rotary")
    subject = Subject.fresh(config, seed=init)
    train(subject, text.tokens, batch_size=64, lr=3e-3, seed=data)
    model = wrap(subject)

    behaviour = _behaviour(model, world, fit, world.chat(count, choose, distractors=FILLERS))
    asked = world.chat(count, judge, distractors=FILLERS)
    category = world.category(asked.topics)
    earlier = before(model, CONDITIONS, behaviour.site)
    conditions, shuffled = (
        {f"c{k}": _condition(model, world, k, earlier, fit + 1, draw if mixed else None) for k in range(CATEGORIES)}
        for mixed in (False, True)
    )
    base, always = _refuses(model, world, asked), _refuses(model, world, asked, behaviour)
    noise = torch.randn(config.d_model, generator=torch.Generator().manual_seed(draw))
    random = Add(behaviour.site, noise * (behaviour.scale * behaviour.value.norm() / noise.norm()))

    def rates(clamp: Clamp, known: dict[str, When]) -> tuple[list[float], list[float]]:
        found = [_refuses(model, world, asked, when(clamp, known[f"c{k}"])) for k in range(CATEGORIES)]
        inside = [float(x[category == k].float().mean()) for k, x in enumerate(found)]
        return inside, [float(x[category != k].float().mean()) for k, x in enumerate(found)]

    target, others = rates(behaviour, conditions)
    figures = {
        "base": float(base.float().mean()),
        "target": sum(target) / CATEGORIES,
        "others": sum(others) / CATEGORIES,
        "worst_target": min(target),
        "worst_others": max(others),
        "f1_of_the_fit": sum(one.f1 or 0.0 for one in conditions.values()) / CATEGORIES,  # type: ignore[attr-defined]
        "behaviour_block": float(behaviour.site.split(".")[1]),
        "strength": behaviour.scale,
    }
    figures["base_others"] = figures["base"]  # the mean over targets of the rate among all but the target
    for rule, wanted in RULES.items():
        refused = _refuses(model, world, asked, when(behaviour, Rule(rule=rule, conditions=conditions)))
        inside = torch.tensor([int(one) in wanted for one in category])
        figures[f"rule {rule}"] = float((refused[inside].float().mean() + (~refused[~inside]).float().mean()) / 2)
    figures["control_unconditional_others"] = float(always.float().mean())
    figures["control_random_target"] = sum(rates(random, conditions)[0]) / CATEGORIES
    mixed = rates(behaviour, shuffled)
    figures["control_shuffled_target"], figures["control_shuffled_others"] = (sum(one) / CATEGORIES for one in mixed)
    return figures


def _behaviour(model: Model, world: SafetyTopics, seed: int, asked: Exchange) -> Steering:
    """Towards refusal, at the site and strength that make the model refuse most of the validation prompts."""
    first = [world.chat(150, seed, refusal=rate, over_refusal=rate, distractors=FILLERS) for rate in (1.0, 0.0)]
    second = world.chat(150, seed + 1, distractors=FILLERS).prompts[:, 1:]
    examples = Examples(*(torch.cat((one.tokens, second), 1) for one in first))
    found = Contrast(BEHAVIOUR, method="pca", over="last", batch_size=64).fit(model, examples)
    tried = [found.to(site, strength) for strength in STRENGTHS for site in found.directions or {}]
    return max(tried, key=lambda one: float(_refuses(model, world, asked, one).float().mean()))


def _condition(model: Model, world: SafetyTopics, category: int, sites: str, seed: int, shuffle: int | None) -> When:
    """Fitted on prompts that differ from one another in the topic alone; the same draw gives the same details."""
    inside = world.chat(PROMPTS, seed, distractors=FILLERS, category=category).prompts
    drawn = world.chat(PROMPTS, seed, distractors=FILLERS)
    keep = world.category(drawn.topics) != category
    prompts, others = inside[keep], drawn.prompts[keep]
    if shuffle is not None:
        swap = torch.rand(len(prompts), 1, generator=torch.Generator().manual_seed(shuffle)) < 0.5
        prompts, others = prompts.where(~swap, others), others.where(~swap, prompts)
    return Condition(sites, batch_size=64).fit(model, prompts, others)


def _refuses(model: Model, world: SafetyTopics, asked: Exchange, *clamps: Clamp) -> Tensor:
    """Which prompts the model refuses, in all three words of what it generates, (B) bool."""
    with model.clamp(*clamps) if clamps else nullcontext():
        said = model.generate(asked.prompts, max_new_tokens=3, eos_token_id=None).new
    return world.judge(torch.as_tensor(said), asked.topics, asked.details)[0]


ENTRY = Entry(
    number=232,
    slug="conditional-activation-steering",
    title="Programming Refusal with Conditional Activation Steering",
    kind="method",
    home="actome.steer.Condition",
    claim="A model that refuses less than 0.2 by itself is steered to refuse at least 0.8 of one category of prompts "
    "and at most 0.1 more than before of the others, where the same vector without a condition refuses at least 0.5 of "
    "them; rules with 'or' and 'not' reach a balanced accuracy of 0.85; shuffled labels tell at most 0.3 as much.",
    test=test,
    takes={"smoke": "seconds", "small": "about a minute and a half"},
    open="Language models; conditions on categories in natural text; the cap on the norm after addition.",
)
