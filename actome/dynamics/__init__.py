"""Change over training and time.

- `RunStore` (`store`): a training run on disk, readable while it is written; `RunWriter` (`writer`) writes it
- `merge`, `recover`: several runs in one store; what can be saved of a damaged one
- `TensorBoardSink`, `WandbSink`, `TrackioSink` (`sinks`): what is logged, forwarded to others
- `fit_law`, and `compare_laws`, `control`, `extrapolate`: laws of a curve, and what would refute them
- `change_point`, `segments`, `turning_points`, `plateaus`, `first_passage`, `lead_time`, `delay`: dates of a curve
- `emergence_score`, `metric_swap`, `required_items`, `trend`, `wilson`, `EvalVariance`: what a curve of scores says
- `EarlyWarning`: whether a jump was announced
- `phase_change`, `steps_to`: how abrupt a change is; which arm of an experiment gets there first
- `icl_iwl`, `InductionHeadODE`, `RankOneTensor`: learning in context or in weights; small models of abrupt learning
"""

from .arms import StepsRatio, StepsTo, steps_to
from .changepoints import ChangePoint, change_point
from .curves import Trend, emergence_score, required_items, trend, wilson
from .dates import Delay, Lead, Passage, delay, first_passage, lead_time
from .early_warning import EarlyWarning, Warnings
from .icl_iwl import ContextOrWeights, icl_iwl
from .induction_ode import InductionHeadODE
from .law_checks import Bootstrap, Control, Extrapolation, LawComparison, compare_laws, control, extrapolate
from .law_families import LAWS, Law
from .laws import LawFit, fit_law
from .merge import merge
from .mirage import MetricSwap, metric_swap
from .phase_change import PhaseChange, phase_change
from .rank_one import RankOneTensor
from .recover import Recovered, recover
from .segments import Segments, segments
from .sinks import Sink, TensorBoardSink, TrackioSink, WandbSink
from .smoothing import smooth
from .store import News, RunStore
from .turns import Plateau, Turn, plateaus, turning_points
from .variance import EvalVariance
from .writer import RunWriter

__all__ = [
    "LAWS",
    "Bootstrap",
    "ChangePoint",
    "ContextOrWeights",
    "Control",
    "Delay",
    "EarlyWarning",
    "EvalVariance",
    "Extrapolation",
    "InductionHeadODE",
    "Law",
    "LawComparison",
    "LawFit",
    "Lead",
    "MetricSwap",
    "News",
    "Passage",
    "PhaseChange",
    "Plateau",
    "RankOneTensor",
    "Recovered",
    "RunStore",
    "RunWriter",
    "Segments",
    "Sink",
    "StepsRatio",
    "StepsTo",
    "TensorBoardSink",
    "TrackioSink",
    "Trend",
    "Turn",
    "WandbSink",
    "Warnings",
    "change_point",
    "compare_laws",
    "control",
    "delay",
    "emergence_score",
    "extrapolate",
    "first_passage",
    "fit_law",
    "icl_iwl",
    "lead_time",
    "merge",
    "metric_swap",
    "phase_change",
    "plateaus",
    "recover",
    "required_items",
    "segments",
    "smooth",
    "steps_to",
    "trend",
    "turning_points",
    "wilson",
]
