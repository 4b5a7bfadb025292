"""Watching what trainings are made of: accumulation, mixed precision, compilation, checkpointing, adapters."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from watch_loop import PROBE, events, ids, loss_of, opened, same, subject, trained, weights

import actome as ac
from actome.core.errors import RunError
from actome.dynamics.watching.unwrap import unwrap


@pytest.mark.parametrize("where", ["after the step", "after each backward pass"])
def test_a_step_of_several_backward_passes_is_one(tmp_path, where):
    module = subject()
    twin = copy.deepcopy(module)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    means = []
    with ac.watch(module, text=PROBE, run=tmp_path / "a", every=1, optimizer=optimizer) as watch:
        for step in range(3):
            losses = []
            for micro in range(4):
                loss = loss_of(module, ids(4 * step + micro))
                (loss / 4).backward()
                losses.append(float(loss.detach()))
                if micro < 3 and where == "after each backward pass":
                    watch.step(loss)
            optimizer.step()
            optimizer.zero_grad()
            means.append(sum(losses) / 4)
            watch.step(loss if where == "after each backward pass" else means[-1])
    run = opened(watch)
    assert run.scalars("loss").to_dict() == pytest.approx(dict(enumerate(means, 1)), rel=1e-5)
    assert run.scalars("effective_rank", site="blocks.0.resid.post").index.tolist() == [0, 1, 2, 3]
    # The gradient of a step is that of all its passes.
    grads = torch.autograd.grad(sum(loss_of(twin, ids(m)) for m in range(4)) / 4, list(twin.parameters()))
    norm = torch.cat([g.flatten() for g in grads]).norm()
    assert run.scalars("grad_norm")[1] == pytest.approx(float(norm), rel=1e-4)


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_under_a_scaler_are_unscaled_and_skipped_steps_are_told(tmp_path, fused):
    module = subject()
    twin = copy.deepcopy(module)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    with ac.watch(module, text=PROBE, run=tmp_path / "a", every=1, optimizer=optimizer, scaler=scaler) as watch:
        for step in range(4):
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(module, ids(step))
            scaler.scale(loss * (torch.inf if step == 2 else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            watch.step(loss)
    run = opened(watch)
    assert run.scalars("loss").index.tolist() == [1, 2, 3, 4]
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(twin, ids(0))
    norm = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(twin.parameters()))]).norm()
    assert run.scalars("grad_norm")[1] == pytest.approx(float(norm), rel=0.05)
    skipped = run.events[run.events["name"] == "skipped_step"]["step"].tolist()
    assert skipped == [3]
    assert 3 not in run.scalars("grad_norm").index
    assert run.scalars("loss_scale").tolist()[-1] == 2.0**9
    assert run.alarms.empty


def test_a_skipped_step_is_told_without_the_scaler_being_given(tmp_path):
    module = subject()
    optimizer = torch.optim.AdamW(module.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with ac.watch(module, panel=None, run=tmp_path / "a", optimizer=optimizer) as watch:
        for step in range(3):
            loss = loss_of(module, ids(step))
            scaler.scale(loss * (torch.inf if step == 1 else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            watch.step(loss)
    found = opened(watch).events
    assert found[found["name"] == "skipped_step"]["step"].tolist() == [2]


def test_a_probe_is_cast_as_the_training_is(tmp_path):
    module = subject()
    values = {}
    for dtype in (None, torch.bfloat16):
        with ac.watch(module, text=PROBE, run=tmp_path / str(dtype), autocast=dtype) as watch:
            pass
        values[dtype] = opened(watch).scalars("log_z")[0]
    assert values[None] == pytest.approx(values[torch.bfloat16], rel=0.02)
    assert values[None] != values[torch.bfloat16]


def test_a_look_within_autocast_leaves_the_gradients_of_the_next_forward(tmp_path):
    def run(watched: bool):
        module = subject()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        watch = ac.watch(module, text=PROBE, run=tmp_path / "a", every=1).begin() if watched else None
        with torch.autocast("cpu", torch.bfloat16):  # one region around the whole loop, whose casts are kept
            for step in range(3):
                loss = loss_of(module, ids(step))
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                torch.clear_autocast_cache()  # as leaving the region would, so that both loops see the new weights
                if watch is not None:
                    watch.step(loss)
        if watch is not None:
            watch.close()
        return weights(module)

    assert same(run(False), run(True))


def test_a_network_in_bfloat16_is_watched(tmp_path):
    module = subject().to(torch.bfloat16)
    with ac.watch(module, text=PROBE, run=tmp_path / "a", every=2) as watch:
        trained(module, 4, watch)
    run = opened(watch)
    assert bool((run.scalars("update_norm") > 0).all())
    assert run.scalars("weight_movement").index.tolist() == [0, 2, 4]


def test_a_compiled_network_keeps_its_graph(tmp_path):
    def run(watched: bool):
        torch._dynamo.reset()
        module = subject(layers=1)
        compiled = torch.compile(module, backend="eager", fullgraph=False)
        counters = torch._dynamo.utils.counters
        counters.clear()
        optimizer = torch.optim.AdamW(module.parameters())
        if watched:
            with ac.watch(compiled, text=PROBE, run=tmp_path / "a", every=2, optimizer=optimizer) as watch:
                assert watch.module is module
                losses = _compiled(compiled, optimizer, watch)
            assert opened(watch).scalars("effective_rank").index.tolist() == [0, 2, 4, 6]
        else:
            losses = _compiled(compiled, optimizer, None)
        graphs = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
        return losses, weights(module), graphs, sum(counters["recompiles"].values())

    plain, watched = run(False), run(True)
    assert plain[0] == watched[0]
    assert same(plain[1], watched[1])
    assert plain[2] == watched[2]
    assert plain[2][0] >= 1
    assert plain[3] == watched[3]


def _compiled(module, optimizer, watch):
    losses = []
    for step in range(6):
        loss = loss_of(module, ids(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if watch is not None:
            watch.step(loss)
    return losses


class Checkpointed(nn.Module):
    """Blocks that are computed twice in training."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Dropout(0.2)) for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.training else block(x)
        return x


def test_activation_checkpointing_is_left_alone(tmp_path):
    def run(watched: bool):
        torch.manual_seed(0)
        module = Checkpointed()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        options = {"text": torch.ones(4, 6), "run": tmp_path / "a", "every": 1}
        watch = ac.watch(module, **options).begin() if watched else None
        for _ in range(4):
            loss = module(torch.randn(8, 6)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if watch is not None:
                watch.step(loss)
        if watch is not None:
            watch.close()
        return weights(module)

    assert same(run(False), run(True))
    assert len(opened(tmp_path / "a").scalars("rms", site="module:blocks.2.1")) == 5


def test_adapters_are_watched_in_their_base_and_only_they_are_counted(tmp_path):
    peft = pytest.importorskip("peft")
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=24, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(config)
    module = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    keys = list(module.state_dict())
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-2)
    with ac.watch(module, text=PROBE, run=tmp_path / "a", every=2, optimizer=optimizer) as watch:
        for step in range(4):
            loss = loss_of(module, ids(step))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            watch.step(loss)
    assert list(module.state_dict()) == keys
    run = opened(watch)
    assert events(watch, "begin")[0]["trained"] == sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert set(run.frame("grad_norm")["site"].dropna()) == {
        f"blocks.{i}.{part}" for i in (0, 1) for part in ("attn", "mlp")
    }
    assert run.scalars("effective_rank", site="blocks.1.resid.post").index.tolist() == [0, 2, 4]
    rank = run.scalars("rms", site="blocks.1.resid.post")
    assert rank[4] != rank[0]  # the adapters are part of what is measured


def test_sharded_weights_are_refused():
    class FullyShardedDataParallel(nn.Linear):
        pass

    with pytest.raises(RunError, match="split over processes"):
        unwrap(FullyShardedDataParallel(2, 2))


def test_several_optimizers_make_one_step(tmp_path):
    module = subject()
    first = torch.optim.SGD(module.blocks.parameters(), lr=0.1)
    rest = [p for name, p in module.named_parameters() if not name.startswith("blocks")]
    second = torch.optim.AdamW(rest)
    before = weights(module)
    with ac.watch(module, panel=None, run=tmp_path / "a", every=1, optimizer=[first, second]) as watch:
        loss = loss_of(module, ids(0))
        loss.backward()
        total = torch.cat([p.grad.flatten() for p in module.parameters()]).norm()
        first.step()
        second.step()
        watch.step(loss)
    run = opened(watch)
    moved = torch.cat([(value - before[name]).flatten() for name, value in weights(module).items()]).norm()
    assert run.scalars("grad_norm").tolist() == pytest.approx([float(total)])
    assert run.scalars("update_norm").tolist() == pytest.approx([float(moved)], rel=1e-4)
