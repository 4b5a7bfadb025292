"""Show: how tensors by site are printed, with runs of layers on one line."""

from __future__ import annotations

import re
from collections.abc import Mapping

from .sites import Site

LONGEST = 40  # lines
_LAYER = re.compile(r"((?:^|\.)blocks\.)(\d+)\.")

# Sizes of the dims, name of the dtype, bytes.
Size = tuple[tuple[int, ...], str, int]


def table(dims: Mapping[str, tuple[str, ...]], sizes: Mapping[str, Size]) -> list[str]:
    """One line for each run of sites that differ in their layer alone: site, dims with sizes, dtype, bytes.

    >>> dims = {f"blocks.{i}.resid.post": ("batch", "d_model") for i in range(3)}
    >>> table(dims, dict.fromkeys(dims, ((2, 64), "float32", 512)))
    ['blocks.{0..2}.resid.post  batch 2, d_model 64  float32  1.54 kB']
    """
    groups: dict[tuple[object, ...], list[str]] = {}
    for name in dims:
        shape, dtype, _ = sizes[name]
        groups.setdefault((Site(name, ()).local, tuple(dims[name]), shape, dtype), []).append(name)
    lines = []
    for (_, words, shape, dtype), names in groups.items():
        sized = ", ".join(f"{dim} {size}" for dim, size in zip(words, shape, strict=True))
        lines.append((_run(names), sized, dtype, in_words(sum(sizes[name][2] for name in names))))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines[:LONGEST]]
    return shown + [f"... and {len(lines) - LONGEST} more lines"] * (len(lines) > LONGEST)


def in_words(count: float) -> str:
    """A number of bytes as people say it.

    >>> in_words(12), in_words(37_748_736)
    ('12 B', '37.7 MB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _run(names: list[str]) -> str:
    # blocks.{0..11}.resid.post for twelve layers, as one would ask for them.
    if len(names) == 1:
        return names[0]
    layers = [int(found[2]) for name in names if (found := _LAYER.search(name))]
    span = ",".join(map(str, layers))
    if layers == list(range(layers[0], layers[-1] + 1)):
        span = f"{layers[0]}..{layers[-1]}"
    return _LAYER.sub(lambda found: f"{found[1]}{{{span}}}.", names[0], count=1)
