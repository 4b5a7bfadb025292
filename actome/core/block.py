"""Block: a batch of padded tensors taken apart into the unpadded sequences that a recording on disk is made of."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import RecordingError
from .layout import POSITIONS, check_width, layout_of, stored_dims, token_major

if TYPE_CHECKING:
    import pyarrow as pa

TOKENS = "tokens"  # the key of the token ids in a shard


@dataclass(slots=True)
class Block:
    """Some sequences without padding, on the CPU: tensors by their keys in a shard, and a list entry for each row."""

    tensors: dict[str, Tensor]
    sequence: list[int]
    length: list[int]
    source: list[str]
    prompt_length: list[int | None]


def index_of(blocks: Sequence[Block], shard: int) -> pa.Table:
    """The part of the index that belongs to a shard made of these blocks."""
    import pyarrow as pa

    def column(name: str) -> list[Any]:
        return [value for block in blocks for value in getattr(block, name)]

    length = column("length")
    return pa.table(
        {
            "sequence": pa.array(column("sequence"), pa.int64()),
            "shard": pa.array([shard] * len(length), pa.int64()),
            "row": pa.array(range(len(length)), pa.int64()),
            "start": pa.array(itertools.accumulate(length[:-1], initial=0), pa.int64()),
            "length": pa.array(length, pa.int64()),
            "source": pa.array(column("source"), pa.string()),
            "prompt_length": pa.array(column("prompt_length"), pa.int64()),
        }
    )


class Sheet:
    """A padded batch that is known to fit a recording, from which rows can be taken.

    Args:
        sites: the dims of each site.
        tensors: one for each site.
        tokens: (batch, pos) or ``None``.
        mask: (batch, pos) or ``None``.
        source, sequence, prompt_length: an entry for each row.

    Attributes:
        kinds: dtype and feature sizes of each site, as the header keeps them.
        nbytes: what each row needs on disk.
    """

    def __init__(
        self,
        sites: Mapping[str, tuple[str, ...]],
        tensors: Mapping[str, Tensor],
        tokens: Tensor | None,
        mask: Tensor | None,
        source: Sequence[str],
        sequence: Sequence[int],
        prompt_length: Sequence[int] | None,
    ):
        if tensors.keys() != sites.keys():
            differ = ", ".join(sorted(tensors.keys() ^ sites.keys()))
            raise RecordingError(f"a batch has to have the sites of the recording, no more and no fewer; see {differ}")
        self.rows = len(sequence)
        self.sites, self.tokens, self.mask = sites, tokens, mask
        self.sequence, self.source = list(sequence), list(source) or [""] * self.rows
        self.prompt_length = [None] * self.rows if prompt_length is None else list(prompt_length)
        self.major = {name: _major(name, tensors[name].detach(), dims) for name, dims in sites.items()}
        counts = {name: x.shape[0] for name, x in self.major.items()}
        counts |= {"source": len(self.source), "prompt_length": len(self.prompt_length)}
        counts |= {name: x.shape[0] for name, x in (("tokens", tokens), ("mask", mask)) if x is not None}
        for name, count in counts.items():
            if count != self.rows:
                raise RecordingError(f"{name} has {count} rows, and the numbers of {self.rows} sequences were given")
        self.width = self._width()
        self.length = [self.width] * self.rows if mask is None else [int(n) for n in mask.sum(dim=1)]
        self.kinds = {name: self._kind(name) for name in sites}
        self.nbytes = [sum(self._bytes(name, length) for name in sites) for length in self.length]
        if tokens is not None:
            self.nbytes = [nbytes + 8 * length for nbytes, length in zip(self.nbytes, self.length, strict=True)]

    def take(self, begin: int, stop: int) -> Block:
        """The rows from `begin` to `stop`, copied."""
        part, tensors = slice(begin, stop), {}
        keep = None if self.mask is None else self.mask[part].flatten().nonzero().flatten()
        for name, dims in self.sites.items():
            x, layout = self.major[name][part], layout_of(dims)
            if layout == "tokens":
                tensors[name] = _unpad(x, keep)
            elif layout == "rows":
                tensors[name] = _copy(x)
            else:
                for row in range(begin, stop):
                    tensors[f"{name}#{self.sequence[row]}"] = self._pairs(name, row)
        if self.tokens is not None:
            tensors[TOKENS] = _unpad(self.tokens[part].long(), keep)
        return Block(tensors, self.sequence[part], self.length[part], self.source[part], self.prompt_length[part])

    def _pairs(self, name: str, row: int) -> Tensor:
        x = self.major[name][row]
        if self.mask is not None:
            keep = self.mask[row].nonzero().flatten().to(x.device)
            for axis in self._sides(name):
                x = x.index_select(axis, keep)
        return _copy(x)

    def _sides(self, name: str) -> list[int]:
        """The axes of one sequence's pairs that run over the tokens, and not over a cache or another sequence."""
        rest = stored_dims(self.sites[name])
        shape = self.major[name].shape[1:]
        return [axis for axis, dim in enumerate(rest) if dim in POSITIONS and shape[axis] == self.width]

    def _width(self) -> int:
        by_token = [name for name, dims in self.sites.items() if layout_of(dims) == "tokens"]
        given = self.tokens if self.tokens is not None else self.mask
        if given is not None:
            width = given.shape[1]
        elif by_token:
            width = self.major[by_token[0]].shape[1]
        else:  # only pairs, of which the first side counts, or only rows, which have no tokens
            sides = (self.major[name].shape[1 + dims.index(dim)]
                     for name in self.sites for dims in [stored_dims(self.sites[name])]
                     for dim in dims if dim in POSITIONS)  # fmt: skip
            width = next(sides, 0)
        for name in by_token:
            check_width(name, self.major[name].shape[1], width)
        if self.mask is not None:
            check_width("the mask", self.mask.shape[1], width)
        return width

    def _kind(self, name: str) -> dict[str, Any]:
        x, stored = self.major[name], stored_dims(self.sites[name])
        layout = layout_of(self.sites[name])
        shape = x.shape[2:] if layout == "tokens" else x.shape[1:]
        names = stored if layout == "pairs" else stored[1:]
        features = [size for size, dim in zip(shape, names, strict=True) if dim not in POSITIONS]
        return {"dtype": str(x.dtype).removeprefix("torch."), "features": features}

    def _bytes(self, name: str, length: int) -> int:
        x, layout = self.major[name], layout_of(self.sites[name])
        if layout == "tokens":
            return length * math.prod(x.shape[2:]) * x.itemsize
        if layout == "rows":
            return math.prod(x.shape[1:]) * x.itemsize
        sides = self._sides(name)
        return math.prod(length if axis in sides else n for axis, n in enumerate(x.shape[1:])) * x.itemsize


def _major(name: str, x: Tensor, dims: tuple[str, ...]) -> Tensor:
    if x.ndim != len(dims):
        raise RecordingError(f"{name} has the shape {tuple(x.shape)}, and its dims are ({', '.join(dims)})")
    return token_major(name, x, dims)


def _unpad(x: Tensor, keep: Tensor | None) -> Tensor:
    x = x.flatten(0, 1)
    return _copy(x) if keep is None else x.index_select(0, keep.to(x.device)).cpu()


def _copy(x: Tensor) -> Tensor:
    # The caller may write into its tensors again before the shard is full.
    return torch.empty(x.shape, dtype=x.dtype).copy_(x)
