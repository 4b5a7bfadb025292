"""Traces over saved checkpoints: every kind of source, against measuring by hand, and everything that may go wrong."""

import gc
import json
import shutil
import types
import weakref

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from tiny import TINY

import actome as ac
from actome import dynamics as dyn
from actome.dynamics.trace_steps import step_of
from actome.measures import ActivationScale, EffectiveRank
from actome.measures.panels import Panel
from actome.tasks import Subject, SubjectConfig, train
from actome.tasks.nets import MLP

PANEL = {"blocks.*.resid.post": [ActivationScale(), EffectiveRank()]}
IDS = torch.randint(3, 60, (6, 12), generator=torch.Generator().manual_seed(0))
STEPS = (0, 20, 500)


def tiny(step: int) -> torch.nn.Module:
    """A llama whose weights differ from step to step."""
    module, draw = TINY["llama"](), torch.Generator().manual_seed(step)
    with torch.no_grad():
        for weight in module.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=draw)
    return module


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder as transformers' Trainer leaves it."""
    root = tmp_path_factory.mktemp("run")
    for step in STEPS:
        folder = root / f"checkpoint-{step}"
        tiny(step).save_pretrained(folder)
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        (folder / "optimizer.pt").write_bytes(b"not read")
    (root / "runs").mkdir()
    return root


@pytest.fixture
def run(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def by_hand(module: torch.nn.Module, layer: int) -> float:
    """Root mean square of the stream after a block, by a plain hook."""
    kept = []
    block = module.model.layers[layer]
    with block.register_forward_hook(lambda m, i, out: kept.append(out[0] if isinstance(out, tuple) else out)):
        module(input_ids=IDS)
    return float(kept[0].double().square().mean().sqrt())


@torch.no_grad()
def test_a_folder_of_checkpoints_against_plain_hooks(saved):
    found = ac.trace(saved, PANEL, text=IDS)
    assert found.steps == list(STEPS)
    for layer in range(3):
        curve = found.curve("rms", f"blocks.{layer}.resid.post")
        expected = [by_hand(tiny(step), layer) for step in STEPS]
        assert curve.tolist() == pytest.approx(expected, rel=1e-5)
    assert found.curves("rms").columns.tolist() == [f"blocks.{layer}.resid.post" for layer in range(3)]
    scale, rank = found.about["panel"]["blocks.*.resid.post"]
    assert scale == "ActivationScale()"
    assert "max_width=4096" in rank


def test_every_kind_of_source_gives_the_same(saved, tmp_path):
    expected = ac.trace(saved, PANEL, text=IDS).frame
    modules = {step: tiny(step) for step in STEPS}
    files = tmp_path / "weights"
    files.mkdir()
    for step, module in modules.items():
        save_file({f"module.{k}": v.clone() for k, v in module.state_dict().items()}, files / f"step{step}.safetensors")
    torch.save({"state_dict": modules[20].state_dict()}, tmp_path / "step=20.ckpt")
    sources = {
        "folders in a list": ([(step, saved / f"checkpoint-{step}") for step in reversed(STEPS)], None),
        "modules": (list(modules.items()), None),
        "models": ({step: ac.wrap(module) for step, module in modules.items()}, None),
        "functions": ({step: lambda step=step: tiny(step) for step in STEPS}, None),
        "weights": ({step: module.state_dict() for step, module in modules.items()}, tiny(7)),
        "files of weights": (files, lambda: tiny(7)),
        "files of weights and a folder": (files, saved / "checkpoint-20"),
        "folders into one module": (saved, tiny(7)),
        "a lightning file": ([(0, modules[0]), (20, tmp_path / "step=20.ckpt"), (500, modules[500])], tiny(7)),
    }
    for name, (source, model) in sources.items():
        got = ac.trace(source, PANEL, text=IDS, model=model)
        pd.testing.assert_frame_equal(got.frame, expected, obj=name)


def test_a_training_and_its_checkpoints():
    world = torch.randint(1, 16, (64, 12), generator=torch.Generator().manual_seed(1))
    subject = Subject.fresh(SubjectConfig(vocab=16, d_model=16, heads=2, context=12))
    training = train(subject, world, steps=8, batch_size=8, checkpoints=[0, 4, 8])
    last = {name: one.clone() for name, one in subject.state_dict().items()}
    found = ac.trace(training, "health", text=world[:8], repeats=0)
    assert found.steps == [0, 4, 8]
    for step in found.steps:
        direct = ac.wrap(training.at(step)).measure(world[:8], {"blocks.*.resid.post": ActivationScale()})
        assert found.curve("rms", "blocks.1.resid.post")[step] == pytest.approx(float(direct.value("rms")[1]), rel=1e-6)
    assert all(torch.equal(one, last[name]) for name, one in subject.state_dict().items())


def test_a_net_that_reads_no_text():
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    nets = {step: MLP([6, 8, 3], seed=step) for step in (0, 1)}
    found = ac.trace(nets, {"module:act.0": ActivationScale()}, text=x, batch_size=16)
    with torch.no_grad():
        expected = [float(nets[s].linear[0](x).relu().square().mean().sqrt()) for s in (0, 1)]
    assert found.curve("rms").tolist() == pytest.approx(expected, rel=1e-6)


def test_bfloat16_and_steps(saved):
    found = ac.trace(saved, PANEL, text=IDS, steps=[500, 0], dtype="bfloat16")
    assert found.steps == [0, 500]
    assert found.about["model"]["dtype"] == "bfloat16"


def test_one_checkpoint_in_memory_at_a_time():
    alive, most = weakref.WeakSet(), []

    def make(step):
        most.append(len(alive))
        module = tiny(step)
        alive.add(module)
        return module

    gc.disable()  # the loop itself has to let go
    try:
        ac.trace({step: lambda step=step: make(step) for step in range(4)}, PANEL, text=IDS)
    finally:
        gc.enable()
    assert most == [0, 0, 0, 0]


# -- keeping, going on ------------------------------------------------------------------------------------------------


def test_goes_on_where_it_was_interrupted(run, tmp_path):
    whole = ac.trace(run, PANEL, text=IDS)
    opened = []

    class Interrupted(Exception):
        pass

    def stop(done, total, step):
        opened.append((done, total, step))
        if step == 20:
            raise Interrupted

    with pytest.raises(Interrupted):
        ac.trace(run, PANEL, text=IDS, out=tmp_path / "out", progress=stop)
    assert opened == [(1, 3, 0), (2, 3, 20)]
    assert dyn.Trace.open(tmp_path / "out").steps == [0, 20]

    shutil.rmtree(run / "checkpoint-0")  # what was measured needs no checkpoint any more
    seen = []
    found = ac.trace(run, PANEL, text=IDS, out=tmp_path / "out", progress=lambda *told: seen.append(told[2]))
    assert seen == [500]
    pd.testing.assert_frame_equal(found.frame, whole.frame)
    pd.testing.assert_frame_equal(dyn.Trace.open(tmp_path / "out").frame, whole.frame)

    tiny(900).save_pretrained(run / "checkpoint-900")  # the training went on meanwhile
    assert ac.trace(run, PANEL, text=IDS, out=tmp_path / "out").steps == [0, 20, 500, 900]


def test_a_half_written_step_is_made_again(run, tmp_path):
    whole = ac.trace(run, PANEL, text=IDS, out=tmp_path / "out")
    with dyn.RunStore.resume(tmp_path / "out") as store:
        store.log_rows(whole.frame[whole.frame["step"] == 0].assign(step=77))  # and no note that it is done
    assert dyn.Trace.open(tmp_path / "out").steps == list(STEPS)


def test_refuses_another_text_panel_or_source(run, tmp_path, saved):
    out = tmp_path / "out"
    ac.trace(run, PANEL, text=IDS, out=out, steps=[0, 20])
    for change, said in (
        ({"text": IDS + 1}, "another text"),
        ({"panel": {"blocks.*.resid.post": ActivationScale()}}, "another panel"),
        ({"source": saved}, "another source"),
        ({"dtype": "bfloat16"}, "another dtype"),
    ):
        asked = {"source": run, "panel": PANEL, "text": IDS} | change
        for steps in ([0, 20], None):  # with nothing left to measure, and with something
            with pytest.raises(ac.RunError, match=said):
                ac.trace(**asked, out=out, steps=steps)
    tiny(3).save_pretrained(run / "checkpoint-20")
    with pytest.raises(ac.RunError, match="checkpoint-20 holds other weights"):
        ac.trace(run, PANEL, text=IDS, out=out)
    with dyn.RunStore.create(tmp_path / "other") as store:
        store.log(0, {"loss": 1.0})
    with pytest.raises(ac.RunError, match="no trace"):
        ac.trace(run, PANEL, text=IDS, out=tmp_path / "other")


# -- bad input --------------------------------------------------------------------------------------------------------


def test_another_architecture_is_refused_or_left_out(run, tmp_path):
    wide = TINY["llama"]().config
    wide.intermediate_size = 48
    type(tiny(0))(wide).save_pretrained(run / "checkpoint-20")
    with pytest.raises(ac.LoadError, match=r"checkpoint-20 .*another architecture than checkpoint-0 .*d_mlp 40 and 48"):
        ac.trace(run, PANEL, text=IDS)
    found = ac.trace(run, PANEL, text=IDS, on_error="skip", out=tmp_path / "out")
    assert found.steps == [0, 500]
    assert "another architecture" in found.left_out[20]
    assert dyn.Trace.open(tmp_path / "out").left_out == found.left_out
    tiny(20).save_pretrained(run / "checkpoint-20")
    found = ac.trace(run, PANEL, text=IDS, out=tmp_path / "out")
    assert (found.steps, found.left_out) == ([0, 20, 500], {})


def test_a_missing_or_corrupt_step_is_named(run):
    weights = run / "checkpoint-20" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ac.LoadError, match=r"step 20: .*checkpoint-20.*truncated"):
        ac.trace(run, PANEL, text=IDS)
    (run / "checkpoint-500" / "config.json").unlink()
    found = ac.trace(run, PANEL, text=IDS, on_error="skip", steps=[0, 20, 77, 500])
    assert found.steps == [0]
    assert set(found.left_out) == {20, 77, 500}
    assert "nearest: 0, 20" in found.left_out[77]
    with pytest.raises(ac.LoadError, match="no checkpoint of step 77; nearest: 0, 20"):
        ac.trace(run, PANEL, text=IDS, steps=[0, 77])
    with pytest.raises(ac.LoadError, match="none of the 2 checkpoints"):
        ac.trace(run, PANEL, text=IDS, steps=[20, 500], on_error="skip")


def test_weights_of_another_shape_and_weights_alone(tmp_path):
    weights = tiny(0).state_dict()
    with pytest.raises(ac.LoadError, match=r"weights alone.*give model="):
        ac.trace({0: weights}, PANEL, text=IDS)
    name, one = next(iter(weights.items()))
    with pytest.raises(ac.LoadError, match=f"does not fit LlamaForCausalLM: {name} is .* there and .* here; lacks"):
        ac.trace({0: {name: one[:-1]}}, PANEL, text=IDS, model=tiny(1))
    (tmp_path / "step5.pt").write_bytes(b"no zip")
    with pytest.raises(ac.LoadError, match=r"step5\.pt"):
        ac.trace(tmp_path, PANEL, text=IDS, model=tiny(1))


def test_no_checkpoints(tmp_path, saved):
    (tmp_path / "best").mkdir()
    for source, said in (
        (tmp_path, r"no folder and no file of weights in it has a step in its name.*found: best"),
        (saved / "checkpoint-20", "it is one checkpoint"),
        (tmp_path / "none", "is not there"),
        ({}, "0 checkpoints holds no checkpoints"),
        ([(0, 3)], "step 0 is int"),
        ([("a", tiny)], "a step is a whole number, not 'a'"),
        (7, "not int"),
        ([(0, lambda: 1 / 0)], "ZeroDivisionError"),
        ([(0, lambda: 5)], "gave int"),
    ):
        with pytest.raises(ac.LoadError, match=said):
            ac.trace(source, PANEL, text=IDS)
    (tmp_path / "step5").mkdir()
    (tmp_path / "checkpoint-5").mkdir()
    with pytest.raises(ac.LoadError, match="step 5 twice, as checkpoint-5 and step5"):
        ac.trace(tmp_path, PANEL, text=IDS)
    (tmp_path / "step5" / "trainer_state.json").write_text('{"global_step": 6}')
    with pytest.raises(ac.LoadError, match=r"step 5 by its name and step 6 by its trainer_state\.json"):
        ac.trace(tmp_path, PANEL, text=IDS)


def test_adapters_are_told_from_models(tmp_path):
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5" / "adapter_config.json").write_text("{}")
    with pytest.raises(ac.LoadError, match="PEFT adapter"):
        ac.trace(tmp_path, PANEL, text=IDS)


def test_a_panel_that_measures_nothing_and_text_without_a_tokenizer(saved):
    with pytest.raises(ac.MeasureError, match="checkpoint-0: nothing to measure"):
        ac.trace(saved, Panel("mine", "", ((("blocks.*.moe.router",), (ActivationScale,)),)), text=IDS)
    with pytest.raises(ac.MeasureError, match="no panel 'geometri'; nearest: geometry"):
        ac.trace(saved, "geometri", text=IDS)
    with pytest.raises(ac.MeasureError, match="a panel is a name"):
        ac.trace(saved, {}, text=IDS)
    with pytest.raises(ac.TextError, match="comes without one; give tokenizer="):
        ac.trace(saved, PANEL, text=["some words"])
    with pytest.raises(ac.SiteError, match=r"checkpoint-0: .*resid\.pots"):
        ac.trace(saved, {"blocks.*.resid.pots": ActivationScale()}, text=IDS)
    with pytest.raises(ValueError, match="choose 'raise' or 'skip'"):
        ac.trace(saved, PANEL, text=IDS, on_error="ignore")


def test_the_tokenizer_above_the_checkpoints_is_used(run):
    ac.demo().tokenizer.save_pretrained(run)
    for step in STEPS:
        config = SubjectConfig(vocab=2000, d_model=16, heads=2, context=32)
        shutil.rmtree(run / f"checkpoint-{step}")
        Subject.fresh(config, seed=step).save_pretrained(run / f"checkpoint-{step}")
    found = ac.trace(run, PANEL, text=["The value of the expression is returned. " * 5])
    assert found.steps == list(STEPS)
    assert found.about["reads"]["counts"]["tokens"] > 20


# -- the hub ----------------------------------------------------------------------------------------------------------


def ref(name: str) -> types.SimpleNamespace:
    return types.SimpleNamespace(name=name, target_commit=f"commit of {name}")


class Hub:
    """Answers as huggingface_hub does, for one repository whose revisions are folders here."""

    def list_repo_refs(self, hub_id):
        if hub_id != "them/model":
            raise OSError(f"404: no {hub_id}")
        return types.SimpleNamespace(
            branches=[ref("main"), ref("step500"), ref("step0")], tags=[ref("step20"), ref("v1")]
        )


def test_revisions_of_a_hub_id(saved, monkeypatch):
    def load(hub_id, revision=None, **options):
        assert hub_id == "them/model"
        return real(saved / f"checkpoint-{step_of(revision)}", **options)

    real = ac.load
    monkeypatch.setattr("actome.core.load.load", load)
    found = ac.trace("them/model", PANEL, text=IDS, api=Hub())
    expected = ac.trace({step: tiny(step) for step in STEPS}, PANEL, text=IDS)
    pd.testing.assert_frame_equal(found.frame, expected.frame)
    assert "revision main says no step" in found.notes
    assert ac.trace("them/model", PANEL, text=IDS, api=Hub(), revisions="step?0").steps == [20]
    assert [one.mark() for one in dyn.checkpoints("them/model", api=Hub(), revisions=["step0"]).items] == [
        "commit of step0"
    ]
    with pytest.raises(ac.LoadError, match=r"no revision matches epoch\* \(main, step500, step0, step20, v1\)"):
        ac.trace("them/model", PANEL, text=IDS, api=Hub(), revisions="epoch*")
    with pytest.raises(ac.LoadError, match="them/other is no folder here, and its revisions cannot be listed: 404"):
        ac.trace("them/other", PANEL, text=IDS, api=Hub())
    with pytest.raises(ac.LoadError, match="revisions are those of a hub id"):
        ac.trace(saved, PANEL, text=IDS, revisions="step*")


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("checkpoint-500", 500), ("step1000", 1000), ("step_7", 7), ("step-00032", 32), ("global_step20", 20),
        ("epoch=3-step=1200", 1200), ("stage1-step1000-tokens5B", 1000), ("step10k", 10_000), ("iter_0000100", 100),
        ("0042", 42), ("ckpt-3", 3), ("main", None), ("checkpoint-best", None), ("v2.0", None), ("model2", None),
        ("footstep5x", None), ("steps-2M", 2_000_000),
    ],
)  # fmt: skip
def test_steps_of_names(name, step):
    assert step_of(name) == step
