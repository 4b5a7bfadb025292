"""Change over training and time.

- `RunStore` (`store`): a training run on disk, readable while it is written; `RunWriter` (`writer`) writes it
- `merge`, `recover`: several runs in one store; what can be saved of a damaged one
- `TensorBoardSink`, `WandbSink`, `TrackioSink` (`sinks`): what is logged, forwarded to others
- `fit_law`, and `compare_laws`, `control`, `extrapolate`: laws of a curve, and what would refute them
- `change_point`, `segments`, `turning_points`, `plateaus`, `first_passage`, `lead_time`, `delay`: dates of a curve
- `emergence_score`, `metric_swap`, `required_items`, `trend`, `wilson`, `EvalVariance`: what a curve of scores says
- `EarlyWarning`: whether a jump was announced
- `trace`, `Trace` (`trace_table`): the same measurement over many checkpoints; `checkpoints` finds them
- `fit_emergence`, `EmergencePredictor`: how massive activations come up; `geometry_phases`: how geometry does
- `InfinityGram`, `ngram_agreement`: whether a model says what n-grams of its text say
- `Convergence`, `effective_rank`: how early layers reach their final form, and how much of their rank weights use
"""

from .changepoints import ChangePoint, change_point
from .convergence import Converged, Convergence, effective_rank
from .curves import Trend, emergence_score, required_items, trend, wilson
from .dates import Delay, Lead, Passage, delay, first_passage, lead_time
from .early_warning import EarlyWarning, Warnings
from .emergence import Emergence, EmergencePredictor, architecture_of, fit_emergence
from .geometry_phases import Phase, Phases, geometry_phases
from .law_checks import Bootstrap, Control, Extrapolation, LawComparison, compare_laws, control, extrapolate
from .law_families import LAWS, Law
from .laws import LawFit, fit_law
from .merge import merge
from .mirage import MetricSwap, metric_swap
from .ngrams import Agreement, InfinityGram, ngram_agreement
from .recover import Recovered, recover
from .segments import Segments, segments
from .sinks import Sink, TensorBoardSink, TrackioSink, WandbSink
from .smoothing import smooth
from .store import News, RunStore
from .trace import trace
from .trace_dates import Dated, date_curves
from .trace_fits import Fits, fit_curves
from .trace_sources import Checkpoint, Checkpoints, checkpoints
from .trace_table import Curve, Trace
from .turns import Plateau, Turn, plateaus, turning_points
from .variance import EvalVariance
from .writer import RunWriter

__all__ = [
    "LAWS",
    "Agreement",
    "Bootstrap",
    "ChangePoint",
    "Checkpoint",
    "Checkpoints",
    "Control",
    "Converged",
    "Convergence",
    "Curve",
    "Dated",
    "Delay",
    "EarlyWarning",
    "Emergence",
    "EmergencePredictor",
    "EvalVariance",
    "Extrapolation",
    "Fits",
    "InfinityGram",
    "Law",
    "LawComparison",
    "LawFit",
    "Lead",
    "MetricSwap",
    "News",
    "Passage",
    "Phase",
    "Phases",
    "Plateau",
    "Recovered",
    "RunStore",
    "RunWriter",
    "Segments",
    "Sink",
    "TensorBoardSink",
    "Trace",
    "TrackioSink",
    "Trend",
    "Turn",
    "WandbSink",
    "Warnings",
    "architecture_of",
    "change_point",
    "checkpoints",
    "compare_laws",
    "control",
    "date_curves",
    "delay",
    "effective_rank",
    "emergence_score",
    "extrapolate",
    "first_passage",
    "fit_curves",
    "fit_emergence",
    "fit_law",
    "geometry_phases",
    "lead_time",
    "merge",
    "metric_swap",
    "ngram_agreement",
    "plateaus",
    "recover",
    "required_items",
    "segments",
    "smooth",
    "trace",
    "trend",
    "turning_points",
    "wilson",
]
