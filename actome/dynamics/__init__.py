"""Change over training and time.

- `RunStore` (`store`): a training run on disk, readable while it is written; `RunWriter` (`writer`) writes it
- `merge`, `recover`: several runs in one store; what can be saved of a damaged one
- `TensorBoardSink`, `WandbSink`, `TrackioSink` (`sinks`): what is logged, forwarded to others
- `fit_law`, and `compare_laws`, `control`, `extrapolate`: laws of a curve, and what would refute them
- `change_point`, `segments`, `turning_points`, `plateaus`, `first_passage`, `lead_time`, `delay`: dates of a curve
- `emergence_score`, `metric_swap`, `required_items`, `trend`, `wilson`, `EvalVariance`: what a curve of scores says
- `EarlyWarning`: whether a jump was announced
- `ConceptSpace`, `concept_signal`; `elicit`, `overprompt`, `latent_direction`: concepts learned, hidden capabilities
- `priming`, `stepping_stone`, `priming_threshold`: how far a new fact leaks
- `ExtremeTokens`, `sink_emergence`, `ablation_by_query`: heads that come to idle
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .changepoints import ChangePoint, change_point
from .curves import Trend, emergence_score, required_items, trend, wilson
from .dates import Delay, Lead, Passage, delay, first_passage, lead_time
from .early_warning import EarlyWarning, Warnings
from .law_checks import Bootstrap, Control, Extrapolation, LawComparison, compare_laws, control, extrapolate
from .law_families import LAWS, Law
from .laws import LawFit, fit_law
from .merge import merge
from .mirage import MetricSwap, metric_swap
from .path_turns import PathTurn, path_turn
from .recover import Recovered, recover
from .segments import Segments, segments
from .sink_dates import SinkEmergence, sink_emergence
from .sinks import Sink, TensorBoardSink, TrackioSink, WandbSink
from .smoothing import smooth
from .store import News, RunStore
from .turns import Plateau, Turn, plateaus, turning_points
from .variance import EvalVariance
from .writer import RunWriter

# Names whose modules need torch, imported when they are first used.
_HOMES = {
    "concept_space": ("ConceptSpace", "ConceptTrace", "concept_signal"),
    "dormant_heads": ("ExtremeTokens", "ablation_by_query"),
    "elicitation": ("Elicitation", "LatentPush", "OverPrompt", "elicit", "latent_direction", "overprompt"),
    "priming_scores": ("Fact", "keyword_log_probs", "priming", "priming_threshold", "stepping_stone"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

if TYPE_CHECKING:
    from .concept_space import ConceptSpace, ConceptTrace, concept_signal
    from .dormant_heads import ExtremeTokens, ablation_by_query
    from .elicitation import Elicitation, LatentPush, OverPrompt, elicit, latent_direction, overprompt
    from .priming_scores import Fact, keyword_log_probs, priming, priming_threshold, stepping_stone

__all__ = [
    "LAWS",
    "Bootstrap",
    "ChangePoint",
    "ConceptSpace",
    "ConceptTrace",
    "Control",
    "Delay",
    "EarlyWarning",
    "Elicitation",
    "EvalVariance",
    "Extrapolation",
    "ExtremeTokens",
    "Fact",
    "LatentPush",
    "Law",
    "LawComparison",
    "LawFit",
    "Lead",
    "MetricSwap",
    "News",
    "OverPrompt",
    "Passage",
    "PathTurn",
    "Plateau",
    "Recovered",
    "RunStore",
    "RunWriter",
    "Segments",
    "Sink",
    "SinkEmergence",
    "TensorBoardSink",
    "TrackioSink",
    "Trend",
    "Turn",
    "WandbSink",
    "Warnings",
    "ablation_by_query",
    "change_point",
    "compare_laws",
    "concept_signal",
    "control",
    "delay",
    "elicit",
    "emergence_score",
    "extrapolate",
    "first_passage",
    "fit_law",
    "keyword_log_probs",
    "latent_direction",
    "lead_time",
    "merge",
    "metric_swap",
    "overprompt",
    "path_turn",
    "plateaus",
    "priming",
    "priming_threshold",
    "recover",
    "required_items",
    "segments",
    "sink_emergence",
    "smooth",
    "stepping_stone",
    "trend",
    "turning_points",
    "wilson",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
