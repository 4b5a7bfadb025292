"""Uncertainty of predictions, answers and meanings, against whole tensors, other libraries and planted truth."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from measured import generator
from sklearn.metrics import accuracy_score, log_loss
from torch import nn

import actome as ac
from actome.core.errors import MeasureError
from actome.measures import (
    EfficientEigenScore,
    EigenScore,
    EntropyReduction,
    EntropyTrace,
    NextTokenLoss,
    TokenUncertainty,
    conditional_entropy,
    meanings,
    semantic_entropy,
    token_uncertainty,
)
from actome.measures.spans import spans
from actome.tasks.trials import spearman

some = settings(max_examples=15, deadline=None)


def logits_and_ids(seed: int, batch: int, length: int, vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = generator(seed)
    return 3 * torch.randn(batch, length, vocab, generator=g), torch.randint(vocab, (batch, length), generator=g)


def values(measure, *args) -> dict[str, torch.Tensor]:
    measure.update(*args)
    return measure.compute()


# -- tokens -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [2, 15, 255, 256, 257, 1000])  # around where the two largest are found by pieces
def test_token_uncertainty_is_what_its_definition_says(vocab):
    z, ids = logits_and_ids(vocab, 3, 20, vocab)
    got, p = values(TokenUncertainty(), z, None, ids), z.double().softmax(-1)[:, :-1].flatten(0, 1)
    target = ids[:, 1:].flatten()
    two, logit_two = p.topk(2).values, z.double()[:, :-1].flatten(0, 1).topk(2).values
    assert float(got["entropy"]) == pytest.approx(float(-(p * p.log()).sum(-1).mean()), rel=1e-5)
    assert float(got["confidence"]) == pytest.approx(float(two[:, 0].mean()), rel=1e-5)
    # A difference of two floats near 1 keeps their absolute rounding.
    assert float(got["margin"]) == pytest.approx(float((two[:, 0] - two[:, 1]).mean()), rel=1e-5, abs=1e-6)
    assert float(got["logit_margin"]) == pytest.approx(float((logit_two[:, 0] - logit_two[:, 1]).mean()), rel=1e-5)
    assert float(got["accuracy"]) == accuracy_score(target, p.argmax(-1))
    assert float(got["loss"]) == pytest.approx(log_loss(target, p.numpy(), labels=np.arange(vocab)), rel=1e-5)
    one_hot = torch.nn.functional.one_hot(target, vocab)
    assert float(got["brier"]) == pytest.approx(float((p - one_hot).square().sum(-1).mean()), rel=1e-5)
    assert float(got["overconfidence"]) == pytest.approx(float(got["confidence"] - got["accuracy"]), abs=1e-12)


def test_calibration_error_is_that_of_a_loop_over_bins():
    z, ids = logits_and_ids(0, 8, 60, 12)
    got, p = values(TokenUncertainty(), z, None, ids), z.double().softmax(-1)[:, :-1].flatten(0, 1)
    confidence, right = p.amax(-1), (p.argmax(-1) == ids[:, 1:].flatten()).double()
    error = 0.0
    for b in range(15):
        inside = (confidence > b / 15) & (confidence <= (b + 1) / 15)
        if inside.any():
            error += float(inside.double().mean() * (right[inside].mean() - confidence[inside].mean()).abs())
            assert float(got["bin_share"][b]) == pytest.approx(float(inside.double().mean()))
            assert float(got["bin_accuracy"][b]) == pytest.approx(float(right[inside].mean()))
    assert float(got["calibration_error"]) == pytest.approx(error, rel=1e-5)


def test_a_calibrated_model_has_no_calibration_error_and_an_overconfident_one_has():
    g = generator(3)
    z = 2 * torch.randn(1, 40_001, 5, generator=g)
    ids = torch.zeros(1, 40_001, dtype=torch.long)
    ids[0, 1:] = torch.multinomial(z[0, :-1].softmax(-1), 1, generator=g)[:, 0]
    good, bad = values(TokenUncertainty(), z, None, ids), values(TokenUncertainty(), 3 * z, None, ids)
    # Sampling alone gives about sqrt(15 bins / 40 000 tokens) * 0.4 = 0.008.
    assert float(good["calibration_error"]) < 0.015
    assert float(bad["calibration_error"]) > 0.1
    assert float(bad["overconfidence"]) > 0.1
    assert float(bad["brier"]) > float(good["brier"])


def test_it_gives_what_next_token_loss_gives():
    z, ids = logits_and_ids(1, 3, 9, 300)
    z[0, 0, :100] = -torch.inf
    z[1, 2, 4] = torch.nan
    mask = torch.rand(3, 9, generator=generator()) > 0.2
    ours, theirs = values(TokenUncertainty(), z, mask, ids), values(NextTokenLoss(), z, mask, ids)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-6, atol=0)


@given(seed=st.integers(0, 1000), cut=st.integers(1, 4), pad=st.integers(0, 3))
@some
def test_token_uncertainty_merges_and_does_not_see_padding(seed, cut, pad):
    z, ids = logits_and_ids(seed, 5, 6, 9)
    whole = values(TokenUncertainty(), z, None, ids)
    one, other = TokenUncertainty(), TokenUncertainty()
    padded = torch.cat([z[:cut], torch.full((cut, pad, 9), torch.nan)], 1)
    mask = torch.arange(6 + pad).expand(cut, -1) < 6
    one.update(padded, mask, torch.cat([ids[:cut], torch.full((cut, pad), 999)], 1))
    other.update(z[cut:], None, ids[cut:])
    one.merge_state(other)
    for name, value in one.compute().items():
        # Float32 rows summed in float64: nothing but the order of additions differs.
        torch.testing.assert_close(value, whole[name], rtol=1e-9, atol=1e-12, equal_nan=True)


def test_half_precision_is_computed_in_float32():
    z, ids = logits_and_ids(2, 2, 7, 40)
    z = z.bfloat16()
    ours, theirs = values(TokenUncertainty(), z, None, ids), values(TokenUncertainty(), z.float(), None, ids)
    assert all(torch.equal(ours[name], theirs[name]) for name in ("entropy", "margin", "calibration_error"))


def test_extremes_of_a_distribution():
    sure = token_uncertainty(torch.tensor([[-torch.inf, 5.0, -torch.inf]]))
    assert (float(sure.entropy), float(sure.confidence), float(sure.margin)) == (0.0, 1.0, 1.0)
    flat = token_uncertainty(torch.full((1, 1000), 1e4))
    assert float(flat.entropy) == pytest.approx(math.log(1000), rel=1e-6)
    assert (float(flat.margin), float(flat.logit_margin)) == (0.0, 0.0)
    assert not token_uncertainty(torch.tensor([[torch.nan, 1.0]])).log_z.isfinite().any()
    with pytest.raises(MeasureError, match="leave none"):
        token_uncertainty(torch.zeros(2, 1))


def test_only_padding_says_nothing():
    z, ids = logits_and_ids(2, 2, 7, 40)
    empty = values(TokenUncertainty(), z, torch.zeros(2, 7, dtype=torch.bool), ids)
    assert all(value.isnan().all() for value in empty.values())
    single = values(TokenUncertainty(), z[:, :1], None, ids[:, :1])
    assert single["entropy"].isnan()
    with pytest.raises(MeasureError, match="token ids"):
        TokenUncertainty().update(z)


def test_the_second_largest_is_found_wherever_it_stands():
    for first, second in itertools.permutations([0, 1, 15, 16, 255, 256, 259], 2):
        z = torch.zeros(1, 260)
        z[0, first], z[0, second] = 3.0, 2.0
        assert float(token_uncertainty(z).logit_margin) == 1.0


# -- answers apart ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("centre", ["units", "answers"])
def test_eigenscore_is_the_log_determinant(centre):
    z = torch.randn(7, 20, generator=generator(), dtype=torch.float64)
    a = z.numpy() - z.numpy().mean(axis=1 if centre == "units" else 0, keepdims=True)
    want = np.linalg.slogdet(a @ a.T + 1e-3 * np.eye(7))[1] / 7
    assert float(EigenScore(centre=centre).score(z)) == pytest.approx(want, rel=1e-10)


def test_eigenscore_over_questions_is_the_mean_and_merges():
    z = torch.randn(4, 5, 6, generator=generator())
    one, other = EigenScore(), EigenScore()
    one.update(z[:3]), other.update(z[3])
    one.merge_state(other)
    assert float(one.compute()["eigenscore"]) == pytest.approx(float(EigenScore().score(z).mean()), rel=1e-12)


def test_answers_that_agree_score_low():
    g = generator(1)
    mean = torch.randn(1, 32, generator=g)
    noise = torch.randn(10, 32, generator=g)
    scores = [float(EigenScore().score(mean + spread * noise)) for spread in (0.0, 0.01, 0.1, 1.0)]
    assert scores == sorted(scores)
    assert len(set(scores)) == 4


def test_the_fast_eigenscore_tends_to_the_exact_one():
    z = torch.randn(40, 12, generator=generator())
    exact = float(EigenScore(alpha=1.0).score(z))
    # With as many probes as answers the trace is exact and only the polynomial is left: spectrum to alpha is 40 to 1.
    assert float(EfficientEigenScore(80, 40, alpha=1.0).score(z)) == pytest.approx(exact, abs=1e-3)
    few = [abs(float(EfficientEigenScore(m, 40, alpha=1.0).score(z)) - exact) for m in (4, 10, 30)]
    assert few == sorted(few, reverse=True)


def test_the_fast_eigenscore_ranks_sets_of_answers_as_the_exact_one_does():
    g, sets = generator(2), []
    for _ in range(100):
        count = int(torch.randint(10, 31, (), generator=g))
        rank = int(torch.randint(1, 20, (), generator=g))
        spread = torch.rand((), generator=g)
        sets.append(spread * torch.randn(count, rank, generator=g) @ torch.randn(rank, 64, generator=g))
    exact = [float(EigenScore().score(one)) for one in sets]
    fast = [float(EfficientEigenScore(20, 20).score(one)) for one in sets]
    assert spearman(exact, fast) >= 0.8


def test_answers_that_are_all_alike_have_the_score_of_alpha():
    z = torch.ones(5, 8)
    for score in (EigenScore(), EfficientEigenScore()):
        assert float(score.score(z)) == pytest.approx(math.log(1e-3))


def test_eigenscore_refuses_what_it_cannot_say():
    with pytest.raises(MeasureError, match="at least two"):
        EigenScore().update(torch.ones(1, 4))
    with pytest.raises(MeasureError, match="not finite"):
        EigenScore().update(torch.full((2, 4), torch.nan))
    with pytest.raises(MeasureError, match="positive"):
        EigenScore(alpha=0.0)


# -- meanings ---------------------------------------------------------------------------------------------------


@given(classes=st.lists(st.integers(0, 3), min_size=1, max_size=9), seed=st.integers(0, 99))
@some
def test_semantic_entropy_is_that_of_the_classes(classes, seed):
    samples = list(enumerate(classes))  # all different, of which some mean the same
    logs = torch.randn(len(classes), generator=generator(seed)).double()
    share = np.bincount(classes) / len(classes)
    mass = np.bincount(classes, weights=logs.exp().numpy())
    for got, p in (
        (semantic_entropy(samples, lambda a, b: a[1] == b[1]), share),
        (semantic_entropy(samples, lambda a, b: a[1] == b[1], logs - 800), mass / mass.sum()),
    ):
        p = p[p > 0]
        assert got == pytest.approx(float(-(p * np.log(p)).sum()), abs=1e-12)


def test_a_sample_joins_the_first_group_whose_first_member_it_equals():
    calls = []

    def near(a, b):
        calls.append((a, b))
        return abs(a - b) <= 1

    # 2 is near 1 but 1 only joined the group of 0, which 2 is compared with.
    assert meanings([0, 1, 2, 3], near) == [0, 0, 1, 1]
    assert calls == [(0, 1), (0, 2), (0, 3), (2, 3)]


@pytest.mark.parametrize(("words", "bin_"), [(5, 2), (15, 0), (3, 4)])
def test_a_confidence_on_the_edge_of_two_bins_is_in_the_lower(words, bin_):
    # Of 15 bins ((m - 1) / 15, m / 15]: 1/5 is the upper end of the third.
    uncertainty = TokenUncertainty()
    uncertainty.update(torch.zeros(1, 4, words, dtype=torch.float64), tokens=torch.zeros(1, 4, dtype=torch.long))
    assert uncertainty.compute()["bin_share"].argmax() == bin_


def test_semantic_entropy_refuses_what_does_not_fit():
    for samples, logs in (([], None), (["a"], [0.0, 1.0]), (["a"], [-torch.inf])):
        with pytest.raises(MeasureError):
            semantic_entropy(samples, str.__eq__, logs)


# -- spans and reasoning ----------------------------------------------------------------------------------------


class Table(nn.Module):
    """A model whose next-token distribution depends on the last token alone, by a table."""

    def __init__(self, vocab: int = 7):
        super().__init__()
        self.table = nn.Embedding(vocab, vocab)
        nn.init.normal_(self.table.weight, std=2.0, generator=generator())

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table(ids)


def test_conditional_entropy_is_over_the_span_and_over_nothing_else():
    model = ac.wrap(Table())
    log_p = model.module.table.weight.detach().double().log_softmax(-1)
    contexts, answers = [[1, 2, 3], [4], [0, 6]], [[5], [2, 2, 1], [3, 0]]
    for batch_size in (1, 2, 8):
        got = conditional_entropy(model, contexts, answers, batch_size=batch_size)
        for i, (context, answer) in enumerate(zip(contexts, answers, strict=True)):
            seen = [context[-1], *answer[:-1]]
            entropy = -(log_p[seen].exp() * log_p[seen]).sum(-1).mean()
            assert float(got.entropy[i]) == pytest.approx(float(entropy), rel=1e-5)
            assert float(got.nll[i]) == pytest.approx(float(-log_p[seen, answer].mean()), rel=1e-5)


def test_conditional_entropy_over_some_tokens_only():
    model = ac.wrap(Table())
    p = model.module.table.weight.detach().double()[2, [1, 4, 5]].softmax(-1)
    got = conditional_entropy(model, [[3, 2]], [[4]], tokens=[1, 4, 5])
    assert float(got.entropy) == pytest.approx(float(-(p * p.log()).sum()), rel=1e-5)
    assert float(got.nll) == pytest.approx(float(-p[1].log()), rel=1e-5)
    with pytest.raises(MeasureError, match="does not have"):
        conditional_entropy(model, [[3, 2]], [[3]], tokens=[1, 4, 5])


def test_conditional_entropy_of_a_transformer_does_not_depend_on_the_batch():
    model, g = ac.demo(), generator()
    contexts = [torch.randint(100, (n,), generator=g).tolist() for n in (3, 9, 1, 6)]
    answers = [torch.randint(100, (n,), generator=g).tolist() for n in (2, 1, 4, 1)]
    one, all_ = (conditional_entropy(model, contexts, answers, batch_size=n) for n in (1, 4))
    torch.testing.assert_close(one.entropy, all_.entropy, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one.nll, all_.nll, rtol=1e-4, atol=1e-5)


def test_a_trace_reads_every_prefix_of_the_steps_with_the_cue():
    model = ac.wrap(Table())
    trace = EntropyReduction(model).trace([1], [[2, 3], [4]], [5], oracle=True)
    want = conditional_entropy(model, [[1], [1, 2, 3], [1, 2, 3, 4]], [[5]] * 3)
    assert torch.equal(trace.entropy, want.entropy)
    assert torch.equal(trace.utility, want.entropy[:-1] - want.entropy[1:])
    assert trace.oracle
    # With a cue the last token, on which alone this model depends, is always the same.
    cued = EntropyReduction(model, cue=[6]).trace([1], [[2, 3], [4]], [5], oracle=False)
    assert cued.entropy.unique().numel() == 1
    assert not cued.oracle


def test_traces_of_unequal_length_are_those_of_each_alone():
    model = ac.wrap(Table())
    reader = EntropyReduction(model, batch_size=3)
    questions, steps, answers = [[1], [2, 2], [0]], [[[2]], [[1], [3], [5]], []], [[5], [1, 1], [3]]
    together = reader.traces(questions, steps, answers, oracle=True)
    for trace, *one in zip(together, questions, steps, answers, strict=True):
        assert torch.equal(trace.entropy, reader.trace(*one, oracle=True).entropy)
    assert len(together[2].entropy) == 1
    assert math.isnan(together[2].slope)


def test_the_shape_of_a_trace():
    h = torch.tensor([2.0, 1.5, 1.7, 0.2], dtype=torch.float64)
    trace = EntropyTrace(h, h, oracle=False)
    assert trace.slope == pytest.approx(np.polyfit(np.arange(4), h.numpy(), 1)[0] / 2.0)
    assert trace.falling == pytest.approx(2 / 3)
    assert trace.final == pytest.approx(0.2)


def test_text_and_ids_are_not_mixed_and_nothing_is_empty():
    model = ac.demo()
    with pytest.raises(MeasureError, match="all text or all token ids"):
        EntropyReduction(model).trace("The", [[1]], "a", oracle=True)
    with pytest.raises(MeasureError, match="response 1 of 2 is empty"):
        conditional_entropy(model, [[1], [2]], [[1], []])
    with pytest.raises(MeasureError, match="2 prompts and 1 responses"):
        conditional_entropy(model, [[1], [2]], [[1]])
    with pytest.raises(MeasureError, match="no tokenizer"):
        conditional_entropy(ac.wrap(Table()), ["a"], ["b"])


def test_spans_predict_each_token_of_the_response_once():
    prompts, responses = [[1, 2], [3, 4, 5], [6]], [[7], [8, 9], [10, 11, 12]]
    seen = []
    for span in spans(prompts, responses, batch_size=2):
        assert torch.equal(span.before.sum(1), span.response)
        seen += span.targets.tolist()
        assert torch.equal(span.row, torch.repeat_interleave(torch.arange(len(span.response)), span.response))
    assert seen == [7, 8, 9, 10, 11, 12]
