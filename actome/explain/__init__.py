"""Causes and features: which neurons, layers and subspaces a behaviour comes from.

- `direction_neurons`, `neuron_clamps` (`direction_neurons`): the units of MLPs that write a direction
- `outcome_probe`, `OutcomeProbe` (`outcome_probe`): what a state tells of the outcomes that are still possible
"""

from .direction_neurons import DirectionNeurons, NeuronSets, direction_neurons, neuron_clamps
from .outcome_probe import OutcomeProbe, outcome_probe

__all__ = [
    "DirectionNeurons",
    "NeuronSets",
    "OutcomeProbe",
    "direction_neurons",
    "neuron_clamps",
    "outcome_probe",
]
