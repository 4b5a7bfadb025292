"""Smoothing by local straight lines, as an operator, so that its degrees of freedom are known."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from actome.core.errors import MeasureError

Array = np.ndarray
Axis = Literal["linear", "log"]


def smooth(x: Any, y: Any, bandwidth: float = 0.1, axis: Axis = "linear") -> Array:
    """A curve smoothed by local straight lines with a Gaussian kernel, (points), or (series, points) as y is.

    Args:
        bandwidth: standard deviation of the kernel, as a share of the range of x (of log x).

    Source: Fan and Gijbels 1996, Local Polynomial Modelling.

    >>> bool(np.allclose(smooth(np.arange(10.0), 2 * np.arange(10.0)), 2 * np.arange(10.0)))
    True
    """
    return np.asarray(y, dtype=np.float64) @ smoother(along_axis(np.asarray(x, dtype=np.float64), axis), bandwidth).T


def smoother(along: Array, bandwidth: float) -> Array:
    """The matrix that `smooth` multiplies a curve by, (points, points); the identity for a bandwidth of 0."""
    if not bandwidth > 0:
        return np.eye(len(along))
    offset = (along[None, :] - along[:, None]) / (bandwidth * (along[-1] - along[0]))
    # A point far from all others still needs two neighbours for a line.
    width = np.maximum(1.0, np.sort(np.abs(offset), 1)[:, min(2, len(along) - 1)] / 1.5)[:, None]
    weight = np.exp(-0.5 * (offset / width) ** 2)
    s0, s1, s2 = weight.sum(1), (weight * offset).sum(1), (weight * offset**2).sum(1)
    return weight * (s2[:, None] - offset * s1[:, None]) / (s0 * s2 - s1**2)[:, None]


def along_axis(x: Array, axis: Axis) -> Array:
    """x, or its logarithm.

    Raises:
        MeasureError: for an axis that there is not, or a log axis with x of 0 or less.
    """
    if axis not in ("linear", "log"):
        raise MeasureError(f"axis={axis!r} does not exist; choose 'linear' or 'log'")
    if axis == "log" and x.min() <= 0:
        raise MeasureError(f"a log axis takes x above 0, and the smallest is {x.min():g}; leave step 0 out")
    return np.log(x) if axis == "log" else x
