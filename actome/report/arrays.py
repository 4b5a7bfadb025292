"""Values that are lists of numbers, such as histograms and spectra, made small enough to be kept with a scan."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from actome.core.sites import Site
from actome.core.table import PLACES, MeasureResult

_LONGEST, _SHORTEST = 256, 16
# Numbers of one value over all sites; five digits each are under a megabyte.
_MOST = 100_000
# Of single units there may be a million.
_TOO_MANY = {"unit"}


def arrays_of(results: Iterable[MeasureResult]) -> tuple[dict[str, Any], ...]:
    """The values of a measurement that have one dim that is no place of a table.

    Returns:
        For each site (and head or expert where there is one) a dict: ``site``, ``layer``, ``head``, ``expert`` where
        they apply, ``measure``, ``dim``, ``values``, and ``at``: the coordinates of the values along the dim where
        these are not 0, 1, 2, ... A measure tells coordinates by a method ``axis(dim)``; ends that are zero are left
        out then. Long lists are thinned, more so the further from their beginning.

    Example:
        >>> import actome as ac
        >>> from actome.measures import Histogram
        >>> table = ac.demo().measure("The value of the expression", {"blocks.0.mlp.act": Histogram()})
        >>> [(one["site"], one["measure"], one["dim"]) for one in arrays_of(table)]
        [('blocks.0.mlp.act', 'histogram', 'bin')]
    """
    return tuple(
        one
        for result in results
        for name, dims in result.measure.value_dims.items()
        if name in result.values and _kept(dims)
        for one in _arrays(result, name, dims)
    )


def _kept(dims: Sequence[str]) -> bool:
    return sum(dim not in PLACES for dim in dims) == 1 and not _TOO_MANY & set(dims)


def _arrays(result: MeasureResult, name: str, dims: Sequence[str]) -> Iterator[dict[str, Any]]:
    along = next(i for i, dim in enumerate(dims) if dim not in PLACES)
    whole = np.moveaxis(result.per_site(name).double().numpy(), 1 + along, -1)
    coordinates = getattr(result.measure, "axis", None)
    axis = None if coordinates is None else coordinates(dims[along])
    lists = math.prod(whole.shape[:-1])
    longest = min(_LONGEST, max(_SHORTEST, _MOST // max(1, lists)))
    others = [dim for dim in dims if dim in PLACES]
    for place in itertools.product(*map(range, whole.shape[:-1])):
        at, values = _shortened(whole[place], axis, longest)
        yield {
            **_where(result.sites[place[0]]),
            **dict(zip(others, place[1:], strict=True)),
            "measure": name,
            "dim": dims[along],
            **({"at": at} if at is not None else {}),
            "values": values,
        }


def _where(site: Site) -> dict[str, Any]:
    return {"site": site.name, **({"layer": site.layer} if site.layer is not None else {})}


def _shortened(values: np.ndarray, axis: Sequence[float] | None, longest: int) -> tuple[list | None, list]:
    chosen = np.arange(len(values))
    if axis is not None and len(axis) == len(values):
        filled = np.flatnonzero(np.nan_to_num(values, nan=1.0))
        chosen = chosen[filled[0] : filled[-1] + 1] if len(filled) else chosen[:0]
    if len(chosen) > longest:
        # Evenly in the logarithm of the rank, with the first ones all there.
        steps = np.unique(np.geomspace(1, len(chosen), longest).round().astype(int)) - 1
        chosen = chosen[steps]
    thinned = len(chosen) < len(values)
    at = None
    if axis is not None and len(axis) == len(values):
        at = [rounded(axis[i], 8) for i in chosen]
    elif thinned:
        at = chosen.tolist()
    return at, [rounded(x) for x in values[chosen]]


def rounded(x: float, digits: int = 5) -> float | None:
    """A number with few digits, for JSON; ``None`` for what is not finite."""
    x = float(x)
    return float(f"{x:.{digits}g}") if math.isfinite(x) else None
