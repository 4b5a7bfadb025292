"""Permutation of units: function-preserving groups, and matching against planted permutations and brute force."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import actome as ac
from actome.core.errors import MeasureError
from actome.core.prove import evaluating
from actome.measures import Axis, Group, align, permutation_groups, permuted
from actome.measures.alignment import distance, match_weights, parameters_of
from actome.measures.permutation import check_groups, copied, forward
from actome.tasks import Subject, SubjectConfig
from actome.tasks.nets import CNN, MLP, ResidualMLP
from actome.tasks.rnn import LeakyRNN


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def shuffled(module, groups, seed=1):
    generator = torch.Generator().manual_seed(seed)
    orders = {group.name: torch.randperm(group.units, generator=generator) for group in groups}
    return copied(module, permuted(module.state_dict(), groups, orders)), orders


IMAGES = randn(60, 1, 8, 8)
IDS = {"input_ids": torch.randint(16, (4, 12), generator=torch.Generator().manual_seed(0))}


def subject(**options):
    return Subject.fresh(SubjectConfig(vocab=16, d_model=32, heads=4, context=12, layers=2, **options))


def mixed_net():
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(96, 12), nn.LayerNorm(12), nn.Tanh(), nn.Linear(12, 3),
    )  # fmt: skip
    net(2 * IMAGES + 1)  # running statistics that differ between channels
    return net.eval()


CASES = {
    "mlp": (lambda: MLP([64, 32, 16, 10]), IMAGES.flatten(1), [32, 16]),
    "cnn": (lambda: CNN([1, 8, 16, 16], 10, pool=[0]), IMAGES, [8, 16, 16]),
    "residual": (lambda: ResidualMLP(64, 32, 2, 10), IMAGES.flatten(1), [64, 64]),
    "norms and flattening": (mixed_net, IMAGES, [8, 6, 12]),
    "subject": (subject, IDS, [4, 128, 4, 128]),
    "gated, rotary": (lambda: subject(mlp="gated", positions="rotary", qk_norm=True), IDS, [4, 128, 4, 128]),
    "alibi": (lambda: subject(positions="alibi"), IDS, [128, 128]),  # whose heads differ by their place
    "bfloat16": (lambda: subject().bfloat16(), IDS, [4, 128, 4, 128]),
}


@pytest.mark.parametrize("name", CASES)
def test_groups_leave_the_function_alone_and_planted_orders_are_found(name):
    make, inputs, units = CASES[name]
    torch.manual_seed(0)
    net = make()
    groups = permutation_groups(net, inputs)
    assert [group.units for group in groups] == units
    other, orders = shuffled(net, groups)
    with torch.no_grad(), evaluating(net), evaluating(other):
        one, two = forward(net, inputs).float(), forward(other, inputs).float()
    torch.testing.assert_close(one, two, rtol=0, atol=(2e-2 if name == "bfloat16" else 1e-5) * float(one.abs().max()))
    for by in ("weights", "activations"):
        found = align(net, other, by, inputs=inputs, groups=groups)
        assert found.after == 0 < found.before
        assert all(torch.equal(found.orders[key].argsort(), order) for key, order in orders.items())
        assert all(torch.equal(one, found.module.state_dict()[key]) for key, one in net.state_dict().items())


def test_families_of_transformers_with_fused_and_grouped_attention():
    import transformers as tf

    small = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 1}
    gpt2 = {"n_layer": 1, "n_embd": 32, "n_head": 4}
    for make, units in [
        (lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=50, bos_token_id=0, eos_token_id=0, **gpt2)), [4, 128]),
        (lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(vocab_size=50, **small)), [4, 64]),
        (lambda: tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=50, num_key_value_heads=2, **small)), [2, 64]),
    ]:
        torch.manual_seed(0)
        net = make().eval()
        groups = permutation_groups(net)
        assert [group.units for group in groups] == units
        found = align(net, shuffled(net, groups)[0], groups=groups)
        assert found.after == 0 < found.before


def test_one_hidden_layer_is_matched_as_by_trying_all_orders():
    a, b = MLP([3, 5, 2], seed=0), MLP([3, 5, 2], seed=1)
    groups = permutation_groups(a, randn(4, 3))
    ours, theirs = parameters_of(a), parameters_of(b)
    best = min(
        distance(ours, permuted(theirs, groups, {"linear.1": torch.tensor(order)}))
        for order in itertools.permutations(range(5))
    )
    found = align(a, b, groups=groups)
    assert found.after == pytest.approx(best)
    assert found.after < found.before


def test_several_layers_come_closer_and_compute_the_same():
    a, b, x = MLP([8, 20, 20, 3], seed=0), MLP([8, 20, 20, 3], seed=1), randn(100, 8)
    for by in ("weights", "activations"):
        found = align(a, b, by, inputs=x)
        assert found.before == pytest.approx(distance(parameters_of(a), parameters_of(b)))
        torch.testing.assert_close(found.module(x), b(x))
        assert found.moved > 0.5
    assert align(a, b, inputs=x).after < found.before
    assert align(a, a, inputs=x).moved == 0
    assert torch.equal(
        align(a, b, inputs=x, seed=3).orders["linear.1"], align(a, b, inputs=x, seed=3).orders["linear.1"]
    )


def test_activations_are_matched_by_correlation_whatever_their_scale():
    a, x = MLP([8, 20, 3], seed=0), randn(300, 8)
    groups = permutation_groups(a, x)
    b, orders = shuffled(a, groups)
    with torch.no_grad():  # 10 times as large and back: another distance, the same correlations
        b.linear[0].weight *= 10
        b.linear[0].bias *= 10
        b.linear[1].weight /= 10
    found = align(a, b, "activations", inputs=x, groups=groups)
    assert torch.equal(found.orders["linear.1"].argsort(), orders["linear.1"])


def test_groups_can_be_described_by_hand():
    # The states of a recurrent network lie along both axes of one matrix.
    net = LeakyRNN(3, 12, 2, seed=0)
    axes = ("input.weight", 0), ("recurrent.weight", 0), ("recurrent.weight", 1), ("readout.weight", 1)
    groups = [Group("state", 12, tuple(Axis(name, dim) for name, dim in axes))]
    other, orders = shuffled(net, groups)
    x = randn(4, 6, 3)
    torch.testing.assert_close(net(x), other(x))
    found = align(net, other, groups=groups)
    assert found.after == 0
    assert torch.equal(found.orders["state"].argsort(), orders["state"])
    with pytest.raises(MeasureError, match="names no site"):
        align(net, other, "activations", inputs=x, groups=groups)


def test_axes_with_blocks_and_repeats():
    order = torch.tensor([2, 0, 1])
    assert Axis("w", 0, block=2, repeats=2).index(order).tolist() == [4, 5, 0, 1, 2, 3, 10, 11, 6, 7, 8, 9]
    whole = {"w": torch.arange(12.0)}
    group = Group("g", 3, (Axis("w", 0, 2, 2),))
    there = permuted(whole, [group], {"g": order})
    assert torch.equal(permuted(there, [group], {"g": order.argsort()})["w"], whole["w"])
    assert torch.equal(whole["w"], torch.arange(12.0))


def test_finding_groups_leaves_the_network_alone():
    net = mixed_net().train()
    before = {name: one.clone() for name, one in net.state_dict().items()}
    permutation_groups(net, IMAGES)
    assert all(torch.equal(one, net.state_dict()[name]) for name, one in before.items())
    assert all(one.training for one in net.modules())


def test_what_cannot_be_aligned():
    a, x = MLP([8, 20, 3]), randn(10, 8)
    with pytest.raises(MeasureError, match="'weights' or 'activations'"):
        align(a, a, "names", inputs=x)
    with pytest.raises(MeasureError, match="one architecture"):
        align(a, MLP([8, 21, 3]), inputs=x)
    with pytest.raises(MeasureError, match="give an example"):
        align(a, a)
    with pytest.raises(MeasureError, match="describe some with groups="):
        align(nn.Linear(8, 3), nn.Linear(8, 3), inputs=x)
    with pytest.raises(MeasureError, match="to match activations give inputs"):
        align(a, a, "activations", groups=permutation_groups(a, x))
    with pytest.raises(MeasureError, match="no parameter or buffer 'linear"):
        check_groups(a, [Group("g", 20, (Axis("linear.9.weight", 0),))])
    with pytest.raises(MeasureError, match="has 20 entries, and 1 x 10 units x 1 make 10"):
        check_groups(a, [Group("g", 10, (Axis("linear.0.weight", 0),))])
    with pytest.raises(MeasureError, match="not finite"):
        permutation_groups(a, x * torch.nan)
    broken = parameters_of(a)
    broken["linear.0.weight"][0] = torch.nan
    with pytest.raises(MeasureError, match="not finite"):
        match_weights(parameters_of(a), broken, permutation_groups(a, x))


def test_a_wrapped_model_is_taken_as_its_module():
    net = MLP([8, 20, 3])
    model = ac.wrap(net)
    other, _ = shuffled(net, permutation_groups(model, randn(4, 8)))
    assert align(model, ac.wrap(other), inputs=randn(4, 8)).after == 0
