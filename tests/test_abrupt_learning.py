"""Phase changes, arms with censoring, induction strength, learning in context or in weights, and two small models."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from actome.core.errors import MeasureError
from actome.dynamics import InductionHeadODE, RankOneTensor, icl_iwl, phase_change, steps_to
from actome.dynamics.induction_ode import PARAMETERS
from actome.measures import InductionStrength
from actome.tasks.in_context_classification import InContextClassification

# -- phase_change -----------------------------------------------------------------------------------------------------

STEPS = np.arange(0.0, 2001.0, 1.0)


def sigmoid(at: float, width: float) -> np.ndarray:
    return 1 / (1 + np.exp(-(STEPS - at) / width))


@pytest.mark.parametrize(("at", "width"), [(400.0, 10.0), (900.0, 40.0), (1200.0, 5.0)])
def test_a_sigmoid_has_the_lengths_of_its_formula(at, width):
    found = phase_change(STEPS, sigmoid(at, width))
    # From 10 to 90 percent a sigmoid takes 2 ln 9 of its widths.
    half = math.log(9) * width
    assert found.at == pytest.approx(at, abs=1)
    assert found.plateau == pytest.approx(at - half, abs=3)
    assert found.transition == pytest.approx(2 * half, abs=4)
    assert found.ratio == pytest.approx((at - half) / (2 * half), rel=0.1)
    assert (found.before, found.after) == (pytest.approx(0, abs=0.03), pytest.approx(1, abs=0.03))


def test_direction_scale_and_origin_do_not_matter():
    one, other = phase_change(STEPS, sigmoid(700, 20)), phase_change(STEPS + 50, 3 - 8 * sigmoid(700, 20))
    assert (other.at - 50, other.plateau, other.transition) == pytest.approx((one.at, one.plateau, one.transition))


def test_a_fall_to_the_plateau_is_not_the_change():
    # As a loss goes: quickly from 4 to 3, then nothing, then from 3 to 0.
    loss = np.exp(-STEPS / 20) + 3 * (1 - sigmoid(1000, 10))
    found = phase_change(STEPS, loss)
    assert found.at == pytest.approx(1000, abs=2)
    assert found.before == pytest.approx(3, abs=0.05)
    assert 800 < found.plateau < 1000


def test_what_changes_all_the_time_is_not_abrupt_and_what_still_changes_has_no_date():
    assert phase_change(STEPS, STEPS).ratio <= 0.25
    assert phase_change(STEPS, np.exp(-STEPS / 300)).ratio < 0.2
    late = phase_change(STEPS, np.exp((STEPS - 2000) / 10))
    assert late.at == math.inf
    assert late.censored == 1
    assert math.isnan(late.ratio)
    assert phase_change(STEPS, np.ones(len(STEPS))).censored == 1


def test_seeds_have_a_median_an_interval_and_are_censored():
    runs = np.stack([sigmoid(at, 10) for at in (300, 500, 700)] + [np.zeros(len(STEPS))])
    found = phase_change(STEPS, runs[:3])
    assert found.at == pytest.approx(500, abs=1)
    assert found.low < 400
    assert found.high > 600
    with_one = phase_change(STEPS, runs)
    assert with_one.censored == 0.25
    assert with_one.runs[3] == math.inf
    assert with_one.at == pytest.approx(600, abs=1)
    noisy = sigmoid(800, 20) + 0.08 * np.random.default_rng(0).standard_normal(len(STEPS))
    assert phase_change(STEPS[::5], noisy[::5], bandwidth=0.01).at == pytest.approx(800, abs=15)


def test_shares_that_are_none_are_refused():
    with pytest.raises(MeasureError, match=r"least_change=1\.5: a share between 0 and 1"):
        phase_change(STEPS, STEPS, least_change=1.5)
    with pytest.raises(MeasureError, match="a phase change needs 4 points"):
        phase_change([0, 1, 2], [0, 0, 1])


# -- steps_to ---------------------------------------------------------------------------------------------------------


def ramp(end: float, length: int = 100) -> tuple[np.ndarray, np.ndarray]:
    x = np.arange(length + 1.0)
    return x, x / end


def test_arms_of_different_lengths_are_compared_run_by_run_with_censoring():
    found = steps_to(
        {
            "plain": [ramp(50), ramp(100), ramp(1000)],
            "fast": [ramp(25, 30), ramp(50, 60), ramp(100)],
            "slow": [ramp(1000, 80), ramp(1000, 120), ramp(1000)],
        },
        0.8,
    )
    assert found.arms["plain"].runs == pytest.approx((40, 80, math.inf))
    assert found.arms["plain"].censored == pytest.approx(1 / 3)
    fast, slow = found.ratio("fast", to="plain"), found.ratio("slow", to="plain")
    assert fast.runs == pytest.approx((0.5, 0.5, 0.0))
    assert (fast.median, fast.faster) == (0.5, 1.0)
    assert slow.runs[:2] == (math.inf, math.inf)
    assert math.isnan(slow.runs[2])
    assert slow.at_least == pytest.approx((2.0, 1.5, 0.0))
    assert slow.faster == 0.0
    table = found.table()
    assert list(table.columns) == ["arm", "run", "steps", "last"]
    assert len(table) == 9
    assert math.isnan(found.ratio("slow", to="slow").median)


def test_arms_that_cannot_be_compared_are_refused():
    found = steps_to({"plain": [ramp(50), ramp(60)], "other": [ramp(50)]}, 0.8)
    with pytest.raises(MeasureError, match=r"there is no arm .plan.; nearest: plain"):
        found.ratio("plan", to="other")
    with pytest.raises(MeasureError, match="other has 1 runs and plain 2"):
        found.ratio("other", to="plain")
    with pytest.raises(MeasureError, match="there are no arms"):
        steps_to({}, 0.5)
    with pytest.raises(MeasureError, match="the arm 'a' has no runs"):
        steps_to({"a": []}, 0.5)


# -- InductionStrength ------------------------------------------------------------------------------------------------


def patterns(rows: int, pairs: int = 3, heads: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    length = 2 * pairs + 1
    scores = 2 * torch.randn(rows, heads, length, length, generator=g)
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden, -torch.inf).softmax(-1), torch.rand(rows, pairs, generator=g) < 0.4


def test_strength_is_what_loops_find():
    pattern, copies = patterns(40)
    measure = InductionStrength()
    measure.update(pattern, copies=copies)
    strength, on_labels, back = [], [], []
    for b in range(40):
        on = [pattern[b, :, 6, 2 * n + 1] for n in range(3)]
        on_labels.append(sum(on))
        back += [pattern[b, :, 2 * n + 1, 2 * n] for n in range(3)]
        if copies[b].any():
            strength.append(sum(on[n] if copies[b, n] else -on[n] for n in range(3)))
    found = measure.compute()
    for name, rows in (("induction_strength", strength), ("label_attention", on_labels), ("exemplar_attention", back)):
        torch.testing.assert_close(found[name], torch.stack(rows).double().mean(0), atol=1e-6, rtol=1e-6)


def test_strengths_of_parts_merge_and_layers_stack():
    pattern, copies = patterns(30)
    whole, one, other = InductionStrength(), InductionStrength(), InductionStrength()
    whole.update(pattern, copies=copies)
    one.update(pattern[:11], copies=copies[:11])
    other.update(pattern[11:], copies=copies[11:])
    one.merge_state(other)
    for name, value in whole.compute().items():
        torch.testing.assert_close(one.compute()[name], value)
    stacked = InductionStrength()
    stacked.update(torch.stack((pattern, pattern.flip(1))), copies=copies)
    torch.testing.assert_close(
        stacked.compute()["induction_strength"][1], whole.compute()["induction_strength"].flip(0)
    )


def test_perfect_heads_have_strength_one_and_broken_rows_are_left_out():
    world = InContextClassification(pairs=4, labels=6)
    prompts = world.sample(50, seed=2)
    perfect = prompts.matches().float()[:, None] + prompts.exemplars().float()
    perfect[:, 0, [0, 2, 4, 6], 0] = 1.0
    measure = InductionStrength()
    measure.update(perfect, copies=prompts.copies)
    assert measure.compute()["induction_strength"].item() == 1.0
    assert measure.compute()["exemplar_attention"].item() == 1.0
    broken = perfect.clone()
    broken[0, 0, -1, 0] = torch.nan
    measure = InductionStrength()
    measure.update(broken.bfloat16(), copies=prompts.copies)
    assert measure.compute()["induction_strength"].item() == 1.0


def test_strength_without_matches_or_of_padded_prompts_is_refused():
    pattern, copies = patterns(4)
    for given in (None, copies[:2], copies.int()):
        with pytest.raises(MeasureError, match=r"needs update\(..., copies=matches\), bools of the shape \(4, 3\)"):
            InductionStrength().update(pattern, copies=given)
    with pytest.raises(MeasureError, match="has 2 N \\+ 1 queries and keys"):
        InductionStrength().update(pattern[..., :6, :6], copies=copies)
    mask = torch.ones(4, 7, dtype=torch.bool)
    mask[0, -1] = False
    with pytest.raises(MeasureError, match="some of these are padded"):
        InductionStrength().update(pattern, mask, copies=copies)


# -- prompts as inputs, and what is known of them ---------------------------------------------------------------------

WORLD = InContextClassification(classes=32, labels=8, pairs=2, mapping="fixed", dim=64, spread=0.1)


def test_matches_and_exemplars_name_the_right_places():
    prompts = WORLD.sample(20, seed=1)
    for b, copy in enumerate(prompts.copies):
        assert prompts.matches()[b].nonzero().tolist() == [[4, 2 * n + 1] for n in range(2) if copy[n]]
    soft = prompts.matches(temperature=0.05)
    assert torch.equal(soft[:, -1, 1::2].argmax(-1), prompts.copies.int().argmax(-1))
    torch.testing.assert_close(soft.sum((1, 2)), torch.ones(20))
    tokens = InContextClassification().sample(20, seed=1)
    assert torch.equal(tokens.matches(0.01)[:, -1, 1::2].round().bool(), tokens.copies)
    with pytest.raises(ValueError, match="temperature=-1 is negative"):
        tokens.matches(-1)


def test_inputs_are_exemplars_and_label_vectors_with_places_that_vary():
    prompts = WORLD.sample(200, seed=3)
    inputs = WORLD.inputs(prompts, window=9, seed=4)
    content, places = inputs[..., :64], inputs[..., 64:]
    assert torch.equal(content[:, [0, 2, 4]], prompts.items)
    assert torch.equal(content[:, 3], WORLD.label_vectors()[prompts.labels[:, 1]])
    assert torch.equal(places.argmax(-1)[:, 1:], places.argmax(-1)[:, :-1] + 1)
    assert places.argmax(-1)[:, 0].unique().tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="window=4 has no room for a prompt of 5 tokens"):
        WORLD.inputs(prompts, window=4)
    with pytest.raises(ValueError, match="exemplars are tokens in a world with dim=0"):
        InContextClassification().inputs(InContextClassification().sample(2, seed=0))


def test_a_copier_gives_labels_the_attention_they_are_paid():
    world = InContextClassification()
    prompts = world.sample(10, seed=5)
    pattern, _ = patterns(10, pairs=2, heads=3)
    logits = world.copied(prompts, pattern)
    for b in range(10):
        for label in range(5):
            paid = sum(pattern[b, :, 4, 2 * n + 1].sum() for n in range(2) if prompts.labels[b, n] == label)
            shown = label in prompts.labels[b, :-1]
            assert float(logits[b, label]) == pytest.approx(float(paid) if shown else -math.inf)


# -- icl_iwl ----------------------------------------------------------------------------------------------------------


class Planted(nn.Module):
    """Answers by a rule: the label beside the likest exemplar, or the stored label of the likest class."""

    main_input_name = "inputs_embeds"

    def __init__(self, rule: str):
        super().__init__()
        self.rule = rule

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        query, vectors = inputs_embeds[:, -1], WORLD.label_vectors()
        shown = inputs_embeds[:, 1::2].matmul(vectors.T).argmax(-1)
        if self.rule == "context":
            at = (inputs_embeds[:, :-1:2] * query[:, None]).sum(-1).argmax(-1)
            answer = shown.gather(1, at[:, None])[:, 0]
        elif self.rule == "first label":
            answer = shown[:, 0]
        else:
            answer = WORLD.mapping_table()[(query @ WORLD.means().T).argmax(-1)]
        return nn.functional.one_hot(answer, 8).float()[:, None].expand(-1, 5, -1)


def test_planted_learners_are_told_apart():
    context, weights = icl_iwl(Planted("context"), WORLD), icl_iwl(Planted("weights"), WORLD)
    assert context.icl > 0.99
    assert context.swapped > 0.99
    assert context.context_label == 1.0
    assert context.iwl < 0.25
    assert context.stored == pytest.approx(1 / 8, abs=0.04)
    assert weights.iwl == 1.0
    assert weights.stored == 1.0
    assert weights.icl == pytest.approx(1 / 8, abs=0.04)
    assert weights.swapped == pytest.approx(1 / 8, abs=0.04)
    some = icl_iwl(Planted("first label"), WORLD)
    # Novel classes may share a label: right half of the time, and then again one time in eight.
    assert some.icl == pytest.approx(0.5 + 0.5 / 8, abs=0.06)
    assert some.context_label == 1.0
    assert context.chance == 1 / 8


def test_worlds_with_nothing_to_store_and_modules_of_other_outputs_are_refused():
    with pytest.raises(MeasureError, match="mapping='redrawn' and dim=0 has nothing to store"):
        icl_iwl(Planted("context"), InContextClassification())
    with pytest.raises(MeasureError, match=r"gives \(1000, 64\) at the query, and the world has 8 labels"):
        icl_iwl(nn.Linear(64, 64), WORLD)


# -- InductionHeadODE -------------------------------------------------------------------------------------------------


def by_whole_softmaxes(head: InductionHeadODE, parameters: Tensor) -> dict[str, Tensor]:
    """The same head with every token and every label written out."""
    beta1, alpha, beta2, xi = parameters.unbind()
    N, L = head.pairs, head.labels
    loss, target, context, induction = [], [], [], []
    for t in range(N):
        logits = []
        for token in range(2 * N + 1):  # exemplar, label, exemplar, ..., query
            if token % 2 == 0:
                logits.append(torch.zeros((), dtype=torch.float64))
                continue
            seen = torch.zeros(token + 1, dtype=torch.float64)
            seen[token - 1] = 1.0
            held = (beta1 * seen).softmax(0)[token - 1] * (token // 2 == t)
            logits.append(beta2 + alpha * held)
        weight = torch.stack(logits).softmax(0)[1::2]
        log_p = (xi * torch.cat((weight, torch.zeros(L - N, dtype=torch.float64)))).log_softmax(0)
        loss.append(-log_p[t])
        target.append(log_p[t].exp())
        context.append(log_p[:N].exp().sum())
        induction.append(2 * weight[t] - weight.sum())
    return {
        name: torch.stack(values).mean()
        for name, values in (("loss", loss), ("target", target), ("context", context), ("induction", induction))
    }


@pytest.mark.parametrize("head", [InductionHeadODE(), InductionHeadODE(pairs=3, labels=3), InductionHeadODE(1, 2)])
def test_the_reduced_head_and_its_gradient_are_those_of_whole_softmaxes(head):
    for values in ((0.0, 0.1, 0.0, 0.1), (-2.0, 3.0, 1.0, 5.0), (4.0, 6.0, -1.0, 12.0)):
        parameters = torch.tensor(values, dtype=torch.float64, requires_grad=True)
        wanted = by_whole_softmaxes(head, parameters)
        got = head.at(*values)
        for name, value in wanted.items():
            assert got[name] == pytest.approx(value.item(), rel=1e-9, abs=1e-12)
        wanted["loss"].backward()
        np.testing.assert_allclose(head.gradient(*values), parameters.grad.numpy(), rtol=1e-8, atol=1e-12)


def test_the_flow_is_gradient_descent_of_small_steps():
    head, lr = InductionHeadODE(pairs=2, labels=8), 0.01
    trace = head.run(30.0, points=4)
    y = np.array([getattr(head, name) for name in PARAMETERS])
    for _ in range(3000):
        y = y - lr * head.gradient(*y)
    np.testing.assert_allclose(trace[list(PARAMETERS)].iloc[-1], y, rtol=0.02)
    assert (trace["loss"].diff()[1:] < 0).all()


def test_the_plateau_lengthens_as_the_previous_token_logit_begins_lower():
    traces = [InductionHeadODE(pairs=8, beta1=beta1).run(400.0) for beta1 in (1.0, -1.0, -3.0)]
    changes = [phase_change(trace["time"], trace["target"]) for trace in traces]
    assert changes[0].at < changes[1].at < changes[2].at
    assert all(change.ratio > 3 for change in changes)
    # On the plateau it answers with some label of the context more and more often, without knowing which.
    at = int(np.searchsorted(traces[2]["time"], changes[2].at - 10))
    row = traces[2].iloc[at]
    assert row["context"] > 1.5 * 8 / 32
    assert row["target"] == pytest.approx(row["context"] / 8, rel=0.3)


def test_frozen_parameters_stay_and_unknown_ones_are_refused():
    trace = InductionHeadODE(beta1=3.0).run(100.0, points=5, frozen=["beta1"])
    assert set(trace["beta1"]) == {3.0}
    with pytest.raises(MeasureError, match="there is no parameter 'gamma'; there are beta1, alpha, beta2, xi"):
        InductionHeadODE().run(frozen=["gamma"])
    with pytest.raises(MeasureError, match="time=0"):
        InductionHeadODE().run(0)
    with pytest.raises(MeasureError, match="pairs=4, labels=3"):
        InductionHeadODE(4, 3)


# -- RankOneTensor ----------------------------------------------------------------------------------------------------


def test_the_toy_follows_the_gradient_of_the_whole_tensor():
    toy = RankOneTensor(sizes=(3, 4, 5), scale=0.5, seed=2)
    truth, begin = toy.start()
    parts = [torch.tensor(v, requires_grad=True) for v in begin]
    target = torch.einsum("i,j,k->ijk", *map(torch.tensor, truth))
    for _ in range(50):
        loss = 0.5 * (torch.einsum("i,j,k->ijk", *parts) - target).square().sum()
        loss.backward()
        with torch.no_grad():
            for part in parts:
                part -= 0.1 * part.grad
                part.grad = None
    last = 0.5 * (torch.einsum("i,j,k->ijk", *parts) - target).square().sum()
    trace = toy.run(50, lr=0.1)
    assert trace["loss"].iloc[-1] == pytest.approx(last.item(), rel=1e-9)
    assert trace["part_1"].iloc[-1] == pytest.approx(float(parts[1] @ torch.tensor(truth[1])), rel=1e-9)


def test_with_all_others_clamped_the_error_shrinks_at_a_constant_rate():
    trace = RankOneTensor().run(40, lr=0.1, clamped=(0, 2))
    # a' = -(a - truth), so what is missing falls by 1 - lr in each step.
    np.testing.assert_allclose(trace["loss"], trace["loss"][0] * 0.9 ** (2 * trace["step"]), rtol=1e-6)


def test_the_plateau_of_three_parts_goes_like_one_over_the_start():
    dates = []
    for scale in (0.1, 0.05):
        trace = RankOneTensor(scale=scale).run(3000)
        dates.append(phase_change(trace["step"], trace["loss"], least=0.01).at)
    assert dates[1] / dates[0] == pytest.approx(2, rel=0.1)


def test_toys_without_parts_or_all_clamped_are_refused():
    with pytest.raises(MeasureError, match=r"clamped=\(0, 1, 2\): give some of the parts 0 to 2, not all"):
        RankOneTensor().run(1, clamped=(0, 1, 2))
    with pytest.raises(MeasureError, match="sizes"):
        RankOneTensor(sizes=(3,))
    with pytest.raises(MeasureError, match="scale"):
        RankOneTensor(scale=0)
