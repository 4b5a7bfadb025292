"""How sensitive training is to a nudge at a step: when a run's outcome is decided."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from actome.core.errors import MeasureError
from actome.core.model import Model
from actome.dynamics.barrier import loss_barrier
from actome.measures.alignment import align as aligned
from actome.measures.alignment import distance, parameters_of
from actome.measures.similarity import similarity

if TYPE_CHECKING:
    import pandas as pd

# A run is a module, or a tuple that begins with one and has what goes on with it: optimiser, schedule, generators.
TrainFn = Callable[[Any, int, int], Any]
ALIGNMENTS = ("weights", "activations")


def butterfly(
    train_fn: TrainFn,
    at: Sequence[int] = (0,),
    sigma: Sequence[float] = (1e-4, 1e-2),
    then: int | Sequence[int] = 200,
    *,
    data: Mapping[str, Any] | Any = None,
    align: Sequence[Literal["weights", "activations"]] = (),
    sites: str | Sequence[str] | None = None,
    swap: Callable[[Any, int], Any] | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    points: int = 11,
    refresh: Any = None,
    seed: int = 0,
) -> pd.DataFrame:
    r"""Trains twins that differ by a tiny nudge at a step, and says how far apart they end.

    At step t the child is a copy of the parent with :math:`\theta + \epsilon`. The noise is Gaussian, in each parameter
    proportional to the standard deviation that it had at the start, with :math:`\|\epsilon\| = \sigma \|\theta_0\|` in
    all: 1 is the scale of the initialisation. Then both go on with the same batches for the same number of steps,
    whatever t: otherwise a late nudge has less time to grow.

    The training must be deterministic given (run, start, stop): **put 0 into `sigma`**, whose distance has to be 0 to
    the bit. A training that draws its batches from a global state, or kernels that are not deterministic, show there.

    Args:
        train_fn: ``train_fn(run, start, stop) -> run`` makes the steps from `start` to `stop`, counted from 0, with the
            batches of those steps; with None for `run` it begins anew. A run is the module, or a tuple that begins with
            it, such as (module, optimizer); it is copied as a whole, so that an optimiser's state belongs to the twin.
        at: steps before which the nudge is given; 0 is at initialisation.
        sigma: sizes of the nudge.
        then: how many steps after the nudge the twins are compared; several for the growth.
        data: inputs and targets (x, y) for the loss barrier, or several by name (``{"train": ..., "test": ...}``).
        align: also compare after alignment by ``"weights"``, ``"activations"`` or both.
        sites: patterns of sites (``"module:act.*"``) for the similarity of representations on the first data's inputs.
        swap: ``swap(run, t) -> run`` makes step t with another batch: a nudge of its own, listed with ``sigma`` NaN.
        loss, points, refresh: of `loss_barrier`.
        seed: of the noise, the same direction for every size.

    Returns:
        A row for each nudge and each `then`:

        - ``at``, ``nudge`` (``"noise"`` or ``"batch"``), ``sigma``, ``then``
        - ``distance``: of the parameters, Euclidean; ``relative``: to the parent's way since the nudge;
          ``start``: the distance right after the nudge
        - ``growth``: ln(distance / start) / then, in 1 / step; positive when twins part exponentially
        - ``barrier`` (``barrier_NAME`` for several data), see `loss_barrier`
        - ``distance_weights``, ``barrier_weights`` and so on, after alignment
        - ``angle``: arccos of the CKA in radians, the mean over sites; 0 for the same geometry

    Raises:
        MeasureError: steps or sizes that make no sense, a run without a module, sites or alignment without data.

    Source: Kwok et al. 2025, The Butterfly Effect: Neural Network Training Trajectories Are Highly Sensitive to Initial
    Conditions.

    >>> from actome.tasks.nets import MLP
    >>> x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    >>> def train_fn(run, start, stop):
    ...     net = run or MLP([4, 8, 2])
    ...     for _ in range(start, stop):
    ...         net.zero_grad()
    ...         torch.nn.functional.cross_entropy(net(x), (x[:, 0] > 0).long()).backward()
    ...         with torch.no_grad():
    ...             for p in net.parameters():
    ...                 p -= 0.1 * p.grad
    ...     return net
    >>> table = butterfly(train_fn, at=[0, 20], sigma=[0, 0.01], then=10)
    >>> table.distance[table.sigma == 0].tolist(), bool((table.distance[table.sigma > 0] > 0).all())
    ([0.0, 0.0], True)
    """
    import pandas as pd

    marks = sorted({then} if isinstance(then, int) else set(then))
    named = _named(data)
    _check(at, sigma, marks, align, sites, named)
    start = train_fn(None, 0, 0)
    scale, norm = _scale(start)
    rows = []
    run, done = start, 0
    for t in sorted(set(at)):
        run = train_fn(run, done, t)
        done = t
        root = parameters_of(module_of(run))
        parents = _branch(train_fn, copy.deepcopy(run), t, t, marks)
        twins: list[tuple[str, float, Any, int]] = [
            ("noise", size, nudged(copy.deepcopy(run), size * norm, scale, seed), t) for size in sigma
        ]
        if swap is not None:
            twins.append(("batch", math.nan, swap(copy.deepcopy(run), t), t + 1))
        for nudge, size, child, begun in twins:
            # A swapped step has been made already: the parent's distance to it is taken after that step too.
            apart = parameters_of(module_of(child))
            first = distance(root if nudge == "noise" else _after_one(train_fn, run, t), apart)
            children = _branch(train_fn, child, begun, t, marks)
            for mark, parent, other in zip(marks, parents, children, strict=True):
                ours, theirs = parameters_of(parent), parameters_of(other)
                far, way = distance(ours, theirs), distance(root, ours)
                row = {
                    "at": t, "nudge": nudge, "sigma": size, "then": mark, "distance": far,
                    "relative": far / way if way else math.nan, "start": first,
                    "growth": math.log(far / first) / mark if far and first and mark else math.nan,
                }  # fmt: skip
                rows.append(row | _compared(parent, other, named, align, sites, loss, points, refresh))
    return pd.DataFrame(rows)


def nudged(run: Any, size: float, scale: Mapping[str, float], seed: int = 0) -> Any:
    """Adds Gaussian noise of a given length to a run's parameters, in place; size 0 does not touch them.

    Args:
        size: length of the whole nudge.
        scale: of each parameter's noise, relative to one another.
    """
    if not size:
        return run
    generator = torch.Generator().manual_seed(seed)
    named = [(name, one) for name, one in module_of(run).named_parameters() if name in scale]
    noise = [scale[name] * torch.randn(one.shape, generator=generator, dtype=torch.float64) for name, one in named]
    length = math.sqrt(sum(float(one.square().sum()) for one in noise))
    with torch.no_grad():
        for (_, one), add in zip(named, noise, strict=True):
            one += (add * (size / length)).to(one)
    return run


def module_of(run: Any) -> nn.Module:
    """The module of a run: itself, or the first of a tuple.

    Raises:
        MeasureError: when there is none.
    """
    found = run[0] if isinstance(run, tuple | list) and run else run
    if not isinstance(found, nn.Module):
        raise MeasureError(
            f"train_fn gave {type(found).__name__}; it returns the module, or a tuple that begins with it"
        )
    return found


def _branch(train_fn: TrainFn, run: Any, begun: int, at: int, marks: Sequence[int]) -> list[nn.Module]:
    """The modules of a run after each number of steps since `at`; evaluation copies."""
    found, done = [], begun
    for mark in marks:
        run = train_fn(run, done, at + mark)
        done = at + mark
        found.append(copy.deepcopy(module_of(run)).eval())
    return found


def _after_one(train_fn: TrainFn, run: Any, t: int) -> dict[str, Tensor]:
    return parameters_of(module_of(train_fn(copy.deepcopy(run), t, t + 1)))


def _scale(start: Any) -> tuple[dict[str, float], float]:
    """The standard deviation of each parameter at the start, and the norm of all; constant ones get no noise."""
    parameters = parameters_of(module_of(start))
    norm = math.sqrt(sum(float(one.square().sum()) for one in parameters.values()))
    scale = {name: float(one.std()) if one.numel() > 1 else 0.0 for name, one in parameters.items()}
    scale = {name: one for name, one in scale.items() if one > 0}
    if not scale or not norm:
        raise MeasureError("no parameter varies at the start, so the noise has no scale")
    return scale, norm


def _compared(
    a: nn.Module, b: nn.Module, named: Mapping[str, Any], align: Sequence[str], sites: Any, loss: Any, points: int,
    refresh: Any,
) -> dict[str, float]:  # fmt: skip
    out: dict[str, float] = {}
    inputs = next(iter(named.values()))[0] if named else None
    others: dict[str, nn.Module] = {"": b}
    for by in align:
        found = aligned(a, b, by, inputs=inputs)
        others[f"_{by}"] = found.module
        out[f"distance_{by}"] = found.after
    for suffix, other in others.items():
        for name, data in named.items():
            key = f"barrier{f'_{name}' if name else ''}{suffix}"
            out[key] = loss_barrier(a, other, data, loss=loss, points=points, refresh=refresh).height
    if sites is not None:
        ours, theirs = (Model(net).record(inputs, sites) for net in (a, b))
        angles = []
        for site in ours.sites():
            cka = similarity(ours.flat(site), theirs.flat(site), "cka")
            angles.append(math.acos(min(1.0, max(-1.0, cka))))
        out["angle"] = sum(angles) / len(angles)
    return out


def _named(data: Any) -> dict[str, Any]:
    if data is None:
        return {}
    return dict(data) if isinstance(data, Mapping) else {"": data}


def _check(at: Any, sigma: Any, marks: Any, align: Any, sites: Any, named: Any) -> None:
    if not len(at) or min(at) < 0 or not marks or marks[0] < 1 or any(not size >= 0 for size in sigma):
        raise MeasureError(
            f"at={list(at)}, sigma={list(sigma)}, then={marks}: nudge at steps from 0 on, by sizes from 0 on, and go "
            "on for a step or more"
        )
    if wrong := [by for by in align if by not in ALIGNMENTS]:
        raise MeasureError(f"align={wrong[0]!r} does not exist; choose among {', '.join(ALIGNMENTS)}")
    if (sites is not None or align) and not named:
        raise MeasureError("representations and alignment need data=(x, y)")
