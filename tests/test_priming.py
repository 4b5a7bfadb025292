"""Priming scores against probabilities computed by hand, the world's own tables, and planted leaks."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import actome as ac
from actome.core.errors import MeasureError
from actome.dynamics.priming_scores import Fact, keyword_log_probs, priming, priming_threshold, stepping_stone
from actome.tasks import Subject, SubjectConfig
from actome.tasks.losses import TrainingError
from actome.tasks.theme_world import LINK, ThemeWorld


class Bigram(nn.Module):
    """Logits of the next token from the last one alone: what a step does to it is known."""

    def __init__(self, vocab: int = 6):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(vocab, vocab))

    def forward(self, tokens):
        return self.table[tokens]


def ids(*tokens: int) -> torch.Tensor:
    return torch.tensor(tokens)


def test_one_step_of_gradient_descent_by_hand():
    module, lr = Bigram(), 2.0
    fact = Fact(ids(0, 1), ids(4), "near", other=ids(5))
    prefixes = {"near": [ids(2, 1), ids(0, 3)], "away": ids(0, 2)[None]}
    frame = priming(module, [fact], prefixes, 1, optimizer=lambda params: torch.optim.SGD(params, lr))
    (row,) = frame.to_dict("records")
    # The gradient is (p - one-hot) / 2 in the rows of tokens 0 and 1, the mean over two targets.
    logits = torch.zeros(6, dtype=torch.float64)
    logits += lr / 2 * (nn.functional.one_hot(ids(4), 6)[0] - 1 / 6)
    after = logits.softmax(0)
    assert row["log_p_before"] == pytest.approx(-math.log(6))
    assert row["log_p_after"] == pytest.approx(math.log(after[4]), rel=1e-5)
    assert row["s_mem"] == pytest.approx(6 * float(after[4]), rel=1e-5)
    # Of the prefixes of the theme one ends in token 1, as the fact does, and one in token 3, which was not touched.
    assert row["s_prime"] == pytest.approx((6 * float(after[4]) + 1) / 2, rel=1e-5)
    assert row["s_prime_null"] == pytest.approx((6 * float(after[5]) + 1) / 2, rel=1e-5)
    assert row["s_prime_far"] == pytest.approx(1, rel=1e-6)
    assert row["log_p_theme_after"] == pytest.approx((math.log(after[4]) - math.log(6)) / 2, rel=1e-5)
    assert bool((module.table == 0).all())
    assert module.training


def test_the_model_is_as_it_was_and_wrapped_ones_are_taken():
    config = SubjectConfig(vocab=12, d_model=16, layers=1, heads=2, context=10)
    subject = Subject.fresh(config)
    start = {name: one.clone() for name, one in subject.state_dict().items()}
    facts = [Fact(ids(0, 1, 2), ids(9, 3), "a"), Fact(ids(0, 4), ids(8), "b", text=ids(0, 4, 8, 5, 5))]
    prefixes = {"a": torch.tensor([[0, 2, 3], [0, 1, 1]]), "b": [ids(0, 5), ids(0, 5, 6, 7)]}
    ordinary = torch.arange(48).view(2, 4, 6) % 12
    options = {"steps": 4, "batches": lambda step: ordinary[step % 2], "every": 2}
    frame = priming(ac.wrap(subject), facts, prefixes, **options)
    assert all(torch.equal(one, start[name]) for name, one in subject.state_dict().items())
    assert not subject.training
    assert all(p.grad is None for p in subject.parameters())
    assert frame.theme.tolist() == ["a", "b"]
    pd.testing.assert_frame_equal(frame, priming(subject, facts, prefixes, **options))
    # Keywords of several tokens: the sum over them, each after those before it.
    log_p = subject(ids(0, 1, 2, 9)[None]).logits[0].detach().log_softmax(-1)
    assert float(keyword_log_probs(subject, [ids(0, 1, 2)], ids(9, 3))) == pytest.approx(
        float(log_p[2, 9] + log_p[3, 3]), abs=1e-5
    )


def test_bfloat16_models_are_taught_too():
    subject = Subject.fresh(SubjectConfig(vocab=12, d_model=16, layers=1, heads=2, context=6)).to(torch.bfloat16)
    prefixes = {"a": ids(0, 2)[None], "b": ids(0, 3)[None]}
    frame = priming(
        subject, [Fact(ids(0, 1), ids(9), "a", other=ids(8))], prefixes, 8,
        optimizer=lambda params: torch.optim.SGD(params, 0.5),
    )  # fmt: skip
    assert frame.s_mem[0] > 2
    assert subject.embed.weight.dtype == torch.bfloat16


def test_padding_beside_ordinary_text_changes_no_gradient():
    # The same step with the sample in a batch of longer rows, and by itself with the rows weighted by their targets.
    module = Bigram()
    long, short = ids(0, 1, 2, 3, 4)[None], ids(5, 4, 3)
    fact = Fact(short[:2], short[2:], "a", other=ids(1))
    prefixes = {"a": ids(0, 4)[None], "b": ids(0, 1)[None]}
    frame = priming(
        module, [fact], prefixes, 1, batches=lambda step: long, optimizer=lambda params: torch.optim.SGD(params, 6.0)
    )
    # Six targets in all; after token 4 only the sample's keyword, so that row moves by (one-hot - 1/6).
    logits = nn.functional.one_hot(ids(3), 6)[0].double() - 1 / 6
    assert frame.log_p_after[0] == pytest.approx(float(logits.log_softmax(0)[3]), rel=1e-5)


def test_a_stepping_stone_is_the_likeliest_way():
    module = Bigram()
    with torch.no_grad():
        module.table[1] = torch.tensor([0.0, 0, 5, 3, -5, 0])  # after the context 2 is likeliest, then 3
        module.table[2] = torch.tensor([0.0, 0, 0, 0, -4, 0])
        module.table[3] = torch.tensor([0.0, 0, 0, 0, 6, 0])  # but 3 leads to the keyword
    fact = Fact(ids(0, 1), ids(4), "a")
    stepped = stepping_stone(module, fact, [ids(2), ids(3), ids(0)])
    assert stepped.context.tolist() == [0, 1, 3]
    assert stepped.trained.tolist() == [0, 1, 3, 4]
    before = keyword_log_probs(module, [fact.context, stepped.context], fact.key)
    assert float(before[1] - before[0]) > 5
    with pytest.raises(MeasureError, match="no stone"):
        stepping_stone(module, fact, [])


def test_a_planted_break_is_found_near_its_probability():
    log10_p = np.linspace(-5, -1, 60)
    log10_s = np.maximum(-3 - log10_p, 0) + 0.05 * np.sin(40 * log10_p)
    frame = pd.DataFrame({"log_p_before": log10_p * np.log(10), "s_prime": 10**log10_s})
    found = priming_threshold(frame, permutations=39, resamples=50)
    assert found.at == pytest.approx(-3, abs=0.15)
    assert found.p <= 0.05
    twice = pd.concat([frame, frame])
    assert priming_threshold(twice, permutations=0, resamples=0).at == pytest.approx(found.at)


def test_bad_input_is_refused():
    module, prefixes = Bigram(), {"near": ids(0, 2)[None], "away": ids(0, 3)[None]}
    fact = Fact(ids(0), ids(4), "near")
    for facts, options, message in (
        ([], {}, "no sample was given"),
        ([Fact(ids(0), ids(4), "naer", other=ids(5))], {}, "no prefixes of the theme 'naer'; nearest: near"),
        ([fact], {}, "all samples have one keyword"),
        ([Fact(ids(), ids(4), "near", other=ids(5))], {}, "context is a tensor of token ids"),
        ([Fact(ids(0), ids(4), "near", far=(), other=ids(5))], {}, "no other theme"),
        ([fact], {"every": 2}, "batches= for the steps between"),
        ([fact], {"steps": 0}, "steps=0"),
    ):
        with pytest.raises(MeasureError, match=message):
            priming(module, facts, prefixes, **options)
    broken = Bigram()
    broken.table.data[0, 0] = float("nan")
    with pytest.raises(TrainingError, match="the loss of step 0"):
        priming(broken, [Fact(ids(0), ids(4), "near", other=ids(5))], prefixes, 2)
    assert bool(broken.table.isnan().any())


# -- the world --------------------------------------------------------------------------------------------------------


def test_theme_world_has_the_frequencies_of_its_tables():
    world = ThemeWorld(themes=2, words=3, relations=2, attributes=5, context=2, linked=0.4, seed=3)
    text = world.sample(40_000, 1)
    assert torch.equal(text, world.sample(40_000, 1))
    theme = (text[:, 1] - 2) // world.words
    relation = text[:, 3] - world.relation(0)
    assert bool(((text[:, 2] - 2) // world.words == theme).all())
    for a in range(2):
        for r in range(2):
            here = text[(theme == a) & (relation == r)]
            first = here[:, 4] - world.attribute(r, 0)
            # About 10000 draws: the standard error of a share is at most 0.005.
            share = first.bincount(minlength=5).double() / len(first)
            assert torch.allclose(share, world.probability(a, r), atol=0.025)
            linked = here[:, 5] == LINK
            assert float(linked.double().mean()) == pytest.approx(0.4, abs=0.025)
            assert bool((here[~linked, 5:] == 0).all())
            second = here[linked, 6] - world.attribute(r, 0)
            assert not bool((second == first[linked]).any())
            pairs = (first[linked] * 5 + second).bincount(minlength=25).view(5, 5).double()
            common = pairs.sum(1) > 500
            found = pairs[common] / pairs[common].sum(1, keepdim=True)
            # Standard errors of at most 0.022 with 500 draws or more.
            assert torch.allclose(found, world.goes_with[r][common], atol=0.1)
    prefixes = world.prefixes(7, 1, 0, seed=2)
    assert prefixes.shape == (7, 4)
    assert bool(((prefixes[:, 1:3] - 2) // world.words == 1).all())
    assert bool((prefixes[:, 3] == world.relation(0)).all())
    with pytest.raises(ValueError, match="themes=1 is too small"):
        ThemeWorld(themes=1)
