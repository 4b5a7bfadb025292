"""Tangent kernels, regimes, initial rank and output scale against closed forms, brute force and planted truth."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev, vmap
from torch.nn import functional as F

import actome as ac
from actome.core.errors import MeasureError, SiteError
from actome.dynamics import lazy_rich_index, regime
from actome.dynamics.regimes import rank_in_use
from actome.measures import (
    TangentKernelAlignment,
    kernel_alignment,
    label_kernel,
    representation_alignment,
    tangent_kernel,
)
from actome.tasks import Subject, SubjectConfig
from actome.tasks.committee import Committee, QuadraticTeacher
from actome.tasks.nets import CNN, MLP
from actome.tasks.rnn import LeakyRNN, rows_of
from actome.tune import OutputScale, low_rank_


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def brute(net, x):
    """Every gradient by itself, (probe * output, parameter)."""
    rows = []
    for one in x:
        out = net(one[None]).flatten()
        for value in out:
            grads = torch.autograd.grad(value, list(net.parameters()), retain_graph=True)
            rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


# Tangent kernel


@pytest.mark.parametrize("memory", [2**26, 200, 1])
@pytest.mark.parametrize(("net", "x"), [(MLP([6, 12, 3]), randn(7, 6)), (CNN([1, 4, 4], 3), randn(5, 1, 6, 6))])
def test_the_tangent_kernel_is_that_of_single_gradients_however_it_is_cut(net, x, memory):
    jacobian = brute(net, x)
    whole = jacobian @ jacobian.T
    torch.testing.assert_close(tangent_kernel(net, x, per="output", memory=memory), whole, rtol=1e-4, atol=1e-5)
    by_probe = torch.einsum("nkmk->nm", whole.unflatten(0, (len(x), 3)).unflatten(2, (len(x), 3)))
    torch.testing.assert_close(tangent_kernel(net, x, memory=memory), by_probe, rtol=1e-4, atol=1e-5)


def test_the_tangent_kernel_agrees_with_torch_func_and_takes_parts():
    net, x = MLP([6, 12, 3]), randn(7, 6)
    parameters = dict(net.named_parameters())
    jacobian = vmap(jacrev(lambda p, one: functional_call(net, p, (one[None],))[0]), (None, 0))(parameters, x)
    flat = torch.cat([one.flatten(2) for one in jacobian.values()], 2)
    torch.testing.assert_close(tangent_kernel(net, x), torch.einsum("ncp,mcp->nm", flat, flat), rtol=1e-4, atol=1e-5)
    some = flat[:, [2, 0]]
    torch.testing.assert_close(
        tangent_kernel(net, x, outputs=[2, 0]), torch.einsum("ncp,mcp->nm", some, some), rtol=1e-4, atol=1e-5
    )
    last = jacobian["linear.1.weight"].flatten(2)
    torch.testing.assert_close(
        tangent_kernel(net, x, parameters="linear.1.w*"), torch.einsum("ncp,mcp->nm", last, last), rtol=1e-4, atol=1e-5
    )
    drawn = tangent_kernel(net, x, outputs=2, seed=4)
    assert torch.equal(drawn, tangent_kernel(ac.wrap(net), x, outputs=2, seed=4))


def test_the_kernel_of_a_frozen_random_layer_is_that_of_its_features():
    # Of a linear readout without bias: K = phi(x) phi(x)' for each output.
    net, x = MLP([6, 50, 1], seed=1), randn(9, 6)
    features = net.act[0](net.linear[0](x)).detach()
    torch.testing.assert_close(tangent_kernel(net, x, parameters="linear.1.weight"), features @ features.T)


def test_measuring_leaves_the_network_alone():
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2)).train()
    before = copy.deepcopy(net.state_dict())
    first = tangent_kernel(net, randn(5, 6))
    assert torch.equal(first, tangent_kernel(net, randn(5, 6)))  # no dropout, no batch statistics
    assert all(torch.equal(one, net.state_dict()[name]) for name, one in before.items())
    assert all(one.training for one in net.modules())
    assert all(one.grad is None for one in net.parameters())
    assert not first.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_kernel_of_a_transformer(dtype):
    subject = Subject.fresh(SubjectConfig(vocab=12, d_model=16, heads=2, context=8))
    ids = torch.arange(8).repeat(3, 1).add(torch.arange(3)[:, None]) % 12

    def last(out):
        return out.logits[:, -1]

    exact = brute_logits(copy.deepcopy(subject).double(), ids)
    kernel = tangent_kernel(subject.to(dtype), {"input_ids": ids}, outputs=[1, 5], read=last)
    assert kernel.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 0.1 if dtype == torch.bfloat16 else 1e-4  # bfloat16 has three digits, and so have its gradients
    assert float((kernel.double() - exact).norm() / exact.norm()) < tolerance


def brute_logits(subject, ids):
    rows = []
    for one in ids:
        out = subject(input_ids=one[None]).logits[0, -1]
        for i in (1, 5):
            grads = torch.autograd.grad(out[i], list(subject.parameters()), retain_graph=True, allow_unused=True)
            rows.append(torch.cat([g.flatten() for g in grads if g is not None]))
    both = torch.stack(rows).unflatten(0, (len(ids), 2))
    return torch.einsum("ncp,mcp->nm", both, both)


def test_kernels_of_bad_input():
    net, x = MLP([6, 12, 3]), randn(7, 6)
    for options, message in [
        ({"outputs": 4}, "draw 1 to 3"),
        ({"outputs": [3]}, r"outputs \[3\]: a probe has 3"),
        ({"outputs": []}, "give one at least"),
        ({"parameters": "linear.7.weight"}, "nearest: linear"),
        ({"per": "row"}, "'probe' or 'output'"),
    ]:
        with pytest.raises(MeasureError, match=message):
            tangent_kernel(net, x, **options)
    with pytest.raises(MeasureError, match="no probes"):
        tangent_kernel(net, x[:0])
    with pytest.raises(MeasureError, match="not finite"):
        tangent_kernel(net, x * math.nan)
    with pytest.raises(MeasureError, match="asks for a gradient"):
        tangent_kernel(MLP([6, 3]).requires_grad_(False), x)
    with pytest.raises(MeasureError, match="draw some"):
        tangent_kernel(MLP([6, 2000]), x)
    with pytest.raises(MeasureError, match="say with read="):
        tangent_kernel(nn.LSTM(6, 4, batch_first=True), randn(2, 3, 6))


# Alignment of kernels


def test_alignment_by_hand_and_its_invariances():
    x, y = randn(20, 5), randn(20, 8, seed=1)
    k, m = x @ x.T, y @ y.T
    centre = torch.eye(20) - 1 / 20
    by_hand = ((centre @ k @ centre) * (centre @ m @ centre)).sum()
    by_hand /= (centre @ k @ centre).norm() * (centre @ m @ centre).norm()
    assert kernel_alignment(k, m) == pytest.approx(float(by_hand), abs=1e-5)
    assert kernel_alignment(k, m, centred=False) == pytest.approx(
        float((k * m).sum() / (k.norm() * m.norm())), abs=1e-5
    )
    assert representation_alignment(x, y) == pytest.approx(kernel_alignment(k, m, centred=False), abs=1e-5)
    assert kernel_alignment(k + 100, k) == pytest.approx(1, abs=1e-4)
    assert kernel_alignment(k + 100, m + 100, centred=False) > 0.9
    assert math.isnan(kernel_alignment(torch.ones(4, 4), torch.eye(4)))
    assert representation_alignment(x.bfloat16(), x) == pytest.approx(1, abs=1e-3)
    with pytest.raises(MeasureError, match="one size"):
        kernel_alignment(k, m[:5, :5])
    with pytest.raises(MeasureError, match="same rows"):
        representation_alignment(x, y[:4])


def test_the_target_is_aligned_with_itself():
    y = torch.tensor([0, 2, 1, 2])
    assert torch.equal(label_kernel(y), F.one_hot(y).float() @ F.one_hot(y).float().T)
    assert torch.equal(label_kernel(y.float()), torch.outer(y.float(), y.float()))
    assert label_kernel(y.bfloat16()).dtype == torch.float32


def test_following_a_training_sees_the_kernel_turn_to_the_target():
    teacher = QuadraticTeacher(8, seed=0)
    x, y = teacher.sample(80, seed=1)
    net = Committee(8, 50, eps=1.0, seed=2)
    follow = TangentKernelAlignment(x, y)
    follow.update(0, net)
    with torch.no_grad():
        net.weight += 5 * torch.outer(net.weight @ teacher.direction(), teacher.direction())
    follow.update(1, net)
    table = follow.compute()
    assert table.label_alignment[1] > 2 * table.label_alignment[0]
    assert table.initial_alignment[0] == pytest.approx(1)
    assert table.initial_alignment[1] < 0.9
    with pytest.raises(MeasureError, match="per='probe'"):
        TangentKernelAlignment(x, y, per="output")


# Regime


def trained(alpha, seed=0, steps=300):
    """A perceptron on a quadratic, at a scale of its output; gradient descent at a rate that goes with the scale."""
    x, y = QuadraticTeacher(6, seed=0).sample(60, seed=1)
    net = MLP([6, 40, 1], act="tanh", seed=seed)
    start, scaled = copy.deepcopy(net), OutputScale(net, alpha)
    for _ in range(steps):
        loss = scaled.loss((scaled(x)[:, 0] - y).square().mean())
        grads = torch.autograd.grad(loss, list(net.parameters()))
        with torch.no_grad():
            for one, grad in zip(net.parameters(), grads, strict=True):
                one -= 0.1 * grad
    return start, net, x


def test_a_large_output_scale_is_lazy_and_a_small_one_rich():
    lazy, rich = (regime(*trained(alpha), "module:act.0") for alpha in (100.0, 0.1))
    assert lazy.verdict == "lazy"
    assert lazy.KA > 0.999 > rich.KA
    assert lazy.RA > 0.999 > rich.RA
    assert lazy.index < 0.01 < 0.1 < rich.index
    assert lazy.weight_change < rich.weight_change / 10


def test_what_did_not_change_and_what_changed_by_a_known_amount():
    net, x = MLP([6, 12, 3]), randn(7, 6)
    same = regime(net, copy.deepcopy(net), x, "module:act.*", outputs=2)
    assert (same.weight_change, same.verdict) == (0, "lazy")
    assert (same.RA, same.KA, same.index) == (pytest.approx(1), pytest.approx(1), pytest.approx(0, abs=1e-6))
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.linear[0].weight += 0.5
    moved = regime(net, other, x, kernel=False, sites="module:act.0", weights="linear.0.weight")
    assert moved.weight_change == pytest.approx(0.5 * math.sqrt(72), rel=1e-5)
    assert moved.relative_change == pytest.approx(
        moved.weight_change / float(net.linear[0].weight.detach().norm()), rel=1e-5
    )
    assert math.isnan(moved.KA)
    assert list(moved.rank) == ["linear.0.weight"]
    h, g = (one.act[0](one.linear[0](x)).detach() for one in (net, other))
    assert moved.by_site == {"module:act.0": pytest.approx(representation_alignment(h, g), abs=1e-6)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_regime_of_a_transformer_by_its_sites(dtype):
    torch.manual_seed(0)
    before = Subject.fresh(SubjectConfig(vocab=12, d_model=16, heads=2, context=8, layers=2), seed=0).to(dtype)
    after, far = copy.deepcopy(before), Subject.fresh(before.config, seed=1).to(dtype)
    with torch.no_grad():
        for one in after.parameters():
            one += 0.01 * torch.randn_like(one) * one.std()
    ids = torch.randint(12, (6, 8), generator=torch.Generator().manual_seed(0))
    options = {"outputs": 3, "read": lambda out: out.logits[:, -1], "sites": "blocks.*.resid.post"}
    near, unrelated = (regime(before, one, ids, **options) for one in (after, far))
    assert near.verdict == "lazy"
    assert list(near.by_site) == ["blocks.0.resid.post", "blocks.1.resid.post"]
    assert near.KA > 0.99 > unrelated.KA
    assert near.RA > unrelated.RA
    assert near.weight_change < 0.1 * unrelated.weight_change


def test_padding_does_not_count_among_the_representations():
    before = Subject.fresh(SubjectConfig(vocab=12, d_model=16, heads=2, context=8), seed=0)
    after = Subject.fresh(before.config, seed=1)
    ids = torch.randint(12, (4, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    other = ids.clone()
    other[0, 5:] = 3
    found = [
        regime(before, after, {"input_ids": one, "attention_mask": mask}, "blocks.0.resid.post", kernel=False).RA
        for one in (ids, other)
    ]
    assert found[0] == pytest.approx(found[1], abs=1e-6)


def test_regimes_of_bad_input():
    net, x = MLP([6, 12, 3]), randn(7, 6)
    with pytest.raises(MeasureError, match="nothing to tell"):
        regime(net, net, x, kernel=False)
    with pytest.raises(MeasureError, match="same parameters"):
        regime(net, MLP([6, 13, 3]), x)
    with pytest.raises(MeasureError, match="rich <= lazy"):
        regime(net, net, x, lazy=0.5, rich=0.6)
    with pytest.raises(MeasureError, match=r"nearest: linear\.0"):
        regime(net, net, x, weights="linear.0.wieght")
    with pytest.raises(SiteError, match="nearest"):
        regime(net, net, x, "module:atc.0")


def test_the_index_of_kernels():
    k = randn(10, 10)
    k = k @ k.T
    assert lazy_rich_index(k, 5 * k) == pytest.approx(0, abs=1e-9)
    assert lazy_rich_index(k, torch.eye(10)) == pytest.approx(1 - kernel_alignment(k, torch.eye(10)))
    assert rank_in_use(torch.diag(torch.tensor([2.0, 1.0, 0.0]))) == pytest.approx(9 / 5)
    assert rank_in_use(torch.zeros(3, 3)) == 0
    with pytest.raises(MeasureError, match="of a matrix"):
        rank_in_use(torch.zeros(3))


# Initial rank


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_rank_keeps_the_leading_triplets_and_the_norm(dtype):
    weight = randn(12, 8).to(dtype)
    before = weight.clone()
    out = low_rank_(weight, 3)
    assert out is weight
    u, s, vh = torch.linalg.svd(before.double())
    expected = (u[:, :3] * s[:3]) @ vh[:3]
    expected *= before.double().norm() / expected.norm()
    torch.testing.assert_close(weight.double(), expected, rtol=0.02, atol=0.02 if dtype == torch.bfloat16 else 1e-5)
    assert float(weight.double().norm()) == pytest.approx(float(before.double().norm()), rel=1e-2)


def test_low_rank_of_all_ranks_changes_nothing_and_of_a_parameter_works_in_place():
    layer = nn.Linear(6, 6)
    before = layer.weight.detach().clone()
    torch.testing.assert_close(low_rank_(layer.weight, 6).detach(), before)
    assert layer.weight.requires_grad
    other = randn(6, 6, seed=3)
    low_rank_(layer.weight, 1, align_to=other)
    u, _, vh = torch.linalg.svd(other)
    assert abs(float(u[:, 0] @ layer.weight.detach() @ vh[0])) == pytest.approx(float(before.norm()), rel=1e-5)


def test_ranks_that_cannot_be():
    for arguments, message in [
        ((torch.zeros(3), 1), "a matrix of floats"),
        ((torch.eye(3), 4), "ranks from 1 to 3"),
        ((torch.eye(3), 1, torch.eye(4)), "one shape"),
        ((torch.zeros(3, 3), 1), "zero or not finite"),
    ]:
        with pytest.raises(ValueError, match=message):
            low_rank_(*arguments)


# Output scale


def test_the_scaled_network_is_zero_at_first_and_moves_alpha_times_as_far():
    net, x = MLP([4, 8, 2]), randn(5, 4)
    scaled = OutputScale(net, 3.0)
    assert bool((scaled(x) == 0).all())
    before = net(x).detach()
    with torch.no_grad():
        net.linear[1].bias += 0.5
    torch.testing.assert_close(scaled(x), 3 * (net(x) - before))
    assert {name.split(".")[0] for name, one in scaled.named_parameters() if one.requires_grad} == {"model"}


def test_a_step_of_the_divided_loss_does_not_grow_with_alpha():
    # To first order F moves by -rate * K * residual at every alpha.
    x, y = randn(6, 4), randn(6, seed=1)
    moves = []
    for alpha in (1.0, 100.0):
        net = MLP([4, 30, 1], act="tanh").double()
        scaled = OutputScale(net, alpha)
        loss = scaled.loss((scaled(x.double())[:, 0] - y.double()).square().mean())
        grads = torch.autograd.grad(loss, list(net.parameters()))
        with torch.no_grad():
            for one, grad in zip(net.parameters(), grads, strict=True):
                one -= 1e-4 * grad
        moves.append(scaled(x.double())[:, 0].detach())
    torch.testing.assert_close(*moves, rtol=1e-2, atol=1e-6)


def test_the_start_stays_in_evaluation_mode_and_objects_with_logits_work():
    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    scaled = OutputScale(net, 2.0).train()
    assert net.training
    assert not any(one.training for one in scaled.start.modules())
    subject = Subject.fresh(SubjectConfig(vocab=8, d_model=8, heads=2, context=6))
    out = OutputScale(subject, 2.0)(input_ids=torch.zeros(1, 6, dtype=torch.long))
    assert out.logits.shape == (1, 6, 8)
    assert bool((out.logits == 0).all())
    with pytest.raises(ValueError, match="positive"):
        OutputScale(net, 0)
    with pytest.raises(TypeError, match="of a Model give its"):
        OutputScale(ac.wrap(net), 1.0)
    with pytest.raises(TypeError, match="neither a tensor nor logits"):
        OutputScale(nn.LSTM(4, 4), 1.0)(randn(2, 3, 4))


# The networks of these reproductions


def test_the_recurrent_network_step_by_step():
    net, x = LeakyRNN(3, 5, 2, leak=0.3, seed=1), randn(4, 6, 3)
    W, U = net.recurrent.weight, net.input.weight
    h = torch.zeros(4, 5)
    for t in range(6):
        h = 0.3 * h + 0.7 * (h.relu() @ W.T + x[:, t] @ U.T)
    torch.testing.assert_close(net(x), h.relu() @ net.readout.weight.T + net.readout.bias)
    states = ac.wrap(net).record(x, "module:state")["module:state"]
    assert states.shape == (4, 6, 5)
    torch.testing.assert_close(states[:, -1], h.detach())
    assert float(LeakyRNN(3, 400, 2, gain=2.0).recurrent.weight.detach().std()) == pytest.approx(2 / 20, rel=0.02)
    assert torch.equal(rows_of(torch.arange(8.0).view(2, 4))[1], torch.tensor([[4.0, 5.0], [6.0, 7.0]]))
    with pytest.raises(ValueError, match="leak"):
        LeakyRNN(3, 5, 2, leak=1.0)
    with pytest.raises(ValueError, match="not square"):
        rows_of(torch.zeros(2, 6))


def test_the_committee_and_its_teacher():
    net, x = Committee(8, 20, eps=0.5, seed=1), randn(6, 8)
    h = x @ net.weight.T / math.sqrt(8)
    torch.testing.assert_close(net(x), (h + 0.25 * h**2).mean(1))
    teacher = QuadraticTeacher(8, seed=2)
    assert float(teacher.direction().norm()) == pytest.approx(1)
    assert Committee(200, 400).alignment(QuadraticTeacher(200).direction()) == pytest.approx(1 / 200, rel=0.2)
    one, two = teacher.sample(5000, seed=0), teacher.sample(5000, seed=1)
    assert not torch.equal(one[0], two[0])
    assert float(one[1].mean()) == pytest.approx(0.5, rel=0.1)
    with pytest.raises(ValueError, match="too small"):
        Committee(0, 3)
