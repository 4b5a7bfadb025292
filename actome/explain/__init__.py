"""Causes and features: which neurons, layers and subspaces a behaviour comes from.

- `outcome_probe`, `OutcomeProbe` (`outcome_probe`): what a state tells of the outcomes that are still possible
"""

from .outcome_probe import OutcomeProbe, outcome_probe

__all__ = ["OutcomeProbe", "outcome_probe"]
