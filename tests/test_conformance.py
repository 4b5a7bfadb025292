"""One suite for every family: the sites are where the table says, hold what they claim, and leave no trace.

Nothing is compared with actome itself. Values are compared with the algebra of the architecture, computed from the
model's own weights, or with what transformers reports; writes with the same change made by hand (`by_hand`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import by_hand
import pytest
import torch
import transformers
from by_hand import COLUMNS, block_of, column_of
from tiny import BATCH, CAUSAL, TINY, inputs, plain
from torch import Tensor, nn

import actome as ac

torch.set_num_threads(1)

# -- what each family must offer -------------------------------------------------------------------------------------

STREAM = ["resid.pre", "resid.post"]
PATTERN = ["attn.scores", "attn.pattern", "attn.z", "attn.out"]
QKV = ["attn.q", "attn.k", "attn.v"]
MLP = ["mlp.pre", "mlp.act", "mlp.out"]
PARALLEL = STREAM + QKV + PATTERN + MLP
FULL = [*PARALLEL, "resid.mid"]
CROSS = ["resid.cross", *(f"cross.{part}" for part in ("q", "k", "v", "scores", "pattern", "z", "out"))]
EXPERTS = ["moe.router", "moe.weights", "moe.chosen", "moe.experts"]
ATTENTION_ONLY = [*STREAM, *QKV, *PATTERN]
SHARED = ["moe.shared.act", "moe.shared.out"]
SPARSE = [*(s for s in FULL if s not in ("mlp.pre", "mlp.act")), *EXPERTS]
HEAD = ["embed", "final_norm", "logits"]


def _under(prefix: str, block: list[str], top: list[str] | None = None) -> set[str]:
    return {f"{prefix}blocks.*.{local}" for local in block} | {f"{prefix}{local}" for local in top or []}


def _sites(block: list[str], top: list[str]) -> set[str]:
    return _under("", block, top)


_T5 = _under("encoder.", FULL, HEAD[:2]) | _under("decoder.", FULL + CROSS, HEAD[:2]) | {"logits"}
EXPECTED: dict[str, set[str]] = {
    **dict.fromkeys(TINY, _sites(FULL, HEAD)),
    **dict.fromkeys(("pythia", "falcon", "falcon-new"), _sites(PARALLEL, HEAD)),
    "opt-post-norm": _sites(FULL, ["embed", "logits"]),
    # These two compute softmax, but never call a function that is given queries, keys and values.
    "bloom": _sites([*STREAM, "resid.mid", *PATTERN, *MLP], HEAD),
    "gptj": _sites(STREAM + PATTERN + MLP, HEAD),
    **dict.fromkeys(("mixtral", "olmoe", "gpt-oss", "subject-moe"), _sites(SPARSE, HEAD)),
    "subject-attention-only": _sites(ATTENTION_ONLY, HEAD),
    "qwen3-moe": _sites(FULL + EXPERTS, HEAD),
    "deepseek-v3": _sites(FULL + EXPERTS + SHARED, HEAD),
    "mamba": _sites([*STREAM, "mixer.act", "mixer.out"], HEAD),
    **dict.fromkeys(("bert", "roberta"), _sites(FULL, ["embed", "logits"])),
    "t5": _T5,
    "t5-gated": _T5,
    "clip": _under("vision.", FULL, ["embed"]) | _under("text.", FULL, ["embed", "final_norm"]),
    "clip-text": _sites(FULL, ["embed", "final_norm"]),
    "clip-vision": _sites(FULL, ["embed"]),
    "whisper": _under("encoder.", FULL, ["final_norm"]) | _under("decoder.", FULL + CROSS, HEAD[:2]) | {"logits"},
    "whisper-encoder": _under("encoder.", FULL, ["final_norm"]),
}
# Local names that only some blocks have.
ONLY_IN = {
    ("qwen3-moe", "mlp.pre"): {1},
    ("qwen3-moe", "mlp.act"): {1},
    **{("qwen3-moe", local): {0, 2} for local in EXPERTS},
    ("deepseek-v3", "mlp.pre"): {0},
    ("deepseek-v3", "mlp.act"): {0},
    **{("deepseek-v3", local): {1, 2} for local in EXPERTS + SHARED},
}

RESIDUAL = ("batch", "pos", "d_model")
DIMS = {
    "q": ("batch", "head", "query", "d_head"),
    "k": ("batch", "kv_head", "key", "d_head"),
    "v": ("batch", "kv_head", "key", "d_head"),
    "scores": ("batch", "head", "query", "key"),
    "pattern": ("batch", "head", "query", "key"),
    "z": ("batch", "pos", "head", "d_head"),
    "mlp.pre": ("batch", "pos", "d_mlp"),
    "mlp.act": ("batch", "pos", "d_mlp"),
    "shared.act": ("batch", "pos", "d_mlp"),
    "mixer.act": ("batch", "pos", "d_inner"),
    "router": ("batch", "pos", "expert"),
    "weights": ("batch", "pos", "expert"),
    "chosen": ("batch", "pos", "choice"),
    "experts": ("batch", "pos", "choice", "d_model"),
    "logits": ("batch", "pos", "vocab"),
}

ALL = list(TINY)
ATTENDING = [name for name in ALL if name != "mamba"]
SPARSE_FAMILIES = ["mixtral", "olmoe", "qwen3-moe", "deepseek-v3", "gpt-oss", "subject-moe"]
# A row of the pattern need not sum to one: a sink takes part of it, or no key takes weight from another.
WITH_SINK = ["gpt-oss", "subject-key-bias"]
SEPARATE = ["subject-sigmoid", "subject-relu", "subject-linear"]
LOW_PRECISION = ["gpt2", "llama", "gemma2", "opt", "mixtral", "deepseek-v3", "gpt-oss", "falcon", "t5", "mamba", "bert"]
LOW_PRECISION += ["subject-gated-rotary", "subject-sigmoid", "subject-linear", "subject-key-bias"]


@functools.cache
def wrapped(name: str) -> ac.Model:
    return ac.wrap(TINY[name]())


@functools.cache
def recorded(name: str) -> dict[str, Tensor]:
    """Every site of a tiny model, from one recording."""
    model = wrapped(name)
    recording = model.record(inputs(name), [site.name for site in model.sites()], stop=False)
    return {site.name: recording[site.name] for site in model.sites()}


def depth(name: str, column: by_hand.Column) -> int:
    return len(wrapped(name).module.get_submodule(column.blocks))  # type: ignore[arg-type]


def blocks(name: str) -> Iterator[tuple[by_hand.Column, nn.Module, str]]:
    """(column, block, prefix of its sites) for every block of a tiny model."""
    for column in COLUMNS[name]:
        for layer in range(depth(name, column)):
            yield column, block_of(wrapped(name).module, column, layer), f"{column.prefix}blocks.{layer}."


def tensors(out: Any) -> list[Tensor]:
    """Every floating tensor that a model returned, caches aside."""
    if isinstance(out, Tensor):
        return [out] if out.is_floating_point() else []
    if isinstance(out, dict):
        return [t for key, value in out.items() if key != "past_key_values" for t in tensors(value)]
    return [t for value in out for t in tensors(value)] if isinstance(out, (tuple, list)) else []


def close(a: Tensor, b: Tensor, tolerance: float = 2e-5) -> None:
    # Float32 sums of some tens of terms of order one, in another order.
    torch.testing.assert_close(a, b, rtol=1e-4, atol=tolerance)


# -- what is offered -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_every_site_of_the_family_is_offered(name: str) -> None:
    table = wrapped(name).sites()
    assert {site.local for site in table} == EXPECTED[name]
    for column in COLUMNS[name]:
        for local in EXPECTED[name]:
            if not local.startswith(f"{column.prefix}blocks.*."):
                continue
            short = local.removeprefix(f"{column.prefix}blocks.*.")
            layers = ONLY_IN.get((name, short), set(range(depth(name, column))))
            assert {site.layer for site in table if site.local == local} == layers, local


@pytest.mark.parametrize("name", ALL)
def test_dims_and_sizes_are_those_of_the_tensors(name: str) -> None:
    model, values = wrapped(name), recorded(name)
    for site in model.sites():
        value = values[site.name]
        last = site.name.rsplit(".", 1)[-1]
        wanted = DIMS.get(".".join(site.name.split(".")[-2:])) or DIMS.get(last, RESIDUAL)
        if name == "vit" and last == "logits":
            wanted = ("batch", "class")
        assert site.dims == wanted, site
        assert len(site.sizes) == len(site.dims) == value.ndim, site
        length = column_of(name, site.name).length
        for dim, size, real in zip(site.dims, site.sizes, value.shape, strict=True):
            if dim == "batch":
                assert (real, size) == (BATCH, None), site
            elif dim in ("pos", "query"):
                assert (real, size) == (length, None), site
            elif dim == "key":
                keys = COLUMNS[name][0].length if ".cross." in site.name else length
                assert (real, size) == (keys, None), site
            else:
                assert size == real, (site, dim)
        assert value.isfinite().all() or last == "scores", site


@pytest.mark.parametrize("name", ALL)
def test_sites_come_in_forward_order(name: str) -> None:
    order = [site.name for site in wrapped(name).sites()]
    for column, _, at in blocks(name):
        chain = [
            at + local
            for local in ("resid.pre", "attn.q", "attn.pattern", "attn.z", "resid.mid", "mlp.act", "resid.post")
        ]
        if column.parallel or column.attn == "attention.self":
            chain = [s for s in chain if not s.endswith("mid")]
        places = [order.index(s) for s in chain if s in order]
        assert places == sorted(places), (chain, order)


# -- reading ---------------------------------------------------------------------------------------------------------


@contextmanager
def watched(module: nn.Module) -> Iterator[list[tuple[Any, Any]]]:
    """(arguments, output) of each call of a module, seen by a plain hook."""
    calls: list[tuple[Any, Any]] = []
    with module.register_forward_hook(lambda _, args, out: calls.append((args, out))):
        yield calls


def assert_reading_is_exact(model: ac.Model, given: dict[str, Tensor]) -> None:
    with torch.no_grad():
        bare = tensors(model.module(**given))
    with watched(model.module) as calls:
        model.record(given, [site.name for site in model.sites()], stop=False)
    tapped = tensors(calls[-1][1])  # a first call may have been the one that proves the sites
    assert len(bare) == len(tapped) > 0
    assert all(torch.equal(a, b) for a, b in zip(bare, tapped, strict=True))


@pytest.mark.parametrize("name", ALL)
def test_reading_every_site_changes_nothing(name: str) -> None:
    assert_reading_is_exact(wrapped(name), inputs(name))


@pytest.mark.parametrize("name", ALL)
def test_each_site_alone_reads_the_same_as_all_together(name: str) -> None:
    model, values = wrapped(name), recorded(name)
    for site in model.sites():
        alone = model.record(inputs(name), site.name)[site.name]  # stops early
        assert torch.equal(alone, values[site.name]), site


@pytest.mark.parametrize("name", ALL)
def test_the_stream_flows_from_block_to_block(name: str) -> None:
    values = recorded(name)
    for column in COLUMNS[name]:
        for i in range(depth(name, column) - 1):
            here, there = (f"{column.prefix}blocks.{j}.resid.{end}" for j, end in ((i, "post"), (i + 1, "pre")))
            assert torch.equal(values[here], values[there])


@pytest.mark.parametrize("name", ALL)
def test_what_is_added_to_the_stream_adds_up(name: str) -> None:
    values = recorded(name)
    for column, _, at in blocks(name):
        stream = values[at + "resid.pre"]
        if name == "mamba":
            close(values[at + "resid.post"] - stream, values[at + "mixer.out"])
            continue
        if column.parallel:
            close(values[at + "resid.post"] - stream, values[at + "attn.out"] + values[at + "mlp.out"])
            continue
        if at + "mlp.out" not in values:
            close(values[at + "resid.post"] - stream, values[at + "attn.out"])
            continue
        close(values[at + "resid.mid"] - stream, values[at + "attn.out"])
        stream = values[at + "resid.mid"]
        if column.cross:
            close(values[at + "resid.cross"] - stream, values[at + "cross.out"])
            stream = values[at + "resid.cross"]
        if not column.post_norm:
            close(values[at + "resid.post"] - stream, values[at + "mlp.out"])


@pytest.mark.parametrize("name", ["bert", "roberta", "opt-post-norm"])
def test_post_norm_blocks_put_a_norm_behind_each_sum(name: str) -> None:
    values = recorded(name)
    for _, block, at in blocks(name):
        bert = name != "opt-post-norm"
        first = block.get_submodule("attention.output.LayerNorm" if bert else "self_attn_layer_norm")
        second = block.get_submodule("output.LayerNorm" if bert else "final_layer_norm")
        middle = first(values[at + "resid.mid"])
        close(second(middle + values[at + "mlp.out"]), values[at + "resid.post"])


@pytest.mark.parametrize("name", ATTENDING)
def test_patterns_are_distributions_and_weigh_the_values(name: str) -> None:
    values = recorded(name)
    for column, block, at in blocks(name):
        for kind in ["attn", "cross"] if column.cross else ["attn"]:
            pattern = values[f"{at}{kind}.pattern"]
            total = pattern.sum(dim=-1)
            if name in WITH_SINK:  # the rest of a row is its sink
                assert (total < 1 - 1e-4).any()
                assert (total <= 1 + 1e-5).all()
            elif name not in SEPARATE:
                close(total, torch.ones_like(total))
            assert (pattern >= 0).all() or name == "subject-linear"
            if column.causal and kind == "attn":
                assert (pattern.triu(1) == 0).all()
            else:
                assert (pattern.triu(1) > 0).any()
            scores = values[f"{at}{kind}.scores"]
            if name in SEPARATE:
                close(by_hand.separate(block.attn, scores.tril()), pattern)
            elif name not in WITH_SINK:
                close(scores.softmax(dim=-1), pattern)
            if f"{at}{kind}.v" in values:
                v = values[f"{at}{kind}.v"]
                v = v.repeat_interleave(pattern.shape[1] // v.shape[1], dim=1)
            else:
                v = _values_by_hand(name, block, values[at + "resid.pre"])
            close((pattern @ v).transpose(1, 2), values[f"{at}{kind}.z"])


def _values_by_hand(name: str, block: nn.Module, stream: Tensor) -> Tensor:
    if name == "gptj":
        return by_hand.split(block.attn.v_proj(block.ln_1(stream)), 4).transpose(1, 2)
    qkv = block.self_attention.query_key_value(block.input_layernorm(stream))
    return by_hand.split(qkv, 4).unflatten(-1, (3, -1))[..., 2, :].transpose(1, 2)


def with_kernel(module: nn.Module, kernel: str) -> nn.Module:
    """Has every part use one attention implementation, also where transformers refuses to change it afterwards."""
    for part in module.modules():
        if hasattr(part, "config"):
            part.config._attn_implementation = kernel
    return module


# CLIP reports its patterns per tower, under other names; transformers' eager Falcon adds alibi twice.
@pytest.mark.parametrize("name", [n for n in ATTENDING if n not in ("clip", "falcon-rw")])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_patterns_are_those_that_transformers_reports(name: str, padded: bool) -> None:
    """Under the default kernel, compared with the library's own eager run."""
    given = inputs(name)
    if padded:
        if "input_ids" not in given:
            pytest.skip("nothing is padded in images and sounds of one size")
        given["attention_mask"] = torch.ones_like(given["input_ids"])
        given["attention_mask"][0, :2] = 0  # on the left, as for generation
    eager = with_kernel(TINY[name](), "eager")
    with torch.no_grad():
        out = eager(**given, output_attentions=True)
    model = wrapped(name)
    for column in COLUMNS[name]:
        kinds = {"attn": "attentions", "cross": "cross_attentions"}
        if name.startswith(("t5", "whisper")) and name != "whisper-encoder":
            kinds["attn"] = f"{column.prefix.removesuffix('.')}_attentions"
        for kind, key in kinds.items():
            if kind == "cross" and not column.cross:
                continue
            for layer, wanted in enumerate(out[key]):
                site = f"{column.prefix}blocks.{layer}.{kind}.pattern"
                got = model.record(given, site)[site]
                # A query that is padding attends to nothing; what its row holds depends on the kernel.
                real = torch.ones(got.shape[0], got.shape[2], dtype=torch.bool)
                if padded and kind == "attn" and column.prefix != "decoder.":
                    real = given["attention_mask"].bool()
                close(got.transpose(1, 2)[real], wanted.transpose(1, 2)[real])


@pytest.mark.parametrize("name", ALL)
def test_hidden_states_are_those_that_transformers_reports(name: str) -> None:
    values = recorded(name)
    with torch.no_grad():
        out = wrapped(name).module(**inputs(name), output_hidden_states=True)
    for column in COLUMNS[name]:
        holder = {"text.": "text_model_output", "vision.": "vision_model_output"}.get(column.prefix)
        paired = name.startswith("t5") or name == "whisper"
        states = (out[holder] if holder else out)[f"{column.prefix[:-1]}_hidden_states" if paired else "hidden_states"]
        assert states is not None
        for i in range(depth(name, column)):
            mamba = name == "mamba"  # reports what leaves its blocks
            site = f"{column.prefix}blocks.{i}.resid.{'post' if mamba else 'pre'}"
            assert torch.equal(values[site], states[i]), site
        if f"{column.prefix}final_norm" in values and not holder and name not in ("vit", "clip-text"):
            assert torch.equal(values[f"{column.prefix}final_norm"], states[-1])


@pytest.mark.parametrize("name", ATTENDING)
def test_z_through_the_output_projection_is_what_attention_adds(name: str) -> None:
    values = recorded(name)
    with torch.no_grad():
        for column, block, at in blocks(name):
            out = block.get_submodule(column.o)(values[at + "attn.z"].flatten(-2))
            if column.attn_norm:
                out = block.get_submodule(column.attn_norm)(out)
            close(out, values[at + "attn.out"])
            if column.cross_o:
                close(block.get_submodule(column.cross_o)(values[at + "cross.z"].flatten(-2)), values[at + "cross.out"])


@pytest.mark.parametrize("name", ALL)
def test_mlp_act_through_the_down_projection_is_what_the_mlp_adds(name: str) -> None:
    values = recorded(name)
    with torch.no_grad():
        for column, block, at in blocks(name):
            act, out = ("mixer.act", "mixer.out") if name == "mamba" else ("mlp.act", "mlp.out")
            if at + act not in values:
                continue
            made = block.get_submodule(column.down)(values[at + act])
            if column.mlp_norm:
                made = block.get_submodule(column.mlp_norm)(made)
            close(made, values[at + out])


@pytest.mark.parametrize("name", [n for n in ALL if "mlp.pre" in " ".join(EXPECTED[n])])
def test_mlp_pre_is_what_the_projection_before_it_gives(name: str) -> None:
    model = wrapped(name)
    for column, block, at in blocks(name):
        if at + "mlp.pre" not in recorded(name):
            continue
        with torch.no_grad(), watched(block.get_submodule(column.gate)) as calls:
            model.module(**inputs(name))
        out = calls[0][1]
        gate = out.chunk(2, dim=-1)[0] if column.half else out
        value = recorded(name)[at + "mlp.pre"]
        assert torch.equal(value, gate.view_as(value))


@pytest.mark.parametrize("name", SPARSE_FAMILIES)
def test_router_and_chosen_experts_make_the_blocks_output(name: str) -> None:
    model, values = wrapped(name), recorded(name)
    for column, block, at in blocks(name):
        if at + "moe.router" not in values:
            continue
        experts, router = block.mlp.experts, block.get_submodule(column.router)
        with torch.no_grad(), watched(experts) as fed, watched(router) as routed:
            model.module(**inputs(name))
            hidden, (_, weights, chosen) = fed[0][0][0], routed[0][1]
            logits = hidden @ router.weight.T + getattr(router, "bias", 0.0)
            outputs = by_hand.expert_outputs(experts, hidden, chosen)
        close(values[at + "moe.router"].flatten(0, 1), logits)
        assert torch.equal(values[at + "moe.chosen"].flatten(0, 1), chosen)
        close(values[at + "moe.experts"].flatten(0, 1), outputs)
        dense = values[at + "moe.weights"]
        assert torch.equal(dense.flatten(0, 1).gather(1, chosen), weights)
        assert ((dense != 0).sum(dim=-1) == chosen.shape[-1]).all()
        picked = dense.gather(-1, values[at + "moe.chosen"])
        made = (picked[..., None] * values[at + "moe.experts"]).sum(dim=-2)
        if at + "moe.shared.out" in values:
            with torch.no_grad():
                close(block.mlp.shared_experts.down_proj(values[at + "moe.shared.act"]), values[at + "moe.shared.out"])
            made = made + values[at + "moe.shared.out"]
        close(made, values[at + "mlp.out"])


# -- writing ---------------------------------------------------------------------------------------------------------


def delta_for(site: ac.Site, value: Tensor) -> tuple[dict[str, Any], Tensor]:
    """What to add at a site: the arguments of `Add`, and the same in the site's dims for adding by hand."""
    vector = 0.5 * torch.randn(value.shape[-1], generator=torch.Generator().manual_seed(len(site.name)))
    if site.name.endswith(".k"):
        # The same vector at every key would shift all scores of a row alike, and change nothing.
        full = torch.zeros(value.shape[-2], value.shape[-1])
        full[2] = vector
        return {"value": vector, "positions": [2]}, full
    return {"value": vector}, vector


def writable(name: str) -> list[ac.Site]:
    # The weights of experts that were not chosen cannot be added to: they have a test of their own.
    return [site for site in wrapped(name).sites() if site.writable and not site.name.endswith("moe.weights")]


def outputs(model: ac.Model, given: dict[str, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return tensors(model(**given))


@pytest.mark.parametrize("name", ALL)
def test_adding_at_every_site_does_what_it_does_by_hand(name: str) -> None:
    model, given = wrapped(name), inputs(name)
    bare = outputs(model, given)
    for site in writable(name):
        arguments, full = delta_for(site, recorded(name)[site.name])
        with model.clamp(ac.Add(site.name, **arguments)) as active:
            got = outputs(model, given)
        assert active.fired == 1
        with by_hand.added(model.module, name, site.name, full):
            wanted = outputs(model, given)
        assert any((a - b).abs().max() > 1e-4 for a, b in zip(got, bare, strict=True)), f"{site.name}: nothing changed"
        for a, b in zip(got, wanted, strict=True):
            # A chain of blocks amplifies what two orders of summation differ by.
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=lambda m, s=site: f"{s.name}: {m}")


@pytest.mark.parametrize("name", ALL)
def test_writes_are_seen_by_reads_of_the_same_site(name: str) -> None:
    model, given = wrapped(name), inputs(name)
    for site in writable(name):
        if site.name.endswith("moe.experts"):
            continue
        arguments, full = delta_for(site, recorded(name)[site.name])
        with model.clamp(ac.Add(site.name, **arguments)):
            got = model.record(given, site.name)[site.name]
        close(got, recorded(name)[site.name] + full)


@pytest.mark.parametrize("name", ["t5", "whisper", "clip", "llama", "opt", "vit"])
def test_positions_are_counted_within_the_stack_of_the_site(name: str) -> None:
    model, given = wrapped(name), inputs(name)
    for column in COLUMNS[name]:
        site = f"{column.prefix}blocks.0.resid.post"
        value = recorded(name)[site]
        for position in (0, -1, column.length - 2):
            # A norm behind the site would swallow a shift that is the same in every channel.
            vector = torch.randn(value.shape[-1], generator=torch.Generator().manual_seed(1))
            full = torch.zeros(column.length, value.shape[-1])
            full[position] = vector
            with model.clamp(ac.Add(site, vector, positions=position)):
                got = outputs(model, given)
            with by_hand.added(model.module, name, site, full):
                wanted = outputs(model, given)
            assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(got, wanted, strict=True)), position
            assert torch.equal(model.record(given, site, positions=position)[site].squeeze(), value[:, position])


def test_each_stack_counts_positions_by_its_own_padding() -> None:
    model, given = wrapped("t5"), inputs("t5")
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    given["attention_mask"][0, 5:] = 0
    given["decoder_attention_mask"] = torch.ones_like(given["decoder_input_ids"])
    given["decoder_attention_mask"][1, :1] = 0
    for stack, places in {"encoder": {0: (0, 0), -1: (4, 6)}, "decoder": {0: (0, 1), -1: (4, 4)}}.items():
        site = f"{stack}.blocks.0.resid.post"
        value = model.record(given, site)[site]
        for position, (first, second) in places.items():
            wanted = torch.stack([value[0, first], value[1, second]])
            assert torch.equal(model.record(given, site, positions=position)[site][:, 0], wanted)
            with model.clamp(ac.Set(site, 0.0, positions=position)):
                changed = model.record(given, site)[site]
            assert (changed != value).any(dim=-1).nonzero().tolist() == [[0, first], [1, second]]


@pytest.mark.parametrize("name", ["llama", "gptj", "falcon", "t5", "gpt-oss", "subject-linear"])
def test_one_head_is_changed_alone(name: str) -> None:
    model, given = wrapped(name), inputs(name)
    for site in writable(name):
        axis = next((i for i, dim in enumerate(site.dims) if dim in ("head", "kv_head")), None)
        if axis is None:
            continue
        arguments, full = delta_for(site, recorded(name)[site.name])
        head = site.sizes[axis] - 1  # type: ignore[operator]
        with model.clamp(ac.Add(site.name, **arguments, heads=head)):
            got = outputs(model, given)
        one = torch.zeros(site.sizes[axis], *[1] * (2 - (axis == 2)))  # (head, 1) beside z, (head, 1, 1) elsewhere
        one[head] = 1.0
        with by_hand.added(model.module, name, site.name, one * full):
            wanted = outputs(model, given)
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=lambda m, s=site: f"{s.name}: {m}")


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_experts_are_the_same_whatever_computes_them(name: str, implementation: str) -> None:
    module = TINY[name]()
    for part in module.modules():
        if hasattr(part, "config"):
            part.config._experts_implementation = implementation
    model = ac.wrap(module)
    assert_reading_is_exact(model, inputs(name))
    values = model.record(inputs(name), [site.name for site in model.sites("blocks.*.moe.*")])
    for site in model.sites("blocks.*.moe.*"):
        close(values[site.name].float(), recorded(name)[site.name].float())
    vector = torch.randn(values["blocks.0.moe.experts"].shape[-1], generator=torch.Generator().manual_seed(1))
    with model.clamp(ac.Add("blocks.0.moe.experts", vector)):
        got = outputs(model, inputs(name))[0]
    with by_hand.added(module, name, "blocks.0.moe.experts", vector):
        close(got, outputs(model, inputs(name))[0], 1e-4)


@pytest.mark.parametrize("name", SPARSE_FAMILIES)
def test_combine_weights_scale_as_by_hand_and_stay_within_the_choice(name: str) -> None:
    model, given = wrapped(name), inputs(name)
    for column, block, at in blocks(name):
        if at + "moe.weights" not in recorded(name):
            continue
        factor = torch.tensor([0.5, 2.0, 0.0, 1.5])

        def scale(_: nn.Module, __: Any, out: Any, factor: Tensor = factor) -> Any:
            return out[0], out[1] * factor[out[2]], out[2]

        with model.clamp(ac.Scale(at + "moe.weights", factor)):
            got = outputs(model, given)
        with block.get_submodule(column.router).register_forward_hook(scale):
            wanted = outputs(model, given)
        assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(got, wanted, strict=True))
        with pytest.raises(ac.ClampError, match="did not choose"), model.clamp(ac.Add(at + "moe.weights", 1.0)):
            outputs(model, given)
        with pytest.raises(ac.ClampError, match=r"moe\.router"):
            model.clamp(ac.Add(at + "moe.chosen", 1.0))


# -- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_recorded_tensors_reach_the_parameters(name: str) -> None:
    model = wrapped(name)
    for site in model.sites():
        if site.name.endswith("moe.chosen"):
            continue
        model.module.zero_grad(set_to_none=True)
        value = model.record(inputs(name), site.name, grad=True)[site.name]
        value.clamp(-10, 10).pow(2).sum().backward()  # masked scores are the lowest number there is
        grads = [p.grad for p in model.module.parameters() if p.grad is not None]
        assert any((g != 0).any() for g in grads), site
        assert all(g.isfinite().all() for g in grads), site
    model.module.zero_grad(set_to_none=True)


@pytest.mark.parametrize("name", ALL)
def test_gradients_of_what_is_added_are_those_by_hand(name: str) -> None:
    model, given = wrapped(name), inputs(name)

    def loss() -> Tensor:
        total = [t.pow(2).mean() for t in tensors(model(**given))]
        return torch.stack(total).sum()

    for site in writable(name):
        arguments, full = delta_for(site, recorded(name)[site.name])
        arguments["value"].requires_grad_()
        with model.clamp(ac.Add(site.name, **arguments)):
            loss().backward()
        got = arguments["value"].grad
        assert got is not None, site
        assert (got != 0).any(), site
        full = full.detach().requires_grad_()
        with by_hand.added(model.module, name, site.name, full):
            loss().backward()
        assert full.grad is not None
        wanted = full.grad[2] if site.name.endswith(".k") else full.grad
        scale = float(wanted.abs().max())
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3 * scale, msg=lambda m, s=site: f"{s.name}: {m}")
    model.module.zero_grad(set_to_none=True)


@pytest.mark.parametrize("name", ALL)
def test_gradients_at_recorded_tensors_are_those_of_what_is_added_there(name: str) -> None:
    """The tensor that is recorded is the one that flows on."""
    model, given = wrapped(name), inputs(name)
    final = (
        "logits" if "logits" in EXPECTED[name] else max(s.name for s in model.sites() if s.local.endswith("resid.post"))
    )
    for site in writable(name):
        if final == site.name:
            continue
        arguments, _ = delta_for(site, recorded(name)[site.name])
        nothing = arguments["value"] = torch.zeros_like(arguments["value"]).requires_grad_()
        with model.clamp(ac.Add(site.name, **arguments)):
            recording = model.record(given, final, grad=True)
        (wanted,) = torch.autograd.grad(recording[final].pow(2).sum(), nothing, allow_unused=True)
        if wanted is None:
            continue  # in the other tower, or behind the tensor that the loss is made of
        recording = model.record(given, [site.name, final], grad=True)
        close(recording[site.name], recorded(name)[site.name])  # kernels may differ when a graph is kept
        (got,) = torch.autograd.grad(recording[final].pow(2).sum(), recording[site.name])
        got = got[..., 2, :] if site.name.endswith(".k") else got
        got = got.flatten(0, -2).sum(dim=0)
        scale = max(float(wanted.abs().max()), 1e-3)
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3 * scale, msg=lambda m, s=site: f"{s.name}: {m}")


# -- leaving no trace ------------------------------------------------------------------------------------------------


def state_of(module: nn.Module) -> dict[str, Any]:
    """Everything of a module and of transformers' registries that taps could have touched."""
    from torch.overrides import _get_current_function_mode_stack
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    parts: dict[str, Any] = {}
    for path, part in module.named_modules():
        for key, value in part.__dict__.items():
            if key in ("_parameters", "_buffers", "_modules"):
                parts[f"{path}.{key}"] = {k: id(v) for k, v in value.items()}
            elif "hooks" in key:
                assert not value or key == "_load_state_dict_pre_hooks", (path, key, value)
                parts[f"{path}.{key}"] = len(value)
            else:
                parts[f"{path}.{key}"] = value if isinstance(value, (bool, int, float, str, type(None))) else id(value)
        parts[f"{path} class"] = type(part)
        config = getattr(part, "config", None)
        if config is not None:
            parts[f"{path} config"] = repr(sorted(config.__dict__.items(), key=lambda item: item[0]))
    for registry in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS, ALL_EXPERTS_FUNCTIONS):
        kind = type(registry).__name__
        parts[f"{kind} local"], parts[f"{kind} global"] = dict(registry._local_mapping), dict(registry._global_mapping)
    parts["function modes"] = len(_get_current_function_mode_stack())
    parts["gradients"] = torch.is_grad_enabled()
    return parts


def assert_leaves_no_trace(module: nn.Module, given: dict[str, Tensor]) -> None:
    def value_of(name: str) -> Tensor:
        return next(p for n, p in module.named_parameters() if n == name)

    weights = {n: p.detach().clone() for n, p in module.named_parameters()}
    before = state_of(module)
    model = ac.wrap(module)
    everything = [site.name for site in model.sites()]
    assert state_of(module) == before, "wrapping"
    model.record(given, everything)
    assert state_of(module) == before, "recording"
    model.record(given, everything, grad=True, stop=False)
    assert state_of(module) == before, "recording with gradients"
    clamps = [ac.Scale(site.name, 1.0) for site in model.sites() if site.writable]
    with model.clamp(*clamps):
        outputs(model, given)
    assert state_of(module) == before, "clamping"
    with pytest.raises(ZeroDivisionError), model.clamp(*clamps):
        raise ZeroDivisionError
    assert state_of(module) == before, "an exception in the block"
    with pytest.raises(ac.ClampError, match="never fired"), model.clamp(*clamps):
        pass
    assert state_of(module) == before, "a clamp that never fired"

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    leaves = [part for part in module.modules() if not list(part.children()) and list(part.parameters(recurse=False))]
    for leaf in leaves[:: max(1, len(leaves) // 12)] + leaves[-2:]:
        for hook in (leaf.register_forward_pre_hook, leaf.register_forward_hook):
            called: list[bool] = []

            def failing(*_: Any, called: list[bool] = called) -> None:
                called.append(True)
                raise ZeroDivisionError

            with hook(failing):
                try:
                    with model.clamp(*clamps):
                        model.record(given, everything)
                except (ZeroDivisionError, ac.ClampError):
                    pass
            assert state_of(module) == before, f"an exception inside the forward of {type(leaf).__name__}"
    assert all(torch.equal(value_of(n), w) for n, w in weights.items())


@pytest.mark.parametrize("name", ALL)
def test_nothing_remains(name: str) -> None:
    assert_leaves_no_trace(TINY[name](), inputs(name))


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_training_mode_is_kept_and_reads_are_exact_in_it(name: str) -> None:
    module = TINY[name]()
    module.get_submodule(COLUMNS[name][0].blocks).train()  # a mixture: some modules train, some do not
    before = state_of(module)
    model = ac.wrap(module)
    model.sites()
    assert state_of(module) == before
    assert_reading_is_exact(model, inputs(name))


# -- other classes, precisions and inputs ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOW_PRECISION)
def test_in_bfloat16(name: str) -> None:
    module = TINY[name]().to(torch.bfloat16)
    given = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in inputs(name).items()}
    model = ac.wrap(module)
    assert {site.local for site in model.sites()} == EXPECTED[name]
    assert_reading_is_exact(model, given)
    values = model.record(given, [site.name for site in model.sites()])
    for column in COLUMNS[name]:
        for i in range(len(module.get_submodule(column.blocks)) - 1):  # type: ignore[arg-type]
            here, there = (f"{column.prefix}blocks.{j}.resid.{end}" for j, end in ((i, "post"), (i + 1, "pre")))
            assert torch.equal(values[here], values[there])
        if name != "mamba" and not column.parallel:
            at = f"{column.prefix}blocks.0."
            moved = values[at + "resid.mid"].float() - values[at + "resid.pre"].float()
            # A sum of numbers up to about 8 keeps 8 bits: it is off by up to 2^-6.
            torch.testing.assert_close(moved, values[at + "attn.out"].float(), rtol=0, atol=2**-5)
    for site in model.sites():
        if site.local.endswith(("resid.mid", "attn.out", "mlp.act", "attn.pattern", "resid.post")):
            vector = torch.ones(values[site.name].shape[-1], dtype=torch.bfloat16)
            with model.clamp(ac.Add(site.name, vector)):
                got = outputs(model, given)[0]
            with by_hand.added(module, name, site.name, vector):
                wanted = outputs(model, given)[0]
            spread = float((got - outputs(model, given)[0]).float().abs().max())
            assert spread > 0
            # Eight bits, and by hand the vector is added before the residual sum instead of after it.
            assert (got - wanted).float().abs().max() <= max(0.15 * spread, 0.1), site
    assert_leaves_no_trace(module, given)


# Family: (path of the class without a head, what it lacks).
SMALLER = {
    "llama": ("model", {"logits"}),
    "gpt2": ("transformer", {"logits"}),
    "opt": ("model", {"logits"}),
    "opt-post-norm": ("model.decoder", {"logits"}),
    "falcon": ("transformer", {"logits"}),
    "deepseek-v3": ("model", {"logits"}),
    "gemma3-multimodal": ("model", {"logits"}),
    "mamba": ("backbone", {"logits"}),
    "bert": ("bert", {"logits"}),
    "roberta": ("roberta", {"logits"}),
    "modernbert": ("model", {"logits"}),
    "vit": ("vit", {"logits"}),
    "clip-text": ("text_model", set()),
    "clip-vision": ("vision_model", set()),
    "whisper": ("model", {"logits"}),
}


@pytest.mark.parametrize("name", SMALLER)
def test_the_class_without_a_head_has_the_same_sites(name: str) -> None:
    path, lost = SMALLER[name]
    model = ac.wrap(TINY[name]().get_submodule(path))
    assert {site.local for site in model.sites()} == EXPECTED[name] - lost
    assert_reading_is_exact(model, inputs(name))
    site = next(s.name for s in reversed(list(model.sites())) if s.name.endswith("resid.post"))
    assert torch.equal(model.record(inputs(name), site)[site], recorded(name)[site])


def test_t5_without_a_head_or_without_a_decoder() -> None:
    config = TINY["t5"]().config  # its own: T5EncoderModel changes the config that it is given
    whole = ac.wrap(transformers.T5Model(config).eval())
    assert {site.local for site in whole.sites()} == EXPECTED["t5"] - {"logits"}
    encoder = ac.wrap(transformers.T5EncoderModel(config).eval())
    assert {site.local for site in encoder.sites()} == _under("encoder.", FULL, HEAD[:2])


@pytest.mark.parametrize("name", ["llama", "opt", "falcon", "t5", "mixtral", "subject-gated-rotary", "subject-sigmoid"])
def test_in_inference_mode(name: str) -> None:
    model, given = wrapped(name), inputs(name)
    with torch.inference_mode():
        for site in writable(name):
            arguments, full = delta_for(site, recorded(name)[site.name])
            assert torch.equal(model.record(given, site.name)[site.name], recorded(name)[site.name])
            with model.clamp(ac.Add(site.name, **arguments)):
                got = outputs(model, given)
            with by_hand.added(model.module, name, site.name, full):
                wanted = outputs(model, given)
            assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(got, wanted, strict=True)), site


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "mistral", "gemma3", "mixtral", "bert", "t5", "falcon", "subject-gated-rotary"]
)
def test_both_attention_implementations_read_exactly_and_write_alike(name: str, kernel: str) -> None:
    module = with_kernel(TINY[name](), kernel)
    model = ac.wrap(module)
    missing = {f"blocks.*.attn.{part}" for part in "qkv"} if (name, kernel) == ("falcon", "eager") else set()
    assert {site.local for site in model.sites()} == EXPECTED[name] - missing
    assert_reading_is_exact(model, inputs(name))
    site = next(s for s in model.sites() if s.name.endswith("attn.pattern"))
    value = model.record(inputs(name), site.name)[site.name]
    close(value, recorded(name)[site.name])
    vector = delta_for(site, value)[1]
    with model.clamp(ac.Add(site.name, vector)):
        got = outputs(model, inputs(name))
    with by_hand.added(module, name, site.name, vector):
        wanted = outputs(model, inputs(name))
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(got, wanted, strict=True))
    assert_leaves_no_trace(module, inputs(name))


@pytest.mark.parametrize("key", ["mine", "sdpa"])
def test_a_users_own_attention_function_is_called_and_kept(key: str) -> None:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as MASKS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as FUNCTIONS

    calls = []

    def mine(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[0])
        return sdpa_attention_forward(*args, **kwargs)

    FUNCTIONS[key], MASKS[key] = mine, MASKS["sdpa"]
    try:
        module = with_kernel(TINY["llama"](), key)
        model = ac.wrap(module)
        assert {site.local for site in model.sites()} == EXPECTED["llama"]
        calls.clear()
        sites = [site.name for site in model.sites()]
        recording = model.record(inputs("llama"), sites)
        assert len(calls) == len(module.model.layers)
        for site in sites:
            close(recording[site], recorded("llama")[site])
        assert_reading_is_exact(model, inputs("llama"))
        assert_leaves_no_trace(module, inputs("llama"))
        assert FUNCTIONS[key] is mine
    finally:
        del FUNCTIONS[key], MASKS[key]


# -- generation ------------------------------------------------------------------------------------------------------

GENERATING = [*CAUSAL, "t5"]


def greedy(module: nn.Module, ids: Tensor) -> Tensor:
    mask = torch.ones_like(ids)
    return module.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False)  # type: ignore[operator]


@pytest.mark.parametrize("name", GENERATING)
def test_generation_is_that_of_the_bare_module(name: str) -> None:
    model, ids = wrapped(name), inputs(name)["input_ids"]
    bare = greedy(model.module, ids)
    assert torch.equal(model.generate(ids, max_new_tokens=8).ids, bare)
    idle = [ac.Add(s.name, 0.0) for s in writable(name)]
    with model.clamp(*idle):
        assert torch.equal(model.generate(ids, max_new_tokens=8).ids, bare)


@pytest.mark.parametrize("name", GENERATING)
def test_generation_under_a_clamp_is_that_with_a_plain_hook(name: str) -> None:
    model, ids = wrapped(name), inputs(name)["input_ids"]
    sites = [
        s
        for s in writable(name)
        if s.layer == 0 and s.local.endswith(("resid.post", "resid.mid", "attn.z", "mixer.act", "attn.v"))
    ]
    changed = False
    for site in sites:
        vector = 9.0 * torch.randn(recorded(name)[site.name].shape[-1], generator=torch.Generator().manual_seed(3))
        with model.clamp(ac.Add(site.name, vector)):
            got = model.generate(ids, max_new_tokens=8).ids
        with by_hand.added(model.module, name, site.name, vector):
            wanted = greedy(model.module, ids)
        assert torch.equal(got, wanted), site
        changed = (
            changed or got.shape != greedy(model.module, ids).shape or not torch.equal(got, greedy(model.module, ids))
        )
    assert changed


# -- plain modules ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cnn", "mlp", "rnn", "lstm", "autoencoder"])
def test_plain_modules_are_reached_by_path(name: str) -> None:
    module, x = plain()[name]
    before = state_of(module)
    model = ac.wrap(module)
    paths = [path for path, part in module.named_modules() if path]
    bare = model(x).detach()
    for path in paths:
        # Without gradients, as a recording is made: a recurrent network has another kernel for each.
        with watched(module.get_submodule(path)) as calls, torch.no_grad():
            module(x)
        ((args, out),) = calls
        out = out[0] if isinstance(out, tuple) else out
        recording = model.record(x, [f"module:{path}", f"module:{path}@in"])
        assert torch.equal(recording[f"module:{path}"], out)
        assert torch.equal(recording[f"module:{path}@in"], args[0])
        vector = torch.randn(out.shape[-1], generator=torch.Generator().manual_seed(1))
        with model.clamp(ac.Add(f"module:{path}", vector)):
            got = model(x).detach()
        with by_hand.after(module.get_submodule(path), lambda y, v=vector: y + v):
            wanted = model(x).detach()
        assert torch.equal(got, wanted), path
        assert not torch.equal(got, bare), path
    assert {site.name for site in model.sites()} >= {f"module:{path}" for path in paths}
    assert state_of(module) == before
