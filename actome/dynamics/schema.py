"""Schema: the tables of a run, how its file is opened, and what its errors mean in words."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import json
import math
import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from actome.core.errors import RunError, nearest_beside

DATABASE, TENSORS, LOCK = "run.sqlite", "tensors", "run.lock"
VERSION = 1
DAMAGE = ("SQLITE_CORRUPT", "SQLITE_NOTADB")
PLACES = ("layer", "head", "unit", "expert")
_APPLICATION = 0x4163746D  # "Actm", by which `file` and SQLite tell whose database it is

# What is said often (which measure at which site, layer, head, unit and expert) is said once, in `series`; a number is
# then a row of `points` of about 20 bytes. SQLite has no NaN: it keeps one as NULL, and nothing else is NULL there.
# There is no index on `points`: it would halve the speed of writing, and reading a million rows takes 0.7 s. What is
# new has the highest ids, and is found at once.
TABLES = {
    "runs": "run INTEGER PRIMARY KEY, uid TEXT NOT NULL UNIQUE, name TEXT NOT NULL UNIQUE, merged_from TEXT",
    "facts": "run INTEGER NOT NULL, about TEXT NOT NULL, key TEXT NOT NULL, type TEXT NOT NULL, value",
    "sessions": "id INTEGER PRIMARY KEY, run INTEGER NOT NULL, started REAL NOT NULL, heartbeat REAL NOT NULL, "
    "ended REAL, status TEXT NOT NULL, error TEXT, host TEXT NOT NULL, pid INTEGER NOT NULL, "
    "first_point INTEGER NOT NULL, from_step INTEGER, about TEXT NOT NULL",
    "series": "id INTEGER PRIMARY KEY, run INTEGER NOT NULL, measure TEXT NOT NULL, site TEXT, layer INTEGER, "
    "head INTEGER, unit INTEGER, expert INTEGER",
    "points": "id INTEGER PRIMARY KEY, series INTEGER NOT NULL, step INTEGER NOT NULL, value REAL",
    "alarms": "id INTEGER PRIMARY KEY, session INTEGER NOT NULL, time REAL NOT NULL, step INTEGER NOT NULL, "
    "name TEXT NOT NULL, level TEXT NOT NULL, site TEXT, message TEXT NOT NULL, advice TEXT, evidence TEXT NOT NULL",
    "events": "id INTEGER PRIMARY KEY, session INTEGER NOT NULL, time REAL NOT NULL, step INTEGER, "
    "name TEXT NOT NULL, data TEXT NOT NULL",
    "tensors": "id INTEGER PRIMARY KEY, session INTEGER NOT NULL, time REAL NOT NULL, step INTEGER NOT NULL, "
    "name TEXT NOT NULL, site TEXT, dtype TEXT NOT NULL, shape TEXT NOT NULL, shard TEXT NOT NULL, key TEXT NOT NULL",
}
COLUMNS = {
    table: tuple(column.strip().split()[0] for column in columns.split(",")) for table, columns in TABLES.items()
}

# For whoever looks with the sqlite3 command.
_VIEW = """CREATE VIEW measured AS SELECT points.id, runs.name AS run, step, site, layer, head, unit, expert, measure,
    value FROM points JOIN series ON series.id = points.series JOIN runs ON runs.run = series.run"""


def connect(path: Path, *, write: bool = False) -> sqlite3.Connection:
    """A connection to the database of a run; transactions are begun by whoever wants one.

    A run on a medium that cannot be written is read as it lies there, which is right once it has ended well.
    """
    # Never through `open`: closing any other descriptor of the file would drop the locks that SQLite holds on it.
    file = f"file:{quote(str(path.absolute()))}"
    if write:
        return sqlite3.connect(file, uri=True, isolation_level=None, check_same_thread=False, timeout=30)
    still = not os.access(path.parent, os.W_OK) and not _filled(path.with_name(f"{path.name}-wal"))
    # Read-only; the mode "ro" alone would need a place for the index of the write-ahead log.
    mode = "immutable=1" if still else "mode=ro"
    return sqlite3.connect(f"{file}?{mode}", uri=True, isolation_level=None, check_same_thread=False, timeout=30)


def _filled(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def lay(db: sqlite3.Connection) -> None:
    """Makes the tables, within a transaction that the caller has begun."""
    for table, columns in TABLES.items():
        db.execute(f"CREATE TABLE {table}({columns})")
    db.execute(_VIEW)
    db.execute(f"PRAGMA application_id = {_APPLICATION}")
    db.execute(f"PRAGMA user_version = {VERSION}")


def begun(path: Path) -> bool:
    """Whether the folder holds the tables of a run, and not only what a writer left that was killed before it began."""
    if not (path / DATABASE).exists():
        return False
    with reading(path):
        db = connect(path / DATABASE)
        try:
            return db.execute("PRAGMA application_id").fetchone()[0] != 0 or bool(
                db.execute("SELECT 1 FROM sqlite_master").fetchone()
            )
        finally:
            db.close()


def check(path: Path) -> None:
    """Raises unless the folder holds a run that this version reads."""
    database = path / DATABASE
    if path.exists() and not path.is_dir():
        raise RunError(f"{path} is a file; a run is a folder with {DATABASE} in it")
    if not path.is_dir():
        raise RunError(f"there is no run {path}{nearest_beside(path)}")
    if not database.exists():
        raise RunError(f"{path} is not a run: it has no {DATABASE}")
    if not begun(path):
        raise RunError(f"{path} holds an empty run: its writer was killed before it began. Create it again")
    with reading(path):
        db = connect(database)
        try:
            application = db.execute("PRAGMA application_id").fetchone()[0]
            version = db.execute("PRAGMA user_version").fetchone()[0]
        finally:
            db.close()
    if application != _APPLICATION:
        raise RunError(f"{database} is a SQLite database, and not of a run of actome")
    if version > VERSION:
        raise RunError(
            f"{path} has schema version {version}, and this actome reads up to {VERSION}: use a later actome"
        )


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Says what a failure to read means, and what can be done."""
    try:
        yield
    except (sqlite3.Error, UnicodeDecodeError) as error:
        name = getattr(error, "sqlite_errorname", "")
        if name == "SQLITE_BUSY":
            raise RunError(f"{path} is busy for more than 30 seconds: {error}") from error
        if name.startswith(("SQLITE_CANTOPEN", "SQLITE_READONLY", "SQLITE_PERM")):
            raise RunError(
                f"{path} cannot be opened: {error}. A run whose writer did not end needs a folder that can be written: "
                "copy the folder to such a place"
            ) from error
        raise RunError(damage(path, error)) from error


def damage(path: Path, error: BaseException) -> str:
    """That a run is damaged, and what can be saved of it."""
    shards = len(list((path / TENSORS).glob("*.safetensors")))
    return (
        f"{path / DATABASE} is damaged ({error}). What can still be read, of its rows and of its {shards} tensor "
        "shards, is saved by actome.dynamics.recover(path, out)"
    )


def why(error: BaseException) -> str:
    """What stopped a file from being written, in words."""
    name, text = getattr(error, "sqlite_errorname", ""), str(error)
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    if full or name == "SQLITE_FULL" or any(f"os error {code}" in text for code in (errno.ENOSPC, errno.EDQUOT)):
        return "the disk is full"
    if name.startswith("SQLITE_IOERR") or getattr(error, "errno", None) == errno.EFBIG or "File too large" in text:
        return f"{text} (a full disk, a quota, or a limit on the size of files)"
    return f"{type(error).__name__}: {text}"


# -- facts: settings with their types ---------------------------------------------------------------------------------


def as_mapping(config: Any) -> dict[str, Any]:
    """A configuration as a dict: of a mapping, a dataclass, an `argparse.Namespace` or None."""
    if config is None:
        return {}
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return dataclasses.asdict(config)
    if isinstance(config, argparse.Namespace):
        return dict(vars(config))
    if isinstance(config, Mapping):
        return {str(key): value for key, value in config.items()}
    raise RunError(f"a configuration is a dict, a dataclass or a Namespace; this is {type(config).__name__}")


def encode(value: Any) -> tuple[str, Any]:
    """A setting as (type, value) in SQLite's own types, so that a query can compare it.

    >>> encode(3), encode(True), encode("adam"), encode([1, 2])
    (('int', 3), ('bool', 1), ('str', 'adam'), ('json', '[1, 2]'))
    """
    if value is None:
        return "none", None
    if isinstance(value, bool):
        return "bool", int(value)
    if isinstance(value, int) and -(2**63) <= value < 2**63:
        return "int", int(value)
    if isinstance(value, float):
        return "float", float(value)
    if isinstance(value, str):
        return "str", str(value)
    return "json", as_json(value)


def decode(kind: str, value: Any) -> Any:
    """The setting again."""
    if kind == "json":
        return json.loads(value)
    if kind == "float":
        return math.nan if value is None else float(value)
    return bool(value) if kind == "bool" else value


def as_json(value: Any) -> str:
    """Anything as JSON; what JSON has no word for is written as Python would print it, numbers of numpy and torch as
    numbers, small arrays as lists."""
    return json.dumps(value, default=_plain, ensure_ascii=False)


def _plain(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=str)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    listed = getattr(value, "tolist", None)  # numpy and torch
    return listed() if listed is not None and getattr(value, "size", None) is not None else str(value)
