"""Digest: what a live view keeps of a run, small however long the run, and read only once."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import numpy as np

from actome.core.errors import RunError, nearest

from .store import RunStore

_BINS, _FEWEST = 512, 64
_CELLS = 2_000_000  # of all series together: about 60 MB
_CHUNK = 250_000  # rows that are read at a time
_COLUMNS = ("_count", "_sum", "_low", "_high", "_last", "_last_step", "_bad", "_first_bad")  # by bin, then by series
_RECENT = 30.0  # seconds over which the present speed is told


class Place(NamedTuple):
    """What a series is of: the measure, and where.

    Attributes:
        measure: its name.
        site: or None.
        layer, head, expert: or None. Where a site names a block, the layer is that of the block.
    """

    measure: str
    site: str | None
    layer: int | None
    head: int | None
    expert: int | None


class Curve(NamedTuple):
    """One series over the run, in bins of equal width.

    Attributes:
        step: the middle of each bin that has a finite number.
        mean, low, high: of the finite numbers in the bin.
        count: how many these are.
    """

    step: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    count: np.ndarray


class RunDigest:
    """A run as bins of steps: for each series and bin the mean, the least and the greatest of what was logged.

    Reads what was committed since it last looked and nothing twice, so that following a run costs what the run logs.
    All series share the bins. These are as wide as a power of two of steps, the smallest with which the run fits in
    `bins`; when the run outgrows them, neighbours are put together, which loses neither mean nor extremes. A run that
    goes back to an earlier step (`RunStore.resume`) is read anew, without what it went back behind. Numbers that are
    not finite are counted apart; those of single units are left out.

    Args:
        run: the store.
        name: of one run, where `merge` put several into the store.
        bins: at most; fewer when there are very many series, so that all of them stay below about 60 MB.

    Attributes:
        places: of all series, by their number in the store.
        status, error: of the run: running, finished, failed (with its error) or killed.
        started, ended: in seconds since 1970; `ended` is None while it runs, and the last sign of life of a killed one.
        first_step, last_step: or None before anything was logged.
        rows: how many numbers were read; single units not counted.
        units: how many series of single units there are.
        alarms, events: as dicts, those that the run went back behind left out.

    Raises:
        RunError: the store holds several runs and none is named, or no such run.

    >>> import tempfile
    >>> folder = f"{tempfile.mkdtemp()}/a"
    >>> with RunStore.create(folder) as run:
    ...     for step in range(1000):
    ...         run.log(step, {"loss": float(step)})
    >>> digest = RunDigest(RunStore.open(folder), bins=64)
    >>> digest.refresh(), digest.status, digest.width
    (True, 'finished', 16)
    >>> (one,) = digest.find("loss")
    >>> digest.curve(one).low[:3].tolist(), digest.latest(one)
    ([0.0, 16.0, 32.0], 999.0)
    """

    def __init__(self, run: RunStore, name: str | None = None, *, bins: int = _BINS):
        names = list(run.configs)
        if name is None and len(names) > 1:
            raise RunError(f"{run.path} holds {len(names)} runs: {', '.join(names)}; name one of them (run=, --run)")
        if name is not None and name not in names:
            raise RunError(f"{run.path} has no run {name!r}{nearest(name, names) or '; it has ' + ', '.join(names)}")
        if bins < 2:
            raise RunError(f"bins={bins}: a run is shown in 2 bins or more")
        self.run, self.name = run, name or names[0]
        self.config, self.meta = run.configs[self.name], run.metas[self.name]
        self._most = bins
        self._forget()

    def _forget(self) -> None:
        self.places: dict[int, Place] = {}
        self.first_step: int | None = None
        self.last_step: int | None = None
        self.rows = self.units = 0
        self.status, self.error = "running", None
        self.started, self.ended = 0.0, None
        self.alarms: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []
        self._seen = self._series = self._session = 0
        self._shift, self._base = 0, 0  # a bin is step >> shift, and its column that less base
        self._row = np.full(64, -1)  # of each series, -1 for one that is left out
        self._bins = self._most
        self._table(0)
        self._worked = 0.0
        self._pace: list[tuple[float, int]] = []  # when one looked, and the last step then

    def _table(self, rows: int) -> None:
        self._count = np.zeros((rows, self._bins), np.int64)
        self._sum = np.zeros((rows, self._bins))
        self._low = np.full((rows, self._bins), np.inf)
        self._high = np.full((rows, self._bins), -np.inf)
        self._last = np.full(rows, np.nan)
        self._last_step = np.full(rows, np.iinfo(np.int64).min)
        self._bad = np.zeros(rows, np.int64)
        self._first_bad = np.full(rows, np.iinfo(np.int64).max)

    # -- reading ------------------------------------------------------------------------------------------------------

    def refresh(self) -> bool:
        """Reads what was committed since the last time; whether anything is new, the status included."""
        before = (self.status, self._seen, len(self.alarms), len(self.events), self._session)
        # The status first: what was committed before the run ended is then surely seen after it.
        with self.run._snapshot() as db:
            (number,) = db.execute("SELECT run FROM runs WHERE name = ?", (self.name,)).fetchone()
            status = self.run._status(db, number)
        with self.run._snapshot() as db:
            query = "SELECT id, started, ended, heartbeat, error, from_step FROM sessions WHERE run = ? ORDER BY id"
            sessions = db.execute(query, (number,)).fetchall()
            if self._session and any(at > self._session and back is not None for at, *_, back in sessions):
                self._forget()
            self._session = sessions[-1][0]
            self.status, self.error = status, sessions[-1][4]
            self.started = sessions[0][1]
            self.ended = None if status == "running" else sessions[-1][2] or sessions[-1][3]
            self._worked = sum((ended or beat) - started for _, started, ended, beat, *_ in sessions)
            self._read_places(db, number)
            kept = self.run._kept(db)
            while True:
                points = self.run._points(db, {}, (), [*kept, f"id > {self._seen}"], _CHUNK)
                if not len(points):
                    break
                self._take(points)
                self._seen = int(points["id"][-1])
            self.alarms = self._read_table("alarms", "evidence")
            self.events = self._read_table("events", "data")
        now = time.time()
        if self.last_step is not None:
            self._pace = [*(one for one in self._pace if one[0] > now - _RECENT), (now, self.last_step)]
        return before != (self.status, self._seen, len(self.alarms), len(self.events), self._session)

    def _read_places(self, db: Any, number: int) -> None:
        query = "SELECT id, measure, site, layer, head, unit, expert FROM series WHERE id > ? AND run = ? ORDER BY id"
        found = db.execute(query, (self._series, number)).fetchall()
        if not found:
            return
        self._series = found[-1][0]
        kept = [one for one in found if one[5] is None]
        self.units += len(found) - len(kept)
        if self._series >= len(self._row):
            grown = np.full(2 * self._series, -1)
            grown[: len(self._row)] = self._row
            self._row = grown
        for series, measure, site, layer, head, _, expert in kept:
            self._row[series] = len(self.places)
            self.places[series] = Place(measure, site, _block(site) if layer is None else layer, head, expert)
        self._grow(len(self.places))

    def _read_table(self, table: str, column: str) -> list[dict[str, Any]]:
        frame = self.run._table(table, None)
        if "run" in frame:
            frame = frame[frame["run"] == self.name].drop(columns="run")
        return frame.astype(object).where(frame.notna(), None).to_dict("records")

    def _grow(self, rows: int) -> None:
        """Room for so many series, with bins for as long as they are few enough."""
        have = len(self._count)
        if rows <= have:
            return
        rows = max(rows, 2 * have, 16)
        old = [getattr(self, name) for name in _COLUMNS]
        self._table(rows)
        for name, part in zip(_COLUMNS, old, strict=True):
            getattr(self, name)[:have] = part
        wanted = max(_FEWEST, _CELLS // rows)
        if wanted < self._bins:
            self._lay(wanted)

    def _take(self, points: np.ndarray) -> None:
        points = points[points["series"] < len(self._row)]
        row = self._row[points["series"]]
        points, row = points[row >= 0], row[row >= 0]
        if not len(points):
            return
        step, value = points["step"], points["value"]
        self.rows += len(points)
        low, high = int(step.min()), int(step.max())
        self.first_step = low if self.first_step is None else min(low, self.first_step)
        self.last_step = high if self.last_step is None else max(high, self.last_step)
        self._lay(self._bins)
        order = np.lexsort((step, row))  # which leaves what was logged at one step in the order in which it came
        last = order[np.flatnonzero(np.diff(row[order], append=-1))]
        last = last[step[last] >= self._last_step[row[last]]]
        self._last[row[last]], self._last_step[row[last]] = value[last], step[last]
        finite = np.isfinite(value)
        np.add.at(self._bad, row[~finite], 1)
        np.minimum.at(self._first_bad, row[~finite], step[~finite])
        at = (row[finite], (step[finite] >> self._shift) - self._base)
        np.add.at(self._count, at, 1)
        np.add.at(self._sum, at, value[finite])
        np.minimum.at(self._low, at, value[finite])
        np.maximum.at(self._high, at, value[finite])

    def _lay(self, bins: int) -> None:
        """Bins that hold the run from its first to its last step, in at most so many columns."""
        first, last = self.first_step or 0, self.last_step or 0
        shift = self._shift
        while (last >> shift) - (first >> shift) >= bins:
            shift += 1
        base = first >> shift
        if (bins, shift, base) == (self._bins, self._shift, self._base):
            return
        (count, total, low, high), rest = (
            [getattr(self, name) for name in names] for names in (_COLUMNS[:4], _COLUMNS[4:])
        )
        goes = ((self._base + np.arange(self._bins)) >> (shift - self._shift)) - base
        self._bins, self._shift, self._base = bins, shift, base
        self._table(len(count))
        for name, part in zip(_COLUMNS[4:], rest, strict=True):
            setattr(self, name, part)
        for j in np.flatnonzero(count.any(0)):
            to = goes[j]
            self._count[:, to] += count[:, j]
            self._sum[:, to] += total[:, j]
            np.minimum(self._low[:, to], low[:, j], out=self._low[:, to])
            np.maximum(self._high[:, to], high[:, j], out=self._high[:, to])

    # -- what there is ------------------------------------------------------------------------------------------------

    @property
    def width(self) -> int:
        """Steps in a bin."""
        return 1 << self._shift

    @property
    def bins(self) -> int:
        """How many bins the run fills up to now."""
        return 0 if self.last_step is None else (self.last_step >> self._shift) - self._base + 1

    @property
    def steps(self) -> np.ndarray:
        """The middle of every bin."""
        return (self._base + np.arange(self.bins)) * self.width + (self.width - 1) / 2

    @property
    def measures(self) -> list[str]:
        """The names under which something was logged, single units left out, each once, in the order they came."""
        return list(dict.fromkeys(place.measure for place in self.places.values()))

    @property
    def pace(self) -> float | None:
        """Steps a second: of the last half minute while it runs, of the whole otherwise; None when not known."""
        if self.status == "running" and len(self._pace) > 1 and self._pace[-1][1] > self._pace[0][1]:
            (then, from_step), (now, to_step) = self._pace[0], self._pace[-1]
            return (to_step - from_step) / (now - then)
        if self.last_step is None or self._worked <= 0 or self.last_step == self.first_step:
            return None
        return (self.last_step - self.first_step) / self._worked

    @property
    def seconds(self) -> float:
        """How long the run has been worked on, in all its sessions."""
        return self._worked

    def find(self, measure: str, site: str | None = None) -> list[int]:
        """The series of a measure, of one site where it is named."""
        return [
            i for i, place in self.places.items() if place.measure == measure and (site is None or place.site == site)
        ]

    def curve(self, series: int) -> Curve:
        """One series in bins; those without a finite number are left out."""
        row = self._row[series]
        count = self._count[row, : self.bins]
        some = count > 0
        mean = self._sum[row, : self.bins][some] / count[some]
        low, high = self._low[row, : self.bins][some], self._high[row, : self.bins][some]
        return Curve(self.steps[some], mean, low, high, count[some])

    def table(self, series: list[int], of: str = "mean") -> np.ndarray:
        """Several series, (series, bin); NaN where nothing finite was logged. `of` is mean, low, high or count."""
        rows = self._row[series]
        count = self._count[rows, : self.bins]
        if of == "count":
            return count
        values = {"mean": self._sum, "low": self._low, "high": self._high}[of][rows, : self.bins]
        with np.errstate(invalid="ignore"):
            return np.where(count > 0, values / np.maximum(count, 1) if of == "mean" else values, np.nan)

    def latest(self, series: int) -> float:
        """The number of the last step at which it was logged."""
        return float(self._last[self._row[series]])

    def not_finite(self, series: int) -> tuple[int, int] | None:
        """How many numbers were not finite and the step of the first; None when all were."""
        row = self._row[series]
        return (int(self._bad[row]), int(self._first_bad[row])) if self._bad[row] else None


def _block(site: str | None) -> int | None:
    """The layer that a site or a component says: 3 for ``blocks.3.attn``."""
    _, found, rest = (site or "").partition("blocks.")
    number = rest.partition(".")[0]
    return int(number) if found and number.isdecimal() else None
