"""What can be said of a stream of activations."""

from .attention import AttentionEntropy, SinkScore
from .depth import Movement
from .extremes import MassiveActivations, OutlierChannels
from .findings import Finding, Thresholds, find
from .loss import NextTokenLoss
from .panels import PANELS, Panel
from .scale import ActivationScale
from .sparsity import DeadUnits, Sparsity
from .spectrum import EffectiveRank
from .voids import Voids

__all__ = [
    "PANELS",
    "ActivationScale",
    "AttentionEntropy",
    "DeadUnits",
    "EffectiveRank",
    "Finding",
    "MassiveActivations",
    "Movement",
    "NextTokenLoss",
    "OutlierChannels",
    "Panel",
    "SinkScore",
    "Sparsity",
    "Thresholds",
    "Voids",
    "find",
]
