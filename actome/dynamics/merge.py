"""Merge: several runs in one store, to be read and compared as one table."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from actome.core.errors import RunError

from .schema import COLUMNS, DATABASE, TENSORS, connect, lay, reading, why
from .shards import shard_name
from .store import RunStore

# Which columns number the rows of which table. Merging adds to each what the table before already holds.
_NUMBERS = {
    "runs": {"run": "runs"},
    "facts": {"run": "runs"},
    "sessions": {"id": "sessions", "run": "runs", "first_point": "points"},
    "series": {"id": "series", "run": "runs"},
    "points": {"id": "points", "series": "series"},
    "alarms": {"id": "alarms", "session": "sessions"},
    "events": {"id": "events", "session": "sessions"},
    "tensors": {"id": "tensors", "session": "sessions"},
}


def merge(runs: Iterable[str | os.PathLike[str]], out: str | os.PathLike[str]) -> RunStore:
    """Puts several runs into one store, from which `frame` and the other tables come with a column ``run``.

    Every run keeps its name; where two have the same, the later one gets a number. A run that is still written is
    taken as it is at that moment. The store appears when it is whole, and is for reading.

    Args:
        runs: folders of runs, or of stores that were merged before.
        out: a folder that does not exist yet.

    Raises:
        RunError: `out` exists, a run is damaged or of a later version, or the same run comes twice.
    """
    folders = [Path(path).expanduser() for path in runs]
    if not folders:
        raise RunError("there are no runs to merge")
    with new_folder(Path(out).expanduser()) as (folder, db):
        taken: dict[str, Path] = {}
        for path in folders:
            _add(db, folder, path, taken)
    return RunStore(out)


@contextmanager
def new_folder(out: Path) -> Iterator[tuple[Path, sqlite3.Connection]]:
    """A folder with the tables of a run, which gets its name when it is whole; not at all when something fails."""
    if out.exists():
        raise RunError(f"{out} exists already; choose another folder")
    folder = out.with_name(f".{out.name}.tmp")
    db = None
    try:
        shutil.rmtree(folder, ignore_errors=True)
        (folder / TENSORS).mkdir(parents=True)
        db = connect(folder / DATABASE, write=True)
        # Nobody sees the file before it is whole.
        db.execute("PRAGMA synchronous = OFF")
        db.execute("BEGIN")
        lay(db)
        db.execute("COMMIT")
        yield folder, db
        db.close()
        descriptor = os.open(folder / DATABASE, os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        folder.rename(out)
    except (sqlite3.Error, OSError) as error:
        raise RunError(f"{out} could not be written: {why(error)}") from error
    finally:
        if db is not None:
            db.close()
        shutil.rmtree(folder, ignore_errors=True)


def _add(db: sqlite3.Connection, folder: Path, path: Path, taken: dict[str, Path]) -> None:
    with RunStore(path) as store:
        status = dict(zip(store.runs["uid"], store.runs["status"], strict=True))
    offset = {table: _last(db, table) for table in _NUMBERS if table != "facts"}
    shards = max((int(Path(s).stem) for (s,) in db.execute("SELECT shard FROM tensors")), default=0)
    with reading(path):
        db.execute("ATTACH ? AS other", (f"file:{quote(str((path / DATABASE).absolute()))}?mode=ro",))
        try:
            db.execute("BEGIN")
            for uid, name in db.execute("SELECT uid, name FROM other.runs").fetchall():
                if uid in taken:
                    raise RunError(f"{path} holds the run {name!r} that {taken[uid]} holds too; give it once")
                taken[uid] = path
            names = {name for (name,) in db.execute("SELECT name FROM main.runs")}
            files = [shard for (shard,) in db.execute("SELECT DISTINCT shard FROM other.tensors")]
            for table, numbers in _NUMBERS.items():
                if table != "runs":
                    terms = [f"{c} + {offset[numbers[c]]}" if c in numbers else c for c in COLUMNS[table]]
                    order = " ORDER BY id" if table == "points" else ""
                    db.execute(f"INSERT INTO main.{table} SELECT {', '.join(terms)} FROM other.{table}{order}")
            for run, uid, name, merged in db.execute("SELECT * FROM other.runs ORDER BY run").fetchall():
                label, count = name, 1
                while label in names:
                    count += 1
                    label = f"{name}-{count}"
                names.add(label)
                row = (run + offset["runs"], uid, label, merged or str(path))
                db.execute("INSERT INTO main.runs VALUES(?, ?, ?, ?)", row)
                db.execute(
                    "UPDATE main.sessions SET status = ? WHERE run = ? AND status = 'running'", (status[uid], row[0])
                )
            for shard in files:
                target = shard_name(int(Path(shard).stem) + shards)
                shutil.copyfile(path / shard, folder / target)
                db.execute(
                    "UPDATE main.tensors SET shard = ? WHERE shard = ? AND id > ?", (target, shard, offset["tensors"])
                )
            db.execute("COMMIT")
        finally:
            if db.in_transaction:
                db.execute("ROLLBACK")
            db.execute("DETACH other")


def _last(db: sqlite3.Connection, table: str) -> int:
    key = "run" if table == "runs" else "id"
    return db.execute(f"SELECT max({key}) FROM main.{table}").fetchone()[0] or 0
