"""The same interventions made by hand: plain hooks and patched library functions, without any of actome's code.

`COLUMNS` says anew, from reading the modeling files, where a tiny model keeps its projections and norms; where a site
can be had in two ways, the way here is the other one (``resid.mid`` is changed through what is added to the stream,
``attn.v`` through the rows of the pattern, ``mlp.pre`` through the projection before it).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from tiny import TINY
from torch import Tensor, nn
from torch.nn import functional as F

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Column:
    """Where one stack of blocks keeps its parts; paths are relative to a block, except the last three."""

    blocks: str
    prefix: str = ""
    attn: str = "self_attn"
    o: str = "self_attn.o_proj"
    attn_norm: str | None = None
    cross: str | None = None
    cross_o: str | None = None
    mlp: str = "mlp"
    gate: str = "mlp.gate_proj"
    half: bool = False  # the gate is the first half of that projection
    down: str = "mlp.down_proj"
    mlp_norm: str | None = None
    router: str = "mlp.gate"
    parallel: bool = False  # attention and MLP read the same stream
    post_norm: bool = False  # norms after the residual sums
    causal: bool = True
    length: int = 7
    embed: str | None = "model.embed_tokens"
    norm: str | None = "model.norm"


_GPT = Column(
    "transformer.h",
    attn="self_attention",
    o="self_attention.dense",
    gate="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h",
    embed="transformer.word_embeddings",
    norm="transformer.ln_f",
)
_NEOX = replace(
    _GPT,
    blocks="gpt_neox.layers",
    attn="attention",
    o="attention.dense",
    embed="gpt_neox.embed_in",
    norm="gpt_neox.final_layer_norm",
)
_OPT = Column(
    "model.decoder.layers",
    o="self_attn.out_proj",
    gate="fc1",
    down="fc2",
    embed="model.decoder.embed_tokens",
    norm="model.decoder.final_layer_norm",
)
_LLAMA = Column("model.layers")
_GEMMA2 = replace(_LLAMA, attn_norm="post_attention_layernorm", mlp_norm="post_feedforward_layernorm")
_BERT = Column(
    "bert.encoder.layer",
    attn="attention.self",
    o="attention.output.dense",
    gate="intermediate.dense",
    down="output.dense",
    post_norm=True,
    causal=False,
    embed="bert.embeddings.word_embeddings",
    norm=None,
)
_T5_ENCODER = Column(
    "encoder.block",
    prefix="encoder.",
    attn="layer.0.SelfAttention",
    o="layer.0.SelfAttention.o",
    gate="layer.1.DenseReluDense.wi",
    down="layer.1.DenseReluDense.wo",
    causal=False,
    embed="encoder.embed_tokens",
    norm="encoder.final_layer_norm",
)
_T5_DECODER = replace(
    _T5_ENCODER,
    blocks="decoder.block",
    prefix="decoder.",
    cross="layer.1.EncDecAttention",
    cross_o="layer.1.EncDecAttention.o",
    gate="layer.2.DenseReluDense.wi",
    down="layer.2.DenseReluDense.wo",
    causal=True,
    length=5,
    embed="decoder.embed_tokens",
    norm="decoder.final_layer_norm",
)
_CLIP_TEXT = Column(
    "text_model.encoder.layers",
    o="self_attn.out_proj",
    gate="mlp.fc1",
    down="mlp.fc2",
    embed="text_model.embeddings.token_embedding",
    norm="text_model.final_layer_norm",
)
_CLIP_VISION = replace(
    _CLIP_TEXT,
    blocks="vision_model.encoder.layers",
    causal=False,
    length=5,
    embed="vision_model.embeddings",
    norm=None,
)
_WHISPER_ENCODER = replace(
    _OPT,
    blocks="model.encoder.layers",
    prefix="encoder.",
    causal=False,
    length=6,
    embed=None,
    norm="model.encoder.layer_norm",
)
_WHISPER_DECODER = replace(
    _OPT,
    blocks="model.decoder.layers",
    prefix="decoder.",
    cross="encoder_attn",
    cross_o="encoder_attn.out_proj",
    length=5,
    norm="model.decoder.layer_norm",
)

_SUBJECT = Column(
    "blocks",
    attn="attn",
    o="attn.out",
    gate="mlp.up",
    down="mlp.down",
    router="mlp.router",
    embed="embed",
    norm="norm",
)

COLUMNS: dict[str, tuple[Column, ...]] = {
    "gpt2": (replace(_GPT, attn="attn", o="attn.c_proj", gate="mlp.c_fc", down="mlp.c_proj", embed="transformer.wte"),),
    "pythia": (replace(_NEOX, parallel=True),),
    "neox-sequential": (_NEOX,),
    "opt": (_OPT,),
    "opt-post-norm": (replace(_OPT, post_norm=True, norm=None),),
    "bloom": (_GPT,),
    "falcon": (replace(_GPT, parallel=True),),
    "falcon-new": (replace(_GPT, parallel=True),),
    "falcon-rw": (_GPT,),
    "gptj": (
        replace(
            _GPT,
            attn="attn",
            o="attn.out_proj",
            gate="mlp.fc_in",
            down="mlp.fc_out",
            parallel=True,
            embed="transformer.wte",
        ),
    ),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma"), (_LLAMA,)),
    **dict.fromkeys(("gemma2", "gemma3", "olmo2"), (_GEMMA2,)),
    "gemma3-multimodal": (
        replace(
            _GEMMA2,
            blocks="model.language_model.layers",
            embed="model.language_model.embed_tokens",
            norm="model.language_model.norm",
        ),
    ),
    "phi3": (replace(_LLAMA, gate="mlp.gate_up_proj", half=True),),
    **dict.fromkeys(("mixtral", "olmoe", "qwen3-moe", "deepseek-v3"), (_LLAMA,)),
    "gpt-oss": (replace(_LLAMA, router="mlp.router"),),
    "mamba": (
        replace(
            _LLAMA, blocks="backbone.layers", down="mixer.out_proj", embed="backbone.embeddings", norm="backbone.norm_f"
        ),
    ),
    **dict.fromkeys((name for name in TINY if name.startswith("subject-")), (_SUBJECT,)),
    "subject-gated-rotary": (replace(_SUBJECT, half=True),),
    "subject-bidirectional": (replace(_SUBJECT, causal=False),),
    "bert": (_BERT,),
    "roberta": (replace(_BERT, blocks="roberta.encoder.layer", embed="roberta.embeddings.word_embeddings"),),
    "modernbert": (
        replace(
            _LLAMA,
            attn="attn",
            o="attn.Wo",
            gate="mlp.Wi",
            half=True,
            down="mlp.Wo",
            causal=False,
            embed="model.embeddings.tok_embeddings",
            norm="model.final_norm",
        ),
    ),
    "t5": (_T5_ENCODER, _T5_DECODER),
    "t5-gated": (
        replace(_T5_ENCODER, gate="layer.1.DenseReluDense.wi_0"),
        replace(_T5_DECODER, gate="layer.2.DenseReluDense.wi_0"),
    ),
    "vit": (
        replace(
            _CLIP_VISION,
            blocks="vit.layers",
            attn="attention",
            o="attention.o_proj",
            embed="vit.embeddings",
            norm="vit.layernorm",
        ),
    ),
    "clip": (replace(_CLIP_VISION, prefix="vision."), replace(_CLIP_TEXT, prefix="text.")),
    "clip-text": (_CLIP_TEXT,),
    "clip-vision": (_CLIP_VISION,),
    "whisper": (_WHISPER_ENCODER, _WHISPER_DECODER),
    "whisper-encoder": (replace(_WHISPER_ENCODER, blocks="layers", norm="layer_norm"),),
}


def column_of(name: str, site: str) -> Column:
    """The column of a tiny model that a site belongs to."""
    # A site without a prefix among prefixed columns (`logits`) is the last column's.
    return next((c for c in COLUMNS[name] if site.startswith(c.prefix)), COLUMNS[name][-1])


def block_of(module: nn.Module, column: Column, layer: int) -> nn.Module:
    return module.get_submodule(column.blocks)[layer]  # type: ignore[index]


@contextmanager
def before(module: nn.Module, change: Change) -> Iterator[None]:
    """Changes the first tensor that a module is called with."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        key = next(k for k, v in kwargs.items() if isinstance(v, Tensor))
        return args, {**kwargs, key: change(kwargs[key])}

    with module.register_forward_pre_hook(hook, with_kwargs=True):
        yield


@contextmanager
def after(module: nn.Module, change: Change) -> Iterator[None]:
    """Changes the first tensor that a module gives."""

    def hook(_: nn.Module, __: Any, out: Any) -> Any:
        if isinstance(out, Tensor):
            return change(out)
        return (change(out[0]), *out[1:])

    with module.register_forward_hook(hook):
        yield


@contextmanager
def logits_after(module: nn.Module, change: Change) -> Iterator[None]:
    def hook(_: nn.Module, __: Any, out: Any) -> Any:
        out["logits"] = change(out["logits"])
        return out

    with module.register_forward_hook(hook):
        yield


@contextmanager
def linear_inside(module: nn.Module, change: Change) -> Iterator[None]:
    """Changes what `F.linear` gives while a module's forward runs."""
    linear, inside = F.linear, [False]

    def patched(*args: Any, **kwargs: Any) -> Tensor:
        out = linear(*args, **kwargs)
        return change(out) if inside[0] else out

    F.linear = patched
    try:
        with _flagged(module, inside):
            yield
    finally:
        F.linear = linear


@contextmanager
def _flagged(module: nn.Module, inside: list[bool]) -> Iterator[None]:
    def enter(*_: Any) -> None:
        inside[0] = True

    def leave(*_: Any) -> None:
        inside[0] = False

    with module.register_forward_pre_hook(enter), module.register_forward_hook(leave):
        yield


def tilted(pattern: Tensor, change: Tensor) -> Tensor:
    """The pattern after `change` is added to its scores, from the pattern alone.

    What a row lacks of one is the mass of a sink, whose score stays as it is.
    """
    sink = 1 - pattern.sum(dim=-1, keepdim=True)
    raised = pattern * change.exp()
    return raised / (raised.sum(dim=-1, keepdim=True) + sink)


def separate(module: nn.Module, scores: Tensor) -> Tensor:
    """The causal pattern of a subject whose attention is no softmax, from its scores without a mask."""
    past = torch.ones(scores.shape[-2:], dtype=scores.dtype).tril()
    pattern = {"sigmoid": torch.sigmoid, "relu": torch.relu, "linear": lambda x: x}[module.kind](scores) * past
    if module.scale == "keys":
        pattern = pattern / past.sum(dim=-1, keepdim=True)
    elif module.scale == "sum":
        pattern = pattern / pattern.abs().sum(dim=-1, keepdim=True)
    return pattern


@contextmanager
def attention(module: nn.Module, part: str, delta: Tensor, causal: bool) -> Iterator[None]:
    """Adds `delta` to one part of one attention module, whatever way it computes attention."""
    from transformers.modeling_utils import AttentionInterface

    get_interface, sdpa, softmax, inside = (
        AttentionInterface.get_interface,
        F.scaled_dot_product_attention,
        F.softmax,
        [False],
    )

    def attend(q: Tensor, k: Tensor, v: Tensor, inner: Callable[..., Any], pattern_of: Callable[..., Tensor]) -> Any:
        q, k, v = (x + delta if part == name else x for name, x in (("q", q), ("k", k), ("v", v)))
        if part in "qkv":
            return inner(q, k, v)
        pattern = pattern_of(q, k, v)
        if part == "pattern":
            pattern = pattern + delta
        elif getattr(module, "kind", "softmax") == "softmax":
            pattern = tilted(pattern, delta)
        else:
            pattern = separate(module, q @ k.mT * module.d_head**-0.5 + delta)
        return pattern @ v.repeat_interleave(pattern.shape[1] // v.shape[1], dim=1)

    def patched_interface(self: Any, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
        function = get_interface(self, name, default)

        def run(owner: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
            if owner is not module:
                return function(owner, q, k, v, mask, **kwargs)
            dense = dense_mask(mask, q, k, causal)
            out = attend(
                q,
                k,
                v,
                lambda *qkv: function(owner, *qkv, mask, **kwargs),
                lambda *qkv: default(owner, *qkv, dense, **kwargs)[1],
            )
            return (out.transpose(1, 2).contiguous(), None) if isinstance(out, Tensor) else out

        return run

    def patched_sdpa(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        if not inside[0]:
            return sdpa(q, k, v, attn_mask=attn_mask, **kwargs)
        mask = dense_mask(attn_mask, q, k, kwargs.get("is_causal", False))
        return attend(
            q,
            k,
            v,
            lambda *qkv: sdpa(*qkv, attn_mask=attn_mask, **kwargs),
            lambda q, k, v: softmax(q @ k.mT * q.shape[-1] ** -0.5 + (0.0 if mask is None else mask), dim=-1),
        )

    def patched_softmax(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        pattern = softmax(x, *args, **kwargs)
        if not inside[0]:
            return pattern
        return tilted(pattern, delta) if part == "scores" else pattern + delta

    AttentionInterface.get_interface = patched_interface
    # A module that asks the registry calls both from within it, where they must stay what they are.
    registered = hasattr(module, "config") and type(module).__module__.split(".")[-2] not in ("falcon", "gptj")
    if not registered:
        F.scaled_dot_product_attention, F.softmax = patched_sdpa, patched_softmax
    try:
        with _flagged(module, inside):
            yield
    finally:
        AttentionInterface.get_interface = get_interface
        F.scaled_dot_product_attention, F.softmax = sdpa, softmax


def dense_mask(mask: Tensor | None, q: Tensor, k: Tensor, causal: bool) -> Tensor | None:
    """The mask of any kernel as what is added to the scores."""
    if mask is None and causal:
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, torch.finfo(q.dtype).min)
    return mask


def split(x: Tensor, heads: int) -> Tensor:
    """(..., heads * width) as (..., heads, width)."""
    return x.unflatten(-1, (heads, -1))


@contextmanager
def added(module: nn.Module, name: str, site: str, delta: Tensor) -> Iterator[None]:
    """Adds `delta`, in the site's dims, at a site of a tiny model by hand."""
    column = column_of(name, site)
    local = site.removeprefix(column.prefix)
    if local == "logits":
        how: Any = logits_after(module, lambda x: x + delta)
    elif local in ("embed", "final_norm"):
        path = column.embed if local == "embed" else column.norm
        assert path is not None
        how = after(module.get_submodule(path), lambda x: x + delta)
    else:
        _, layer, local = local.split(".", 2)
        how = _in_block(block_of(module, column, int(layer)), column, local, delta)
    with how:
        yield


def _in_block(block: nn.Module, column: Column, local: str, delta: Tensor) -> Any:
    kind, _, part = local.partition(".")

    def plus(x: Tensor) -> Tensor:
        # OPT's second half runs on flattened tokens; a delta without positions broadcasts all the same.
        return x + (delta if x.ndim > 2 or delta.ndim == 1 else delta.flatten(0, 1))

    def plus_half(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return torch.cat([gate + delta, up], dim=-1)

    def plus_heads(x: Tensor) -> Tensor:
        return (split(x, x.shape[-1] // delta.shape[-1]) + delta).flatten(-2)

    def attn_out() -> Any:
        return after(block.get_submodule(column.attn_norm or column.o), plus)

    if local == "resid.pre":
        return before(block, plus)
    if local == "resid.post":
        return after(block, plus)
    if local in ("resid.mid", "attn.out"):
        return attn_out()
    if local in ("resid.cross", "cross.out"):
        return after(block.get_submodule(str(column.cross_o)), plus)
    if local == "attn.z":
        return before(block.get_submodule(column.o), plus_heads)
    if local == "cross.z":
        return before(block.get_submodule(str(column.cross_o)), plus_heads)
    if kind == "attn":
        return attention(block.get_submodule(column.attn), part, delta, column.causal)
    if kind == "cross":
        return attention(block.get_submodule(str(column.cross)), part, delta, False)
    if local == "mlp.pre":
        return after(block.get_submodule(column.gate), plus_half if column.half else plus)
    if local in ("mlp.act", "mixer.act"):
        return before(block.get_submodule(column.down), plus)
    if local == "mlp.out":
        sparse = (
            isinstance(getattr(block.get_submodule(column.mlp), "experts", None), nn.Module)
            if _has(block, column.mlp)
            else False
        )
        return after(block.get_submodule(column.mlp if sparse else column.mlp_norm or column.down), plus)
    if local == "mixer.out":
        return after(block.get_submodule("mixer"), plus)
    if local == "moe.router":
        return linear_inside(block.get_submodule(column.router), plus)
    if local == "moe.experts":
        return _experts(block, plus, delta)
    if local == "moe.shared.act":
        return before(block.get_submodule("mlp.shared_experts.down_proj"), plus)
    if local == "moe.shared.out":
        return after(block.get_submodule("mlp.shared_experts"), plus)
    raise KeyError(local)


def _has(block: nn.Module, path: str) -> bool:
    try:
        block.get_submodule(path)
    except AttributeError:
        return False
    return True


@contextmanager
def _experts(block: nn.Module, plus: Change, delta: Tensor) -> Iterator[None]:
    """What is added to every chosen expert's output arrives weighted by the sum of the weights."""
    experts = block.get_submodule("mlp.experts")
    total: list[Tensor] = []

    def weigh(_: nn.Module, args: tuple[Any, ...]) -> None:
        total.append(args[2].sum(dim=-1, keepdim=True))

    def add(_: nn.Module, __: Any, out: Tensor) -> Tensor:
        return out + delta * total.pop()

    with ExitStack() as stack:
        stack.enter_context(experts.register_forward_pre_hook(weigh))
        stack.enter_context(experts.register_forward_hook(add))
        yield


def expert_outputs(experts: nn.Module, hidden: Tensor, chosen: Tensor) -> Tensor:
    """Each chosen expert's output before weighting, (token, choice, d_model), expert by expert from the weights.

    Args:
        hidden: (token, d_model) that enters the experts.
        chosen: (token, choice) indices.
    """
    rows = []
    for x, picks in zip(hidden, chosen, strict=True):
        outs = []
        for e in picks.tolist():
            if hasattr(experts, "gate_up_proj_bias"):  # gpt-oss: transposed, interleaved, clamped, with biases
                both = x @ experts.gate_up_proj[e] + experts.gate_up_proj_bias[e]
                gate, up = both[::2].clamp(max=experts.limit), both[1::2].clamp(-experts.limit, experts.limit)
                inner = (up + 1) * gate * torch.sigmoid(experts.alpha * gate)
                outs.append(inner @ experts.down_proj[e] + experts.down_proj_bias[e])
            else:
                gate, up = (experts.gate_up_proj[e] @ x).chunk(2)
                outs.append(experts.down_proj[e] @ (F.silu(gate) * up))
        rows.append(torch.stack(outs))
    return torch.stack(rows)
