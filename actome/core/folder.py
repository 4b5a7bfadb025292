"""Folder: the recording on disk, its files and how one of them is put in place.

    recording.json                what was recorded, and in words how to read it
    shards/00000.safetensors ...  the tensors of some sequences
    index.parquet/00000.parquet   one row for each of these sequences; the shard of a part has the same number

A file is written under a hidden name, flushed to the disk and then renamed, first the shard and then its part of the
index. A shard without a part is not of the recording, so it is whole at every moment.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .errors import RecordingError, nearest_beside
from .layout import layout_of, stored_dims

FORMAT, VERSION = "actome-recording", 1
HEADER, SHARDS, INDEX = "recording.json", "shards", "index.parquet"

ABOUT = (
    "Activations of a neural network. Each row of the Parquet dataset index.parquet is one sequence: its running "
    "number in the text (sequence), the number of its file shards/NNNNN.safetensors (shard), which of the shard's "
    "sequences it is (row), where its tokens begin in the shard (start), how many they are (length), what it was read "
    "from (source), and how many of its tokens were given when the others were generated (prompt_length). Order by "
    "shard and row. Padding is not stored. By its layout a site is found in a shard as follows. tokens: a tensor "
    "under the site's name, (tokens of the shard, *features), of which a sequence has the rows start to start + "
    "length; the key 'tokens' holds the token ids in the same way. rows: a tensor under the site's name, (sequences "
    "of the shard, *rest). pairs: a tensor for each sequence under the key SITE#SEQUENCE. 'stored' gives the dims of "
    "what is stored, 'dims' those that the site has in the model, 'features' the sizes of the dims that are neither "
    "tokens nor sequences. A shard that the index does not name was interrupted and does not count."
)


def shard_path(folder: Path, number: int) -> Path:
    return folder / SHARDS / f"{number:05d}.safetensors"


def part_path(folder: Path, number: int) -> Path:
    return folder / INDEX / f"{number:05d}.parquet"


def parts(folder: Path) -> list[int]:
    """The numbers of the index parts, which are those of the shards that count."""
    return sorted(int(path.stem) for path in (folder / INDEX).glob("*.parquet") if path.stem.isdigit())


def commit(target: Path, write: Callable[[Path], object]) -> None:
    """Puts a file in place so that there is either the whole of it or nothing, whatever happens meanwhile."""
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        write(temporary)
        _flush(temporary)
        os.replace(temporary, target)
        _flush(target.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _flush(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows cannot flush a folder
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def new_header(sites: Mapping[str, tuple[str, ...]], meta: Mapping[str, Any]) -> dict[str, Any]:
    """The description of a recording that nothing was added to; its first batch decides dtypes and sizes."""
    from actome import __version__

    described = {
        name: {"dims": dims, "layout": layout_of(dims), "stored": stored_dims(dims), "dtype": None, "features": None}
        for name, dims in sites.items()
    }
    return {
        "format": FORMAT,
        "version": VERSION,
        "actome": __version__,
        "about": ABOUT,
        "complete": False,
        "tokens": None,
        "sites": described,
        "runs": [{"first_shard": 0, "meta": meta}],
    }


def write_header(folder: Path, header: dict[str, Any]) -> None:
    text = json.dumps(header, indent=1, default=str, ensure_ascii=False)
    commit(folder / HEADER, lambda path: path.write_text(text, encoding="utf-8"))


def is_recording(folder: Path) -> bool:
    """Whether a folder says of itself that it is a recording."""
    try:
        return json.loads((folder / HEADER).read_text(encoding="utf-8")).get("format") == FORMAT
    except (OSError, ValueError, AttributeError):
        return False


def read_header(folder: Path) -> dict[str, Any]:
    """What `recording.json` says; `RecordingError` when there is no recording, or one that this cannot read."""
    path = folder / HEADER
    if not folder.is_dir():
        raise RecordingError(f"there is no recording {folder}{nearest_beside(folder)}")
    if not path.exists():
        raise RecordingError(f"{folder} is not a recording: it has no {HEADER}")
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
        if header["format"] != FORMAT:
            raise RecordingError(f"{folder} is not a recording: its {HEADER} says format {header['format']!r}")
        if header["version"] > VERSION:
            raise RecordingError(
                f"{folder} has format version {header['version']}, and this actome reads up to {VERSION}; it was "
                f"written by actome {header.get('actome')}: use that one or a later one"
            )
        header["sites"] = {name: {**site, "dims": tuple(site["dims"])} for name, site in header["sites"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecordingError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    return header


def wipe(folder: Path) -> None:
    """Deletes the shards and the index of a recording, and no other file."""
    # The index first: an index without its shards would be a broken recording, and this way it is an empty one.
    for part in (folder / INDEX, folder / SHARDS):
        if part.exists():
            shutil.rmtree(part)


def clean(folder: Path) -> None:
    """Deletes what an interrupted writer left that is not of the recording."""
    numbers = set(parts(folder))
    for part in (folder / SHARDS, folder / INDEX):
        for path in part.iterdir() if part.is_dir() else ():
            if path.name.startswith(".") or (path.stem.isdigit() and int(path.stem) not in numbers):
                path.unlink()


def check_same_run(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises when a run that resumes reads another text or another model than the one that was interrupted."""
    now = json.loads(json.dumps(now, default=str))
    for key in ("model", "text"):
        if key not in before or key not in now:
            continue
        one, two = (part[key] if isinstance(part[key], dict) else {"name": part[key]} for part in (before, now))
        differ = [word for word in {**one, **two} if word != "counts" and one.get(word) != two.get(word)]
        if differ:
            word = differ[0]
            raise RecordingError(
                f"{folder} was made with another {key} ({word}: {one.get(word)!r} then, {two.get(word)!r} now), so its "
                "sequences are not those of this run; use append=True to add them, or another folder"
            )


def why(error: BaseException) -> str:
    """What stopped a file from being written, in words; libraries hide a full disk in several ways."""
    text = str(error)
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    if full or any(f"os error {code}" in text for code in (errno.ENOSPC, errno.EDQUOT)):
        return "the disk is full"
    return f"{type(error).__name__}: {text}"
