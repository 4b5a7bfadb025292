"""Linear regions of networks with rectifiers: how wide they are, and how many lie on a line."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..core.errors import MeasureError

_KINKED = (nn.ReLU, nn.LeakyReLU, nn.PReLU)
# A crossing is stepped over by this share of the segment; regions thinner than that are not seen.
_STEP = 1e-9


def region_diameter(model: Any, x: Tensor, *, directions: int = 16, seed: int = 0) -> Tensor:
    r"""Mean width of the linear region around each input, along random lines through it.

    Inside a region all that enters a rectifier is affine, :math:`z(x + t v) = z(x) + t\,\dot z`, so where the region
    ends along a unit vector v is known exactly from one directional derivative: the smallest
    :math:`-z_u / \dot z_u > 0`, and the same backwards. The width along v is the sum of both.

    Args:
        model: a module, or a wrapped one, with ``nn.ReLU``, ``nn.LeakyReLU`` or ``nn.PReLU`` modules and otherwise
            piecewise linear parts in evaluation mode. Kinks elsewhere (max pooling, functional relu) are not seen.
        x: inputs (batch, ...).
        directions: random lines for each input.
        seed: of the lines.

    Returns:
        (batch) float64, in units of the input; infinite where a line never leaves its region.

    Source: He et al. 2021, Neural networks behave as hash encoders (average stochastic diameter); exact here, not
    by small steps.

    >>> net = nn.Sequential(nn.Linear(1, 2), nn.ReLU())
    >>> _ = net.load_state_dict({"0.weight": torch.tensor([[1.0], [1.0]]), "0.bias": torch.tensor([0.0, -1.0])})
    >>> region_diameter(net, torch.tensor([[0.25]])).tolist()
    [1.0]
    """
    if directions < 1 or x.ndim < 2:
        raise MeasureError(f"region_diameter takes inputs (batch, ...) and a direction at least, not {tuple(x.shape)}")
    net = _double(model)
    x = x.detach().double()
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for _ in range(directions):
        v = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device)
        v = v / v.flatten(1).norm(dim=1).view(-1, *[1] * (x.ndim - 1))
        z, dz = _along(net, x, v)
        total += _first(z, dz) + _first(z, -dz)
    return total / directions


def regions_on_segment(model: Any, start: Tensor, end: Tensor, *, most: int = 100_000) -> Tensor:
    r"""How many linear regions the straight line between two inputs passes, counted by sign changes.

    From the start it goes from region to region: each next border is computed as in `region_diameter`, not searched
    for. Regions thinner than 1e-9 of the segment may be stepped over.

    Args:
        model: as in `region_diameter`.
        start, end: (batch, ...), the ends of each line.
        most: regions on one line at which to give up.

    Returns:
        (batch) int64, 1 or more.

    Source: regions along trajectories as in Raghu et al. 2017, On the Expressive Power of Deep Neural Networks.

    >>> net = nn.Sequential(nn.Linear(1, 2), nn.ReLU())
    >>> _ = net.load_state_dict({"0.weight": torch.tensor([[1.0], [1.0]]), "0.bias": torch.tensor([0.0, -1.0])})
    >>> regions_on_segment(net, torch.tensor([[-1.0]]), torch.tensor([[2.0]])).tolist()
    [3]
    """
    if start.shape != end.shape or start.ndim < 2:
        raise MeasureError(f"lines go from (batch, ...) to the same, not {tuple(start.shape)} to {tuple(end.shape)}")
    net = _double(model)
    start, way = start.detach().double(), (end - start).detach().double()
    count = torch.ones(len(start), dtype=torch.int64, device=start.device)
    at = torch.zeros(len(start), dtype=torch.float64, device=start.device)
    going = torch.arange(len(start), device=start.device)
    for _ in range(most):
        part = way[going]
        here = start[going] + at[going].view(-1, *[1] * (start.ndim - 1)) * part
        z, dz = _along(net, here, part)
        at[going] += _first(z, dz) + _STEP
        going = going[at[going] < 1]
        if not len(going):
            return count
        count[going] += 1
    raise MeasureError(f"a line passes more than {most} regions; raise `most`, or take a shorter one")


def _first(z_NU: Tensor, dz_NU: Tensor) -> Tensor:
    """How far until the first unit changes sign, (rows); infinite when none does."""
    # A unit on its border (z = 0) moves into the side where it goes, without a crossing.
    away = -z_NU / dz_NU
    return away.masked_fill(~((away > 0) & (dz_NU != 0)), torch.inf).amin(-1)


def _along(net: nn.Module, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """What enters the rectifiers at x and its derivative along v, (rows, units of all of them) each."""
    seen: list[Tensor] = []
    with forward_ad.dual_level(), torch.no_grad(), _listening(net, seen):
        net(forward_ad.make_dual(x, v))
        pairs = [forward_ad.unpack_dual(one) for one in seen]
        values = torch.cat([one.primal.flatten(1) for one in pairs], -1)
        slopes = [torch.zeros_like(p.primal) if p.tangent is None else p.tangent for p in pairs]
        return values, torch.cat([one.flatten(1) for one in slopes], -1)


@contextlib.contextmanager
def _listening(net: nn.Module, seen: list[Tensor]) -> Iterator[None]:
    handles = [
        module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        for module in net.modules()
        if isinstance(module, _KINKED)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _double(model: Any) -> nn.Module:
    """A copy in float64 and evaluation mode, so that borders are where they are."""
    module = model if isinstance(model, nn.Module) else model.module
    if not any(isinstance(one, _KINKED) for one in module.modules()):
        raise MeasureError("this module has no ReLU, LeakyReLU or PReLU module, so its linear regions cannot be told")
    net = copy.deepcopy(module).double().eval()
    for one in net.modules():
        # In place, the values that were seen would be overwritten.
        if hasattr(one, "inplace"):
            one.inplace = False
    return net
