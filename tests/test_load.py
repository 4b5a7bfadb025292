"""Loading from disk: what works, and what is said when it does not."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from tiny import TINY, inputs

import actome as ac


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "llama"
    TINY["llama"]().save_pretrained(path)
    return path


@pytest.fixture
def copy(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "m")
    return tmp_path / "m"


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "mixtral", "t5", "vit", "mamba"])
def test_what_was_saved_is_loaded_with_its_sites(name, tmp_path):
    module = TINY[name]()
    module.save_pretrained(tmp_path / name)
    model = ac.load(tmp_path / name)
    assert type(model.module) is type(module)
    assert not model.module.training
    with torch.no_grad():
        torch.testing.assert_close(model.logits(inputs(name)), module(**inputs(name)).logits)
    assert len(model.sites()) == len(ac.wrap(module).sites())


def test_dtype_and_name(saved):
    model = ac.load(str(saved), dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert model.name == "llama"
    assert model.record(torch.tensor([[5, 6, 7]]), "blocks.0.mlp.act")["blocks.0.mlp.act"].dtype == torch.bfloat16
    with pytest.raises(ac.LoadError, match="unknown dtype 'float7'"):
        ac.load(saved, dtype="float7")


def test_without_a_tokenizer_ids_work_and_text_says_what_is_missing(saved):
    model = ac.load(saved)
    assert model.tokenizer is None
    assert model.logits(torch.tensor([[5, 6]])).shape == (1, 2, 64)
    with pytest.raises(ac.TextError, match="no tokenizer"):
        model.logits("hello")
    with pytest.raises(ac.TextError, match="tokenizer"):
        model.measure("hello", {"embed": ac.measures.ActivationScale()})


def test_truncated_weights(copy):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ac.LoadError, match=r"model\.safetensors is truncated: \d+ bytes, its header says"):
        ac.load(copy)


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 64, (20).to_bytes(8, "little") + b"{not json, at all...}"])
def test_corrupt_weights(copy, content):
    (copy / "model.safetensors").write_bytes(content)
    with pytest.raises(ac.LoadError, match=r"model\.safetensors is"):
        ac.load(copy)


def test_pickled_weights_are_refused_unless_asked_for(saved, tmp_path):
    from safetensors.torch import load_file

    shutil.copy(saved / "config.json", tmp_path)
    torch.save(load_file(saved / "model.safetensors"), tmp_path / "pytorch_model.bin")
    with pytest.raises(ac.LoadError, match="allow_pickle=True"):
        ac.load(tmp_path)
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(ac.load(tmp_path, allow_pickle=True).logits(ids), ac.load(saved).logits(ids))


def test_places_without_a_model(tmp_path, saved):
    with pytest.raises(ac.LoadError, match="not there"):
        ac.load(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ac.LoadError, match=r"no config\.json in it \(found: notes\.txt\)"):
        ac.load(tmp_path)
    with pytest.raises(ac.LoadError, match="a file"):
        ac.load(tmp_path / "notes.txt")
    shutil.copy(saved / "config.json", tmp_path)
    with pytest.raises(ac.LoadError, match="no weights"):
        ac.load(tmp_path)


def test_a_configuration_of_nobody(copy):
    (copy / "config.json").write_text(json.dumps({"model_type": "no-such-model"}))
    with pytest.raises(ac.LoadError, match="cannot load"):
        ac.load(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(ac.LoadError, match="cannot load"):
        ac.load(copy)


def test_code_that_comes_with_a_model_is_refused(copy):
    config = json.loads((copy / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "mine.py").write_text("raise SystemExit('this must not run')")
    with pytest.raises(ac.LoadError, match="trust_remote_code"):
        ac.load(copy)


def test_a_hub_id_that_cannot_be_reached_says_so(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ac.LoadError, match="no directory here, and as a hub id"):
        ac.load("nobody/no-such-model")


def test_weights_that_do_not_fit_the_configuration(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"hidden_size": 32}))
    with pytest.raises(ac.LoadError, match="cannot load"):
        ac.load(copy)


def test_missing_weights_are_an_error_and_not_random_numbers(copy):
    from safetensors.torch import load_file, save_file

    weights = load_file(copy / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ac.LoadError, match=r"layers\.1\.mlp\.up_proj"):
        ac.load(copy)
