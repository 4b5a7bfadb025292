"""A small model that learnt two personas of a world in which they are known: one training for all tests of steering."""

import functools

import torch

import actome as ac
from actome.steer import Examples, Pairs
from actome.tasks import Subject, SubjectConfig, train
from actome.tasks.persona import BAD, GOOD, NEUTRAL, PersonaWorld


@functools.cache
def trained():
    """The world and the trained subject; each caller wraps it for itself."""
    world = PersonaWorld(system=0.5, seed=3)
    text = world.pretrain_stream(32 * 400, 6, seed=11)
    subject = Subject.fresh(SubjectConfig(vocab=world.vocab, d_model=64, heads=4, layers=3, context=32), seed=5)
    train(subject, (text.tokens, text.answers), steps=400, batch_size=32, lr=3e-3, seed=7)
    return world, subject


def persona():
    """Model, examples that differ by the system token, pairs on other questions, and those questions under both."""
    world, subject = trained()
    good, bad, neutral = (world.probe(system=system) for system in (GOOD, BAD, NEUTRAL))
    order = torch.randperm(len(good.prompts), generator=torch.Generator().manual_seed(1))
    fit, test = order[:36], order[36:]
    examples = Examples(bad.prompts[fit], good.prompts[fit])
    pairs = Pairs(neutral.prompts[test], neutral.bad[test, None], neutral.good[test, None])
    return ac.wrap(subject), examples, pairs, (bad.prompts[test], good.prompts[test])
