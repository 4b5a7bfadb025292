"""Curves in characters: a line of blocks, and a plot of braille dots; plain ASCII where there is nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

_BLOCKS, _ASCII_BLOCKS = "▁▂▃▄▅▆▇█", "_.-=+*#@"
_FLAT = 1e-9  # a smaller share than this is rounding, and drawn as no change
# The dots of a braille cell, column by column from the top.
_DOTS = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])


def spark(
    values: Sequence[float] | np.ndarray, low: float | None = None, high: float | None = None, *, ascii: bool = False
) -> str:
    """One character for each value, by its height between `low` and `high` (of the values unless given).

    What is not finite leaves a gap; values that are all the same lie in the middle.

    >>> spark([0.0, 1.0, float("nan"), 3.0]), spark([2.0, 2.0])
    ('▁▃ █', '▄▄')
    """
    x = np.asarray(values, dtype=np.float64)
    finite = np.isfinite(x)
    if not finite.any():
        return " " * len(x)
    low = x[finite].min() if low is None else low
    high = x[finite].max() if high is None else high
    ramp = _ASCII_BLOCKS if ascii else _BLOCKS
    if not high - low > _FLAT * max(abs(low), abs(high)):
        return "".join(ramp[len(ramp) // 2 - 1] if ok else " " for ok in finite)
    # Halved before the difference is taken, which could be too large for a float.
    share = np.where(finite, (x / 2 - low / 2) / (high / 2 - low / 2), 0.0)
    rank = np.clip(share * len(ramp), 0, len(ramp) - 1).astype(int)
    return "".join(ramp[i] if ok else " " for i, ok in zip(rank, finite, strict=True))


def pooled(values: np.ndarray, width: int) -> np.ndarray:
    """As many values as there are columns, each the mean of those that fall into it; NaN where none does.

    Fewer values than columns are spread out, each over its share of them.

    Args:
        values: (..., n), in equal steps.
        width: columns, 1 or more.

    >>> pooled(np.array([1.0, 3.0, 5.0, float("nan")]), 2).tolist(), pooled(np.array([1.0, 2.0]), 4).tolist()
    ([2.0, 5.0], [1.0, 1.0, 2.0, 2.0])
    """
    n = values.shape[-1]
    if n == 0:
        return np.full((*values.shape[:-1], width), np.nan)
    if n <= width:
        return values[..., np.arange(width) * n // width]
    edges = np.arange(width) * n // width
    finite = np.isfinite(values)
    total = np.add.reduceat(np.where(finite, values, 0.0), edges, axis=-1)
    count = np.add.reduceat(finite.astype(int), edges, axis=-1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def braille(low: np.ndarray, high: np.ndarray, width: int, height: int, *, ascii: bool = False) -> list[str]:
    """A band between two curves, drawn in dots: 2 across and 4 down in each character.

    Args:
        low, high: (n), in equal steps; NaN leaves a gap. The same array twice draws a line.
        width, height: in characters.

    Returns:
        The rows, the highest first.

    >>> print(*braille(np.arange(8.0), np.arange(8.0), 4, 2), sep="\\n")
      ⡠⠊
    ⡠⠊
    """
    dots = np.zeros((4 * height, 2 * width), bool)
    low, high = bridged(low, 2 * width), bridged(high, 2 * width)
    finite = np.isfinite(low) & np.isfinite(high)
    if finite.any():
        bottom, top = low[finite].min(), high[finite].max()
        if not top > bottom:
            bottom, top = bottom - 1, top + 1
        # Halved before the difference is taken, which could be too large for a float.
        share = [(np.where(finite, x, bottom) / 2 - bottom / 2) / (top / 2 - bottom / 2) for x in (high, low)]
        first, last = (np.rint((1 - x) * (4 * height - 1)).astype(int) for x in share)
        edges = np.arange(2 * width + 1) * len(low) // (2 * width)
        for column in range(2 * width):
            some = np.flatnonzero(finite[edges[column] : edges[column + 1]]) + edges[column]
            if len(some):
                dots[first[some].min() : last[some].max() + 1, column] = True
        _join(dots)
    cells = dots.reshape(height, 4, width, 2).transpose(0, 2, 1, 3)
    if ascii:
        return ["".join("*" if one.any() else " " for one in row).rstrip() for row in cells]
    codes = (cells * _DOTS).sum((2, 3))
    return ["".join(chr(0x2800 + code) if code else " " for code in row).rstrip() for row in codes]


def bridged(values: np.ndarray, least: int = 1) -> np.ndarray:
    """Straight lines over inner gaps, and between values that are fewer than `least`; the ends stay as they are.

    >>> bridged(np.array([1.0, float("nan"), 3.0, float("nan")])).tolist(), bridged(np.array([0.0, 1.0]), 3).tolist()
    ([1.0, 2.0, 3.0, nan], [0.0, 0.5, 1.0])
    """
    known = np.flatnonzero(np.isfinite(values))
    if not len(known):
        return np.full(max(len(values), least), np.nan)
    at = np.linspace(0, len(values) - 1, max(len(values), least))
    return np.interp(at, known, values[known], left=np.nan, right=np.nan)


def _join(dots: np.ndarray) -> None:
    """Fills the way from each column to the next, so that what rises steeply stays a line."""
    filled = np.flatnonzero(dots.any(0))
    reach = {i: np.flatnonzero(dots[:, i])[[0, -1]] for i in filled}
    for a, b in pairwise(filled):
        (top, bottom), (other_top, other_bottom) = reach[a], reach[b]
        if other_top > bottom + 1:
            dots[bottom:other_top, a] = True
        elif other_bottom < top - 1:
            dots[other_bottom + 1 : top, a] = True
