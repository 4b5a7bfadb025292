"""The model that several reproductions on PersonaWorld start from: trained once for a seed, and kept."""

from __future__ import annotations

from actome.core.load import wrap
from actome.core.model import Model
from actome.tasks import Subject, SubjectConfig, cached, train
from actome.tasks.persona import PersonaWorld
from actome.tasks.self_correction import SelfCorrection
from actome.tasks.trials import trial_seeds

ITEMS, ROWS = 6, 64


def base(seed: int, steps: int) -> tuple[SelfCorrection, Model]:
    """A world, and a subject that knows its questions; one token, the correction mark, it has never seen.

    The targets are answers and the questions that follow them.
    """
    tables, text_seed, init, order = (one % 2**31 for one in trial_seeds(seed, 4))
    task = SelfCorrection(PersonaWorld(system=0.5, seed=tables))
    config = SubjectConfig(vocab=task.vocab, d_model=64, layers=3, heads=4, context=32)

    def build():
        text = task.world.pretrain_stream(steps * ROWS, ITEMS, text_seed)
        targets = text.answers.clone()
        targets[:, 4::3] = True
        return train(Subject.fresh(config, init), (text.tokens, targets), batch_size=ROWS, lr=3e-3, seed=order)

    key = {"world": task.world, "config": config, "steps": steps, "rows": ROWS, "items": ITEMS, "seed": seed}
    return task, wrap(cached("persona-base", build, key).module)
