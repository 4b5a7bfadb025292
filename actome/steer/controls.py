"""Controls: what a fitted direction is compared with, random directions and directions of shuffled labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from actome.clamps import Add, Project
from actome.core.clamp import Clamp
from actome.core.errors import MeasureError

from .contrast import Examples
from .states import count, is_pairs, subset

if TYPE_CHECKING:
    from actome.core.model import Model


class Estimator(Protocol):
    """Fits a clamp, or several that act together, to two sets of examples."""

    def fit(self, model: Model, data: Examples) -> Clamp | Sequence[Clamp]: ...


class Arm(NamedTuple):
    """Clamps that are tried together: the ``fitted`` ones at a site, or a draw of a control there."""

    site: str
    name: str
    draw: int
    clamps: list[Clamp]


def dealt(
    model: Model,
    clamps: Sequence[Clamp],
    sites: Sequence[str] | None,
    estimator: Estimator | None,
    data: Examples | None,
    random: int,
    shuffled: int,
    seed: int,
) -> list[Arm]:
    """The fitted clamps at each site, and their controls there."""
    if (estimator is None) != (data is None):
        raise MeasureError("the control with shuffled labels needs both estimator= and data=")
    fitted = _at_sites(clamps, sites)
    generator = torch.Generator().manual_seed(seed)
    arms: list[Arm] = []
    for site, some in fitted:
        arms.append(Arm(site, "fitted", 0, some))
        if all(map(_has_random, some)):
            arms += [Arm(site, "random", i, [random_of(one, generator) for one in some]) for i in range(random)]
    if estimator is not None and data is not None:
        for draw in range(shuffled):
            # At its own length: what labels without meaning would have given.
            other = estimator.fit(model, _mixed(data, generator))
            for site, some in fitted:
                arms.append(Arm(site, "shuffled", draw, _like(some, other)))
    return arms


def _at_sites(clamps: Sequence[Clamp], sites: Sequence[str] | None) -> list[tuple[str, list[Clamp]]]:
    if sites is None:
        return [(" + ".join(dict.fromkeys(one.site for one in clamps)), list(clamps))]
    if len(clamps) != 1 or not hasattr(clamps[0], "to"):
        kinds = ", ".join(dict.fromkeys(type(one).__name__ for one in clamps))
        raise MeasureError(
            f"a sweep over sites needs one clamp that was fitted at them, as Contrast gives, not {kinds}"
        )
    return [(site, [clamps[0].to(site)]) for site in sites]


def _has_random(clamp: Clamp) -> bool:
    return hasattr(clamp, "random") or (isinstance(clamp, Add) and isinstance(clamp.value, Tensor))


def random_of(clamp: Clamp, generator: torch.Generator) -> Clamp:
    """The clamp with a random direction of the same norm: its own `random(seed)`, another vector to add or take out."""
    if hasattr(clamp, "random"):
        return clamp.random(int(torch.randint(2**31, (1,), generator=generator)))
    if isinstance(clamp, Project):
        return clamp.at(basis=torch.randn(torch.as_tensor(clamp.basis).shape, generator=generator))
    value = torch.as_tensor(clamp.value)  # type: ignore[attr-defined]
    noise = torch.randn(value.shape, generator=generator)
    return clamp.at(value=noise / noise.norm() * value.float().norm().cpu())


def _like(fitted: Sequence[Clamp], other: Clamp | Sequence[Clamp]) -> list[Clamp]:
    """What was fitted to shuffled labels, at the sites and with the gates and scales of what was fitted."""
    if isinstance(other, Clamp):
        if len(fitted) == 1 and hasattr(other, "to") and hasattr(fitted[0], "value"):
            return [fitted[0].at(value=other.to(fitted[0].site).value)]
        return [other]
    return list(other)


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
