"""Causes and features: which neurons, layers and subspaces a behaviour comes from.

- `direction_neurons`, `DirectionNeurons` (`direction_neurons`): MLP neurons that write a direction; `neuron_sets`
- `outcome_probe`, `OutcomeProbe` (`outcome_probe`): what a state tells of the outcomes that are still possible
- `layer_range_search`, `LayerRange` (`layer_range`): which layers carry an intent, by patching ranges of them
"""

from .direction_neurons import DirectionNeurons, Neuron, NeuronSets, direction_neurons, neuron_sets, output_rows
from .latents import AblateLatents
from .layer_range import LayerRange, layer_range_search
from .mismatch import MismatchDirections, MismatchLatents, mismatch_directions, mismatch_latents
from .outcome_probe import OutcomeProbe, outcome_probe

__all__ = [
    "AblateLatents",
    "DirectionNeurons",
    "LayerRange",
    "MismatchDirections",
    "MismatchLatents",
    "Neuron",
    "NeuronSets",
    "OutcomeProbe",
    "direction_neurons",
    "layer_range_search",
    "mismatch_directions",
    "mismatch_latents",
    "neuron_sets",
    "outcome_probe",
    "output_rows",
]
