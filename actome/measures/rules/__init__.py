"""When what was measured is worth a person's attention: one rule for each kind of finding, and its thresholds."""

from . import activity, attention, experts, extremes, geometry, prediction
from .base import Rule, Severity, Verdict
from .thresholds import Thresholds

__all__ = ["IDS", "RULES", "Rule", "Severity", "Thresholds", "Verdict"]

RULES: tuple[Rule, ...] = tuple(
    rule for part in (activity, extremes, attention, geometry, experts, prediction) for rule in part.RULES
)

IDS = tuple(dict.fromkeys(rule.id for rule in RULES))
