"""A curve in straight pieces: the best parting there is, by dynamic programming."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from actome.core.errors import MeasureError
from actome.dynamics.series import Series, series

Array = np.ndarray
LONGEST = 3000


@dataclass(frozen=True)
class Segments:
    """A curve in straight pieces.

    Attributes:
        starts: index of each piece's first point.
        dates: between pieces, halfway between their points.
        slopes, intercepts: of each piece's line, in the units of x and y.
        errors: squared error with 1, 2, ... pieces.
        criterion: the penalised criterion for the same; the lowest was chosen unless `count` was given.
        fitted: (points).
    """

    starts: tuple[int, ...]
    dates: tuple[float, ...]
    slopes: tuple[float, ...]
    intercepts: tuple[float, ...]
    errors: tuple[float, ...]
    criterion: tuple[float, ...]
    fitted: Array = field(repr=False)

    @property
    def count(self) -> int:
        return len(self.starts)


def segments(
    x: Any, y: Any = None, count: int | None = None, *, most: int = 6, smallest: int = 3, penalty: float = 3.0
) -> Segments:
    """Parts a curve into straight pieces that need not meet, with the least squared error there is.

    Exact dynamic programming over the squared errors of all stretches, O(points^2) in memory and time.

    Args:
        x, y: (points) each, or a frame with columns `step`, `value` and perhaps `seed` (then the mean is taken).
        count: how many pieces; by default the one with the lowest n ln(error / n) + penalty (3 count - 1) ln n.
        most: no more pieces than this are tried.
        smallest: points in a piece, two or more.
        penalty: 1 is BIC with the dates counted as parameters, which finds too many in correlated noise; the default is
            cautious.

    Source: Bellman and Roth 1969 (dynamic programming); Yao 1988 (criterion).

    >>> x = np.arange(30.0)
    >>> found = segments(x, np.where(x < 12, 5.0, x - 7))
    >>> found.dates, [round(slope, 6) for slope in found.slopes]
    ((11.5,), [0.0, 1.0])
    """
    curve = checked(x, y, 2 * smallest, "segments")
    n = len(curve)
    if smallest < 2 or (count is not None and not 1 <= count <= n // smallest):
        raise MeasureError(f"{n} points cannot be parted into {count} pieces of at least {max(smallest, 2)}")
    most = min(count if count is not None else most, n // smallest)
    u = (curve.x - curve.x.mean()) / (np.ptp(curve.x) or 1)
    error = _stretches(u, curve.y - curve.y.mean(), smallest)
    best, back = _program(error, most)
    # Errors below rounding are zero, whichever number of pieces left them.
    floor = 1e-13 * max(float(((curve.y - curve.y.mean()) ** 2).sum()), 1e-300)
    errors = [max(float(one), 0.0) for one in best[:, n]]
    criterion = [
        n * math.log(max(one, floor) / n) + penalty * (3 * k + 2) * math.log(n) for k, one in enumerate(errors)
    ]
    chosen = count if count is not None else 1 + int(np.argmin(criterion))
    ends, j = [], n
    for k in range(chosen - 1, -1, -1):
        ends.append(j)
        j = int(back[k, j])
    starts = (0, *reversed(ends[1:])) if chosen > 1 else (0,)
    lines = [np.polynomial.polynomial.polyfit(curve.x[a:b], curve.y[a:b], 1) for a, b in _spans(starts, n)]
    fitted = np.concatenate([a0 + a1 * curve.x[i:j] for (a0, a1), (i, j) in zip(lines, _spans(starts, n), strict=True)])
    dates = tuple(float(curve.x[i - 1] + curve.x[i]) / 2 for i in starts[1:])
    return Segments(
        starts, dates, tuple(float(one[1]) for one in lines), tuple(float(one[0]) for one in lines),
        tuple(errors), tuple(criterion), fitted,
    )  # fmt: skip


def _spans(starts: tuple[int, ...], n: int) -> list[tuple[int, int]]:
    return list(zip(starts, (*starts[1:], n), strict=True))


def _stretches(u: Array, y: Array, smallest: int) -> Array:
    """Squared error of the best line on points i to j - 1, (n + 1, n + 1), infinite where too short."""
    sums = [np.concatenate([[0.0], np.cumsum(one)]) for one in (np.ones_like(u), u, y, u * u, u * y, y * y)]
    m, su, sy, suu, suy, syy = (one[None, :] - one[:, None] for one in sums)
    with np.errstate(all="ignore"):
        vu, cuy, vy = suu - su**2 / m, suy - su * sy / m, syy - sy**2 / m
        error = np.maximum(vy - np.where(vu > 0, cuy**2 / vu, 0), 0)
    return np.where(m >= smallest, error, np.inf)


def _program(error: Array, most: int) -> tuple[Array, Array]:
    """Least squared error of the first j points in k + 1 pieces, and where the last of them begins."""
    n = len(error) - 1
    best, back = np.full((most, n + 1), np.inf), np.zeros((most, n + 1), dtype=np.int64)
    best[0] = error[0]
    for k in range(1, most):
        through = best[k - 1][:, None] + error
        back[k] = through.argmin(0)
        best[k] = through.min(0)
    return best, back


def checked(x: Any, y: Any, minimum: int, what: str, constant: bool = True) -> Series:
    """A curve of no more points than partings can be searched over."""
    curve = series(x, y, minimum=minimum, what=what, allow_constant=constant)
    if len(curve) > LONGEST:
        raise MeasureError(
            f"{len(curve)} points take {len(curve)}^2 stretches; average them into {LONGEST} or fewer first"
        )
    return curve
