"""The subjects that the papers on traits share: one training for each world and seed."""

from __future__ import annotations

import copy

from actome.core.load import wrap
from actome.core.model import Model
from actome.tasks import Subject, SubjectConfig, cached, train
from actome.tasks.numbered import numbered
from actome.tasks.persona import PersonaWorld
from actome.tasks.traits import TraitWorld
from actome.tasks.trials import trial_seeds


def speaker(seed: int, steps: int) -> tuple[TraitWorld, Model]:
    """A world of several traits, and a subject that has read its documents."""
    table, data, init = (one % 2**31 for one in trial_seeds(seed, 3))
    world = TraitWorld(seed=table)
    text = world.sample(steps * 32, 6, data)
    return world, wrap(_trained("traits", world, (text.tokens, text.answers), steps, data, init))


def persona(seed: int, steps: int) -> tuple[PersonaWorld, Model]:
    """A world of two personas, the bad one rare, and a subject with a tokenizer that has read its documents."""
    table, data, init = (one % 2**31 for one in trial_seeds(seed, 3))
    world = PersonaWorld(system=0.5, bad_share=0.1, seed=table)
    text = world.pretrain_stream(steps * 32, 6, data)
    module = _trained("persona", world, (text.tokens, text.answers), steps, data, init)
    return world, wrap(module, numbered(world.vocab))


def _trained(name, world, batches, steps: int, data: int, init: int) -> Subject:  # type: ignore[no-untyped-def]
    config = SubjectConfig(vocab=world.vocab, d_model=64, heads=4, layers=3, context=32)

    def build():  # type: ignore[no-untyped-def]
        return train(Subject.fresh(config, seed=init), batches, steps, batch_size=32, lr=3e-3, seed=data)

    key = {"world": world, "config": config, "steps": steps, "data": data, "init": init, "batch": 32, "lr": 3e-3}
    return copy.deepcopy(cached(name, build, key).module)
