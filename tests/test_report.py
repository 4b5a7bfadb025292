"""Scans: their JSON, their page in a real browser, and what the terminal shows."""

import html.parser
import io
import json
import math

import pandas as pd
import pytest
import torch
from rich.console import Console
from torch import nn

import actome as ac
from actome.measures.findings import Finding
from actome.report.figures import figures
from actome.report.html import page
from actome.report.scan import Scan, scan
from actome.report.words import kind_of, place_of, word

HOSTILE = "</script><img src=x onerror=alert(1)> & \"quoted\" 'name' \u2028"


def row(measure, value, **place):
    return {"site": "blocks.0.resid.post", "layer": 0, **place, "measure": measure, "value": value}


def made_by_hand(layers: int = 12, heads: int = 12, name: str = "by hand") -> Scan:
    """A scan of known numbers: layer l has rms 2^l and NaN in the last layer's movement."""
    rows = []
    for layer in range(layers):
        place = {"layer": layer, "site": f"blocks.{layer}.resid.post"}
        rows.append(row("rms", 2.0**layer, **place))
        rows.append(row("movement", math.nan if layer == layers - 1 else 0.5, **place))
        rows.append(row("massive_ratio", math.inf if layer == 1 else 10.0, **place))
        pattern = {"layer": layer, "site": f"blocks.{layer}.attn.pattern"}
        rows += [row("sink_excess", head / heads, **pattern, head=head) for head in range(heads)]
    rows.append({"site": "logits", "measure": "loss", "value": 3.25})
    frame = pd.DataFrame(rows).reindex(
        columns=["site", "layer", "head", "unit", "expert", "measure", "value"]
    ).astype({**dict.fromkeys(["layer", "head", "unit", "expert"], "Int64"), "value": "float64"})  # fmt: skip
    finding = Finding(
        "dead-units", "warning", "blocks.3.mlp.act", {"layers": [3], "units": [1, 2, 3, 9]},
        {"dead": 0.25, "worst": math.inf}, HOSTILE, f"advice {HOSTILE}",
    )  # fmt: skip
    text = {"source": HOSTILE, "context": 64, "counts": {"tokens": 640, "sequences": 10}}
    run = {"panel": "health", "seconds": 1.5, "started": "2026-01-01T00:00:00+0000", "versions": {"torch": "2"}}
    return Scan({"name": name, "layers": layers, "head": heads}, text, run, frame, (finding,), (f"x: {HOSTILE}",))


@pytest.fixture(scope="module")
def demo_scan() -> Scan:
    model = ac.demo()
    return scan(model, ac.Text(["The value of the expression is returned.\n" * 100], model.tokenizer, context=64))


def strict(text: str):
    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_json_has_the_promised_shape_and_is_strict(demo_scan):
    data = strict(demo_scan.to_json())
    keys = ["actome", "model", "text", "run", "rows", "findings", "arrays", "passage"]
    assert list(data) == keys
    bare = scan(ac.demo(), ["The value of the expression is returned.\n" * 20], passage=False).to_dict()
    assert list(bare) == keys[:-1]
    assert list(made_by_hand().to_dict()) == keys[:-2]
    assert data["actome"] == ac.__version__
    assert data["model"]["layers"] == 4
    places = {"site", "layer", "head", "unit", "expert", "measure", "value"}
    assert all(set(one) <= places and {"site", "measure", "value"} <= set(one) for one in data["rows"])
    # Keys are absent where they do not apply, and numbers of places are whole.
    assert all(one[key] is not None for one in data["rows"] for key in one if key != "value")
    loss = next(one for one in data["rows"] if one["measure"] == "loss")
    assert set(loss) == {"site", "measure", "value"}
    sinks = [one for one in data["rows"] if one["measure"] == "sink"]
    assert {(one["layer"], one["head"]) for one in sinks} == {(layer, head) for layer in range(4) for head in range(4)}
    keys = {"id", "severity", "site", "where", "evidence", "source", "advice"}
    assert all(set(one) <= keys and {"id", "severity", "site"} <= set(one) for one in data["findings"])


def test_nan_and_infinity_become_null():
    data = strict(made_by_hand().to_json())
    assert next(one for one in data["rows"] if one["measure"] == "movement" and one["layer"] == 11)["value"] is None
    assert next(one for one in data["rows"] if one["measure"] == "massive_ratio" and one["layer"] == 1)["value"] is None
    assert data["findings"][0]["evidence"]["worst"] is None


def test_json_read_back_is_the_same_scan(demo_scan, tmp_path):
    again = Scan.from_json(demo_scan.save_json(tmp_path / "deep" / "scan.json"))
    assert again.to_json() == demo_scan.to_json()
    pd.testing.assert_frame_equal(again.frame, demo_scan.frame)
    assert Scan.from_json(demo_scan.to_json()).to_json() == demo_scan.to_json()
    assert again.arrays == demo_scan.arrays
    assert again.passage == demo_scan.passage


def test_json_written_before_there_were_arrays_still_reads():
    old = Scan.from_json(made_by_hand().to_json())
    assert (old.arrays, old.passage) == ((), None)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"rows": []}', "not json at all"])
def test_what_is_no_scan_is_refused(content, tmp_path):
    path = tmp_path / "scan.json"
    path.write_text(content)
    with pytest.raises(ac.ActomeError, match=r"scan\.json is no scan"):
        Scan.from_json(path)


def test_units_have_rows_only_where_a_finding_names_them():
    torch.manual_seed(0)
    model = ac.demo()
    with torch.no_grad():
        for weight in (model.module.model.layers[1].mlp.gate_proj.weight,):
            weight[5] = 0.0  # SiLU of zero is zero: unit 5 of block 1 is dead
    result = scan(model, ["The value of the expression is returned.\n" * 100])
    units = result.frame[result.frame["unit"].notna()]
    dead = next(finding for finding in result.findings if finding.id == "dead-units")
    assert dead.where["units"] == [5]
    named = {place for finding in result.findings for place in finding.units()}
    assert set(zip(units["site"], units["unit"], strict=True)) == named
    assert ("blocks.1.mlp.act", 5) in named


def test_values_agree_with_measuring_directly(demo_scan):
    from actome.measures import ActivationScale

    model = ac.demo()
    text = ac.Text(["The value of the expression is returned.\n" * 100], model.tokenizer, context=64)
    table = model.measure(text, {"blocks.*.resid.post": ActivationScale()})
    rows = demo_scan.values("rms", "layer")
    found = rows[rows["site"].str.endswith("resid.post")]["value"].tolist()
    assert found == pytest.approx(table.value("rms").tolist(), rel=1e-6)


def test_progress_counts_tokens():
    model, seen = ac.demo(), []
    text = ac.Text(["word " * 2000], model.tokenizer, context=64, batch_size=2, limit=512)
    scan(model, text, progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 512


def test_an_unknown_panel_names_the_known_ones():
    with pytest.raises(ac.ActomeError, match="health"):
        scan(ac.demo(), panel="wealth")


def test_a_plain_network_is_scanned_by_its_modules():
    torch.manual_seed(0)
    net = ac.wrap(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), name="net")
    result = scan(net, torch.randn(64, 4))
    assert {"module:0", "module:1", "module:2"} <= set(result.frame["site"])
    out = io.StringIO()
    result.print(Console(file=out, width=80))
    assert "read Tensor (64, 4)" in out.getvalue()
    assert "Modules" in out.getvalue()
    assert "<h2" in page(result)


def test_a_model_that_reads_images_says_so_when_given_text_and_is_scanned_with_images():
    import transformers

    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.ViTConfig(**size, image_size=8, patch_size=4)
    model = ac.wrap(transformers.ViTModel(config).eval(), tokenizer=ac.demo().tokenizer, name="a vision model")
    with pytest.raises(ac.ActomeError, match="a vision model does not run on text alone, it also reads pixel_values"):
        scan(model, ["some text"])
    result = scan(model, {"pixel_values": torch.randn(4, 3, 8, 8)})
    assert result.values("attention_entropy", "layer", "head").shape[0] == 4


# -- terminal -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_terminal_report_fits_and_says_the_findings_first(width, demo_scan):
    for one in (demo_scan, made_by_hand(), made_by_hand(layers=80, heads=64)):
        out = io.StringIO()
        one.print(Console(file=out, width=width))
        lines = out.getvalue().splitlines()
        assert max(map(len, lines)) <= width
        first = next(i for i, line in enumerate(lines) if any(f.id in line for f in one.findings))
        assert first < next(i for i, line in enumerate(lines) if line.startswith("Layers"))


def test_ascii_terminals_get_ascii_bars(demo_scan):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    console = Console(file=out, width=80)
    demo_scan.print(console)
    out.flush()
    assert "#" in out.buffer.getvalue().decode("ascii")


def test_words():
    assert word("rms").show(math.inf) == "∞"
    assert word("dead").show(0.25) == "25 %"
    assert word("something_new").title == "Something new"
    assert kind_of("decoder.blocks.2.cross.pattern") == "decoder cross.pattern"
    assert place_of({"layers": [1, 2], "positions": [0]}) == "layers 1-2, position 0"


# -- page ---------------------------------------------------------------------------------------------------------


class Reader(html.parser.HTMLParser):
    """Every tag, every address that a page would load, and whether all elements are closed."""

    VOID = frozenset({"meta", "link", "br", "img", "input", "hr"})

    def __init__(self):
        super().__init__()
        self.tags, self.open, self.addresses, self.text = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "action", "data")]
        assert not any(name.startswith("on") for name, _ in attributes)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text.append(data)


def test_the_page_is_well_formed_small_and_loads_nothing(demo_scan):
    for one in (demo_scan, made_by_hand(), made_by_hand(layers=80, heads=64)):
        content = page(one)
        assert len(content.encode()) < 5_000_000
        reader = Reader()
        reader.feed(content)
        assert reader.open == []
        assert [one for one in reader.addresses if one != "data:," and not one.startswith("#")] == []
        assert reader.tags.count("h1") == 1
        assert "@import" not in content.partition("</style>")[0]


def test_whatever_things_are_called_is_text_and_never_markup():
    reader = Reader()
    reader.feed(page(made_by_hand(name=HOSTILE)))
    assert "img" not in reader.tags
    assert sum("<img src=x" in text for text in reader.text) >= 4


def test_the_drawing_library_is_there_once_and_only_when_it_is_needed():
    assert page(made_by_hand()).count("window.vegaEmbed") == 1
    empty = made_by_hand()
    bare = Scan(empty.model, empty.text, empty.run, empty.frame.iloc[:0])
    assert len(page(bare)) < 40_000
    assert "Nothing stands out" in page(bare)


def test_every_figure_is_sound_for_the_schema_and_has_strict_data():
    import altair as alt

    drawn = figures(made_by_hand())
    assert {"depth-rms", "depth-movement", "heads-sink_excess-attn-pattern"} <= {figure.key for figure in drawn}
    for figure in drawn:
        strict(json.dumps(figure.spec, allow_nan=False))
        alt.Chart.from_dict(figure.spec) if "layer" not in figure.spec else alt.LayerChart.from_dict(figure.spec)
