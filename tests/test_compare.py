"""Two scans side by side: matching, differences, findings that come and go, page, terminal and command."""

import io
import json
import math
from dataclasses import replace

import pandas as pd
import pytest
from rich.console import Console
from scans import COLUMNS, HOSTILE, invented

import actome as ac
from actome.cli.main import main
from actome.measures.findings import Finding
from actome.report.compare import Comparison
from actome.report.scan import Scan


def small(rows, findings=(), layers=2, **run) -> Scan:
    """A scan of given rows: (site, layer, measure, value) with a head where there are five."""
    made = [
        {"site": site, "layer": layer, "measure": measure, "value": value, **({"head": head[0]} if head else {})}
        for site, layer, measure, value, *head in rows
    ]
    frame = pd.DataFrame(made).reindex(columns=COLUMNS)
    frame = frame.astype({**dict.fromkeys(COLUMNS[1:5], "Int64"), "value": "float64"})
    text = {"source": "a text", "context": 8, "counts": {"tokens": 80, "sequences": 10}}
    return Scan({"name": "m", "layers": layers}, text, {"panel": "health", **run}, frame, tuple(findings))


def stream(values, measure="rms") -> list[tuple]:
    return [(f"blocks.{i}.resid.post", i, measure, value) for i, value in enumerate(values)]


def finding(severity: str, *layers: int) -> Finding:
    names = ",".join(map(str, layers))
    site = f"blocks.{{{names}}}.mlp.act" if len(layers) > 1 else f"blocks.{names}.mlp.act"
    return Finding("dead-units", severity, site, {"layers": list(layers), "units": [1]}, {"dead": 0.1})


def test_differences_are_this_less_the_other():
    rows = small(stream([3.0, 2.0])).compare(small(stream([2.0, 4.0]))).frame
    assert rows["difference"].tolist() == [1.0, -2.0]
    assert rows["relative"].tolist() == [0.5, -0.5]
    assert rows["change"].tolist() == pytest.approx([1 / 3, 0.5])
    assert rows["site"].tolist() == rows["other_site"].tolist()


def test_a_scan_beside_itself_does_not_differ():
    scan = invented(layers=3, heads=2)
    comparison = scan.compare(scan)
    numbers = int(scan.frame["unit"].isna().sum())
    assert len(comparison.frame) == numbers
    assert (comparison.frame["difference"] == 0).all()
    assert (comparison.frame["change"] == 0).all()
    assert (comparison.gained, comparison.lost, comparison.notes) == ((), (), ())


def test_tiny_shares_do_not_lead_the_list():
    this = small([*stream([2e-5, 2e-5], "dead"), *stream([3.0, 3.0])])
    other = small([*stream([1e-5, 1e-5], "dead"), *stream([2.0, 2.0])])
    changes = this.compare(other).changes()
    assert changes["measure"].tolist() == ["rms", "dead"]
    assert changes["change"].tolist() == pytest.approx([1 / 3, 1e-3])


def test_changes_are_means_over_finite_pairs_and_name_where_most_happens():
    this = small(stream([1.0, 6.0, math.inf]), layers=3)
    other = small(stream([1.0, 2.0, 5.0]), layers=3)
    (row,) = this.compare(other).changes().to_dict("records")
    assert (row["value"], row["other"], row["most_site"]) == (3.5, 1.5, "blocks.1.resid.post")
    assert (row["most_value"], row["most_other"]) == (6.0, 2.0)


def test_from_zero_is_infinite_and_still_sorted():
    rows = small(stream([1.0, 0.0])).compare(small(stream([0.0, 0.0]))).frame
    assert rows["relative"].tolist() == [math.inf, 0.0]
    assert rows["change"].tolist() == [1.0, 0.0]


def test_models_of_other_depth_are_compared_by_relative_depth():
    this, other = small(stream([10.0, 20.0])), small(stream([1.0, 2.0, 3.0, 4.0]), layers=4)
    comparison = this.compare(other)
    assert not comparison.same_depth
    # The end of block 0 of 2 is half way, which is the end of block 1 of 4.
    assert comparison.frame["other_site"].tolist() == ["blocks.1.resid.post", "blocks.3.resid.post"]
    assert comparison.frame["other"].tolist() == [2.0, 4.0]
    assert "2 and 4 layers" in comparison.notes[0]
    assert other.compare(this).frame["other"].tolist() == [10.0, 10.0, 20.0, 20.0]


def test_heads_are_compared_only_where_there_are_as_many():
    def heads(count: int) -> list[tuple]:
        return [("blocks.0.attn.pattern", 0, "sink", 0.5, head) for head in range(count)]

    four, two = small([*heads(4), *stream([1.0])]), small([*heads(2), *stream([1.0])])
    assert four.compare(four).frame["measure"].tolist().count("sink") == 4
    assert "sink" not in set(four.compare(two).frame["measure"])


def test_findings_that_are_new_and_gone_by_layer_and_severity():
    rows = stream([1.0, 1.0, 1.0, 1.0])
    this = small(rows, [finding("info", 0, 1, 2), finding("warning", 3)], layers=4)
    other = small(rows, [finding("info", 1), finding("info", 3)], layers=4)
    comparison = this.compare(other)
    assert [(one.severity, one.sites, one.where["layers"]) for one in comparison.gained] == [
        ("info", ["blocks.0.mlp.act", "blocks.2.mlp.act"], [0, 2]),
        ("warning", ["blocks.3.mlp.act"], [3]),
    ]
    assert [(one.severity, one.site) for one in comparison.lost] == [("info", "blocks.3.mlp.act")]


def test_between_other_depths_findings_are_told_by_kind():
    this = small(stream([1.0, 1.0]), [finding("info", 0)])
    other = small(stream([1.0, 1.0, 1.0]), [finding("info", 2)], layers=3)
    assert (this.compare(other).gained, this.compare(other).lost) == ((), ())


def test_what_does_not_compare_is_said():
    this = small(stream([1.0, 1.0]))
    assert this.compare(replace(this, text={"source": "another"})).notes == ("The texts differ: a text, and another.",)
    fewer = {**this.text, "counts": {"tokens": 40, "sequences": 5}}
    assert "Not as much was read" in this.compare(replace(this, text=fewer)).notes[0]
    assert "vocabularies" in this.compare(replace(this, model={**this.model, "vocab": 7})).notes[0]
    assert "thresholds" in this.compare(replace(this, run={**this.run, "thresholds": {"logit": 1.0}})).notes[0]


def test_scans_of_other_panels_and_without_common_numbers_are_refused():
    this = small(stream([1.0, 1.0]))
    with pytest.raises(ac.ActomeError, match="'health' and the other of 'wide'"):
        this.compare(small(stream([1.0, 1.0]), panel="wide"))
    with pytest.raises(ac.ActomeError, match="no number in common"):
        this.compare(small([("module:0", None, "rms", 1.0)]))


@pytest.mark.parametrize("width", [60, 100])
def test_the_terminal_says_what_is_new_and_what_changed(width):
    this = small(stream([3.0, 3.0]), [finding("warning", 1)])
    out = io.StringIO()
    this.compare(small(stream([2.0, 2.0]))).print(Console(file=out, width=width))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert any("+ new" in line and "dead-units" in line for line in lines)
    assert any("Activation scale" in line and "+50.0 %" in line for line in lines)


def test_the_page_shows_both_and_escapes_what_they_are_called():
    this, other = invented(layers=3, heads=2), invented(layers=3, heads=2, name=HOSTILE, seed=1)
    comparison = this.compare(other)
    assert isinstance(comparison, Comparison)
    content = comparison.to_html()
    assert "<img src=x" not in content
    assert len(content.encode()) < 5_000_000
    assert "Findings that are gone" in content
    assert 'id="changes"' not in this.to_html()


# -- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("earlier")
    text = folder / "notes.txt"
    text.write_text("The value of the expression is returned.\n" * 40)
    words = ["--text", str(text), "--tokens", "256", "--quiet", "--no-passage"]
    assert main(["scan", "--step", "0", *words, "--json", str(folder / "scan.json")]) == 0
    return folder / "scan.json", words


def test_the_command_compares(earlier, tmp_path, capsys):
    data, words = earlier
    words = [word for word in words if word != "--quiet"]
    out = tmp_path / "new" / "compared.html"
    assert main(["scan", *words, "--compare", str(data), "--html", str(out)]) == 0
    told = capsys.readouterr().out
    assert "Compared with demo model, step 0" in told
    assert "Perplexity" in told
    assert "beside" in out.read_text()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "there is no such file"),
        ("{", "is no scan written by actome"),
        ("[1]", "is no scan written by actome"),
        ("panel", "a scan with the panel wide"),
    ],
)
def test_what_cannot_be_compared_exits_with_2_before_any_work(content, says, earlier, tmp_path, capsys):
    path = tmp_path / "other.json"
    if content == "panel":
        data = json.loads(earlier[0].read_text())
        content = json.dumps({**data, "run": {**data["run"], "panel": "wide"}})
    if content is not None:
        path.write_text(content)
    assert main(["scan", "--tokens", "64", "--compare", str(path)]) == 2
    caught = capsys.readouterr()
    assert says in caught.err
    assert "Traceback" not in caught.err
    assert not caught.out


def test_thresholds_come_from_the_command_line(earlier, tmp_path):
    words = earlier[1]
    found = []
    for more in ([], ["--threshold", "massive_ratio=1", "--threshold", "idle_movement=1e9"]):
        assert main(["scan", *words, *more, "--json", str(tmp_path / "scan.json")]) == 0
        data = json.loads((tmp_path / "scan.json").read_text())
        found.append({one["id"] for one in data["findings"]})
    assert data["run"]["thresholds"] == {"massive_ratio": 1.0, "idle_movement": 1e9}
    assert {"massive-activations", "idle-layers"} <= found[1] - found[0]


@pytest.mark.parametrize("given", ["dead_shares=0.1", "dead_share", "dead_share=many", "=1", "dead_share=nan"])
def test_a_threshold_that_cannot_be_exits_with_2(given, capsys):
    assert main(["scan", "--threshold", given]) == 2
    caught = capsys.readouterr()
    assert "dead_share" in caught.err
    assert not caught.out
