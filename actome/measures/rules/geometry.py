"""Rules on the directions that activations take, and on how far blocks move them."""

from __future__ import annotations

from .base import Measures, Rule, Severity, Values, Verdict
from .thresholds import Thresholds


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


def _token_collapse(values: Values, measures: Measures, limits: Thresholds) -> Verdict | None:
    cosine = float(values["token_cosine"])
    if not cosine >= limits.token_cosine:
        return None
    severity: Severity = "warning" if cosine >= limits.token_cosine_warning else "info"
    return Verdict(severity, cosine, {"token_cosine": cosine}, {})


def _unused_width(values: Values, measures: Measures, limits: Thresholds) -> Verdict | None:
    sui, tokens = float(values["sui"]), float(values["tokens_per_unit"])
    if not (sui < limits.sui and tokens >= limits.sui_tokens):
        return None
    names = ("sui", "participation_ratio", "shannon_rank", "tokens_per_unit")
    return Verdict("info", -sui, {name: float(values[name]) for name in names}, {})


RULES = (
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
        "Gromov et al. 2024, The Unreasonable Ineffectiveness of the Deeper Layers; Shemiranifar 2025, Void in "
        "Language Models",
        "The block adds next to nothing: it may have been initialised or trained out of use. Compare the loss with the "
        "block bypassed; if it stays, prune the block.",
    ),
    Rule(
        "token-collapse",
        ("token_cosine",),
        _token_collapse,
        "Gopalani and Hu 2025, What Happens During the Loss Plateau?; Ethayarajh 2019, How Contextual are "
        "Contextualized Word Representations?",
        "All tokens of a sequence point one way. Look whether one large channel or the mean does it (then subtract the "
        "mean before comparing tokens); in training, and together with repeated predictions, it marks a plateau.",
    ),
    Rule(
        "unused-width",
        ("sui", "tokens_per_unit", "participation_ratio", "shannon_rank"),
        _unused_width,
        "Jha and Reagen 2025, Spectral Scaling Laws in Language Models",
        "Nearly all variance lies in a few directions of this width. A narrower layer or a low-rank down projection "
        "may do; check the loss with the leading directions alone before cutting.",
        only="mlp.act",
    ),
)
