"""What rounding weights and activations costs a model, and what of its weights makes that cost high."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from actome.clamps.quantise import Per, Quantise, round_to
from actome.core.errors import MeasureError

if TYPE_CHECKING:
    from actome.core.model import Model


@dataclass(frozen=True)
class QuantisationProbe:
    """What rounding weights and activations costs: the next-token loss with it, less the loss without.

    Weights of linear maps are rounded in place for the while, activations at what enters those maps. The map to the
    logits (`get_output_embeddings`) stays as it is, as is usual.

    Args:
        weights, activations: bits; None leaves them alone.
        per: what shares a scale: ``"tensor"`` one for a weight, and one for a row of the batch; ``"vector"`` one for
            each output of a weight, and one for each token (the vector-wise scheme of LLM.int8()).

    Raises:
        MeasureError: nothing to round, or another `per`.

    Source: Ahmadian et al. 2023, Intriguing Properties of Quantization at Scale, section 3 (W8A8 and W4 by absmax).

    >>> import actome as ac
    >>> model = ac.demo()
    >>> tokens = torch.tensor([model.tokenizer("The value of the expression is returned by the function").input_ids])
    >>> found = QuantisationProbe(activations=3)(model, tokens)
    >>> sorted(found), found["rise"] > 0
    (['clean', 'relative', 'rise'], True)
    """

    weights: int | None = None
    activations: int | None = None
    per: str = "tensor"

    def __post_init__(self) -> None:
        if self.weights is None and self.activations is None:
            raise MeasureError("a QuantisationProbe rounds weights=, activations= or both; give their bits")
        if self.per not in ("tensor", "vector"):
            raise MeasureError(f'QuantisationProbe takes per="tensor" or "vector", not {self.per!r}')

    @property
    def name(self) -> str:
        """Such as ``w8a8_vector``."""
        parts = (("w", self.weights), ("a", self.activations))
        return "".join(f"{letter}{bits}" for letter, bits in parts if bits) + f"_{self.per}"

    @torch.no_grad()
    def __call__(self, model: Model, tokens: Tensor, batch_size: int = 64) -> dict[str, float]:
        """clean: the loss in nats; rise: how much more it is when rounded; relative: that over the clean loss.

        Args:
            tokens: (batch, pos), all of them real.
            batch_size: rows at a time.
        """
        linear = _linear_maps(model)
        clean = _loss(model, tokens, batch_size)
        per: Per = "tensor" if self.per == "tensor" else "token"
        with ExitStack() as stack:
            if self.weights is not None:
                stack.enter_context(_rounded(list(linear.values()), self.weights, self.per))
            if self.activations is not None:
                clamps = [Quantise(f"module:{name}@in", self.activations, per) for name in linear]
                stack.enter_context(model.clamp(*clamps))
            rise = _loss(model, tokens, batch_size) - clean
        return {"clean": clean, "rise": rise, "relative": rise / clean}


def _linear_maps(model: Model) -> dict[str, nn.Linear]:
    head = getattr(model.module, "get_output_embeddings", lambda: None)()
    found = {name: one for name, one in model.module.named_modules() if isinstance(one, nn.Linear) and one is not head}
    if not found:
        raise MeasureError(f"{model.name} has no nn.Linear within, so there is nothing to round")
    return found


@contextmanager
def _rounded(maps: Sequence[nn.Linear], bits: int, per: str) -> Iterator[None]:
    kept = [one.weight.detach().clone() for one in maps]
    try:
        for one in maps:
            size = one.weight.detach().abs()
            largest = size.amax() if per == "tensor" else size.amax(1, keepdim=True)
            one.weight.copy_(round_to(one.weight.detach(), largest, bits))
        yield
    finally:
        for one, before in zip(maps, kept, strict=True):
            one.weight.copy_(before)


def _loss(model: Model, tokens: Tensor, batch_size: int) -> float:
    total = count = 0.0
    for rows in tokens.split(batch_size):
        logits = model.logits(rows)[:, :-1]
        targets = rows[:, 1:].to(logits.device)
        total += float(nn.functional.cross_entropy(logits.double().flatten(0, 1), targets.flatten(), reduction="sum"))
        count += targets.numel()
    return total / count


def weight_outliers(model: Model) -> dict[str, float]:
    """What of the weights makes rounding them hard.

    Returns:
        ``weight_max_rms``: the largest weight of a linear map over its root mean square, mean over maps;
        ``gain_spread``: standard deviation of the gains of norms over their mean, mean over norms (0 without norms).

    Source: Ahmadian et al. 2023, section 4 (spread of weights, and of the gains of the norm).

    >>> import actome as ac
    >>> sorted(weight_outliers(ac.demo()))
    ['gain_spread', 'weight_max_rms']
    """
    weights = [one.weight.detach().float() for one in _linear_maps(model).values()]
    gains = [
        one.weight.detach().float()
        for one in model.module.modules()
        if "norm" in type(one).__name__.lower() and isinstance(getattr(one, "weight", None), Tensor)
    ]
    spreads = [float(gain.std(correction=0) / gain.mean().abs().clamp_min(1e-12)) for gain in gains]
    return {
        "weight_max_rms": float(np.mean([float(w.abs().max() / w.square().mean().sqrt()) for w in weights])),
        "gain_spread": float(np.mean(spreads)) if spreads else 0.0,
    }
