"""The recording engine: what is selected, what is copied, when it stops, and what survives an interruption."""

from __future__ import annotations

import pytest
import torch
from tiny import TINY
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import actome as ac

SITE = "blocks.1.resid.post"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = {w: i for i, w in enumerate(["<pad>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def model(tokenizer) -> ac.Model:
    return ac.wrap(TINY["llama"](), tokenizer)


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(3, 29, (3, 7), generator=torch.Generator().manual_seed(1))


def test_recorded_states_are_those_that_transformers_gives(model, ids):
    rec = model.record(ids, ["blocks.0.resid.pre", "blocks.*.resid.post", "final_norm", "logits"])
    with torch.no_grad():
        out = model.module(ids, output_hidden_states=True)
    assert torch.equal(rec["blocks.0.resid.pre"], out.hidden_states[0])
    for i in range(model.layers - 1):
        assert torch.equal(rec[f"blocks.{i}.resid.post"], out.hidden_states[i + 1])
    assert torch.equal(rec["final_norm"], out.hidden_states[-1])
    assert torch.equal(rec["logits"], out.logits)


def test_patterns_are_those_of_eager_attention(ids):
    module = TINY["llama"]()
    rec = ac.wrap(module).record(ids, "blocks.*.attn.pattern")
    module.config._attn_implementation = "eager"
    with torch.no_grad():
        wanted = module(ids, output_attentions=True).attentions
    for i, pattern in enumerate(wanted):
        torch.testing.assert_close(rec[f"blocks.{i}.attn.pattern"], pattern)


def test_layers_of_one_shape_share_one_buffer(model, ids):
    rec = model.record(ids, "blocks.*.resid.post")
    stack = rec["blocks.*.resid.post"]
    assert stack.shape == (model.layers, 3, 7, 24)
    assert stack[1].data_ptr() == rec[SITE].data_ptr()


def test_a_record_is_a_copy(model, ids):
    kept = {}

    def edit(module, args, out):
        kept["live"] = out
        return None

    handle = model.module.model.layers[1].register_forward_hook(edit)
    rec = model.record(ids, SITE, stop=False)
    handle.remove()
    before = rec[SITE].clone()
    kept["live"].zero_()
    assert torch.equal(rec[SITE], before)


@pytest.mark.parametrize("positions", [-1, 0, [1, 3], slice(2, 5), range(4), [-2, -1]])
def test_positions_cut_before_they_copy(positions, model, ids):
    full = model.record(ids, [SITE, "blocks.0.attn.pattern"])
    rec = model.record(ids, [SITE, "blocks.0.attn.pattern"], positions=positions)
    index = [positions] if isinstance(positions, int) else positions
    assert torch.equal(rec[SITE], full[SITE][:, index])
    assert torch.equal(rec["blocks.0.attn.pattern"], full["blocks.0.attn.pattern"][:, :, index])
    assert torch.equal(rec.tokens, ids[:, index])
    assert rec[SITE].untyped_storage().nbytes() == rec[SITE].nbytes


def test_heads_and_units(model, ids):
    full = model.record(ids, ["blocks.0.attn.z", "blocks.0.attn.k"])
    rec = model.record(ids, ["blocks.0.attn.z", "blocks.0.attn.k"], heads=[1], units=[0, -1])
    assert torch.equal(rec["blocks.0.attn.z"], full["blocks.0.attn.z"][:, :, [1]][..., [0, -1]])
    assert torch.equal(rec["blocks.0.attn.k"], full["blocks.0.attn.k"][:, [1]][..., [0, -1]])
    with pytest.raises(ac.SiteError, match="head 9"):
        model.record(ids, "blocks.0.attn.z", heads=9)
    with pytest.raises(ac.SiteError, match="no heads"):
        model.record(ids, SITE, heads=0)


def test_positions_of_padded_rows_count_real_tokens(model):
    texts = ["a b c d e", "f g"]
    rec = model.record(texts, SITE, positions=-1)
    for row, text in enumerate(texts):
        alone = model.record(text, SITE, positions=-1)
        torch.testing.assert_close(rec[SITE][row], alone[SITE][0], rtol=1e-4, atol=1e-5)
    assert rec.mask is None
    with pytest.raises(ac.SiteError, match="rows of different length"):
        model.record(texts, SITE, positions=slice(None))
    assert model.record(texts, SITE).n_tokens == 7


def test_dtype_and_gradients(model, ids):
    assert model.record(ids, SITE, dtype=torch.bfloat16)[SITE].dtype == torch.bfloat16
    rec = model.record(ids, [SITE, "blocks.2.attn.z", "logits"], grad=True)
    # d logits / d state, once by the recorded tensor and once by a small change of it
    target = rec["logits"][0, -1, 5]
    slope = torch.autograd.grad(target, rec[SITE], retain_graph=True)[0]
    direction = torch.randn(24, generator=torch.Generator().manual_seed(0)) * 1e-2
    values = []
    for sign in (1, -1):
        with model.clamp(ac.Add(SITE, sign * direction, positions=3, rows=[0])):
            values.append(model.logits(ids)[0, -1, 5])
    torch.testing.assert_close((values[0] - values[1]) / 2, slope[0, 3] @ direction, rtol=0.05, atol=1e-4)
    z = torch.autograd.grad(target, rec["blocks.2.attn.z"])[0]
    assert float(z.norm()) > 0


def test_a_forward_stops_after_the_last_site(model, ids):
    reached = []
    handle = model.module.model.layers[2].register_forward_hook(lambda *a: reached.append(1))
    try:
        model.record(ids, "blocks.0.resid.post")
        assert not reached
        model.record(ids, "blocks.0.resid.post", stop=False)
        assert len(reached) == 1
        # A clamp further up must still get its turn.
        with model.clamp(ac.Scale("blocks.2.resid.post", 0.5)):
            model.record(ids, "blocks.0.resid.post")
        assert len(reached) == 2
    finally:
        handle.remove()


def test_clamps_show_in_records(model, ids):
    with model.clamp(ac.Set(SITE, 2.0)):
        assert bool((model.record(ids, SITE)[SITE] == 2.0).all())


def text(tokenizer, n: int = 40, **options) -> ac.Text:
    letters = "abcdefghijklmnopqrstuvwxyz"
    documents = [(f"d{i}", " ".join(letters[(i * j) % 26] for j in range(1, 3 + i % 9))) for i in range(n)]
    return ac.Text(documents, tokenizer, context=12, batch_size=4, pack=False, **options)


def test_streaming_to_disk_equals_recording_row_by_row(model, tokenizer, tmp_path):
    rec = model.record(text(tokenizer), [SITE, "blocks.0.attn.pattern"], out=tmp_path / "r")
    flat = rec.flat(SITE)
    rows = list(text(tokenizer))
    wanted = []
    for batch in rows:
        for i in range(len(batch.ids)):
            real = batch.ids[i] if batch.mask is None else batch.ids[i][batch.mask[i]]
            one = model.record(real[None], [SITE, "blocks.0.attn.pattern"])
            wanted.append(one[SITE][0])
            n = len(wanted) - 1
            torch.testing.assert_close(
                rec.sequence(n, "blocks.0.attn.pattern"), one["blocks.0.attn.pattern"][0], rtol=1e-4, atol=1e-5
            )
    torch.testing.assert_close(flat, torch.cat(wanted), rtol=1e-4, atol=1e-5)
    in_memory = model.record(text(tokenizer), SITE)
    torch.testing.assert_close(in_memory.flat(SITE), flat)


class Interrupted(Exception):
    pass


def test_an_interrupted_recording_stays_readable_and_goes_on(model, tokenizer, tmp_path):
    def stop(tokens: int) -> None:
        if tokens > 60:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.record(text(tokenizer), SITE, out=tmp_path / "r", progress=stop)
    part = ac.Recording.open(tmp_path / "r")
    assert part.n_tokens > 0
    with pytest.raises(ac.RecordingError, match="resume"):
        model.record(text(tokenizer), SITE, out=tmp_path / "r")
    whole = model.record(text(tokenizer), SITE, out=tmp_path / "r", resume=True)
    straight = model.record(text(tokenizer), SITE, out=tmp_path / "s")
    torch.testing.assert_close(whole.flat(SITE), straight.flat(SITE))
    assert torch.equal(part.flat(SITE), whole.flat(SITE)[: part.n_tokens])


def test_any_module_has_the_sites_of_its_modules():
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(4 * 36, 5))
    model = ac.wrap(net)
    x = torch.randn(7, 3, 8, 8)
    rec = model.record(x, ["module:{0,1}", "module:3@in"])
    assert rec.dims["module:1"] == ("batch", "channel", "height", "width")
    assert torch.equal(rec["module:1"], net[1](net[0](x)))
    assert torch.equal(rec["module:3@in"], rec["module:1"].flatten(1))
    with model.clamp(ac.Scale("module:1", 0.0)):
        assert torch.equal(model(x), net[3].bias.expand(7, 5))
    with pytest.raises(ac.SiteError, match="no module matches"):
        model.record(x, "module:9")
    with pytest.raises(ac.SiteError, match="module:PATH"):
        model.record(x, SITE)


def test_a_recurrent_network_by_module_path():
    net = torch.nn.LSTM(5, 6, batch_first=True)
    model = ac.wrap(torch.nn.Sequential(net))
    x = torch.randn(2, 4, 5)
    with torch.no_grad():  # a recurrent network has another kernel with gradients
        wanted = net(x)[0]
    assert torch.equal(model.record(x, "module:0")["module:0"], wanted)


@pytest.mark.parametrize("kind", ["Starcoder2", "StableLm", "Phi", "Cohere"])
def test_unknown_families_of_the_usual_shape_are_found(kind, ids):
    import transformers

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = getattr(transformers, f"{kind}Config")(**sizes, num_key_value_heads=2, vocab_size=64, pad_token_id=0)
    model = ac.wrap(getattr(transformers, f"{kind}ForCausalLM")(config).eval())
    assert model.family == "structural"
    names = ["resid.pre", "attn.out", "mlp.out", "resid.post"]
    rec = model.record(ids, [f"blocks.1.{n}" for n in names] + ["blocks.1.attn.pattern", "blocks.1.mlp.act"])
    pre, attn, mlp, post = (rec[f"blocks.1.{n}"] for n in names)
    torch.testing.assert_close(pre + attn + mlp, post, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rec["blocks.1.attn.pattern"].sum(-1), torch.ones(3, 4, 7))
    assert rec["blocks.1.mlp.act"].shape[-1] == 64


def test_bad_inputs_say_what_is_wrong(model, ids):
    with pytest.raises(ac.TextError, match="integers"):
        model.record(torch.zeros(3, dtype=torch.bool), SITE)
    with pytest.raises(ac.TextError):
        model.record("", SITE)
    with pytest.raises(ac.TextError, match="tokenizer"):
        ac.wrap(TINY["llama"]()).record("a b", SITE)
    with pytest.raises(ac.SiteError, match="no position"):
        model.record(ids, SITE, positions=99)
    with pytest.raises(ac.SiteError, match="nearest"):
        model.record(ids, "blocks.1.resid.pots")


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "gemma2", "gpt-oss", "t5"])
def test_patterns_read_alone_are_bit_for_bit_those_of_the_eager_function(name):
    # Alone, a plain pattern takes a shorter way; with the scores it goes through the model's own eager function.
    model = ac.wrap(TINY[name]())
    given = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(5))
    padded = {"input_ids": given, "attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3])}
    if name == "t5":
        padded["decoder_input_ids"] = given
    prefix = "encoder." if name == "t5" else ""
    site = f"{prefix}blocks.1.attn.pattern"
    for inputs in (given if name != "t5" else {"input_ids": given, "decoder_input_ids": given}, padded):
        alone = model.record(inputs, site)[site]
        both = model.record(inputs, [site, f"{prefix}blocks.1.attn.scores"])[site]
        assert torch.equal(alone, both)
