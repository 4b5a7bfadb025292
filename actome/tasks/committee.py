"""A committee of units with a fixed readout that learns a quadratic: the smallest network that groks.

Letters: P example, D input, N unit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .draw import counts, seeded


class Committee(nn.Module):
    r"""The mean over units of a nearly linear activation, of which only the first layer learns.

    .. math:: f(x) = \frac{1}{N} \sum_i \phi(w_i \cdot x / \sqrt D), \qquad \phi(h) = h + \tfrac{\epsilon}{2} h^2,
        \qquad w_i \sim N(0, I)

    With a small :math:`\epsilon` the tangent kernel at the start is nearly that of a linear model, which knows nothing
    of a quadratic target; to learn it, weights have to turn towards the teacher's direction.

    Args:
        inputs, width: D and N.
        eps: the curvature of the activation; 0 is linear.
        seed: of the weights.

    Shapes: x (batch, input), output (batch).

    Source: Kumar et al. 2024, Grokking as the Transition from Lazy to Rich Training Dynamics, section 5.

    >>> Committee(40, 100)(torch.zeros(5, 40)).shape
    torch.Size([5])
    """

    def __init__(self, inputs: int, width: int, eps: float = 0.25, seed: int = 0):
        super().__init__()
        counts(inputs=(inputs, 1), width=(width, 1))
        self.weight = nn.Parameter(torch.randn(width, inputs, generator=seeded(seed)))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        h_PN = x @ self.weight.mT * x.shape[-1] ** -0.5
        return (h_PN + self.eps / 2 * h_PN.square()).mean(-1)

    @torch.no_grad()
    def alignment(self, direction: Tensor) -> float:
        r"""Share of the weights' square along a direction, :math:`\sum_i (w_i \cdot \hat\beta)^2 / \sum_i |w_i|^2`.

        Chance is 1 / D.
        """
        along = self.weight @ (direction / direction.norm())
        return float(along.square().sum() / self.weight.square().sum())


@dataclass(frozen=True)
class QuadraticTeacher:
    r"""Gaussian inputs and the target :math:`(\beta \cdot x)^2 / 2` of a direction of length one.

    Attributes:
        inputs: D.
        seed: of the direction.

    >>> teacher = QuadraticTeacher(40)
    >>> x, y = teacher.sample(6, seed=1)
    >>> x.shape, torch.allclose(y, (x @ teacher.direction()).square() / 2)
    (torch.Size([6, 40]), True)
    """

    inputs: int = 40
    seed: int = 0

    def __post_init__(self) -> None:
        counts(inputs=(self.inputs, 1))

    def direction(self) -> Tensor:
        """beta, (D), of length one."""
        # Apart from what networks and samples draw: a unit of the same seed must not be the teacher itself.
        beta = torch.randn(self.inputs, generator=seeded(self.seed + 7_000_003))
        return beta / beta.norm()

    def sample(self, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Inputs (count, D) and targets (count)."""
        counts(count=(count, 1))
        x = torch.randn(count, self.inputs, generator=seeded(seed + 1_000_003))
        return x, (x @ self.direction()).square() / 2
