"""Planted truths: each thing that a scan looks for, put into the tensors of a clean model, is found alone, in place."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import pytest
import torch
from measured import generator
from torch import Tensor
from torch.nn import functional as F

from actome.core.errors import MeasureError
from actome.core.measure import MeasureResult, MeasureTable
from actome.core.sites import Site
from actome.measures import PANELS, Finding, Thresholds, find
from actome.measures.findings import IDS

LAYERS, BATCH, LENGTH, WIDTH, MLP, HEADS, VOCAB = 4, 16, 64, 64, 96, 4, 50


@dataclass
class Activations:
    """What a healthy model of four layers would show at the sites of the panel."""

    stream: Tensor = field(default_factory=lambda: _stream())
    act: Tensor = field(default_factory=lambda: F.gelu(torch.randn(LAYERS, BATCH, LENGTH, MLP, generator=generator(1))))
    pattern: Tensor = field(default_factory=lambda: _pattern())
    logits: Tensor = field(default_factory=lambda: 2 * torch.randn(BATCH, LENGTH, VOCAB, generator=generator(3)))


def _stream() -> Tensor:
    return torch.randn(1 + LAYERS, BATCH, LENGTH, WIDTH, generator=generator(0)).cumsum(0)


def _pattern() -> Tensor:
    scores = torch.randn(LAYERS, BATCH, HEADS, LENGTH, LENGTH, generator=generator(2))
    return scores.masked_fill(torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)


def _sites(name: str, dims: tuple[str, ...], sizes: tuple[int | None, ...]) -> list[Site]:
    return [Site(f"blocks.{i}.{name}", dims, sizes, i) for i in range(LAYERS)]


def scan(model: Activations, thresholds: Thresholds | dict[str, float] | None = None) -> list[Finding]:
    return find(table(model), thresholds)


def table(model: Activations) -> MeasureTable:
    """The health panel on these tensors, two batches of them, as the engine would fill it."""
    post = _sites("resid.post", ("batch", "pos", "d_model"), (None, None, WIDTH))
    pre = Site("blocks.0.resid.pre", ("batch", "pos", "d_model"), (None, None, WIDTH), 0)
    at: dict[str, tuple[Tensor, list[Site]]] = {
        "blocks.0.resid.pre": (model.stream, [pre, *post]),
        "blocks.*.resid.post": (model.stream[1:], post),
        "blocks.*.mlp.act": (model.act, _sites("mlp.act", ("batch", "pos", "d_mlp"), (None, None, MLP))),
        "blocks.*.attn.pattern": (
            model.pattern,
            _sites("attn.pattern", ("batch", "head", "query", "key"), (None, HEADS, None, None)),
        ),
        "logits": (model.logits[None], [Site("logits", ("batch", "pos", "vocab"), (None, None, VOCAB))]),
    }
    results = []
    tokens = torch.randint(0, VOCAB, (BATCH, LENGTH), generator=generator(4))
    for patterns, makes in PANELS["health"].entries:
        x, sites = at[patterns[0]]
        for make in makes:
            measure = make()
            for part, t in zip(x.chunk(2, 1), tokens.chunk(2), strict=True):
                measure.update(part, None, t)
            results.append(MeasureResult(measure, tuple(sites), measure.compute()))
    return MeasureTable(results)


def only(found: list[Finding]) -> Finding:
    assert len(found) == 1, [(one.id, one.severity, one.site) for one in found]
    return found[0]


def test_a_clean_model_has_no_findings():
    assert scan(Activations()) == []


def test_a_dead_unit():
    model = Activations()
    model.act[2, ..., 17] = 0
    one = only(scan(model))
    assert (one.id, one.severity, one.site) == ("dead-units", "info", "blocks.2.mlp.act")
    assert one.where == {"layers": [2], "units": [17]}
    assert one.evidence["dead"] == pytest.approx(1 / MLP)
    assert one.units() == [("blocks.2.mlp.act", 17)]


def test_many_dead_units_are_a_warning_only_in_a_text_of_some_length():
    model = Activations()
    model.act[1, ..., : MLP // 2] = -1e-5
    assert only(scan(model)).severity == "warning"
    model.act[1] = 0
    assert only(scan(model)).severity == "critical"
    short = Activations(act=model.act[:, :2, :8])
    assert only(scan(short)).severity == "info"


def test_a_massive_channel():
    model = Activations()
    model.stream[2:, :, 0, 9] = 900.0
    one = only(scan(model))
    assert (one.id, one.severity) == ("massive-activations", "info")
    assert one.site == "blocks.{1..3}.resid.post"
    assert one.where == {"layers": [1, 2, 3], "units": [9], "positions": [0]}
    assert one.evidence["massive_ratio"] > 300
    assert one.evidence["at"] == "blocks.1.resid.post"


def test_a_massive_channel_near_the_end_of_float16():
    model = Activations()
    model.stream[3, :, 5, 9] = -60_000.0
    # The next block takes it away again, so no block but these moves the stream oddly.
    one = only([found for found in scan(model) if found.id == "massive-activations"])
    assert (one.severity, one.where) == ("warning", {"layers": [2], "units": [9], "positions": [5]})


def test_an_outlier_channel():
    model = Activations()
    model.stream[1:, ..., 30] += 40.0
    one = only(scan(model))
    assert (one.id, one.severity) == ("outlier-channels", "info")
    assert one.where == {"layers": [0, 1, 2, 3], "units": [30]}
    assert one.evidence["outlier_channels"] == 1


def test_a_sink_head():
    model = Activations()
    model.pattern[3, :, 2] = 0.2 * model.pattern[3, :, 2]
    model.pattern[3, :, 2, :, 0] += 0.8
    one = only(scan(model))
    assert (one.id, one.severity, one.site) == ("attention-sink", "info", "blocks.3.attn.pattern")
    assert one.where == {"layers": [3], "heads": [2], "positions": [0]}


def test_a_low_rank_layer():
    model = Activations()
    g = generator(5)
    low = torch.randn(BATCH, LENGTH, 2, generator=g) @ torch.randn(2, WIDTH, generator=g)
    model.stream[4] = low
    one = only(scan(model))
    assert (one.id, one.severity, one.site) == ("rank-collapse", "warning", "blocks.3.resid.post")
    assert one.evidence["effective_rank"] == pytest.approx(2, abs=0.1)
    model.stream[4] = low[:1, :1]
    assert next(found for found in scan(model) if found.id == "rank-collapse").severity == "critical"


def test_an_idle_block():
    model = Activations()
    model.stream[3] = model.stream[2] * 1.001
    model.stream[4] = model.stream[2]
    one = only(scan(model))
    assert (one.id, one.severity, one.site) == ("idle-layers", "warning", "blocks.{2..3}.resid.post")
    assert one.where == {"layers": [2, 3]}
    assert one.evidence["movement"] < 0.002


def test_exploding_logits():
    model = Activations()
    model.logits[3, 5, 7] = 2000.0
    one = only(scan(model))
    assert (one.id, one.severity, one.site) == ("exploding-logits", "warning", "logits")
    assert one.where == {}
    model.logits[3, 5, 7] = -20_000.0
    assert only(scan(model)).severity == "critical"


def test_a_nan_and_all_that_follows_from_it():
    model = Activations()
    model.stream[2:, 4, 10:, 3] = torch.nan
    model.logits[4, 10:] = torch.nan
    found = scan(model)
    assert [(one.id, one.severity, one.site) for one in found] == [
        ("non-finite", "critical", "blocks.{1..3}.resid.post"),
        ("non-finite", "critical", "logits"),
    ]
    assert found[0].where == {"layers": [1, 2, 3]}


def test_an_infinity_in_one_layer():
    model = Activations()
    model.act[1, 0, 0, 0] = torch.inf
    assert only(scan(model)).site == "blocks.1.mlp.act"


def test_all_of_them_at_once_the_most_severe_first():
    model = Activations()
    model.act[2, ..., 17] = 0
    model.pattern[3, :, 2] = F.one_hot(torch.tensor(0), LENGTH).float()
    model.stream[3] = model.stream[2]
    model.stream[1, :, 0, 9] = 900.0
    model.logits[0, 0, 0] = torch.nan
    found = scan(model)
    assert [one.severity for one in found] == ["critical", "warning", "info", "info", "info"]
    assert {one.id for one in found} == {
        "non-finite",
        "idle-layers",
        "dead-units",
        "massive-activations",
        "attention-sink",
    }
    assert set(IDS) >= {one.id for one in found}
    assert all(one.source and one.advice and one.evidence for one in found)


def test_thresholds_can_be_set_by_name():
    model = Activations()
    assert {one.id for one in scan(model, {"massive_ratio": 5.0})} == {"massive-activations"}
    assert "idle-layers" in {one.id for one in scan(model, Thresholds(idle_movement=0.6))}
    with pytest.raises(MeasureError, match="nearest: idle_movement"):
        scan(model, {"idle_movment": 1.0})


def test_findings_become_json_and_come_back():
    model = Activations()
    model.stream[2:, :, 0, 9] = 900.0
    model.logits[3, 5, 7] = 2000.0
    for one in scan(model):
        text = json.dumps(one.to_dict(), allow_nan=False)
        assert Finding.from_dict(json.loads(text)) == one
    logits = Finding("exploding-logits", "warning", "logits", {}, {"max_logit": 2e3, "log_z": float("nan")})
    assert logits.to_dict() == {
        "id": "exploding-logits",
        "severity": "warning",
        "site": "logits",
        "evidence": {"max_logit": 2e3, "log_z": None},
    }


def test_layers_apart_are_told_together_when_they_show_the_same():
    model = Activations()
    model.act[0, ..., 5] = 0
    model.act[3, ..., 5] = 0
    model.act[1, ..., 6] = 0
    assert {one.site: one.where for one in scan(model)} == {
        "blocks.{0,3}.mlp.act": {"layers": [0, 3], "units": [5]},
        "blocks.1.mlp.act": {"layers": [1], "units": [6]},
    }
    assert scan(model)[0].sites == ["blocks.0.mlp.act", "blocks.3.mlp.act"]


def test_what_was_not_measured_gives_no_finding():
    model = Activations()
    model.stream[3] = model.stream[2]
    assert find([]) == []
    without = [result for result in table(model) if "movement" not in result.values]
    assert find(without) == []


def test_the_panel_says_where_its_measures_belong():
    patterns = [pattern for entry in PANELS["health"] for pattern in entry[0]]
    assert {"blocks.*.resid.post", "blocks.*.mlp.act", "blocks.*.attn.pattern", "logits"} <= set(patterns)
    names = [name for _, makes in PANELS["health"] for make in makes for name in make.value_dims]
    # The same name twice would be two rows for one number, except for the scale of two kinds of site.
    assert len(set(names)) == len(names) - 4
