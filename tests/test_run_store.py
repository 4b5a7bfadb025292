"""The run store: nothing committed is lost, one writer, any number of readers, and what goes in comes out."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sqlite3
import struct
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import actome.dynamics.sinks
from actome.core.errors import RunError
from actome.core.sites import Site
from actome.core.table import tidy
from actome.dynamics import RunStore, Sink, TensorBoardSink, TrackioSink, WandbSink, merge, recover
from actome.dynamics.schema import connect

NAN, INF = math.nan, math.inf


@pytest.fixture(scope="module", autouse=True)
def quick_disk():
    """Leaves out the waiting for the disk, which only a power cut would show."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "a"


def played(trial: str, *words: object) -> dict:
    """A trial of store_trials.py, in processes of its own."""
    command = [sys.executable, str(Path(__file__).with_name("store_trials.py")), trial, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def slow_thread(path: Path, **options):
    """A run whose thread never commits, so that a test knows what is committed."""
    return RunStore.create(path, seconds=600.0, **options)


def tidy_rows(steps: int = 3) -> pd.DataFrame:
    """Rows with every kind of place, as measures give them."""
    sites = [Site(f"blocks.{i}.attn.pattern", ("batch", "head", "query", "key"), layer=i) for i in range(2)]
    values = {"sink": torch.rand(2, 3), "entropy": torch.rand(2, 3)}
    parts = [tidy(values, {"sink": ("head",), "entropy": ("head",)}, sites).assign(step=s) for s in range(steps)]
    units = pd.DataFrame({"step": 0, "site": "blocks.0.mlp.act", "unit": range(5), "measure": "dead", "value": 0.5})
    loss = pd.DataFrame({"step": [0], "measure": ["loss"], "value": [2.0]})
    return pd.concat([*parts, units, loss], ignore_index=True).astype(dict.fromkeys(("layer", "head", "unit"), "Int64"))


# -- killed, full, not alone ------------------------------------------------------------------------------------------


def test_killed_at_random_moments(tmp_path):
    found = played("kill", tmp_path, 0, 9)
    # The kills fell before a run began, before its first commit and well into it; each was looked at by the trial.
    assert found["killed"] == 27
    assert found["begun"] > 12
    assert found["told"] > 6
    assert found["most_steps"] > 20


@pytest.mark.slow
def test_killed_five_hundred_times(tmp_path):
    assert played("kill", tmp_path, 1, 170)["killed"] == 510


def test_full_disk(tmp_path):
    found = played("full", tmp_path)
    assert "a full disk" in found["message"]
    assert f"{found['committed']} rows are committed" in found["message"]
    assert "500 wait in memory" in found["message"]
    assert found["committed"] > 0
    assert found["readable"]  # by another, meanwhile
    assert "a full disk" in found["tensor"]
    assert found["files"] == []  # no half of a shard
    assert found["whole"]  # once there is room, every row is there, once
    assert found["shape"] == [100_000]


def test_one_writer_any_readers_and_a_successor(tmp_path):
    found = played("others", tmp_path)
    assert found["seen"] == [[n, n, "running"] for n in (1, 2, 3, 4)]  # an open reader and a new one see every commit
    assert len(found["refusals"]) == 8
    for refusal in found["refusals"]:
        assert f"process {found['pid']} on " in refusal
        assert "one writer" in refusal
    assert found["after"] == "killed"
    assert found["during"] == "running"
    assert "forked" in found["fork"]
    assert found["end"] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert found["status"] == "finished"


def test_two_writers_in_one_process(folder):
    with slow_thread(folder):
        with pytest.raises(RunError, match=rf"process {os.getpid()} \(this process\)"):
            RunStore.resume(folder)
        assert RunStore.open(folder).status == "running"  # looking does not take the lock away
        with pytest.raises(RunError, match=r"being written"):
            RunStore.resume(folder)
    with RunStore.resume(folder):
        pass


def test_the_end_of_a_process_commits(folder):
    code = (
        "import sys; from actome.dynamics import RunStore; run = RunStore.create(sys.argv[1], seconds=600.0)\n"
        "run.log(0, {'a': 1.0})\n"
    )
    done = [subprocess.run([sys.executable, "-c", code, str(folder)], check=False).returncode]
    assert RunStore.open(folder).scalars("a").tolist() == [1.0]
    assert RunStore.open(folder).status == "finished"
    other = folder.with_name("b")
    failing = [sys.executable, "-c", code + "raise ValueError('lost')", str(other)]
    done.append(subprocess.run(failing, check=False, capture_output=True).returncode)
    assert done == [0, 1]
    assert RunStore.open(other).scalars("a").tolist() == [1.0]
    assert RunStore.open(other).status == "failed"


def test_failed_and_finished(folder):
    run = slow_thread(folder)

    def fails():
        with run:
            run.log(0, {"a": 1.0})
            raise ZeroDivisionError("no")

    with pytest.raises(ZeroDivisionError):
        fails()
    found = RunStore.open(folder)
    assert found.status == "failed"
    assert found.scalars("a").tolist() == [1.0]
    assert found.runs["ended"].notna().all()
    with pytest.raises(RunError, match=r"closed"):
        run.log(1, {"a": 1.0})
    assert not list(folder.glob("run.sqlite-*"))  # a run that has ended is one file and its shards


def test_interrupted_within_a_commit(folder, monkeypatch):
    """Ctrl-C between two statements: nothing is lost and nothing is twice."""

    class Cut:
        """A connection that is interrupted before, or right after, a certain statement."""

        def __init__(self, db, statement, after):
            self.db, self.statement, self.after = db, statement, after

        def __getattr__(self, name):
            return getattr(self.db, name)

        def execute(self, text, *args):
            if text.startswith(self.statement) and not self.after:
                raise KeyboardInterrupt
            found = self.db.execute(text, *args)
            if text.startswith(self.statement):
                raise KeyboardInterrupt
            return found

    with slow_thread(folder) as run:
        step = 0
        for statement in ("BEGIN", "UPDATE", "COMMIT"):
            for after in (False, True):
                run.log(step, {"a": float(step), f"b{step}": 1.0})
                monkeypatch.setattr(run, "_db", Cut(run._db, statement, after))
                try:
                    run.commit()
                except KeyboardInterrupt:
                    pass
                else:
                    assert (statement, after) == ("COMMIT", True)
                monkeypatch.undo()
                step += 1
    assert RunStore.open(folder).scalars("a").tolist() == [float(s) for s in range(step)]
    assert RunStore.open(folder).measures == ["a", *(f"b{s}" for s in range(step))]


# -- numbers ----------------------------------------------------------------------------------------------------------


def test_values_come_back(folder):
    values = [0.0, -0.0, NAN, INF, -INF, 1e-320, 1.7976931348623157e308, 0.1, 3, True, 2**53]
    with slow_thread(folder) as run:
        for step, value in enumerate(values):
            run.log(step, {"x": value})
        run.log(np.int64(99), {"x": np.float32(0.5), "y": torch.tensor(0.25, dtype=torch.bfloat16)})
    found = RunStore.open(folder).scalars("x")
    assert found.dtype == np.float64
    assert found.index.tolist() == [*range(len(values)), 99]
    assert np.array_equal(found, np.array([*map(float, values), 0.5]), equal_nan=True)
    assert RunStore.open(folder).scalars("y").tolist() == [0.25]


@given(
    rows=st.lists(
        st.tuples(
            st.integers(-5, 2**40),
            st.sampled_from(["loss", "sink", "ä/δ 'x'"]),
            st.none() | st.sampled_from(["embed", "blocks.0.mlp.act"]),
            st.none() | st.integers(0, 3),
            st.floats(width=64),
        ),
        max_size=30,
    ),
    cut=st.integers(0, 30),
    every=st.sampled_from([1, 3, 1000]),
)
@settings(max_examples=12, deadline=None)
def test_log_and_log_rows_give_the_same(rows, cut, every, tmp_path_factory):
    """In whatever order and portions, by number or by table."""
    folder = tmp_path_factory.mktemp("same")
    with slow_thread(folder / "a", every_rows=every) as run:
        for step, name, site, head, value in rows:
            run.log(step, {name: value}, site=site, head=head)
    with slow_thread(folder / "b", every_rows=every) as run:
        table = pd.DataFrame(rows, columns=["step", "measure", "site", "head", "value"])
        table["head"] = table["head"].astype("Int64")
        run.log_rows(table[:cut])
        run.log_rows([dict(row) for row in table[cut:].astype(object).to_dict("records")])
    one, two = (RunStore.open(folder / name).frame() for name in "ab")
    pd.testing.assert_frame_equal(one, two)
    assert one["step"].tolist() == [row[0] for row in rows]
    assert one["measure"].tolist() == [row[1] for row in rows]
    assert [None if pd.isna(s) else s for s in one["site"]] == [row[2] for row in rows]
    assert np.array_equal(one["value"], [row[4] for row in rows], equal_nan=True)


def test_tidy_rows_come_back(folder):
    rows = tidy_rows()
    with slow_thread(folder) as run:
        run.log_rows(rows)
        run.log_rows(rows[rows["step"] == 2].drop(columns="step"), step=7)
        run.log_rows(types.SimpleNamespace(frame=rows[:0]), step=8)
    found = RunStore.open(folder).frame()
    assert found.columns.tolist() == ["step", "site", "layer", "head", "unit", "measure", "value"]
    assert found.dtypes[["step", "layer", "head", "unit", "value"]].astype(str).tolist() == [
        "int64", "Int64", "Int64", "Int64", "float64",
    ]  # fmt: skip
    again = pd.concat([rows, rows[rows["step"] == 2].assign(step=7)], ignore_index=True)
    # Text without a value is NaN or None, by the version of pandas.
    pd.testing.assert_frame_equal(
        found.fillna({"site": ""}), again[found.columns].fillna({"site": ""}), check_dtype=False
    )


def test_a_table_of_a_model_is_logged(folder):
    import actome as ac

    model = ac.wrap(torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU()))
    table = model.measure([torch.randn(8, 4)], {"module:1": [ac.measures.Sparsity()]})
    with slow_thread(folder) as run:
        run.log_rows(table, step=0)
    found = RunStore.open(folder).frame()
    assert np.array_equal(found["value"], table.frame["value"], equal_nan=True)
    assert found["measure"].tolist() == table.frame["measure"].tolist()


def test_filters(folder):
    with slow_thread(folder) as run:
        run.log_rows(tidy_rows())
        run.log(5, {"loss": 1.0, "sink": 0.0})
    store = RunStore.open(folder)
    everything = store.frame()
    for one in ("sink", ["sink", "loss"]):
        wanted = everything[everything["measure"].isin([one] if isinstance(one, str) else one)]
        assert store.frame(measure=one)["value"].tolist() == wanted["value"].tolist()
    heads = store.frame(measure="sink", site="blocks.{0..1}.attn.*", since=1)
    assert heads["step"].unique().tolist() == [1, 2]
    assert set(heads["site"]) == {"blocks.0.attn.pattern", "blocks.1.attn.pattern"}
    assert "unit" not in heads
    assert store.frame(since=100).empty
    assert store.scalars("sink").tolist() == [0.0]  # the plain number, beside those of the heads
    assert store.measures == ["sink", "entropy", "dead", "loss"]
    with pytest.raises(RunError, match=r"no measure 'los'; nearest: loss"):
        store.frame(measure="los")
    with pytest.raises(RunError, match=r"nearest: blocks\.0\.attn\.pattern"):
        store.frame(site="blocks.0.attn.patern")
    with pytest.raises(RunError, match=r"6 places .*head 0"):
        store.scalars("entropy")
    with pytest.raises(RunError, match=r"no run 'b'"):
        store.frame(run="b")


def test_many_series(folder, monkeypatch):
    """More series than a query names one by one are sifted here, with the same result."""
    units = pd.DataFrame({"site": "mlp", "unit": range(50), "measure": "dead", "value": np.arange(50.0)})
    with slow_thread(folder) as run:
        run.log_rows(units, step=0)
        run.log(1, {"loss": 1.0})
    named = RunStore.open(folder).frame(measure="dead")
    monkeypatch.setattr("actome.dynamics.store._LISTED", 10)
    pd.testing.assert_frame_equal(RunStore.open(folder).frame(measure="dead"), named)
    assert named["unit"].tolist() == list(range(50))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"x": "1.5"}, r"'x' is '1\.5' \(str\)"),
        ({"x": None}, "'x' is None"),
        ({"x": torch.zeros(2)}, r"shape \(2,\).*log_tensor"),
        ({"x": np.zeros((1, 2))}, r"shape \(1, 2\)"),
        ({"x": 1j}, "complex"),
        ({"x": 10**400}, "int"),
        ({"": 1.0}, "under a name"),
        ({3: 1.0}, "under a name"),
    ],
)
def test_what_is_no_number(folder, values, says):
    with slow_thread(folder) as run:
        with pytest.raises(RunError, match=says):
            run.log(0, {"good": 1.0, **values} if "x" in values else values)
        with pytest.raises(RunError, match=r"a step is a whole number"):
            run.log(0.5, {"good": 1.0})
        run.log(1, {"good": 1.0})
    assert RunStore.open(folder).scalars("good").to_dict() == {1: 1.0}  # a refused call leaves nothing


@pytest.mark.parametrize(
    ("rows", "step", "says"),
    [
        ([{"measure": "a"}], 0, "no column 'value'"),
        ([{"measure": "a", "value": 1.0, "heads": 1}], 0, "'heads'.*nearest: head"),
        ([{"measure": "a", "value": 1.0}], None, "no step was given"),
        ([{"measure": "a", "value": 1.0, "step": 1}], 1, "which is meant"),
        ([{"measure": "a", "value": "much", "step": 1}], None, "'value' is 'much'"),
        ([{"measure": "a", "value": 1.0, "step": 0.5}], None, "no number"),
        ([{"measure": "a", "value": 1.0, "step": 1, "head": 0.5}], None, "a place is a whole number"),
        ([{"measure": "a", "value": 1.0, "step": 1}, {"measure": "a", "value": 1.0}], None, "have no step"),
    ],
)
def test_what_is_no_tidy_row(folder, rows, step, says):
    with slow_thread(folder) as run:
        with pytest.raises(RunError, match=says):
            run.log_rows(rows, step)
        assert run.frame().empty


# -- what a run is ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Settings:
    lr: float = 0.1
    layers: int = 2


def test_config_keeps_types(folder):
    config = {
        "int": 3, "big": 2**80, "bool": True, "float": 1.0, "nan": NAN, "str": "adamw", "digits": "3", "none": None,
        "list": [1, 2.0, "x"], "nested": {"a": {"b": False}}, "dtype": torch.bfloat16, "path": Path("x"),
        "np": np.float32(0.5), "set": {2, 1},
    }  # fmt: skip
    with slow_thread(folder, config=config, seed=7, meta={"note": "first"}) as run:
        pass
    found = RunStore.open(folder)
    wanted = {**config, "dtype": "torch.bfloat16", "path": "x", "set": [1, 2]}
    assert list(found.config) == list(wanted)
    for key, value in wanted.items():
        if key != "nan":
            assert found.config[key] == value, key
        assert isinstance(found.config[key], type(value) if key != "np" else float), key
    assert math.isnan(found.config["nan"])
    assert found.meta["seed"] == 7
    assert found.meta["note"] == "first"
    assert {"actome", "python", "torch", "host", "command"} <= set(found.meta)
    assert run.path == folder


@pytest.mark.parametrize("config", [Settings(), argparse.Namespace(lr=0.1, layers=2), {"lr": 0.1, "layers": 2}])
def test_kinds_of_config(folder, config):
    slow_thread(folder, config=config).close()
    assert RunStore.open(folder).config == {"lr": 0.1, "layers": 2}


def test_a_config_that_is_none(folder):
    with pytest.raises(RunError, match=r"a dict, a dataclass or a Namespace; this is int"):
        slow_thread(folder, config=3)
    with slow_thread(folder):  # the folder is as if nothing had been tried
        pass


def test_alarms_and_events(folder):
    with slow_thread(folder) as run:
        run.event("checkpoint", 3, path="x.pt", size=np.int64(3))
        run.event("begun")
        run.alarm(4, "non_finite", "NaN in 3 units", site="blocks.1.mlp.act", level="critical", evidence={"units": 3})
        # Committed at once, and all that came before it.
        seen = RunStore.open(folder)
        assert len(seen.alarms) == 1
        assert len(seen.events) == 2
        with pytest.raises(RunError, match=r"info, warning, critical; not 'bad'"):
            run.alarm(4, "x", "y", level="bad")
    (alarm,) = RunStore.open(folder).alarms.to_dict("records")
    assert alarm["evidence"] == {"units": 3}
    assert (alarm["step"], alarm["name"], alarm["level"], alarm["site"]) == (
        4, "non_finite", "critical", "blocks.1.mlp.act",
    )  # fmt: skip
    events = RunStore.open(folder).events
    assert events["step"].isna().tolist() == [False, True]
    assert events["data"].tolist() == [{"path": "x.pt", "size": 3}, {}]


def test_resume_goes_back(folder):
    with slow_thread(folder) as run:
        for step in range(6):
            run.log(step, {"loss": 1.0})
            run.log_tensor(step, "w", torch.full((2,), 1.0))
        run.alarm(5, "late", "gone")
    with RunStore.resume(folder, from_step=3) as run:
        run.log(3, {"loss": 2.0, "new": 0.0})
        run.log_tensor(3, "w", torch.full((2,), 2.0))
    with RunStore.resume(folder) as run:  # keeps everything
        run.log(4, {"loss": 3.0})
    found = RunStore.open(folder)
    assert found.scalars("loss").to_dict() == {0: 1.0, 1: 1.0, 2: 1.0, 3: 2.0, 4: 3.0}
    assert found.frame(measure="loss")["value"].tolist() == [1.0, 1.0, 1.0, 2.0, 3.0]
    assert len(found.frame(measure="loss", superseded=True)) == 8
    assert found.alarms.empty
    assert found.tensor("w").tolist() == [2.0, 2.0]
    assert found.tensors["step"].tolist() == [0, 1, 2, 3]
    assert found.measures == ["loss", "new"]


def test_folders_that_will_not_do(tmp_path, folder):
    with pytest.raises(RunError, match=r"there is no run"):
        RunStore.open(folder)
    folder.mkdir()
    with pytest.raises(RunError, match=r"is not a run"):
        RunStore.open(folder)
    (folder / "mine.txt").write_text("x")
    with pytest.raises(RunError, match=r"not empty and not a run"):
        RunStore.create(folder)
    with pytest.raises(RunError, match=r"is a file"):
        RunStore.create(folder / "mine.txt")
    other = tmp_path / "b"
    with slow_thread(other) as run:
        run.log_tensor(0, "t", torch.zeros(1))
    with pytest.raises(RunError, match=r"holds a run already"):
        RunStore.create(other)
    with pytest.raises(RunError, match=r"there is no run .*nearest: bb"):
        slow_thread(tmp_path / "bb").close() or RunStore.open(tmp_path / "bbb")
    (other / "notes.txt").write_text("x")
    with RunStore.create(other, overwrite=True) as run:
        assert run.frame().empty
    assert (other / "notes.txt").exists()
    assert not list((other / "tensors").iterdir())


def test_an_empty_beginning(folder):
    """What a writer leaves that is killed before its tables are there."""
    folder.mkdir()
    (folder / "run.lock").touch()
    connect(folder / "run.sqlite", write=True).execute("PRAGMA journal_mode = WAL")
    with pytest.raises(RunError, match=r"killed before it began"):
        RunStore.open(folder)
    with slow_thread(folder) as run:
        run.log(0, {"a": 1.0})


def test_later_and_other_databases(folder):
    slow_thread(folder).close()
    db = sqlite3.connect(folder / "run.sqlite")
    db.execute("PRAGMA user_version = 7")
    db.close()
    for begin in (RunStore.open, RunStore.resume):
        with pytest.raises(RunError, match=r"schema version 7, and this actome reads up to 1"):
            begin(folder)
    (folder / "run.sqlite").unlink()
    db = sqlite3.connect(folder / "run.sqlite")
    db.execute("CREATE TABLE x(y)")
    db.close()
    with pytest.raises(RunError, match=r"not of a run of actome"):
        RunStore.open(folder)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_folder(folder):
    with slow_thread(folder) as run:
        run.log(0, {"a": 1.0})
    folder.chmod(0o555)
    try:
        assert RunStore.open(folder).scalars("a").tolist() == [1.0]
    finally:
        folder.chmod(0o755)


def test_read_where_nothing_can_be_written(folder, monkeypatch):
    """As an archive; root may write everywhere, so the system is said to refuse."""
    with slow_thread(folder) as run:
        run.log(0, {"a": 1.0})
    monkeypatch.setattr(os, "access", lambda *_: False)
    before = sorted(folder.iterdir())
    store = RunStore.open(folder)
    assert store.scalars("a").tolist() == [1.0]
    assert sorted(folder.iterdir()) == before


# -- tensors ----------------------------------------------------------------------------------------------------------


def test_tensors(folder):
    base = torch.randn(4, 6)
    with slow_thread(folder) as run:
        run.log_tensors(0, {"a": base[:, 1:3], "b": base.t(), "half": base.bfloat16(), "empty": torch.zeros(0, 3)})
        run.log_tensor(5, "a", [[1.0, 2.0]])
        run.log_tensor(5, "a", base, site="blocks.0.mlp.act")
        with pytest.raises(RunError, match=r"'a' is no tensor but str"):
            run.log_tensor(6, "a", "x")
        seen = RunStore.open(folder)  # while it is written
        assert torch.equal(seen.tensor("half"), base.bfloat16())
    store = RunStore.open(folder)
    assert torch.equal(store.tensor("b"), base.t())
    assert torch.equal(store.tensor("empty"), torch.zeros(0, 3))
    assert torch.equal(store.tensor("a", site="blocks.0.mlp.act"), base)
    assert torch.equal(store.tensor("half"), base.bfloat16())
    index = store.tensors
    assert index["shape"].tolist() == [(4, 2), (6, 4), (4, 6), (0, 3), (1, 2), (4, 6)]
    assert index["dtype"].tolist() == ["float32", "float32", "bfloat16", "float32", "float32", "float32"]
    size = (folder / index["shard"][0]).stat().st_size
    assert size < 1500  # a slice brings no more than itself
    with pytest.raises(RunError, match=r"name one of them"):
        store.tensor("a")
    with pytest.raises(RunError, match=r"no tensor 'c'"):
        store.tensor("c")
    with pytest.raises(RunError, match=r"not logged at step 3; nearest: 0"):
        store.tensor("b", step=3)


def test_missing_and_damaged_shards(folder):
    with slow_thread(folder) as run:
        for step in range(3):
            run.log_tensor(step, "t", torch.full((3,), float(step)))
    shards = sorted((folder / "tensors").iterdir())
    shards[0].unlink()
    shards[1].write_bytes(shards[1].read_bytes()[:-4])
    store = RunStore.open(folder)
    with pytest.raises(RunError, match=r"'t' of step 0 is missing"):
        store.tensor("t", step=0)
    with pytest.raises(RunError, match=r"'t' of step 1 is damaged"):
        store.tensor("t", step=1)
    assert store.tensor("t").tolist() == [2.0] * 3


def test_shards_without_a_row_are_swept(folder):
    with slow_thread(folder) as run:
        run.log_tensor(0, "t", torch.zeros(1))
    for name in ("00000002.safetensors", ".00000003.safetensors.tmp"):
        (folder / "tensors" / name).write_bytes(b"half")
    with RunStore.resume(folder) as run:
        run.log_tensor(1, "t", torch.ones(1))
        assert run.tensor("t").tolist() == [1.0]
    assert [path.name for path in sorted((folder / "tensors").iterdir())] == [
        "00000001.safetensors", "00000002.safetensors",
    ]  # fmt: skip


# -- following --------------------------------------------------------------------------------------------------------


def test_follow(folder):
    with slow_thread(folder) as run:
        run.log(0, {"a": 0.0})
        run.commit()
        news = RunStore.open(folder).follow(poll=0.0)
        first = next(news)
        assert first.rows["step"].tolist() == [0]
        assert first.status == "running"
        run.log(1, {"a": NAN, "b": 1.0})
        run.alarm(1, "non_finite", "a is NaN")
        second = next(news)
        assert second.rows["measure"].tolist() == ["a", "b"]
        assert second.alarms["name"].tolist() == ["non_finite"]
        assert second.events.empty
        late = RunStore.open(folder).follow(poll=0.0, new=True)
        run.log(2, {"a": 2.0})
        run.commit()
        assert next(late).rows["step"].tolist() == [2]
        run.log(3, {"a": 3.0})
    rest = list(news)
    assert [row for part in rest for row in part.rows["step"]] == [2, 3]
    assert rest[-1].status == "finished"
    assert [row for part in late for row in part.rows["step"]] == [3]


def test_the_thread_commits(folder):
    """Without anything being logged or committed by the one who writes."""
    with RunStore.create(folder, seconds=0.001) as run:
        run.log(0, {"a": 1.0})
        assert next(RunStore.open(folder).follow(poll=0.001)).rows["value"].tolist() == [1.0]


def test_the_thread_cannot_commit(folder):
    """Whoever logs next is told, and what was logged is there when it can be written again."""
    with RunStore.create(folder, seconds=0.0005, every_rows=10**6) as run:
        real = run._db
        run._db = types.SimpleNamespace(execute=_no_room, in_transaction=False)
        told, count = "", 0
        while not told:
            count += 1
            try:
                run.log(count, {"a": 1.0})
            except RunError as error:
                told = str(error)
        run._db = real
    assert "the disk is full" in told
    assert len(RunStore.open(folder).frame()) == count


def _no_room(*_):
    error = sqlite3.OperationalError("database or disk is full")
    error.sqlite_errorname = "SQLITE_FULL"
    raise error


def test_threads_that_log(folder):
    import threading

    with RunStore.create(folder, seconds=0.001, every_rows=50) as run:

        def work(name):
            for step in range(500):
                run.log(step, {name: float(step)})

        threads = [threading.Thread(target=work, args=(f"t{i}",)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    found = RunStore.open(folder)
    for i in range(4):
        assert found.scalars(f"t{i}").tolist() == [float(s) for s in range(500)]


# -- merging, exporting, recovering -----------------------------------------------------------------------------------


def some_runs(folder: Path, count: int = 3) -> list[Path]:
    paths = []
    for i in range(count):
        paths.append(folder / f"r{i}")
        with slow_thread(paths[-1], config={"seed": i}) as run:
            for step in range(4):
                run.log(step, {"loss": i + step / 10})
            run.log(0, {"sink": NAN}, site="blocks.0.attn.pattern", head=i)
            run.log_tensor(0, "w", torch.full((2,), float(i)))
            run.event("go", 0, i=i)
        with RunStore.resume(paths[-1], from_step=2) as run:
            run.log(2, {"loss": 10.0 + i})
            run.alarm(2, "late", str(i))
    return paths


def test_merge(tmp_path):
    paths = some_runs(tmp_path)
    whole = merge(paths, tmp_path / "all")
    frame = whole.frame()
    alone = [RunStore.open(path).frame().assign(run=path.name) for path in paths]
    pd.testing.assert_frame_equal(frame, pd.concat(alone, ignore_index=True)[frame.columns])
    assert frame.columns[0] == "run"
    assert whole.configs == {f"r{i}": {"seed": i} for i in range(3)}
    assert whole.runs["status"].tolist() == ["finished"] * 3
    assert whole.runs["name"].tolist() == ["r0", "r1", "r2"]
    assert whole.alarms["run"].tolist() == ["r0", "r1", "r2"]
    assert len(whole.frame(superseded=True)) == 18
    for i in range(3):
        assert whole.tensor("w", run=f"r{i}").tolist() == [i, i]
        assert whole.scalars("loss", run=f"r{i}").tolist() == [i, i + 0.1, 10.0 + i]
    with pytest.raises(RunError, match=r"3 places"):
        whole.scalars("loss")
    with pytest.raises(RunError, match=r"holds 3 runs .*`configs`"):
        _ = whole.config
    # Merged in two goes it is the same.
    merge(paths[:2], tmp_path / "two")
    pd.testing.assert_frame_equal(merge([tmp_path / "two", paths[2]], tmp_path / "twice").frame(), frame)
    with pytest.raises(RunError, match=r"merged of other runs"):
        RunStore.resume(tmp_path / "all")


def test_merge_what_will_not(tmp_path):
    paths = some_runs(tmp_path, 2)
    with pytest.raises(RunError, match=r"'r0' that .*r0 holds too"):
        merge([paths[0], paths[1], paths[0]], tmp_path / "all")
    assert not list(tmp_path.glob("*all*"))  # nothing half
    with pytest.raises(RunError, match=r"exists already"):
        merge(paths, paths[0])
    with pytest.raises(RunError, match=r"no runs"):
        merge([], tmp_path / "all")
    with pytest.raises(RunError, match=r"there is no run"):
        merge([tmp_path / "nothing"], tmp_path / "all")
    # The same name twice, and one that is still written.
    with slow_thread(tmp_path / "sub" / "r0") as run:
        run.log(0, {"loss": 5.0})
        run.commit()
        whole = merge([paths[0], tmp_path / "sub" / "r0"], tmp_path / "all")
    assert whole.runs["name"].tolist() == ["r0", "r0-2"]
    assert whole.runs["status"].tolist() == ["finished", "running"]
    assert whole.scalars("loss", run="r0-2").tolist() == [5.0]


def test_to_parquet(tmp_path):
    paths = some_runs(tmp_path, 2)
    for store in (RunStore.open(paths[0]), merge(paths, tmp_path / "all")):
        out = store.to_parquet(tmp_path / f"{store.path.name}.parquet", tensors=True)
        table = pq.read_table(out / "measured.parquet")
        frame = store.frame()
        assert [str(t) for t in table.schema.types] == [
            "string", "int64", "string", "int64", "int64", "int64", "int64", "string", "double",
        ]  # fmt: skip
        assert table["step"].to_pylist() == frame["step"].tolist()
        assert table["head"].to_pylist() == [None if pd.isna(h) else h for h in frame["head"]]
        assert table["site"].to_pylist() == [None if pd.isna(s) else s for s in frame["site"]]
        assert np.array_equal(table["value"].to_numpy(), frame["value"], equal_nan=True)
        assert table["value"].null_count == 0  # NaN is a number here
        runs = [path.name for path in paths] if "run" in frame else [paths[0].name]
        assert sorted(set(table["run"].to_pylist())) == runs
        assert pq.read_table(out / "runs.parquet")["name"].to_pylist() == runs
        facts = pq.read_table(out / "facts.parquet").to_pylist()
        assert {"run": runs[0], "about": "config", "key": "seed", "value": "0"} in facts
        (first, *_) = pq.read_table(out / "tensors.parquet").to_pylist()
        assert first["shape"] == [2]
        assert (out / first["shard"]).exists()
        assert len(pq.read_table(out / "alarms.parquet")) == len(runs)
        assert pq.read_table(out / "events.parquet")["data"].to_pylist()[0] == '{"i": 0}'
    with pytest.raises(RunError, match=r"exists already"):
        store.to_parquet(out)


def test_parquet_in_parts(folder, tmp_path, monkeypatch):
    with slow_thread(folder) as run:
        run.log_rows(pd.DataFrame({"step": range(1000), "measure": "x", "value": np.arange(1000.0)}))
    monkeypatch.setattr("actome.dynamics.export._CHUNK", 64)
    out = RunStore.open(folder).to_parquet(tmp_path / "out")
    assert pq.read_table(out / "measured.parquet")["value"].to_pylist() == list(range(1000))
    assert pq.ParquetFile(out / "measured.parquet").num_row_groups == 16


def big_run(folder: Path) -> int:
    with slow_thread(folder, config={"lr": 0.1}) as run:
        rows = pd.DataFrame({"step": range(30_000), "measure": "x", "value": np.arange(30_000.0)})
        run.log_rows(rows)
        run.log_tensor(3, "t", torch.arange(4))
        run.log_tensor(4, "t", torch.arange(5))
    return 30_000


def test_recover_a_damaged_page(folder, tmp_path):
    count = big_run(folder)
    file = folder / "run.sqlite"
    data = bytearray(file.read_bytes())
    middle = len(data) // 2 // 4096 * 4096
    data[middle : middle + 4096] = os.urandom(4096)
    file.write_bytes(data)
    (folder / "tensors" / "00000002.safetensors").write_bytes(b"no")
    with pytest.raises(RunError, match=r"is damaged .*2 tensor shards, is saved by actome.dynamics.recover"):
        RunStore.open(folder).frame()
    found = recover(folder, tmp_path / "saved")
    saved = RunStore.open(found.path)
    frame = saved.frame()
    assert found.kept["points"] == len(frame)
    assert count - 600 < len(frame) < count  # a page holds some two hundred rows
    assert found.lost["points"] == count - len(frame)
    assert (frame["step"] == frame["value"]).all()
    assert saved.config == {"lr": 0.1}
    assert saved.status == "finished"
    assert (found.shards, found.broken) == (1, ("tensors/00000002.safetensors",))
    assert saved.tensors["step"].tolist() == [3]
    assert saved.tensor("t").tolist() == [0, 1, 2, 3]


def test_recover_without_the_database(folder, tmp_path):
    big_run(folder)
    for n, damage in enumerate((b"not a database" * 1000, None)):
        if damage is None:
            (folder / "run.sqlite").unlink()
        else:
            (folder / "run.sqlite").write_bytes(damage)
            for begin in (RunStore.open, RunStore.resume, RunStore.create):
                with pytest.raises(RunError, match=r"damaged .*recover"):
                    begin(folder)
        found = recover(folder, tmp_path / f"saved{n}")
        assert found.kept["points"] == 0
        saved = RunStore.open(found.path)
        assert saved.tensors["step"].tolist() == [3, 4]  # which the shards say themselves
        assert saved.tensor("t").tolist() == [0, 1, 2, 3, 4]
        assert saved.status == "killed"
        assert saved.runs["name"].tolist() == ["a"]


def test_recover_what_will_not(folder, tmp_path):
    with slow_thread(folder), pytest.raises(RunError, match=r"being written"):
        recover(folder, tmp_path / "saved")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match=r"is not a run"):
        recover(tmp_path / "empty", tmp_path / "saved")
    (tmp_path / "empty" / "run.sqlite").write_bytes(b"x" * 5000)
    with pytest.raises(RunError, match=r"nothing of .* can be read"):
        recover(tmp_path / "empty", tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_readable_without_actome(folder):
    with slow_thread(folder) as run:
        run.log_rows(tidy_rows(1))
    db = sqlite3.connect(folder / "run.sqlite")
    rows = db.execute("SELECT run, step, site, unit, value FROM measured WHERE measure = 'dead'").fetchall()
    assert rows == [("a", 0, "blocks.0.mlp.act", unit, 0.5) for unit in range(5)]
    assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


# -- sinks ------------------------------------------------------------------------------------------------------------


class Noted(Sink):
    """What a sink was told."""

    def __init__(self):
        self.told = []

    def start(self, name, config):
        self.told.append(("start", name, dict(config)))

    def log(self, step, values):
        self.told.append(("log", step, dict(values)))

    def alarm(self, step, name, message, level):
        self.told.append(("alarm", step, name, message, level))

    def close(self):
        self.told.append(("close",))


def forwarded(folder: Path, *sinks: Sink) -> None:
    with slow_thread(folder, config={"lr": 0.1}, sinks=sinks) as run:
        run.log(0, {"loss": 1.0})
        run.log(0, {"sink": 0.5}, site="blocks.0.attn.pattern", layer=0, head=3)
        run.log(0, {"dead": 1.0}, site="blocks.0.mlp.act", unit=7)
        run.log(1, {"loss": 0.5})
        run.alarm(1, "spike", "soon", level="critical")


TOLD = [
    ("start", "a", {"lr": 0.1}),
    ("log", 0, {"loss": 1.0, "sink/blocks.0.attn.pattern/head.3": 0.5}),
    ("log", 1, {"loss": 0.5}),
    ("alarm", 1, "spike", "soon", "critical"),
    ("close",),
]


def test_sinks_are_told(folder):
    live, later = Noted(), Noted()
    forwarded(folder, live)
    RunStore.open(folder).forward(later)
    assert live.told == later.told == TOLD


def test_a_sink_that_fails_does_not_end_the_run(folder):
    class Broken(Noted):
        def log(self, step, values):
            raise ConnectionError("gone")

    good = Noted()
    with pytest.warns(RuntimeWarning, match=r"Broken failed .*gone.*forward"):
        forwarded(folder, Broken(), good)
    assert good.told == TOLD
    assert len(RunStore.open(folder).frame()) == 4


@pytest.mark.parametrize(
    ("sink", "name"), [(TensorBoardSink, "tensorboard"), (WandbSink, "wandb"), (TrackioSink, "trackio")]
)
def test_a_missing_client(sink, name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(RunError, match=rf"{name} is not installed.*pip install 'actome\[{name}\]'"):
        sink("x")


def test_tensorboard(folder, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    forwarded(folder, TensorBoardSink(tmp_path / "tb"))
    events = EventAccumulator(str(tmp_path / "tb" / "a")).Reload()
    assert events.Tags()["scalars"] == ["loss", "sink/blocks.0.attn.pattern/head.3"]
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(0, 1.0), (1, 0.5)]
    assert b"critical: soon" in events.Tensors("alarms/spike/text_summary")[0].tensor_proto.string_val[0]


def test_wandb(folder, tmp_path, monkeypatch):
    """Their own client, offline; what it was given is read back from the file that it would send."""
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    forwarded(folder, WandbSink("actome-test", mode="offline", dir=str(tmp_path)))
    (file,) = tmp_path.rglob("*.wandb")
    data, history, alerts, at = file.read_bytes(), [], [], 7
    while at < len(data):  # a log as LevelDB writes one: checksum, length, kind, record; all here fits into one block
        size, kind = struct.unpack_from("<HB", data, at + 4)
        assert kind == 1
        record = wandb_internal_pb2.Record.FromString(data[at + 7 : at + 7 + size])
        at += 7 + size
        if record.WhichOneof("record_type") == "history":
            history.append({(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in record.history.item})
        if record.WhichOneof("record_type") == "alert":
            alerts.append((record.alert.title, record.alert.text, record.alert.level))
    assert [(h["step"], h["loss"]) for h in history] == [(0, 1.0), (1, 0.5)]
    assert history[0]["sink/blocks.0.attn.pattern/head.3"] == 0.5
    assert alerts == [("spike at step 1", "soon", "ERROR")]


def test_trackio(folder, tmp_path, monkeypatch):
    """Their own client, in a process of its own, since it chooses its folder when it is imported."""
    pytest.importorskip("trackio")
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "from test_run_store import forwarded; from actome.dynamics import TrackioSink\n"
        "forwarded(Path(sys.argv[2]), TrackioSink('actome-test'))\n"
    )
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, str(Path(__file__).parent), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "trackio").glob("actome-test*.db")
    db = sqlite3.connect(file)
    rows = [(step, json.loads(text)) for step, text in db.execute("SELECT step, metrics FROM metrics ORDER BY id")]
    assert [(step, values["loss"]) for step, values in rows] == [(0, 1.0), (1, 0.5)]
    assert rows[0][1]["sink/blocks.0.attn.pattern/head.3"] == 0.5
    assert db.execute("SELECT title, text, level, step FROM alerts").fetchall() == [("spike", "soon", "error", 1)]


class Client(types.ModuleType):
    """Stands for wandb and trackio where they are not installed, with the signatures of wandb 0.31 and trackio 0.43."""

    class AlertLevel(str):
        __slots__ = ()

    def __init__(self):
        super().__init__("client")
        self.told = []

    def init(self, project=None, name=None, config=None, mode=None):
        self.told.append((project, name, config, mode))
        return self

    def define_metric(self, name, step_metric=None):
        pass

    def log(self, data, step=None):
        self.told.append((data, step))

    def alert(self, title, text=None, level=None, step=None):
        self.told.append((title, text, str(level), step))

    def finish(self):
        self.told.append("finish")


@pytest.mark.parametrize("sink", [WandbSink, TrackioSink])
def test_clients_in_place_of_theirs(folder, sink, monkeypatch):
    client = Client()
    monkeypatch.setattr(actome.dynamics.sinks, "_client", lambda *_: client)
    forwarded(folder, sink("p", mode="offline"))
    begin, first, second, alarm, end = client.told
    assert begin == ("p", "a", {"lr": 0.1}, "offline")
    values, step = first
    assert values.pop("step", step) == 0
    assert values == TOLD[1][2]
    assert alarm[0].startswith("spike")
    assert alarm[1:3] == ("soon", "ERROR" if sink is WandbSink else "error")
    assert end == "finish"
    assert second[0]["loss"] == 0.5
