"""Stored: a recording on disk, read a slice at a time."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .block import TOKENS
from .errors import RecordingError, SiteError
from .folder import part_path, parts, read_header, shard_path
from .layout import POSITIONS, from_token_major, layout_of, position_axes
from .recording import Recording

_OPEN = 64  # shards kept open
_CHUNK = 64  # sequences copied at a time when a recording is saved elsewhere


class StoredRecording(Recording):
    """A recording in a folder, made by `Recording.open`; has the methods of one in memory.

    What is read is as large as what is asked for: `rec[site]` is all of a site, padded with zeros to the longest
    sequence; `rows`, `sequence` and `batches` read parts.

    Attributes:
        path: the folder.
        complete: whether its writer came to the end of the text, or was interrupted.
    """

    # No __slots__: what is read once is kept in the instance.

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path).expanduser()
        self._header = read_header(self.path)
        self.complete: bool = self._header["complete"]
        self.dims = {name: site["dims"] for name, site in self._header["sites"].items()}
        self._stacks = {}
        runs = [run["meta"] for run in self._header["runs"]]
        self.meta = runs[0] if len(runs) == 1 else {**runs[0], "appended": runs[1:]}
        self._open: dict[int, Any] = {}
        self._read_index()

    def _read_index(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._shards = parts(self.path)
        tables = []
        for number in self._shards:
            try:
                tables.append(pq.read_table(part_path(self.path, number)))
            except (pa.ArrowException, OSError) as error:
                raise RecordingError(f"{part_path(self.path, number)} is damaged: {error}") from error
            self._check_shard(number, tables[-1])
        self._table = pa.concat_tables(tables) if tables else None
        lengths = [] if self._table is None else self._table["length"].to_pylist()
        self._length = torch.tensor(lengths, dtype=torch.long)
        self._offset = torch.cat([torch.zeros(1, dtype=torch.long), self._length.cumsum(0)])
        rows = torch.tensor([0, *(len(table) for table in tables)], dtype=torch.long).cumsum(0)
        self._row_ends = rows.tolist()  # where each shard's sequences begin, and where the last one's end
        self._token_ends = self._offset[rows].tolist()
        self._width = max(lengths, default=0)

    def _check_shard(self, number: int, table: Any) -> None:
        """Raises unless the shard has what the index and the description say."""
        path = shard_path(self.path, number)
        shard = self._shard(number)
        lengths = table["length"].to_pylist()
        expected = {TOKENS: [sum(lengths)]} if self._header["tokens"] else {}
        for name, site in self._header["sites"].items():
            if site["layout"] == "tokens":
                expected[name] = [sum(lengths), *site["features"]]
            elif site["layout"] == "rows":
                expected[name] = [len(lengths), *site["features"]]
        for name, shape in expected.items():
            try:
                found = shard.get_slice(name).get_shape()
            except Exception as error:
                raise RecordingError(f"{path} is damaged: it has no tensor {name!r}") from error
            if list(found) != shape:
                raise RecordingError(f"{path} is damaged: {name} has the shape {found}, and the index says {shape}")

    def _shard(self, number: int) -> Any:
        from safetensors import SafetensorError, safe_open

        if number not in self._open:
            while len(self._open) >= _OPEN:
                self._open.pop(next(iter(self._open)))
            path = shard_path(self.path, number)
            try:
                self._open[number] = safe_open(path, framework="pt")
            except FileNotFoundError as error:
                raise RecordingError(f"{path} is missing, and the index of {self.path} names it") from error
            except (SafetensorError, OSError) as error:
                raise RecordingError(
                    f"{path} is truncated or damaged ({error}); without it and {part_path(self.path, number)} the rest "
                    "of the recording can be read"
                ) from error
        return self._open[number]

    # -- what there is ------------------------------------------------------------------------------------------------

    @property
    def n_sequences(self) -> int:
        return len(self._length)

    @property
    def n_tokens(self) -> int:
        return int(self._offset[-1])

    @cached_property
    def source(self) -> tuple[str, ...]:
        return () if self._table is None else tuple(self._table["source"].to_pylist())

    @cached_property
    def numbers(self) -> tuple[int, ...]:
        return () if self._table is None else tuple(self._table["sequence"].to_pylist())

    @cached_property
    def prompt_length(self) -> tuple[int, ...] | None:
        if self._table is None or self._table["prompt_length"].null_count == len(self._table):
            return None
        return tuple(self._table["prompt_length"].to_pylist())

    @property
    def tokens(self) -> Tensor | None:
        """(batch, pos) ids, padded with 0; read anew each time."""
        return self._tokens(0, self.n_sequences)

    @property
    def mask(self) -> Tensor | None:
        """(batch, pos) bool; ``None`` when all sequences are of one length."""
        return self._mask(0, self.n_sequences)

    # -- reading ------------------------------------------------------------------------------------------------------

    def flat(self, name: str) -> Tensor:
        if name in self.dims and layout_of(self.dims[name]) == "tokens":
            return self.rows(name, 0, self.n_tokens)
        return super().flat(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        if name not in self.dims or layout_of(self.dims[name]) != "tokens":
            return super().rows(name, start, stop)
        start, stop, _ = slice(start, stop).indices(self.n_tokens)
        return self._slice(name, start, stop, self._token_ends)

    def sequence(self, row: int, name: str) -> Tensor:
        if name not in self.dims:
            raise SiteError(f"this recording has no site {name!r}{self._hint(name)}")
        if not -self.n_sequences <= row < self.n_sequences:
            raise IndexError(f"there is no sequence {row}; the recording has {self.n_sequences}")
        row %= self.n_sequences
        layout = layout_of(self.dims[name])
        if layout == "tokens":
            return self.rows(name, int(self._offset[row]), int(self._offset[row + 1]))
        if layout == "rows":
            return self._slice(name, row, row + 1, self._row_ends)[0]
        assert self._table is not None
        shard = self._table["shard"][row].as_py()
        return self._shard(shard).get_tensor(f"{name}#{self._table['sequence'][row].as_py()}").clone()

    def _slice(self, name: str, start: int, stop: int, ends: list[int]) -> Tensor:
        """Rows of a site's tensors as if those of all shards were one; copied, as a shard maps its file."""
        found = [
            self._shard(number).get_slice(name)[max(start, begin) - begin : min(stop, end) - begin]
            for number, begin, end in zip(self._shards, ends, ends[1:], strict=False)
            if max(start, begin) < min(stop, end)
        ]
        return torch.cat(found) if found else self._empty(name)

    def _empty(self, name: str) -> Tensor:
        if name == TOKENS:
            return torch.empty(0, dtype=torch.long)
        site = self._header["sites"][name]
        if site["dtype"] is None:
            raise RecordingError(f"nothing was recorded in {self.path} yet")
        return torch.empty((0, *site["features"]), dtype=getattr(torch, site["dtype"]))

    # -- padded, as in memory -----------------------------------------------------------------------------------------

    def _tensor(self, name: str) -> Tensor:
        return self._padded(name, 0, self.n_sequences)

    def _padded(self, name: str, start: int, stop: int) -> Tensor:
        dims = self.dims[name]
        layout = layout_of(dims)
        if layout == "rows":
            return from_token_major(self._slice(name, start, stop, self._row_ends), dims)
        if layout == "tokens":
            flat = self._slice(name, int(self._offset[start]), int(self._offset[stop]), self._token_ends)
            return from_token_major(self._pad(flat, start, stop), dims)
        parts = [self.sequence(row, name) for row in range(start, stop)]
        if not parts:
            features = iter(self._empty(name).shape[1:])
            return torch.empty([0 if d == "batch" or d in POSITIONS else next(features) for d in dims])
        sizes = [max(part.shape[axis] for part in parts) for axis in range(parts[0].ndim)]
        whole = parts[0].new_zeros((len(parts), *sizes))
        for row, part in zip(whole, parts, strict=True):
            row[tuple(slice(size) for size in part.shape)] = part
        return whole.movedim(0, dims.index("batch"))

    def _pad(self, flat: Tensor, start: int, stop: int) -> Tensor:
        mask = self._mask(start, stop)
        if mask is None:
            width = int(self._length[start]) if stop > start else 0
            return flat.reshape(stop - start, width, *flat.shape[1:])
        padded = flat.new_zeros((*mask.shape, *flat.shape[1:]))
        padded[mask] = flat
        return padded

    def _mask(self, start: int, stop: int) -> Tensor | None:
        length = self._length[start:stop]
        if not len(length) or bool((length == length[0]).all()):
            return None
        return torch.arange(int(length.max())) < length[:, None]

    def _tokens(self, start: int, stop: int) -> Tensor | None:
        if not self._header["tokens"]:
            return None
        flat = self._slice(TOKENS, int(self._offset[start]), int(self._offset[stop]), self._token_ends)
        return self._pad(flat, start, stop)

    def _part(self, names: tuple[str, ...], start: int, stop: int) -> Recording:
        return Recording(
            {name: self._padded(name, start, stop) for name in names},
            {name: self.dims[name] for name in names},
            self._tokens(start, stop),
            self._mask(start, stop),
            self.source[start:stop],
            self.numbers[start:stop],
            prompt_length=None if self.prompt_length is None else self.prompt_length[start:stop],
            meta=self.meta,
        )

    def _save_rows(self) -> int:
        return _CHUNK

    # -- printing -----------------------------------------------------------------------------------------------------

    def _size(self, name: str) -> tuple[tuple[int, ...], str, int]:
        site = self._header["sites"][name]
        features, dims = iter(site["features"] or ()), self.dims[name]
        known = {"batch": self.n_sequences, **dict.fromkeys(POSITIONS, self._width)}
        shape = tuple(known[dim] if dim in known else next(features, 0) for dim in dims)
        pairs = len(position_axes(dims))
        tokens = self.n_sequences if pairs == 0 else int((self._length**pairs).sum())
        itemsize = getattr(torch, site["dtype"]).itemsize if site["dtype"] else 0
        return shape, site["dtype"] or "?", tokens * torch.Size(site["features"] or ()).numel() * itemsize

    def _place(self) -> str:
        return f" in {self.path}{'' if self.complete else ' (interrupted, or being written)'}"
