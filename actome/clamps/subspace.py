"""Projection onto or out of a subspace."""

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
