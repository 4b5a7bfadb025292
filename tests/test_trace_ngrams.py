"""N-grams without smoothing, and models that say what they say."""

import numpy as np
import pytest
import torch
from torch import nn

import actome as ac
from actome import dynamics as dyn
from actome.tasks.topic_bigram import TopicBigram


class Table(nn.Module):
    """Predicts by a table of the last token alone."""

    def __init__(self, logits_VV):
        super().__init__()
        self.logits_VV = nn.Parameter(logits_VV)

    def forward(self, ids):
        return self.logits_VV[ids]


def test_longest_contexts_by_brute_force():
    draw = np.random.default_rng(0)
    known, asked = draw.integers(0, 4, (6, 20)), draw.integers(0, 4, (3, 12))
    p, favourite, length = dyn.InfinityGram(known, most=3).predict(asked)
    for i, row in enumerate(asked):
        for at in range(1, 12):
            for n in range(min(3, at), 0, -1):
                wanted = row[at - n : at].tolist()
                after = [r[j + n] for r in known.tolist() for j in range(20 - n) if r[j : j + n] == wanted]
                if after:
                    assert length[i, at - 1] == n
                    assert p[i, at - 1] == pytest.approx(after.count(row[at]) / len(after))
                    assert after.count(favourite[i, at - 1]) == max(map(after.count, after))
                    break


def test_a_bigram_model_agrees_and_one_of_noise_does_not():
    world = TopicBigram(vocab=12, topics=1, seed=0)
    known, asked = world.sample(300, 32, seed=1).tokens, world.sample(40, 32, seed=2).tokens
    grams = dyn.InfinityGram(known, most=1)
    right = ac.wrap(Table(world.tables()[0].clamp_min(1e-9).log().float()), example=asked)
    noise = ac.wrap(Table(torch.randn(12, 12, generator=torch.Generator().manual_seed(0))), example=asked)
    same, other = (dyn.ngram_agreement(model, asked, grams) for model in (right, noise))
    assert same.rho > 0.95
    assert same.agreement > 0.8
    assert same.covered > 0.99
    assert other.rho < 0.3
    assert other.agreement < 0.3


def test_bad_input():
    with pytest.raises(ac.MeasureError, match="token ids"):
        dyn.InfinityGram([1, 2, 3])
    grams = dyn.InfinityGram([[1, 2]])
    model = ac.wrap(Table(torch.zeros(12, 12)), example=torch.tensor([[1]]))
    with pytest.raises(ac.MeasureError, match="give more"):
        dyn.ngram_agreement(model, torch.tensor([[5, 6, 7]]), grams)
