"""How far steered states lie from where a model's own states lie.

Letters: N states, K components, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from actome.core.errors import MeasureError


@dataclass(frozen=True, eq=False)
class Manifold:
    """The directions in which clean states vary; what lies outside of them is off the manifold.

    Attributes:
        mean: (D).
        basis: (K, D), orthonormal.
        usual: mean squared distance of clean states that the basis was not fitted on.

    Source: the distance is the residual after the leading principal components, as in Why Steering Works (validity of
    steered states); our form.
    """

    mean: Tensor
    basis: Tensor
    usual: float

    @classmethod
    def fit(cls, states_ND: Tensor, share: float = 0.95) -> Manifold:
        """From clean states, half of them for the directions and half for what is usual.

        Args:
            states_ND: at least 16.
            share: of the variance that the components hold.
        """
        if states_ND.ndim != 2 or len(states_ND) < 16:
            raise MeasureError(f"clean states have the shape {tuple(states_ND.shape)}; give (N, D), 16 at least")
        fitted, held = states_ND[::2].double(), states_ND[1::2].double()
        mean = fitted.mean(0)
        _, values, rows = torch.linalg.svd(fitted - mean, full_matrices=False)
        held_share = (values**2).cumsum(0) / (values**2).sum().clamp_min(1e-300)
        kept = int((held_share < share).sum()) + 1
        basis = rows[:kept]
        return cls(mean, basis, float(_outside(held, mean, basis).mean()))

    def distance(self, states_ND: Tensor) -> Tensor:
        """Root of the squared distance over what is usual, (N): about 1 for clean states.

        >>> noise = torch.Generator().manual_seed(0)
        >>> clean = torch.randn(400, 4, generator=noise) @ torch.eye(4, 16)
        >>> off = Manifold.fit(clean + 0.01 * torch.randn(400, 16, generator=noise)).distance(clean + 1.0)
        >>> bool(off.mean() > 5)
        True
        """
        outside = _outside(states_ND.double(), self.mean, self.basis)
        return (outside / max(self.usual, 1e-300)).sqrt()


def _outside(x: Tensor, mean: Tensor, basis: Tensor) -> Tensor:
    centred = x - mean
    return ((centred - (centred @ basis.T) @ basis) ** 2).sum(-1)
