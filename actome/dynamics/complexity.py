"""How complex a predictor is: the bits of its code and its numbers, compressed."""

from __future__ import annotations

import bz2
import inspect
import lzma
from collections.abc import Callable
from typing import Any

import numpy as np

from actome.core.errors import MeasureError


def description_bits(code: str | Callable[..., Any], parameters: Any = None, *, decimals: int = 3) -> int:
    """Bits that a predictor's code and its array of numbers take when compressed, an upper bound of their complexity.

    Args:
        code: source text, or a function whose source is taken.
        parameters: its numbers, any shape; None for a predictor without.
        decimals: to which they are rounded first. Random floats at full precision cannot be compressed, and would say
            more of their last digits than of the predictor.

    Returns:
        The smaller of what lzma and bz2 give for the code, plus the same for the array.

    >>> rng = np.random.default_rng(0)
    >>> few, many = (description_bits("mean(urns)", rng.random((count, 6))) for count in (4, 256))
    >>> 20 * few < many, description_bits("x" * 999) < description_bits("x + 1")* 10
    (True, True)
    """
    text = code if isinstance(code, str) else inspect.getsource(code)
    bits = 8 * _compressed(text.encode())
    if parameters is not None:
        values = np.asarray(parameters, dtype=np.float64)
        if not np.isfinite(values).all():
            raise MeasureError("parameters of a predictor are not finite")
        whole = np.round(values * 10**decimals).astype(np.int64)
        kind = next(
            kind for kind in (np.int16, np.int32, np.int64) if np.abs(whole).max(initial=0) <= np.iinfo(kind).max
        )
        bits += 8 * _compressed(whole.astype(kind).tobytes())
    return bits


def _compressed(data: bytes) -> int:
    # Raw LZMA, without a container whose header would outweigh a short predictor.
    raw = lzma.compress(data, lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}])
    return min(len(raw), len(bz2.compress(data, 9)))
