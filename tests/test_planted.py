"""Planted truths in whole models: each fault is built into the weights of a clean one, and a full scan finds it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import actome as ac
from actome.measures import PANELS, Finding, find
from actome.tasks import Subject, SubjectConfig

LAYERS, WIDTH, HEADS, VOCAB, CONTEXT = 4, 64, 4, 64, 64
MLP = 4 * WIDTH
TOKENS = torch.randint(0, VOCAB, (64, CONTEXT), generator=torch.Generator().manual_seed(0))


def scan(plant: Callable[[Subject], None] | None = None, panel: str = "all", **options) -> list[Finding]:
    """The findings of a fresh model into which something was built."""
    shape = {"vocab": VOCAB, "d_model": WIDTH, "layers": LAYERS, "heads": HEADS, "context": CONTEXT}
    subject = Subject.fresh(SubjectConfig(**{**shape, "act": "gelu", "bias": True, **options}), seed=0)
    if plant is not None:
        with torch.no_grad():
            plant(subject)
    return find(ac.wrap(subject).measure(TOKENS, PANELS[panel]))


def told(found: list[Finding]) -> dict[str, str]:
    return {one.id: one.site for one in found}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"act": "relu"},
        {"mlp": "gated", "act": "silu", "positions": "rotary", "norm": "layer"},
        {"mlp": "none"},
        {"attention": "sigmoid", "attention_scale": "sum", "positions": "alibi"},
        {"experts": 4},
    ],
    ids=str,
)
def test_a_clean_model_has_no_findings(options):
    assert told(scan(**options)) == {}


def test_a_dead_unit():
    def plant(subject):
        subject.blocks[2].mlp.up.bias[17] = -100.0

    (one,) = scan(plant, act="relu")
    assert (one.id, one.severity) == ("dead-units", "info")
    assert one.units() == [("blocks.2.mlp.act", 17)]


def test_units_that_are_nearly_always_silent():
    def plant(subject):
        subject.blocks[1].mlp.up.bias -= 0.6

    one, rare = sorted(scan(plant, act="relu"), key=lambda one: one.id != "sparse-units")
    assert (one.id, one.site) == ("sparse-units", "blocks.1.mlp.act")
    assert one.evidence["zeros"] > 0.8
    # A unit that is so seldom active that this text does not show it; the bound says how seldom.
    assert (rare.id, rare.severity, len(rare.where["units"])) == ("dead-units", "info", 1)


def test_a_massive_channel():
    def plant(subject):
        subject.positions.weight[0, 9] = 100.0

    found = scan(plant)
    massive = next(one for one in found if one.id == "massive-activations")
    assert massive.where == {"layers": [0, 1, 2, 3], "units": [9], "positions": [0]}
    # What it brings with it: a first token that is all peak, and that sets the scale of rounding for the others.
    assert told(found) == {
        "massive-activations": "blocks.{0..3}.resid.post",
        "residual-peak": "blocks.{0..3}.resid.post",
        "quantisation-loss": "blocks.{0..3}.resid.post",
    }
    rounding = next(one for one in found if one.id == "quantisation-loss")
    assert rounding.severity == "info"
    assert "per token" in rounding.advice


def test_outlier_channels_that_rounding_suffers_from():
    def plant(subject):
        subject.positions.weight[:, 30] += 20.0
        # The norms pass on what they passed on before.
        for norm in [*(b.norm_attn for b in subject.blocks), *(b.norm_mlp for b in subject.blocks), subject.norm]:
            norm.weight.mul_(20.0 / WIDTH**0.5 / 0.15)
            norm.weight[30] = 0.0

    found = scan(plant)
    outlier = next(one for one in found if one.id == "outlier-channels")
    assert (outlier.site, outlier.where["units"]) == ("blocks.{0..3}.resid.post", [30])
    rounding = next(one for one in found if one.id == "quantisation-loss")
    assert rounding.where["units"] == [30]
    assert rounding.evidence["outlier_channels"] == 1
    assert rounding.evidence["outlier_energy"] > 0.9
    assert "SmoothQuant" in rounding.advice
    # One channel that is large everywhere is also the direction of all tokens, and far above the median.
    assert set(told(found)) == {"outlier-channels", "quantisation-loss", "token-collapse", "massive-activations"}


def test_a_sink_head():
    head, d_head = 2, WIDTH // HEADS

    def plant(subject):
        subject.positions.weight[0, 5] = 2.0
        attention = subject.blocks[1].attn
        key = WIDTH + head * d_head
        attention.qkv.weight[key] = 0.0
        attention.qkv.weight[key, 5] = 3.0  # a key that only the first token has
        attention.qkv.bias[head * d_head] += 20.0  # and a query for it at all tokens

    found = scan(plant)
    sink = next(one for one in found if one.id == "attention-sink")
    assert (sink.site, sink.where) == ("blocks.1.attn.pattern", {"layers": [1], "heads": [head], "positions": [0]})
    assert set(told(found)) == {"attention-sink"}


def test_a_sink_that_adds_nothing():
    def plant(subject):
        attention = subject.blocks[0].attn
        # The first token alone has channel 5, and the values of head 1 subtract what it has otherwise.
        subject.positions.weight[0] = 0.0
        subject.positions.weight[0, 5] = 30.0
        values = slice(2 * WIDTH + WIDTH // HEADS, 2 * WIDTH + 2 * WIDTH // HEADS)
        attention.qkv.weight[values, 5] = 0.0

    found = scan(plant, panel="attention")
    drain = next(one for one in found if one.id == "value-drain")
    assert (drain.site, drain.where) == ("blocks.0.attn.v", {"layers": [0], "heads": [1], "positions": [0]})
    assert drain.evidence["value_drain"] < 0.1


def test_a_low_rank_layer():
    def plant(subject):
        generator = torch.Generator().manual_seed(1)
        low = torch.randn(WIDTH, 2, generator=generator) @ torch.randn(2, MLP, generator=generator)
        subject.blocks[3].mlp.down.weight.copy_(100 * low)

    found = scan(plant)
    rank = next(one for one in found if one.id == "rank-collapse")
    assert (rank.site, rank.severity) == ("blocks.3.resid.post", "warning")
    assert rank.evidence["effective_rank"] < 3.2
    assert set(told(found)) <= {"rank-collapse", "unused-width", "miscalibration"}


def test_an_idle_block():
    def plant(subject):
        for layer in (1, 2):
            block = subject.blocks[layer]
            for linear in (block.attn.out, block.mlp.down):
                linear.weight.zero_()
                linear.bias.zero_()

    (one,) = scan(plant)
    assert (one.id, one.severity, one.site) == ("idle-layers", "warning", "blocks.{1..2}.resid.post")
    assert one.evidence["movement"] == 0.0


def test_tokens_that_are_all_alike():
    def plant(subject):
        subject.embed.weight.mul_(1e-3)
        subject.positions.weight.copy_(subject.positions.weight[:1] + 1e-3 * subject.positions.weight)

    found = told(scan(plant))
    assert found["token-collapse"] == "blocks.{0..3}.resid.post"


def test_experts_that_no_token_reaches():
    def plant(subject):
        router = subject.blocks[1].mlp.router.weight
        router.zero_()
        router[:4, 0] = torch.tensor([3.0, -3.0, 0.1, -0.1])

    (one,) = scan(plant, experts=8, active_experts=2)
    assert (one.id, one.site, one.where) == (
        "dead-experts",
        "blocks.1.moe.weights",
        {"layers": [1], "experts": [4, 5, 6, 7]},
    )
    assert one.evidence["dead_experts"] == 0.5


def test_an_expert_that_every_token_reaches():
    def plant(subject):
        block = subject.blocks[1]
        block.norm_mlp.weight[0], block.norm_mlp.bias[0] = 0.0, 1.0
        block.mlp.router.weight[:, 0] = 0.0
        block.mlp.router.weight[6, 0] = 2.5

    (one,) = scan(plant, experts=8, active_experts=2, norm="layer")
    assert (one.id, one.site, one.where) == (
        "expert-imbalance",
        "blocks.1.moe.weights",
        {"layers": [1], "experts": [6]},
    )
    assert one.evidence["max_load"] == pytest.approx(4.0, rel=0.02)


def test_sure_and_wrong():
    def plant(subject):
        subject.unembed.weight.mul_(30.0)

    found = scan(plant)
    (one,) = [one for one in found if one.id == "miscalibration"]
    assert one.evidence["overconfidence"] > 0.5
    assert set(told(found)) == {"miscalibration"}


def test_the_same_prediction_again_and_again():
    def plant(subject):
        subject.norm.weight.zero_()
        subject.norm.weight[3] = 1.0
        subject.positions.weight[:, 3] += 3.0

    found = scan(plant, panel="uncertainty")
    (one,) = [one for one in found if one.id == "repetition"]
    assert one.evidence["repetition"] > 0.9
    assert one.severity == "warning"
