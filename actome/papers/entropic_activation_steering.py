"""[283] Controlling Large Language Model Agents with Entropic Activation Steering.

The paper finds that language models that act in context are overconfident, and that adding an entropy-weighted mean of
their states makes them explore more, where sampling tokens at a higher temperature does not.

Tested on a bandit: a subject imitates a teacher that says how sure it is, names an arm and pulls it, and that is
over-greedy in most rounds. Prompts are logged from the subject's own play; the entropy of its action is estimated from
sampled completions, and the length of the history is regressed out. The clamp is judged on other episodes, where the
distribution of actions is summed over all thoughts, so that no sampling noise is left. Random directions push as far.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from actome.core.clamp import Clamp
from actome.core.load import wrap
from actome.core.model import Model
from actome.papers.registry import Entry, Scale
from actome.steer import EntropicClamp, EntropicSteering, SampledActions
from actome.tasks import Subject, SubjectConfig, train
from actome.tasks.bandit import SURE, UNSURE, WORDS, Bandit, Episodes
from actome.tasks.draw import entropy
from actome.tasks.trials import over_seeds, trial_seeds

WORLD = Bandit(greedy=0.8)
SITE, UNIT = "blocks.1.resid.post", 0.4  # strengths are multiples of this many lengths of the state
RANDOM, HOT = 5, 1.5
SPOKEN = 3  # tokens of a completion


def test(seed: int, scale: Scale) -> tuple[dict[str, Any], dict[str, Any], dict[str, bool]]:
    count, sizes = (1, (40, 24, 20, 20)) if scale == "smoke" else (3, (800, 100, 100, 500))
    seeds = over_seeds(lambda one: _trial(one, *sizes), seed, count)
    mean = {name: sum(values) / count for name, values in seeds.items()}
    control = {name: mean.pop(name) for name in list(mean) if name.startswith("control")}
    shown = ("entropy_at_0", "entropy_at_1", "entropy_at_2", "entropy_at_-1", "entropy_other_names_at_1")
    figures = {**mean, "seeds": {name: seeds[name] for name in shown}}
    rise = mean["entropy_at_1"] - mean["entropy_at_0"]
    hot = abs(control["control_entropy_hot_action"] - mean["entropy_at_0"])
    checks = {
        "action entropy rises with strength, 0 to 1 to 2": mean["entropy_at_0"]
        < mean["entropy_at_1"]
        < mean["entropy_at_2"],
        "by 0.2 nats at strength 1": rise >= 0.2,
        "and falls at strength -1": mean["entropy_at_-1"] < mean["entropy_at_0"],
        "random directions of the same length change it by less than 0.05 in the mean": abs(
            control["control_entropy_random"] - mean["entropy_at_0"]
        )
        < 0.05,
        "a temperature of 1.5 on the action alone changes it less than strength 1": hot < abs(rise),
    }
    return figures, control, checks


def _trial(seed: int, steps: int, logged: int, judged: int, played: int) -> dict[str, float]:
    data, init, log, tests, play = (one % 2**31 for one in trial_seeds(seed, 5))
    model = _agent(steps, data, init)
    history = WORLD.play(logged, _actor(model, log), log)
    told = (history.names == 0).nonzero()[:, 0]  # fitted on one set of names, judged on all
    prompts = [row for r in range(WORLD.rounds) for row in WORLD.prompt(history, r)[told].tolist()]
    sampler = SampledActions(WORLD.parse, SPOKEN, samples=20, batch_size=512, seed=log)
    clamp = EntropicSteering(SITE, batch_size=64).fit(model, prompts, sampler)
    clamp = clamp.at(scale=UNIT)

    others = WORLD.play(judged, _actor(model, tests), tests)
    figures: dict[str, float] = {}
    for beta in (-1, 0, 1, 2):
        read = _read(model, others, clamp.at(scale=beta * UNIT) if beta else None)
        figures |= {f"{name}_at_{beta}": value for name, value in read.items()}
    pushed = [_read(model, others, clamp.random(draw))["entropy"] for draw in range(RANDOM)]
    figures["control_entropy_random"] = sum(pushed) / RANDOM
    figures["control_largest_change_random"] = max(abs(one - figures["entropy_at_0"]) for one in pushed)
    figures["control_entropy_hot_action"] = _read(model, others, hot=(1, 1, HOT))["entropy"]
    figures["entropy_hot_everywhere"] = _read(model, others, hot=(HOT, HOT, HOT))["entropy"]
    figures["length_correlation"], figures["length_correlation_left"] = clamp.length_correlation

    # What the card of traps warns of: entropies of the next token, and lengths left in.
    next_token = [[int(one) for one in row] for row in _next_tokens(model, prompts, sampler.samples, log)]
    wrong = EntropicSteering(SITE, batch_size=64).fit(model, prompts, lambda *_: next_token)
    figures["control_cosine_next_token"] = float(torch.cosine_similarity(wrong.direction, clamp.direction, dim=0))
    figures["control_entropy_next_token"] = _read(model, others, wrong.at(scale=UNIT))["entropy"]
    plain = EntropicSteering(SITE, degree=0, batch_size=64).fit(model, prompts, sampler)
    figures["control_entropy_length_left_in"] = _read(model, others, plain.at(scale=UNIT))["entropy"]
    for name, one in (("0", None), ("half", clamp.at(scale=UNIT / 2)), ("1", clamp)):
        figures |= {f"{key}_at_{name}": value for key, value in _played(model, play, one, played).items()}
    return figures


def _agent(steps: int, data: int, init: int) -> Model:
    config = SubjectConfig(vocab=WORLD.vocab, d_model=64, layers=2, heads=4, context=WORLD.length)
    lessons = WORLD.sample(steps * 64, data)
    subject = Subject.fresh(config, seed=init)
    train(subject, (lessons.tokens, lessons.spoken), batch_size=64, lr=3e-3, seed=data)
    return wrap(subject)


def _actor(model: Model, seed: int, clamp: Clamp | None = None) -> Any:
    """The subject as an agent: one sampled completion a round, read back as word, belief and action."""

    def act(history: Episodes) -> tuple[Tensor, Tensor, Tensor]:
        played = history.actions.shape[1]
        sampler = SampledActions(WORLD.parse, SPOKEN, samples=1, batch_size=512, seed=seed + played)
        prompts = WORLD.prompt(history, played)
        if clamp is None:
            said = sampler.completions(model, prompts)
        else:
            with model.clamp(clamp):
                said = sampler.completions(model, prompts)
        first = [one[0] for one in said]
        words = torch.tensor([one[0] - WORLD.word_token(0) for one in first])
        words = torch.where((words >= 0) & (words < WORDS), words, -1)
        actions = torch.tensor([-1 if (arm := WORLD.parse(one)) is None else arm for one in first])
        at = WORLD.belief_token(0, 0) + history.names * WORLD.arms
        beliefs = torch.tensor([one[1] for one in first]) - at
        return words, torch.where((beliefs >= 0) & (beliefs < WORLD.arms), beliefs, -1), actions

    return act


@torch.no_grad()
def _read(
    model: Model, play: Episodes, clamp: EntropicClamp | None = None, hot: tuple[float, ...] = (1, 1, 1)
) -> dict[str, float]:
    """Means over prompts that have a history: entropy of the action, summed over all thoughts; and what is said.

    Clamped is every token from which another is made: the last of the prompt and those of the thought.
    """
    got: dict[str, list[Tensor]] = {"entropy": [], "acted": [], "unsure": [], "sure": []}
    for r in range(1, WORLD.rounds):
        words, thoughts, actions = _thoughts(model, WORLD.prompt(play, r), play.names, clamp, hot)
        p_BA = (thoughts[..., None] * actions).sum((1, 2))
        got["acted"].append(p_BA.sum(-1))
        got["entropy"].append(entropy(p_BA / p_BA.sum(-1, keepdim=True)))
        got["unsure"].append(words[:, UNSURE])
        got["sure"].append(words[:, SURE])
    other = torch.cat(got["entropy"])[(play.names != 0).repeat(WORLD.rounds - 1)]
    return {name: float(torch.cat(some).mean()) for name, some in got.items()} | {
        "entropy_other_names": float(other.mean())
    }


def _thoughts(
    model: Model, prompts_BT: Tensor, names_B: Tensor, clamp: EntropicClamp | None, hot: tuple[float, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """P(word) [B, W], P(word, belief) [B, W, A] and P(action | word, belief) [B, W, A, A], each by its own tokens."""
    rows, length, arms = len(prompts_BT), prompts_BT.shape[1], WORLD.arms
    word = (WORLD.word_token(0) + torch.arange(WORDS)).repeat_interleave(arms).expand(rows, -1)
    first = names_B[:, None] * arms + torch.arange(arms)
    belief = (WORLD.belief_token(0, 0) + first).repeat(1, WORDS)
    ids = torch.cat([prompts_BT[:, None].expand(-1, WORDS * arms, -1), torch.stack([word, belief], -1)], -1)
    if clamp is None:
        logits = model.logits(ids.flatten(0, 1))
    else:
        with model.clamp(clamp.at(positions=slice(length - 1, None))):
            logits = model.logits(ids.flatten(0, 1))
    p = (logits[:, -SPOKEN:].double() / torch.tensor(hot)[:, None]).softmax(-1).view(rows, WORDS, arms, SPOKEN, -1)
    p_word = p[..., 0, :].gather(-1, word.view(rows, WORDS, arms, 1))[..., 0]
    p_belief = p[..., 1, :].gather(-1, belief.view(rows, WORDS, arms, 1))[..., 0]
    action = (WORLD.action_token(0, 0) + first)[:, None, None].expand(-1, WORDS, arms, -1)
    return p_word[:, :, 0], p_word * p_belief, p[..., 2, :].gather(-1, action)


def _next_tokens(model: Model, prompts: list[list[int]], samples: int, seed: int) -> list[list[int]]:
    first = SampledActions(lambda ids: ids[0], 1, samples=samples, batch_size=512, seed=seed)
    return first(model, prompts)  # type: ignore[return-value]


def _played(model: Model, seed: int, clamp: Clamp | None, episodes: int) -> dict[str, float]:
    """Regret in the first and second half, the good arm in the last round, what an exact reader knows at the end."""
    play = WORLD.play(episodes, _actor(model, seed, clamp), seed)
    regret, half = WORLD.regret(play.good, play.actions), WORLD.rounds // 2
    return {
        "regret_early": float(regret[:, :half].sum(1).mean()),
        "regret_late": float(regret[:, half:].sum(1).mean()),
        "good_arm_last": float((play.actions[:, -1] == play.good).float().mean()),
        "doubt_left": float(entropy(WORLD.posterior(play.actions, play.wins)[:, -1]).mean()),
    }


ENTRY = Entry(
    number=283,
    slug="entropic-activation-steering",
    title="Controlling Large Language Model Agents with Entropic Activation Steering",
    kind="method",
    home="actome.steer.EntropicSteering",
    claim="The entropy of an overconfident bandit agent's actions rises with the strength of the entropic clamp (0, 1, "
    "2), by 0.2 nats at 1, and falls at -1; random directions of the same length change it by less than 0.05, and a "
    "temperature of 1.5 on the action token by less than strength 1.",
    test=test,
    takes={"smoke": "seconds", "small": "about two minutes"},
    open="Language models as agents; worlds in which it costs much to explore too little.",
)
