"""What can be done to a tensor on its way through a model."""

from .ablate import Ablate
from .bound import Clip, TopK
from .edit import Add, Mask, Scale, Set
from .patch import Patch
from .quantise import Quantise, round_to
from .saved import load_clamps, save_clamps
from .subspace import Project

__all__ = [
    "Ablate",
    "Add",
    "Clip",
    "Mask",
    "Patch",
    "Project",
    "Quantise",
    "Scale",
    "Set",
    "TopK",
    "load_clamps",
    "round_to",
    "save_clamps",
]
