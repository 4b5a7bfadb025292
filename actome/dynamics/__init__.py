"""Change over training and time.

- `RunStore` (`store`): a training run on disk, readable while it is written; `RunWriter` (`writer`) writes it
- `RunDigest` (`digest`): a run as bins of steps, read only once, for live views
- `merge`, `recover`: several runs in one store; what can be saved of a damaged one
- `TensorBoardSink`, `WandbSink`, `TrackioSink` (`sinks`): what is logged, forwarded to others
- `fit_law`, and `compare_laws`, `control`, `extrapolate`: laws of a curve, and what would refute them
- `change_point`, `segments`, `turning_points`, `plateaus`, `first_passage`, `lead_time`, `delay`: dates of a curve
- `emergence_score`, `metric_swap`, `required_items`, `trend`, `wilson`, `EvalVariance`: what a curve of scores says
- `recipe_grid`, `QuantisationProbe`, `weight_outliers`: what training recipes do to a model, and to its quantisation
- `EarlyWarning`, `ou_lr_test`: whether a jump was announced
- `forecast_crossing`: when a growing quantity crosses a critical value
- `lr_sensitivity`: how much a recipe depends on its learning rate
- `alarms`: what in a run a person should know now, and what is done about it
- `watch`, `Watch` (`watching`): a training watched from one line in its loop; `WatchCallback` and `LightningWatch` for
  trainers
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .changepoints import ChangePoint, change_point
from .crossing import Crossing, forecast_crossing
from .curves import Trend, emergence_score, required_items, trend, wilson
from .dates import Delay, Lead, Passage, delay, first_passage, lead_time
from .digest import RunDigest
from .early_warning import EarlyWarning, Warnings
from .law_checks import Bootstrap, Control, Extrapolation, LawComparison, compare_laws, control, extrapolate
from .law_families import LAWS, Law
from .laws import LawFit, fit_law
from .lr_sensitivity import LRSensitivity, lr_sensitivity
from .merge import merge
from .mirage import MetricSwap, metric_swap
from .ou_test import OUTest, ou_deviance, ou_lr_test
from .quantisation import QuantisationProbe, weight_outliers
from .recipes import Recipes, recipe_grid
from .recover import Recovered, recover
from .segments import Segments, segments
from .sinks import Sink, TensorBoardSink, TrackioSink, WandbSink
from .smoothing import smooth
from .store import News, RunStore
from .turns import Plateau, Turn, plateaus, turning_points
from .variance import EvalVariance
from .watching import Watch, first_non_finite, watch
from .writer import RunWriter

__all__ = [
    "LAWS",
    "Bootstrap",
    "ChangePoint",
    "Control",
    "Crossing",
    "Delay",
    "EarlyWarning",
    "EvalVariance",
    "Extrapolation",
    "LRSensitivity",
    "Law",
    "LawComparison",
    "LawFit",
    "Lead",
    "LightningWatch",
    "MetricSwap",
    "News",
    "OUTest",
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
    "Watch",
    "WatchCallback",
    "change_point",
    "compare_laws",
    "control",
    "delay",
    "emergence_score",
    "extrapolate",
    "first_non_finite",
    "first_passage",
    "fit_law",
    "forecast_crossing",
    "lead_time",
    "lr_sensitivity",
    "merge",
    "metric_swap",
    "ou_deviance",
    "ou_lr_test",
    "plateaus",
    "recipe_grid",
    "recover",
    "required_items",
    "segments",
    "smooth",
    "trend",
    "turning_points",
    "watch",
    "weight_outliers",
    "wilson",
]

# They inherit from classes of heavy libraries, which are imported once one of them is asked for.
_CALLBACKS = {"WatchCallback": "callbacks_transformers", "LightningWatch": "callbacks_lightning"}

if TYPE_CHECKING:
    from .callbacks_lightning import LightningWatch
    from .callbacks_transformers import WatchCallback


def __getattr__(name: str) -> Any:
    if name not in _CALLBACKS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_CALLBACKS[name]}"), name)
