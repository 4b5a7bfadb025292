"""Change over training and time.

- `RunStore` (`store`): a training run on disk, readable while it is written; `RunWriter` (`writer`) writes it
- `RunDigest` (`digest`): a run as bins of steps, read only once, for live views
- `merge`, `recover`: several runs in one store; what can be saved of a damaged one
- `TensorBoardSink`, `WandbSink`, `TrackioSink` (`sinks`): what is logged, forwarded to others
- `fit_law`, and `compare_laws`, `control`, `extrapolate`: laws of a curve, and what would refute them
- `change_point`, `segments`, `turning_points`, `plateaus`, `first_passage`, `lead_time`, `delay`: dates of a curve
- `emergence_score`, `metric_swap`, `required_items`, `trend`, `wilson`, `EvalVariance`: what a curve of scores says
- `recipe_grid`, `QuantisationProbe`, `weight_outliers`: what training recipes do to a model, and to its quantisation
- `EarlyWarning`: whether a jump was announced
"""

from .changepoints import ChangePoint, change_point
from .curves import Trend, emergence_score, required_items, trend, wilson
from .dates import Delay, Lead, Passage, delay, first_passage, lead_time
from .digest import RunDigest
from .early_warning import EarlyWarning, Warnings
from .law_checks import Bootstrap, Control, Extrapolation, LawComparison, compare_laws, control, extrapolate
from .law_families import LAWS, Law
from .laws import LawFit, fit_law
from .merge import merge
from .mirage import MetricSwap, metric_swap
from .recipes import QuantisationProbe, Recipes, recipe_grid, weight_outliers
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
    "Control",
    "Delay",
    "EarlyWarning",
    "EvalVariance",
    "Extrapolation",
    "Law",
    "LawComparison",
    "LawFit",
    "Lead",
    "MetricSwap",
    "News",
    "Passage",
    "Plateau",
    "QuantisationProbe",
    "Recipes",
    "Recovered",
    "RunDigest",
    "RunStore",
    "RunWriter",
    "Segments",
    "Sink",
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
    "lead_time",
    "merge",
    "metric_swap",
    "plateaus",
    "recipe_grid",
    "recover",
    "required_items",
    "segments",
    "smooth",
    "trend",
    "turning_points",
    "weight_outliers",
    "wilson",
]
