"""The reference band of a depth profile: where the trained checkpoints of the demo model lie.

It is something to compare with, made from one family of small models on one kind of text. It says nothing of what is
healthy in another family. `scripts/reference_band.py` makes it.
"""

from __future__ import annotations

import json
from functools import lru_cache
from importlib.resources import files
from typing import Any

import pandas as pd


@lru_cache(maxsize=1)
def _data() -> dict[str, Any]:
    place = files("actome.report").joinpath("assets", "reference_band.json")
    return json.loads(place.read_text(encoding="utf-8"))


def about() -> str:
    """What the band is, in one sentence."""
    return _data()["about"]


def band(measure: str, kind: str, layers: int) -> pd.DataFrame:
    """The band of one value at one kind of site, on the layer axis of a model with so many layers.

    Relative depth makes models comparable: what holds after block l of L is at depth (l + 1) / L, the stream before the
    first block at 0.

    Returns:
        Columns layer (a fraction where depths differ), low, high; empty when there is no band.

    >>> band("rms", "resid.post", 8)["layer"].tolist()
    [-1.0, 1.0, 3.0, 5.0, 7.0]
    """
    found = _data()["values"].get(measure, {}).get(kind)
    if found is None:
        return pd.DataFrame({"layer": [], "low": [], "high": []})
    depth = pd.Series(found["depth"], dtype=float)
    return pd.DataFrame({"layer": depth * layers - 1, "low": found["low"], "high": found["high"]})
