"""The command line: what it prints, what it writes, and its exit codes."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from safetensors import safe_open

import actome
from actome.cli.main import main
from actome.tasks.demo import demo_dir

TEXT = "def area(width, height):\n    return width * height\n\nThe value of the expression is returned.\n" * 30
SHORT = ["--tokens", "512", "--batch-size", "2"]


def command(*words: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "actome", *words], capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("text") / "notes.txt"
    path.write_text(TEXT)
    return str(path)


def test_help_answers_at_once_and_names_every_command():
    # The best of five: others may be using the machine.
    took = []
    for _ in range(5):
        start = time.perf_counter()
        done = command("--help")
        took.append(time.perf_counter() - start)
    assert done.returncode == 0
    assert all(name in done.stdout for name in ("scan", "sites", "record", "papers"))
    assert min(took) < 0.5


def test_importing_actome_or_its_command_line_loads_no_heavy_library():
    code = (
        "import sys, actome, actome.cli.main;"
        "print([m for m in ('torch', 'transformers', 'pandas', 'rich', 'altair') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"actome {actome.__version__}"


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["scam"],
        ["scan", "--tokens", "none"],
        ["scan", "--tokens", "0"],
        ["scan", "--step", "7"],
        ["scan", "some/model", "--step", "0"],
        ["scan", "--fail-on", "dead-unit"],
        ["scan", "--panel", "healthy"],
        ["scan", "--dtype", "float99"],
        ["scan", "--device", "no-such-device"],
        ["scan", "--context", "100000"],
        ["scan", "--text", "no-such-file.txt"],
        ["record", "demo", "embed"],
        ["record", "demo", "embed", "--out", "x", "--append", "--resume"],
        ["papers", "show", "no-such-paper"],
        ["papers", "run", "lac-voids", "--scale", "huge"],
    ],
    ids=" ".join,
)
def test_bad_usage_exits_with_2_and_says_what_is_wrong(words, capsys):
    assert main(words) == 2
    caught = capsys.readouterr()
    assert caught.err
    assert "Traceback" not in caught.err
    assert not caught.out


def test_bad_usage_names_the_nearest(capsys):
    main(["scan", "--fail-on", "dead-unit"])
    assert "nearest: dead-units" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["sites", "demo", "blocks.*.resid.pots"], "nearest: blocks.*.resid.post"),
        (["sites", "demo", "blocks.9.resid.post"], "blocks 0 to 3"),
        (["sites", "./no-such-folder"], "no-such-folder"),
        (["record", "demo", "blocks.*.attn.patern", "--out", "unused"], "nearest"),
    ],
)
def test_what_cannot_be_done_exits_with_1_and_one_clear_line(words, says, capsys):
    assert main(words) == 1
    caught = capsys.readouterr()
    assert says in caught.err
    assert caught.err.startswith("actome: ")
    assert "Traceback" not in caught.err


def test_debug_shows_where_it_came_from():
    with pytest.raises(actome.SiteError):
        main(["sites", "demo", "nothing.here", "--debug"])


def test_sites_lists_blocks_of_one_kind_together_and_a_pattern_one_by_one(capsys):
    assert main(["sites", "demo"]) == 0
    overview = capsys.readouterr().out
    assert "blocks.*.resid.post [batch, pos, d_model 112]  layers 0-3" in overview
    assert main(["sites", "demo", "blocks.{1..2}.mlp.act"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "blocks.1.mlp.act",
        "blocks.2.mlp.act",
    ]


def test_a_local_folder_is_the_same_model_as_the_demo(capsys, text):
    arguments = ["--text", text, *SHORT, "--json", "-"]
    assert main(["scan", str(demo_dir()), *arguments]) == 0
    by_path = json.loads(capsys.readouterr().out)
    assert main(["scan", "demo", *arguments]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == by_path["rows"]


def test_scan_writes_json_and_html_into_new_folders_and_prints_the_report(tmp_path, capsys, text):
    data, page = tmp_path / "new" / "scan.json", tmp_path / "other" / "scan.html"
    assert main(["scan", "--text", text, *SHORT, "--json", str(data), "--html", str(page)]) == 0
    out = capsys.readouterr().out
    assert "demo model" in out
    assert f"written: {data}" in out
    assert json.loads(data.read_text())["text"]["counts"]["tokens"] == 512
    assert page.read_text().startswith("<!doctype html>")
    assert [path.name for path in tmp_path.rglob("*.part")] == []


def test_json_on_standard_output_is_json_and_nothing_else():
    done = command("scan", *SHORT, "--json", "-")
    assert done.returncode == 0
    assert {"actome", "model", "text", "rows", "findings"} <= set(json.loads(done.stdout))


def test_quiet_prints_nothing_and_still_writes(tmp_path, capfd, text):
    assert main(["scan", "--text", text, *SHORT, "--quiet", "--json", str(tmp_path / "scan.json")]) == 0
    assert capfd.readouterr() == ("", "")
    assert (tmp_path / "scan.json").exists()


def test_piped_output_has_no_colours_no_bars_and_no_padding():
    done = command("scan", *SHORT, env={**os.environ, "COLUMNS": "80"})
    assert "\x1b" not in done.stdout
    assert all(line == line.rstrip() and len(line) <= 80 for line in done.stdout.splitlines())
    assert done.stderr == ""


def test_fail_on_exits_with_3_only_when_that_finding_is_present(tmp_path, capsys, text):
    data = tmp_path / "scan.json"
    arguments = ["scan", "--text", text, *SHORT, "--json", str(data)]
    assert main([*arguments, "--fail-on", "non-finite"]) == 0
    present = {finding["id"] for finding in json.loads(data.read_text())["findings"]}
    assert present, "the demo model is known for its attention sink"
    assert main([*arguments, "--fail-on", "non-finite", "--fail-on", present.pop()]) == 3


def test_an_output_that_is_a_folder_is_refused_before_any_work(tmp_path, capsys):
    assert main(["scan", "--json", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err


def test_record_writes_what_safetensors_and_pyarrow_read(tmp_path, capsys, text):
    out = tmp_path / "recording"
    arguments = ["record", "demo", "blocks.*.resid.post", "--out", str(out), "--text", text, *SHORT]
    assert main(arguments) == 0
    assert "512 tokens" in capsys.readouterr().out
    shards = sorted(out.rglob("*.safetensors"))
    with safe_open(shards[0], "pt") as shard:
        assert any("resid.post" in name for name in shard.keys())  # noqa: SIM118 - not a mapping
    assert pq.read_table(next(out.rglob("*.parquet"))).num_rows > 0
    # A second time: refused, then replaced.
    assert main(arguments) == 1
    assert str(out) in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0
    assert main([*arguments, "--append"]) == 0
    assert re.search("1,?024 tokens", capsys.readouterr().out)


def test_interrupting_exits_with_130_and_what_was_recorded_is_resumed(tmp_path, capsys, monkeypatch):
    from actome.core.store import Writer

    out = tmp_path / "recording"
    words = ["record", "demo", "blocks.0.resid.post", "--out", str(out), "--tokens", "3000", "--context", "64"]
    words += ["--batch-size", "4"]
    add, calls = Writer.add, []

    def interrupted(self, *args, **kwargs):
        add(self, *args, **kwargs)
        calls.append(1)
        if len(calls) == 5:  # as if Ctrl-C came here
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "add", interrupted)
        assert main(words) == 130
    assert capsys.readouterr().err.endswith("actome: interrupted\n")
    assert main([*words, "--resume"]) == 0
    assert re.search("3,?000 tokens", capsys.readouterr().out)


def test_a_reader_that_goes_away_is_no_error():
    done = subprocess.run(
        f"'{sys.executable}' -m actome sites demo 'module:*' | head -n 1", shell=True, capture_output=True, text=True
    )
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""


def test_papers_list_show_and_run(capsys):
    assert main(["papers", "list"]) == 0
    assert "attention-sink-metric" in capsys.readouterr().out
    assert main(["papers", "show", "14", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["slug"] == "lac-voids"
    assert main(["papers", "list", "--json"]) == 0
    assert {14, 91} <= {entry["number"] for entry in json.loads(capsys.readouterr().out)}


def test_every_page_of_help_exists(capsys):
    for words in (["scan"], ["sites"], ["record"], ["papers"], ["papers", "run"]):
        assert main([*words, "--help"]) == 0
        assert "usage: actome" in capsys.readouterr().out


def test_the_version_is_said_in_one_place_only():
    root = Path(actome.__file__).parents[1]
    assert f'"{actome.__version__}"' not in (root / "pyproject.toml").read_text()
