"""The models and inputs that are measured: random weights of the shapes that the limits speak of."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn

BATCH, LENGTH, PROMPT, NEW = 4, 256, 16, 64


@functools.cache
def gpt2() -> nn.Module:
    """GPT-2 small, 124 M parameters."""
    return _gpt2()


@functools.cache
def narrow() -> nn.Module:
    """Twelve layers of width 64: next to no arithmetic, nearly all of it Python."""
    return _gpt2(n_embd=64, n_head=4, vocab_size=1000, bos_token_id=0, eos_token_id=0)


def _gpt2(**config: Any) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    module = GPT2LMHeadModel(GPT2Config(**config)).eval()
    # Said here and not left to be guessed with a warning at every call.
    module.generation_config.pad_token_id = module.config.eos_token_id
    return module


def twin(module: nn.Module, attention: str | None = None) -> nn.Module:
    """A second module of the very same parameters, for whatever changes the module that it is given.

    Args:
        attention: an attention implementation other than the module's own.
    """
    other = copy.deepcopy(module, {id(parameter): parameter for parameter in module.parameters()})
    if attention is not None:
        other.set_attn_implementation(attention)
    return other


def tokens(module: nn.Module, rows: int, length: int, seed: int = 0) -> Tensor:
    """Random ids (rows, length)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, module.config.vocab_size - 1, (rows, length), generator=generator)


def vector(module: nn.Module) -> Tensor:
    """What is added to the residual stream (d_model): long enough to change what is generated."""
    return 5 * torch.randn(module.config.n_embd, generator=torch.Generator().manual_seed(1))


def forward(module: nn.Module, ids: Tensor) -> Tensor:
    """The bare forward that all ratios are to; like actome's, without a cache for tokens to come."""
    with torch.no_grad():
        return module(input_ids=ids, use_cache=False).logits


def generate(module: nn.Module, ids: Tensor, new: int) -> Tensor:
    """The bare generation of exactly so many tokens."""
    length = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
    with torch.no_grad():
        return module.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **length)
