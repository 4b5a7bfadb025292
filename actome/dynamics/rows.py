"""Rows: numbers and tidy tables as they are given, turned into what a run keeps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from actome.core.errors import RunError, nearest

from .schema import PLACES

if TYPE_CHECKING:
    import pandas as pd

KEYS = ("measure", "site", *PLACES)


def number(name: str, value: Any) -> float:
    """One number as a float; `RunError` for anything else.

    >>> number("loss", True)
    1.0
    """
    if isinstance(value, (str, bytes)) or value is None:
        raise RunError(f"{name!r} is {value!r} ({type(value).__name__}); a number is wanted")
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        shape = getattr(value, "shape", None)
        if shape is not None and len(shape):
            raise RunError(f"{name!r} has the shape {tuple(shape)}; one number is wanted, or log_tensor") from error
        raise RunError(f"{name!r} is no number but {type(value).__name__}: {error}") from error


def columns(
    rows: pd.DataFrame | Iterable[Mapping[str, Any]] | Any, step: int | None
) -> tuple[list[tuple[Any, ...]], list[int], Sequence[int], list[float]]:
    """A tidy table as the places that occur in it, and for each row its place, step and value.

    Args:
        rows: a DataFrame, an iterable of dicts, or something with such a `frame`.
        step: of all rows; None when a column says it.

    Returns:
        The places (measure, site, layer, head, unit, expert), each once; the index of each row's place; the steps; the
        values.
    """
    import numpy as np
    import pandas as pd

    frame = getattr(rows, "frame", rows)
    if not isinstance(frame, pd.DataFrame):
        frame = pd.DataFrame(list(frame))
    if frame.empty:
        return [], [], [], []
    for name in ("measure", "value"):
        if name not in frame:
            raise RunError(f"the rows have no column {name!r}; they have {', '.join(map(str, frame.columns))}")
    for name in frame.columns:
        if name not in (*KEYS, "value", "step"):
            raise RunError(f"the rows have a column {name!r}, which a run does not keep{nearest(str(name), KEYS)}")
    if step is None and "step" not in frame:
        raise RunError("the rows have no column 'step', and no step was given")
    if step is not None and "step" in frame:
        raise RunError("the rows have a column 'step', and a step was given too; which is meant?")
    # Lists and a dict: for the small tables of every step pandas' own grouping takes ten times as long.
    lists = [_plain(frame[key]) if key in frame else [None] * len(frame) for key in KEYS]
    index: dict[tuple[Any, ...], int] = {}
    inverse = [index.setdefault(key, len(index)) for key in zip(*lists, strict=True)]
    try:
        steps: Sequence[int] = (
            [step] * len(frame) if step is not None else _whole(frame["step"]).to_numpy(np.int64).tolist()
        )
        places = [(key[0], key[1], *map(_place, key[2:])) for key in index]
        values = frame["value"]
        if values.dtype == object or not pd.api.types.is_numeric_dtype(values):
            values = values.map(lambda x: number("value", x))
        numbers = values.to_numpy(np.float64, na_value=np.nan).tolist()
    except (TypeError, ValueError) as error:
        raise RunError(f"the rows hold something that is no number: {error}") from error
    return places, inverse, steps, numbers


def _plain(column: pd.Series) -> list[Any]:
    """As a list, with None for what is missing."""
    values = column.tolist()
    for i in column.isna().to_numpy().nonzero()[0]:
        values[i] = None
    return values


def _place(at: Any) -> int | None:
    """A layer, head, unit or expert; in a column with gaps pandas may have made it a float."""
    if at is None or type(at) is int:
        return at
    if int(at) != at:
        raise ValueError(f"a place is a whole number; this is {at!r}")
    return int(at)


def _whole(steps: pd.Series) -> pd.Series:
    # Goes through Int64, which refuses halves and keeps what is missing apart.
    whole = steps.astype("Int64")
    if whole.isna().any():
        raise RunError("some rows have no step")
    return whole
