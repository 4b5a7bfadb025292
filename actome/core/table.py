"""What a measurement gives: values by measure and site, and the tidy table of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from .errors import MeasureError, SiteError, nearest
from .sites import STREAM_DIMS, Site

if TYPE_CHECKING:
    import pandas as pd

    from .measure import Measure

PLACES = ("layer", "head", "unit", "expert")

# Values with any other dim (a histogram over positions, say) are found in the results but have no rows.
_TABLE_DIMS = frozenset(PLACES)


@dataclass(frozen=True, eq=False)
class MeasureResult:
    """The values of one measure at the sites of one stack.

    Attributes:
        measure: the measure, which holds the statistics and can go on or be merged.
        sites: one for each entry of the stack, in order.
        values: what it computed, (site, *value dims); without the first dim for a single site that was not stacked.
    """

    measure: Measure
    sites: tuple[Site, ...]
    values: Mapping[str, Tensor]

    def per_site(self, name: str) -> Tensor:
        """One value of all sites: (site, *value dims), on the CPU."""
        return _per_site(self.values[name], len(self.measure.value_dims[name]), len(self.sites), name).cpu()

    def rows(self) -> pd.DataFrame:
        """The values as a tidy table: site, layer, head, unit, expert (those that apply), measure, value."""
        return tidy(self.values, self.measure.value_dims, self.sites)


@dataclass(frozen=True, eq=False)
class MeasureTable:
    """What `Model.measure` returns.

    Attributes:
        results: one `MeasureResult` for each measure and stack of sites.
        skipped: for each pattern or measure of a panel that the model has no place for, the reason.
    """

    results: Sequence[MeasureResult]
    skipped: Sequence[str] = ()

    def __iter__(self) -> Iterator[MeasureResult]:
        return iter(self.results)

    @cached_property
    def frame(self) -> pd.DataFrame:
        """All values as one tidy table: site, layer, head, unit, expert (those that apply), measure, value."""
        return _joined([result.rows() for result in self.results])

    @cached_property
    def measures(self) -> list[str]:
        """The names of the values, each once, in order."""
        return list(dict.fromkeys(name for result in self.results for name in result.values))

    def sites(self, measure: str) -> list[Site]:
        """The sites at which a value was measured, in the order of `value`."""
        return [site for result in self._with(measure) for site in result.sites]

    def value(self, measure: str, site: str | None = None) -> Tensor:
        """One value as a tensor, for instance ``value("sink")`` (site, head) or ``value("loss", "logits")`` ().

        Args:
            measure: a name as in the column ``measure``.
            site: one site; all of them, stacked in the order of `sites`, when not given.

        Raises:
            MeasureError: no such value, or the sites have different shapes and none was named.
            SiteError: it was not measured at this site.
        """
        found = self._with(measure)
        if site is not None:
            at = {s.name: (result, i) for result in found for i, s in enumerate(result.sites)}
            if site not in at:
                raise SiteError(f"{measure!r} was not measured at {site!r}{nearest(site, at)}")
            result, i = at[site]
            return result.per_site(measure)[i]
        import torch

        parts = [result.per_site(measure) for result in found]
        if len({part.shape[1:] for part in parts}) > 1:
            shapes = ", ".join(f"{r.sites[0].local} {tuple(p.shape[1:])}" for r, p in zip(found, parts, strict=True))
            raise MeasureError(f"{measure!r} has a shape of its own at each of {shapes}; name one site")
        return torch.cat(parts)

    def records(self, units: bool = False) -> list[dict[str, Any]]:
        """The rows as plain dicts for JSON: keys absent where they do not apply, ``None`` for what is not a number.

        Args:
            units: whether to give the rows of single units as well, of which a model may have a million.
        """
        frame = self.frame
        if not units and "unit" in frame:
            frame = frame[frame["unit"].isna()]
        places = [column for column in frame.columns if column in PLACES]
        columns = {name: frame[name].astype(object).where(frame[name].notna(), None).tolist() for name in frame.columns}
        return [
            {
                "site": columns["site"][i],
                **{place: int(at) for place in places if (at := columns[place][i]) is not None},
                "measure": columns["measure"][i],
                "value": finite_or_none(columns["value"][i]),
            }
            for i in range(len(frame))
        ]

    def _with(self, measure: str) -> list[MeasureResult]:
        found = [result for result in self.results if measure in result.values]
        if not found:
            raise MeasureError(f"no value {measure!r} was measured{nearest(measure, self.measures)}")
        return found


def finite_or_none(x: float | None) -> float | None:
    """JSON has no NaN and no infinity."""
    return None if x is None or not math.isfinite(x) else float(x)


def tidy(
    values: Mapping[str, Tensor], value_dims: Mapping[str, tuple[str, ...]], sites: Sequence[Site]
) -> pd.DataFrame:
    """Values as a tidy table, one row for each number.

    Units of a site whose features have several dims are told apart by head or expert: the units of ``attn.z`` get both
    a head and a unit, those of ``moe.router`` an expert.

    Args:
        values: (site, *value dims); the first dim may be missing for a single site.
        value_dims: for each value its dims after the stack dims; values with dims that have no column are left out.
        sites: one for each entry of the stack.
    """
    import pandas as pd

    parts = []
    for name, dims in value_dims.items():
        if name not in values or not _TABLE_DIMS.issuperset(dims):
            continue
        array = _per_site(values[name], len(dims), len(sites), name).double().cpu().numpy()
        index = np.indices(array.shape).reshape(array.ndim, -1)
        columns: dict[str, Any] = {"site": np.array([site.name for site in sites], dtype=object)[index[0]]}
        layers = [site.layer for site in sites]
        if any(layer is not None for layer in layers):
            columns["layer"] = pd.array(layers, dtype="Int64")[index[0]]
        for dim, at, width in zip(dims, index[1:], array.shape[1:], strict=True):
            columns |= _features(sites[0], at, width) if dim == "unit" else {dim: at}
        parts.append(pd.DataFrame({**columns, "measure": name, "value": array.reshape(-1)}))
    return _joined(parts)


def _joined(parts: Iterable[pd.DataFrame]) -> pd.DataFrame:
    import pandas as pd

    parts = list(parts)
    places = [place for place in PLACES if any(place in part for part in parts)]
    if not parts:
        return pd.DataFrame({"site": [], "measure": [], "value": []})
    for place in places:
        parts = [
            part.assign(**{place: pd.array([pd.NA] * len(part), dtype="Int64")}) if place not in part else part
            for part in parts
        ]
    order = ["site", *places, "measure", "value"]
    joined = pd.concat([part[order] for part in parts], ignore_index=True)
    return joined.astype(dict.fromkeys(places, "Int64"))


def _features(site: Site, unit: np.ndarray, width: int) -> dict[str, np.ndarray]:
    features = [(dim, size) for dim, size in zip(site.dims, site.sizes, strict=False) if dim not in STREAM_DIMS]
    if len(features) == 1 and features[0][0] != "expert":
        return {"unit": unit}
    sizes = [size or 0 for _, size in features]
    if not features or math.prod(sizes) != width:
        return {"unit": unit}
    columns: dict[str, np.ndarray] = {}
    rest, rest_sizes = [], []
    for (dim, size), at in zip(features, np.unravel_index(unit, sizes), strict=True):
        if dim in ("head", "kv_head"):
            columns["head"] = at
        elif dim == "expert":
            columns["expert"] = at
        else:
            rest.append(at)
            rest_sizes.append(size)
    if rest:
        columns["unit"] = np.ravel_multi_index(tuple(rest), tuple(rest_sizes))
    return columns


def _per_site(value: Tensor, ndim: int, sites: int, name: str) -> Tensor:
    shape = value.shape[value.ndim - ndim :]
    if value.numel() != sites * math.prod(shape):
        raise MeasureError(
            f"{name!r} has the shape {tuple(value.shape)}, and there are {sites} sites: one for each entry"
        )
    return value.reshape(sites, *shape)
