"""Permutation alignment: bring the units of one network into the order of another's before comparing weights.

Letters: U, V units of a group in a and in b, W width of a unit, N row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..core.errors import MeasureError
from ..core.model import Model
from ..core.prove import evaluating
from ..core.real import double
from .permutation import Group, Weights, check_groups, copied, forward, permutation_groups, permuted

By = Literal["weights", "activations"]


@dataclass(frozen=True)
class Alignment:
    """What `align` found.

    Attributes:
        module: a copy of b with its units in the order of a's; it computes what b computes.
        orders: by group, which unit of b stands where, (unit) int64.
        before, after: distance of the parameters of a and b, as given and aligned (Euclidean).
        moved: share of units that changed places.
    """

    module: nn.Module = field(repr=False)
    orders: dict[str, Tensor] = field(repr=False)
    before: float
    after: float
    moved: float


def align(
    a: nn.Module | Model,
    b: nn.Module | Model,
    by: By = "weights",
    *,
    inputs: Any = None,
    groups: Sequence[Group] | None = None,
    sweeps: int = 100,
    seed: int = 0,
) -> Alignment:
    r"""Permutes the units of b so that they match those of a, without changing what b computes.

    - ``"weights"``: minimises :math:`\|\theta_a - P \theta_b\|^2`. With all other groups held, the best order of one
      group is a linear assignment; groups are solved in turn, in random order, until none improves. A local optimum.
    - ``"activations"``: each group by one linear assignment on the correlations of its units' activations on the same
      inputs, those of a head summed over its width.

    Args:
        a, b: of one architecture.
        inputs: a tensor of rows or a mapping of arguments; to find groups of all but transformers models, and
            for ``"activations"``.
        groups: by default `permutation_groups` of a.
        sweeps: of weight matching, at most.
        seed: of the order of the groups.

    Raises:
        MeasureError: two architectures, no groups, or no inputs where they are needed.

    Source: Ainsworth, Hayase and Srinivasa 2023, Git Re-Basin, algorithm 1 (weights) and section 3.1 (activations, with
    correlations as in Li et al. 2016, Convergent Learning).

    >>> from actome.tasks.nets import MLP
    >>> a = MLP([4, 8, 2], seed=0)
    >>> groups = permutation_groups(a, torch.eye(4))
    >>> b = copied(a, permuted(a.state_dict(), groups, {"linear.1": torch.arange(8).flip(0)}))
    >>> found = align(a, b, groups=groups)
    >>> found.before > 1, found.after, found.orders["linear.1"].tolist()
    (True, 0.0, [7, 6, 5, 4, 3, 2, 1, 0])
    """
    if by not in ("weights", "activations"):
        raise MeasureError(f"by={by!r} does not exist; choose 'weights' or 'activations'")
    one, other = (net.module if isinstance(net, Model) else net for net in (a, b))
    if {k: v.shape for k, v in one.state_dict().items()} != {k: v.shape for k, v in other.state_dict().items()}:
        raise MeasureError("the two networks do not have the same parameters; only one architecture can be aligned")
    groups = permutation_groups(a, inputs) if groups is None else list(groups)
    check_groups(one, groups)
    if not groups:
        raise MeasureError(f"no units of this {type(one).__name__} proved to be permutable; describe some with groups=")
    theirs, ours = parameters_of(other), parameters_of(one)
    if by == "weights":
        orders = match_weights(ours, theirs, groups, sweeps=sweeps, seed=seed)
    else:
        orders = match_activations(one, other, inputs, groups)
    moved = [(order != torch.arange(len(order))).double() for order in orders.values()]
    return Alignment(
        copied(other, permuted(other.state_dict(), groups, orders)),
        orders,
        distance(ours, theirs),
        distance(ours, permuted(theirs, groups, orders)),
        float(torch.cat(moved).mean()),
    )


def parameters_of(module: nn.Module) -> dict[str, Tensor]:
    """Its floating parameters in float64, tied ones once."""
    return {name: double(one.detach()) for name, one in module.named_parameters() if one.is_floating_point()}


def distance(a: Weights, b: Weights) -> float:
    """Euclidean distance of two states with the same names.

    >>> distance({"w": torch.zeros(2)}, {"w": torch.tensor([3.0, 4.0])})
    5.0
    """
    return float(sum(((one - b[name]) ** 2).sum() for name, one in a.items())) ** 0.5


def match_weights(
    a: Weights, b: Weights, groups: Sequence[Group], *, sweeps: int = 100, seed: int = 0
) -> dict[str, Tensor]:
    """The order of b's units in each group that brings its weights closest to a's, by one group after the other.

    Weights along two axes of which the units of one group lie, such as recurrent ones, take part from the second sweep
    on, with one axis in the order found so far.
    """
    orders = {group.name: torch.arange(group.units) for group in groups}
    generator = torch.Generator().manual_seed(seed)
    for sweep in range(sweeps):
        improved = False
        for i in torch.randperm(len(groups), generator=generator).tolist():
            group = groups[i]
            ours, theirs = ({axis.name: x[axis.name] for axis in group.axes if axis.name in a} for x in (a, b))
            gain_UV = torch.zeros(group.units, group.units, dtype=torch.float64)
            for axis in group.axes:
                others = tuple(one for one in group.axes if one is not axis)
                twice = any(one.name == axis.name for one in others)
                if axis.name not in ours or (twice and not sweep):
                    continue
                # Everything in its present order but this axis: what is left is a choice of its entries.
                rest = permuted(theirs, [*groups[:i], replace(group, axes=others), *groups[i + 1 :]], orders)
                gain_UV += _products(ours, rest, group, axis).cpu()
            order = _assigned(gain_UV)
            # Where units lie along two axes of one weight the assignment is a guess, so what it brings is looked at.
            before = distance(ours, permuted(theirs, groups, orders))
            if distance(ours, permuted(theirs, groups, orders | {group.name: order})) < before * (1 - 1e-12):
                orders[group.name], improved = order, True
        if not improved and sweep:
            break
    return orders


def match_activations(
    a: nn.Module, b: nn.Module, inputs: Any, groups: Sequence[Group], *, batch_size: int = 256
) -> dict[str, Tensor]:
    """The order of b's units in each group whose activations on the inputs go best with those of a's."""
    if inputs is None:
        raise MeasureError("to match activations give inputs, (row, ...) or a mapping of arguments")
    missing = [group.name for group in groups if group.site is None]
    if missing:
        raise MeasureError(f"group {missing[0]!r} names no site where its activations are; match by weights")
    sums: dict[str, list[Tensor]] = {}
    for part in _batches(inputs, batch_size):
        x, y = (_activations(net, part, groups) for net in (a, b))
        for group in groups:
            # Around the first row's values, so that large means leave no rounding.
            xs, ys = double(x[group.name]), double(y[group.name])
            at = sums.setdefault(group.name, [xs[0], ys[0]])
            xs, ys = xs - at[0], ys - at[1]
            new = [
                torch.tensor(float(len(xs))), xs.sum(0), ys.sum(0), xs.square().sum(0), ys.square().sum(0),
                torch.einsum("nuw,nvw->uvw", xs, ys),
            ]  # fmt: skip
            at[2:] = [p + q for p, q in zip(at[2:], new, strict=True)] if len(at) > 2 else new
    return {name: _assigned(_correlations(*at[2:])) for name, at in sums.items()}


def _products(a: Weights, b: Weights, group: Group, axis: Any) -> Tensor:
    """What each unit of a and each of b have in common along one axis, (unit of a, unit of b)."""
    x, y = (state[axis.name].movedim(axis.dim, 0) for state in (a, b))
    x, y = (one.reshape(axis.repeats, group.units, axis.block, -1).transpose(0, 1).flatten(1) for one in (x, y))
    return x @ y.T


def _assigned(gain_UV: Tensor) -> Tensor:
    """The order that makes the sum of gains largest."""
    from scipy.optimize import linear_sum_assignment

    if not bool(gain_UV.isfinite().all()):
        raise MeasureError("weights or activations that are not finite cannot be matched")
    return torch.from_numpy(linear_sum_assignment(gain_UV.cpu().numpy(), maximize=True)[1])


def _correlations(count: Tensor, x: Tensor, y: Tensor, xx: Tensor, yy: Tensor, xy: Tensor) -> Tensor:
    """(unit of a, unit of b), summed over a unit's width; a constant activation goes with none."""
    n = float(count)
    cov = xy / n - (x / n)[:, None] * (y / n)[None]
    scale = ((xx / n - (x / n) ** 2).clamp_min(0)[:, None] * (yy / n - (y / n) ** 2).clamp_min(0)[None]).sqrt()
    return (cov / scale).where(scale > 0, 0.0).sum(-1)


def _activations(module: nn.Module, inputs: Any, groups: Sequence[Group]) -> dict[str, Tensor]:
    """(row, unit, width) of what the reading module of each group gets, everything but units as rows."""
    found: dict[str, Tensor] = {}

    def keep(group: Group) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].detach().movedim(group.dim, -1)
            found[group.name] = x.reshape(-1, group.units, x.shape[-1] // group.units)

        return hook

    handles = [module.get_submodule(str(group.site)).register_forward_pre_hook(keep(group)) for group in groups]
    try:
        with evaluating(module), torch.no_grad():
            forward(module, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _batches(inputs: Any, size: int) -> Any:
    if isinstance(inputs, Tensor):
        return inputs.split(size)
    rows = next(len(one) for one in inputs.values() if isinstance(one, Tensor) and one.ndim)
    return [
        {
            key: one[at : at + size] if isinstance(one, Tensor) and one.ndim and len(one) == rows else one
            for key, one in inputs.items()
        }
        for at in range(0, rows, size)
    ]
