"""The loss barrier between two networks: whether they lie in one valley, so that their weights can be averaged."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from actome.core.errors import MeasureError
from actome.core.model import Model
from actome.measures.alignment import align as aligned
from actome.measures.alignment import distance, parameters_of
from actome.measures.permutation import Group, forward

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Barrier:
    """What lies between two networks.

    Attributes:
        height: largest excess of the loss over the straight line between its ends, in the loss's units; 0 when nowhere
            above it.
        at: where on the way, 0 at a and 1 at b.
        weights: the points of the way.
        losses: at these, the mean over the data.
        distance: of the parameters of the two ends, Euclidean, after alignment when there was one.
    """

    height: float
    at: float
    weights: tuple[float, ...] = field(repr=False)
    losses: tuple[float, ...] = field(repr=False)
    distance: float


def loss_barrier(
    a: nn.Module | Model,
    b: nn.Module | Model,
    data: Any,
    align: Literal["weights", "activations"] | None = None,
    *,
    points: int = 11,
    loss: Loss | None = None,
    refresh: Any = None,
    groups: Sequence[Group] | None = None,
    batch_size: int = 512,
) -> Barrier:
    r"""The highest point of the loss on the straight way between two networks, above the line between its ends.

    .. math:: \max_{w \in [0, 1]} L((1 - w)\,\theta_a + w\,\theta_b) - [(1 - w) L(\theta_a) + w L(\theta_b)]

    Two networks without a barrier are linearly connected: branches that can still be merged. In evaluation mode; the
    running statistics of batch normalisation are counted anew at every point, since those of a mixture are
    nobody's average (that alone can make a barrier). Neither network is written to.

    Args:
        a, b: of one architecture.
        data: inputs and targets ``(x, y)``, or a list of such batches. x is a tensor or a mapping of arguments.
        align: bring b's units into the order of a's first, see `actome.measures.align`; the activations are those on
            the first batch.
        points: of the way, its ends among them.
        loss: of (outputs, targets), a mean over rows; cross-entropy by default.
        refresh: inputs to count normalisation statistics on, one tensor or a list of them; by default those of `data`,
            but for a barrier on test data give the training inputs.
        groups: for `align`, when its own do not do.
        batch_size: rows a forward, of data that is one pair of tensors.

    Raises:
        MeasureError: two architectures, no data, or a loss that is not finite at an end.

    Source: Frankle et al. 2020, Linear Mode Connectivity and the Lottery Ticket Hypothesis; permutations: Entezari et
    al. 2022; statistics: Jordan et al. 2023, REPAIR.

    >>> from actome.tasks.nets import MLP
    >>> net, x = MLP([4, 8, 3]), torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    >>> loss_barrier(net, net, (x, torch.arange(20) % 3)).height
    0.0
    """
    if points < 3:
        raise MeasureError(f"points={points}: the two ends and one point between them at least")
    one, other = (net.module if isinstance(net, Model) else net for net in (a, b))
    batches = list(_batches(data, batch_size))
    if not batches:
        raise MeasureError("there is no data to take a loss on; give (x, y), or batches of such")
    if align is not None:
        other = aligned(a, b, align, inputs=batches[0][0], groups=groups).module
    ends = one.state_dict(), other.state_dict()
    if {name: x.shape for name, x in ends[0].items()} != {name: x.shape for name, x in ends[1].items()}:
        raise MeasureError("the two networks do not have the same parameters; there is no way between them")
    seen = [x for x, _ in batches] if refresh is None else refresh if isinstance(refresh, list | tuple) else [refresh]
    net, compare = copy.deepcopy(one).eval(), loss or F.cross_entropy
    weights = torch.linspace(0, 1, points, dtype=torch.float64).tolist()
    losses = []
    for weight in weights:
        net.load_state_dict(mixed(*ends, weight))
        refresh_statistics(net, seen)
        losses.append(mean_loss(net, batches, compare))
    if not (math.isfinite(losses[0]) and math.isfinite(losses[-1])):
        raise MeasureError(f"the losses of the two networks are {losses[0]} and {losses[-1]}; it takes finite ones")
    excess = [value - ((1 - w) * losses[0] + w * losses[-1]) for w, value in zip(weights, losses, strict=True)]
    # A mixture that overflows is as high a barrier as there is.
    excess = [math.inf if math.isnan(one) else one for one in excess]
    top = max(range(points), key=excess.__getitem__)
    apart = distance(parameters_of(one), parameters_of(other))
    return Barrier(max(excess[top], 0.0), weights[top], tuple(weights), tuple(losses), apart)


def mixed(a: dict[str, Tensor], b: dict[str, Tensor], weight: float) -> dict[str, Tensor]:
    """The state on the way from a (0) to b (1); counters and other integers are a's.

    >>> mixed({"w": torch.zeros(2)}, {"w": torch.ones(2)}, 0.25)
    {'w': tensor([0.2500, 0.2500])}
    """
    return {
        name: torch.lerp(x, b[name].to(x), weight) if x.is_floating_point() and weight else x for name, x in a.items()
    }


@torch.no_grad()
def refresh_statistics(net: nn.Module, inputs: Sequence[Any]) -> None:
    """Counts the running mean and variance of batch normalisation anew, as the plain average over some inputs.

    Args:
        net: changed in place, in these statistics alone; a net without them is left alone.
        inputs: batches, each a tensor or a mapping of arguments.
    """
    norms = [one for one in net.modules() if isinstance(one, _BatchNorm) and one.track_running_stats]
    if not norms:
        return
    kept = [(one, one.momentum, one.training) for one in norms]
    for one in norms:
        one.reset_running_stats()
        one.momentum = None  # the average of all batches
        one.train()
    try:
        for x in inputs:
            forward(net, x)
    finally:
        for one, momentum, training in kept:
            one.momentum = momentum
            one.train(training)


@torch.no_grad()
def mean_loss(net: nn.Module, batches: Sequence[tuple[Any, Tensor]], loss: Loss) -> float:
    """The loss over batches, each weighing its rows."""
    total, rows = 0.0, 0
    for x, y in batches:
        total += float(loss(forward(net, x).float(), y)) * len(y)
        rows += len(y)
    return total / rows


def _batches(data: Any, size: int) -> Iterator[tuple[Any, Tensor]]:
    pairs = [data] if isinstance(data, tuple) and len(data) == 2 and isinstance(data[1], Tensor) else data
    for pair in pairs:
        if not (isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[1], Tensor)):
            raise MeasureError(f"data is inputs and targets (x, y), or batches of such, not {type(pair).__name__}")
        x, y = pair
        if isinstance(x, Tensor):
            if len(x) != len(y):
                raise MeasureError(f"{len(x)} inputs and {len(y)} targets; give as many of both")
            yield from zip(x.split(size), y.split(size), strict=True)
        else:
            yield x, y
