"""Recover: what can still be read of a damaged run, in a new one."""

from __future__ import annotations

import os
import shutil
import sqlite3
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actome.core.errors import RunError

from .lock import held
from .merge import new_folder
from .schema import COLUMNS, DATABASE, TABLES, TENSORS, connect

_CHUNK = 100_000
_ROW = 7  # bytes that a row takes at least, by which the size of the file bounds the number of its rows


@dataclass(frozen=True)
class Recovered:
    """What was saved.

    Attributes:
        path: the new run.
        kept: for each table, how many rows.
        lost: for each table, how many rows are missing before the last that was kept; what came after it cannot be
            counted.
        shards: how many tensor shards were kept.
        broken: the shards that cannot be read.
    """

    path: Path
    kept: dict[str, int]
    lost: dict[str, int]
    shards: int
    broken: tuple[str, ...]


def recover(path: str | os.PathLike[str], out: str | os.PathLike[str]) -> Recovered:
    """Copies what can be read of a run, row by row where a page is damaged, into a new run; the old one is not touched.

    Rows whose series is lost are kept under the measure ``series_N``, tensors whose row is lost under their name in the
    shard, and a run whose own row is lost under the name of the folder.

    Args:
        path: the folder of a run that nobody writes.
        out: a folder that does not exist yet.

    Raises:
        RunError: somebody writes it, `out` exists, or there is nothing to be saved.
    """
    path = Path(path).expanduser()
    if held(path):
        raise RunError(f"{path} is being written; end its writer first")
    if not (path / DATABASE).exists() and not (path / TENSORS).is_dir():
        raise RunError(f"{path} is not a run: it has no {DATABASE} and no {TENSORS}")
    shards = {f"{TENSORS}/{file.name}": _look(file) for file in sorted((path / TENSORS).glob("*.safetensors"))}
    good = {name: found for name, found in shards.items() if found is not None}
    with new_folder(Path(out).expanduser()) as (folder, db):
        kept, lost = _rows(path, db)
        if not good and not sum(kept.values()):
            raise RunError(f"nothing of {path} can be read: neither a row nor a shard")
        _mend(db, path)
        for name in good:
            shutil.copyfile(path / name, folder / name)
        _match(db, good)
        db.execute("COMMIT")
    return Recovered(Path(out).expanduser(), kept, lost, len(good), tuple(set(shards) - set(good)))


def _rows(path: Path, db: sqlite3.Connection) -> tuple[dict[str, int], dict[str, int]]:
    kept, lost = dict.fromkeys(TABLES, 0), dict.fromkeys(TABLES, 0)
    db.execute("BEGIN")
    if not (path / DATABASE).exists():
        return kept, lost
    source = connect(path / DATABASE)
    try:
        for table in TABLES:
            # A row that lacks what it must have, or repeats another, is damaged too.
            put = f"INSERT OR IGNORE INTO {table} VALUES({', '.join('?' * len(COLUMNS[table]))})"
            last = 0
            for rows in _readable(source, table, (path / DATABASE).stat().st_size // _ROW):
                before = db.total_changes
                db.executemany(put, [row[1:] for row in rows])
                kept[table] += db.total_changes - before
                last = max(last, rows[-1][0])
            lost[table] = last - kept[table]
    finally:
        source.close()
    return kept, lost


def _readable(db: sqlite3.Connection, table: str, bound: int) -> Iterator[list[tuple[Any, ...]]]:
    """Rows with their number before them, some at a time; halves what cannot be read until it is one row."""
    try:
        bound = db.execute(f"SELECT max(rowid) FROM {table}").fetchone()[0] or 0
    except sqlite3.DatabaseError as error:
        if "no such table" in str(error) or getattr(error, "sqlite_errorname", "").startswith("SQLITE_NOTADB"):
            return
    names = ", ".join(COLUMNS[table])
    query = f"SELECT rowid, {names} FROM {table} WHERE rowid BETWEEN ? AND ? ORDER BY rowid"
    spans = [(low, min(low + _CHUNK - 1, bound)) for low in range(1, bound + 1, _CHUNK)][::-1]
    while spans:
        low, high = spans.pop()
        try:
            rows = db.execute(query, (low, high)).fetchall()
        except sqlite3.DatabaseError:
            if low < high:
                middle = (low + high) // 2
                spans += [(middle + 1, high), (low, middle)]
            continue
        if rows:
            yield rows


def _mend(db: sqlite3.Connection, path: Path) -> None:
    """Makes up what the kept rows refer to and what was lost."""
    if not db.execute("SELECT 1 FROM runs").fetchone():
        db.execute("INSERT INTO runs VALUES(1, ?, ?, NULL)", (uuid.uuid4().hex, path.name))
    (run,) = db.execute("SELECT min(run) FROM runs").fetchone()
    now = time.time()
    wanted = (
        "SELECT session FROM alarms UNION SELECT session FROM events UNION SELECT session FROM tensors UNION SELECT 1"
    )
    for (session,) in db.execute(f"SELECT * FROM ({wanted}) EXCEPT SELECT id FROM sessions").fetchall():
        row = (session, run, now, now, now, "killed", "recovered", "", 0, 1, None, "{}")
        db.execute(f"INSERT INTO sessions VALUES({', '.join('?' * 12)})", row)
    db.execute("UPDATE sessions SET status = 'killed' WHERE status = 'running'")
    db.execute(
        "INSERT INTO series SELECT DISTINCT series, ?, 'series_' || series, NULL, NULL, NULL, NULL, NULL FROM points "
        "WHERE series NOT IN (SELECT id FROM series)",
        (run,),
    )
    for table in ("facts", "series", "sessions"):
        db.execute(f"UPDATE {table} SET run = ? WHERE run NOT IN (SELECT run FROM runs)", (run,))


def _match(db: sqlite3.Connection, shards: dict[str, tuple[int, dict[str, tuple[str, str]]]]) -> None:
    """Keeps the rows whose shard can be read, and makes up rows for shards without."""
    for number, shard in db.execute("SELECT id, shard FROM tensors").fetchall():
        if shard not in shards:
            db.execute("DELETE FROM tensors WHERE id = ?", (number,))
    known = {shard for (shard,) in db.execute("SELECT shard FROM tensors")}
    (session,) = db.execute("SELECT max(id) FROM sessions").fetchone()
    for shard, (step, tensors) in shards.items():
        for key, (dtype, shape) in tensors.items() if shard not in known else ():
            row = (None, session, time.time(), step, key, None, dtype, shape, shard, key)
            db.execute(f"INSERT INTO tensors VALUES({', '.join('?' * 10)})", row)


def _look(path: Path) -> tuple[int, dict[str, tuple[str, str]]] | None:
    """The step of a shard, and dtype and shape of its tensors by key; None when it cannot be read."""
    import json

    from safetensors import SafetensorError, safe_open

    from .shards import dtype_name

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - the file is no dict
            step = int((file.metadata() or {}).get("step", 0))
    except (SafetensorError, OSError, ValueError, RuntimeError):
        return None
    return step, {key: (dtype_name(t), json.dumps(list(t.shape))) for key, t in tensors.items()}
