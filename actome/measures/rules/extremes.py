"""Rules on activations that are far larger than the others, and on what rounding makes of them."""

from __future__ import annotations

from .base import Measures, Rule, Severity, Values, Verdict, indices
from .thresholds import Thresholds

# The share of the sequences' maxima from which on a unit or a position is named as carrying massive activations.
_CARRIES = 0.1


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
    positions = indices(values["massive_position_share"][:-1] >= _CARRIES)
    where = {"units": indices(values["massive_unit_share"] >= _CARRIES)}
    return Verdict(severity, ratio, evidence, {**where, "positions": positions} if positions else where)


def _outlier_channels(values: Values, measures: Measures, limits: Thresholds) -> Verdict | None:
    channels = indices(values["outlier_frequency"] >= measures["outlier_frequency"].share)
    if not channels:
        return None
    energy = float(values["outlier_energy"])
    evidence = {"outlier_channels": float(len(channels)), "outlier_energy": energy}
    return Verdict("warning" if energy >= limits.outlier_energy else "info", energy, evidence, {"units": channels})


def _residual_peak(values: Values, measures: Measures, limits: Thresholds) -> Verdict | None:
    peak = float(values["residual_peak"])
    return Verdict("info", peak, {"residual_peak": peak}, {"positions": [0]}) if peak >= limits.residual_peak else None


def _spike_outliers(values: Values, measures: Measures, limits: Thresholds) -> Verdict | None:
    share = float(values["spike_tokens"])
    if not share >= limits.spike_share:
        return None
    return Verdict("info", share, {"spike_tokens": share, "spike_ratio": float(values["spike_ratio"])}, {})


def _quantisation_loss(values: Values, measures: Measures, limits: Thresholds) -> Verdict | None:
    scales = ("tensor", "token", "channel")
    error = {scale: float(values[f"int8_{scale}_error"]) for scale in scales}
    lost = {scale: float(values[f"int8_{scale}_lost"]) for scale in scales}
    # Some activations are so small that any scale loses them; what counts is what a finer one would keep.
    spared = min(lost.values())
    bad = {scale: error[scale] >= limits.int_error or lost[scale] - spared >= limits.int_lost for scale in scales}
    if not bad["tensor"]:
        return None
    evidence = {f"int8_{scale}_error": error[scale] for scale in scales}
    evidence["int8_tensor_lost"] = lost["tensor"]
    where: dict[str, list[int]] = {}
    if "outlier_frequency" in values:
        units = indices(values["outlier_frequency"] >= measures["outlier_frequency"].share)
        if units:
            where["units"] = units
            evidence |= {"outlier_channels": float(len(units)), "outlier_energy": float(values["outlier_energy"])}
    degree = max(error["tensor"], lost["tensor"] - spared)
    if not bad["token"]:
        return Verdict("info", degree, evidence, where, _PER_TOKEN)
    return Verdict("warning", degree, evidence, where, _NO_SCALE if bad["channel"] else _PER_CHANNEL)


_PER_TOKEN = (
    "A few massive tokens set the scale for all. Quantise activations per token (dynamic scales), or keep those tokens "
    "in 16 bits; leave them out of calibration."
)
_PER_CHANNEL = (
    "A few channels set the scale for all, token by token. Smooth them into the next weight (SmoothQuant), rotate the "
    "space, or keep these channels in 16 bits (LLM.int8()); scales for each channel would do, and show what there is "
    "to gain."
)
_NO_SCALE = (
    "Neither scales for tokens nor for channels hold the error down: the activations are heavy-tailed in themselves. "
    "Rotate the space before rounding, clip with calibration, or keep this site in 16 bits."
)


RULES = (
    Rule(
        "massive-activations",
        ("massive_ratio", "massive_unit_share", "massive_position_share"),
        _massive_activations,
        "Sun et al. 2024, Massive Activations in Large Language Models; Gallego-Feliciano et al. 2025, Hidden Dynamics "
        "of Massive Activations in Transformer Training",
        "Normal in pretrained transformers, where they act as fixed biases. Leave these positions out of averages over "
        "tokens and of calibration data; quantise per channel or per token; near the largest float16 do not run in "
        "float16.",
    ),
    Rule(
        "outlier-channels",
        ("outlier_channels", "outlier_energy", "outlier_frequency"),
        _outlier_channels,
        "Dettmers et al. 2022, LLM.int8(); Ahmadian et al. 2023, Intriguing Properties of Quantization at Scale",
        "Quantise these sites per channel, smooth or rotate them first, or keep the channels in 16 bits; standardise "
        "channels before comparing tokens by cosine or distance.",
        # Units of MLPs and heads are heavy-tailed by themselves; `quantisation-loss` names theirs where they do harm.
        only="resid.post",
    ),
    Rule(
        "residual-peak",
        ("residual_peak",),
        _residual_peak,
        "Guo et al. 2024, Active-Dormant Attention Heads",
        "Normal beside attention sinks: the first token has become a fixed bias. Leave it out of averages over tokens, "
        "of comparisons between layers and of calibration.",
    ),
    Rule(
        "spike-outliers",
        ("spike_tokens", "spike_ratio"),
        _spike_outliers,
        "Yi et al. 2025, Rotated Runtime Smooth",
        "Single entries exceed their token and their channel alike, so that no scale fits them: rotate the space "
        "before rounding. Smoothing by channel would spread them to other tokens instead.",
    ),
    Rule(
        "quantisation-loss",
        tuple(f"int8_{scale}_{what}" for scale in ("tensor", "token", "channel") for what in ("error", "lost")),
        _quantisation_loss,
        "Yao et al. 2023, ZeroQuant-V2; Xiao et al. 2023, SmoothQuant; Dettmers et al. 2022, LLM.int8()",
        "Round with finer scales.",
    ),
)
