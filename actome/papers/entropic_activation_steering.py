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

from actome.clamps import Scale as ScaleClamp
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
SITE, UNIT = "blocks.1.resid.post", 0.5  # strengths are multiples of this many lengths of the state
BETAS = (-1.0, 0.0, 1.0, 2.0)
RANDOM, HOT = 5, 1.5
SPOKEN = 3  # tokens of a completion


def _trial(seed: int, steps: int, logged: int, judged: int) -> dict[str, float]:
    data, init, log, tests, play = (one % 2**31 for one in trial_seeds(seed, 5))
    model = _agent(steps, data, init)
    history = WORLD.play(logged, _actor(model, log), log)
    sampler = SampledActions(WORLD.parse, SPOKEN, samples=20, batch_size=512, seed=log)
    prompts = [row for r in range(WORLD.rounds) for row in WORLD.prompt(history, r).tolist()]
    clamp = EntropicSteering(SITE, batch_size=64).fit(model, prompts, sampler)

    others = WORLD.play(judged, _actor(model, tests), tests)
    figures: dict[str, float] = {}
    for beta in BETAS:
        figures |= _read(model, others, f"beta_{beta:g}", clamp.at(scale=beta * UNIT) if beta else None)
    return figures


def _agent(steps: int, data: int, init: int) -> Model:
    config = SubjectConfig(vocab=WORLD.vocab, d_model=64, layers=3, heads=4, context=WORLD.length)
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
