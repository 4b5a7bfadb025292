"""When what was measured is worth a person's attention: one rule for each kind of finding, and its thresholds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from ..core.measure import Measure

Severity = Literal["info", "warning", "critical"]


@dataclass(frozen=True)
class Thresholds:
    """When a finding is made, and when it is more than information.

    The defaults are drawn so that a healthy pretrained or freshly initialised model has nothing above ``info``. What is
    said to be ours is a round number well away from what healthy models show, and not a law.

    Attributes:
        dead_share: a site with this share of dead units or more is a warning; any dead unit is information. Ours:
            Voita et al. 2023 find a few per cent in most layers of most models, above 70 % in early layers of OPT-66B.
        dead_share_critical: from here on the layer hardly does anything. Ours.
        dead_bound: dead units are a warning only if the text was long enough for this bound on their true frequency
            (`DeadUnits`); 0.003 takes about 1000 tokens.
        massive_ratio: largest over median activation from which on activations are called massive. Ours: normal ones
            reach about 10 (Gaussian: 7), pretrained models 100 to 10000, which is how they work and no fault.
        massive_limit: magnitude from which on massive activations are a warning: half of the largest float16, 65504.
        sink_rate: share of sequences in which a head must have a sink (`SinkScore`) to be called a sink head.
        outlier_energy: share of a token's energy in outlier channels from which on they are a warning: what is left
            for all others is then below what 8 bits resolve next to them. Ours.
        rank_share: effective rank over its possible maximum below which it has collapsed. Ours.
        rank_critical: an effective rank below this means that nearly all tokens are alike.
        idle_movement: relative movement of the stream below which a block is idle. Ours; pretrained blocks move it by
            0.05 to 1.
        logit: magnitude of a logit from which on logits explode: bfloat16 then resolves no finer than 4, a factor of
            50 in probability.
        logit_critical: Wortsman et al. 2024 see training diverge from about here.
    """

    dead_share: float = 0.25
    dead_share_critical: float = 0.9
    dead_bound: float = 0.003
    massive_ratio: float = 100.0
    massive_limit: float = 32_752.0
    sink_rate: float = 0.5
    outlier_energy: float = 0.95
    rank_share: float = 0.05
    rank_critical: float = 1.5
    idle_movement: float = 0.01
    logit: float = 1e3
    logit_critical: float = 1e4


class Verdict(NamedTuple):
    """What a rule says of one site.

    Attributes:
        severity: info, warning or critical.
        degree: how strong it is; of sites that are told together the strongest gives the evidence.
        evidence: the numbers that it rests on.
        where: heads, units and positions, those that apply.
    """

    severity: Severity
    degree: float
    evidence: dict[str, float]
    where: dict[str, list[int]]


@dataclass(frozen=True)
class Rule:
    """One kind of finding.

    Attributes:
        id: its name.
        needs: the values that must have been measured at a site for the rule to apply there.
        judge: from the values of one site, the measures they come from, and the thresholds, the verdict if any.
        source: where the phenomenon or the definition comes from.
        advice: what to do about it.
    """

    id: str
    needs: tuple[str, ...]
    judge: Callable[[Mapping[str, Tensor], Mapping[str, Measure], Thresholds], Verdict | None]
    source: str
    advice: str


# The share of the sequences' maxima from which on a unit or a position is named as carrying massive activations.
_CARRIES = 0.1

Values = Mapping[str, Tensor]
Measures = Mapping[str, Measure]


def _indices(hits: Tensor) -> list[int]:
    return hits.nonzero().flatten().tolist()


def _dead_units(values: Values, measures: Measures, limits: Thresholds) -> Verdict | None:
    units = _indices(values["peak"] <= measures["peak"].threshold)
    if not units:
        return None
    dead, bound = float(values["dead"]), float(values["dead_bound"])
    severity: Severity = "info"
    if bound <= limits.dead_bound and dead >= limits.dead_share:
        severity = "critical" if dead >= limits.dead_share_critical else "warning"
    return Verdict(severity, dead, {"dead": dead, "dead_bound": bound}, {"units": units})


def _massive_activations(values: Values, measures: Measures, limits: Thresholds) -> Verdict | None:
    ratio = float(values["massive_ratio"])
    if not ratio >= limits.massive_ratio:
        return None
    evidence = {"massive_ratio": ratio}
    severity: Severity = "info"
    if "max_abs" in values:
        evidence["max_abs"] = float(values["max_abs"])
        severity = "warning" if evidence["max_abs"] >= limits.massive_limit else "info"
    # The last entry of the histogram stands for all later positions, which are no one place.
    positions = _indices(values["massive_position_share"][:-1] >= _CARRIES)
    where = {"units": _indices(values["massive_unit_share"] >= _CARRIES)}
    return Verdict(severity, ratio, evidence, {**where, "positions": positions} if positions else where)


def _attention_sink(values: Values, measures: Measures, limits: Thresholds) -> Verdict | None:
    heads = _indices(values["sink_rate"] >= limits.sink_rate)
    if not heads:
        return None
    excess = float(values["sink_excess"][heads].max())
    evidence = {"sink": float(values["sink"][heads].max()), "sink_excess": excess}
    return Verdict("info", excess, evidence, {"heads": heads, "positions": [0]})


def _outlier_channels(values: Values, measures: Measures, limits: Thresholds) -> Verdict | None:
    channels = _indices(values["outlier_frequency"] >= measures["outlier_frequency"].share)
    if not channels:
        return None
    energy = float(values["outlier_energy"])
    evidence = {"outlier_channels": float(len(channels)), "outlier_energy": energy}
    return Verdict("warning" if energy >= limits.outlier_energy else "info", energy, evidence, {"units": channels})


def _rank_collapse(values: Values, measures: Measures, limits: Thresholds) -> Verdict | None:
    rank, share = float(values["effective_rank"]), float(values["effective_rank_share"])
    if not share < limits.rank_share:
        return None
    severity: Severity = "critical" if rank < limits.rank_critical else "warning"
    return Verdict(severity, -share, {"effective_rank": rank, "effective_rank_share": share}, {})


def _idle_layers(values: Values, measures: Measures, limits: Thresholds) -> Verdict | None:
    movement = float(values["movement"])
    if not movement < limits.idle_movement:
        return None
    return Verdict("warning", -movement, {"movement": movement, "cosine": float(values["cosine"])}, {})


def _exploding_logits(values: Values, measures: Measures, limits: Thresholds) -> Verdict | None:
    largest = float(values["max_logit"])
    if not largest >= limits.logit:
        return None
    severity: Severity = "critical" if largest >= limits.logit_critical else "warning"
    return Verdict(severity, largest, {"max_logit": largest, "log_z": float(values["log_z"])}, {})


def _non_finite(name: str) -> Callable[[Values, Measures, Thresholds], Verdict | None]:
    def judge(values: Values, measures: Measures, limits: Thresholds) -> Verdict | None:
        share = float(values[name])
        return Verdict("critical", share, {name: share}, {}) if share > 0 else None

    return judge


_NON_FINITE_SOURCE = "IEEE 754; Micikevicius et al. 2018, Mixed Precision Training (overflow of float16)"
_NON_FINITE_ADVICE = (
    "Look at the first layer that has it. In float16 try bfloat16 or float32; after training, look at the loss scale, "
    "at the learning rate and at the last good checkpoint. The tokens concerned are left out of all other measures."
)

RULES = (
    Rule("non-finite", ("non_finite",), _non_finite("non_finite"), _NON_FINITE_SOURCE, _NON_FINITE_ADVICE),
    Rule(
        "non-finite", ("non_finite_tokens",), _non_finite("non_finite_tokens"), _NON_FINITE_SOURCE, _NON_FINITE_ADVICE
    ),
    Rule(
        "dead-units",
        ("dead", "dead_bound", "peak"),
        _dead_units,
        "Voita et al. 2023, Neurons in Large Language Models: Dead, N-gram, Positional",
        "Measure more text first: a rare unit looks dead in a short one (dead_bound says how rare it may be). Truly "
        "dead units can be cut out without a change; while training, lower the learning rate or lengthen its warm-up, "
        "or use an activation function with a gradient everywhere.",
    ),
    Rule(
        "massive-activations",
        ("massive_ratio", "massive_unit_share", "massive_position_share"),
        _massive_activations,
        "Sun et al. 2024, Massive Activations in Large Language Models; Hidden Dynamics of Massive Activations in "
        "Transformer Training",
        "Normal in pretrained transformers, where they act as fixed biases. Leave these positions out of averages over "
        "tokens and of calibration data; quantise per channel or per token; near the largest float16 do not run in "
        "float16.",
    ),
    Rule(
        "attention-sink",
        ("sink", "sink_excess", "sink_rate"),
        _attention_sink,
        "Gu et al. 2025, When Attention Sink Emerges in Language Models; Xiao et al. 2024, StreamingLLM",
        "Normal: a head that has nothing to do rests on the first token. Keep that token in the cache when a window "
        "slides, and leave it out when attention is read as importance.",
    ),
    Rule(
        "outlier-channels",
        ("outlier_channels", "outlier_energy", "outlier_frequency"),
        _outlier_channels,
        "Dettmers et al. 2022, LLM.int8(); Ahmadian et al. 2023, Intriguing Properties of Quantization at Scale",
        "Quantise these sites per channel, smooth or rotate them first, or keep the channels in 16 bits; standardise "
        "channels before comparing tokens by cosine or distance.",
    ),
    Rule(
        "rank-collapse",
        ("effective_rank", "effective_rank_share"),
        _rank_collapse,
        "Garrido et al. 2023, RankMe; Dong et al. 2021, Attention is not all you need: pure attention loses rank",
        "Compare with the layers before: look at norms and residual scaling where the rank falls, and at the text, "
        "which may be one thing over and over. A large common mean lowers the rank as well.",
    ),
    Rule(
        "idle-layers",
        ("movement", "cosine"),
        _idle_layers,
        "Gromov et al. 2024, The Unreasonable Ineffectiveness of the Deeper Layers; Void in Language Models",
        "The block adds next to nothing: it may have been initialised or trained out of use. Compare the loss with the "
        "block bypassed; if it stays, prune the block.",
    ),
    Rule(
        "exploding-logits",
        ("max_logit", "log_z"),
        _exploding_logits,
        "Wortsman et al. 2024, Small-scale proxies for large-scale Transformer training instabilities; Chowdhery et "
        "al. 2022, PaLM (z-loss)",
        "Compute logits and loss in float32. While training add a z-loss or weight decay on the unembedding, and lower "
        "the learning rate.",
    ),
)

IDS = tuple(dict.fromkeys(rule.id for rule in RULES))
