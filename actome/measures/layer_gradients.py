"""What one example would teach each layer: spectra of the gradients of single responses, before any update.

Letters: N examples, L layer, P part (projection).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.errors import MeasureError, nearest
from .spans import Texts, spans

if TYPE_CHECKING:
    from ..core.model import Model

# Names of attention projections in the families that actome knows; the last module of a parameter's path decides.
_PARTS = {
    "q": ("q", "q_proj", "query", "wq"),
    "k": ("k", "k_proj", "key", "wk"),
    "v": ("v", "v_proj", "value", "wv"),
    "o": ("o", "o_proj", "out_proj", "c_proj", "dense", "out", "wo"),
    "qkv": ("qkv", "qkv_proj", "c_attn", "query_key_value", "Wqkv"),
}
_PART_OF = {name: part for part, names in _PARTS.items() for name in names}
_ORDER = ("q", "k", "v", "qkv", "o")


@dataclass(frozen=True, eq=False)
class GradientSpectrum:
    """Spectra of the gradients that single examples give to the matrices of each layer.

    Attributes:
        nuclear: (N, L, P) sum of the singular values.
        sigma1: (N, L, P) the largest.
        frobenius: (N, L, P) root of the sum of their squares.
        loss: (N) mean cross entropy of each response, in nats a token.
        layers: the layers' numbers.
        parts: the matrices of a layer: ``"q"``, ``"k"``, ``"v"``, ``"o"``; ``"qkv"`` where a family keeps the three in
            one matrix whose layout is not known.
    """

    nuclear: Tensor
    sigma1: Tensor
    frobenius: Tensor
    loss: Tensor
    layers: tuple[int, ...]
    parts: tuple[str, ...]

    @property
    def ratio(self) -> Tensor:
        """(N, L, P): share of the largest singular value in their sum; 1 for a gradient of rank one."""
        return self.sigma1 / self.nuclear

    @property
    def per_loss(self) -> Tensor:
        """(N, L, P): nuclear norm in units of the example's loss: what is learnt already has little of both."""
        return self.nuclear / self.loss[:, None, None]

    def curve(self) -> Tensor:
        """(L, P): mean nuclear norm over the examples, layer by layer."""
        return self.nuclear.mean(0)

    def mad(self, layers: Literal["all", "early", "middle", "late"] = "all") -> Tensor:
        """(P): mean absolute difference of the curve between neighbouring layers, of all or of a third of them.

        NaN for fewer than two layers.
        """
        thirds = {"all": (0, 3), "early": (0, 1), "middle": (1, 2), "late": (2, 3)}
        if layers not in thirds:
            raise MeasureError(f"layers={layers!r}; choose {', '.join(map(repr, thirds))}")
        count = len(self.layers)
        first, last = (round(count * end / 3) for end in thirds[layers])
        return self.curve()[first:last].diff(dim=0).abs().mean(0)

    def relative_difference(self, other: GradientSpectrum) -> Tensor:
        """(P): mean over layers of ``|s - other| / s``, for the curves s of this one and of the other.

        Raises:
            MeasureError: when they are of other layers or parts.
        """
        if (self.layers, self.parts) != (other.layers, other.parts):
            raise MeasureError(
                f"spectra of the layers {self.layers} and parts {self.parts} cannot be compared with those of "
                f"{other.layers} and {other.parts}"
            )
        return ((self.curve() - other.curve()).abs() / self.curve()).mean(0)


def layer_gradients(
    model: Model, prompts: Texts, responses: Texts, parameters: str | Sequence[str] = "attention"
) -> GradientSpectrum:
    r"""Singular values of the gradient that each example gives to the matrices of each layer.

    The loss of an example is the mean cross entropy over the tokens of its response, the prompt being context. Each
    example goes backward on its own (a batch's gradient has another norm), nothing is updated, and the module's own
    gradients and modes are left as they were.

    A fused matrix of queries, keys and values is cut into the three where its layout is known (GPT-2, GPT-NeoX, BLOOM,
    Phi-3 and others with one block after the other); else it is one part, ``"qkv"``. Longer responses have smaller
    gradients by their length alone: compare with a control of the same length, and look at `per_loss`.

    Args:
        model: predicts the next token; frozen parameters are looked at all the same.
        prompts, responses: texts or token ids, as many of one as of the other.
        parameters: ``"attention"`` for the projections of attention; or one or several patterns with ``*`` over the
            names of ``model.module.named_parameters()``, of matrices, each a part named after what follows the
            layer's number.

    Returns:
        `GradientSpectrum`, float64, on the CPU.

    Raises:
        MeasureError: no such matrices, or other parts in some layers.

    Source: Li et al. 2024, What Happened in LLMs Layers when Trained for Fast vs. Slow Thinking: A Gradient
    Perspective (nuclear norm, ratio, mean absolute difference, relative difference).

    >>> import actome as ac
    >>> model = ac.demo()
    >>> spectrum = layer_gradients(model, ["The value of"], [" the sum"])
    >>> spectrum.parts, spectrum.nuclear.shape == (1, model.layers, 4), spectrum.mad().shape
    (('q', 'k', 'v', 'o'), True, torch.Size([4]))
    """
    chosen = _chosen(model.module, [parameters] if isinstance(parameters, str) else list(parameters))
    slots: dict[tuple[int, str], Tensor] = {}
    rows, losses = [], []
    with _differentiable(model.module, [parameter for _, parameter, _ in chosen]):
        for span in spans(prompts, responses, model.tokenizer, 1):
            logits = model.logits(span.batch, grad=True)
            picked = logits[span.before.to(logits.device)].float()
            loss = F.cross_entropy(picked, span.targets.to(logits.device))
            gradients = torch.autograd.grad(loss, [parameter for _, parameter, _ in chosen], allow_unused=True)
            slots = {}
            for (layer, parameter, part), gradient in zip(chosen, gradients, strict=True):
                gradient = torch.zeros_like(parameter) if gradient is None else gradient
                for name, block in _cut(model, part, gradient.detach()).items():
                    if (layer, name) in slots:
                        raise MeasureError(f"layer {layer} has two matrices that go by {name!r}; name them apart")
                    slots[layer, name] = torch.linalg.svdvals(block.float()).double().cpu()
            rows.append(slots)
            losses.append(float(loss.detach()))
    layers = tuple(sorted({layer for layer, _ in slots}))
    found = dict.fromkeys(name for _, name in slots)
    parts = tuple(sorted(found, key=lambda name: _ORDER.index(name) if name in _ORDER else len(_ORDER)))
    gaps = [(layer, part) for layer in layers for part in parts if (layer, part) not in slots]
    if gaps:
        raise MeasureError(f"layer {gaps[0][0]} has no {gaps[0][1]!r} and others do; choose `parameters` of one kind")

    def each(of: Any) -> Tensor:
        return torch.stack([torch.stack([torch.stack([of(row[i, p]) for p in parts]) for i in layers]) for row in rows])

    return GradientSpectrum(
        each(torch.sum), each(torch.amax), each(torch.linalg.vector_norm), torch.tensor(losses).double(), layers, parts
    )


def _chosen(module: nn.Module, patterns: list[str]) -> list[tuple[int, nn.Parameter, str]]:
    """(layer, matrix, part) of the parameters that are asked for."""
    matrices = {name: p for name, p in module.named_parameters() if p.ndim == 2 and re.search(r"\.(\d+)\.", name)}
    if patterns == ["attention"]:
        names = [
            name
            for name in matrices
            if name.endswith(".weight") and name.split(".")[-2] in _PART_OF and _in_attention(name)
        ]
    else:
        names = [name for name in matrices if any(fnmatchcase(name, pattern) for pattern in patterns)]
    if not names:
        raise MeasureError(
            f"no matrix of a layer goes by {', '.join(map(repr, patterns))}{nearest(patterns[0], matrices)}"
        )
    found = []
    for name in names:
        layer, rest = re.search(r"\.(\d+)\.(.*)", name).groups()  # type: ignore[union-attr]
        part = _PART_OF.get(name.split(".")[-2], rest) if patterns == ["attention"] else rest
        found.append((int(layer), matrices[name], part))
    return found


def _in_attention(name: str) -> bool:
    """Whether a name is of an attention module, which dense maps of an MLP are not."""
    return any("attn" in word.lower() or "attention" in word.lower() for word in name.split(".")[:-2])


def _cut(model: Model, part: str, gradient: Tensor) -> dict[str, Tensor]:
    """A fused matrix of queries, keys and values as three, where its layout is known; anything else as it is."""
    if part != "qkv":
        return {part: gradient}
    config = getattr(model.config, "text_config", model.config)
    kind = getattr(config, "model_type", "")
    heads = getattr(config, "num_attention_heads", None)
    if kind == "gpt2":
        gradient = gradient.T  # its linear maps have their inputs in front
    out = gradient.shape[0]
    if kind in ("gpt_neox", "bloom") and heads:
        # Head by head, the three of each.
        three = gradient.unflatten(0, (heads, 3, -1)).unbind(1)
        return {name: one.flatten(0, 1) for name, one in zip("qkv", three, strict=True)}
    if kind in ("falcon", "gpt_bigcode") or not heads:
        return {part: gradient}
    groups = getattr(config, "num_key_value_heads", None) or heads
    if out % (heads + 2 * groups):
        return {part: gradient}
    head = out // (heads + 2 * groups)
    return dict(zip("qkv", gradient.split([heads * head, groups * head, groups * head]), strict=True))


@contextmanager
def _differentiable(module: nn.Module, parameters: list[nn.Parameter]) -> Iterator[None]:
    """Evaluation mode and gradients for these parameters, both put back at the end."""
    modes = {one: one.training for one in module.modules()}
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    module.eval()
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for one, mode in modes.items():
            one.training = mode
