"""Scans as plain data: frames to rows and back, strict JSON, and files that are written whole or not at all."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from actome.core.table import PLACES

COLUMNS = ["site", *PLACES, "measure", "value"]


def typed(frame: pd.DataFrame) -> pd.DataFrame:
    """With the columns of a scan in their types."""
    return frame.astype({**dict.fromkeys(PLACES, "Int64"), "value": "float64"})


def frame_of(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """The frame that `records` wrote."""
    return typed(pd.DataFrame(rows).reindex(columns=COLUMNS))


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows as plain dicts: places absent where they do not apply, ``None`` for what is not a number."""
    places = [(place, frame[place].astype(object).where(frame[place].notna(), None).tolist()) for place in PLACES]
    return [
        {
            "site": site,
            **{place: int(column[i]) for place, column in places if column[i] is not None},
            "measure": measure,
            "value": strict(float(value)),
        }
        for i, (site, measure, value) in enumerate(
            zip(frame["site"], frame["measure"], frame["value"], strict=True)
        )
    ]  # fmt: skip


def strict(value: Any) -> Any:
    """Without what JSON does not have."""
    if isinstance(value, Mapping):
        return {str(key): strict(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [strict(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def lines(items: list[dict[str, Any]]) -> str:
    """JSON of a list, one item to a line."""
    return "[\n" + ",\n".join(json.dumps(item, allow_nan=False) for item in items) + "\n]" if items else "[]"


def write(path: str | Path, content: str) -> Path:
    """Writes a whole file or none: an interruption leaves what was there before.

    What is there and is no file, such as ``/dev/null`` or a pipe, is written to and stays what it is.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        path.write_text(content, encoding="utf-8")
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(content, encoding="utf-8")
    return part.replace(path)
