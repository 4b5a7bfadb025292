"""What a scan keeps beside its table: arrays, the passage, the reference band; and how large a page becomes."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from scans import invented
from torch import nn

import actome as ac
from actome.cli.main import parser
from actome.core.measure import Measure
from actome.measures import PANELS, ActivationScale, Histogram, Movement, Sparsity
from actome.measures.findings import IDS, Thresholds
from actome.measures.panels import Panel
from actome.papers import entries
from actome.report import band
from actome.report.arrays import arrays_of
from actome.report.distributions import doublings
from actome.report.figures import figures
from actome.report.html import page
from actome.report.passage import Peek, passage_of, pieces, received
from actome.report.scan import default_text, scan
from actome.report.words import GROUPS, WORDS, evidence_of, word
from actome.tasks import Subject, SubjectConfig

WORDS_OF_TEXT = "def area(width, height):\n    return width * height  # The value is returned.\n" * 12


class Spread(Measure):
    """Lists of every kind that may come: by rank, by head and distance, by unit and something."""

    reductions: ClassVar = {"total": "sum"}
    value_dims: ClassVar = {"ranks": ("rank",), "by_head": ("head", "distance"), "too_many": ("unit", "bin")}

    def site_statistics(self, x, mask=None, tokens=None):
        return {"total": x.double().square().sum((0, 1))}

    def values(self, stats):
        total = stats["total"]
        units = total.shape[-1]
        return {
            "ranks": torch.arange(1000.0).expand(*total.shape[:-1], 1000),
            "by_head": total.unflatten(-1, (4, units // 4)),
            "too_many": total[..., None].expand(*total.shape, 2),
        }


@pytest.fixture(scope="module")
def model():
    return ac.demo()


@pytest.fixture(scope="module")
def batch(model):
    return next(iter(default_text(model, limit=400, batch_size=2)))


@pytest.fixture(scope="module")
def rec(model, batch):
    return model.record(
        batch.ids[:1, :192], ["blocks.*.resid.post", "blocks.*.mlp.act", "blocks.*.attn.pattern", "logits"]
    )


@pytest.fixture(scope="module")
def passage(model, batch):
    return passage_of(model, batch, model.measure(batch.ids, PANELS["health"]))


def value(passage, measure, kind="resid.post"):
    return next(one for one in passage["values"] if (one["measure"], one["kind"]) == (measure, kind))


# -- arrays -------------------------------------------------------------------------------------------------------


def test_histograms_are_kept_with_their_edges_and_without_empty_ends(model, batch):
    table = model.measure(batch.ids, {"blocks.*.mlp.act": Histogram()})
    kept = arrays_of(table)
    assert [one["layer"] for one in kept] == [0, 1, 2, 3]
    edges = Histogram.axis("bin")
    for one, shares in zip(kept, table.value("histogram"), strict=True):
        first = min(range(len(edges)), key=lambda i: abs(edges[i] - one["at"][0]))
        inside = slice(first, first + len(one["at"]))
        assert one["at"] == pytest.approx(edges[inside], rel=1e-7)
        assert one["values"] == pytest.approx(shares[inside].tolist(), rel=1e-4)
        assert float(shares[inside].sum()) == pytest.approx(float(shares.sum()), abs=1e-12)
        assert one["values"][0] > 0 < one["values"][-1]


def test_doublings_sum_the_bins_between_powers_of_two(model, batch):
    table = model.measure(batch.ids, {"blocks.0.mlp.act": Histogram()})
    act = model.record(batch.ids, "blocks.0.mlp.act")["blocks.0.mlp.act"].abs()
    for part in doublings(arrays_of(table)[0]):
        share = float(((act >= part["low"]) & (act < part["high"])).double().mean())
        assert part["share"] == pytest.approx(share, rel=1e-3)
        assert part["high"] == 2 * part["low"]


def test_lists_of_other_kinds_are_thinned_told_by_head_or_left_out(model, batch):
    kept = arrays_of(model.measure(batch.ids, {"blocks.*.resid.post": Spread()}))
    assert {one["measure"] for one in kept} == {"ranks", "by_head"}
    ranks = next(one for one in kept if one["measure"] == "ranks")
    assert len(ranks["values"]) <= 256
    assert ranks["at"] == ranks["values"]  # the value of rank r is r
    assert (ranks["at"][:9], ranks["at"][-1]) == (list(range(9)), 999)
    heads = [one for one in kept if one["measure"] == "by_head" and one["layer"] == 2]
    assert [one["head"] for one in heads] == [0, 1, 2, 3]
    assert "at" not in heads[0]


def test_a_scan_keeps_lists_of_any_measure_and_its_page_draws_them(model, monkeypatch):
    entries = ((("blocks.*.resid.post",), (Histogram, Spread, ActivationScale)),)
    monkeypatch.setitem(PANELS, "lists", Panel("lists", "lists", entries))
    result = scan(model, [WORDS_OF_TEXT], panel="lists")
    assert json.loads(result.to_json())["arrays"][0]["dim"] == "bin"
    assert "histogram-resid-post" in {figure.key for figure in figures(result)}
    assert '"ranks"' in page(result)


# -- passage ------------------------------------------------------------------------------------------------------


def test_the_pieces_are_the_text(model, batch, passage):
    ids = batch.ids[0, :192].tolist()
    assert "".join(passage["tokens"]) == model.tokenizer.decode(ids)
    assert len(passage["tokens"]) == 192


def test_pieces_of_characters_that_take_several_tokens(model):
    text = "naïve – 😀 end"
    ids = model.tokenizer(text, add_special_tokens=False).input_ids
    found = pieces(model.tokenizer, ids)
    assert len(found) == len(ids)
    assert "".join(found) == model.tokenizer.decode(ids)
    assert "\ufffd" not in "".join(found)


def test_values_of_tokens_agree_with_the_recording(rec, passage):
    states = rec["blocks.*.resid.post"][:, 0].double()
    rms = value(passage, "rms")
    assert rms["layers"] == [0, 1, 2, 3]
    # Four digits are kept.
    torch.testing.assert_close(torch.tensor(rms["values"]).double(), states.square().mean(-1).sqrt(), rtol=1e-3, atol=0)
    act = rec["blocks.*.mlp.act"][:, 0]
    near = (act.abs() <= 0.01 * act.square().mean(-1, keepdim=True).sqrt()).double().mean(-1)
    found = torch.tensor(value(passage, "near_zeros", "mlp.act")["values"]).double()
    torch.testing.assert_close(found, near, rtol=1e-3, atol=1e-6)


def test_movement_of_tokens_agrees_with_the_recording(rec, passage):
    states = rec["blocks.*.resid.post"][:, 0].double()
    moved = (states[1:] - states[:-1]).norm(dim=-1) / states[:-1].norm(dim=-1)
    found = value(passage, "movement")
    assert found["layers"] == [0, 1, 2, 3]
    torch.testing.assert_close(torch.tensor(found["values"][1:]).double(), moved, rtol=2e-3, atol=0)


def test_loss_entropy_and_margin_belong_to_the_token_that_is_foreseen(rec, batch, passage):
    log_p = rec["logits"][0].double().log_softmax(-1)
    ids = batch.ids[0, :192]
    entropy = -(log_p.exp() * log_p).sum(-1)
    top = log_p.exp().sort(-1, descending=True).values
    for name, wanted in (
        ("token_loss", [-log_p[t - 1, ids[t]] for t in range(1, 192)]),
        ("token_entropy", entropy[:-1]),
        ("token_margin", (top[:, 0] - top[:, 1])[:-1]),
    ):
        found = value(passage, name, "logits")["values"]
        assert found[0] is None
        assert found[1:] == pytest.approx([float(x) for x in wanted], rel=2e-3, abs=1e-4)


def test_attention_received_agrees_with_the_recording_and_sinks_are_where_it_is_large(rec, passage):
    pattern = rec["blocks.*.attn.pattern"][:, 0].double()
    found = value(passage, "attention_received", "attn.pattern")["values"]
    sinks = set()
    for layer, head in ((layer, head) for layer in range(4) for head in range(4)):
        for key in range(192 - 32):
            weight = float(pattern[layer, head, key + 1 :, key].mean())
            even = sum(1 / (query + 1) for query in range(key + 1, 192)) / (191 - key)
            if abs(weight - even - 0.3) > 1e-6 and weight - even > 0.3:
                sinks.add((key, layer, head))
    assert {(one["position"], one["layer"], one["head"]) for one in passage["sinks"]} == sinks
    assert (0, 3, 3) in sinks  # the demo model's sink
    by_hand = [float(pattern[1, :, key + 1 :, key].mean(-1).mean()) for key in range(191)]
    assert found[1][:-1] == pytest.approx(by_hand, rel=2e-3, abs=1e-6)
    assert found[1][-1] is None


def test_both_sides_count_where_a_model_sees_both():
    pattern = torch.full((2, 4, 4), 0.25)
    weight, excess, queries = received(pattern, causal=False)
    assert weight.unique().tolist() == [0.25]
    assert excess.abs().max() < 1e-7
    assert queries.tolist() == [3, 3, 3, 3]


def test_a_planted_massive_token_is_marked_and_a_clean_model_has_none(model, batch, passage):
    assert passage["massive"] == []

    def planted(x):
        x = x.clone()
        x[0, 7, 5] = 1e4
        return x

    with model.tap([(model.table["blocks.2.resid.post"].address, planted, "write")]):
        table = model.measure(batch.ids, {"blocks.2.resid.post": ActivationScale()})
        (found,) = passage_of(model, batch, table)["massive"]
    assert (found["position"], found["layer"], found["unit"]) == (7, 2, 5)
    assert found["ratio"] > 1000


def test_what_says_nothing_of_one_token_is_left_out(passage):
    names = {one["measure"] for one in passage["values"]}
    assert not names & {"effective_rank", "effective_rank_share", "dead_bound", "non_finite", "loss", "sink"}
    for one in passage["values"]:
        for values in one["values"] if "layers" in one else [one["values"]]:
            assert len(values) == 192
    assert not any(one["kind"].endswith("resid.pre") for one in passage["values"])


def test_padding_is_no_part_of_the_passage(model):
    short = ac.Text(["def f(x):", WORDS_OF_TEXT], model.tokenizer, context=64, pack=False, batch_size=4)
    batch = next(iter(short))
    table = model.measure(short, {"blocks.*.resid.post": ActivationScale()})
    found = passage_of(model, batch, table)
    assert "".join(found["tokens"]) == model.tokenizer.decode(batch.ids[0][batch.mask[0]])
    assert len(value(found, "rms")["values"][0]) == len(found["tokens"]) < 12


def test_a_stream_that_can_be_read_once_still_has_a_passage(model):
    once = (text for text in [("a", WORDS_OF_TEXT)])
    result = scan(model, ac.Text(once, model.tokenizer, context=64, limit=256))
    assert len(result.passage["tokens"]) == 64
    assert result.text["counts"]["tokens"] == 256


def test_inputs_that_are_no_text_have_no_passage(model):
    net = ac.wrap(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), name="net")
    result = scan(net, torch.randn(64, 4))
    assert result.passage is None
    assert passage_of(net, None, []) is None
    assert scan(model, [WORDS_OF_TEXT], passage=False).passage is None


def test_peek_remembers_the_first_and_changes_nothing():
    peek = Peek(iter([3, 1, 2]))
    assert list(peek) == [3, 1, 2]
    assert peek.first == 3


def test_the_passage_does_not_depend_on_what_else_is_measured(model, batch):
    alone = passage_of(
        model, batch, model.measure(batch.ids, {("blocks.0.resid.pre", "blocks.*.resid.post"): Movement()})
    )
    beside = model.measure(batch.ids, {
        ("blocks.0.resid.pre", "blocks.*.resid.post"): [Sparsity(), Movement()], "blocks.1.mlp.act": ActivationScale(),
    })  # fmt: skip
    assert value(alone, "movement") == value(passage_of(model, batch, beside), "movement")


# -- band, words, size --------------------------------------------------------------------------------------------


def test_the_band_says_whose_it_is_and_lies_around_the_demo_model(model):
    assert "demo family" in band.about()
    result = scan(model, default_text(model, limit=4096), passage=False)
    for measure, kind in (("rms", "resid.post"), ("effective_rank_share", "resid.post"), ("near_zeros", "mlp.act")):
        found = band.band(measure, kind, 4).set_index("layer")
        rows = result.values(measure, "layer")
        rows = rows[rows["site"].str.endswith(kind)]
        inside = [
            found.loc[row.layer, "low"] * 0.9 <= row.value <= found.loc[row.layer, "high"] * 1.1
            for row in rows.itertuples()
        ]
        assert len(inside) == 4
        assert all(inside)
    assert band.band("rms", "resid.post", 8)["layer"].tolist() == [-1, 1, 3, 5, 7]
    assert band.band("no such value", "resid.post", 8).empty


def test_the_page_calls_the_band_by_its_name_and_no_range_of_health():
    content = page(invented(layers=4, heads=4))
    assert "Shaded areas are the demo family" in content
    assert "healthy range" not in content


def test_every_value_of_every_panel_has_a_title_and_what_is_unknown_gets_one():
    assert word("expert_load_fraction").look == "share"
    assert word("something_unit").drawn is False
    assert all(one.title and one.says and one.group in GROUPS for one in WORDS.values())
    titles = [one.title for name, one in WORDS.items() if not name.startswith("attention_received")]
    assert len(set(titles)) == len(titles)
    batch = torch.randint(0, 64, (4, 40), generator=torch.Generator().manual_seed(0))
    mixture = ac.wrap(Subject.fresh(SubjectConfig(vocab=64, d_model=16, layers=2, heads=2, experts=4), seed=0))
    plain = ac.wrap(nn.Sequential(nn.Linear(64, 8), nn.ReLU()), name="net")
    for model, given in ((ac.demo(), batch), (mixture, batch), (plain, torch.randn(40, 64))):
        for result in model.measure(given, PANELS["all"]):
            unknown = set(result.values) - set(WORDS)
            assert not unknown, unknown
    assert math.isclose(float(word("something").show(0.5)), 0.5)


def test_the_documentation_names_every_finding_threshold_panel_and_option():
    docs = Path(__file__).parents[1] / "docs"
    scanning, commands = ((docs / name).read_text(encoding="utf-8") for name in ("scan.md", "cli.md"))
    assert [one for one in (*IDS, *Thresholds.__dataclass_fields__, *PANELS) if f"`{one}`" not in scanning] == []
    options = {
        option
        for action in parser()._subparsers._group_actions
        for command in action.choices.values()
        for each in command._actions
        for option in each.option_strings
        if option.startswith("--")
    }
    assert [one for one in sorted(options) if one not in commands] == []
    listed = re.findall(r"^\| \[\[(\d+)\] ([a-z0-9-]+)\]", (docs / "papers.md").read_text(encoding="utf-8"), re.M)
    pages = [one for one in sorted(entries(), key=lambda one: one.number) if (docs / f"papers/{one.slug}.md").exists()]
    assert listed == [(str(entry.number), entry.slug) for entry in pages]
    assert f"Of {len(listed)} papers" in (docs / "papers.md").read_text(encoding="utf-8")


def test_the_numbers_of_findings_are_told_in_words():
    said = evidence_of({"int8_tensor_error": 0.186, "int8_token_error": 0.000286, "at": "blocks.1.mlp.act"})
    assert said == "int8 error, one scale a tensor 19 %, int8 error, one scale a token 0.029 %, at blocks.1.mlp.act"
    assert word("int8_token_error").show(1e-9) == "0.0 %"


@pytest.fixture(scope="module")
def everything(model, batch):
    return scan(model, batch.ids, panel="all", passage=False)


def test_everything_is_rich_and_no_wall(everything):
    drawn = figures(everything)
    assert 25 <= len(drawn) <= 35
    assert len({figure.key for figure in drawn}) == len(drawn)
    assert {"sites-cka", "reliability-logits", "depth-cka_next"} <= {figure.key for figure in drawn}
    # What is not drawn is in the tables.
    assert "Participation ratio" in page(everything)


def test_the_reliability_diagram_is_the_bins_of_the_measure(everything, model, batch):
    from actome.measures import TokenUncertainty

    table = model.measure(batch.ids, {"logits": TokenUncertainty()})
    share, confidence, accuracy = (table.value(f"bin_{one}")[0] for one in ("share", "confidence", "accuracy"))
    spec = next(figure for figure in figures(everything) if figure.key == "reliability-logits").spec
    data = next(layer for layer in spec["layer"] if "size" in layer["encoding"])["data"]
    points = data["values"] if "values" in data else spec["datasets"][data["name"]]
    filled = share > 0
    assert [one["accuracy"] for one in points] == pytest.approx(accuracy[filled].tolist(), rel=1e-4)
    assert [one["confidence"] for one in points] == pytest.approx(confidence[filled].tolist(), rel=1e-4)
    assert [one["predictions"] for one in points] == pytest.approx(share[filled].tolist(), rel=1e-4)


def test_frequencies_of_units_are_a_list_over_their_range(everything):
    lists = [one for one in everything.arrays if one["measure"] == "frequency_histogram"]
    assert lists
    assert all(one["dim"] == "frequency" and 0 < one["at"][0] <= one["at"][-1] < 1 for one in lists)


def test_a_model_of_twelve_layers_with_everything_fits_in_five_megabytes():
    full = invented(layers=12, heads=12, width=768, more=60)
    content = page(full).encode()
    assert len(content) < 5_000_000
    compared = full.compare(replace(invented(layers=12, heads=12, width=768, more=60, seed=1), passage=None)).to_html()
    assert len(compared.encode()) < 5_000_000
    assert len(full.to_json().encode()) < 5_000_000
