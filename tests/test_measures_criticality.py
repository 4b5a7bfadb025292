"""Layer criticality: what replaced modules do to predictions, by hand and with planted truth."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import actome as ac
from actome.core.errors import MeasureError
from actome.measures import centre_of_gravity, criticality_profile, layer_criticality
from actome.tasks.nets import CNN, MLP, ResidualMLP


def data(rows: int = 40, width: int = 6) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(0))


def test_zero_reset_is_what_zeroing_by_hand_gives():
    net, x = MLP([6, 12, 12, 3], seed=0), data()
    frame = layer_criticality(net, x, reset="zero").set_index("module")
    for name in ("linear.0", "linear.1", "linear.2"):
        other = copy.deepcopy(net)
        for parameter in other.get_submodule(name).parameters():
            parameter.data.zero_()
        with torch.no_grad():
            p, q = net(x).softmax(-1), other(x).softmax(-1)
        row = frame.loc[name]
        assert row["criticality"] == pytest.approx(1 - float(F.cosine_similarity(p, q, dim=-1).mean()), abs=1e-6)
        assert row["l1"] == pytest.approx(float((p - q).abs().sum(-1).mean()), abs=1e-6)
        assert row["l2"] == pytest.approx(float((p - q).norm(dim=-1).mean()), abs=1e-6)
        assert row["kl"] == pytest.approx(float(F.kl_div(q.log(), p, reduction="batchmean")), abs=1e-5)


def test_a_fresh_draw_is_the_modules_own_scheme_and_differs_between_trials():
    net, x = MLP([6, 12, 3], seed=0), data()
    frame = layer_criticality(net, x, ["linear.0"], trials=3)
    assert frame["criticality"].nunique() == 3
    assert frame.equals(layer_criticality(net, x, ["linear.0"], trials=3))
    assert frame.equals(layer_criticality(ac.wrap(net), [x], "linear.0", trials=3))
    assert not frame.equals(layer_criticality(net, x, ["linear.0"], trials=3, seed=1))
    # A factory that gives the very same net back moves nothing.
    same = layer_criticality(net, x, factory=lambda: copy.deepcopy(net), trials=1)
    assert same["criticality"].abs().max() < 1e-12


def test_the_model_is_bit_for_bit_what_it_was():
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
    net.train()
    net[3].eval()
    net[1](torch.randn(20, 8))
    before, flags = copy.deepcopy(net.state_dict()), [one.training for one in net.modules()]
    random = torch.get_rng_state()
    hooks = [len(one._forward_hooks) for one in net.modules()]
    pointers = [parameter.data_ptr() for parameter in net.parameters()]
    layer_criticality(net, data(), trials=2)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert [one.training for one in net.modules()] == flags
    assert torch.equal(torch.get_rng_state(), random)
    assert [len(one._forward_hooks) for one in net.modules()] == hooks
    assert [parameter.data_ptr() for parameter in net.parameters()] == pointers
    assert all(parameter.grad is None for parameter in net.parameters())


def test_norm_buffers_are_reset_too():
    net = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3)).eval()
    net[0].running_mean.fill_(50.0)  # parameters are as fresh; only the buffers know that it was trained
    x = 50 + data()
    assert float(layer_criticality(net, x, ["0"], trials=1)["criticality"].iloc[0]) > 0.05


def test_an_unused_block_is_not_critical_and_a_bottleneck_is():
    net = ResidualMLP(6, 16, 3, 4, seed=1)
    with torch.no_grad():
        for parameter in net.readout.parameters():
            parameter.mul_(20)  # predictions that mean something
        for parameter in net.blocks[1][3].parameters():
            parameter.zero_()
    profile = criticality_profile(layer_criticality(net, data(), ["embed", "blocks.1.1", "readout"]))["criticality"]
    assert abs(profile["blocks.1.1"]) < 1e-12
    assert profile["embed"] > 0.1
    assert profile["readout"] > 0.1


def test_labels_masks_and_images():
    x, y = data(), torch.zeros(40, dtype=torch.long)
    net = MLP([6, 8, 3], seed=0)
    drop = layer_criticality(net, [(x[:30], y[:30]), (x[30:], y[30:])], ["linear.1"], reset="zero")["accuracy_drop"]
    # With all logits 0 the first class is predicted.
    assert float(drop.iloc[0]) == pytest.approx(float((net(x).argmax(-1) == 0).double().mean()) - 1)
    assert len(layer_criticality(CNN([1, 4, 8], 5), torch.randn(3, 1, 8, 8), trials=1)) == 3


def test_a_transformers_model_is_made_anew_from_its_configuration_and_padding_does_not_count():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=20, n_embd=8, n_head=2, n_layer=1, n_positions=8, initializer_range=0.5)
    net = GPT2LMHeadModel(config).eval()
    ids, mask = torch.randint(0, 20, (3, 6)), torch.ones(3, 6, dtype=torch.long)
    mask[0, 4:] = 0
    other = ids.clone()
    other[0, 4:] = 7
    one, two = (
        layer_criticality(net, {"input_ids": x, "attention_mask": mask}, ["transformer.h.0.mlp.*"], trials=1)
        for x in (ids, other)
    )
    assert list(one["module"]) == ["transformer.h.0.mlp.c_fc", "transformer.h.0.mlp.c_proj"]
    assert one["criticality"].tolist() == pytest.approx(two["criticality"].tolist(), abs=1e-7)
    assert one["criticality"].min() > 0


def test_bad_input_is_told():
    net, x = MLP([6, 8, 3]), data()
    with pytest.raises(MeasureError, match=r"linear.0"):
        layer_criticality(net, x, ["linaer.0"])
    with pytest.raises(MeasureError, match="no data"):
        layer_criticality(net, [])
    with pytest.raises(MeasureError, match="zero"):
        layer_criticality(net, x, reset="ones")
    with pytest.raises(MeasureError, match="trials=0"):
        layer_criticality(net, x, trials=0)
    with pytest.raises(MeasureError, match="not finite"):
        layer_criticality(net, torch.full((2, 6), torch.nan))

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(6, 3))

        def forward(self, x):
            return x @ self.weight

    with pytest.raises(MeasureError, match="factory"):
        layer_criticality(Own(), x)
    assert len(layer_criticality(Own(), x, factory=Own, trials=1)) == 1


def test_depth_runs_from_the_first_module_to_the_last():
    frame = layer_criticality(MLP([6, 5, 4, 3, 2], seed=0), data(), reset="zero")
    assert frame["depth"].tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert layer_criticality(MLP([6, 3], seed=0), data(), reset="zero")["depth"].tolist() == [0]


def test_centre_of_gravity_of_nothing_is_unknown():
    import pandas as pd

    assert math.isnan(centre_of_gravity(pd.DataFrame({"depth": [0.0, 1.0], "criticality": [0.0, 0.0]})))
