"""Store: a training run on disk, read while it is written and afterwards."""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from actome.core.errors import RunError, SiteError, nearest
from actome.core.sites import select

from .lock import held
from .schema import COLUMNS, DATABASE, PLACES, check, connect, decode, reading
from .shards import read_tensor
from .sinks import Sink, tag

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from torch import Tensor

    from .writer import RunWriter

_SILENT = 120.0  # seconds without a sign of life after which a writer on another machine counts as killed
_POINT = [("id", "i8"), ("series", "i8"), ("step", "i8"), ("value", "f8")]
_LISTED = 10_000  # series that a query names one by one; for more, everything is read and sifted here

# A row that was logged before its run went back to an earlier step, and at a step that came again (or should have).
_GONE = """EXISTS(SELECT 1 FROM sessions later JOIN sessions mine ON mine.id = t.session
    WHERE later.run = mine.run AND later.id > mine.id AND t.step >= later.from_step)"""


class News(NamedTuple):
    """What was committed since one last looked.

    Attributes:
        rows: as `RunStore.frame` gives them.
        alarms: as `RunStore.alarms` gives them.
        events: as `RunStore.events` gives them.
        status: of the run: running, finished, failed or killed.
    """

    rows: pd.DataFrame
    alarms: pd.DataFrame
    events: pd.DataFrame
    status: str


class RunStore:
    """A training run in a folder: a SQLite file with numbers, alarms and events, and safetensors shards with tensors.

    `RunStore.open` reads; any number of readers, while the run is written too, each of whom sees everything that was
    committed. `RunStore.create` and `RunStore.resume` give the one writer. What is in the folder, and how to read it
    without actome, is in docs/runs.md.

    >>> import tempfile
    >>> folder = f"{tempfile.mkdtemp()}/a"
    >>> with RunStore.create(folder, config={"lr": 0.1}) as run:
    ...     for step in range(3):
    ...         run.log(step, {"loss": 1.0 / (step + 1)})
    ...         run.log(step, {"sparsity": 0.5}, site="blocks.0.mlp.act")
    >>> run = RunStore.open(folder)
    >>> run.status, run.config
    ('finished', {'lr': 0.1})
    >>> run.scalars("loss").round(2).to_dict()
    {0: 1.0, 1: 0.5, 2: 0.33}
    >>> run.frame(measure="sparsity", since=2)
       step              site   measure  value
    0     2  blocks.0.mlp.act  sparsity    0.5
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path).expanduser()
        check(self.path)
        self._read: sqlite3.Connection | None = connect(self.path / DATABASE)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> RunStore:
        """A run to read.

        Raises:
            RunError: no run there, a damaged one, or one of a later version.
        """
        return RunStore(path)

    @classmethod
    def create(cls, path: str | os.PathLike[str], config: Any = None, **options: Any) -> RunWriter:
        """A new run to write; takes what `RunWriter` does."""
        from .writer import RunWriter

        return RunWriter(path, config, **options)

    @classmethod
    def resume(cls, path: str | os.PathLike[str], *, from_step: int | None = None, **options: Any) -> RunWriter:
        """Goes on with a run that was interrupted or has ended; takes the options of `RunWriter`.

        Args:
            path: the folder.
            from_step: the first step that is made again, usually the one after a checkpoint. What was logged at that
                step and later ones stays in the file, and readers pass over it. None keeps everything.
        """
        from .writer import RunWriter

        return RunWriter(path, resume=True, from_step=from_step, **options)

    # -- what the run is ----------------------------------------------------------------------------------------------

    @property
    def runs(self) -> pd.DataFrame:
        """One row for each run (several in what `merge` made): name, uid, status, started, ended, first and last step.

        Times are seconds since 1970; steps are those of rows, missing when there are none.
        """
        import pandas as pd

        with self._snapshot() as db:
            query = "SELECT run, min(step), max(step) FROM points JOIN series ON series.id = series GROUP BY run"
            steps = {run: (low, high) for run, low, high in db.execute(query)}
            rows = [
                (name, uid, self._status(db, run), *self._span(db, run), *steps.get(run, (None, None)))
                for run, uid, name in db.execute("SELECT run, uid, name FROM runs ORDER BY run").fetchall()
            ]
        frame = pd.DataFrame(rows, columns=["name", "uid", "status", "started", "ended", "first_step", "last_step"])
        return frame.astype({"started": float, "ended": float, "first_step": "Int64", "last_step": "Int64"})

    @property
    def configs(self) -> dict[str, dict[str, Any]]:
        """The configuration of each run, by its name, with the types that were given."""
        return self._facts("config")

    @property
    def config(self) -> dict[str, Any]:
        """The configuration of the run; for what `merge` made, see `configs`."""
        return self._only(self.configs, "configs")

    @property
    def metas(self) -> dict[str, dict[str, Any]]:
        """For each run what it was made with: seed, versions, host, command, commit, and whatever was added."""
        return self._facts("meta")

    @property
    def meta(self) -> dict[str, Any]:
        """What the run was made with; for what `merge` made, see `metas`."""
        return self._only(self.metas, "metas")

    @property
    def status(self) -> str:
        """running, finished, failed (an exception ended it) or killed.

        A writer on this machine is known by its lock; one on another by its heartbeat.
        """
        with self._snapshot() as db:
            runs = [run for (run,) in db.execute("SELECT run FROM runs ORDER BY run")]
            found = {self._status(db, run) for run in runs}
        if len(found) > 1:
            raise RunError(f"{self.path} holds {len(runs)} runs: {', '.join(sorted(found))}; see `runs`")
        return found.pop()

    # -- what was measured --------------------------------------------------------------------------------------------

    def frame(
        self,
        measure: str | Collection[str] | None = None,
        site: str | None = None,
        since: int | None = None,
        *,
        run: str | None = None,
        superseded: bool = False,
    ) -> pd.DataFrame:
        """Rows as a tidy table: run (if several), step, site, layer, head, unit, expert (those in use), measure, value.

        Args:
            measure: one name or several; all when not given.
            site: one, or a pattern such as ``blocks.*.resid.post``.
            since: the first step wanted.
            run: the name of one run.
            superseded: also what was logged before the run went back to an earlier step (`resume`).

        Raises:
            RunError: nothing was ever logged under such a name; the message names the nearest.
        """
        with self._snapshot() as db:
            series = self._series(db)
            chosen = self._chosen(series, measure, site, run)
            where = [] if superseded else self._kept(db)
            if since is not None:
                where.append(f"step >= {int(since)}")
            return self._rows(db, series, chosen, where)

    def scalars(self, name: str, site: str | None = None, *, run: str | None = None) -> pd.Series:
        """One value a step, by step; the last one where a step was logged twice.

        Raises:
            RunError: no such name, or it was logged at several sites, heads, units or runs and none is named.
        """
        with self._snapshot() as db:
            series = self._series(db)
            chosen = self._chosen(series, name, site, run)
            if site is None and len(chosen) > 1:  # the plain number, where one is logged beside those of sites
                chosen = [i for i in chosen if series[i][2] is None] or chosen
            if len(chosen) > 1:
                which = "; ".join(self._place(series[i]) for i in chosen[:3]) + (", ..." if len(chosen) > 3 else "")
                raise RunError(f"{name!r} was logged at {len(chosen)} places ({which}); name one, or use `frame`")
            frame = self._rows(db, series, chosen, self._kept(db))
        found = frame.drop_duplicates("step", keep="last").set_index("step")["value"].sort_index()
        return found.rename(name)

    @property
    def measures(self) -> list[str]:
        """The names under which numbers were logged, each once, in the order in which they came."""
        with self._snapshot() as db:
            return list(dict.fromkeys(name for (name,) in db.execute("SELECT measure FROM series ORDER BY id")))

    @property
    def alarms(self) -> pd.DataFrame:
        """One row for each alarm: step, name, level, site, message, advice, evidence (a dict), time."""
        return self._table("alarms", ["step", "name", "level", "site", "message", "advice", "evidence", "time"])

    @property
    def events(self) -> pd.DataFrame:
        """One row for each event: step (or missing), name, data (a dict), time."""
        return self._table("events", ["step", "name", "data", "time"])

    @property
    def tensors(self) -> pd.DataFrame:
        """One row for each tensor: step, name, site, dtype, shape, the shard that holds it and its key there."""
        return self._table("tensors", ["step", "name", "site", "dtype", "shape", "shard", "key", "time"])

    def tensor(self, name: str, step: int | None = None, site: str | None = None, *, run: str | None = None) -> Tensor:
        """A tensor, of the last step at which it was logged unless another is asked for.

        Raises:
            RunError: no such name, no such step (the message names the nearest), or its shard is missing or damaged.
        """
        index = self.tensors
        mine = index[index["name"] == name]
        if mine.empty:
            raise RunError(f"{self.path} has no tensor {name!r}{nearest(name, set(index['name']))}")
        if run is not None:
            mine = mine[mine["run"] == run] if "run" in mine else mine
        if site is not None:
            mine = mine[mine["site"] == site]
        places = mine[[c for c in ("run", "site") if c in mine]].drop_duplicates()
        if len(places) != 1:
            there = "; ".join(str(tuple(row)) for row in places.itertuples(index=False))
            raise RunError(f"{name!r} was logged at {there or 'other places'}; name one of them")
        if step is not None:
            steps = sorted(set(mine["step"]), key=lambda other: (abs(other - step), other))
            if step not in steps:
                raise RunError(f"{name!r} was not logged at step {step}; nearest: {', '.join(map(str, steps[:3]))}")
            mine = mine[mine["step"] == step]
        row = mine.iloc[-1] if step is not None else mine.sort_values("step", kind="stable").iloc[-1]
        return read_tensor(self.path, row["shard"], row["key"], int(row["step"]))

    # -- while it is written, and beyond ------------------------------------------------------------------------------

    def follow(self, poll: float = 0.5, *, new: bool = False) -> Iterator[News]:
        """What has been committed, and then what is, as it comes; ends when the run has ended and all was given.

        Args:
            poll: seconds between looks.
            new: begin with what comes from now on.
        """
        tables = ("points", "alarms", "events")
        with self._snapshot() as db:
            seen = {t: (db.execute(f"SELECT max(id) FROM {t}").fetchone()[0] or 0) if new else 0 for t in tables}
        return self._follow(seen, poll)  # apart, so that "now" is when this is called

    def _follow(self, seen: dict[str, int], poll: float) -> Iterator[News]:
        tables = tuple(seen)
        while True:
            # The status first: what was committed before the run ended is then surely seen after it.
            with self._snapshot() as db:
                (run,) = db.execute("SELECT max(run) FROM runs").fetchone()
                status = self._status(db, run)
            with self._snapshot() as db:
                last = {t: db.execute(f"SELECT max(id) FROM {t}").fetchone()[0] or 0 for t in tables}
                fresh = any(last[t] > seen[t] for t in tables)
                if fresh:
                    series = self._series(db)
                    rows = self._rows(db, series, list(series), [f"id > {seen['points']}"])
            if fresh:
                alarms, events = (
                    self._table(t, None, f"t.id > {seen[t]} AND t.id <= {last[t]}") for t in ("alarms", "events")
                )
                seen = last
                yield News(rows, alarms, events, status)
            if status != "running":
                return
            if not fresh:
                time.sleep(poll)

    def forward(self, sink: Sink) -> None:
        """Gives everything to a sink, such as `TensorBoardSink`, as if it were logged now; units are left out."""
        name, config = next(iter(self.configs.items()))
        self._only(self.configs, "configs")
        sink.start(name, config)
        try:
            with self._snapshot() as db:
                series = self._series(db)
                steps: dict[int, dict[str, float]] = {}
                chosen = [i for i in series if series[i][5] is None]
                points = self._points(db, series, chosen, self._kept(db))
            tags = {i: tag(*series[i][1:]) for i in chosen}
            for _, i, step, value in points.tolist():
                steps.setdefault(step, {})[tags[i]] = value
            for step in sorted(steps):
                sink.log(step, steps[step])
            for alarm in self.alarms.to_dict("records"):
                sink.alarm(alarm["step"], alarm["name"], alarm["message"], alarm["level"])
        finally:
            sink.close()

    def to_parquet(self, folder: str | os.PathLike[str], *, tensors: bool = False) -> Path:
        """Writes the run as Parquet files that need no actome; see `actome.dynamics.export`."""
        from .export import to_parquet

        return to_parquet(self, Path(folder).expanduser(), tensors=tensors)

    def close(self) -> None:
        """Ends the connection."""
        if self._read is not None:
            self._read.close()
            self._read = None

    def __enter__(self) -> RunStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r})"

    # -- reading ------------------------------------------------------------------------------------------------------

    @contextmanager
    def _snapshot(self) -> Iterator[sqlite3.Connection]:
        """A moment of the run: all queries within see the same; short, since it keeps the log from being folded in."""
        db = self._read
        if db is None:
            raise RunError(f"{self.path} is closed")
        with reading(self.path):
            if db.in_transaction:
                yield db
                return
            db.execute("BEGIN")
            try:
                yield db
            finally:
                db.rollback()

    def _status(self, db: sqlite3.Connection, run: int) -> str:
        query = "SELECT status, host, heartbeat, merged_from FROM sessions JOIN runs USING(run) WHERE run = ?"
        status, host, heartbeat, merged = db.execute(f"{query} ORDER BY id DESC LIMIT 1", (run,)).fetchone()
        if status != "running" or merged is not None:
            return status
        if host == socket.gethostname():
            return "running" if held(self.path) else self._ended(run)
        return "running" if time.time() - heartbeat < _SILENT else "killed"

    def _ended(self, run: int) -> str:
        """Without a writer, and said to be running: it was killed, or has ended since the snapshot was taken."""
        db = connect(self.path / DATABASE)
        try:
            query = "SELECT status FROM sessions WHERE run = ? ORDER BY id DESC LIMIT 1"
            (status,) = db.execute(query, (run,)).fetchone()
        finally:
            db.close()
        return "killed" if status == "running" else status

    @staticmethod
    def _span(db: sqlite3.Connection, run: int) -> tuple[float, float | None]:
        found = db.execute("SELECT started, ended FROM sessions WHERE run = ? ORDER BY id", (run,)).fetchall()
        return found[0][0], found[-1][1]

    def _facts(self, about: str) -> dict[str, dict[str, Any]]:
        with self._snapshot() as db:
            found: dict[str, dict[str, Any]] = {
                name: {} for (name,) in db.execute("SELECT name FROM runs ORDER BY run")
            }
            query = "SELECT name, key, type, value FROM facts JOIN runs USING(run) WHERE about = ? ORDER BY facts.rowid"
            for name, key, kind, value in db.execute(query, (about,)):
                found[name][key] = decode(kind, value)
            return found

    def _only(self, found: dict[str, Any], plural: str) -> Any:
        if len(found) != 1:
            raise RunError(f"{self.path} holds {len(found)} runs ({', '.join(found)}); see `{plural}`")
        return next(iter(found.values()))

    def _series(self, db: sqlite3.Connection) -> dict[int, tuple[Any, ...]]:
        """For each series its run's name, measure, site, layer, head, unit, expert."""
        query = "SELECT id, name, measure, site, layer, head, unit, expert FROM series JOIN runs USING(run) ORDER BY id"
        return {row[0]: (row[1], row[2], row[3], row[4], row[5], row[6], row[7]) for row in db.execute(query)}

    def _chosen(
        self,
        series: dict[int, tuple[Any, ...]],
        measure: str | Collection[str] | None,
        site: str | None,
        run: str | None,
    ) -> list[int]:
        chosen = list(series)
        if run is not None:
            names = list(self._facts("config"))
            if run not in names:
                raise RunError(f"{self.path} has no run {run!r}{nearest(run, names)}")
            chosen = [i for i in chosen if series[i][0] == run]
        if measure is not None:
            wanted = {measure} if isinstance(measure, str) else set(measure)
            there = {series[i][1] for i in chosen}
            for name in sorted(wanted - there):
                raise RunError(f"{self.path} has no measure {name!r}{nearest(name, there)}")
            chosen = [i for i in chosen if series[i][1] in wanted]
        if site is not None:
            sites = dict.fromkeys(series[i][2] for i in chosen if series[i][2] is not None)
            try:
                wanted = set(select(site, sites))
            except SiteError as error:
                raise RunError(f"{self.path}: {error}") from error
            chosen = [i for i in chosen if series[i][2] in wanted]
        return chosen

    @staticmethod
    def _place(one: tuple[Any, ...]) -> str:
        words = [f"run {one[0]}", *([f"site {one[2]}"] if one[2] else [])]
        return ", ".join(words + [f"{k} {v}" for k, v in zip(PLACES, one[3:], strict=True) if v is not None])

    @staticmethod
    def _kept(db: sqlite3.Connection) -> list[str]:
        """Conditions that leave out the rows that a run's later session has gone back behind."""
        where, first = [], {}
        for run, point, step in db.execute("SELECT run, first_point, from_step FROM sessions ORDER BY id"):
            start = first.setdefault(run, point)
            if step is not None:
                where.append(f"NOT (id >= {start} AND id < {point} AND step >= {step})")
        return where

    @staticmethod
    def _points(
        db: sqlite3.Connection, series: dict[int, Any], chosen: Sequence[int], where: list[str], most: int = -1
    ) -> np.ndarray:
        """Rows with the fields id, series, step and value, in the order in which they came; at most so many."""
        import numpy as np

        where = list(where)
        few = len(chosen) < len(series)
        if few and len(chosen) <= _LISTED:
            where.append(f"series IN ({','.join(map(str, chosen))})")
        condition = f" WHERE {' AND '.join(where)}" if where else ""
        # Straight into the array: lists of tuples take twice the time and ten times the memory.
        query = f"SELECT id, series, step, coalesce(value, 'nan') FROM points{condition} ORDER BY id LIMIT {int(most)}"
        rows = np.fromiter(db.execute(query), _POINT)
        if few and len(chosen) > _LISTED:
            rows = rows[np.isin(rows["series"], np.fromiter(chosen, np.int64, len(chosen)))]
        return rows

    def _rows(
        self, db: sqlite3.Connection, series: dict[int, tuple[Any, ...]], chosen: Sequence[int], where: list[str]
    ) -> pd.DataFrame:
        import numpy as np
        import pandas as pd

        points = self._points(db, series, chosen, where)
        at = {i: n for n, i in enumerate(series)}
        every = pd.DataFrame(list(series.values()), columns=["run", "measure", "site", *PLACES])
        every = every.astype(dict.fromkeys(PLACES, "Int64"))
        used = every.iloc[[at[i] for i in chosen]]
        rank = np.full(max(at, default=0) + 1, -1)
        rank[list(at)] = list(at.values())
        frame = every.take(rank[points["series"]]).reset_index(drop=True)
        frame["step"], frame["value"] = points["step"], points["value"]
        places = [place for place in PLACES if used[place].notna().any()]
        several = ["run"] if db.execute("SELECT count(*) FROM runs").fetchone()[0] > 1 else []
        return frame[[*several, "step", "site", *places, "measure", "value"]]

    def _table(self, table: str, columns: list[str] | None, where: str = f"NOT {_GONE}") -> pd.DataFrame:
        import pandas as pd

        default = [c for c in COLUMNS[table] if c not in ("id", "session")]
        order = columns or [*(c for c in default if c != "time"), "time"]
        with self._snapshot() as db:
            several = db.execute("SELECT count(*) FROM runs").fetchone()[0] > 1
            names = ", ".join(f"t.{c}" for c in order)
            found = db.execute(
                f"SELECT runs.name, {names} FROM {table} t JOIN sessions ON sessions.id = t.session "
                f"JOIN runs ON runs.run = sessions.run WHERE {where} ORDER BY t.id"
            ).fetchall()
        frame = pd.DataFrame(found, columns=["run", *order])
        for column in ("evidence", "data"):
            if column in frame:
                frame[column] = [json.loads(text) for text in frame[column]]
        if "shape" in frame:
            frame["shape"] = [tuple(json.loads(text)) for text in frame["shape"]]
        frame = frame.astype({"step": "Int64" if table == "events" else "int64", "time": "float64"})
        return frame if several else frame.drop(columns="run")
