"""Store: writes a recording to disk while it is made, so that what was written stays readable whatever happens."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .block import TOKENS, Block, Sheet, index_of
from .errors import RecordingError
from .folder import (
    HEADER,
    INDEX,
    SHARDS,
    check_same_run,
    clean,
    commit,
    is_recording,
    new_header,
    part_path,
    parts,
    read_header,
    shard_path,
    why,
    wipe,
    write_header,
)
from .layout import POSITIONS


class Writer:
    """Writes a recording, batch by batch; a context manager.

    A shard is put on disk whenever `shard_bytes` are together, and what is complete when the context is left, also
    by an exception or Ctrl-C. A process that is killed loses the shard it was filling and nothing else. The writer
    holds up to twice `shard_bytes`.

    Args:
        path: the folder; made when it does not exist.
        sites: the dims of each site. One of them is the batch.
        append: go on behind what the folder holds, with another text.
        resume: go on with the same text where an interrupted run stopped; `done` says where that is.
        overwrite: delete the recording that the folder holds first. Other files are left alone.
        shard_bytes: the size of a shard; one sequence is never split over two.
        meta: model, text and whatever else is worth keeping, ready for JSON; may be added to until the writer closes.

    Attributes:
        done: how many sequences of this text are safely on disk.
        meta: what will be kept.

    Raises:
        RecordingError: when the folder holds a recording and none of the three options says what to do about it; when
            it holds something else; when what is added is not of the sites, dims, dtypes and sizes that the recording
            has; when the disk is full.

    >>> import tempfile
    >>> from actome.core.recording import Recording
    >>> folder = tempfile.mkdtemp()
    >>> with Writer(folder, {"embed": ("batch", "pos", "d_model")}) as writer:
    ...     writer.add({"embed": torch.zeros(2, 3, 4)}, torch.tensor([[1, 2, 3], [4, 5, 6]]), None, ("a", "b"), (0, 1))
    >>> Recording.open(folder).flat("embed").shape
    torch.Size([6, 4])
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        sites: Mapping[str, Sequence[str]],
        *,
        append: bool = False,
        resume: bool = False,
        overwrite: bool = False,
        shard_bytes: int = 256 << 20,
        meta: Mapping[str, Any] | None = None,
    ):
        if append + resume + overwrite > 1:
            raise RecordingError("append, resume and overwrite exclude one another; choose one")
        self.path, self.shard_bytes = Path(path).expanduser(), shard_bytes
        self._sites = {name: tuple(dims) for name, dims in sites.items()}
        for name, dims in self._sites.items():
            if dims.count("batch") != 1 or sum(dim in POSITIONS for dim in dims) > 2:
                raise RecordingError(
                    f"{name} has the dims ({', '.join(dims)}); to be stored a site needs one batch dim, and two "
                    "position dims at most"
                )
            if name == TOKENS or "#" in name:
                raise RecordingError(f"a site cannot be stored under the name {name!r}")
        self.meta: dict[str, Any] = dict(meta or {})
        self.done = 0
        self._blocks: list[Block] = []
        self._waiting = 0  # bytes in the blocks
        self._last = -1  # the last sequence that was added
        self._closed = False
        try:
            self._begin(append=append, resume=resume, overwrite=overwrite)
        except OSError as error:
            raise RecordingError(f"{self.path} cannot be written: {why(error)}") from error

    # -- beginning ----------------------------------------------------------------------------------------------------

    def _begin(self, *, append: bool, resume: bool, overwrite: bool) -> None:
        path = self.path
        if path.exists() and not path.is_dir():
            raise RecordingError(f"{path} is a file; a recording is a folder")
        # A process that was killed while it wrote the first description has left the beginnings of it.
        filled = path.is_dir() and any(p.name != f".{HEADER}.tmp" for p in path.iterdir())
        if filled and not is_recording(path):
            raise RecordingError(f"{path} is not empty and not a recording; choose another folder")
        if filled and not (append or resume or overwrite):
            raise RecordingError(
                f"{path} holds a recording already; say resume=True to go on where it stopped, append=True to add "
                "another text, overwrite=True to delete it, or choose another folder"
            )
        if filled and overwrite:
            wipe(path)
        path.mkdir(parents=True, exist_ok=True)
        if filled and not overwrite:
            self._header = read_header(path)
            self._continue(append)
        else:
            self._shard = 0
            self._header = new_header(self._sites, self.meta)
        write_header(path, self._header)
        for name in (SHARDS, INDEX):
            (path / name).mkdir(exist_ok=True)

    def _continue(self, append: bool) -> None:
        import pyarrow.parquet as pq

        there = {name: site["dims"] for name, site in self._header["sites"].items()}
        for name in [*self._sites, *there]:
            if there.get(name) != self._sites.get(name):
                then, now = _dims(there.get(name)), _dims(self._sites.get(name))
                raise RecordingError(f"{self.path} was recorded at other sites: {name} is {then} there and {now} now")
        runs, numbers = self._header["runs"], parts(self.path)
        if not append:
            check_same_run(self.path, runs[-1]["meta"], self.meta)
        clean(self.path)
        self._shard = numbers[-1] + 1 if numbers else 0
        self._header["complete"] = False
        if append:
            # A run that was interrupted before its first shard has left nothing to keep.
            runs[:] = [run for run in runs if run["first_shard"] < self._shard]
            runs.append({"first_shard": self._shard, "meta": self.meta})
            return
        self.meta = runs[-1]["meta"] = {**runs[-1]["meta"], **self.meta}
        for number in numbers:
            if number >= runs[-1]["first_shard"]:
                sequence = pq.read_table(part_path(self.path, number), columns=["sequence"])["sequence"]
                self.done += len(sequence)
                self._last = max(self._last, sequence[-1].as_py())

    # -- adding -------------------------------------------------------------------------------------------------------

    def add(
        self,
        tensors: Mapping[str, Tensor],
        tokens: Tensor | None,
        mask: Tensor | None,
        source: Sequence[str],
        sequence: Sequence[int],
        *,
        prompt_length: Sequence[int] | None = None,
    ) -> None:
        """Adds one batch; copies what it keeps, so that the tensors may be used again.

        Args:
            tensors: one for each site, in its dims.
            tokens: (batch, pos) ids, or ``None``; for all batches alike.
            mask: (batch, pos) bool, or ``None`` when every token is real.
            source: for each row, what it was read from; empty when that has no name.
            sequence: for each row, its running number in the text; they ascend.
            prompt_length: for each row, how many of its tokens were given.
        """
        if self._closed:
            raise RecordingError(f"the writer of {self.path} is closed")
        if not len(sequence):
            return
        sheet = Sheet(self._sites, tensors, tokens, mask, source, sequence, prompt_length)
        self._settle(sheet.kinds, tokens is not None)
        for before, number in zip([self._last, *sheet.sequence], sheet.sequence, strict=False):
            if number <= before:
                raise RecordingError(
                    f"sequence {number} comes after sequence {before}, and their numbers ascend"
                    + (f"; to resume, go on with text.skip({self.done})" if self.done else "")
                )
        begin = 0
        for row, nbytes in enumerate(sheet.nbytes):
            if self._waiting and self._waiting + nbytes > self.shard_bytes:
                if row > begin:
                    self._blocks.append(sheet.take(begin, row))
                self._flush()
                begin = row
            self._waiting += nbytes
        self._blocks.append(sheet.take(begin, sheet.rows))
        self._last = sheet.sequence[-1]
        if self._waiting >= self.shard_bytes:
            self._flush()

    def _settle(self, kinds: Mapping[str, Mapping[str, Any]], tokens: bool) -> None:
        """Holds a batch against what was recorded before; the first one decides dtypes and sizes."""
        sites = self._header["sites"]
        if self._header["tokens"] is None:
            self._header["tokens"] = tokens
            for name, kind in kinds.items():
                sites[name].update(kind)
            with self._disk("the description"):
                write_header(self.path, self._header)
        if self._header["tokens"] != tokens:
            raise RecordingError(f"{self.path} was begun {'without' if tokens else 'with'} token ids; it must stay so")
        for name, kind in kinds.items():
            before = {key: sites[name][key] for key in kind}
            if before != kind:
                raise RecordingError(f"{name} has {_kind(before)} in {self.path}, and {_kind(kind)} now")

    # -- writing ------------------------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Puts what was added so far on disk, as a shard of its own."""
        if not self._closed:
            self._flush()

    def _flush(self) -> None:
        if not self._blocks:
            return
        import pyarrow.parquet as pq
        from safetensors.torch import save_file

        # The blocks stay until both files are in place: an interrupted flush is done again when the writer closes.
        tensors: dict[str, list[Tensor]] = {}
        for block in self._blocks:
            for key, tensor in block.tensors.items():
                tensors.setdefault(key, []).append(tensor)
        whole = {key: some[0] if len(some) == 1 else torch.cat(some) for key, some in tensors.items()}
        index = index_of(self._blocks, self._shard)
        shard = shard_path(self.path, self._shard)
        with self._disk(f"shard {self._shard}"):
            commit(shard, lambda path: save_file(whole, path, metadata={"format": "pt"}))
            try:
                commit(part_path(self.path, self._shard), lambda path: pq.write_table(index, path))
            except BaseException:
                shard.unlink(missing_ok=True)
                raise
        self._blocks, self._waiting = [], 0
        self._shard += 1
        self.done += len(index)

    @contextmanager
    def _disk(self, what: str) -> Iterator[None]:
        from safetensors import SafetensorError

        try:
            yield
        except (OSError, SafetensorError) as error:
            self._closed = True
            raise RecordingError(
                f"{what} of {self.path} could not be written: {why(error)}. {self.done} sequences of this text are "
                f"safely on disk and stay readable; to go on, mend that and write with resume=True from "
                f"text.skip({self.done})"
            ) from error

    # -- ending -------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Writes what is left and marks the recording as complete."""
        self._end(complete=True)

    def _end(self, *, complete: bool) -> None:
        if self._closed:
            return
        self._flush()
        self._closed = True
        self._header["complete"] = complete
        self._header["runs"][-1]["meta"] = self.meta
        with self._disk("the description"):
            write_header(self.path, self._header)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._end(complete=kind is None)


def _dims(dims: Sequence[str] | None) -> str:
    return "absent" if dims is None else f"({', '.join(dims)})"


def _kind(kind: Mapping[str, Any]) -> str:
    return f"{kind['dtype']} and feature sizes {kind['features']}"
