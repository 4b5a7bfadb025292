"""How long gradients, updates and weights are, component by component, around one step of the optimizer."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..alarms.base import Reading

# Up to so many trained entries the weights before a step are copied whole, and update norms are exact.
EXACT = 25_000_000
# Of a larger tensor so many entries stand for all in what is estimated; see `Chosen`.
ENTRIES = 16_384


class Chosen:
    r"""Some entries of each tensor, the same at every step, from which the norm of a difference is estimated.

    Of a tensor with n entries, m = min(n, 16384) are drawn with a fixed seed, and for a difference d
    :math:`\lVert d \rVert \approx \sqrt{\tfrac{n}{m} \sum_{i \text{ chosen}} d_i^2}`: exact for small tensors, and for
    others within about 1 % where the entries of d are alike, more where few of them carry it (a row of an embedding).

    >>> chosen = Chosen({"w": torch.ones(1000, 100)})
    >>> before = chosen.take({"w": torch.ones(1000, 100)})
    >>> float(chosen.distances({"w": torch.full((1000, 100), 3.0)}, before)["w"].round())
    632.0
    """

    def __init__(self, tensors: Mapping[str, Tensor], entries: int = ENTRIES):
        self.entries = entries
        self._index: dict[str, Tensor | None] = {}
        for name, tensor in tensors.items():
            self._add(name, tensor)

    def _add(self, name: str, tensor: Tensor) -> None:
        n = tensor.numel()
        if n <= self.entries:
            self._index[name] = None
            return
        # A seed of its own for each tensor, so that what else is trained does not matter.
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        index = torch.randint(0, n, (self.entries,), generator=generator)
        self._index[name] = index.to(tensor.device)

    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The chosen entries of each tensor, copied."""
        return {name: self._of(name, tensor).clone() for name, tensor in tensors.items()}

    def _of(self, name: str, tensor: Tensor) -> Tensor:
        if name not in self._index:
            self._add(name, tensor)
        index, flat = self._index[name], tensor.detach().reshape(-1)
        return flat if index is None else flat.index_select(0, index)

    def distances(self, tensors: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The estimated norm of what changed in each tensor since its entries were taken; scalars on its device."""
        names = [name for name in tensors if name in before]
        now = [self._of(name, tensors[name]) for name in names]
        apart = [a.float() - before[name].to(a.device).float() for name, a in zip(names, now, strict=True)]
        out = {}
        for name, norm in zip(names, lengths(apart), strict=True):
            n = tensors[name].numel()
            out[name] = norm * (n / min(n, self.entries)) ** 0.5
        return out


def lengths(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The Euclidean norm of each tensor, a float32 scalar (float64 of float64), with as few kernels as there can be."""
    plain = [t.coalesce().values() if t.is_sparse else t for t in tensors]
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, t in enumerate(plain):
        groups.setdefault((t.device, t.dtype), []).append(i)
    out: list[Tensor] = [torch.empty(0)] * len(plain)
    for (_, dtype), members in groups.items():
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        for i, norm in zip(members, torch._foreach_norm([plain[i] for i in members], 2, dtype=wide), strict=True):
            out[i] = norm
    return out


def fetch(scalars: Iterable[Tensor]) -> list[float]:
    """Scalars as floats, with one transfer from each device.

    >>> fetch([torch.tensor(1.0), torch.tensor(2)])
    [1.0, 2.0]
    """
    scalars = list(scalars)
    devices: dict[torch.device, list[int]] = {}
    for i, one in enumerate(scalars):
        devices.setdefault(one.device, []).append(i)
    out = [0.0] * len(scalars)
    for device, members in devices.items():
        wide = torch.float32 if device.type == "mps" else torch.float64
        stacked = torch.stack([scalars[i].detach().reshape(()).to(wide) for i in members]).tolist()
        for i, value in zip(members, stacked, strict=True):
            out[i] = value
    return out


def by_component(measure: str, norms: Mapping[str, float], component: Mapping[str, str]) -> list[Reading]:
    """Norms of tensors as readings: one for everything together, and one for each component.

    >>> by_component("grad_norm", {"a": 3.0, "b": 4.0}, {"a": "embed", "b": "embed"})[0].value
    5.0
    """
    if not norms:
        return []
    squares: dict[str, float] = {}
    for name, norm in norms.items():
        where = component.get(name, name)
        squares[where] = squares.get(where, 0.0) + norm * norm
    whole = Reading(measure, sum(squares.values()) ** 0.5)
    return [whole, *(Reading(measure, square**0.5, site, _layer(site)) for site, square in squares.items())]


def _layer(site: str) -> int | None:
    _, found, rest = site.rpartition("blocks.")
    number = rest.partition(".")[0]
    return int(number) if found and number.isdigit() else None
