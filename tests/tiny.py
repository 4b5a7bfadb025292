"""A tiny random model of every family, and inputs for it: what the conformance suite runs on.

Widths of 16 to 32, two or three blocks, two to four heads, grouped queries where the family has them. Every parameter
is drawn anew, so that no zero bias, zero router or unit norm lets a wrong site pass. `inputs` is the same each time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from torch import nn

from actome.tasks import Subject, SubjectConfig

BATCH, LENGTH, VOCAB = 2, 7, 64
IMAGE, PATCH, MELS, FRAMES = 8, 4, 8, 12

_WORDS = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_MODERN = _WORDS | {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_OPT = _WORDS | {
    "hidden_size": 24,
    "word_embed_proj_dim": 24,
    "ffn_dim": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "dropout": 0.0,
}
_NEOX = {k: v for k, v in _MODERN.items() if k != "num_key_value_heads"}
_FALCON = _WORDS | {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
_BERT = _NEOX | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_MOE = _MODERN | {"num_experts_per_tok": 2}
_TEXT_TOWER = _NEOX | {"projection_dim": 12}
_VISION_TOWER = {
    "hidden_size": 16,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": IMAGE,
    "patch_size": PATCH,
    "projection_dim": 12,
}
_T5 = {
    "vocab_size": VOCAB,
    "d_model": 24,
    "d_kv": 5,  # heads * d_kv differs from d_model, as in the larger T5s
    "d_ff": 40,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}
_SUBJECT = {"vocab": VOCAB, "d_model": 24, "layers": 3, "heads": 4, "d_mlp": 40, "context": 64}
# Every attention, MLP, norm and position scheme at least once.
SUBJECTS: dict[str, dict[str, Any]] = {
    "subject-gated-rotary": {"mlp": "gated", "act": "silu", "positions": "rotary", "d_head": 8},
    "subject-sigmoid": {"attention": "sigmoid", "act": "relu", "bias": True},
    "subject-relu": {"attention": "relu", "attention_scale": "keys", "qk_norm": True, "positions": "sinusoidal"},
    "subject-linear": {"attention": "linear", "attention_scale": "sum", "norm": "none", "positions": "none"},
    "subject-attention-only": {"mlp": "none", "tied": True},
    "subject-moe": {"mlp": "gated", "act": "silu", "experts": 4, "d_mlp": 32},
    "subject-alibi": {"positions": "alibi", "norm": "layer"},
    "subject-key-bias": {"key_bias": True, "qk_norm": True},
}
_WHISPER = _WORDS | {
    "d_model": 24,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 3,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 32,
    "num_mel_bins": MELS,
    "max_source_positions": FRAMES // 2,
    "max_target_positions": 32,
    "decoder_start_token_id": 1,
}


def _gemma3() -> nn.Module:
    text = _MODERN | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4, "final_logit_softcapping": 5.0}
    text |= {"layer_types": ["sliding_attention", "full_attention"]}
    config = tf.Gemma3Config(text_config=text, vision_config=_VISION_TOWER, image_token_id=3, mm_tokens_per_image=4)
    return tf.Gemma3ForConditionalGeneration(config)


_BUILD: dict[str, Callable[[], nn.Module]] = {
    "gpt2": lambda: tf.GPT2LMHeadModel(
        tf.GPT2Config(
            **_WORDS, n_embd=24, n_layer=3, n_head=4, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
        )
    ),
    "pythia": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**_NEOX, use_parallel_residual=True)),
    "neox-sequential": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**_NEOX, use_parallel_residual=False)),
    "opt": lambda: tf.OPTForCausalLM(tf.OPTConfig(**_OPT)),
    "opt-post-norm": lambda: tf.OPTForCausalLM(
        tf.OPTConfig(**_OPT | {"word_embed_proj_dim": 16}, do_layer_norm_before=False)
    ),
    "bloom": lambda: tf.BloomForCausalLM(tf.BloomConfig(**_WORDS, hidden_size=24, n_layer=2, n_head=4)),
    "falcon": lambda: tf.FalconForCausalLM(tf.FalconConfig(**_FALCON)),
    "falcon-new": lambda: tf.FalconForCausalLM(
        tf.FalconConfig(**_FALCON, new_decoder_architecture=True, num_kv_heads=2)
    ),
    "falcon-rw": lambda: tf.FalconForCausalLM(
        tf.FalconConfig(**_FALCON, multi_query=False, parallel_attn=False, alibi=True, bias=True)
    ),
    "gptj": lambda: tf.GPTJForCausalLM(
        tf.GPTJConfig(**_WORDS, n_embd=24, n_layer=2, n_head=4, rotary_dim=4, n_positions=64, tie_word_embeddings=False)
    ),
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_MODERN | {"num_hidden_layers": 3})),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**_MODERN, sliding_window=4)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**_MODERN)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**_MODERN, head_dim=8)),
    "gemma": lambda: tf.GemmaForCausalLM(tf.GemmaConfig(**_MODERN, head_dim=8)),
    "gemma2": lambda: tf.Gemma2ForCausalLM(
        tf.Gemma2Config(**_MODERN, head_dim=8, query_pre_attn_scalar=8, sliding_window=4, final_logit_softcapping=5.0)
    ),
    "gemma3": lambda: tf.Gemma3ForCausalLM(
        tf.Gemma3TextConfig(
            **_MODERN,
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention"],
        )
    ),
    "gemma3-multimodal": _gemma3,
    "olmo2": lambda: tf.Olmo2ForCausalLM(tf.Olmo2Config(**_MODERN)),
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**_MODERN, original_max_position_embeddings=64)),
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**_MOE, num_local_experts=4, sliding_window=None)),
    "olmoe": lambda: tf.OlmoeForCausalLM(tf.OlmoeConfig(**_MOE, num_experts=4)),
    "qwen3-moe": lambda: tf.Qwen3MoeForCausalLM(
        tf.Qwen3MoeConfig(
            **_MOE | {"num_hidden_layers": 3},
            num_experts=4,
            moe_intermediate_size=32,  # grouped kernels want rows of 16 bytes, also in bfloat16
            head_dim=8,
            mlp_only_layers=[1],
            norm_topk_prob=True,
        )
    ),
    "deepseek-v3": lambda: tf.DeepseekV3ForCausalLM(
        tf.DeepseekV3Config(
            **_MOE | {"num_key_value_heads": 4, "num_hidden_layers": 3},
            n_routed_experts=4,
            n_group=2,
            topk_group=1,
            n_shared_experts=2,
            moe_intermediate_size=32,  # grouped kernels want rows of 16 bytes, also in bfloat16
            first_k_dense_replace=1,
            q_lora_rank=12,
            kv_lora_rank=8,
            qk_rope_head_dim=4,
            qk_nope_head_dim=6,
            v_head_dim=5,
        )
    ),
    "gpt-oss": lambda: tf.GptOssForCausalLM(tf.GptOssConfig(**_MOE, num_local_experts=4, head_dim=8, sliding_window=4)),
    "mamba": lambda: tf.MambaForCausalLM(
        tf.MambaConfig(**_WORDS, hidden_size=24, state_size=4, num_hidden_layers=2, time_step_rank=3)
    ),
    **{
        name: lambda options=options: Subject(SubjectConfig(**_SUBJECT | options)) for name, options in SUBJECTS.items()
    },
    "bert": lambda: tf.BertForMaskedLM(tf.BertConfig(**_BERT)),
    "subject-bidirectional": lambda: Subject(SubjectConfig(**_SUBJECT, causal=False, positions="rotary")),
    "roberta": lambda: tf.RobertaForMaskedLM(tf.RobertaConfig(**_BERT)),
    "modernbert": lambda: tf.ModernBertForMaskedLM(
        tf.ModernBertConfig(
            **_NEOX | {"num_hidden_layers": 3}, cls_token_id=1, sep_token_id=2, local_attention=4, attention_bias=True
        )
    ),
    "t5": lambda: tf.T5ForConditionalGeneration(tf.T5Config(**_T5)),
    "t5-gated": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(**_T5, num_decoder_layers=3, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    ),
    "vit": lambda: tf.ViTForImageClassification(
        tf.ViTConfig(
            **{k: v for k, v in _VISION_TOWER.items() if k != "projection_dim"},
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            num_labels=5,
        )
    ),
    "clip": lambda: tf.CLIPModel(
        tf.CLIPConfig(text_config=_TEXT_TOWER, vision_config=_VISION_TOWER, projection_dim=12)
    ),
    "clip-text": lambda: tf.CLIPTextModelWithProjection(tf.CLIPTextConfig(**_TEXT_TOWER)),
    "clip-vision": lambda: tf.CLIPVisionModelWithProjection(tf.CLIPVisionConfig(**_VISION_TOWER)),
    "whisper": lambda: tf.WhisperForConditionalGeneration(tf.WhisperConfig(**_WHISPER)),
    "whisper-encoder": lambda: tf.WhisperModel(tf.WhisperConfig(**_WHISPER)).get_encoder(),
}

# Families whose forward takes token ids alone, and those among them that generate.
CAUSAL = tuple(list(_BUILD)[: list(_BUILD).index("bert")])


def _draw(module: nn.Module) -> None:
    """Draw every parameter and every buffer that weights something, at a scale that keeps activations near one."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1 and ("norm" in name.lower() or ".ln_" in name):
                parameter.copy_(1 + 0.2 * noise)
            else:
                parameter.copy_(0.3 * noise)
        for name, buffer in module.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))


def _tiny(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        torch.manual_seed(0)
        module = build()
        _draw(module)
        return module.eval()

    return make


TINY: dict[str, Callable[[], nn.Module]] = {name: _tiny(build) for name, build in _BUILD.items()}


def inputs(name: str) -> dict[str, torch.Tensor]:
    """The forward's keyword arguments for a tiny model: two rows, about seven positions, the same each time."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(4, VOCAB, (BATCH, LENGTH), generator=generator)
    image = torch.randn(BATCH, 3, IMAGE, IMAGE, generator=generator)
    sound = torch.randn(BATCH, MELS, FRAMES, generator=generator)
    target = torch.randint(4, VOCAB, (BATCH, 5), generator=generator)
    if name in ("t5", "t5-gated"):
        return {"input_ids": ids, "decoder_input_ids": target}
    if name in ("vit", "clip-vision"):
        return {"pixel_values": image}
    if name == "clip":
        return {"input_ids": ids, "pixel_values": image}
    if name == "whisper":
        return {"input_features": sound, "decoder_input_ids": target}
    if name == "whisper-encoder":
        return {"input_features": sound}
    return {"input_ids": ids}


class Recurrent(nn.Module):
    """A recurrent network that reads out its last state."""

    def __init__(self, cell: type[nn.RNNBase]):
        super().__init__()
        self.rnn = cell(6, 8, batch_first=True)
        self.read = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        states, _ = self.rnn(x)
        return self.read(states[:, -1])


class Autoencoder(nn.Module):
    """An encoder and a decoder, each a small stack."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 2))
        self.decoder = nn.Sequential(nn.Linear(2, 10), nn.ReLU(), nn.Linear(10, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.encoder(x))


_PLAIN: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "cnn": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 5)
        ),
        (BATCH, 3, IMAGE, IMAGE),
    ),
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3)), (BATCH, 6)),
    "rnn": (lambda: Recurrent(nn.RNN), (BATCH, LENGTH, 6)),
    "lstm": (lambda: Recurrent(nn.LSTM), (BATCH, LENGTH, 6)),
    "autoencoder": (Autoencoder, (BATCH, 6)),
}


def plain() -> dict[str, tuple[nn.Module, torch.Tensor]]:
    """Plain modules of no known family, each with one input."""
    made: dict[str, Any] = {}
    for name, (build, shape) in _PLAIN.items():
        torch.manual_seed(0)
        made[name] = (build().eval(), torch.randn(shape, generator=torch.Generator().manual_seed(2)))
    return made
