"""The optimizer wrapper against updates taken back by hand, and with what is used around an optimizer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from actome.tune import IgnoreTopK

MAKERS = {
    "sgd": lambda params: torch.optim.SGD(params, 0.1, momentum=0.9, weight_decay=0.01),
    "adam": lambda params: torch.optim.Adam(params, 0.01),
    "adamw": lambda params: torch.optim.AdamW(params, 0.01, weight_decay=0.1, foreach=True),
    "rmsprop": lambda params: torch.optim.RMSprop(params, 0.01),
    "adagrad": lambda params: torch.optim.Adagrad(params, 0.1),
}


def net(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3)).to(dtype)


def backward(module: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 6, generator=generator).to(next(module.parameters()).dtype)
    module.zero_grad()
    module(x).square().mean().backward()


def weights(module: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in module.parameters()]


@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("name", MAKERS)
def test_each_step_is_the_wrapped_one_less_its_largest_entries(name, scope):
    module, k = net(), 0.2
    optimizer = IgnoreTopK(MAKERS[name](module.parameters()), k, scope)
    for step in range(4):
        backward(module, step)
        # The same optimizer with the same state on a copy of the module, unwrapped.
        twin = copy.deepcopy(module)
        for p, q in zip(module.parameters(), twin.parameters(), strict=True):
            q.grad = p.grad.clone()
        plain = MAKERS[name](twin.parameters())
        plain.load_state_dict(copy.deepcopy(optimizer.optimizer.state_dict()))
        before = weights(module)
        plain.step()
        optimizer.step()
        rows = [
            torch.stack([new.flatten(), full.flatten(), old.flatten()])
            for new, full, old in zip(weights(module), weights(twin), before, strict=True)
        ]
        for new, full, old in rows if scope == "tensor" else [torch.cat(rows, 1)]:
            left_out = new != full
            assert torch.equal(new, torch.where(left_out, old, full))
            assert int(left_out.sum()) == int(k * len(new))
            size = (full - old).abs()
            # Adam's first update has one size everywhere: any of the ties may be taken.
            assert not left_out.any() or float(size[left_out].min()) >= float(size[~left_out].max())


def test_nothing_or_everything_is_left_out_at_the_ends():
    for k in (0.0, 1.0):
        module, twin = net(), net()
        optimizer, plain = IgnoreTopK(MAKERS["adam"](module.parameters()), k), MAKERS["adam"](twin.parameters())
        start = weights(module)
        for step in range(3):
            backward(module, step)
            backward(twin, step)
            optimizer.step()
            plain.step()
        assert all(map(torch.equal, weights(module), weights(twin) if k == 0 else start))


def test_adam_is_ranked_by_its_update_and_not_by_the_gradient():
    # Two gradients that differ a thousandfold make equal first steps with Adam; the third is small by its history.
    weight = nn.Parameter(torch.zeros(3))
    optimizer = IgnoreTopK(torch.optim.Adam([weight], 0.1), 1 / 3)
    optimizer.state[weight] = {
        "step": torch.tensor(10.0), "exp_avg": torch.zeros(3), "exp_avg_sq": torch.tensor([0.0, 1.0, 100.0]),
    }  # fmt: skip
    weight.grad = torch.tensor([0.001, 1.0, 5.0])
    optimizer.step()
    # The smallest gradient has the largest update, since there was none before.
    assert weight[0] == 0
    assert bool((weight[1:] != 0).all())


def test_random_entries_are_as_many_and_repeat_by_seed():
    found = []
    for seed in (0, 0, 1):
        module = net()
        optimizer = IgnoreTopK(MAKERS["sgd"](module.parameters()), 0.2, "global", choice="random", seed=seed)
        backward(module, 0)
        before = weights(module)
        optimizer.step()
        found.append(torch.cat([(a == b).flatten() for a, b in zip(weights(module), before, strict=True)]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert int(found[0].sum()) == int(0.2 * found[0].numel())


@pytest.mark.parametrize("choice", ["top", "random"])
def test_a_run_goes_on_from_its_state_as_if_it_had_not_stopped(choice):
    def make(module: nn.Module) -> IgnoreTopK:
        return IgnoreTopK(MAKERS["adam"](module.parameters()), 0.3, choice=choice, seed=4)

    def go(module: nn.Module, optimizer: IgnoreTopK, steps: range) -> None:
        for step in steps:
            backward(module, step)
            optimizer.step()

    whole = net()
    go(whole, make(whole), range(6))
    module = net()
    optimizer = make(module)
    go(module, optimizer, range(3))
    again, state = net(9), copy.deepcopy(optimizer.state_dict())
    again.load_state_dict(module.state_dict())
    other = make(again)
    other.load_state_dict(state)
    go(again, other, range(3, 6))
    assert all(map(torch.equal, weights(again), weights(whole)))
    # The state of the bare optimizer is taken as well.
    other.load_state_dict(optimizer.optimizer.state_dict())


def test_schedulers_scalers_closures_and_new_groups_work_on_the_wrapper():
    module = net()
    optimizer = IgnoreTopK(torch.optim.SGD(module[0].parameters(), 0.1), 0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    backward(module, 0)
    optimizer.step()
    schedule.step()
    assert optimizer.optimizer.param_groups[0]["lr"] == pytest.approx(0.05)
    optimizer.add_param_group({"params": module[2].parameters(), "lr": 0.2})
    assert [group["lr"] for group in optimizer.optimizer.param_groups] == pytest.approx([0.05, 0.2])
    before = weights(module)
    backward(module, 1)
    optimizer.step()
    assert not torch.equal(before[2], weights(module)[2])
    optimizer.zero_grad()
    assert all(p.grad is None for p in module.parameters())

    def closure() -> torch.Tensor:
        backward(module, 2)
        return torch.tensor(3.5)

    before = weights(module)
    assert optimizer.step(closure) == 3.5
    assert not torch.equal(before[0], weights(module)[0])

    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for bad in (1.0, float("inf")):
        before = weights(module)
        optimizer.zero_grad()
        scaler.scale(bad * module(torch.ones(1, 6)).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        # A step with infinite gradients is skipped.
        assert all(map(torch.equal, weights(module), before)) == (bad != 1.0)


def test_bfloat16_and_parameters_without_gradient():
    module = net(dtype=torch.bfloat16)
    module[2].requires_grad_(False)
    optimizer = IgnoreTopK(torch.optim.SGD(module.parameters(), 1.0), 0.5, "global")
    backward(module, 0)
    before = weights(module)
    optimizer.step()
    same = [(a == b) for a, b in zip(weights(module), before, strict=True)]
    assert bool(same[2].all())
    assert int(torch.cat([one.flatten() for one in same[:2]]).sum()) >= 35


def test_bad_input_is_refused():
    module = net()
    with pytest.raises(TypeError, match="wraps an optimizer"):
        IgnoreTopK(module)
    inner = torch.optim.SGD(module.parameters(), 0.1)
    for options, message in (
        ({"k": 8}, "k=8 is no share"), ({"scope": "layer"}, "choose 'tensor' or 'global'"),
        ({"choice": "bottom"}, "choose 'top' or 'random'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            IgnoreTopK(inner, **options)
    inner.param_groups[0]["params"][0].device_mesh = "two processes"
    with pytest.raises(TypeError, match="sharded"):
        IgnoreTopK(inner)
