"""Controls: what a fitted direction is compared with, random directions and directions of shuffled labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actome.clamps import Add
from actome.core.errors import MeasureError

from .contrast import Contrast, Examples
from .states import count, is_pairs, subset

if TYPE_CHECKING:
    from actome.core.model import Model


def dealt(
    model: Model,
    clamp: Add,
    sites: Sequence[str] | None,
    estimator: Contrast | None,
    data: Examples | None,
    random: int,
    shuffled: int,
    seed: int,
) -> list[tuple[str, int, Add]]:
    """(arm, draw, clamp) for the fitted clamp at each site and its controls there."""
    if sites is None:
        fitted = [clamp]
    elif hasattr(clamp, "to"):
        fitted = [clamp.to(site) for site in sites]
    else:
        raise MeasureError(
            f"a sweep over sites needs a clamp that was fitted at them, as Contrast gives, not {type(clamp).__name__}"
        )
    if (estimator is None) != (data is None):
        raise MeasureError("the control with shuffled labels needs both estimator= and data=")
    generator = torch.Generator().manual_seed(seed)
    arms: list[tuple[str, int, Add]] = []
    for one in fitted:
        arms.append(("fitted", 0, one))
        value = torch.as_tensor(one.value)
        for draw in range(random):
            noise = torch.randn(value.shape, generator=generator)
            arms.append(("random", draw, one.at(value=noise / noise.norm() * value.norm())))  # type: ignore[arg-type]
    if estimator is not None and data is not None:
        for draw in range(shuffled):
            mixed = _mixed(data, generator)
            other = estimator.fit(model, mixed)
            # At its own length: what labels without meaning would have given.
            arms += [("shuffled", draw, one.at(value=other.to(one.site).value)) for one in fitted]  # type: ignore[misc]
    return arms


def _mixed(data: Examples, generator: torch.Generator) -> Examples:
    """The examples dealt out anew between the two sets."""

    def joined(a: Any, b: Any) -> Any:
        if is_pairs(a):
            return tuple(joined(x, y) for x, y in zip(a, b, strict=True))
        return torch.cat([a, b]) if isinstance(a, Tensor) else [*a, *b]

    everything = joined(data.positive, data.negative)
    order = torch.randperm(count(everything), generator=generator).tolist()
    middle = count(data.positive)
    return Examples(subset(everything, order[:middle]), subset(everything, order[middle:]))
