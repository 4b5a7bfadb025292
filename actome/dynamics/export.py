"""Export: a run as Parquet files, which need no actome to be read."""

from __future__ import annotations

import shutil
from pathlib import Path

from actome.core.errors import RunError

from .schema import TENSORS, as_json, why
from .store import RunStore

_CHUNK = 500_000  # rows in memory at a time


def to_parquet(store: RunStore, folder: Path, *, tensors: bool = False) -> Path:
    """Writes ``measured.parquet``, ``runs``, ``facts``, ``alarms``, ``events`` and ``tensors.parquet``.

    What a run logged before it went back to an earlier step is left out. NaN stays NaN, and a place that does not apply
    is null.

    Args:
        store: a run, or several that were merged.
        folder: does not exist yet; appears when it is whole.
        tensors: copy the shards that ``tensors.parquet`` names too.

    Raises:
        RunError: the folder exists, or cannot be written.
    """
    import pyarrow as pa

    if folder.exists():
        raise RunError(f"{folder} exists already; choose another")
    temporary = folder.with_name(f".{folder.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        _measured(store, temporary / "measured.parquet")
        _tables(store, temporary)
        if tensors and (store.path / TENSORS).is_dir():
            (temporary / TENSORS).mkdir()
            for shard in store.tensors["shard"].unique():
                shutil.copyfile(store.path / shard, temporary / shard)
        temporary.rename(folder)
    except (OSError, pa.ArrowException) as error:
        raise RunError(f"{folder} could not be written: {why(error)}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _measured(store: RunStore, path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    whole, text = pa.int64(), pa.string()
    places = {"layer": whole, "head": whole, "unit": whole, "expert": whole}
    kinds = {"run": text, "step": whole, "site": text, **places, "measure": text, "value": pa.float64()}
    schema = pa.schema(list(kinds.items()))
    with store._snapshot() as db, pq.ParquetWriter(path, schema) as writer:
        series, kept = store._series(db), store._kept(db)
        only = next(iter(store.configs))
        last = db.execute("SELECT max(id) FROM points").fetchone()[0] or 0
        for low in range(0, last, _CHUNK):
            span = f"id > {low} AND id <= {low + _CHUNK}"
            frame = store._rows(db, series, list(series), [*kept, span])
            if "run" not in frame:
                frame = frame.assign(run=only)
            columns = [
                pa.array(frame[name], kind, from_pandas=kind != pa.float64())
                if name in frame
                else pa.nulls(len(frame), kind)
                for name, kind in kinds.items()
            ]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))


def _tables(store: RunStore, folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def write(name: str, rows: list[dict[str, object]], schema: pa.Schema) -> None:
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / f"{name}.parquet")

    whole, text, real = pa.int64(), pa.string(), pa.float64()
    only = next(iter(store.configs))

    def records(name: str) -> list[dict[str, object]]:
        frame = getattr(store, name)
        if name != "runs" and "run" not in frame:
            frame = frame.assign(run=only)
        frame = frame.astype(object).where(frame.notna(), None)
        rows = frame.to_dict("records")
        for row in rows:
            for key in ("evidence", "data"):
                if key in row:
                    row[key] = as_json(row[key])
        return rows

    about: list[dict[str, object]] = []
    for name, some in (("config", store.configs), ("meta", store.metas)):
        about += [
            {"run": run, "about": name, "key": key, "value": as_json(value)}
            for run, facts in some.items()
            for key, value in facts.items()
        ]
    write("facts", about, pa.schema({"run": text, "about": text, "key": text, "value": text}))
    base = {"run": text, "step": whole, "name": text, "time": real}
    alarms = {"level": text, "site": text, "message": text, "advice": text, "evidence": text}
    stored = {"site": text, "dtype": text, "shape": pa.list_(whole), "shard": text, "key": text}
    spans = {"started": real, "ended": real, "first_step": whole, "last_step": whole}
    write("runs", records("runs"), pa.schema({"name": text, "uid": text, "status": text, **spans}))
    write("alarms", records("alarms"), pa.schema({**base, **alarms}))
    write("events", records("events"), pa.schema({**base, "data": text}))
    write("tensors", records("tensors"), pa.schema({**base, **stored}))
