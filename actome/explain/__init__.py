"""Causes and features: which neurons, layers and subspaces a behaviour comes from.

- `outcome_probe`, `OutcomeProbe` (`outcome_probe`): what a state tells of the outcomes that are still possible
- `layer_range_search`, `LayerRange` (`layer_range`): which layers carry an intent, by patching ranges of them
"""

from .layer_range import LayerRange, layer_range_search
from .outcome_probe import OutcomeProbe, outcome_probe

__all__ = ["LayerRange", "OutcomeProbe", "layer_range_search", "outcome_probe"]
