"""What a subject is made of: a configuration that transformers can save, load and recognise."""

from __future__ import annotations

import difflib
from typing import Any, ClassVar

from transformers import PreTrainedConfig

CHOICES: dict[str, tuple[str, ...]] = {
    "attention": ("softmax", "sigmoid", "relu", "linear"),
    "attention_scale": ("none", "keys", "sum"),
    "mlp": ("plain", "gated", "none"),
    "act": ("relu", "silu", "gelu"),
    "positions": ("learned", "sinusoidal", "rotary", "alibi", "none"),
    "norm": ("rms", "layer", "none"),
}


class SubjectConfig(PreTrainedConfig):
    """The shape of a `Subject`. Every choice is checked when the configuration is made.

    Args:
        vocab: tokens, or outputs when `d_in` is given.
        d_model, layers, heads: the usual numbers.
        d_head: width of a head; ``None`` is ``d_model / heads``.
        context: longest sequence that learned positions allow (others go on beyond it).
        d_mlp: width of the MLP (of each expert when there are some); ``None`` is ``4 * d_model``.
        d_in: width of continuous inputs (batch, pos, d_in) that a linear map embeds in the place of tokens;
            ``None`` for tokens.
        attention: how scores become weights. ``"softmax"``; ``"sigmoid"`` and ``"relu"`` of each score on its own;
            ``"linear"``, the score itself.
        attention_scale: for the last three: ``"none"``; ``"keys"`` divides a row by the number of keys that it
            may see; ``"sum"`` divides it by the sum of its absolute weights.
        qk_norm: an RMS norm on the queries and keys of each head.
        key_bias: one more key for each head, learned, with a value of zero: a place to attend to that adds nothing.
            Softmax only; what the rows of the pattern lack to one is the weight that it takes.
        causal: whether a position sees only itself and earlier ones.
        positions: ``"learned"``, ``"sinusoidal"``, ``"rotary"``, ``"alibi"`` or ``"none"``.
        mlp: ``"plain"``, ``"gated"``, or ``"none"`` for attention-only blocks.
        act: ``"relu"``, ``"silu"`` or ``"gelu"``.
        experts: how many MLPs a router chooses from; 0 for a dense one.
        active_experts: how many of them each token goes through, with weights that sum to one.
        norm: ``"rms"``, ``"layer"`` or ``"none"``, before attention, before the MLP and before the logits.
        bias: whether linear maps in the blocks have biases.
        tied: whether the unembedding is the embedding.
        init: standard deviation of the initial weights, in units of 1 / sqrt(inputs of the map). Maps that write to
            the residual stream start smaller by sqrt(2 * layers).

    Raises:
        ValueError: a choice that does not exist, or numbers that do not go together.

    >>> SubjectConfig(vocab=32, d_model=48, heads=4).d_head
    12
    >>> SubjectConfig(vocab=32, attention="tanh")
    Traceback (most recent call last):
    ...
    ValueError: attention='tanh' does not exist; choose 'softmax', 'sigmoid', 'relu' or 'linear'
    """

    model_type = "actome_subject"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    # The names under which transformers and other libraries ask for the same numbers.
    attribute_map: ClassVar[dict[str, str]] = {
        "vocab_size": "vocab",
        "hidden_size": "d_model",
        "intermediate_size": "d_mlp",
        "num_hidden_layers": "layers",
        "num_attention_heads": "heads",
        "num_key_value_heads": "heads",
        "head_dim": "d_head",
        "max_position_embeddings": "context",
        "tie_word_embeddings": "tied",
    }

    vocab: int = 64
    d_model: int = 64
    layers: int = 2
    heads: int = 4
    d_head: int | None = None
    context: int = 64
    d_mlp: int | None = None
    d_in: int | None = None
    attention: str = "softmax"
    attention_scale: str = "none"
    qk_norm: bool = False
    key_bias: bool = False
    causal: bool = True
    positions: str = "learned"
    mlp: str = "plain"
    act: str = "gelu"
    experts: int = 0
    active_experts: int = 2
    norm: str = "rms"
    bias: bool = False
    tied: bool = False
    init: float = 0.5

    def __post_init__(self, **kwargs: Any) -> None:
        # What transformers does not know either is kept by its configurations without a word.
        for name in kwargs:
            close = difflib.get_close_matches(name, SubjectConfig.__annotations__, 1, 0.8)
            if close:
                raise ValueError(f"{name}={kwargs[name]!r} is no option of a subject; nearest: {close[0]}")
        for name in ("vocab", "d_model", "layers", "heads", "context", "d_head", "d_mlp", "d_in"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}={value}: give a whole number of at least 1")
        if self.d_head is None:
            if self.d_model % self.heads:
                raise ValueError(
                    f"d_model={self.d_model} is no multiple of heads={self.heads}; change one of them or give d_head"
                )
            self.d_head = self.d_model // self.heads
        if self.d_mlp is None:
            self.d_mlp = 4 * self.d_model
        self._check()
        super().__post_init__(**kwargs)

    def _check(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                listed = ", ".join(map(repr, choices[:-1])) + f" or {choices[-1]!r}"
                raise ValueError(f"{name}={getattr(self, name)!r} does not exist; choose {listed}")
        if self.attention == "softmax" and self.attention_scale != "none":
            raise ValueError(
                f"attention_scale={self.attention_scale!r}: softmax rows sum to one already; leave it at 'none'"
            )
        if self.key_bias and self.attention != "softmax":
            raise ValueError(
                f"key_bias takes weight from the other keys, which {self.attention} attention does not share out; "
                "use attention='softmax' or leave key_bias off"
            )
        if self.positions == "rotary" and self.d_head % 2:  # type: ignore[operator]
            raise ValueError(f"rotary positions turn pairs of channels; d_head={self.d_head} is odd, give an even one")
        if self.positions == "alibi" and not self.causal:
            raise ValueError("alibi looks back; with causal=False choose other positions")
        if self.experts < 0:
            raise ValueError(f"experts={self.experts}: give a number of experts, or 0 for one MLP a block")
        if not 0 <= self.init < float("inf"):
            raise ValueError(f"init={self.init}: give the size of the initial weights, 0 or more")
        if self.experts and not 0 < self.active_experts <= self.experts:
            raise ValueError(
                f"active_experts={self.active_experts}: give a number from 1 to {self.experts}, the number of experts"
            )
        if self.experts and self.mlp == "none":
            raise ValueError(f"experts={self.experts} are parts of an MLP; choose mlp='plain' or 'gated', or experts=0")
        if self.tied and self.d_in is not None:
            raise ValueError("continuous inputs (d_in) have no embedding to tie to; leave tied off")

    @property
    def shape(self) -> dict[str, Any]:
        """The fields of this class alone, as plain data: what tells one subject from another."""
        return {name: getattr(self, name) for name in SubjectConfig.__annotations__ if name not in _NOT_SHAPE}


_NOT_SHAPE = ("model_type", "keys_to_ignore_at_inference", "attribute_map")
