"""The family table: where each architecture family keeps its sites. Data, not code; the resolver reads it.

A row names the stacks of blocks of a family and, for each stack, an *address* for each site. Addresses in `block` are
relative to one block, addresses in `top` to the whole model. The grammar::

    address = path "@" kind { "|" modifier }

    path@in          the first tensor argument of the module at `path` (the empty path is the block, or the model)
    path@out         its output; the first element when it is a tuple
    path@attention   an attention module that calls transformers' attention registry: offers q, k, v, scores, pattern
    path@functions   one that does not: a function mode on softmax and scaled_dot_product_attention within its forward
    path@router      a top-k router: returns (logits, weights, indices), one row per token
    path@experts     the experts module: called with (hidden, indices, weights), one row per token

    |heads           the last dim is (head, d_head) in one
    |flat            batch and pos come as one leading dim
    |inplace         the caller keeps the input as its residual, so a write must change it in place
    |mutated         the model changes the tensor in place afterwards, so a record must copy it

A path that a block does not have means that the site is not there (a dense layer among sparse ones, a norm that is
`None`). Paths are those of the class with a head; `bases` are the prefixes that smaller classes of the family lack.

What the names mean where architectures differ: `embed` is the token embedding before positions are added (for images
the sequence with its class token and positions, because only that has the positions of the blocks); `attn.out` and
`mlp.out` are what is added to the residual stream, so after dropout and after a post-norm; `mlp.pre` enters the
nonlinearity (the gate of a gated MLP); `mlp.act` enters the down projection. In post-norm blocks (BERT) `resid.mid`
is the sum before the norm, and `resid.post` the output of the block. The row of `logits` names the head, so that a
class without one offers none; what is tapped is the field ``logits`` of the model's output, after any caps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Stack:
    """One column of equal blocks.

    Attributes:
        blocks: the path of the list of blocks.
        block: the address of each local site in one block.
        top: the addresses of ``embed``, ``final_norm`` and ``logits`` in the whole model.
        prefix: put before the names of its sites, except ``logits``, which are the model's own.
        heads: the attribute of the attention module's config, or else of the module, that counts its heads.
        causal: whether a position of its self-attention sees only itself and earlier ones.
    """

    blocks: str
    block: Mapping[str, str]
    top: Mapping[str, str]
    prefix: str = ""
    heads: str = "num_attention_heads"
    causal: bool = True


@dataclass(frozen=True)
class Family:
    """One architecture family.

    Attributes:
        name: what it is called.
        model_types: the ``config.model_type`` values that belong to it.
        stacks: its stacks, in the order in which the forward runs them.
        bases: the path prefixes that its smaller classes lack, such as ``model`` in ``LlamaModel``.
        when: config values that tell this variant from others of the same model type.
        home: the module that makes the family known to transformers, where transformers does not ship it.
    """

    name: str
    model_types: tuple[str, ...]
    stacks: tuple[Stack, ...]
    bases: tuple[str, ...] = ("model",)
    when: Mapping[str, object] = field(default_factory=dict)
    home: str | None = None


_STREAM = {"resid.pre": "@in", "resid.post": "@out"}

# Pre-norm, gated MLP: the shape that most open decoders since Llama share.
_LLAMA = _STREAM | {
    "attn": "self_attn@attention",
    "attn.z": "self_attn.o_proj@in|heads",
    "attn.out": "self_attn@out",
    "resid.mid": "post_attention_layernorm@in|inplace",
    "mlp.pre": "mlp.act_fn@in",
    "mlp.act": "mlp.down_proj@in",
    "mlp.out": "mlp@out",
}
_LLAMA_TOP = {"embed": "model.embed_tokens@out", "final_norm": "model.norm@out", "logits": "lm_head@out"}

# Sparse layers of the same shape. `mlp.pre` and `mlp.act` stay for the dense layers that some of these models mix in.
_SPARSE = _LLAMA | {
    "moe.router": "mlp.gate@router",
    "moe.experts": "mlp.experts@experts",
    "moe.shared.act": "mlp.shared_experts.down_proj@in",
    "moe.shared.out": "mlp.shared_experts@out",
}

# Norms on both sides of attention and MLP; what is added to the stream is the second norm's output.
_GEMMA2 = _LLAMA | {
    "attn.out": "post_attention_layernorm@out",
    "resid.mid": "pre_feedforward_layernorm@in|inplace",
    "mlp.out": "post_feedforward_layernorm@out",
}

_OLMO2 = _LLAMA | {
    "attn.out": "post_attention_layernorm@out",
    # No norm before the MLP, so the MLP itself is what receives the stream.
    "resid.mid": "mlp@in|inplace",
    "mlp.out": "post_feedforward_layernorm@out",
}

_PHI3 = _LLAMA | {
    "attn.out": "resid_attn_dropout@out",
    "mlp.pre": "mlp.activation_fn@in",
    "mlp.out": "resid_mlp_dropout@out",
}

_NEOX = _STREAM | {
    "attn": "attention@attention",
    "attn.z": "attention.dense@in|heads",
    "attn.out": "post_attention_dropout@out",
    "mlp.pre": "mlp.act@in",
    "mlp.act": "mlp.dense_4h_to_h@in",
    "mlp.out": "post_mlp_dropout@out",
}
_NEOX_TOP = {"embed": "gpt_neox.embed_in@out", "final_norm": "gpt_neox.final_layer_norm@out", "logits": "lm_head@out"}

_OPT = _STREAM | {
    "attn": "self_attn@attention",
    "attn.z": "self_attn.out_proj@in|heads",
    "attn.out": "self_attn@out",
    # The second half of an OPT block runs on (batch * pos, d_model).
    "resid.mid": "final_layer_norm@in|flat|inplace",
    "mlp.pre": "activation_fn@in|flat",
    "mlp.act": "fc2@in|flat",
    "mlp.out": "fc2@out|flat",
}
_OPT_TOP = {
    "embed": "model.decoder.embed_tokens@out",
    "final_norm": "model.decoder.final_layer_norm@out",
    "logits": "lm_head@out",
}

_GPT2_TOP = {"embed": "transformer.wte@out", "final_norm": "transformer.ln_f@out", "logits": "lm_head@out"}
_BLOOM_TOP = _GPT2_TOP | {"embed": "transformer.word_embeddings@out"}

_BERT = _STREAM | {
    "attn": "attention.self@attention",
    "attn.z": "attention.output.dense@in|heads",
    "attn.out": "attention.output.dropout@out",
    "resid.mid": "attention.output.LayerNorm@in",
    "mlp.pre": "intermediate.intermediate_act_fn@in",
    "mlp.act": "output.dense@in",
    "mlp.out": "output.dropout@out",
}

# CLIP's two towers; ViT differs in names only.
_CLIP = _STREAM | {
    "attn": "self_attn@attention",
    "attn.z": "self_attn.out_proj@in|heads",
    "attn.out": "self_attn@out",
    "resid.mid": "layer_norm2@in|inplace",
    "mlp.pre": "mlp.activation_fn@in",
    "mlp.act": "mlp.fc2@in",
    "mlp.out": "mlp@out",
}
# The final norm of the vision tower sees the class token alone, so it has no positions and is not listed.
_CLIP_TEXT_TOP = {
    "embed": "text_model.embeddings.token_embedding@out",
    "final_norm": "text_model.final_layer_norm@out",
}
_CLIP_VISION_TOP = {"embed": "vision_model.embeddings@out"}

_T5_SELF = _STREAM | {
    "attn": "layer.0.SelfAttention@attention",
    "attn.z": "layer.0.SelfAttention.o@in|heads",
    "attn.out": "layer.0.dropout@out",
    "resid.mid": "layer.1@in",
}
_T5_ENCODER = _T5_SELF | {
    "mlp.pre": "layer.1.DenseReluDense.act@in",
    "mlp.act": "layer.1.DenseReluDense.wo@in",
    "mlp.out": "layer.1.dropout@out",
}
_T5_DECODER = _T5_SELF | {
    "cross": "layer.1.EncDecAttention@attention",
    "cross.z": "layer.1.EncDecAttention.o@in|heads",
    "cross.out": "layer.1.dropout@out",
    "resid.cross": "layer.2@in",
    "mlp.pre": "layer.2.DenseReluDense.act@in",
    "mlp.act": "layer.2.DenseReluDense.wo@in",
    "mlp.out": "layer.2.dropout@out",
}

_WHISPER = _STREAM | {
    "attn": "self_attn@attention",
    "attn.z": "self_attn.out_proj@in|heads",
    "attn.out": "self_attn@out",
    "mlp.pre": "activation_fn@in",
    "mlp.act": "fc2@in",
    "mlp.out": "fc2@out",
}
_WHISPER_DECODER = _WHISPER | {
    "resid.mid": "encoder_attn_layer_norm@in|inplace",
    "cross": "encoder_attn@attention",
    "cross.z": "encoder_attn.out_proj@in|heads",
    "cross.out": "encoder_attn@out",
    "resid.cross": "final_layer_norm@in|inplace",
}

# The small transformer of `actome.tasks`. Attention-only blocks have no MLP, and dense ones no mixture of experts.
_SUBJECT = _STREAM | {
    "attn": "attn@attention",
    "attn.z": "attn.out@in|heads",
    "attn.out": "attn@out",
    "resid.mid": "norm_mlp@in|inplace",
    "mlp.pre": "mlp.act@in",
    "mlp.act": "mlp.down@in",
    "mlp.out": "mlp@out",
    "moe.router": "mlp.router@router",
    "moe.experts": "mlp.experts@experts",
}
_SUBJECT_TOP = {"embed": "embed@out", "final_norm": "norm@out", "logits": "unembed@out"}

FAMILIES: tuple[Family, ...] = (
    Family(
        "gpt2",
        ("gpt2",),
        (
            Stack(
                "transformer.h",
                _STREAM
                | {
                    "attn": "attn@attention",
                    "attn.z": "attn.c_proj@in|heads",
                    "attn.out": "attn@out",
                    "resid.mid": "ln_2@in|inplace",
                    "mlp.pre": "mlp.act@in",
                    "mlp.act": "mlp.c_proj@in",
                    "mlp.out": "mlp@out",
                },
                _GPT2_TOP,
            ),
        ),
        bases=("transformer",),
    ),
    Family(
        "gpt-neox, parallel",
        ("gpt_neox",),
        (Stack("gpt_neox.layers", _NEOX, _NEOX_TOP),),
        bases=("gpt_neox",),
        when={"use_parallel_residual": True},
    ),
    Family(
        "gpt-neox, sequential",
        ("gpt_neox",),
        (Stack("gpt_neox.layers", _NEOX | {"resid.mid": "post_attention_layernorm@in|inplace"}, _NEOX_TOP),),
        bases=("gpt_neox",),
    ),
    Family(
        "gpt-j",
        ("gptj",),
        (
            Stack(
                "transformer.h",
                _STREAM
                | {
                    "attn": "attn@functions",
                    "attn.z": "attn.out_proj@in|heads",
                    "attn.out": "attn@out",
                    "mlp.pre": "mlp.act@in",
                    "mlp.act": "mlp.fc_out@in",
                    "mlp.out": "mlp@out",
                },
                _GPT2_TOP,
            ),
        ),
        bases=("transformer",),
    ),
    Family(
        "bloom",
        ("bloom",),
        (
            Stack(
                "transformer.h",
                _STREAM
                | {
                    "attn": "self_attention@functions",
                    "attn.z": "self_attention.dense@in|heads",
                    # The attention and MLP modules add the residual themselves.
                    "attn.out": "self_attention.dense@out",
                    "resid.mid": "self_attention@out",
                    "mlp.pre": "mlp.gelu_impl@in",
                    "mlp.act": "mlp.dense_4h_to_h@in",
                    "mlp.out": "mlp.dense_4h_to_h@out",
                },
                _BLOOM_TOP,
                heads="num_heads",
            ),
        ),
        bases=("transformer",),
    ),
    Family(
        "falcon",
        ("falcon",),
        (
            Stack(
                "transformer.h",
                _STREAM
                | {
                    "attn": "self_attention@functions",
                    "attn.z": "self_attention.dense@in|heads",
                    "attn.out": "self_attention@out",
                    # Only the sequential variant (falcon-rw) has this norm.
                    "resid.mid": "post_attention_layernorm@in|inplace",
                    "mlp.pre": "mlp.act@in",
                    "mlp.act": "mlp.dense_4h_to_h@in",
                    # A parallel block adds the attention's output into the MLP's, in place.
                    "mlp.out": "mlp@out|mutated",
                },
                _BLOOM_TOP,
            ),
        ),
        bases=("transformer",),
    ),
    Family(
        "opt",
        ("opt",),
        (Stack("model.decoder.layers", _OPT, _OPT_TOP),),
        bases=("model", "model.decoder"),
        when={"do_layer_norm_before": True},
    ),
    Family(
        "opt, post-norm",
        ("opt",),
        (Stack("model.decoder.layers", _OPT | {"resid.mid": "self_attn_layer_norm@in"}, _OPT_TOP),),
        bases=("model", "model.decoder"),
    ),
    Family(
        "llama",
        ("llama", "mistral", "qwen2", "qwen3", "gemma"),
        (Stack("model.layers", _LLAMA, _LLAMA_TOP),),
    ),
    Family("gemma 2", ("gemma2", "gemma3_text"), (Stack("model.layers", _GEMMA2, _LLAMA_TOP),)),
    Family(
        "gemma 3, multimodal",
        ("gemma3",),
        (
            Stack(
                "model.language_model.layers",
                _GEMMA2,
                {
                    "embed": "model.language_model.embed_tokens@out",
                    "final_norm": "model.language_model.norm@out",
                    "logits": "lm_head@out",
                },
            ),
        ),
    ),
    Family("olmo 2", ("olmo2",), (Stack("model.layers", _OLMO2, _LLAMA_TOP),)),
    Family("phi 3", ("phi3",), (Stack("model.layers", _PHI3, _LLAMA_TOP),)),
    Family(
        "mixture of experts",
        ("mixtral", "olmoe", "qwen3_moe", "deepseek_v3"),
        (Stack("model.layers", _SPARSE, _LLAMA_TOP),),
    ),
    Family(
        "gpt-oss",
        ("gpt_oss",),
        (Stack("model.layers", _SPARSE | {"moe.router": "mlp.router@router"}, _LLAMA_TOP),),
    ),
    Family(
        "mamba",
        ("mamba",),
        (
            Stack(
                "backbone.layers",
                _STREAM | {"mixer.act": "mixer.out_proj@in", "mixer.out": "mixer@out"},
                {"embed": "backbone.embeddings@out", "final_norm": "backbone.norm_f@out", "logits": "lm_head@out"},
            ),
        ),
        bases=("backbone",),
    ),
    Family(
        "bert",
        ("bert",),
        (
            Stack(
                "bert.encoder.layer",
                _BERT,
                {"embed": "bert.embeddings.word_embeddings@out", "logits": "cls.predictions.decoder@out"},
                causal=False,
            ),
        ),
        bases=("bert",),
    ),
    Family(
        "roberta",
        ("roberta",),
        (
            Stack(
                "roberta.encoder.layer",
                _BERT,
                {"embed": "roberta.embeddings.word_embeddings@out", "logits": "lm_head@out"},
                causal=False,
            ),
        ),
        bases=("roberta",),
    ),
    Family(
        "modernbert",
        ("modernbert",),
        (
            Stack(
                "model.layers",
                _STREAM
                | {
                    "attn": "attn@attention",
                    "attn.z": "attn.Wo@in|heads",
                    "attn.out": "attn@out",
                    "resid.mid": "mlp_norm@in|inplace",
                    "mlp.pre": "mlp.act@in",
                    "mlp.act": "mlp.Wo@in",
                    "mlp.out": "mlp@out",
                },
                {
                    "embed": "model.embeddings.tok_embeddings@out",
                    "final_norm": "model.final_norm@out",
                    "logits": "decoder@out",
                },
                causal=False,
            ),
        ),
    ),
    Family(
        "t5",
        ("t5",),
        (
            Stack(
                "encoder.block",
                _T5_ENCODER,
                {"embed": "encoder.embed_tokens@out", "final_norm": "encoder.final_layer_norm@out"},
                prefix="encoder.",
                heads="num_heads",
                causal=False,
            ),
            Stack(
                "decoder.block",
                _T5_DECODER,
                {
                    "embed": "decoder.embed_tokens@out",
                    "final_norm": "decoder.final_layer_norm@out",
                    "logits": "lm_head@out",
                },
                prefix="decoder.",
                heads="num_heads",
            ),
        ),
        bases=("encoder",),
    ),
    Family(
        "vit",
        ("vit",),
        (
            Stack(
                "vit.layers",
                _CLIP
                | {
                    "attn": "attention@attention",
                    "attn.z": "attention.o_proj@in|heads",
                    "attn.out": "attention@out",
                    "resid.mid": "layernorm_after@in|inplace",
                },
                {"embed": "vit.embeddings@out", "final_norm": "vit.layernorm@out", "logits": "classifier@out"},
                causal=False,
            ),
        ),
        bases=("vit",),
    ),
    Family(
        "clip",
        ("clip",),
        (
            Stack("vision_model.encoder.layers", _CLIP, _CLIP_VISION_TOP, prefix="vision.", causal=False),
            Stack("text_model.encoder.layers", _CLIP, _CLIP_TEXT_TOP, prefix="text."),
        ),
        bases=(),
    ),
    Family(
        "clip, text tower",
        ("clip_text_model",),
        (Stack("text_model.encoder.layers", _CLIP, _CLIP_TEXT_TOP),),
        bases=("text_model",),
    ),
    Family(
        "clip, vision tower",
        ("clip_vision_model",),
        (Stack("vision_model.encoder.layers", _CLIP, _CLIP_VISION_TOP, causal=False),),
        bases=("vision_model",),
    ),
    Family(
        "whisper",
        ("whisper",),
        (
            Stack(
                "model.encoder.layers",
                _WHISPER | {"resid.mid": "final_layer_norm@in|inplace"},
                # What enters the first block is a convolution's output plus positions; no module holds it.
                {"final_norm": "model.encoder.layer_norm@out"},
                prefix="encoder.",
                heads="num_heads",
                causal=False,
            ),
            Stack(
                "model.decoder.layers",
                _WHISPER_DECODER,
                {
                    "embed": "model.decoder.embed_tokens@out",
                    "final_norm": "model.decoder.layer_norm@out",
                    "logits": "proj_out@out",
                },
                prefix="decoder.",
                heads="num_heads",
            ),
        ),
        # The bare encoder is a class of its own, and audio classifiers hold one directly.
        bases=("model", "model.encoder"),
    ),
    Family(
        "subject, bidirectional",
        ("actome_subject",),
        (Stack("blocks", _SUBJECT, _SUBJECT_TOP, causal=False),),
        bases=(),
        when={"causal": False},
        home="actome.tasks.subject",
    ),
    Family(
        "subject",
        ("actome_subject",),
        (Stack("blocks", _SUBJECT, _SUBJECT_TOP),),
        bases=(),
        home="actome.tasks.subject",
    ),
)


def family_of(config: object) -> Family | None:
    """The row that a model's config belongs to, or ``None`` for an unknown family.

    >>> from types import SimpleNamespace
    >>> family_of(SimpleNamespace(model_type="gpt_neox", use_parallel_residual=False)).name
    'gpt-neox, sequential'
    """
    model_type = getattr(config, "model_type", None)
    for family in FAMILIES:
        fits = all(getattr(config, name, None) == value for name, value in family.when.items())
        if model_type in family.model_types and fits:
            return family
    return None
