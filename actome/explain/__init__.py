"""Causes and features: which neurons, layers and subspaces a behaviour comes from.

- `outcome_probe`, `OutcomeProbe` (`outcome_probe`): what a state tells of the outcomes that are still possible
- `mismatch_latents`, `mismatch_directions` (`mismatch`): what tells that an answer does not belong to its question
- `AblateLatents` (`latents`): latents of a dictionary taken out of a state
"""

from .latents import AblateLatents
from .mismatch import MismatchDirections, MismatchLatents, mismatch_directions, mismatch_latents
from .outcome_probe import OutcomeProbe, outcome_probe

__all__ = [
    "AblateLatents",
    "MismatchDirections",
    "MismatchLatents",
    "OutcomeProbe",
    "mismatch_directions",
    "mismatch_latents",
    "outcome_probe",
]
