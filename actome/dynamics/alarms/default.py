"""The detectors that a run is watched with unless others are given."""

from __future__ import annotations

from collections.abc import Sequence

from .base import Detector
from .collapse import CollapsePlateau, RankCollapse
from .diverging import LossDivergence
from .dying import DyingUnits
from .growth import AttentionLogitGrowth, OutputLogitDivergence
from .memorising import MemorisationOnset
from .non_finite import NonFinite
from .slowing import CriticalSlowing
from .spikes import LossSpike, SpikePrecursor


def default_detectors(order: Sequence[str] = ()) -> list[Detector]:
    """One detector of each kind, for one run.

    At most 5 % of clean trainings are to raise any warning or critical alarm with them. `CriticalSlowing` may spend one
    percent, by its construction; the others raise alarms by thresholds that clean trainings stay away from, which is
    measured and not derived (docs/alarms.md).

    Args:
        order: the names of all sites in forward order, ``[site.name for site in model.sites("*")]``, which tells where
            values that are not finite began in models whose sites are module paths.

    >>> [detector.name for detector in default_detectors()][:3]
    ['non_finite', 'loss_divergence', 'loss_spike']
    """
    return [
        NonFinite(order), LossDivergence(), LossSpike(), SpikePrecursor(), CriticalSlowing(), AttentionLogitGrowth(),
        OutputLogitDivergence(), DyingUnits(), RankCollapse(), CollapsePlateau(), MemorisationOnset(),
    ]  # fmt: skip
