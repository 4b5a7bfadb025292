"""Selecting parts of a tensor: indices proved to exist, and cuts that copy no more than they must."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .errors import SiteError
from .run import absolute


def chosen(index: Any, size: int | None, what: str) -> list[int]:
    """Indices as a list of non-negative ints, each proved to be below `size`."""
    if isinstance(index, int):
        index = [index]
    elif isinstance(index, slice):
        if size is None:
            raise SiteError(f"{what}s: a slice needs a dim of known size; give a list")
        index = range(*index.indices(size))
    out = []
    for i in index.tolist() if isinstance(index, Tensor) else index:
        i = int(i)
        if size is not None and not -size <= i < size:
            raise SiteError(f"{what} {i} does not exist; there are {size} (0 to {size - 1})")
        out.append(i + size if i < 0 and size is not None else i)
    return out


def take(x: Tensor, axis: int, index: list[int]) -> Tensor:
    """`x` at some indices of one axis; a view where they are neighbours."""
    if index and index == list(range(index[0], index[-1] + 1)):
        return x.narrow(axis, index[0], len(index))
    return x.index_select(axis, torch.tensor(index, device=x.device))


def take_positions(x: Tensor, axis: int, positions: Any, mask: Tensor | None) -> Tensor:
    """`x` at some positions of each row; with padding, rows are gathered each at their own places.

    Raises:
        SiteError: no such position, or rows have different numbers of them.
    """
    total = x.shape[axis]
    if mask is None:
        index = absolute(positions, total)
        if not index:
            raise SiteError(f"no position {positions!r} in sequences of {total} tokens")
        return take(x, axis, index)
    mask = mask[:, -total:] if mask.shape[1] >= total else mask
    rows = []
    for start, count in zip(mask.int().argmax(dim=1).tolist(), mask.sum(dim=1).tolist(), strict=True):
        rows.append([start + p for p in absolute(positions, int(count))])
    counts = {len(row) for row in rows}
    if len(counts) != 1 or not rows[0]:
        raise SiteError(
            f"positions {positions!r} select {sorted(counts)} tokens in rows of different length; "
            "choose positions that every row has, or record row by row"
        )
    index = torch.tensor(rows, device=x.device)
    shape = [1] * x.ndim
    shape[0], shape[axis] = index.shape
    expanded = list(x.shape)
    expanded[axis] = index.shape[1]
    return x.gather(axis, index.view(shape).expand(expanded))
