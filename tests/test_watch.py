"""Watching a plain loop: what is written, that nothing of the training changes, and what is refused."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from watch_loop import PROBE, VOCAB, events, ids, loss_of, opened, same, subject, trained, weights

import actome as ac
from actome.core.errors import MeasureError, RunError, SiteError, TextError
from actome.dynamics import RunStore
from actome.dynamics.alarms import Alarm, Detector


def test_rows_of_a_run_are_those_of_the_training(tmp_path):
    module = subject()
    twin = copy.deepcopy(module)
    with ac.watch(module, text=PROBE, run=tmp_path / "a", every=4, config={"lr": 1e-2}) as watch:
        losses = trained(module, 8, watch)
    run = opened(watch)
    assert run.status == "finished"
    assert run.config == {"lr": 1e-2}
    assert run.scalars("loss").to_dict() == pytest.approx(dict(enumerate(losses, 1)), rel=1e-6)
    assert run.scalars("effective_rank", site="blocks.1.resid.post").index.tolist() == [0, 4, 8]
    assert run.scalars("lr").tolist() == [1e-2] * 8
    assert (run.scalars("step_time") > 0).all()
    assert run.scalars("overhead").iloc[-1] == pytest.approx(watch.overhead, rel=0.5)
    # The first look is that of the network as it was.
    untrained = ac.wrap(twin).measure(PROBE, {"blocks.*.resid.post": [ac.measures.ActivationScale()]})
    rms = run.frame("rms", site="blocks.*.resid.post")
    first = rms[rms["step"] == 0]["value"].tolist()
    assert first == pytest.approx(untrained.value("rms").tolist())
    assert {"attention_logit_max", "induction", "previous_token", "sink", "token_cosine", "log_z", "alpha", "dead"} <= {
        *run.measures
    }
    assert "peak" not in run.measures  # single units
    begin, end = events(watch, "begin")[0], events(watch, "end")[0]
    assert begin["panel"] == "training"
    assert begin["parameters"] == sum(p.numel() for p in module.parameters())
    assert any("moe" in one for one in begin["skipped"])
    assert end["looks"] == 3


def test_norms_are_those_of_the_step_by_component(tmp_path):
    module = subject()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    first = {name: p.detach().clone() for name, p in module.named_parameters()}
    seen: dict[int, dict[str, tuple[float, float]]] = {}
    with ac.watch(module, panel=None, run=tmp_path / "a", every=1, optimizer=optimizer) as watch:
        for step in range(1, 4):
            loss = loss_of(module, ids(step))
            loss.backward()
            before = {name: p.detach().clone() for name, p in module.named_parameters()}
            grads = {name: p.grad.clone() for name, p in module.named_parameters()}
            optimizer.step()
            optimizer.zero_grad()
            after = dict(module.named_parameters())
            names = [name for name in grads if name.startswith("blocks.1.mlp")]

            def norm(tensors):
                return float(torch.cat([t.detach().flatten() for t in tensors]).double().norm())

            for place, some in (("blocks.1.mlp", names), (None, list(grads))):
                seen.setdefault(step, {})[str(place)] = {
                    "grad_norm": norm(grads[n] for n in some),
                    "update_norm": norm(after[n] - before[n] for n in some),
                    "weight_norm": norm(after[n] for n in some),
                    "weight_movement": norm(after[n] - first[n] for n in some),
                    "update_ratio": norm(after[n] - before[n] for n in some) / norm(after[n] for n in some),
                }
            watch.step(loss)
    run = opened(watch)
    for step, places in seen.items():
        for place, values in places.items():
            frame = run.frame(since=step)
            frame = frame[frame["step"] == step]
            mine = frame[frame["site"].isna()] if place == "None" else frame[frame["site"] == place]
            found = dict(zip(mine["measure"], mine["value"], strict=True))
            for name, value in values.items():
                assert found[name] == pytest.approx(value, rel=1e-5), (step, place, name)


class Net(nn.Module):
    """Batch statistics, dropout and a buffer that every forward writes."""

    def __init__(self):
        super().__init__()
        self.one, self.norm, self.drop = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3)
        self.two = nn.Linear(8, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.two(self.drop(self.norm(self.one(x)).relu()))


def _noisy(module, watch, steps=8):
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    for _ in range(steps):
        x = torch.randn(16, 6) + float(np.random.rand()) + random.random()  # noqa: NPY002
        loss = module(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if watch is not None:
            watch.step(loss, components={"half": loss / 2})


@pytest.mark.parametrize("every", ["auto", 1, 3])
def test_a_watched_training_is_bit_for_bit_the_same(tmp_path, every):
    def run(watched: bool):
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002 - the generators that anybody may use
        random.seed(0)
        module = Net().train()
        module.two.eval()  # a mode of its own
        module.two.bias.requires_grad_(False)
        if watched:
            with ac.watch(module, text=torch.randn(4, 6, generator=torch.Generator().manual_seed(1)),
                          run=tmp_path / "a", every=every) as watch:  # fmt: skip
                _noisy(module, watch)
        else:
            _noisy(module, None)
        after = torch.rand(3), np.random.rand(), random.random()  # noqa: NPY002
        modes = [one.training for one in module.modules()]
        hooks = [len(one._forward_hooks) + len(one._forward_pre_hooks) for one in module.modules()]
        return weights(module), after, modes, hooks, [p.requires_grad for p in module.parameters()]

    plain, watched = run(False), run(True)
    assert same(plain[0], watched[0])
    assert torch.equal(plain[1][0], watched[1][0])
    assert plain[1][1:] == watched[1][1:]
    assert plain[2:] == watched[2:]


def test_a_transformer_trained_with_a_watch_is_bit_for_bit_the_same(tmp_path):
    plain, watched = subject(), subject()
    trained(plain, 6)
    with ac.watch(watched, text=PROBE, run=tmp_path / "a", every=2) as watch:
        trained(watched, 6, watch)
    assert same(weights(plain), weights(watched))


def test_the_optimizer_is_found_and_left_as_it_was(tmp_path):
    module = subject()
    optimizer = torch.optim.AdamW(module.parameters())
    other = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with ac.watch(module, panel=None, run=tmp_path / "a", every=1) as watch:
        other.step()
        assert watch.optimizers == []
        trained(module, 2, watch, optimizer)
        assert watch.optimizers == [optimizer]
        copy.deepcopy(optimizer)
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    from torch.optim.optimizer import _global_optimizer_pre_hooks

    assert not _global_optimizer_pre_hooks
    assert len(opened(watch).scalars("grad_norm")) == 2


def test_a_total_norm_from_the_loop_takes_the_place_of_the_one_that_is_taken(tmp_path):
    module = subject()
    with ac.watch(module, panel=None, run=tmp_path / "a", every=2) as watch:
        trained(module, 4, watch, grad_norm=7.0)
    run = opened(watch)
    assert run.scalars("grad_norm").tolist() == [7.0] * 4
    assert set(run.frame("grad_norm", site="embed")["step"]) == {2, 4}


class Above(Detector):
    """An alarm as soon as the loss of step 3 is known."""

    name = "above"
    needs = ("loss",)

    def __init__(self):
        self.steps = []

    def update(self, step, readings):
        self.steps.append(step)
        return [Alarm(step, "above", f"loss at {step}", level="critical", advice="none", source="a test")] * (step == 3)

    def rewind(self, step):
        self.steps = [one for one in self.steps if one < step]


def test_alarms_are_written_and_acted_upon(tmp_path):
    module, seen = subject(), []
    detector = Above()

    def act(alarm, watch):
        seen.append((alarm.step, watch.at, watch.module is module, watch.optimizers))
        watch.stop("enough")
        return "stopped"

    optimizer = torch.optim.AdamW(module.parameters())
    with ac.watch(module, panel=None, run=tmp_path / "a", every=1, optimizer=optimizer, alarms=[detector],
                  actions={"above": act}) as watch:  # fmt: skip
        while not watch.should_stop and watch.at < 6:
            trained(module, 1, watch, optimizer)
    assert (watch.at, watch.reason) == (3, "enough")
    assert seen == [(3, 3, True, [optimizer])]
    alarm = opened(watch).alarms.iloc[0]
    assert (alarm["name"], alarm["level"], alarm["evidence"]) == ("above", "critical", {"source": "a test"})
    assert events(watch, "action") == [{"alarm": "above", "action": "act", "done": True, "note": "stopped"}]
    assert detector.steps == [1, 2, 3]


def test_a_run_is_resumed_from_a_checkpoint(tmp_path):
    module = subject()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    with ac.watch(module, text=PROBE, run=tmp_path / "a", every=2) as watch:
        trained(module, 4, watch, optimizer)
        saved, state = weights(module), copy.deepcopy(optimizer.state_dict())
        trained(module, 4, watch, optimizer)
    moved = opened(watch).scalars("weight_movement", site="embed")
    again = subject(seed=5)
    again.load_state_dict(saved)
    optimizer = torch.optim.AdamW(again.parameters(), lr=1e-2)
    optimizer.load_state_dict(state)
    with ac.watch(again, text=PROBE, run=tmp_path / "a", every=2, resume=4) as watch:
        assert watch.at == 4
        trained(again, 4, watch, optimizer)
    run = opened(watch)
    assert run.scalars("loss").index.tolist() == list(range(1, 9))
    # Movement is from the weights that the run began with, which the second process never had.
    assert run.scalars("weight_movement", site="embed")[8] == pytest.approx(moved[8], rel=1e-5)
    assert same(weights(module), weights(again))
    with ac.watch(again, panel=None, run=tmp_path / "a", every=2, resume=True) as watch:
        assert watch.at == 8


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"text": None}, MeasureError, "give text=, or panel=None"),
        ({"text": "a b c"}, TextError, "no tokenizer"),
        ({"text": []}, TextError, "the probe is empty"),
        ({"text": torch.zeros(0, 4, dtype=torch.long)}, TextError, "the probe is empty"),
        ({"panel": "trainign"}, MeasureError, "nearest: training"),
        ({"every": 0}, MeasureError, "1 or more"),
        ({"budget": 0.0}, MeasureError, "share of the training's time"),
        ({"panel": {"blocks.*.moe.router": [ac.measures.RouterEntropy()]}}, SiteError, "cannot be watched by what"),
        ({"run": None}, RunError, "give run="),
        ({"optimizer": "adam"}, RunError, "torch.optim.Optimizer"),
    ],
)
def test_bad_input_is_refused_at_the_beginning(tmp_path, options, error, says):
    options = {"text": PROBE, "run": tmp_path / "a", **options}
    with pytest.raises(error, match=says), ac.watch(subject(), **options):
        pass


def test_an_optimizer_of_another_network_is_refused(tmp_path):
    other = torch.optim.AdamW(subject().parameters())
    with pytest.raises(RunError, match="none of them belongs to this Subject"):
        ac.watch(subject(), text=PROBE, run=tmp_path / "a", optimizer=other).begin()
    # The run is not left open: another may begin where this one failed.
    assert RunStore.open(tmp_path / "a").status == "failed"


def test_two_writers_on_one_run_are_refused(tmp_path):
    with ac.watch(subject(), panel=None, run=tmp_path / "a"):
        with pytest.raises(RunError, match="holds a run already"):
            ac.watch(subject(), panel=None, run=tmp_path / "a").begin()
        with pytest.raises(RunError, match="is being written by"):
            ac.watch(subject(), panel=None, run=tmp_path / "a", resume=True).begin()


def test_a_probe_of_text_needs_a_whole_row(tmp_path):
    demo = ac.demo()
    with pytest.raises(TextError, match=r"do not fill one row of 128 \(context\): give more text, or context="):
        ac.watch(demo, text="def main():", run=tmp_path / "a").begin()
    with pytest.raises(TextError, match="positions that the model has"):
        ac.watch(demo, text="def main():", context=100_000, run=tmp_path / "b").begin()
    with ac.watch(demo, text="def main():\n    return 1\n" * 40, context=32, tokens=64, run=tmp_path / "c") as watch:
        assert events(watch, "begin")[0]["probe"] == {"batches": 1, "rows": 2, "losses": []}


def test_a_first_look_that_cannot_work_is_raised_and_leaves_nothing_behind(tmp_path):
    module = subject()
    with pytest.raises(TextError, match="token id 1023 is not among"):
        ac.watch(module, text=PROBE + 1000, run=tmp_path / "a").begin()
    assert RunStore.open(tmp_path / "a").status == "failed"
    from torch.optim.optimizer import _global_optimizer_pre_hooks

    assert not _global_optimizer_pre_hooks


def test_step_says_what_is_wrong(tmp_path):
    module = subject()
    watch = ac.watch(module, panel=None, run=tmp_path / "a")
    with pytest.raises(RunError, match="before `with"):
        watch.step(1.0)
    with watch:
        with pytest.raises(MeasureError, match=r"loss has the shape \(2,\).*loss.mean\(\)"):
            watch.step(torch.ones(2))
        with pytest.raises(MeasureError, match="loss is 'a'"):
            watch.step("a")
        watch.step(1.0, at=5)
        with pytest.raises(RunError, match="step 5 comes after step 5"):
            watch.step(1.0, at=5)
    with pytest.raises(RunError, match="after its `with` block had ended"):
        watch.step(1.0)
    with pytest.raises(RunError, match="begun already"):
        watch.begin()


def test_an_exception_in_the_loop_ends_the_run_as_failed(tmp_path):
    module = subject()
    watch = ac.watch(module, panel=None, run=tmp_path / "a")

    def loop():
        with watch:
            trained(module, 3, watch)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        loop()
    run = opened(watch)
    assert run.status == "failed"
    assert len(run.scalars("loss")) == 3
    assert not module._forward_hooks


def test_a_full_disk_does_not_end_the_training(tmp_path, monkeypatch):
    module = subject()
    with ac.watch(module, text=PROBE, run=tmp_path / "a", every=2, store={"every_rows": 1}) as watch:
        trained(module, 2, watch)
        write = type(watch.run)._write
        monkeypatch.setattr(type(watch.run), "_write", _full)
        with pytest.warns(RuntimeWarning, match="training goes on, and is not written down for now"):
            trained(module, 4, watch)
        assert "full" in str(watch.error)
        monkeypatch.setattr(type(watch.run), "_write", write)
        trained(module, 2, watch)
    assert watch.error is None
    run = opened(watch)
    assert run.scalars("loss").index.tolist() == list(range(1, 9))  # nothing was lost
    assert "full" in events(watch, "writing_resumed")[0]["after"]


def test_a_disk_that_stays_full_is_told_and_not_raised(tmp_path, monkeypatch):
    module = subject()
    watch = ac.watch(module, panel=None, run=tmp_path / "a", store={"every_rows": 1}).begin()
    monkeypatch.setattr(type(watch.run), "_write", _full)
    trained(module, 2, watch)
    with pytest.warns(RuntimeWarning, match="training goes on"):
        watch.close()
    assert watch.error is not None


def _full(self, batch):
    raise OSError(28, "No space left on device (the disk is full)")


def test_a_look_that_fails_is_told_and_training_goes_on(tmp_path, monkeypatch):
    module = subject()
    with ac.watch(module, text=PROBE, run=tmp_path / "a", every=1) as watch:

        def broken(*args, **kwargs):
            raise torch.OutOfMemoryError("out of memory")

        monkeypatch.setattr(watch.model, "measure", broken)
        with pytest.warns(RuntimeWarning, match="look at step") as told:
            trained(module, 5, watch)
    assert len(told) == 3
    assert "no more are taken" in str(told[-1].message)
    assert len(events(watch, "look_failed")) == 3
    assert len(opened(watch).scalars("loss")) == 5


def test_a_writer_that_is_open_is_written_to_and_left_open(tmp_path):
    module = subject()
    with RunStore.create(tmp_path / "a") as run:
        with ac.watch(module, panel=None, run=run) as watch:
            trained(module, 2, watch)
            watch.log({"accuracy": 0.5})
            with pytest.raises(RunError, match="'accuracy' is 'high'"):
                watch.log({"accuracy": "high"})
            watch.event("note", about="this")
        run.log(9, {"later": 1.0})
    found = RunStore.open(tmp_path / "a")
    assert found.scalars("accuracy").to_dict() == {2: 0.5}
    assert found.scalars("later").tolist() == [1.0]
    assert events(tmp_path / "a", "note") == [{"about": "this"}]


def test_losses_of_further_texts_are_rows(tmp_path):
    module = subject()
    with ac.watch(
        module, text=PROBE, run=tmp_path / "a", every=2, losses={"seen": ids(0), "heldout": ids(99)}
    ) as watch:
        trained(module, 2, watch)
    run = opened(watch)
    for name, tokens in (("loss_seen", ids(0)), ("loss_heldout", ids(99))):
        with torch.no_grad():
            assert run.scalars(name)[2] == pytest.approx(float(loss_of(module, tokens)), rel=1e-5)


def test_values_that_are_not_finite_are_traced_to_their_site_before_the_update(tmp_path):
    module = subject()
    optimizer = torch.optim.AdamW(module.parameters())
    with ac.watch(module, text=PROBE, run=tmp_path / "a", every=100, alarms=True) as watch:
        for step in range(1, 5):
            if step == 3:
                with torch.no_grad():
                    module.blocks[1].mlp.down.weight[0, 0] = torch.inf
            trained(module, 1, watch, optimizer)
    lost = opened(watch).frame("non_finite", since=1)
    assert lost[lost["value"] > 0].iloc[0][["step", "site"]].tolist() == [3, "blocks.1.mlp.out"]
    alarm = opened(watch).alarms.iloc[0]
    assert (alarm["step"], alarm["name"], alarm["site"]) == (3, "non_finite", "blocks.1.mlp.out")


class _Overflows(torch.autograd.Function):
    """Passes on what it is given, and an infinite gradient on the way back."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.inf


def test_a_gradient_that_is_not_finite_is_told_while_the_loss_still_is(tmp_path):
    module = subject()
    optimizer = torch.optim.AdamW(module.parameters())
    with ac.watch(module, text=PROBE, run=tmp_path / "a", every=100, optimizer=optimizer) as watch:
        trained(module, 2, watch, optimizer)
        (site,) = watch.model.match("blocks.1.resid.pre")
        with watch.model.tap([(site.address, _Overflows.apply, "write")]):
            trained(module, 1, watch, optimizer)
    run = opened(watch)
    assert np.isfinite(run.scalars("loss")).all()
    alarm = run.alarms.iloc[0]
    assert (alarm["step"], alarm["name"]) == (3, "non_finite")
    # What lies behind the place in the forward comes before it in the backward, and is whole.
    norms = run.frame("grad_norm", since=3).dropna(subset="site").set_index("site")["value"]
    assert np.isfinite(norms[["blocks.1.mlp", "final_norm"]]).all()
    assert not np.isfinite(norms[["blocks.0.attn", "embed"]]).any()


def test_a_batch_that_alone_is_to_blame_is_replayed_with_the_weights_before_the_update(tmp_path):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    with ac.watch(module, text=torch.ones(2, 3), run=tmp_path / "a", every=100) as watch:
        for step in range(1, 4):
            x = torch.full((5, 3), 1e38 if step == 2 else 1.0)
            loss = module(x * (10 if step == 2 else 1)).sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            watch.step(loss, batch=x * 10)
    lost = opened(watch).frame("non_finite", since=1)
    assert lost[lost["value"] > 0].iloc[0][["step", "site"]].tolist() == [2, "module:0"]


def test_vocabulary_of_the_repeated_probe_is_the_models(tmp_path):
    with ac.watch(subject(), text=PROBE, run=tmp_path / "a") as watch:
        tokens = watch._looker._repeated
    assert tokens.shape == (4, 32)
    assert int(tokens.max()) < VOCAB
    assert torch.equal(tokens[:, :16], tokens[:, 16:])
