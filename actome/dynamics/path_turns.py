"""Where a path through several dimensions turns most, and whether its steps in any order would turn as much."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from actome.dynamics.dates import median_interval
from actome.dynamics.smoothing import smooth

Array = np.ndarray


@dataclass(frozen=True)
class PathTurn:
    """The largest turn of a path; medians over runs.

    Attributes:
        at, low, high: its step, with a bootstrap interval over runs.
        angle: in degrees; 0 straight on, 180 back.
        detour: by how much the ways before and after are longer than the line between their ends, in units of the
            path's.
        control: the detour of the path's steps in shuffled order.
        p: share of shuffled orders with as large a detour, the path itself counted.
        runs, angles: of each run.
    """

    at: float
    low: float
    high: float
    angle: float
    detour: float
    control: float
    p: float
    runs: tuple[float, ...] = field(repr=False)
    angles: tuple[float, ...] = field(repr=False)


def path_turn(
    steps: Array, paths: Array, *, bandwidth: float = 0.03, reach: float = 0.2, permutations: int = 99, seed: int = 0
) -> PathTurn:
    """The largest turn of a path.

    At each point of the smoothed path the way over the last `reach` of its length and over the next is compared with
    the straight line between their ends: what is longer is the detour. A path that wavers has no long straight ways to
    turn between, and neither has one whose steps are shuffled, which is the control.

    Args:
        steps: (steps), rising.
        paths: (runs, steps, dims), one path a run.
        bandwidth: of `smooth` over checkpoints, as a share of their number.
        reach: of each of the two ways, as a share of the length of the path.
        permutations: of the control; 0 leaves it NaN.
        seed: of the permutations, and of the interval over runs.

    >>> out, back = np.linspace(0, 1, 20), np.linspace(1, 0.5, 20)
    >>> path = np.stack([np.concatenate([out, back]), np.concatenate([out, out + 1])], 1)
    >>> turn = path_turn(np.arange(40.0), path[None], permutations=19)
    >>> 18 < turn.at < 21, turn.p
    (True, 0.05)
    """
    dates, detours, angles = np.array([_turn(steps, path, bandwidth, reach) for path in paths]).T
    rng = np.random.default_rng(seed)
    null = [
        float(np.median([_turn(steps, _shuffled(path, rng), bandwidth, reach)[1] for path in paths]))
        for _ in range(permutations)
    ]
    detour = float(np.median(detours))
    p = (1 + sum(one >= detour - 1e-12 for one in null)) / (1 + permutations) if permutations else math.nan
    low, high = median_interval(dates, 0.95, 1000, seed)
    return PathTurn(
        float(np.median(dates)), low, high, float(np.median(angles)), detour,
        float(np.median(null)) if null else math.nan, p, tuple(dates.tolist()), tuple(angles.tolist()),
    )  # fmt: skip


def _turn(
    steps: Array, path_SF: Array, bandwidth: float, reach: float, points: int = 100
) -> tuple[float, float, float]:
    """Step, detour and angle of the largest turn, along the path's length: where it rests it has no direction."""
    smoothed = smooth(np.arange(len(steps)), path_SF.T, bandwidth).T
    length_S = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(smoothed, axis=0), axis=1))])
    if length_S[-1] <= 0:
        return float(steps[0]), 0.0, 0.0
    even = np.linspace(0, length_S[-1], points)
    along_PF = np.stack([np.interp(even, length_S, one) for one in smoothed.T], 1)
    w = max(1, round(reach * points))
    before, following = along_PF[w:-w] - along_PF[: -2 * w], along_PF[2 * w :] - along_PF[w:-w]
    a, b = np.linalg.norm(before, axis=1), np.linalg.norm(following, axis=1)
    detour = a + b - np.linalg.norm(before + following, axis=1)
    i = int(detour.argmax())
    cosine = float(before[i] @ following[i]) / max(float(a[i] * b[i]), 1e-12)
    # Length rises strictly where the path moves; where it rests, the first of the steps is taken.
    moving = np.concatenate([[True], np.diff(length_S) > 0])
    at = float(np.interp(even[w + i], length_S[moving], steps[moving]))
    return at, float(detour[i]), float(np.degrees(np.arccos(np.clip(cosine, -1, 1))))


def _shuffled(path_SF: Array, rng: np.random.Generator) -> Array:
    moves = rng.permutation(np.diff(path_SF, axis=0))
    return path_SF[0] + np.concatenate([np.zeros((1, path_SF.shape[1])), np.cumsum(moves, 0)])
