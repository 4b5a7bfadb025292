"""How each value is shown: its name for people, what it says in one sentence, and its number format.

A value without an entry is shown too, under its own name, so a new measure appears in reports by itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
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
    """

    title: str
    says: str
    look: Look = "number"
    short: str = ""
    drawn: bool = True
    signed: bool = False

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
            return f"{value:.1%}".replace("%", " %") if 0 < abs(value) < 0.1 else f"{value:.0%}".replace("%", " %")
        if self.look == "index" or (value == int(value) and abs(value) < 1e4):
            return f"{value:.0f}"
        return f"{float(f'{value:.3g}'):,.0f}" if 1e3 <= abs(value) < 1e7 else f"{value:.3g}"


WORDS = {
    "rms": Word("Activation scale", "Root mean square of the activations.", "ratio", "rms"),
    "growth": Word("Growth", "Scale of the stream over that before the first block.", "ratio", "growth", drawn=False),
    "movement": Word("Movement", "How far a block moves the stream, over the length it had.", "ratio", "moves"),
    "cosine": Word("Direction kept", "Cosine between the stream before and after a block.", "number", drawn=False),
    "used": Word("Layers in use", "Share of tokens for which a block is no void.", "share", "used"),
    "massive_ratio": Word(
        "Massive activations", "Largest activation of a sequence over the median one.", "ratio", "max/med"
    ),
    "massive_unit": Word("Unit of the maximum", "The unit that carries most maxima.", "index", drawn=False),
    "massive_position": Word("Position of the maximum", "The position of most maxima.", "index", drawn=False),
    "outlier_channels": Word("Outlier channels", "Units that stand out at 6 % of tokens or more.", "count", "outliers"),
    "outlier_energy": Word(
        "Energy in outliers", "Share of a token's squared norm in those units.", "share", drawn=False
    ),
    "effective_rank": Word(
        "Effective rank", "Exponential of the entropy of the singular values.", short="rank", drawn=False
    ),
    "effective_rank_share": Word("Effective rank", "Directions in use, over those that there are.", "share", "rank"),
    "norm": Word("Norm", "Mean length of the activation vectors.", "ratio", drawn=False),
    "max_abs": Word("Largest activation", "Largest magnitude anywhere in the text.", "ratio", drawn=False),
    "non_finite": Word("Not finite", "Share of activations that are NaN or infinite.", "share", drawn=False),
    "zeros": Word("Exact zeros", "Share of activations that are exactly zero.", "share", "zeros", drawn=False),
    "near_zeros": Word("Near-zeros", "Share of activations below 1 % of their token's scale.", "share", "near 0"),
    "dead": Word("Dead units", "Share of units that did nothing in the whole text.", "share", "dead"),
    "dead_bound": Word("Bound for dead units", "Highest frequency that such a unit may still have.", drawn=False),
    "sink": Word("Attention to the first token", "Mean weight on it.", "share", "sink", drawn=False),
    "sink_excess": Word(
        "Attention sinks", "Weight on the first token, beyond an even spread.", "share", "sink", signed=True
    ),
    "sink_rate": Word("Sink rate", "Share of sequences in which a head is a sink.", "share", "sink rate", drawn=False),
    "attention_entropy": Word("Attention entropy", "0: one key; 1: all visible keys alike.", short="entropy"),
    "loss": Word("Loss", "Mean next-token cross-entropy, in nats."),
    "perplexity": Word("Perplexity", "Exponential of the loss.", "ratio"),
    "log_z": Word("Log of the partition", "Mean log-sum-exp of the logits."),
    "max_logit": Word("Largest logit", "Largest magnitude of any logit."),
    "non_finite_tokens": Word("Tokens not finite", "Tokens whose logits are not finite.", drawn=False),
}


def word(measure: str) -> Word:
    """How a value is shown; one without an entry goes by its own name."""
    return WORDS.get(measure) or Word(measure.replace("_", " ").capitalize(), "", short=measure)


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
