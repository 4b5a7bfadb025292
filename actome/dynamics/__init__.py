"""Change over training and time.

- `RunStore` (`store`): a training run on disk, readable while it is written; `RunWriter` (`writer`) writes it
- `merge`, `recover`: several runs in one store; what can be saved of a damaged one
- `TensorBoardSink`, `WandbSink`, `TrackioSink` (`sinks`): what is logged, forwarded to others
- `fit_law`, and `compare_laws`, `control`, `extrapolate`: laws of a curve, and what would refute them
- `change_point`, `segments`, `turning_points`, `plateaus`, `first_passage`, `lead_time`, `delay`: dates of a curve
- `emergence_score`, `metric_swap`, `required_items`, `trend`, `wilson`, `EvalVariance`: what a curve of scores says
- `EarlyWarning`: whether a jump was announced
- `extrapolate_curve`, `score_extrapolations`, `predictive_stop`: where a curve is going (`LCPFN`, `CurveEnsemble`)
- `RectifiedLaw`, `accept_then_stop`, `rank_models`: fine-tuning loss over data, and which model to fine-tune
- `StrategyPosterior`: whether a model memorises or generalises, over training
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .changepoints import ChangePoint, change_point
from .complexity import description_bits
from .curves import Trend, emergence_score, required_items, trend, wilson
from .dates import Delay, Lead, Passage, delay, first_passage, lead_time
from .early_warning import EarlyWarning, Warnings
from .law_checks import Bootstrap, Control, Extrapolation, LawComparison, compare_laws, control, extrapolate
from .law_families import LAWS, Law
from .laws import LawFit, fit_law
from .learning_curves import CURVE_FAMILIES, CurveFamily, CurvePrior, PriorCurves, curve_prior
from .merge import merge
from .mirage import MetricSwap, metric_swap
from .recover import Recovered, recover
from .rectified import RectifiedLaw
from .segments import Segments, segments
from .selection import Ranking, accept_then_stop, rank_models, selection_scores
from .sinks import Sink, TensorBoardSink, TrackioSink, WandbSink
from .smoothing import smooth
from .store import News, RunStore
from .strategies import Strategy, StrategyPosterior, relative_distance, relative_distances
from .turns import Plateau, Turn, plateaus, turning_points
from .variance import EvalVariance
from .writer import RunWriter

# Names whose modules need torch, imported when they are first used.
_HOMES = {
    "bars": ("BarDistribution",),
    "curve_ensemble": ("CurveEnsemble",),
    "extrapolation": (
        "extrapolate_curve",
        "last_value_of",
        "score_extrapolations",
    ),
    "forecast": (
        "Forecast",
        "GaussianMixture",
    ),
    "lcpfn": (
        "LCPFN",
        "LCPFNError",
        "PFNConfig",
    ),
    "stopping": (
        "Stop",
        "StoppedRuns",
        "predictive_stop",
        "stop_runs",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

if TYPE_CHECKING:
    from .bars import BarDistribution
    from .curve_ensemble import CurveEnsemble
    from .extrapolation import extrapolate_curve, last_value_of, score_extrapolations
    from .forecast import Forecast, GaussianMixture
    from .lcpfn import LCPFN, LCPFNError, PFNConfig
    from .stopping import Stop, StoppedRuns, predictive_stop, stop_runs

__all__ = [
    "CURVE_FAMILIES",
    "LAWS",
    "LCPFN",
    "BarDistribution",
    "Bootstrap",
    "ChangePoint",
    "Control",
    "CurveEnsemble",
    "CurveFamily",
    "CurvePrior",
    "Delay",
    "EarlyWarning",
    "EvalVariance",
    "Extrapolation",
    "Forecast",
    "GaussianMixture",
    "LCPFNError",
    "Law",
    "LawComparison",
    "LawFit",
    "Lead",
    "MetricSwap",
    "News",
    "PFNConfig",
    "Passage",
    "Plateau",
    "PriorCurves",
    "Ranking",
    "Recovered",
    "RectifiedLaw",
    "RunStore",
    "RunWriter",
    "Segments",
    "Sink",
    "Stop",
    "StoppedRuns",
    "Strategy",
    "StrategyPosterior",
    "TensorBoardSink",
    "TrackioSink",
    "Trend",
    "Turn",
    "WandbSink",
    "Warnings",
    "accept_then_stop",
    "change_point",
    "compare_laws",
    "control",
    "curve_prior",
    "delay",
    "description_bits",
    "emergence_score",
    "extrapolate",
    "extrapolate_curve",
    "first_passage",
    "fit_law",
    "last_value_of",
    "lead_time",
    "merge",
    "metric_swap",
    "plateaus",
    "predictive_stop",
    "rank_models",
    "recover",
    "relative_distance",
    "relative_distances",
    "required_items",
    "score_extrapolations",
    "segments",
    "selection_scores",
    "smooth",
    "stop_runs",
    "trend",
    "turning_points",
    "wilson",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'actome.dynamics' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"actome.dynamics.{_HOME_OF[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
