"""Alarms: what in a training run a person should know now, with its evidence, where it began and what to do.

- `Alarms` (`alarms`): the detectors of one run, so that each trouble is told once; replays runs that were logged
- `Alarm`, `Reading`, `Detector` (`base`): what is raised, what is looked at, and who looks
- `Stop`, `LowerLR`, `SaveCheckpoint` (`actions`): what may be done about an alarm
- `NonFinite`, `LossDivergence`, `LossSpike`, `SpikePrecursor`, `CriticalSlowing`: what shows in losses and norms
- `AttentionLogitGrowth`, `OutputLogitDivergence`, `ActivationGrowth`, `DyingUnits`, `RankCollapse`, `CollapsePlateau`,
  `MemorisationOnset`: what shows inside
"""

from .actions import Acted, Action, LowerLR, SaveCheckpoint, Stop, Watching, scale_of
from .alarms import Alarms
from .base import Alarm, Detector, Level, Reading
from .collapse import CollapsePlateau, RankCollapse
from .default import default_detectors
from .diverging import LossDivergence
from .dying import DyingUnits
from .growth import ActivationGrowth, AttentionLogitGrowth, Growth, OutputLogitDivergence
from .memorising import MemorisationOnset
from .non_finite import NonFinite
from .slowing import CriticalSlowing
from .spikes import LossSpike, SpikePrecursor

__all__ = [
    "Acted",
    "Action",
    "ActivationGrowth",
    "Alarm",
    "Alarms",
    "AttentionLogitGrowth",
    "CollapsePlateau",
    "CriticalSlowing",
    "Detector",
    "DyingUnits",
    "Growth",
    "Level",
    "LossDivergence",
    "LossSpike",
    "LowerLR",
    "MemorisationOnset",
    "NonFinite",
    "OutputLogitDivergence",
    "RankCollapse",
    "Reading",
    "SaveCheckpoint",
    "SpikePrecursor",
    "Stop",
    "Watching",
    "default_detectors",
    "scale_of",
]
