"""Rules on where heads look, and what they bring from there."""

from __future__ import annotations

from .base import Measures, Rule, Values, Verdict, indices
from .thresholds import Thresholds


def _attention_sink(values: Values, measures: Measures, limits: Thresholds) -> Verdict | None:
    heads = indices(values["sink_rate"] >= limits.sink_rate)
    if not heads:
        return None
    excess = float(values["sink_excess"][heads].max())
    evidence = {"sink": float(values["sink"][heads].max()), "sink_excess": excess}
    return Verdict("info", excess, evidence, {"heads": heads, "positions": [0]})


def _value_drain(values: Values, measures: Measures, limits: Thresholds) -> Verdict | None:
    drain = values["value_drain"]
    heads = indices(drain <= limits.value_drain)
    if not heads:
        return None
    least = float(drain[heads].min())
    return Verdict("info", -least, {"value_drain": least}, {"heads": heads, "positions": [0]})


RULES = (
    Rule(
        "attention-sink",
        ("sink", "sink_excess", "sink_rate"),
        _attention_sink,
        "Gu et al. 2025, When Attention Sink Emerges in Language Models; Xiao et al. 2024, StreamingLLM",
        "Normal: a head that has nothing to do rests on the first token. Keep that token in the cache when a window "
        "slides, and leave it out when attention is read as importance.",
    ),
    Rule(
        "value-drain",
        ("value_drain",),
        _value_drain,
        "Guo et al. 2024, Active-Dormant Attention Heads",
        "Normal beside attention sinks: what these heads read at the first token is next to nothing, so that resting "
        "there is doing nothing. Do not quantise its values with a scale shared with the others.",
    ),
)
