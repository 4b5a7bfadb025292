"""The same work by other means: hooks written by hand, TransformerLens, nnsight, each as its documentation has it.

Each is given a module that it may change. What it brings out or generates is compared with actome's before it is timed.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .subjects import forward, generate


class ByHand:
    """PyTorch hooks, put in for one call and taken out again: what recorded is copied, as actome does."""

    name = "hooks by hand"

    def __init__(self, module: nn.Module):
        self.module = module

    def record(self, ids: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """The residual stream after each of some layers."""
        return self._outputs(ids, [self.module.transformer.h[i] for i in layers], lambda out: out)

    def patterns(self, ids: Tensor) -> list[Tensor]:
        """The attention pattern of every layer."""
        return self._outputs(ids, [block.attn for block in self.module.transformer.h], lambda out: out[1])

    def _outputs(self, ids: Tensor, modules: list[nn.Module], part: Callable[[Any], Tensor]) -> list[Tensor]:
        found: list[Tensor] = []
        handles = [m.register_forward_hook(lambda _m, _i, out: found.append(part(out).clone())) for m in modules]
        forward(self.module, ids)
        for handle in handles:
            handle.remove()
        return found

    def add(self, ids: Tensor, layer: int, vector: Tensor) -> Tensor:
        """The logits with a vector added after a layer."""
        handle = self.module.transformer.h[layer].register_forward_hook(lambda _m, _i, out: out + vector)
        logits = forward(self.module, ids)
        handle.remove()
        return logits

    def generate(self, ids: Tensor, layer: int, vector: Tensor, new: int) -> Tensor:
        """What is generated with a vector added after a layer."""
        handle = self.module.transformer.h[layer].register_forward_hook(lambda _m, _i, out: out + vector)
        out = generate(self.module, ids, new)
        handle.remove()
        return out


class TransformerLens:
    """A TransformerBridge; it computes attention eagerly, and its cache holds the model's own tensors, not copies."""

    name = "TransformerLens"

    def __init__(self, module: nn.Module):
        from transformer_lens.model_bridge import TransformerBridge

        logging.getLogger().setLevel(logging.ERROR)
        self.bridge = TransformerBridge.boot_transformers(
            "gpt2", hf_model=module, device="cpu", tokenizer=_tokenizer(module)
        )
        self.layers = len(module.transformer.h)

    def _cached(self, ids: Tensor, names: list[str]) -> list[Tensor]:
        with torch.no_grad():
            _, cache = self.bridge.run_with_cache(ids, names_filter=names)
        return [cache[name] for name in names]

    def record(self, ids: Tensor, layers: Sequence[int]) -> list[Tensor]:
        return self._cached(ids, [f"blocks.{i}.hook_resid_post" for i in layers])

    def patterns(self, ids: Tensor) -> list[Tensor]:
        return self._cached(ids, [f"blocks.{i}.attn.hook_pattern" for i in range(self.layers)])

    def add(self, ids: Tensor, layer: int, vector: Tensor) -> Tensor:
        hooks = [(f"blocks.{layer}.hook_resid_post", lambda x, hook: x + vector)]
        with torch.no_grad(), self.bridge.hooks(fwd_hooks=hooks):
            return self.bridge(ids)

    def generate(self, ids: Tensor, layer: int, vector: Tensor, new: int) -> Tensor:
        hooks = [(f"blocks.{layer}.hook_resid_post", lambda x, hook: x + vector)]
        options = {"stop_at_eos": False, "do_sample": False, "use_past_kv_cache": True, "verbose": False}
        with torch.no_grad(), self.bridge.hooks(fwd_hooks=hooks):
            return self.bridge.generate(ids, max_new_tokens=new, return_type="tokens", **options)


class Nnsight:
    """A TransformersModel; what a trace saves is the model's own tensors, not copies."""

    name = "nnsight"

    def __init__(self, module: nn.Module):
        import nnsight

        self.save = nnsight.save
        self.model = nnsight.TransformersModel(module, task="text-generation", tokenizer=_tokenizer(module))
        self.blocks = list(self.model.transformer.h)

    def record(self, ids: Tensor, layers: Sequence[int]) -> list[Tensor]:
        with torch.no_grad(), self.model.trace(ids, use_cache=False):
            found = self.save([])
            for i in layers:
                found.append(self.blocks[i].output)
        return found

    def patterns(self, ids: Tensor) -> list[Tensor]:
        with torch.no_grad(), self.model.trace(ids, use_cache=False):
            found = self.save([])
            for block in self.blocks:
                found.append(block.attn.output[1])
        return found

    def add(self, ids: Tensor, layer: int, vector: Tensor) -> Tensor:
        with torch.no_grad(), self.model.trace(ids, use_cache=False):
            self.blocks[layer].output = self.blocks[layer].output + vector
            logits = self.save(self.model.output.logits)
        return logits

    def generate(self, ids: Tensor, layer: int, vector: Tensor, new: int) -> Tensor:
        options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
        options["attention_mask"] = torch.ones_like(ids)
        with torch.no_grad(), self.model.generate(ids, **options) as tracer:
            for _ in tracer.iter[:new]:
                self.blocks[layer].output = self.blocks[layer].output + vector
            out = self.save(tracer.result)
        return out


Peer = ByHand | TransformerLens | Nnsight
LIBRARIES = {TransformerLens: "transformer-lens", Nnsight: "nnsight"}


def build(module: nn.Module, make: Callable[[nn.Module], nn.Module], libraries: bool) -> dict[str, Peer | str]:
    """Every peer around a module of its own, or why there is none.

    Args:
        module: whose weights they share.
        make: makes the module that a peer may change.
        libraries: whether other libraries may be imported.
    """
    built: dict[str, Peer | str] = {ByHand.name: ByHand(make(module))}
    for kind in LIBRARIES if libraries else ():
        if _version(kind) is None:
            built[_label(kind)] = "not installed"
            continue
        try:
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")
                built[_label(kind)] = kind(make(module))
        except Exception as error:  # whatever ails another library is told in the table and stops nothing here
            built[_label(kind)] = f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
    return built


def agreeing(
    peers: dict[str, Peer | str], work: Callable[[Peer], Sequence[Tensor] | Tensor], ours: Sequence[Tensor] | Tensor
) -> dict[str, Callable[[], object] | str]:
    """Those of the peers that give what actome gives, as work to be timed; of the others, how they differ.

    Tokens must be equal; activations within 1e-5 of the largest, since eager and fused attention round differently.
    """
    checked: dict[str, Callable[[], object] | str] = {}
    for name, peer in peers.items():
        if isinstance(peer, str):
            checked[name] = peer
            continue
        try:
            difference = _difference(work(peer), ours)
        except Exception as error:
            checked[name] = f"{type(error).__name__}: {str(error)[:120]}"
            continue
        checked[name] = difference or (lambda peer=peer: work(peer))
    return checked


def _difference(theirs: Sequence[Tensor] | Tensor, ours: Sequence[Tensor] | Tensor) -> str:
    pairs = [(theirs, ours)] if isinstance(ours, Tensor) else list(zip(theirs, ours, strict=True))
    worst = 0.0
    for a, b in pairs:
        if a.shape != b.shape:
            return f"gives the shape {tuple(a.shape)} for {tuple(b.shape)}"
        if not b.is_floating_point():
            if not torch.equal(a, b):
                return "generates other tokens"
            continue
        worst = max(worst, float((a - b).abs().max() / b.abs().max()))
    return f"differs by {worst:.1g} of the largest" if worst > 1e-5 else ""


def _tokenizer(module: nn.Module) -> Any:
    """Numbers as words: both libraries want a tokenizer, and none is used."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {str(i): i for i in range(module.config.vocab_size)}
    end = str(module.config.eos_token_id)
    inner = Tokenizer(models.WordLevel(words, unk_token=end))
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=end, pad_token=end)


def _version(kind: type) -> str | None:
    try:
        return importlib.metadata.version(LIBRARIES[kind])
    except (KeyError, importlib.metadata.PackageNotFoundError):
        return None


def _label(kind: type) -> str:
    return " ".join(filter(None, (kind.name, _version(kind))))
