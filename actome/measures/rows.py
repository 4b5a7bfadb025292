"""Rows of features with labels: which of them count, and in which precision."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.errors import MeasureError
from ..core.real import wide

UNITS_OF_INFORMATION = {"bits": 2.0, "nats": torch.e}


def finite_rows(name: str, x_NU: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Rows without NaN and infinity, in float32 or better, and the same rows of what comes with them.

    Args:
        name: of who asks, for the error.
        x_NU: (rows, units), floating point.
        others: tensors with as many rows; not looked into.

    Raises:
        MeasureError: not two dims, not floating point, or another number of rows.

    >>> finite_rows("Example", torch.tensor([[1.0], [torch.nan]]), torch.tensor([0, 1]))
    (tensor([[1.]]), tensor([0]))
    """
    for given in (x_NU, *others):
        if not isinstance(given, Tensor):
            raise MeasureError(f"{name} takes tensors, not {type(given).__name__}; see torch.as_tensor")
    if x_NU.ndim != 2 or not x_NU.is_floating_point():
        raise MeasureError(f"{name} takes floating-point features (rows, units), not {x_NU.dtype} {tuple(x_NU.shape)}")
    for other in others:
        if other.ndim < 1 or len(other) != len(x_NU):
            raise MeasureError(f"{name} was given {len(x_NU)} rows together with {tuple(other.shape)}")
    x_NU = wide(x_NU.detach())
    others = tuple(other.to(x_NU.device) for other in others)
    keep = x_NU.isfinite().all(-1)
    return (x_NU, *others) if bool(keep.all()) else (x_NU[keep], *(other[keep] for other in others))


def checked_labels(name: str, y_N: Tensor, num_classes: int) -> Tensor:
    """Class labels as int64, refused when they are none of `num_classes`.

    >>> checked_labels("Example", torch.tensor([0, 2]), 3)
    tensor([0, 2])
    """
    if not isinstance(y_N, Tensor):
        raise MeasureError(f"{name} takes labels as a tensor, not {type(y_N).__name__}; see torch.as_tensor")
    if y_N.ndim != 1 or y_N.is_floating_point():
        raise MeasureError(f"{name} takes integer labels (rows), not {y_N.dtype} {tuple(y_N.shape)}")
    if len(y_N) and (int(y_N.min()) < 0 or int(y_N.max()) >= num_classes):
        raise MeasureError(
            f"{name} was made for the labels 0 to {num_classes - 1}, and was given {int(y_N.min())} to {int(y_N.max())}"
        )
    return y_N.long()


def nats_per(unit: str) -> float:
    """How many nats the unit of information is.

    >>> round(nats_per("bits"), 4), nats_per("nats")
    (0.6931, 1.0)
    """
    if unit not in UNITS_OF_INFORMATION:
        raise MeasureError(f"unit={unit!r} does not exist; choose 'bits' or 'nats'")
    return float(torch.tensor(UNITS_OF_INFORMATION[unit], dtype=torch.float64).log())
