"""The subject itself: a transformers model of a family of its own.

Dims: B batch, T position, S position with those in the cache, D model width, V vocabulary.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..draw import weights_from
from .attention import Attention
from .config import SubjectConfig
from .mlp import MLP, Experts, Router, SparseMLP
from .positions import rotary, sinusoidal, visible


def _norm(config: SubjectConfig) -> nn.Module:
    kinds = {"rms": nn.RMSNorm, "layer": nn.LayerNorm}
    return kinds[config.norm](config.d_model, eps=1e-6) if config.norm in kinds else nn.Identity()


class Block(nn.Module):
    """Attention and, unless the subject is attention-only, an MLP; each reads a norm of the stream and adds to it."""

    def __init__(self, config: SubjectConfig, layer: int):
        super().__init__()
        self.norm_attn, self.attn = _norm(config), Attention(config, layer)
        if config.mlp != "none":
            self.norm_mlp = _norm(config)
            self.mlp = SparseMLP(config) if config.experts else MLP(config)
        self.attention_only = config.mlp == "none"

    def forward(self, x_BTD: Tensor, *args: Any) -> tuple[Tensor, Tensor | None]:
        added, pattern = self.attn(self.norm_attn(x_BTD), *args)
        x_BTD = x_BTD + added
        if not self.attention_only:
            x_BTD = x_BTD + self.mlp(self.norm_mlp(x_BTD))
        return x_BTD, pattern


class Subject(PreTrainedModel, GenerationMixin):
    """A small decoder (or encoder, with ``causal=False``) to train from scratch, with every site of actome.

    Called like any causal model of transformers: token ids (batch, pos), optionally a mask of padding, positions and a
    cache; returns an object with ``logits`` (batch, pos, vocab). With `d_in` it takes ``inputs_embeds``
    (batch, pos, d_in) instead of ids. `save_pretrained`, `from_pretrained` and `actome.load` work.

    >>> from actome.tasks import Subject, SubjectConfig
    >>> subject = Subject.fresh(SubjectConfig(vocab=16, d_model=8, heads=2, context=12))
    >>> subject(torch.zeros(2, 12, dtype=torch.long)).logits.shape
    torch.Size([2, 12, 16])
    """

    config_class = SubjectConfig
    config: SubjectConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    _supports_sdpa = True
    _no_split_modules = ("Block",)

    def __init__(self, config: SubjectConfig):
        super().__init__(config)
        if config.d_in is None:
            self.embed: nn.Module = nn.Embedding(config.vocab, config.d_model)
        else:
            self.embed = nn.Linear(config.d_in, config.d_model, bias=False)
            self.main_input_name = "inputs_embeds"
        if config.positions == "learned":
            self.positions = nn.Embedding(config.context, config.d_model)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = _norm(config)
        self.unembed = nn.Linear(config.d_model, config.vocab, bias=False)
        self._tied_weights_keys = {"unembed.weight": "embed.weight"} if config.tied else None
        self.post_init()

    @classmethod
    def fresh(cls, config: SubjectConfig, seed: int = 0) -> Subject:
        """A subject before training, in evaluation mode: the same for the same seed, whatever was drawn before.

        Args:
            config: copied, so that subjects never share one.
            seed: of the initial weights. The random state of the caller stays as it is.
        """
        with weights_from(seed):
            return cls(copy.deepcopy(config)).eval()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        scale, deep = self.config.init, (2 * self.config.layers) ** -0.5
        if isinstance(module, nn.Linear):
            writes = getattr(module, "writes", False)
            init.normal_(module.weight, std=scale * module.in_features**-0.5 * (deep if writes else 1))
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=scale * self.config.d_model**-0.5)
        elif isinstance(module, nn.RMSNorm | nn.LayerNorm):
            init.ones_(module.weight)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)
        elif isinstance(module, Router):
            init.normal_(module.weight, std=scale * self.config.d_model**-0.5)
        elif isinstance(module, Experts):
            init.normal_(module.gate_up_proj, std=scale * self.config.d_model**-0.5)
            init.normal_(module.down_proj, std=scale * self.config.d_mlp**-0.5 * deep)
        elif isinstance(module, Attention) and module.key_bias is not None:
            # As long as a key: that of one channel is drawn from normed inputs.
            init.normal_(module.key_bias, std=scale)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.unembed

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
    ) -> Any:
        """Logits for tokens or continuous inputs.

        Args:
            input_ids: (batch, pos).
            attention_mask: (batch, cached + pos), 1 for tokens that are no padding. Padding takes no position and is
                not looked at.
            position_ids: (batch, pos); by default counted from the first token that is no padding.
            past_key_values: transformers' cache. `use_cache` makes one and gives it back.
            inputs_embeds: (batch, pos, d_in) for a subject with continuous inputs, else (batch, pos, d_model) in the
                place of the embedded tokens.
            logits_to_keep: only the logits of this many last positions; 0 for all.

        Raises:
            ValueError: positions beyond what learned ones allow, or no input of the kind that the subject takes.
        """
        x_BTD = self._embedded(input_ids, inputs_embeds)
        T = x_BTD.shape[1]
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        start = past_key_values.get_seq_length() if past_key_values is not None else 0
        if attention_mask is not None and attention_mask.ndim == 2:
            attention_mask = attention_mask[:, : start + T].bool()
            if bool(attention_mask.all()):
                attention_mask = None
        if position_ids is None and attention_mask is not None:
            position_ids = (attention_mask.long().cumsum(dim=1) - 1).clamp_min(0)[:, start:]
        x_BTD, turn = self._placed(x_BTD, position_ids, start)
        mask = self._mask(attention_mask, T, start, x_BTD)
        states: list[Tensor] = []
        patterns: list[Tensor | None] = []
        for block in self.blocks:
            if output_hidden_states:
                states.append(x_BTD)
            x_BTD, pattern = block(x_BTD, mask, turn, past_key_values)
            patterns.append(pattern)
        x_BTD = self.norm(x_BTD)
        logits = self.unembed(x_BTD[:, -logits_to_keep:] if logits_to_keep else x_BTD)
        out = CausalLMOutputWithPast(
            logits=logits,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*states, x_BTD) if output_hidden_states else None,
            attentions=tuple(patterns) if output_attentions else None,
        )
        return out.to_tuple() if return_dict is False else out

    def _embedded(self, ids: Tensor | None, values: Tensor | None) -> Tensor:
        if (ids is None) == (values is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if self.config.d_in is None:
            return self.embed(ids) if ids is not None else values
        if values is None or values.shape[-1] != self.config.d_in:
            got = "token ids" if values is None else f"a width of {values.shape[-1]}"
            raise ValueError(f"this subject takes inputs_embeds of width d_in={self.config.d_in}, not {got}")
        return self.embed(values)

    def _placed(
        self, x_BTD: Tensor, position_ids: Tensor | None, start: int
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """The stream with positions added, where they are added, and the rotary angles, where there are some."""
        config, T = self.config, x_BTD.shape[1]
        end = start + T
        if config.positions == "learned":
            if end > config.context:
                raise ValueError(
                    f"{end} positions, but learned ones end at context={config.context}; give shorter sequences, or "
                    "make the subject with a longer context or with rotary or alibi positions"
                )
            places = torch.arange(start, end, device=x_BTD.device) if position_ids is None else position_ids
            return x_BTD + self.positions(places), None
        if config.positions == "sinusoidal":
            table_TD = sinusoidal(max(end, config.context), config.d_model, x_BTD.dtype, x_BTD.device)
            return x_BTD + (table_TD[start:end] if position_ids is None else table_TD[position_ids]), None
        if config.positions == "rotary":
            tables = rotary(max(end, config.context), config.d_head, x_BTD.dtype, x_BTD.device)
            if position_ids is None:
                cos, sin = (table[start:end] for table in tables)
            else:
                cos, sin = (table[position_ids][:, None] for table in tables)  # (batch, 1, pos, d_head / 2)
            return x_BTD, (cos, sin)
        return x_BTD, None

    def _mask(self, real_BS: Tensor | None, T: int, start: int, x: Tensor) -> Tensor | None:
        """What is added to scores; ``None`` where the attention functions know it themselves."""
        alibi = self.config.heads if self.config.positions == "alibi" else 0
        if real_BS is not None and real_BS.ndim == 4:  # somebody's own mask, whole: bools, or what is added to scores
            return torch.where(real_BS, 0.0, torch.finfo(x.dtype).min).to(x) if real_BS.dtype == torch.bool else real_BS
        if real_BS is None and not alibi and (T == 1 or not start or not self.config.causal):
            return None
        mask = visible(T, start + T, self.config.causal, alibi, x.dtype, x.device)
        if real_BS is None:
            return mask
        return torch.where(real_BS[:, None, None], mask, torch.finfo(x.dtype).min)


AutoConfig.register("actome_subject", SubjectConfig)
AutoModelForCausalLM.register(SubjectConfig, Subject)
