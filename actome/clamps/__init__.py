"""What can be done to a tensor on its way through a model, and `clamp_during` a training."""

from .ablate import Ablate
from .attend import AttendTo
from .bound import Clip, TopK
from .during import ClampSchedule, clamp_during
from .edit import Add, Mask, Scale, Set
from .heads import pattern_preserving_ablation
from .patch import Patch
from .quantise import Quantise, round_to
from .saved import load_clamps, save_clamps
from .subspace import Project, SetCoordinate
from .update import WeightUpdate

__all__ = [
    "Ablate",
    "Add",
    "AttendTo",
    "ClampSchedule",
    "Clip",
    "Mask",
    "Patch",
    "Project",
    "Quantise",
    "Scale",
    "Set",
    "SetCoordinate",
    "TopK",
    "WeightUpdate",
    "clamp_during",
    "load_clamps",
    "pattern_preserving_ablation",
    "round_to",
    "save_clamps",
]
