"""Sites: the named places where tensors flow, and the patterns that select them.

Dims have one word each, everywhere: batch, pos, d_model, head, kv_head, d_head, query, key, d_mlp, expert, choice
(the slots of a router's top k), vocab, class, layer; for plain modules also channel, height, width and unit.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

from .errors import SiteError, nearest

MODULE_PREFIX = "module:"

# Dims that count tokens or rows; every other dim is a feature of one token.
STREAM_DIMS = ("batch", "pos", "query", "key", "height", "width")

# The dims by which one chooses positions and heads, and the stacks of blocks that put their name before their sites'.
TIME_DIMS = ("pos", "query")
HEAD_DIMS = ("head", "kv_head")
STACKS = ("encoder", "decoder", "text", "vision")


def axis_of(dims: tuple[str, ...], names: tuple[str, ...]) -> int | None:
    """Where the first dim with one of these names is, or ``None``.

    >>> axis_of(("batch", "head", "query", "key"), TIME_DIMS)
    2
    """
    return next((axis for axis, dim in enumerate(dims) if dim in names), None)


@dataclass(frozen=True, eq=False)
class Site:
    """One named place in a model.

    Attributes:
        name: what one asks for, such as ``blocks.3.attn.pattern``.
        dims: the words of its dims in order, such as ``("batch", "head", "query", "key")``.
        sizes: the size of each dim as far as the model fixes it; ``None`` for batch and positions.
        layer: the index of the block it belongs to, or ``None``.
        writable: whether a clamp may change it.
        address: where it is found; private to the taps.
        causal: whether a position here knows only itself and earlier ones.
    """

    name: str
    dims: tuple[str, ...]
    sizes: tuple[int | None, ...] = ()
    layer: int | None = None
    writable: bool = True
    address: object = field(default=None, repr=False, compare=False)
    causal: bool = True

    @cached_property
    def local(self) -> str:
        """The name without its layer: ``blocks.*.attn.pattern``; sites of equal `local` may be stacked."""
        return re.sub(r"(^|\.)blocks\.\d+\.", r"\1blocks.*.", self.name)

    @property
    def stack(self) -> str:
        """Its stack where there are several: ``"encoder"``, ``"decoder"``, ``"text"`` or ``"vision"``; else ``""``."""
        first = self.name.partition(".")[0]
        return first if first in STACKS else ""

    def size(self, dim: str) -> int | None:
        """The size of a dim, or ``None`` when it varies or the site does not have it."""
        return dict(zip(self.dims, self.sizes, strict=False)).get(dim)

    def __getstate__(self) -> dict[str, object]:
        # The address leads into a model; a site that travels to another process leaves it behind.
        return {**self.__dict__, "address": None}

    def __str__(self) -> str:
        shape = ", ".join(d if s is None else f"{d} {s}" for d, s in itertools.zip_longest(self.dims, self.sizes))
        return f"{self.name} [{shape}]{'' if self.writable else ' (read only)'}"


def expand(pattern: str) -> list[str]:
    """The patterns that `{x,y}` and `{a..b}` stand for; `*` is left as it is.

    >>> expand("blocks.{0..2}.mlp.{act,out}")[:3]
    ['blocks.0.mlp.act', 'blocks.0.mlp.out', 'blocks.1.mlp.act']
    """
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices = []
    for i, part in enumerate(parts):
        if i % 2 == 0:
            choices.append([part])
            continue
        span = re.fullmatch(r"(\d+)\.\.(\d+)", part)
        if span:
            first, last = int(span[1]), int(span[2])
            if last < first:
                raise SiteError(f"the range {{{part}}} in {pattern!r} runs backwards; write the smaller layer first")
            choices.append([str(n) for n in range(first, last + 1)])
        else:
            choices.append(part.split(","))
    return ["".join(combination) for combination in itertools.product(*choices)]


def _regex(pattern: str) -> re.Pattern[str]:
    # A star stands for one part of a dotted name (and may be a piece of it), as in a file glob.
    return re.compile("".join("[^.]*" if c == "*" else re.escape(c) for c in pattern))


def select(pattern: str, names: Collection[str], hint: Callable[[str], str] | None = None) -> list[str]:
    """The names that a pattern selects, in the order of `names`; `SiteError` when any part of it selects none.

    Args:
        pattern: a name, or a pattern with `*`, `{a..b}` and `{x,y}`.
        names: what there is.
        hint: gives the end of the error message for a part that selects nothing; by default the nearest names.

    >>> select("*.out", ["attn.out", "mlp.act", "mlp.out"])
    ['attn.out', 'mlp.out']
    """
    found: set[str] = set()
    for one in expand(pattern):
        if one in names:
            found.add(one)
            continue
        regex = _regex(one)
        hits = [name for name in names if regex.fullmatch(name)] if "*" in one else []
        if not hits:
            what = f"{one!r} (from {pattern!r})" if one != pattern else repr(pattern)
            raise SiteError(f"no site matches {what}{hint(one) if hint else nearest(one, names)}")
        found.update(hits)
    return [name for name in names if name in found]


class SiteTable:
    """The sites of one model, in the order in which its forward reaches them."""

    def __init__(self, sites: Iterable[Site] = ()):
        self._sites = {site.name: site for site in sites}
        self._matches: dict[str, tuple[Site, ...]] = {}

    def __iter__(self) -> Iterator[Site]:
        return iter(self._sites.values())

    def __len__(self) -> int:
        return len(self._sites)

    def __contains__(self, name: str) -> bool:
        return name in self._sites

    def __getitem__(self, name: str) -> Site:
        try:
            return self._sites[name]
        except KeyError:
            raise SiteError(f"no site {name!r}{nearest(name, self._sites)}") from None

    def __repr__(self) -> str:
        lines = [str(site) for site in itertools.islice(self, 60)]
        if len(self) > 60:
            lines.append(f"... and {len(self) - 60} more")
        return "\n".join(lines)

    def match(self, pattern: str) -> tuple[Site, ...]:
        """The sites that a pattern selects, in forward order; `SiteError` with the nearest names when none."""
        if pattern not in self._matches:
            names = select(pattern, self._sites, self._hint)
            self._matches[pattern] = tuple(self._sites[name] for name in names)
        return self._matches[pattern]

    def _hint(self, pattern: str) -> str:
        layers = sorted({site.layer for site in self if site.layer is not None})
        asked = re.search(r"blocks\.(\d+)\.", pattern)
        if layers and asked and int(asked[1]) not in layers:
            return f"; this model has blocks {layers[0]} to {layers[-1]}"
        if "*" in pattern:
            return nearest(pattern, dict.fromkeys(site.local for site in self))
        return nearest(pattern, self._sites)
