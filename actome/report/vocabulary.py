"""The table of how each value is shown: `WORDS`, by the name that its measure gives it.

Values that are drawn get a figure each; all of them are in the tables and on the pages of layers. What is not drawn
says nearly the same as something that is, or is of use only beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

Look = Literal["number", "share", "ratio", "count", "index"]


@dataclass(frozen=True)
class Word:
    """How one value is shown.

    Attributes:
        title: for people.
        says: what it is, in one sentence.
        look: a plain number, a share between 0 and 1, a ratio that may span orders of magnitude, a count, or an index.
        short: heading of a narrow column.
        cited: what it is called among the numbers of a finding; its title, in small letters, when empty.
        drawn: whether it gets a figure of its own.
        signed: whether it has a meaning below zero as well, so that colours go both ways from zero.
        wide: whether a share spans orders of magnitude, as a ratio does.
        group: heading under which it stands with others of its kind; one of `GROUPS`, or any other.
    """

    title: str
    says: str
    look: Look = "number"
    short: str = ""
    drawn: bool = True
    signed: bool = False
    group: str = "Other"
    cited: str = ""
    wide: bool = False

    def show(self, value: float) -> str:
        """The value for people: a share in percent, large and small numbers with three digits.

        >>> Word("Dead units", "", "share").show(0.0312), Word("RMS", "").show(12345.6), Word("x", "").show(math.nan)
        ('3.1 %', '12,300', '–')
        >>> Word("Error", "", "share").show(0.000286)
        '0.029 %'
        """
        if value is None or math.isnan(value):
            return "–"
        if math.isinf(value):
            return "∞" if value > 0 else "-∞"
        if self.look == "share":
            if 1e-6 <= abs(value) < 1e-3:
                return f"{float(f'{value:.2g}'):.6%}".rstrip("%").rstrip("0") + " %"
            shown = f"{value:.1%}" if 0 < abs(value) < 0.1 else f"{value:.0%}"
            return shown.replace("-0.0%", "0.0%").replace("%", " %")
        if self.look == "index" or (value == int(value) and abs(value) < 1e4):
            return f"{value:.0f}"
        return f"{float(f'{value:.3g}'):,.0f}" if 1e3 <= abs(value) < 1e7 else f"{value:.3g}"


GROUPS = (
    "Prediction",
    "Uncertainty",
    "Scale",
    "Depth",
    "Extremes",
    "Quantisation",
    "Sparsity",
    "Spectrum",
    "Similarity",
    "Trajectory",
    "Attention",
    "Experts",
    "Distribution",
    "Other",
)

# What a scale for rounding is shared by, and in whose place it would be chosen.
_SCALES = {
    "tensor": "one scale a tensor",
    "token": "one scale a token",
    "channel": "one scale a channel",
}


def _quantisation() -> dict[str, Word]:
    kinds = [(bits, key, f"rounded to {bits} bits with {_SCALES[key]}") for bits in (8, 4) for key in _SCALES]
    errors = {
        f"int{bits}_{key}_error": Word(
            f"int{bits} error, {_SCALES[key]}",
            f"Power of the error over that of the activations, {of}; mean over tokens.",
            "share",
            drawn=bits == 8,
            wide=True,
        )
        for bits, key, of in kinds
    }
    lost = {
        f"int{bits}_{key}_lost": Word(
            f"Lost to int{bits}, {_SCALES[key]}",
            f"Share of the activations that become zero, {of}.",
            "share",
            drawn=(bits, key) == (8, "tensor"),
            cited=f"rounded to zero, {_SCALES[key]}",
        )
        for bits, key, of in kinds
    }
    decibels = {
        f"int{bits}_{key}_db": Word(
            f"int{bits} signal to noise, {_SCALES[key]}",
            f"In decibels, all tokens together, {of}; 20 dB is noise of 1 % of the power.",
            drawn=False,
        )
        for bits, key, of in kinds
    }
    return {**errors, **lost, **decibels}


_BY_GROUP: dict[str, dict[str, Word]] = {
    "Prediction": {
        "loss": Word("Loss", "Mean next-token cross-entropy, in nats."),
        "perplexity": Word("Perplexity", "Exponential of the loss.", "ratio"),
        "log_z": Word("Log of the partition", "Mean log-sum-exp of the logits.", cited="log Z"),
        "max_logit": Word("Largest logit", "Largest magnitude of any logit."),
        "accuracy": Word("Accuracy", "How often the next token is the most probable one.", "share"),
        "repetition": Word(
            "Repeated predictions",
            "Share of neighbouring positions with the same prediction.",
            "share",
        ),
        "repetition_of_data": Word(
            "Repeated tokens",
            "Share of neighbouring tokens of the text that are the same.",
            "share",
            cited="repeated tokens of the text",
        ),
        "non_finite_tokens": Word("Tokens not finite", "Tokens whose logits are not finite.", drawn=False),
        "token_loss": Word("Loss of this token", "How little it was foreseen, in nats."),
        "token_entropy": Word("Uncertainty before it", "Entropy of the prediction of this token, in nats."),
        "token_margin": Word("Margin before it", "First probability less the second.", "share"),
    },
    "Uncertainty": {
        "entropy": Word("Entropy of predictions", "Mean entropy of the next-token distribution, in nats."),
        "confidence": Word("Confidence", "Mean probability of the most probable token.", "share"),
        "margin": Word("Margin", "Largest probability less the second, mean over tokens.", "share"),
        "logit_margin": Word("Margin of logits", "Largest logit less the second: log odds of the two."),
        "calibration_error": Word(
            "Calibration error", "Mean gap between confidence and accuracy, over 15 bins of confidence.", "share"
        ),
        "overconfidence": Word("Overconfidence", "Confidence less accuracy.", "share", signed=True),
        "brier": Word("Brier score", "Squared error of the predicted probabilities, 0 to 2."),
        "bin_share": Word("Predictions by confidence", "Share of predictions of such confidence.", "share"),
        "bin_confidence": Word("Confidence by bin", "Mean confidence of predictions of such confidence.", "share"),
        "bin_accuracy": Word(
            "Reliability",
            "How often predictions of such confidence are right, on the broken line where just as often; "
            "large points: many predictions.",
            "share",
        ),
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
        "contribution": Word(
            "Contribution",
            "What a block adds to the final stream in its direction; all add up to one.",
            signed=True,
        ),
        "cosine_first": Word(
            "Likeness to the beginning", "Cosine with the stream before the first block.", drawn=False, signed=True
        ),
        "cosine_last": Word("Likeness to the end", "Cosine with the stream after the last block.", signed=True),
        "stiffness": Word(
            "Stiffness", "Length of a block's step over that of the stream, token by token.", "ratio", drawn=False
        ),
        "stiffness_deviation": Word(
            "Spread of stiffness", "Standard deviation of the stiffness over tokens.", "ratio", drawn=False
        ),
        "stiffness_variation": Word(
            "Variation of stiffness", "Changes of stiffness from block to block, added up so far.", drawn=False
        ),
    },
    "Extremes": {
        "massive_ratio": Word(
            "Massive activations",
            "Largest activation of a sequence over the median one.",
            "ratio",
            "max/med",
            cited="largest over median activation",
        ),
        "massive_unit": Word("Unit of the maximum", "The unit that carries most maxima.", "index", drawn=False),
        "massive_position": Word("Position of the maximum", "The position of most maxima.", "index", drawn=False),
        "massive_unit_share": Word("Maxima at this unit", "Share of sequences whose maximum it has.", "share"),
        "massive_position_share": Word(
            "Where maxima sit",
            "Share of sequences whose maximum is at each position, the last for all later ones.",
            "share",
        ),
        "outlier_channels": Word(
            "Outlier channels", "Units that stand out at 6 % of tokens or more.", "count", "outliers"
        ),
        "outlier_frequency": Word("Stands out", "Share of tokens at which the unit stands out.", "share"),
        "outlier_energy": Word(
            "Energy in outliers",
            "Share of a token's squared norm in those units.",
            "share",
            drawn=False,
            cited="their share of the energy",
        ),
        "residual_peak": Word(
            "Peak at the first token",
            "Norm of the first token's state over that of the others.",
            "ratio",
            cited="norm of the first token over others",
        ),
        "residual_norms": Word(
            "Norm by position", "Mean norm of the state at each position, the last for all later ones.", "ratio"
        ),
        "kurtosis": Word(
            "Kurtosis", "Excess kurtosis of all activations together; 0 for a Gaussian.", "ratio", drawn=False
        ),
        "token_kurtosis": Word(
            "Kurtosis over units",
            "Excess kurtosis over the units of a token; 0 for a Gaussian, large with outlier channels.",
            "ratio",
        ),
        "unit_kurtosis": Word("Kurtosis over tokens", "Excess kurtosis of the unit over tokens.", "ratio"),
        "channel_outliers": Word(
            "Loud channels", "Units of a sequence with a median magnitude over 6 times the usual.", drawn=False
        ),
        "channel_outlier_share": Word("Loud channel", "Share of sequences in which the unit is one.", "share"),
        "spike_tokens": Word(
            "Tokens with a spike", "Share of tokens with an entry that exceeds token and channel alike.", "share"
        ),
        "spikes": Word("Spikes a token", "Entries that exceed their token and channel alike.", drawn=False),
        "spike_ratio": Word(
            "Largest spike", "Largest entry over what is usual for its token and channel.", "ratio", drawn=False
        ),
    },
    "Quantisation": _quantisation(),
    "Sparsity": {
        "zeros": Word("Exact zeros", "Share of activations that are exactly zero.", "share", "zeros", drawn=False),
        "near_zeros": Word("Near-zeros", "Share of activations below 1 % of their token's scale.", "share", "near 0"),
        "frequency": Word("Active", "Share of tokens at which the unit is active.", "share"),
        "dead": Word("Dead units", "Share of units that did nothing in the whole text.", "share", "dead"),
        "dead_bound": Word(
            "Bound for dead units",
            "Highest frequency that such a unit may still have.",
            "share",
            drawn=False,
            cited="active at no more than",
        ),
        "peak": Word("Peak", "Largest activation of the unit over the scale of its layer.", "ratio"),
        "active": Word("Activation density", "Share of activations that are not exactly zero.", "share", drawn=False),
        "never_active": Word("Never active", "Share of units that are zero at every token.", "share", drawn=False),
        "always_active": Word(
            "Always active", "Share of units that are not zero at 99 % of tokens or more.", "share", drawn=False
        ),
        "silence_of_dead": Word(
            "Silence owed to dead units",
            "Share of the zeros that units have which are never active.",
            "share",
            drawn=False,
        ),
        "unit_frequency": Word("Not zero", "Share of tokens at which the unit is not zero.", "share"),
        "frequency_histogram": Word(
            "How often units are active", "Share of units that are not zero at so many of the tokens.", "share"
        ),
        "temporal_zeros": Word(
            "Unchanged from token to token",
            "Share of rounded activations that stay as they were.",
            "share",
            drawn=False,
        ),
        "spatial_zeros": Word(
            "Rounded to zero", "Share of activations that are zero on the same coarse grid.", "share", drawn=False
        ),
        "delta_work": Word(
            "Work for changes alone",
            "Of a layer that is fed with changes only, over a dense one.",
            "share",
            drawn=False,
        ),
    },
    "Spectrum": {
        "effective_rank": Word(
            "Effective rank", "Exponential of the entropy of the singular values.", short="rank", drawn=False
        ),
        "effective_rank_share": Word(
            "Effective rank, of the possible",
            "Directions in use, over those that there are.",
            "share",
            "rank",
            cited="of the possible",
        ),
        "participation_ratio": Word(
            "Participation ratio", "Directions that share the variance, large ones counting most.", drawn=False
        ),
        "shannon_rank": Word("Shannon rank", "Directions that share the variance, by its entropy.", drawn=False),
        "participation_utilisation": Word(
            "Participation ratio, of the width", "Participation ratio over the width.", "share", drawn=False
        ),
        "shannon_utilisation": Word("Shannon rank, of the width", "Shannon rank over the width.", "share", drawn=False),
        "sui": Word(
            "Spectral utilisation",
            "Share of the width in use: harmonic mean of both ranks over the width.",
            "share",
        ),
        "spectral_concentration": Word(
            "Spectral concentration", "Share of the variance in the leading tenth of directions.", "share"
        ),
        "stable_rank": Word("Stable rank", "All variance over that of the leading direction.", drawn=False),
        "alpha": Word("Decay of the spectrum", "Exponent of the eigenvalues' power law; large: few directions."),
        "alpha_r2": Word("Fit of the decay", "How well a power law fits the eigenvalues; 1: fully.", drawn=False),
        "spectrum": Word("Eigenvalues", "Share of the variance in each direction, the largest first.", "ratio"),
        "sketch_error": Word(
            "Not in the sketch",
            "Share of the variance that the sketch of a wide site leaves open.",
            "share",
            drawn=False,
        ),
        "tokens_per_unit": Word(
            "Tokens a unit", "Tokens read for each unit; ranks mean little below some 20.", "ratio", drawn=False
        ),
        "matrix_entropy": Word("Matrix entropy", "Entropy of the tokens' directions, in nats.", drawn=False),
        "matrix_entropy_share": Word(
            "Matrix entropy, of the possible", "Entropy of the tokens' directions, over its largest value.", "share"
        ),
        "matrix_entropy_sketch_error": Word(
            "Not in the entropy's sketch", "Share of its trace that a sketch leaves open.", "share", drawn=False
        ),
    },
    "Similarity": {
        "cka": Word("Similarity of layers", "CKA of the stream after each block with that after every other."),
        "cka_next": Word("Similarity to the next layer", "CKA with the stream after the next block."),
        "token_cosine": Word(
            "Likeness of tokens",
            "Mean cosine between the tokens of a sequence.",
            signed=True,
            cited="mean cosine of tokens",
        ),
    },
    "Trajectory": {
        "net_change": Word(
            "Net change", "Way from the first segment of a sequence to the last, over the first's length.", "ratio"
        ),
        "cumulative_change": Word(
            "Cumulative change", "Steps between the segments of a sequence, added up.", "ratio", drawn=False
        ),
        "aligned_change": Word(
            "Aligned change", "Mean cosine of those steps with the whole way.", drawn=False, signed=True
        ),
    },
    "Attention": {
        "sink": Word("Attention to the first token", "Mean weight on it.", "share", "sink", drawn=False),
        "sink_excess": Word(
            "Attention sinks",
            "Weight on the first token, beyond an even spread.",
            "share",
            "sink",
            signed=True,
            cited="beyond an even spread",
        ),
        "sink_rate": Word(
            "Sink rate", "Share of sequences in which a head is a sink.", "share", "sink rate", drawn=False
        ),
        "attention_logit_max": Word("Largest attention logit", "What enters the softmax, at its largest."),
        "previous_token": Word("Attention to the token before", "Mean weight on it.", "share"),
        "induction": Word("Induction", "Mean weight on what followed this token's last occurrence.", "share"),
        "attention_entropy": Word("Attention entropy", "0: one key; 1: all visible keys alike.", short="entropy"),
        "value_drain": Word(
            "Drained values",
            "Norm of the first token's value over that of the others.",
            "ratio",
            cited="norm of the first value over others",
        ),
        "attention_received": Word(
            "Attention received", "Mean weight that later tokens give it, over all heads.", "share"
        ),
        "attention_received_most": Word(
            "Attention received, strongest head", "Mean weight that later tokens give it.", "share"
        ),
    },
    "Experts": {
        "load": Word("Load", "Share of all choices that an expert gets.", "share"),
        "importance": Word("Importance", "Share of all weight that an expert gets.", "share", drawn=False),
        "max_load": Word(
            "Busiest expert", "Times its fair share that it takes.", "ratio", cited="times its fair share"
        ),
        "load_entropy": Word(
            "Evenness of the load", "Entropy of the load; 1: all experts alike, 0: one takes all.", drawn=False
        ),
        "load_cv": Word("Variation of the load", "Standard deviation of the load over its mean.", drawn=False),
        "dead_experts": Word("Dead experts", "Share of experts that no token chose.", "share", drawn=False),
        "experts_per_token": Word("Experts a token", "Mean number of experts that a token chose.", drawn=False),
        "router_entropy": Word("Router entropy", "0: sure of its choice; 1: indifferent."),
        "router_confidence": Word(
            "Router confidence", "Mean probability of the expert that comes first.", "share", drawn=False
        ),
        "router_margin": Word("Router margin", "Its probability less the second's.", "share", drawn=False),
        "router_z": Word("Router z", "Mean squared log-sum-exp of the router's logits.", "ratio", drawn=False),
        "router_information": Word(
            "Router information", "What its choice tells of the token; 0: all tokens are sent alike, 1: all it could."
        ),
        "pathway_distance": Word(
            "Distance of pathways", "How unlike the ways of two sequences through all layers are, 0 to 1."
        ),
        "choice_distance": Word("Distance of choices", "How unlike the choices of two sequences are, 0 to 1."),
        "pathways": Word("Pathways", "How many different ways sequences take through the layers.", "count"),
        "pathway_complexity": Word(
            "Complexity of pathways", "How much the chosen experts change in kind from the layer before.", drawn=False
        ),
    },
    "Distribution": {
        "histogram": Word("Magnitudes", "How many activations are how large; each doubling is a step.", "share"),
        "exact_zeros": Word("Zeros", "Share of activations that are zero.", "share", drawn=False),
        "positive": Word(
            "Positive", "Share of the activations other than zero that are above it.", "share", drawn=False
        ),
        "abs_p50": Word("Median magnitude", "Half of the activations are smaller; to 12 %.", "ratio", drawn=False),
        "abs_p90": Word("90 % of magnitudes", "Nine in ten are smaller; to 12 %.", "ratio", drawn=False),
        "abs_p99": Word("99 % of magnitudes", "Of a hundred 99 are smaller; to 12 %.", "ratio", drawn=False),
        "abs_p999": Word("99.9 % of magnitudes", "Of a thousand 999 are smaller; to 12 %.", "ratio", drawn=False),
    },
}

WORDS = {name: replace(one, group=group) for group, words in _BY_GROUP.items() for name, one in words.items()}
