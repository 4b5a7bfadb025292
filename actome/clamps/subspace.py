"""Projection onto or out of a subspace, and the coordinate along a direction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..core.clamp import Clamp
from ..core.clamping import Place
from ..core.errors import ClampError


@dataclass(frozen=True, eq=False)
class Project(Clamp):
    """Keeps only the part of each vector inside a subspace (``"onto"``), or removes it (``"out"``).

    Args:
        basis: (d,) or (directions, d), spanning the subspace; need not be orthonormal.
        which: ``"out"`` (the default: erase a direction) or ``"onto"``.

    Raises:
        ClampError: the basis has another width than the site, is zero, or its directions are linearly dependent.

    Source: projecting a direction out, Ravfogel et al. (2020), arXiv:2004.07667, eq. 2.
    """

    basis: Any = None
    which: Literal["onto", "out"] = "out"

    def __post_init__(self) -> None:
        if self.which not in ("onto", "out"):
            raise ClampError(f'Project takes "onto" or "out", not {self.which!r}')
        basis = torch.as_tensor(self.basis)
        basis = basis[None] if basis.ndim == 1 else basis
        if basis.ndim != 2:
            raise ClampError(f"Project: the basis has shape {tuple(basis.shape)}; give (d,) or (directions, d)")
        if not bool(torch.isfinite(basis).all()) or int(torch.linalg.matrix_rank(basis.detach().double())) < len(basis):
            raise ClampError("Project: the basis must be finite and its directions linearly independent")
        # Orthonormal rows, so that projecting is two small products.
        object.__setattr__(self, "basis", torch.linalg.qr(basis.double().T).Q.T.to(torch.float32))

    def transform(self, x: Tensor, place: Place) -> Tensor:
        if self.basis.shape[-1] != x.shape[-1]:
            raise ClampError(
                f"{place.site.name}: the basis has width {self.basis.shape[-1]}, "
                f"the site {x.shape[-1]} ({place.dims[-1]})"
            )
        basis = self.basis.to(x.device)
        inside = ((x.float() @ basis.T) @ basis).to(x.dtype)
        return inside if self.which == "onto" else x - inside


@dataclass(frozen=True, eq=False)
class SetCoordinate(Clamp):
    r"""Sets each vector's coordinate along one direction, :math:`h' = h + s (c - u \cdot h) u`, and leaves the rest.

    Args:
        direction: (d,), any length but zero; u is that of length one.
        value: c, in units of u: a number, or (rows, positions) with 1 for what is the same in all of them.
        scale: s, the share of the way; 1 sets it.

    Raises:
        ClampError: the direction has another width than the site, or is zero.

    Example:
        >>> import actome as ac, torch
        >>> model, site = ac.demo(), "blocks.1.resid.post"
        >>> direction = torch.ones(model.d_model)
        >>> with model.clamp(SetCoordinate(site, direction, 3.0)):
        ...     resid = model.record("The file is", site)[site]
        >>> bool(((resid @ direction) / direction.norm() - 3).abs().max() < 1e-3)
        True
    """

    direction: Any = None
    value: Any = 0.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        direction = torch.as_tensor(self.direction) if self.direction is not None else torch.zeros(0)
        if direction.ndim != 1 or not bool(torch.isfinite(direction).all()) or not bool(direction.any()):
            raise ClampError(
                f"SetCoordinate takes a direction (d,), finite and not zero, not one of shape {tuple(direction.shape)}"
            )
        object.__setattr__(self, "direction", direction)

    def transform(self, x: Tensor, place: Place) -> Tensor:
        if len(self.direction) != x.shape[-1]:
            raise ClampError(
                f"{place.site.name}: the direction has width {len(self.direction)}, "
                f"the site {x.shape[-1]} ({place.dims[-1]})"
            )
        direction = self.direction.to(device=x.device, dtype=torch.float32)
        unit = direction / direction.norm()
        # A direction that is trained keeps what it was multiplied with; at some sites x is written over.
        wide = x.to(torch.float32, copy=direction.requires_grad)
        value = torch.as_tensor(self.value).to(wide)
        if value.ndim and (
            value.ndim != x.ndim - 1
            or any(one not in (1, size) for one, size in zip(value.shape, x.shape[:-1], strict=True))
        ):
            raise ClampError(
                f"{place.site.name}: values of shape {tuple(value.shape)} do not fit {tuple(x.shape[:-1])}; "
                "give a number, or one for each row and position"
            )
        missing = value - wide @ unit
        return (wide + self.scale * missing[..., None] * unit).to(x.dtype)
