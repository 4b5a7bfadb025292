"""Rules on what units do at all: numbers that are none, units that are silent always or mostly."""

from __future__ import annotations

from .base import Judge, Measures, Rule, Severity, Values, Verdict, indices
from .thresholds import Thresholds


def _non_finite(name: str) -> Judge:
    def judge(values: Values, measures: Measures, limits: Thresholds) -> Verdict | None:
        share = float(values[name])
        return Verdict("critical", share, {name: share}, {}) if share > 0 else None

    return judge


def _dead_units(values: Values, measures: Measures, limits: Thresholds) -> Verdict | None:
    units = indices(values["peak"] <= measures["peak"].threshold)
    if not units:
        return None
    dead, bound = float(values["dead"]), float(values["dead_bound"])
    severity: Severity = "info"
    if bound <= limits.dead_bound and dead >= limits.dead_share:
        severity = "critical" if dead >= limits.dead_share_critical else "warning"
    return Verdict(severity, dead, {"dead": dead, "dead_bound": bound}, {"units": units})


def _sparse_units(values: Values, measures: Measures, limits: Thresholds) -> Verdict | None:
    zeros, dead = float(values["zeros"]), float(values["dead"])
    # Dead units are zero at every token; what is left is sparsity that changes from token to token.
    alive = (zeros - dead) / (1 - dead) if dead < 1 else 0.0
    if not alive >= limits.zero_share:
        return None
    return Verdict("info", alive, {"zeros": zeros, "dead": dead}, {})


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
        "sparse-units",
        ("zeros", "dead"),
        _sparse_units,
        "Li et al. 2023, The Lazy Neuron Phenomenon; Luo et al. 2024, Sparsing Law",
        "Most units are exactly zero at any one token, though none or few are dead. The columns of the down projection "
        "that they would enter need not be read: a sparse kernel or a predictor of active units can save most of this "
        "layer's work.",
    ),
)
