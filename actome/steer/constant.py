"""What a constant clamp comes down to: one vector at one place of the residual stream, always."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from actome.clamps import Add
from actome.core.clamp import Clamp
from actome.core.errors import ClampError

if TYPE_CHECKING:
    from actome.core.model import Model

# What a clamp may depend on.
GATES = ("positions", "rows", "phase", "steps", "when", "heads")


def constant_vectors(model: Model, clamps: Clamp | Sequence[Clamp]) -> dict[str, Tensor]:
    """By site, the vector that a set of constant additions adds to every token, (d_model), float32, strength included.

    Raises:
        ClampError: a clamp that is not an addition, or depends on anything: positions, rows, phase, steps, conditions.
        SiteError: a site that the model does not have.
    """
    found: dict[str, Tensor] = {}
    for clamp in [clamps] if isinstance(clamps, Clamp) else clamps:
        if not isinstance(clamp, Add):
            raise ClampError(
                f"{type(clamp).__name__} depends on what flows through; only additions are constant and can be "
                "exported. It can be served: actome serve MODEL --clamp FOLDER"
            )
        gates = [name for name in GATES if getattr(clamp, name) is not None]
        if gates:
            raise ClampError(
                f"this {type(clamp).__name__} applies only at some {', '.join(gates)}, which a file of vectors cannot "
                "say; take the gates off with clamp.at(...=None), or serve it"
            )
        for site in model.match(clamp.site):
            width = site.size("d_model")
            if width is None or site.dims[-1] != "d_model":
                raise ClampError(f"{site.name} is not as wide as the residual stream, and cannot be exported")
            vector = torch.zeros(width)
            value = torch.as_tensor(clamp.value, dtype=torch.float32).detach().cpu() * clamp.scale
            if clamp.units is None:
                vector = vector + value
            else:
                vector[_indices(clamp.units, width)] += value
            if vector.shape != (width,):
                raise ClampError(f"{site.name}: a value of shape {tuple(value.shape)} does not fit d_model {width}")
            found[site.name] = found.get(site.name, torch.zeros(width)) + vector
    return found


def _indices(units: object, width: int) -> Tensor:
    from actome.core.select import chosen

    return torch.tensor(chosen(units, width, "unit"), dtype=torch.long)
