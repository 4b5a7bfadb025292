"""Change over training and time.

- `RunStore` (`store`): a training run on disk, readable while it is written; `RunWriter` (`writer`) writes it
- `merge`, `recover`: several runs in one store; what can be saved of a damaged one
- `TensorBoardSink`, `WandbSink`, `TrackioSink` (`sinks`): what is logged, forwarded to others
- `fit_law`, and `compare_laws`, `control`, `extrapolate`: laws of a curve, and what would refute them
- `change_point`, `segments`, `turning_points`, `plateaus`, `first_passage`, `lead_time`, `delay`: dates of a curve
- `emergence_score`, `metric_swap`, `required_items`, `trend`, `wilson`, `EvalVariance`: what a curve of scores says
- `EarlyWarning`: whether a jump was announced
- `regime`, `lazy_rich_index`, `grokking_delay`: whether features moved, and whether that came late
- `RunVariance`, `butterfly`, `loss_barrier`: why two runs differ, from when on, and whether they can be merged
"""

from .barrier import Barrier, loss_barrier
from .butterfly import butterfly
from .changepoints import ChangePoint, change_point
from .curves import Trend, emergence_score, required_items, trend, wilson
from .dates import Delay, Lead, Passage, delay, first_passage, lead_time
from .early_warning import EarlyWarning, Warnings
from .grokking import Grokking, grokking_delay
from .law_checks import Bootstrap, Control, Extrapolation, LawComparison, compare_laws, control, extrapolate
from .law_families import LAWS, Law
from .laws import LawFit, fit_law
from .merge import merge
from .mirage import MetricSwap, metric_swap
from .recover import Recovered, recover
from .regime import Regime, lazy_rich_index, regime
from .run_variance import Calibrated, RunSplit, RunVariance, vote_shares
from .segments import Segments, segments
from .sinks import Sink, TensorBoardSink, TrackioSink, WandbSink
from .smoothing import smooth
from .store import News, RunStore
from .turns import Plateau, Turn, plateaus, turning_points
from .variance import EvalVariance
from .writer import RunWriter

__all__ = [
    "LAWS",
    "Barrier",
    "Bootstrap",
    "Calibrated",
    "ChangePoint",
    "Control",
    "Delay",
    "EarlyWarning",
    "EvalVariance",
    "Extrapolation",
    "Grokking",
    "Law",
    "LawComparison",
    "LawFit",
    "Lead",
    "MetricSwap",
    "News",
    "Passage",
    "Plateau",
    "Recovered",
    "Regime",
    "RunSplit",
    "RunStore",
    "RunVariance",
    "RunWriter",
    "Segments",
    "Sink",
    "TensorBoardSink",
    "TrackioSink",
    "Trend",
    "Turn",
    "WandbSink",
    "Warnings",
    "butterfly",
    "change_point",
    "compare_laws",
    "control",
    "delay",
    "emergence_score",
    "extrapolate",
    "first_passage",
    "fit_law",
    "grokking_delay",
    "lazy_rich_index",
    "lead_time",
    "loss_barrier",
    "merge",
    "metric_swap",
    "plateaus",
    "recover",
    "regime",
    "required_items",
    "segments",
    "smooth",
    "trend",
    "turning_points",
    "vote_shares",
    "wilson",
]
