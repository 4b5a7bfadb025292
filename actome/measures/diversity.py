"""How evenly vectors spread over the sphere: features of tokens, or filters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from ..core.errors import MeasureError
from ..core.measure import Measure, Reduction, double, real_tokens
from .reservoir import kept, keyed, smallest


class HypersphericalEnergy(Measure):
    r"""Diversity of features on the unit sphere: their potential energy, low when they spread.

    For a sample of n real tokens, each scaled to length 1 (:math:`v_i`):

    - ``energy``: mean over pairs of :math:`\lVert v_i - v_j \rVert^{-s}`, for s = 0 of :math:`-\ln \lVert v_i - v_j
      \rVert`
    - ``energy_random``: what n random directions of that width give, in closed form. Energies of different widths are
      comparable only beside it
    - ``energy_excess``: energy / energy_random - 1, for s = 0 their difference; 0 for random directions, negative for
      more diverse ones
    - ``mean_abs_cosine``: mean over pairs of :math:`|\cos(v_i, v_j)|`
    - ``energy_vectors``: n, at most `size`
    - ``identical_pairs``: share of pairs with the same direction (closer than 1e-5), which are left out of the energy

    The sample is a bounded reservoir: every pair of it is counted, merging is exact, and while there are no more than
    `size` tokens it is all of them. Zero vectors have no direction and are left out. NaN with fewer than 2 vectors (4
    when centred).

    Args:
        s: the power of the distance, 0 or more.
        size: how many vectors are kept.
        centre: subtract the sample's mean first. Outputs of a ReLU lie in one orthant, which raises their energy;
            centre them to ask for spread around the mean.

    Shapes: x (\*stack, batch, pos, unit); values (\*stack). For **filters** use `hyperspherical_energy` on the weight,
    ``conv.weight.flatten(1)``.

    Source: Malviya and Vaithilingam Sudhakar 2022, Feature diversity in self-supervised learning, after Liu et al.
    2018, Learning towards Minimum Hyperspherical Energy.

    Example:
        >>> energy = HypersphericalEnergy()
        >>> energy.update(torch.tensor([[[2.0, 0.0], [-1.0, 0.0]]]))
        >>> float(energy.compute()["energy"])
        0.5
    """

    reductions: ClassVar[dict[str, Reduction]] = {"sample": "cat"}
    value_dims: ClassVar[dict[str, tuple[str, ...]]] = {
        "energy": (),
        "energy_random": (),
        "energy_excess": (),
        "mean_abs_cosine": (),
        "energy_vectors": (),
        "identical_pairs": (),
    }

    def __init__(self, s: float = 1.0, size: int = 512, centre: bool = False, **options: object):
        super().__init__(**options)
        if s < 0 or size < 2:
            raise MeasureError(f"s={s} and size={size}: the power is 0 or more, and 2 vectors make a pair")
        self.s, self.size, self.centre = float(s), size, centre

    def bounded(self, name: str, rows: Tensor) -> Tensor:
        """The smallest keys stay."""
        return smallest(rows, self.size)

    def site_statistics(self, x: Tensor, mask: Tensor | None = None, tokens: Tensor | None = None) -> dict[str, Tensor]:
        """sample: (size, 2 + unit), keys and vectors."""
        # Tokens left out are zero vectors here, and like all of these have no direction.
        x_NU = real_tokens(x, mask).x.flatten(0, 1)
        return {"sample": keyed(_directed(x_NU), self.size)}

    def values(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See the class."""
        sample = stats["sample"]
        stack = sample.shape[:-2]
        found = [self._values(kept(one)) for one in sample.flatten(0, -3)] if stack else [self._values(kept(sample))]
        columns = (torch.stack(column) for column in zip(*found, strict=True))
        return {name: column.reshape(stack) for name, column in zip(self.value_dims, columns, strict=True)}

    def _values(self, x_NU: Tensor) -> tuple[Tensor, ...]:
        if self.centre and len(x_NU):
            x_NU = _directed(x_NU - x_NU.mean(0))
        count = double(torch.tensor(len(x_NU), device=x_NU.device))
        random = torch.full_like(count, random_energy(x_NU.shape[1], self.s))
        if len(x_NU) < (4 if self.centre else 2):
            nan = torch.full_like(count, torch.nan)
            return nan, nan, nan, nan, count.where(count > 0, torch.nan), nan
        energy, cosine, same = _pairs(double(x_NU), self.s)
        excess = energy - random if self.s == 0 else energy / random - 1
        return energy, random.where(random.isfinite(), torch.nan), excess, cosine, count, same


def hyperspherical_energy(vectors_NU: Tensor, s: float = 1.0) -> Tensor:
    r"""Mean over pairs of :math:`\lVert v_i - v_j \rVert^{-s}` of the directions of vectors, for s = 0 of its
    logarithm.

    Args:
        vectors_NU: (n, unit), such as filters ``weight.flatten(1)``; n 2 or more. Zero vectors and pairs with the same
            direction are left out; NaN when no pair is left.
        s: the power, 0 or more.

    >>> round(float(hyperspherical_energy(torch.eye(3))), 4)  # all at a distance of the root of 2
    0.7071
    """
    if vectors_NU.ndim != 2 or len(vectors_NU) < 2:
        raise MeasureError(f"energy is of pairs of vectors (n, unit) with n >= 2, not of {tuple(vectors_NU.shape)}")
    return _pairs(_directed(double(vectors_NU.detach())), s)[0]


def _directed(x_NU: Tensor) -> Tensor:
    """Without the zero vectors."""
    return x_NU[(x_NU != 0).any(-1)]


def _pairs(x_NU: Tensor, s: float) -> tuple[Tensor, Tensor, Tensor]:
    """Mean energy and mean absolute cosine over pairs, and the share of pairs with the same direction."""
    v = torch.nn.functional.normalize(x_NU, dim=-1, eps=1e-30)
    upper = torch.triu_indices(len(v), len(v), 1, device=v.device).unbind(0)
    cosine = (v @ v.T)[upper]
    distance = (2 - 2 * cosine).clamp_min(0).sqrt()
    apart = distance > 1e-5
    one = (-distance.log() if s == 0 else distance.pow(-s)).where(apart, 0.0)
    return one.sum() / apart.sum(), cosine.abs().mean(), 1 - apart.double().mean()


def random_energy(units: int, s: float = 1.0) -> float:
    r"""The mean energy of pairs of random directions of a width; infinite where :math:`s \ge units - 1`.

    With :math:`a = (units - 1) / 2`: :math:`2^{-s}\,\Gamma(a - s/2)\,\Gamma(2a) / (\Gamma(2a - s/2)\,\Gamma(a))`, and
    for s = 0 :math:`(\psi(2a) - \psi(a)) / 2 - \ln 2`, since half of one minus the cosine is Beta(a, a).

    >>> round(random_energy(3, 1.0), 6), round(random_energy(1000, 1.0), 3)
    (1.0, 0.707)
    """
    a = (units - 1) / 2
    if a <= s / 2:
        return math.inf
    if s == 0:
        both = torch.tensor([2 * a, a], dtype=torch.float64).digamma()
        return float(both[0] - both[1]) / 2 - math.log(2)
    gamma = math.lgamma
    return math.exp(gamma(a - s / 2) + gamma(2 * a) - gamma(2 * a - s / 2) - gamma(a) - s * math.log(2))
