"""Two sets of features of the same rows, folded: a model beside another, a checkpoint beside another, a model beside a
brain's recordings.

Letters: N rows, U unit of the one, V unit of the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..core.errors import MeasureError
from ..core.fold import Fold, Reduction
from ..core.real import double
from .reservoir import kept, keyed, smallest

# A scatter below this share of the squares around zero is the rounding of a constant: float32 keeps 24 bits of each.
_FLAT = 1e-13


def common_rows(x_NU: Tensor, y_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float64, without the rows that are not finite in one of them.

    Raises:
        MeasureError: they are not two matrices with the same number of rows.
    """
    if not isinstance(x_NU, Tensor) or not isinstance(y_NV, Tensor):
        kinds = f"{type(x_NU).__name__} and {type(y_NV).__name__}"
        raise MeasureError(f"two sets of features are wanted as tensors, not {kinds}; see torch.as_tensor")
    if x_NU.ndim != 2 or y_NV.ndim != 2 or len(x_NU) != len(y_NV):
        raise MeasureError(
            f"two sets of features of the same rows are wanted, (N, unit) and (N, other), not {tuple(x_NU.shape)} and "
            f"{tuple(y_NV.shape)}"
        )
    if not x_NU.is_floating_point() or not y_NV.is_floating_point():
        raise MeasureError(f"features are floating point, not {x_NU.dtype} and {y_NV.dtype}")
    x_NU, y_NV = x_NU.detach(), y_NV.detach().to(x_NU.device)
    keep = x_NU.isfinite().all(1) & y_NV.isfinite().all(1)
    if not bool(keep.all()):
        x_NU, y_NV = x_NU[keep], y_NV[keep]
    return x_NU.double(), y_NV.double()


class Products(NamedTuple):
    """Sums over N rows around the means.

    Attributes:
        count: N.
        mean_x, mean_y: (unit), (other).
        xx, yy, xy: (unit, unit), (other, other), (unit, other): summed outer products of the centred rows.
        a, b: the summed squared lengths around zero.
    """

    count: Tensor
    mean_x: Tensor
    mean_y: Tensor
    xx: Tensor
    yy: Tensor
    xy: Tensor
    a: Tensor
    b: Tensor


def cross_moments(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """What `CrossMoments` folds, of rows in float64."""
    return {
        "count": torch.tensor(len(x), device=x.device),
        "x": x.sum(0),
        "y": y.sum(0),
        "xx": x.T @ x,
        "yy": y.T @ y,
        "xy": x.T @ y,
    }


def centred_products(stats: Mapping[str, Tensor]) -> Products:
    """The products around the means; exactly 0 for a unit that is the same in every row.

    >>> x = torch.full((300, 1), 3.7, dtype=torch.float64)
    >>> centred_products(cross_moments(x, x)).xx.item()
    0.0
    """
    n = double(stats["count"])
    x, y = stats["x"] / n, stats["y"] / n
    xx, yy = stats["xx"].addr(x, x, alpha=-float(n)), stats["yy"].addr(y, y, alpha=-float(n))
    xy = stats["xy"].addr(x, y, alpha=-float(n))
    # What is left of a unit that is nothing but its mean is the rounding of the sums, and must not be divided by.
    of_x, of_y = (
        (centred.diagonal() > _FLAT * around_zero.diagonal()).to(centred.dtype)
        for centred, around_zero in ((xx, stats["xx"]), (yy, stats["yy"]))
    )
    return Products(
        n,
        x,
        y,
        xx * of_x.outer(of_x),
        yy * of_y.outer(of_y),
        xy * of_x.outer(of_y),
        stats["xx"].diagonal().sum(),
        stats["yy"].diagonal().sum(),
    )


class CrossMoments(Fold):
    """Base of what needs only the second moments of two sets of features and of one with the other.

    Memory is (U^2 + V^2 + U V) float64 numbers. Rows that are not finite are left out.
    """

    reductions: ClassVar[dict[str, Reduction]] = {
        "count": "sum",
        "x": "sum",
        "y": "sum",
        "xx": "sum",
        "yy": "sum",
        "xy": "sum",
    }
    needs: ClassVar[int] = 2

    def statistics(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """count: (); x, y: sums; xx, yy, xy: summed outer products; all in float64."""
        return cross_moments(*common_rows(x, y))

    def centred(self, stats: Mapping[str, Tensor]) -> Products:
        """The products around the means.

        Raises:
            MeasureError: too few rows.
        """
        if int(stats["count"]) < self.needs:
            raise MeasureError(
                f"{type(self).__name__} needs {self.needs} rows or more, and there were {int(stats['count'])}"
            )
        return centred_products(stats)


class PairedSample(Fold):
    """Base of what compares all pairs of rows: a bounded sample of rows, the same whatever the order they came in.

    Args:
        size: rows kept; up to so many, all of them. Time and memory go with its square.
    """

    reductions: ClassVar[dict[str, Reduction]] = {"sample": "cat", "units": "max"}
    needs: ClassVar[int] = 3

    def __init__(self, size: int = 1024, **options: object):
        super().__init__(**options)
        if size < self.needs:
            raise MeasureError(f"size={size}: {type(self).__name__} needs {self.needs} rows or more")
        self.size = size

    def bounded(self, name: str, rows: Tensor) -> Tensor:
        """The smallest keys stay."""
        return smallest(rows, self.size)

    def statistics(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """sample: (size, 2 + unit + other), keys and rows; units: how many of them are of x."""
        x_NU, y_NV = common_rows(x, y)
        units = torch.tensor(float(x_NU.shape[1]), device=x_NU.device)
        return {"sample": keyed(torch.cat([x_NU, y_NV], 1), self.size), "units": units}

    def rows(self, stats: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The rows of both that were kept.

        Raises:
            MeasureError: too few of them.
        """
        rows, units = kept(stats["sample"]), int(stats["units"])
        if len(rows) < self.needs:
            raise MeasureError(f"{type(self).__name__} needs {self.needs} rows or more, and there were {len(rows)}")
        return rows[:, :units], rows[:, units:]
