"""Rules on the logits and on what is predicted from them."""

from __future__ import annotations

from .base import Measures, Rule, Severity, Values, Verdict
from .thresholds import Thresholds


def _exploding_logits(values: Values, measures: Measures, limits: Thresholds) -> Verdict | None:
    largest = float(values["max_logit"])
    if not largest >= limits.logit:
        return None
    severity: Severity = "critical" if largest >= limits.logit_critical else "warning"
    return Verdict(severity, largest, {"max_logit": largest, "log_z": float(values["log_z"])}, {})


def _miscalibration(values: Values, measures: Measures, limits: Thresholds) -> Verdict | None:
    error = float(values["calibration_error"])
    if not error >= limits.calibration_error:
        return None
    evidence = {name: float(values[name]) for name in ("calibration_error", "overconfidence", "accuracy")}
    return Verdict("info", error, evidence, {})


def _repetition(values: Values, measures: Measures, limits: Thresholds) -> Verdict | None:
    repeats, data = float(values["repetition"]), float(values["repetition_of_data"])
    if not repeats - data >= limits.repetition:
        return None
    return Verdict("warning", repeats - data, {"repetition": repeats, "repetition_of_data": data}, {})


RULES = (
    Rule(
        "exploding-logits",
        ("max_logit", "log_z"),
        _exploding_logits,
        "Wortsman et al. 2024, Small-scale proxies for large-scale Transformer training instabilities; Chowdhery et "
        "al. 2022, PaLM (z-loss)",
        "Compute logits and loss in float32. While training add a z-loss or weight decay on the unembedding, and lower "
        "the learning rate.",
    ),
    Rule(
        "miscalibration",
        ("calibration_error", "overconfidence", "accuracy"),
        _miscalibration,
        "Guo et al. 2017, On Calibration of Modern Neural Networks",
        "Confidence and accuracy differ. Overconfidence above zero is usual on text unlike the training text, and "
        "after preference tuning: rescale the logits by a temperature fitted on held-out text before using them as "
        "probabilities.",
    ),
    Rule(
        "repetition",
        ("repetition", "repetition_of_data"),
        _repetition,
        "Gopalani and Hu 2025, What Happens During the Loss Plateau?",
        "The model predicts the same token again and again where the text does not. In training it marks a plateau: "
        "look at the tokens' cosine and the heads' entropy; after training look at the text's encoding and the "
        "checkpoint.",
    ),
)
