"""The least model of a circuit whose parts all have to be there: a product of vectors, learned by gradient descent."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from actome.core.errors import MeasureError

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class RankOneTensor:
    r"""Fits :math:`a \otimes b \otimes c` to a rank-one tensor of unit vectors, from a small random start.

    :math:`L = \frac12 \lVert a \otimes b \otimes c - a^* \otimes b^* \otimes c^* \rVert^2`. The gradient for one
    vector is proportional to how much of the *others* is there, so that all stay small together for long and then come
    up at once. With two of three clamped to the truth the third is learned at a constant rate and nothing stands still.

    Args:
        sizes: of the vectors; one entry a part of the circuit, two parts or more.
        scale: length of each vector at the start.
        seed: of the truth and of the start.

    Raises:
        MeasureError: fewer than two parts, sizes below 1, or a scale of 0 or less.

    Source: Singh et al. 2024, What needs to go right for an induction head? (toy model of interacting subcircuits).

    Example:
        >>> from actome.dynamics import phase_change
        >>> toy = RankOneTensor()
        >>> curve, clamped = toy.run(1500), toy.run(1500, clamped=(1, 2))
        >>> phase_change(curve["step"], curve["loss"]).ratio > 2
        True
        >>> phase_change(clamped["step"], clamped["loss"]).ratio < 0.1
        True
    """

    sizes: tuple[int, ...] = (8, 8, 8)
    scale: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if len(self.sizes) < 2 or min(self.sizes) < 1 or not self.scale > 0:
            raise MeasureError(
                f"sizes={self.sizes}, scale={self.scale}: two sizes or more of at least 1, and a scale > 0"
            )

    def start(self) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """The truth, of length one, and where the fit begins, of length `scale` and turned towards the truth.

        Each start has a positive part along its truth: the sign of the product is not what the model is about, and one
        that is wrong costs a saddle of its own.
        """
        rng = np.random.default_rng(self.seed)
        truth = [_unit(rng.standard_normal(n)) for n in self.sizes]
        begin = [_unit(rng.standard_normal(n)) for n in self.sizes]
        begin = [self.scale * (v if v @ t >= 0 else -v) for v, t in zip(begin, truth, strict=True)]
        return truth, begin

    def run(self, steps: int = 2000, *, lr: float = 0.05, clamped: Collection[int] = ()) -> pd.DataFrame:
        """Gradient descent.

        Args:
            steps: how many.
            lr: size of a step.
            clamped: parts, counted from 0, that are held at the truth throughout.

        Returns:
            One row for each step from 0 to `steps`: step, loss, and for each part i ``part_i``, its component along
            the truth (1 when learned).

        Raises:
            MeasureError: a part that does not exist, or all of them clamped.
        """
        import pandas as pd

        parts = range(len(self.sizes))
        if not set(clamped) < set(parts):
            raise MeasureError(f"clamped={tuple(clamped)}: give some of the parts 0 to {len(self.sizes) - 1}, not all")
        truth, now = self.start()
        for i in clamped:
            now[i] = truth[i].copy()
        rows: list[Mapping[str, float]] = []
        for step in range(steps + 1):
            along = np.array([v @ t for v, t in zip(now, truth, strict=True)])
            square = np.array([v @ v for v in now])
            loss = 0.5 * (square.prod() - 2 * along.prod() + 1)
            rows.append({"step": step, "loss": loss, **{f"part_{i}": along[i] for i in parts}})
            now = [
                v if i in clamped else v - lr * (np.delete(square, i).prod() * v - np.delete(along, i).prod() * t)
                for i, (v, t) in enumerate(zip(now, truth, strict=True))
            ]
        return pd.DataFrame(rows)


def _unit(v: np.ndarray) -> np.ndarray:
    return v / np.linalg.norm(v)
