"""What a live view keeps of a run and shows: bins against all rows, views of every kind of run, and the command."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from runs import training, written

from actome.cli.main import main
from actome.core.errors import RunError
from actome.dynamics import RunDigest, RunStore, merge
from actome.report.live import LiveView, print_run
from actome.report.plots import braille, spark
from actome.report.run_page import run_page
from actome.report.run_view import alarm_groups, chosen, lines, panels


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)


def shown(digest: RunDigest, width: int = 100, **options) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    print_run(digest, console, **options)
    return console.file.getvalue()


def read(path: Path, name: str | None = None, **options) -> RunDigest:
    """The digest of what is there now."""
    with RunStore.open(path) as run:
        digest = RunDigest(run, name, **options)
        digest.refresh()
    return digest


# -- the digest -------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.integers(-50, 5000), st.sampled_from("ab"), st.floats(-1e6, 1e6) | st.just(np.nan)), min_size=1
    ),
    bins=st.sampled_from([2, 3, 7, 64]),
    cuts=st.lists(st.integers(0, 200), max_size=3),
)
def test_bins_are_those_of_all_rows(rows, bins, cuts, tmp_path_factory):
    """However it is read, in one go or bit by bit: counts, means and extremes of every bin."""
    folder = tmp_path_factory.mktemp("runs") / "a"
    with RunStore.create(folder, seconds=60.0) as run:
        digest = RunDigest(run, bins=bins)  # a writer commits when it is looked at
        for i, (step, name, value) in enumerate(rows):
            run.log(step, {name: value})
            if i in cuts:
                digest.refresh()
        digest.refresh()
    steps = [step for step, *_ in rows]
    assert (digest.first_step, digest.last_step, digest.rows) == (min(steps), max(steps), len(rows))
    assert digest.width & (digest.width - 1) == 0
    assert digest.bins <= bins
    assert digest.width == 1 or (max(steps) // (digest.width // 2)) - (min(steps) // (digest.width // 2)) >= bins
    for name in {name for _, name, _ in rows}:
        (one,) = digest.find(name)
        mine = [(step, value) for step, at, value in rows if at == name]
        by_bin: dict[int, list[float]] = {}
        for step, value in mine:
            if np.isfinite(value):
                by_bin.setdefault(step // digest.width, []).append(value)
        curve = digest.curve(one)
        assert curve.step.tolist() == [at * digest.width + (digest.width - 1) / 2 for at in sorted(by_bin)]
        assert curve.count.tolist() == [len(by_bin[at]) for at in sorted(by_bin)]
        assert curve.low.tolist() == [min(by_bin[at]) for at in sorted(by_bin)]
        assert curve.high.tolist() == [max(by_bin[at]) for at in sorted(by_bin)]
        np.testing.assert_allclose(curve.mean, [np.mean(by_bin[at]) for at in sorted(by_bin)], atol=1e-6)
        last = max(step for step, _ in mine)
        np.testing.assert_equal(digest.latest(one), [value for step, value in mine if step == last][-1])
        bad = [step for step, value in mine if not np.isfinite(value)]
        assert digest.not_finite(one) == ((len(bad), min(bad)) if bad else None)


def test_a_run_that_goes_back_is_read_anew(tmp_path):
    with RunStore.create(tmp_path / "a") as run:
        for step in range(10):
            run.log(step, {"loss": 100.0})
        run.alarm(8, "spike", "the loss is high")
    digest = RunDigest(RunStore.open(tmp_path / "a"))
    assert digest.refresh()
    assert digest.status == "finished"
    assert [one["step"] for one in digest.alarms] == [8]
    with RunStore.resume(tmp_path / "a", from_step=6) as run:
        run.log(6, {"loss": 1.0})
        run.commit()
        assert digest.refresh()
        assert digest.status == "running"
        assert digest.curve(digest.find("loss")[0]).mean.tolist() == [100.0] * 6 + [1.0]
        assert digest.alarms == []
    assert digest.refresh()
    assert not digest.refresh()


def test_units_are_left_out_and_counted(tmp_path):
    with RunStore.create(tmp_path / "a") as run:
        run.log(0, {"rate": 0.5}, site="mlp", unit=3)
        run.log(0, {"loss": 0.5})
    digest = read(tmp_path / "a")
    assert (digest.measures, digest.units, digest.rows) == (["loss"], 1, 1)
    with RunStore.create(tmp_path / "b") as run:
        run.log(0, {"rate": 0.5}, site="mlp", unit=3)
    assert "Nothing was logged. 1 series of single units are not shown." in shown(read(tmp_path / "b"))


def test_many_series_share_the_room(tmp_path, monkeypatch):
    monkeypatch.setattr("actome.dynamics.digest._CELLS", 4000)
    with RunStore.create(tmp_path / "a") as run:
        for step in range(300):
            run.log(step, {f"m{i}": float(step) for i in range(40)})
    digest = read(tmp_path / "a")
    assert digest.bins <= 100
    for i in (0, 39):
        curve = digest.curve(digest.find(f"m{i}")[0])
        assert curve.count.sum() == 300
        assert (curve.low[0], curve.high[-1]) == (0.0, 299.0)


def test_one_of_several_runs(tmp_path):
    for name, value in (("a", 1.0), ("b", 2.0)):
        with RunStore.create(tmp_path / name) as run:
            run.log(5, {"loss": value})
            run.alarm(5, f"of_{name}", "something")
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "both")
    with pytest.raises(RunError, match=r"holds 2 runs: a, b; name one of them \(run=, --run\)"):
        read(tmp_path / "both")
    with pytest.raises(RunError, match="has no run 'c'; it has a, b"):
        read(tmp_path / "both", "c")
    digest = read(tmp_path / "both", "b")
    assert digest.latest(digest.find("loss")[0]) == 2.0
    assert [one["name"] for one in digest.alarms] == ["of_b"]
    assert digest.rows == 1
    with pytest.raises(RunError, match="bins=1: a run is shown in 2 bins or more"):
        read(tmp_path / "a", bins=1)


# -- what is shown ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return written(tmp_path_factory.mktemp("run") / "a")


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_a_view_fits_and_says_the_rest(finished, width):
    text = shown(read(finished), width)
    assert max(map(len, text.splitlines())) <= width
    lines = text.splitlines()
    assert lines[0].startswith("✖ critical attention_logit_growth")
    order = [text.index(words) for words in ("critical", "warning ", "info ", "finished · step 499", "Loss", "now")]
    assert order == sorted(order)
    assert "will cross 50 at" in text
    assert "Lower the learning rate" in text
    assert re.search(r"^L3 .*6\.4", text, re.MULTILINE)


def test_a_screen_is_not_overrun(finished):
    digest = read(finished)
    for height in (16, 24, 45):
        console = Console(file=io.StringIO(), width=80, height=height, force_terminal=True, color_system=None)
        lines = console.render_lines(LiveView(digest, screen=True), console.options)
        words = "\n".join("".join(part.text for part in line) for line in lines)
        assert len(lines) <= height
        assert "more not shown" in words


def test_plain_ascii(finished):
    console = Console(file=io.TextIOWrapper(io.BytesIO(), encoding="ascii"), width=80, color_system=None)
    print_run(read(finished), console)
    console.file.flush()
    text = console.file.buffer.getvalue().decode()
    assert "x critical" in text
    assert "@" in text


def test_only_what_is_asked_for(finished):
    digest = read(finished)
    text = shown(digest, measures=["loss*", "dead"])
    assert "Loss, aux" in text
    assert "Dead units" in text
    assert "Attention" not in text.split("finished")[1]
    assert chosen(digest)[:3] == ["loss", "loss/aux", "grad_norm"]
    with pytest.raises(RunError, match="has no measure 'los'; nearest: loss"):
        shown(digest, measures=["los"])


def test_layers_of_heads_and_of_many_layers(tmp_path):
    with RunStore.create(tmp_path / "a") as run:
        for _ in training(run, 30, layers=30, heads=3):
            pass
    digest = read(tmp_path / "a")
    (panel,) = (one for one in panels(digest, ["sink_excess"]))
    assert (panel.layers, panel.over) == (tuple(range(30)), "heads")
    assert panel.latest(digest).tolist() == [0.5] * 30
    text = shown(digest, measures=["attention_logit_max"])
    assert "6 of 30 layers" in text
    assert {"L0", "L3", "L29"} <= {line.split(" ")[0] for line in text.splitlines()}


def test_the_loss_of_the_training_is_not_that_of_the_probe(tmp_path):
    """The probe is looked at before the first step, and is in the store first."""
    with RunStore.create(tmp_path / "a") as run:
        run.log(0, {"loss": 5.0}, site="logits")
        for step in range(9):
            run.log(step, {"loss": 3.0})
    digest = read(tmp_path / "a")
    assert [(one.label, digest.latest(one.series)) for one in lines(digest, ["loss"])] == [
        ("Loss", 3.0),
        ("Loss, logits", 5.0),
    ]
    assert re.search("^Loss  3", shown(digest), re.MULTILINE)
    assert ">3</dd>" in run_page(tmp_path / "a").html


def test_what_is_not_finite_is_told(tmp_path):
    with RunStore.create(tmp_path / "a") as run:
        for step in range(20):
            run.log(step, {"loss": 1.0 if step < 7 else np.nan, "grad_norm": np.inf if step == 3 else 1.0})
    text = shown(read(tmp_path / "a"))
    assert re.search(r"Loss +NaN +from 7", text)
    assert re.search(r"Grad norm +1 +1 not fin\.", text)


def test_runs_that_say_little(tmp_path):
    with RunStore.create(tmp_path / "a") as run:
        assert "Nothing is logged yet." in shown(read(tmp_path / "a"))
        run.log(3, {"accuracy": 0.5})
        run.commit()
        one = shown(read(tmp_path / "a"))
        assert "running · step 3" in one
        assert re.search(r"Accuracy +50 %", one)
    with RunStore.create(tmp_path / "b"):
        pass
    assert "Nothing was logged." in shown(read(tmp_path / "b"))


def test_alarms_of_one_kind_stand_together(finished):
    groups = alarm_groups(read(finished))
    assert [(some[0]["level"], len(some)) for some in groups] == [("critical", 1), ("warning", 2), ("info", 1)]


def test_a_plot_keeps_the_extremes():
    y = np.zeros(10_000)
    y[7123] = 5.0
    rows = braille(y, y, 20, 4)
    assert rows[0].strip(" ") != ""
    assert len(rows[0].rstrip()) - 1 == 7123 * 20 // 10_000
    assert braille(np.full(3, np.nan), np.full(3, np.nan), 4, 2) == ["", ""]
    assert spark([1.0, np.inf, 2.0]) == "▁ █"
    assert spark([0.3, 0.1 + 0.2]) == "▄▄"


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command_prints_once(finished, capsys):
    assert main(["watch", str(finished), "--once"]) == 0
    assert "finished · step 499" in capsys.readouterr().out
    assert main(["watch", str(finished), "--quiet"]) == 0
    assert capsys.readouterr().out == ""


def test_the_command_says_what_is_wrong(finished, tmp_path, capsys):
    (tmp_path / "runs").mkdir()
    written(tmp_path / "runs" / "second", 3)
    assert main(["watch", str(tmp_path / "runs" / "secnd")]) == 1
    assert "there is no run" in (said := capsys.readouterr().err)
    assert "nearest: second" in said
    assert main(["watch", str(tmp_path)]) == 1
    assert "is not a run: it has no run.sqlite" in capsys.readouterr().err
    assert main(["watch", str(finished), "--measures", "los"]) == 1
    assert "nearest: loss" in capsys.readouterr().err
    assert main(["watch", str(finished), "--every", "0"]) == 2
    merge([finished, tmp_path / "runs" / "second"], tmp_path / "both")
    assert main(["watch", str(tmp_path / "both")]) == 1
    assert "name one of them (run=, --run)" in capsys.readouterr().err
    assert main(["watch", str(tmp_path / "both"), "--run", "second"]) == 0
    assert "step 2" in capsys.readouterr().out


def test_a_killed_run(tmp_path, capsys):
    child = os.fork()
    if child == 0:
        run = RunStore.create(tmp_path / "a", seconds=60.0)
        run.log(4, {"loss": 1.0})
        run.commit()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert main(["watch", str(tmp_path / "a")]) == 0
    said = capsys.readouterr().out
    assert "killed · step 4" in said
    assert "RunStore.resume" in said


class Screen:
    """`actome watch` in a terminal of its own."""

    def __init__(self, *words: str):
        ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "actome", "watch", *words],
            stdin=theirs, stdout=theirs, stderr=theirs,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "90", "LINES": "40"},
            # Tests that were started in the background pass on that interrupts are to be ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        os.close(theirs)
        self.end, self.text = ours, ""

    def until(self, words: str | None) -> None:
        """Reads until the words were shown; with None to the end."""
        patience = time.monotonic() + 60
        while words is None or words not in self.text:
            assert time.monotonic() < patience, self.text[-2000:]
            if select.select([self.end], [], [], 0.2)[0]:
                try:
                    self.text += os.read(self.end, 1 << 16).decode(errors="replace")
                except OSError:  # its other end is closed
                    break
        assert words is None or words in self.text, self.text[-2000:]

    def close(self) -> int:
        self.until(None)
        os.close(self.end)
        return self.process.wait(30)


def test_it_follows_until_the_run_ends(tmp_path):
    with RunStore.create(tmp_path / "a", seconds=0.05) as run:
        run.log(1, {"loss": 3.0})
        run.commit()
        screen = Screen(str(tmp_path / "a"), "--every", "0.05")
        screen.until("step 1 ")
        run.log(22, {"loss": 2.0})
        screen.until("step 22 ")
        run.alarm(23, "non_finite", "A unit is NaN.", level="critical")
        screen.until("non_finite")
    screen.until("finished")
    assert screen.close() == 0
    assert "\x1b[?1049h" in screen.text  # on a screen of its own, and back
    assert "finished" in screen.text.rpartition("\x1b[?1049l")[2]


def test_interrupted_quietly(tmp_path):
    with RunStore.create(tmp_path / "a") as run:
        run.log(1, {"loss": 3.0})
        run.commit()
        screen = Screen(str(tmp_path / "a"), "--every", "0.05")
        screen.until("step 1 ")
        screen.process.send_signal(signal.SIGINT)
        assert screen.close() == 130
        assert "Traceback" not in screen.text
