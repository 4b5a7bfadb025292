"""Documents: where text comes from, as a stream of named pieces that never holds more than one of them.

A document longer than `PIECE` characters comes in several pieces, cut where a line ends, so that neither reading nor
tokenising it needs memory in proportion to its length.
"""

from __future__ import annotations

import codecs
import glob
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import TextError, nearest, nearest_beside

PIECE = 1 << 18  # characters; tokenising takes some 500 bytes for each
_WINDOW = 1 << 14  # how far back from the end of a piece a place to cut it is looked for
_HEAD = 1 << 13  # bytes in which a NUL tells a binary file, as git does it
_MARKS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16",
          codecs.BOM_UTF16_BE: "utf-16"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a document; `last` ends the document."""

    name: str
    text: str
    last: bool


class Documents:
    """The documents of a source, in an order that is the same at every pass.

    Args:
        source: a file, a folder (its text files, recursively, by name, files before folders), a glob such as
            ``"corpus/**/*.md"``; a dataset of the `datasets` library or a pandas DataFrame; an iterable of strings,
            of (name, text) pairs or of rows; a mapping of names to texts.
        column: which column of a dataset, table or row holds the text; ``text`` unless given.
        encoding: of files.

    Attributes:
        label: the source in words.
        binary: files of a folder that were left out in the last pass because they hold no text.

    Raises:
        TextError: for a source that does not exist, that cannot be decoded, or that holds something else than text.

    >>> [piece.text for piece in Documents(["one", ("second", "two")])]
    ['one', 'two']
    """

    def __init__(self, source: Any, column: str | None = None, encoding: str = "utf-8"):
        self.source, self.column = source, column
        # A byte order mark is not a character of the text.
        self.encoding = "utf-8-sig" if _codec(encoding) == "utf-8" else encoding
        self.binary: list[str] = []
        self._files: list[tuple[str, Path]] = []
        self._spent = False
        self.once = False
        if isinstance(source, (str, os.PathLike)):
            self.label = self._find(source)
        elif isinstance(source, Mapping):
            if any(hasattr(part, "column_names") for part in source.values()):
                raise TextError(f"this is a dataset of several splits; choose one: {', '.join(map(str, source))}")
            self.label = f"{len(source)} named texts"
        elif (columns := _columns(source)) is not None:
            self.column = _choose(column, columns)
            self.label = f"column {self.column!r} of a {type(source).__name__}"
        elif isinstance(source, Iterable) and not isinstance(source, (bytes, bytearray)):
            self.once = iter(source) is source
            count = f"{len(source)} texts" if hasattr(source, "__len__") else "texts"
            self.label = f"{count} from a {type(source).__name__}"
        else:
            raise TextError(f"text is a file, a folder, an iterable of strings or a dataset, not {_kind(source)}")

    def __iter__(self) -> Iterator[Piece]:
        if self.once and self._spent:
            raise TextError(
                f"this text was given as a {type(self.source).__name__}, which can be read only once, and it has been; "
                "give a list, or make a new Text from a new one"
            )
        self._spent = True
        if self._files:
            yield from self._read_files()
            return
        for name, text in self._items():
            yield from _pieces(name, (text[i : i + PIECE] for i in range(0, len(text), PIECE)))

    def _items(self) -> Iterator[tuple[str, str]]:
        source = self.source
        if isinstance(source, Mapping):
            source = source.items()
        elif hasattr(source, "select_columns"):  # a dataset: reads no other column
            source = source.select_columns([self.column])
        elif hasattr(source, "itertuples"):  # a DataFrame
            source = source[self.column]
        for number, item in enumerate(source):
            name, text = f"#{number}", item
            if isinstance(item, Mapping):
                column = self.column or "text"
                if column not in item:
                    raise TextError(f"row {number} has no column {column!r}{nearest(column, map(str, item))}")
                text = item[column]
            elif isinstance(item, (tuple, list)) and len(item) == 2 and all(isinstance(part, str) for part in item):
                name, text = item
            if not isinstance(text, str):
                raise TextError(f"text {number} is {_kind(text)}, not a string (nor a (name, text) pair of strings)")
            yield name, text

    def _find(self, source: str | os.PathLike[str]) -> str:
        path = Path(source).expanduser()
        if self.column is not None:
            raise TextError(f"column={self.column!r} goes with a dataset or with rows, and {str(source)!r} is a path")
        try:
            is_file, is_folder = path.is_file(), path.is_dir()
        except (OSError, ValueError):  # far too long for a name, or with a NUL in it: no path at all
            is_file = is_folder = False
        if is_file:
            self._files = [(path.name, path)]
            return f"file {path}"
        if is_folder:
            self._files = list(_walk(path))
            if not self._files:
                raise TextError(f"the folder {path} holds no files (hidden ones are left out)")
            return f"folder {path} ({len(self._files)} files)"
        if any(sign in str(source) for sign in "*?["):
            found = sorted(p for p in glob.glob(str(path), recursive=True) if os.path.isfile(p))
            if not found:
                raise TextError(f"no file matches {str(source)!r}")
            self._files = [(Path(p).as_posix(), Path(p)) for p in found]
            return f"{source} ({len(found)} files)"
        raise TextError(_missing(path, str(source)))

    def _read_files(self) -> Iterator[Piece]:
        self.binary = []
        for name, path in self._files:
            try:
                if _is_binary(path, self.encoding):
                    if len(self._files) == 1:
                        raise TextError(f"{path} is a binary file (it has NUL bytes), not text")
                    self.binary.append(name)
                    continue
                with open(path, encoding=self.encoding) as file:
                    yield from _pieces(name, iter(lambda: file.read(PIECE), ""))
            except UnicodeError:
                raise TextError(_undecodable(path, self.encoding)) from None
            except OSError as error:
                raise TextError(f"{path} cannot be read: {error.strerror or error}") from error


def _pieces(name: str, chunks: Iterable[str]) -> Iterator[Piece]:
    held = ""
    for chunk in chunks:
        held += chunk
        if len(held) > PIECE:
            cut = _cut(held)
            yield Piece(name, held[:cut], last=False)
            held = held[cut:]
    yield Piece(name, held, last=True)


def _cut(text: str) -> int:
    # Between a line end and a character, else before a single space: there every usual pre-tokenizer cuts as well, so
    # the tokens are those of the whole document.
    start = max(0, len(text) - _WINDOW)
    for pattern in (r"\S\n(?=\S)", r"\S(?= \S)"):
        ends = [match.end() for match in re.finditer(pattern, text[start:])]
        if ends:
            return start + ends[-1]
    return len(text)


def _walk(folder: Path) -> Iterator[tuple[str, Path]]:
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = Path(place, name)
            if not name.startswith(".") and path.is_file():
                yield path.relative_to(folder).as_posix(), path


def _is_binary(path: Path, encoding: str) -> bool:
    with open(path, "rb") as file:
        head = file.read(_HEAD)
    if b"\0" not in head or _codec(encoding).startswith(("utf-16", "utf-32")):
        return False
    return not head.startswith(tuple(_MARKS))  # text of another encoding: let decoding say so


def _undecodable(path: Path, encoding: str) -> str:
    asked = "utf-8" if encoding == "utf-8-sig" else encoding
    at, found, head = _first_bad_byte(path, encoding)
    mark = next((name for mark, name in _MARKS.items() if head.startswith(mark)), None)
    if mark:
        advice = f"it starts with the byte order mark of {mark}: pass encoding={mark!r}"
    else:
        advice = "pass the encoding that it has, such as encoding='cp1252' or encoding='latin-1'"
    return f"{path} is not {asked}: byte {at} ({found.hex(' ')}) cannot be decoded; {advice}"


def _first_bad_byte(path: Path, encoding: str) -> tuple[int, bytes, bytes]:
    decoder, read, head = codecs.getincrementaldecoder(encoding)(), 0, b""
    with open(path, "rb") as file:
        while True:
            chunk = file.read(1 << 20)
            head, read = head or chunk[:4], read + len(chunk)
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                # What the decoder was given ends where the chunk ends, but may begin before or after it.
                return read - len(error.object) + error.start, error.object[error.start : error.end], head
            except UnicodeError:  # utf-16 without its mark has no place to point at
                return 0, head, head
            if not chunk:
                return read, b"", head


def _missing(path: Path, source: str) -> str:
    if len(source) > 255 or "\n" in source:
        shown = source if len(source) <= 80 else f"{source[:77]}..."
        return f"a string is taken for a path, and there is no {shown!r}; to give the text itself, pass [text]"
    parent = path.parent
    while not parent.is_dir() and parent != parent.parent:
        path, parent = parent, parent.parent
    near = nearest_beside(path)
    return f"there is no file or folder {source!r}{near} (in {parent}); to give the text itself, pass [text]"


def _codec(encoding: str) -> str:
    try:
        return codecs.lookup(encoding).name
    except LookupError:
        raise TextError(f"there is no encoding {encoding!r}; usual ones are utf-8, utf-16, cp1252, latin-1") from None


def _columns(source: Any) -> list[str] | None:
    """The columns of a dataset or table; ``None`` for anything else."""
    if hasattr(source, "select_columns") and hasattr(source, "column_names"):
        return list(source.column_names or ())
    if hasattr(source, "itertuples") and hasattr(source, "columns"):
        return [str(column) for column in source.columns]
    return None


def _choose(column: str | None, columns: list[str]) -> str:
    wanted = column or "text"
    if columns and wanted not in columns:  # a streamed dataset may not know its columns before it is read
        raise TextError(f"there is no column {wanted!r}; the columns are {', '.join(columns)}: pass column=")
    return wanted


def _kind(value: Any) -> str:
    name = type(value).__name__
    return "None" if value is None else f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"
