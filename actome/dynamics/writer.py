"""Writer: the one process that writes a run, and what it does so that nothing committed is ever lost."""

from __future__ import annotations

import atexit
import contextlib
import json
import operator
import os
import shutil
import sqlite3
import sys
import threading
import time
import uuid
import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from actome.core.errors import RunError

from .about import environment
from .lock import WriterLock
from .rows import columns, number
from .schema import (
    COLUMNS,
    DAMAGE,
    DATABASE,
    LOCK,
    TENSORS,
    as_json,
    as_mapping,
    begun,
    check,
    connect,
    damage,
    encode,
    lay,
    why,
)
from .shards import as_tensor, clean, dtype_name, shard_name, write_shard
from .sinks import tag
from .store import RunStore

if TYPE_CHECKING:
    import pandas as pd

    from .sinks import Sink

_BEAT = 15.0  # seconds between signs of life when there is nothing to write
_LEVELS = ("info", "warning", "critical")
_NOWHERE = (None, None, None, None, None)

_live: weakref.WeakSet[RunWriter] = weakref.WeakSet()
_left: list[sqlite3.Connection] = []  # a forked child must never close the connections of its parent


class _Waiting:
    """What was logged and is not committed: rows of each table, ready for SQLite."""

    __slots__ = ("points", "series", "tables")

    def __init__(self) -> None:
        self.series: list[tuple[Any, ...]] = []
        self.points: list[tuple[int, int, float]] = []
        self.tables: list[tuple[str, tuple[Any, ...]]] = []

    def __bool__(self) -> bool:
        return bool(self.points or self.tables or self.series)

    def put_before(self, later: _Waiting) -> _Waiting:
        self.series += later.series
        self.points += later.points
        self.tables += later.tables
        return self


class RunWriter(RunStore):
    """Writes a run; made by `RunStore.create` and `RunStore.resume`; a context manager.

    What is logged waits in memory until `every_rows` rows are together or `seconds` have passed, when a thread commits
    it in one transaction. A process that is killed loses what it had not committed and nothing else. `commit` commits
    now; leaving the context, also by an exception, or the end of the process, commits what is left.

    A writer has all that a reader has; looking commits first.

    Args:
        path: the folder; made when it does not exist.
        config: a dict, dataclass or `argparse.Namespace`; read back with the types that were given.
        name: of the run; that of the folder unless given.
        seed: kept in `meta`; taken from the configuration's ``seed`` unless given.
        meta: whatever else is worth keeping.
        sinks: where else to send what is logged; see `actome.dynamics.sinks`.
        every_rows: how many rows are committed together.
        seconds: how long a row waits at most.
        durable: whether a commit waits for the disk. Not needed for a process that is killed; only a power cut, or a
            crash of the whole machine, could otherwise take the last commits with it (never break the file).
        overwrite: delete the run that the folder holds first. Other files are left alone.
        resume, from_step: see `RunStore.resume`.

    Raises:
        RunError: the folder holds a run already, or something else; another writer holds it; the disk is full.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        config: Any = None,
        *,
        name: str | None = None,
        seed: int | None = None,
        meta: Mapping[str, Any] | None = None,
        sinks: Sequence[Sink] = (),
        every_rows: int = 10_000,
        seconds: float = 1.0,
        durable: bool = False,
        overwrite: bool = False,
        resume: bool = False,
        from_step: int | None = None,
    ):
        self.path = Path(path).expanduser()
        self._every, self._seconds, self._sinks = every_rows, seconds, list(sinks)
        self._waiting, self._lock, self._writing = _Waiting(), threading.RLock(), threading.RLock()
        self._known: dict[tuple[Any, ...], dict[str, int]] = {}
        self._closed: str | None = None
        self._failing = False  # whether the thread could not commit; the next call that logs tries again, and says so
        self._outbox: list[tuple[Any, ...]] = []
        self._sending = threading.RLock()
        self._beaten = time.time()
        self._db: sqlite3.Connection | None = None
        self._read = None
        if resume:
            check(self.path)
        else:
            self._make_room(overwrite)
        self._writer_lock = WriterLock(self.path)
        try:
            with self._disk("begun"):
                self._begin(resume, overwrite, durable, as_mapping(config), name, seed, meta, from_step)
            super().__init__(self.path)
            if self._sinks:
                ((label, settings),) = self.configs.items()
                for sink in self._sinks:
                    sink.start(label, settings)
        except BaseException:
            self._abandon()
            raise
        _live.add(self)
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._tend, name=f"actome run {self.path.name}", daemon=True)
        self._thread.start()

    # -- beginning ----------------------------------------------------------------------------------------------------

    def _make_room(self, overwrite: bool) -> None:
        path = self.path
        if path.exists() and not path.is_dir():
            raise RunError(f"{path} is a file; a run is a folder")
        mine = (DATABASE, f"{DATABASE}-wal", f"{DATABASE}-shm", f"{DATABASE}-journal", TENSORS, LOCK)
        if path.is_dir() and not (path / DATABASE).exists() and any(one.name not in mine for one in path.iterdir()):
            raise RunError(f"{path} is not empty and not a run; choose another folder")
        if not overwrite and begun(path):
            raise RunError(
                f"{path} holds a run already: RunStore.resume goes on with it, overwrite=True deletes it; or choose "
                "another folder"
            )
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"{path} cannot be made: {why(error)}") from error

    def _begin(
        self,
        resume: bool,
        overwrite: bool,
        durable: bool,
        config: dict[str, Any],
        name: str | None,
        seed: int | None,
        meta: Mapping[str, Any] | None,
        from_step: int | None,
    ) -> None:
        if not resume:
            # Again, now that nobody else can write: another may have begun between the look and the lock.
            if not overwrite and begun(self.path):
                raise RunError(f"{self.path} has just been begun by another process")
            for file in self.path.glob(f"{DATABASE}*"):
                file.unlink()
            shutil.rmtree(self.path / TENSORS, ignore_errors=True)
        (self.path / TENSORS).mkdir(exist_ok=True)
        db = self._db = connect(self.path / DATABASE, write=True)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
        here, now = environment(), time.time()
        db.execute("BEGIN IMMEDIATE")
        try:
            if not resume:
                lay(db)
                db.execute(
                    "INSERT INTO runs VALUES(1, ?, ?, NULL)", (uuid.uuid4().hex, name or self.path.name or "run")
                )
                seed = config.get("seed") if seed is None else seed
                facts = {**here, **({} if seed is None else {"seed": seed}), **(meta or {})}
                for about, some in (("config", config), ("meta", facts)):
                    rows = [(1, about, str(key), *encode(value)) for key, value in some.items()]
                    db.executemany("INSERT INTO facts VALUES(?, ?, ?, ?, ?)", rows)
            runs = db.execute("SELECT run, name, merged_from FROM runs").fetchall()
            if len(runs) > 1 or runs[0][2] is not None:
                raise RunError(f"{self.path} was merged of other runs; resume one of those, and merge again")
            first = (db.execute("SELECT max(id) FROM points").fetchone()[0] or 0) + 1
            session = (None, 1, now, now, None, "running", None, here["host"], os.getpid(), first, from_step)
            cursor = db.execute(f"INSERT INTO sessions VALUES({', '.join('?' * 12)})", (*session, as_json(here)))
            self._session = cursor.lastrowid
            # One that was killed could not say so; readers knew by the lock, which is taken again now.
            db.execute("UPDATE sessions SET status = 'killed' WHERE status = 'running' AND id != ?", (self._session,))
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise
        self.committed = first - 1
        for i, _, measure, *place in db.execute("SELECT * FROM series"):
            self._known.setdefault(tuple(place), {})[measure] = i
        self._count = sum(map(len, self._known.values()))
        shards = {shard for (shard,) in db.execute("SELECT shard FROM tensors")}
        clean(self.path, shards)
        self._shard = max((int(Path(shard).stem) for shard in shards), default=0)

    # -- logging ------------------------------------------------------------------------------------------------------

    def log(
        self,
        step: int,
        values: Mapping[str, Any],
        *,
        site: str | None = None,
        layer: int | None = None,
        head: int | None = None,
        unit: int | None = None,
        expert: int | None = None,
    ) -> None:
        """Numbers of one step, by name; NaN and infinities are kept.

        Args:
            step: a whole number.
            values: floats, or what becomes one: a number, a boolean, a numpy or torch scalar.
            site, layer, head, unit, expert: where they belong, if anywhere.

        Raises:
            RunError: a value that is not one number; the disk is full (what was logged waits for the next try).
        """
        if type(step) is not int:
            step = _step(step)
        # All values are looked at before any is kept.
        some = [(name, v if type(v) is float else number(name, v)) for name, v in values.items()]
        place = (site, layer, head, unit, expert) if site is not None else _NOWHERE
        if site is None and not (layer is head is unit is expert is None):
            place = (None, layer, head, unit, expert)
        with self._lock:
            self._ready()
            known = self._known.get(place)
            if known is None:
                known = self._known[place] = {}
            points = self._waiting.points
            for name, value in some:
                series = known.get(name)
                if series is None:
                    series = self._introduce(name, place, known)
                points.append((series, step, value))
            full = self._failing or len(points) >= self._every
        if full:
            self.commit()

    def log_rows(self, rows: pd.DataFrame | Iterable[Mapping[str, Any]] | Any, step: int | None = None) -> None:
        """Rows of a tidy table, such as `model.measure(...)` gives.

        Args:
            rows: a DataFrame, an iterable of dicts, or something with such a `frame`. The columns are measure and
                value, and as far as they apply step, site, layer, head, unit, expert.
            step: of all rows; needed unless there is a column for it.

        Raises:
            RunError: a column that is missing or unknown, a value that is no number.
        """
        places, inverse, steps, values = columns(rows, None if step is None else _step(step))
        with self._lock:
            self._ready()
            ids = []
            for measure, *place in places:
                known = self._known.setdefault(tuple(place), {})
                series = known.get(measure)
                ids.append(self._introduce(measure, tuple(place), known) if series is None else series)
            self._waiting.points.extend(zip([ids[i] for i in inverse], steps, values, strict=True))
            full = self._failing or len(self._waiting.points) >= self._every
        if full:
            self.commit()

    def log_tensor(self, step: int, name: str, tensor: Any, site: str | None = None) -> None:
        """One tensor, or what becomes one; see `log_tensors`."""
        self.log_tensors(step, {name: tensor}, site)

    def log_tensors(self, step: int, tensors: Mapping[str, Any], site: str | None = None) -> None:
        """Tensors of one step, in one shard; on disk, and everything logged before too, when this returns.

        Raises:
            RunError: something that is no tensor; the disk is full.
        """
        step = _step(step)
        whole = {name: as_tensor(name, value) for name, value in tensors.items()}
        if not whole:
            return
        with self._writing:
            with self._lock:
                self._ready()
            try:
                with self._disk("written"):
                    shard = write_shard(self.path, self._shard + 1, step, {_key(n, site): t for n, t in whole.items()})
            except RunError:
                (self.path / shard_name(self._shard + 1)).unlink(missing_ok=True)
                raise
            self._shard += 1
            for name, tensor in whole.items():
                shape = json.dumps(list(tensor.shape))
                self._put("tensors", step, name, site, dtype_name(tensor), shape, shard, _key(name, site))
            self.commit()

    def alarm(
        self,
        step: int,
        name: str,
        message: str,
        *,
        site: str | None = None,
        level: str = "warning",
        advice: str | None = None,
        evidence: Mapping[str, Any] | None = None,
    ) -> None:
        """Something that a person should know now; committed when this returns, and shown on top by live views.

        Args:
            step: at which it began to show.
            name: of the kind of alarm, such as ``non_finite``.
            message: what happened, in a sentence.
            site: where it began.
            level: info, warning or critical.
            advice: what to do about it.
            evidence: the figures behind it, ready for JSON.
        """
        if level not in _LEVELS:
            raise RunError(f"an alarm has the level {', '.join(_LEVELS)}; not {level!r}")
        step = _step(step)
        self._put("alarms", step, name, level, site, message, advice, as_json(dict(evidence or {})))
        self.commit()
        if self._sinks:
            self._outbox.append(("alarm", step, name, message, level))

    def event(self, name: str, step: int | None = None, **data: Any) -> None:
        """Something that happened: a checkpoint saved, a learning rate lowered; committed with the next rows."""
        self._put("events", None if step is None else _step(step), name, as_json(data))

    def _put(self, table: str, *values: Any) -> None:
        with self._lock:
            self._ready()
            self._waiting.tables.append((table, (None, self._session, time.time(), *values)))

    def _introduce(self, measure: str, place: tuple[Any, ...], known: dict[str, int]) -> int:
        if type(measure) is not str or not measure:
            raise RunError(f"a number is logged under a name; this is {measure!r}")
        if place[0] is not None and not isinstance(place[0], str):
            raise RunError(f"a site is a name; this is {place[0]!r}")
        where = (place[0], *(None if at is None else _step(at, "a place") for at in place[1:]))
        self._count += 1
        self._waiting.series.append((self._count, 1, measure, *where))
        known[measure] = self._count
        return self._count

    def _ready(self) -> None:
        if self._closed:
            raise RunError(self._closed)

    # -- writing ------------------------------------------------------------------------------------------------------

    def commit(self) -> None:
        """Puts everything that was logged into the file, in one transaction.

        Raises:
            RunError: it cannot be written. Nothing is lost: it waits in memory, and the next commit tries again.
        """
        with self._writing:
            if self._closed:
                return
            with self._lock:
                batch, self._waiting = self._waiting, _Waiting()
            if not batch and time.time() - self._beaten < _BEAT:
                return
            written = False
            try:
                with self._disk("written", len(batch.points)):
                    written = self._write(batch)
            finally:
                if not written:
                    with self._lock:
                        self._waiting = batch.put_before(self._waiting)
            self._failing = False
            self.committed += len(batch.points)
            if self._sinks and batch.points:
                self._outbox.append(("points", batch.points))

    def _write(self, batch: _Waiting) -> bool:
        db, now, begun_ = self._db, time.time(), False
        assert db is not None
        try:
            db.execute("BEGIN IMMEDIATE")
            begun_ = True
            db.executemany("INSERT INTO series VALUES(?, ?, ?, ?, ?, ?, ?, ?)", batch.series)
            db.executemany("INSERT INTO points(series, step, value) VALUES(?, ?, ?)", batch.points)
            for table, row in batch.tables:
                db.execute(f"INSERT INTO {table} VALUES({', '.join('?' * len(COLUMNS[table]))})", row)
            db.execute("UPDATE sessions SET heartbeat = ? WHERE id = ?", (now, self._session))
            db.execute("COMMIT")
        except sqlite3.Error:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise
        except BaseException:
            # Ctrl-C, which may come just before or just after the commit.
            if not db.in_transaction and begun_:
                return True
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise
        self._beaten = now
        return True

    @contextlib.contextmanager
    def _disk(self, what: str, waiting: int = 0) -> Iterable[None]:
        try:
            yield
        except (sqlite3.Error, OSError, SafetensorError) as error:
            if getattr(error, "sqlite_errorname", "").startswith(DAMAGE):
                raise RunError(damage(self.path, error)) from error
            more = ""
            if hasattr(self, "committed"):
                more = (
                    f". {self.committed} rows are committed and stay readable; {waiting} wait in memory: mend that and "
                    "call commit(), or end and go on later with RunStore.resume"
                )
            raise RunError(f"{self.path} could not be {what}: {why(error)}{more}") from error

    def _tend(self) -> None:
        """The thread: commits what has waited long enough, shows that the writer lives, and feeds the sinks."""
        while not self._wake.wait(self._seconds):
            try:
                self.commit()
            except RunError:
                self._failing = True
            self._forward()

    def _forward(self) -> None:
        """Sends what was committed to the sinks; never while a lock is held that logging waits for."""
        with self._sending:
            count = len(self._outbox)  # others only append
            items, self._outbox[:count] = self._outbox[:count], []
            for what, *rest in items:
                if what == "alarm":
                    self._tell("alarm", *rest)
                    continue
                with self._lock:
                    names = {i: (name, *place) for place, some in self._known.items() for name, i in some.items()}
                steps: dict[int, dict[str, float]] = {}
                for i, step, value in rest[0]:
                    if names[i][4] is None:  # of units there may be a million
                        steps.setdefault(step, {})[tag(*names[i])] = value
                for step, values in steps.items():
                    self._tell("log", step, values)

    def _tell(self, what: str, *args: Any) -> None:
        """To every sink; one that fails is left out from then on, since the run itself is here."""
        for sink in list(self._sinks):
            try:
                getattr(sink, what)(*args)
            except Exception as error:
                self._sinks.remove(sink)
                warnings.warn(
                    f"{type(sink).__name__} failed and gets nothing more of {self.path} ({type(error).__name__}: "
                    f"{error}); RunStore.open(...).forward(sink) gives it everything later",
                    RuntimeWarning,
                    stacklevel=2,
                )

    # -- ending -------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Commits what is left and marks the run as finished."""
        self._end("finished", None)

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        self._end("finished" if kind is None else "failed", None if kind is None else f"{kind.__name__}: {error}")

    def _end(self, status: str, error: str | None) -> None:
        if self._closed:
            return
        self._wake.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        try:
            self.commit()
            self._forward()
            with self._disk("closed"):
                ended = (status, error, time.time(), self._session)
                self._db.execute("UPDATE sessions SET status = ?, error = ?, ended = ? WHERE id = ?", ended)
            self._settle()
        finally:
            self._closed = f"the writer of {self.path} is closed"
            self._tell("close")
            self._abandon()

    def _settle(self) -> None:
        """Leaves one plain file, that can be read where nothing can be written; unless someone is reading it now."""
        with contextlib.suppress(sqlite3.OperationalError):
            self._db.execute("PRAGMA busy_timeout = 0")
            self._db.execute("PRAGMA journal_mode = DELETE")

    def _abandon(self) -> None:
        super().close()
        if self._db is not None:
            with contextlib.suppress(sqlite3.Error):
                self._db.close()  # folds the write-ahead log into the file, unless someone is reading
            self._db = None
        self._writer_lock.release()
        _live.discard(self)

    # -- reading what oneself writes ----------------------------------------------------------------------------------

    def _snapshot(self) -> contextlib.AbstractContextManager[sqlite3.Connection]:
        if not self._closed:
            self.commit()
        return super()._snapshot()


def _step(step: Any, what: str = "a step") -> int:
    try:
        return operator.index(step)
    except TypeError:
        raise RunError(f"{what} is a whole number; this is {step!r} ({type(step).__name__})") from None


def _key(name: str, site: str | None) -> str:
    return name if site is None else f"{site}/{name}"


def _at_exit() -> None:
    error = getattr(sys, "last_value", None)
    for writer in list(_live):
        with contextlib.suppress(RunError):
            writer._end("finished" if error is None else "failed", None if error is None else repr(error))


def _in_child() -> None:
    """A forked child (a data loader's worker, say) is not the writer, and must not look like one."""
    for writer in list(_live):
        writer._closed = f"{writer.path} is written by the process that forked this one ({os.getppid()}); log there"
        writer._writer_lock.leave()
        _left.extend(db for db in (writer._db, writer._read) if db is not None)
        writer._db = writer._read = None
        writer._lock, writer._writing = threading.RLock(), threading.RLock()
        writer._sinks = []
        _live.discard(writer)


atexit.register(_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
