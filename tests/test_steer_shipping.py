"""Clamps on disk, as GGUF control vectors, and written into weights: each read back and compared."""

import json

import pytest
import torch
import transformers

import actome as ac
from actome.clamps import WeightUpdate, load_clamps, save_clamps
from actome.core.errors import ClampError
from actome.steer import bake, from_gguf, to_gguf

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 64}


def llama(**options):
    config = transformers.LlamaConfig(
        **SIZES, intermediate_size=48, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, **options
    )
    return made(transformers.LlamaForCausalLM, config)


def gpt2():
    config = transformers.GPT2Config(n_layer=3, n_embd=32, n_head=4, vocab_size=64, n_positions=64)
    config.bos_token_id = config.eos_token_id = 1
    return made(transformers.GPT2LMHeadModel, config)


def made(kind, config):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = kind(config).eval()
        # Fresh biases are zero, and what is zero cannot show that it was kept.
        for name, parameter in module.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
    return ac.wrap(module)


def vector(seed=0, width=32):
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


def drawn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ids():
    return torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(3))


# -- on disk ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "clamp",
    [
        ac.Add("blocks.1.resid.post", vector(), scale=2.5, positions=[0, -1]),
        ac.Add("blocks.1.resid.post", 0.5, units=range(3), phase="generated"),
        ac.Set("blocks.0.mlp.out", vector(1), positions=slice(1, None)),
        ac.Scale("blocks.*.mlp.out", 0.5, rows=[1]),
        ac.Mask("blocks.0.mlp.out", vector(2) > 0),
        ac.Project("blocks.2.resid.post", torch.stack([vector(4), vector(5)])),
        ac.Clip("blocks.0.resid.post", -0.01, 0.01),
    ],
    ids=lambda clamp: type(clamp).__name__,
)
def test_a_saved_clamp_does_the_same(tmp_path, clamp):
    model = llama()
    save_clamps(tmp_path / "one", clamp, model=model)
    (loaded,) = load_clamps(tmp_path / "one", model)
    if clamp.phase is not None:
        assert (loaded.phase, list(loaded.units)) == (clamp.phase, list(clamp.units))
        loaded, clamp = loaded.at(phase=None), clamp.at(phase=None)
    with model.clamp(clamp):
        wanted = model.logits(ids())
    with model.clamp(loaded):
        got = model.logits(ids())
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    assert not torch.equal(got, model.logits(ids()))


def test_the_order_and_what_is_said_are_kept(tmp_path):
    some = [ac.Set("embed", 0.0, positions=0), ac.Add("embed", vector())]
    save_clamps(tmp_path / "two", some, about={"advised": 1.5})
    assert [type(one).__name__ for one in load_clamps(tmp_path / "two")] == ["Set", "Add"]
    header = json.loads((tmp_path / "two" / "clamps.json").read_text())
    assert header["about"] == {"advised": 1.5}
    from safetensors.torch import load_file

    assert torch.equal(load_file(tmp_path / "two" / "clamps.safetensors")["1.value"], vector())


def test_what_cannot_be_saved_is_refused(tmp_path):
    model = llama()
    when = ac.When("blocks.0.resid.post", lambda x: x[..., 0] > 0)
    for clamp, words in [
        (ac.Add("blocks.1.resid.post", vector(), when=when), "When.test is a function"),
        (ac.Patch("blocks.1.resid.post", model.record(ids(), "blocks.1.resid.post")), "Recording, which cannot"),
    ]:
        with pytest.raises(ClampError, match=words):
            save_clamps(tmp_path / "x", clamp)
    assert not (tmp_path / "x").exists()
    with pytest.raises(ClampError, match="no clamp to save"):
        save_clamps(tmp_path / "x", [])
    save_clamps(tmp_path / "x", ac.Add("embed", vector()))
    with pytest.raises(ClampError, match="overwrite=True"):
        save_clamps(tmp_path / "x", ac.Add("embed", vector()))


def test_damaged_and_foreign_files_are_refused_in_words(tmp_path):
    folder = save_clamps(tmp_path / "v", ac.Add("blocks.1.resid.post", vector()), model=llama())
    with pytest.raises(ClampError, match=r"nearest: v"):
        load_clamps(tmp_path / "vv")
    wide = ac.wrap(
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, "hidden_size": 64}, pad_token_id=0))
    )
    with pytest.raises(ClampError, match="32 wide"):
        load_clamps(folder, wide)
    tensors = (folder / "clamps.safetensors").read_bytes()
    (folder / "clamps.safetensors").write_bytes(tensors[:-8])
    with pytest.raises(ClampError, match="damaged"):
        load_clamps(folder)
    (folder / "clamps.safetensors").write_bytes(tensors)
    header = json.loads((folder / "clamps.json").read_text())
    for change, words in [
        ({"version": 9}, "version 9"),
        ({"format": "other"}, "does not describe"),
        ({"clamps": []}, "lists no clamps"),
        ({"clamps": [{"kind": "os.system", "values": {}}]}, "not a clamp of actome"),
        ({"clamps": [{"kind": "actome.clamps.edit.Place", "values": {}}]}, "is not a clamp"),
        ({"clamps": [{"kind": "actome.clamps.edit.Gone", "values": {}}]}, "no clamp"),
        ({"clamps": [{"kind": "actome.clamps.edit.Add", "values": {"sight": "embed"}}]}, "cannot be made"),
        ({"clamps": [{"kind": "actome.clamps.edit.Add", "values": {"site": "embed", "value": {"tensor": "7"}}}]}, "7"),
    ]:
        (folder / "clamps.json").write_text(json.dumps({**header, **change}))
        with pytest.raises(ClampError, match=words):
            load_clamps(folder)
    (folder / "clamps.json").write_text("{")
    with pytest.raises(ClampError, match="damaged"):
        load_clamps(folder)


# -- control vectors --------------------------------------------------------------------------------------------------


def test_a_control_vector_read_back_gives_the_same_logits(tmp_path):
    model = llama()
    some = [ac.Add("blocks.1.resid.post", vector(), scale=3.0), ac.Add("blocks.2.resid.pre", vector(1))]
    some.append(ac.Add("blocks.2.resid.post", 1.0, units=[3, -1]))
    back = from_gguf(to_gguf(tmp_path / "v.gguf", model, some), model)
    assert [one.site for one in back] == ["blocks.1.resid.post", "blocks.2.resid.post"]
    with model.clamp(*some):
        wanted = model.logits(ids())
    with model.clamp(*back):
        torch.testing.assert_close(model.logits(ids()), wanted, rtol=1e-5, atol=1e-6)


def test_a_control_vector_is_laid_out_as_llama_cpp_reads_it(tmp_path):
    gguf = pytest.importorskip("gguf")
    to_gguf(tmp_path / "v.gguf", llama(), ac.Add("blocks.2.resid.post", vector(), scale=0.5))
    reader = gguf.GGUFReader(str(tmp_path / "v.gguf"))
    assert reader.get_field("general.architecture").contents() == "controlvector"
    assert reader.get_field("controlvector.model_hint").contents() == "llama"
    (tensor,) = reader.tensors
    assert tensor.name == "direction.2"
    assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
    assert torch.equal(torch.from_numpy(tensor.data.copy()), vector() * 0.5)


def test_what_a_control_vector_cannot_say_is_refused(tmp_path):
    model = llama()
    for clamp, words in [
        (ac.Add("blocks.0.resid.post", vector()), "no place for what the first layer writes"),
        (ac.Add("blocks.1.mlp.out", vector()), "after a layer"),
        (ac.Add("blocks.1.resid.post", vector(), positions=-1), "only at some positions"),
        (ac.Scale("blocks.1.resid.post", 2.0), "Scale depends on"),
        (ac.Add("blocks.1.mlp.act", torch.ones(48)), "not as wide"),
        (ac.Add("blocks.1.resid.post", torch.ones(2, 32)), "does not fit"),
    ]:
        with pytest.raises(ClampError, match=words):
            to_gguf(tmp_path / "x.gguf", model, clamp)
    with pytest.raises(ClampError, match="there is no file"):
        from_gguf(tmp_path / "x.gguf")
    (tmp_path / "x.gguf").write_bytes(b"GGUF nonsense")
    with pytest.raises(ClampError, match="damaged"):
        from_gguf(tmp_path / "x.gguf")
    to_gguf(tmp_path / "y.gguf", model, ac.Add("blocks.2.resid.post", vector()))
    small = ac.wrap(
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, "num_hidden_layers": 2}, pad_token_id=0))
    )
    with pytest.raises(ClampError, match="2 layers of width 32"):
        from_gguf(tmp_path / "y.gguf", small)


# -- in weights -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize(
    "site", ["blocks.1.resid.post", "blocks.1.resid.pre", "blocks.1.resid.mid", "blocks.0.attn.out"]
)
def test_baked_additions_survive_the_disk(tmp_path, make, site):
    model = make()
    before = {name: x.clone() for name, x in model.module.state_dict().items()}
    clamp = ac.Add(site, vector(), scale=0.7)
    baked = bake(model, [clamp, ac.Add("blocks.2.mlp.out", vector(1))])
    assert len(baked.changed) == 2
    assert all(torch.equal(x, before[name]) for name, x in model.module.state_dict().items())
    loaded = transformers.AutoModelForCausalLM.from_pretrained(baked.save(tmp_path / "m")).eval()
    with model.clamp(clamp, ac.Add("blocks.2.mlp.out", vector(1))):
        wanted = model.logits(ids())
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids()).logits, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("site", ["blocks.1.mlp.out", "blocks.1.attn.out"])
@pytest.mark.parametrize("form", ["weight", "lora"])
def test_baked_updates_of_a_linear_map_survive_the_disk(tmp_path, make, site, form):
    model = make()
    read = site.removesuffix("out") + ("act" if "mlp" in site else "z")
    width = model.record(ids(), read)[read].flatten(2).shape[-1]
    parts = {"weight": 0.3 * drawn(1, model.d_model, width)}
    if form == "lora":
        parts = {"down": drawn(1, 2, width), "up": 0.3 * drawn(2, model.d_model, 2)}
    clamp = WeightUpdate(site, read=read, scale=0.5, **parts, **({"bias": vector(3)} if make is gpt2 else {}))
    baked = bake(model, [clamp, ac.Add("blocks.2.mlp.out", vector(1))])
    loaded = transformers.AutoModelForCausalLM.from_pretrained(baked.save(tmp_path / "m")).eval()
    bare = model.logits(ids())
    with model.clamp(clamp, ac.Add("blocks.2.mlp.out", vector(1))):
        wanted = model.logits(ids())
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids()).logits, wanted, rtol=1e-4, atol=1e-5)
    assert float((wanted - bare).abs().max()) > 0.01


def test_updates_that_are_no_edit_are_refused():
    model = llama()
    width = model.record(ids(), "blocks.1.mlp.act")["blocks.1.mlp.act"].shape[-1]
    update = WeightUpdate("blocks.1.mlp.out", read="blocks.1.mlp.act", weight=drawn(1, model.d_model, width))
    with pytest.raises(ClampError, match="applies only at some positions"):
        bake(model, update.at(positions=-1))
    with pytest.raises(ClampError, match="is no edit of one linear map"):
        bake(model, update.at(site="blocks.1.resid.post"))
    with pytest.raises(ClampError, match="is no edit of one linear map"):
        bake(model, update.at(site="blocks.2.mlp.out"))
    path = "module:model.layers.1.mlp.down_proj"
    assert bake(model, update.at(site=path, read=f"{path}@in")).changed == ("model.layers.1.mlp.down_proj.weight",)
    with pytest.raises(ClampError, match="have no bias"):
        bake(model, update.at(site=path, read=f"{path}@in", bias=drawn(2, model.d_model)))


@pytest.mark.parametrize("first", ["embed", "blocks.0.resid.pre"])
@pytest.mark.parametrize("make", [llama, lambda: llama(tie_word_embeddings=True), gpt2])
def test_a_direction_is_taken_out_of_the_weights(tmp_path, make, first):
    model = make()
    basis = torch.stack([vector(7), vector(8)])
    clamps = [ac.Project(site, basis) for site in (first, "blocks.*.attn.out", "blocks.*.mlp.out")]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(bake(model, clamps).save(tmp_path / "m")).eval()
    with model.clamp(*clamps):
        wanted = model.logits(ids())
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids()).logits, wanted, rtol=1e-4, atol=1e-4)
    if first == "embed":  # embedded positions, where there are any, still bring it in
        return
    stream = ac.wrap(loaded).record(ids(), "blocks.*.resid.post")["blocks.*.resid.post"]
    assert float((stream @ basis.T).abs().max()) < 1e-5 * float(stream.abs().max()) * 32


def test_what_weights_cannot_hold_is_refused():
    with pytest.raises(ClampError, match="everything that is written"):
        bake(llama(), ac.Project("blocks.*.mlp.out", vector()))
    with pytest.raises(ClampError, match="only at some positions"):
        bake(llama(), ac.Add("blocks.1.resid.post", vector(), positions=-1))
    with pytest.raises(ClampError, match="has no bias"):
        bake(llama(), ac.Add("blocks.0.resid.pre", vector()))
    with pytest.raises(ClampError, match="not a transformers model"):
        bake(ac.wrap(torch.nn.Sequential(torch.nn.Linear(3, 3))), ac.Add("module:0", 1.0))
    config = transformers.Gemma2Config(**SIZES, intermediate_size=48, num_key_value_heads=2, head_dim=8, pad_token_id=0)
    with pytest.raises(ClampError, match="cannot give them one"):
        bake(made(transformers.Gemma2ForCausalLM, config), ac.Add("blocks.1.resid.post", vector()))


def test_a_copy_that_does_something_else_is_not_given_out(monkeypatch):
    model = gpt2()
    monkeypatch.setattr("actome.steer.baking._writer", lambda model, site, names: ("transformer.h.2.mlp.c_proj", "mlp"))
    with pytest.raises(ClampError, match="cannot be written into weights"):
        bake(model, ac.Add("blocks.0.resid.post", 3 * vector()))
