"""How each value is shown: its name for people, what it says in one sentence, its number format and its group.

This is one table, `WORDS`. A value without an entry is shown too, under its own name and in a format that its name
suggests, so a new measure appears in reports by itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from actome.measures.findings import Finding

Look = Literal["number", "share", "ratio", "count", "index"]

_MOST_SPANS = 6


@dataclass(frozen=True)
class Word:
    """How one value is shown.

    Attributes:
        title: for people.
        says: what it is, in one sentence.
        look: a plain number, a share between 0 and 1, a ratio that may span orders of magnitude, a count, or an index.
        short: heading of a narrow column.
        drawn: whether it gets a figure of its own.
        signed: whether it has a meaning below zero as well, so that colours go both ways from zero.
        group: heading under which it stands with others of its kind; one of `GROUPS`, or any other.
    """

    title: str
    says: str
    look: Look = "number"
    short: str = ""
    drawn: bool = True
    signed: bool = False
    group: str = "Other"

    def show(self, value: float) -> str:
        """The value for people: a share in percent, large and small numbers with three digits.

        >>> Word("Dead units", "", "share").show(0.0312), Word("RMS", "").show(12345.6), Word("x", "").show(math.nan)
        ('3.1 %', '12,300', '–')
        """
        if value is None or math.isnan(value):
            return "–"
        if math.isinf(value):
            return "∞" if value > 0 else "-∞"
        if self.look == "share":
            shown = f"{value:.1%}" if 0 < abs(value) < 0.1 else f"{value:.0%}"
            return shown.replace("-0.0%", "0.0%").replace("%", " %")
        if self.look == "index" or (value == int(value) and abs(value) < 1e4):
            return f"{value:.0f}"
        return f"{float(f'{value:.3g}'):,.0f}" if 1e3 <= abs(value) < 1e7 else f"{value:.3g}"


GROUPS = ("Prediction", "Scale", "Depth", "Extremes", "Sparsity", "Spectrum", "Attention", "Distribution", "Other")

_BY_GROUP: dict[str, dict[str, Word]] = {
    "Prediction": {
        "loss": Word("Loss", "Mean next-token cross-entropy, in nats."),
        "perplexity": Word("Perplexity", "Exponential of the loss.", "ratio"),
        "log_z": Word("Log of the partition", "Mean log-sum-exp of the logits."),
        "max_logit": Word("Largest logit", "Largest magnitude of any logit."),
        "non_finite_tokens": Word("Tokens not finite", "Tokens whose logits are not finite.", drawn=False),
        "token_loss": Word("Loss of this token", "How little it was foreseen, in nats."),
        "token_entropy": Word("Uncertainty before it", "Entropy of the prediction of this token, in nats."),
        "token_margin": Word("Margin before it", "First probability less the second.", "share"),
    },
    "Scale": {
        "rms": Word("Activation scale", "Root mean square of the activations.", "ratio", "rms"),
        "norm": Word("Norm", "Mean length of the activation vectors.", "ratio", drawn=False),
        "max_abs": Word("Largest activation", "Largest magnitude anywhere in the text.", "ratio", drawn=False),
        "non_finite": Word("Not finite", "Share of activations that are NaN or infinite.", "share", drawn=False),
    },
    "Depth": {
        "growth": Word(
            "Growth", "Scale of the stream over that before the first block.", "ratio", "growth", drawn=False
        ),
        "movement": Word("Movement", "How far a block moves the stream, over the length it had.", "ratio", "moves"),
        "cosine": Word(
            "Direction kept", "Cosine between the stream before and after a block.", drawn=False, signed=True
        ),
        "used": Word("Layers in use", "Share of tokens for which a block is no void.", "share", "used"),
    },
    "Extremes": {
        "massive_ratio": Word(
            "Massive activations", "Largest activation of a sequence over the median one.", "ratio", "max/med"
        ),
        "massive_unit": Word("Unit of the maximum", "The unit that carries most maxima.", "index", drawn=False),
        "massive_position": Word("Position of the maximum", "The position of most maxima.", "index", drawn=False),
        "massive_unit_share": Word("Maxima at this unit", "Share of sequences whose maximum it has.", "share"),
        "massive_position_share": Word(
            "Where maxima sit", "Share of sequences whose maximum is at each position.", "share"
        ),
        "outlier_channels": Word(
            "Outlier channels", "Units that stand out at 6 % of tokens or more.", "count", "outliers"
        ),
        "outlier_frequency": Word("Stands out", "Share of tokens at which the unit stands out.", "share"),
        "outlier_energy": Word(
            "Energy in outliers", "Share of a token's squared norm in those units.", "share", drawn=False
        ),
    },
    "Sparsity": {
        "zeros": Word("Exact zeros", "Share of activations that are exactly zero.", "share", "zeros", drawn=False),
        "near_zeros": Word("Near-zeros", "Share of activations below 1 % of their token's scale.", "share", "near 0"),
        "frequency": Word("Active", "Share of tokens at which the unit is active.", "share"),
        "dead": Word("Dead units", "Share of units that did nothing in the whole text.", "share", "dead"),
        "dead_bound": Word(
            "Bound for dead units", "Highest frequency that such a unit may still have.", "share", drawn=False
        ),
        "peak": Word("Peak", "Largest activation of the unit over the scale of its layer.", "ratio"),
    },
    "Spectrum": {
        "effective_rank": Word(
            "Effective rank", "Exponential of the entropy of the singular values.", short="rank", drawn=False
        ),
        "effective_rank_share": Word(
            "Effective rank, of the possible", "Directions in use, over those that there are.", "share", "rank"
        ),
        "spectrum": Word("Eigenvalues", "Variance in each direction, the largest first.", "ratio"),
    },
    "Attention": {
        "sink": Word("Attention to the first token", "Mean weight on it.", "share", "sink", drawn=False),
        "sink_excess": Word(
            "Attention sinks", "Weight on the first token, beyond an even spread.", "share", "sink", signed=True
        ),
        "sink_rate": Word(
            "Sink rate", "Share of sequences in which a head is a sink.", "share", "sink rate", drawn=False
        ),
        "attention_entropy": Word("Attention entropy", "0: one key; 1: all visible keys alike.", short="entropy"),
        "attention_received": Word(
            "Attention received", "Mean weight that later tokens give it, over all heads.", "share"
        ),
        "attention_received_most": Word(
            "Attention received, strongest head", "Mean weight that later tokens give it.", "share"
        ),
    },
    "Distribution": {
        "histogram": Word("Magnitudes", "How many activations are how large; each doubling is a step.", "share"),
        "exact_zeros": Word("Zeros", "Share of activations that are zero.", "share", drawn=False),
        "positive": Word("Positive", "Share of the activations other than zero that are above it.", "share"),
        "abs_p50": Word("Median magnitude", "Half of the activations are smaller; to 12 %.", "ratio", drawn=False),
        "abs_p90": Word("90 % of magnitudes", "Nine in ten are smaller; to 12 %.", "ratio", drawn=False),
        "abs_p99": Word("99 % of magnitudes", "Of a hundred 99 are smaller; to 12 %.", "ratio"),
        "abs_p999": Word("99.9 % of magnitudes", "Of a thousand 999 are smaller; to 12 %.", "ratio", drawn=False),
    },
}

WORDS = {name: replace(one, group=group) for group, words in _BY_GROUP.items() for name, one in words.items()}

# What the end of a name says of a value without an entry.
_ENDINGS: dict[str, Look] = {
    "_share": "share", "_rate": "share", "_fraction": "share", "_probability": "share", "_frequency": "share",
    "_count": "count", "_ratio": "ratio", "_unit": "index", "_position": "index", "_index": "index",
}  # fmt: skip


_ACRONYMS = {"cka", "cca", "svcca", "rsa", "sui", "nc1", "nc2", "nc3", "nc4", "ece", "kl", "snr"}


def word(measure: str) -> Word:
    """How a value is shown; one without an entry goes by its own name.

    >>> word("expert_load_share").title, word("expert_load_share").look
    ('Expert load share', 'share')
    """
    if measure in WORDS:
        return WORDS[measure]
    look = next((look for ending, look in _ENDINGS.items() if measure.endswith(ending)), "number")
    spoken = " ".join(part.upper() if part in _ACRONYMS else part for part in measure.split("_"))
    return Word(spoken[:1].upper() + spoken[1:], "", look, spoken, drawn=look != "index")


def place_of(where: Mapping[str, Sequence[int]]) -> str:
    """Where a finding is, in words; runs of neighbours written short, and long lists by their beginning.

    >>> place_of({"layers": [3], "heads": [0, 1, 2, 5]})
    'layer 3, heads 0-2, 5'
    >>> place_of({"units": range(0, 400, 2)})
    '200 units (0, 2, 4, 6, 8, 10, ...)'
    """
    return ", ".join(_place(name, numbers) for name, numbers in where.items())


def _place(name: str, numbers: Sequence[int]) -> str:
    written = spans(numbers)
    parts = written.split(", ")
    if len(parts) > _MOST_SPANS:
        return f"{len(numbers)} {name} ({', '.join(parts[:_MOST_SPANS])}, ...)"
    return f"{name.removesuffix('s') if len(numbers) == 1 else name} {written}"


def spans(numbers: Iterable[int]) -> str:
    """Whole numbers with runs of neighbours written short.

    >>> spans([5, 0, 1, 2])
    '0-2, 5'
    """
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def grouped(findings: Iterable[Finding]) -> list[list[Finding]]:
    """Findings of one kind and severity together, so that their advice need be read only once; order is kept."""
    groups: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.severity, finding.id), []).append(finding)
    return list(groups.values())


def evidence_of(evidence: Mapping[str, Any]) -> str:
    """The numbers that a finding rests on, in words.

    >>> evidence_of({"dead": 0.25, "tokens": 4096})
    'dead 25 %, tokens 4096'
    """
    return ", ".join(
        f"{name.replace('_', ' ')} {word(name).show(x) if isinstance(x, int | float) else x}"
        for name, x in evidence.items()
    )


def kind_of(site: str) -> str:
    """What a person calls a site when its layer is said elsewhere.

    >>> kind_of("encoder.blocks.3.attn.pattern"), kind_of("logits")
    ('encoder attn.pattern', 'logits')
    """
    stack, blocks, rest = site.partition("blocks.")
    if not blocks:
        return site
    return f"{stack.removesuffix('.')} {rest.partition('.')[2]}".strip()


def stack_of(site: str) -> str:
    """The stack of blocks that a site belongs to; empty for models that have one.

    >>> stack_of("encoder.blocks.3.attn.pattern"), stack_of("blocks.0.mlp.act"), stack_of("logits")
    ('encoder', '', '')
    """
    stack, blocks, _ = site.partition("blocks.")
    return stack.removesuffix(".") if blocks else ""


def layer_page(stack: str, layer: int) -> str:
    """The address of a layer within the page of a report.

    >>> layer_page("", 3), layer_page("encoder", 0)
    ('layer-3', 'encoder-layer-0')
    """
    return f"{stack}-layer-{layer}" if stack else f"layer-{layer}"
