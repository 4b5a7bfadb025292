"""Change over training and time.

- `watch`, `Watch` (`watching`): a training watched from one line in its loop; `WatchCallback` and `LightningWatch` for
  trainers; `alarms`: what in a run a person should know now, and what is done about it
- `RunStore` (`store`): a training run on disk, readable while it is written; `RunWriter` (`writer`) writes it;
  `RunDigest` (`digest`): a run as bins of steps, read only once, for live views
- `merge`, `recover`: several runs in one store; what can be saved of a damaged one
- `TensorBoardSink`, `WandbSink`, `TrackioSink` (`sinks`): what is logged, forwarded to others
- `trace`, `Trace` (`tracing`, `trace_table`): the same measurement over many checkpoints; `checkpoints` finds them
- `fit_law`, and `compare_laws`, `control`, `extrapolate`: laws of a curve, and what would refute them
- `change_point`, `segments`, `turning_points`, `plateaus`, `first_passage`, `lead_time`, `delay`: dates of a curve
- `phase_change`, `steps_to`: how abrupt a change is; which arm of an experiment gets there first
- `emergence_score`, `metric_swap`, `required_items`, `trend`, `wilson`, `EvalVariance`: what a curve of scores says
- `EarlyWarning`, `ou_lr_test`: whether a jump was announced; `forecast_crossing`: when a limit will be passed
- `extrapolate_curve`, `score_extrapolations`, `predictive_stop`: where a curve is going (`LCPFN`, `CurveEnsemble`)
- `RectifiedLaw`, `accept_then_stop`, `rank_models`: fine-tuning loss over data, and which model to fine-tune
- `fit_emergence`, `EmergencePredictor`: how massive activations come up; `geometry_phases`: how geometry does
- `InfinityGram`, `ngram_agreement`: whether a model says what n-grams of its text say
- `Convergence`, `effective_rank`: how early layers reach their final form, and how much of their rank weights use
- `icl_iwl`, `InductionHeadODE`, `RankOneTensor`: learning in context or in weights; small models of abrupt learning
- `StrategyPosterior`: whether a model memorises or generalises, over training
- `regime`, `lazy_rich_index`, `grokking_delay`: whether features moved, and whether that came late
- `RunVariance`, `butterfly`, `loss_barrier`: why two runs differ, from when on, and whether they can be merged
- `ConceptSpace`, `concept_signal`; `elicit`, `overprompt`, `latent_direction`: concepts learned, hidden capabilities
- `priming`, `stepping_stone`, `priming_threshold`: how far a new fact leaks
- `ExtremeTokens`, `sink_emergence`, `ablation_by_query`: heads that come to idle
- `lr_sensitivity`, `recipe_grid`, `QuantisationProbe`: what recipes do to a training, and to a model's quantisation

Most names are imported when they are first used, so that a view of a run starts without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Called like their modules, so that they have to be here before anybody imports those.
from .geometry_phases import Phase, Phases, geometry_phases
from .lr_sensitivity import LRSensitivity, lr_sensitivity
from .merge import merge
from .phase_change import PhaseChange, phase_change
from .recover import Recovered, recover
from .segments import Segments, segments

if TYPE_CHECKING:
    from .arms import StepsRatio, StepsTo, steps_to
    from .barrier import Barrier, loss_barrier
    from .bars import BarDistribution
    from .butterfly_effect import butterfly
    from .callbacks_lightning import LightningWatch
    from .callbacks_transformers import WatchCallback
    from .changepoints import ChangePoint, change_point
    from .complexity import description_bits
    from .concept_space import ConceptSpace, ConceptTrace, concept_signal
    from .context_or_weights import ContextOrWeights, icl_iwl
    from .convergence import Converged, Convergence, effective_rank
    from .crossing import Crossing, forecast_crossing
    from .curve_ensemble import CurveEnsemble
    from .curves import Trend, emergence_score, required_items, trend, wilson
    from .dates import Delay, Lead, Passage, delay, first_passage, lead_time
    from .digest import RunDigest
    from .dormant_heads import ExtremeTokens, ablation_by_query
    from .early_warning import EarlyWarning, Warnings
    from .elicitation import Elicitation, LatentPush, OverPrompt, elicit, latent_direction, overprompt
    from .emergence import Emergence, EmergencePredictor, architecture_of, fit_emergence
    from .extrapolation import extrapolate_curve, last_value_of, score_extrapolations
    from .forecast import Forecast, GaussianMixture
    from .grokking import Grokking, grokking_delay
    from .induction_ode import InductionHeadODE
    from .law_checks import Bootstrap, Control, Extrapolation, LawComparison, compare_laws, control, extrapolate
    from .law_families import LAWS, Law
    from .laws import LawFit, fit_law
    from .lcpfn import LCPFN, LCPFNError, PFNConfig
    from .learning_curves import CURVE_FAMILIES, CurveFamily, CurvePrior, PriorCurves, curve_prior
    from .mirage import MetricSwap, metric_swap
    from .ngrams import Agreement, InfinityGram, ngram_agreement
    from .ou_test import OUTest, ou_deviance, ou_lr_test
    from .path_turns import PathTurn, path_turn
    from .priming_scores import Fact, keyword_log_probs, priming, priming_threshold, stepping_stone
    from .quantisation import QuantisationProbe, weight_outliers
    from .rank_one import RankOneTensor
    from .recipes import Recipes, recipe_grid
    from .rectified import RectifiedLaw
    from .regimes import Regime, lazy_rich_index, regime
    from .run_variance import Calibrated, RunSplit, RunVariance, vote_shares
    from .selection import Ranking, accept_then_stop, rank_models, selection_scores
    from .sink_dates import SinkEmergence, sink_emergence
    from .sinks import Sink, TensorBoardSink, TrackioSink, WandbSink
    from .smoothing import smooth
    from .stopping import PredictedStop, StoppedRuns, predictive_stop, stop_runs
    from .store import News, RunStore
    from .strategies import Strategy, StrategyPosterior, relative_distance, relative_distances
    from .trace_dates import Dated, date_curves
    from .trace_fits import Fits, fit_curves
    from .trace_sources import Checkpoint, Checkpoints, checkpoints
    from .trace_table import Curve, Trace
    from .tracing import trace
    from .turns import Plateau, Turn, plateaus, turning_points
    from .variance import EvalVariance
    from .watching import Watch, first_non_finite, watch
    from .writer import RunWriter

# Where each name lives that is imported when it is first used; the imports above say the same to type checkers.
_HOMES = {
    "arms": (
        "StepsRatio",
        "StepsTo",
        "steps_to",
    ),
    "barrier": (
        "Barrier",
        "loss_barrier",
    ),
    "bars": ("BarDistribution",),
    "butterfly_effect": ("butterfly",),
    "callbacks_lightning": ("LightningWatch",),
    "callbacks_transformers": ("WatchCallback",),
    "changepoints": (
        "ChangePoint",
        "change_point",
    ),
    "complexity": ("description_bits",),
    "concept_space": (
        "ConceptSpace",
        "ConceptTrace",
        "concept_signal",
    ),
    "context_or_weights": (
        "ContextOrWeights",
        "icl_iwl",
    ),
    "convergence": (
        "Converged",
        "Convergence",
        "effective_rank",
    ),
    "crossing": (
        "Crossing",
        "forecast_crossing",
    ),
    "curve_ensemble": ("CurveEnsemble",),
    "curves": (
        "Trend",
        "emergence_score",
        "required_items",
        "trend",
        "wilson",
    ),
    "dates": (
        "Delay",
        "Lead",
        "Passage",
        "delay",
        "first_passage",
        "lead_time",
    ),
    "digest": ("RunDigest",),
    "dormant_heads": (
        "ExtremeTokens",
        "ablation_by_query",
    ),
    "early_warning": (
        "EarlyWarning",
        "Warnings",
    ),
    "elicitation": (
        "Elicitation",
        "LatentPush",
        "OverPrompt",
        "elicit",
        "latent_direction",
        "overprompt",
    ),
    "emergence": (
        "Emergence",
        "EmergencePredictor",
        "architecture_of",
        "fit_emergence",
    ),
    "extrapolation": (
        "extrapolate_curve",
        "last_value_of",
        "score_extrapolations",
    ),
    "forecast": (
        "Forecast",
        "GaussianMixture",
    ),
    "grokking": (
        "Grokking",
        "grokking_delay",
    ),
    "induction_ode": ("InductionHeadODE",),
    "law_checks": (
        "Bootstrap",
        "Control",
        "Extrapolation",
        "LawComparison",
        "compare_laws",
        "control",
        "extrapolate",
    ),
    "law_families": (
        "LAWS",
        "Law",
    ),
    "laws": (
        "LawFit",
        "fit_law",
    ),
    "lcpfn": (
        "LCPFN",
        "LCPFNError",
        "PFNConfig",
    ),
    "learning_curves": (
        "CURVE_FAMILIES",
        "CurveFamily",
        "CurvePrior",
        "PriorCurves",
        "curve_prior",
    ),
    "mirage": (
        "MetricSwap",
        "metric_swap",
    ),
    "ngrams": (
        "Agreement",
        "InfinityGram",
        "ngram_agreement",
    ),
    "ou_test": (
        "OUTest",
        "ou_deviance",
        "ou_lr_test",
    ),
    "path_turns": (
        "PathTurn",
        "path_turn",
    ),
    "priming_scores": (
        "Fact",
        "keyword_log_probs",
        "priming",
        "priming_threshold",
        "stepping_stone",
    ),
    "rank_one": ("RankOneTensor",),
    "quantisation": ("QuantisationProbe", "weight_outliers"),
    "recipes": ("Recipes", "recipe_grid"),
    "rectified": ("RectifiedLaw",),
    "regimes": (
        "Regime",
        "lazy_rich_index",
        "regime",
    ),
    "run_variance": (
        "Calibrated",
        "RunSplit",
        "RunVariance",
        "vote_shares",
    ),
    "selection": (
        "Ranking",
        "accept_then_stop",
        "rank_models",
        "selection_scores",
    ),
    "sink_dates": (
        "SinkEmergence",
        "sink_emergence",
    ),
    "sinks": (
        "Sink",
        "TensorBoardSink",
        "TrackioSink",
        "WandbSink",
    ),
    "smoothing": ("smooth",),
    "stopping": (
        "PredictedStop",
        "StoppedRuns",
        "predictive_stop",
        "stop_runs",
    ),
    "store": (
        "News",
        "RunStore",
    ),
    "strategies": (
        "Strategy",
        "StrategyPosterior",
        "relative_distance",
        "relative_distances",
    ),
    "trace_dates": (
        "Dated",
        "date_curves",
    ),
    "trace_fits": (
        "Fits",
        "fit_curves",
    ),
    "trace_sources": (
        "Checkpoint",
        "Checkpoints",
        "checkpoints",
    ),
    "trace_table": (
        "Curve",
        "Trace",
    ),
    "tracing": ("trace",),
    "turns": (
        "Plateau",
        "Turn",
        "plateaus",
        "turning_points",
    ),
    "variance": ("EvalVariance",),
    "watching": (
        "Watch",
        "first_non_finite",
        "watch",
    ),
    "writer": ("RunWriter",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "CURVE_FAMILIES",
    "LAWS",
    "LCPFN",
    "Agreement",
    "BarDistribution",
    "Barrier",
    "Bootstrap",
    "Calibrated",
    "ChangePoint",
    "Checkpoint",
    "Checkpoints",
    "ConceptSpace",
    "ConceptTrace",
    "ContextOrWeights",
    "Control",
    "Converged",
    "Convergence",
    "Crossing",
    "Curve",
    "CurveEnsemble",
    "CurveFamily",
    "CurvePrior",
    "Dated",
    "Delay",
    "EarlyWarning",
    "Elicitation",
    "Emergence",
    "EmergencePredictor",
    "EvalVariance",
    "Extrapolation",
    "ExtremeTokens",
    "Fact",
    "Fits",
    "Forecast",
    "GaussianMixture",
    "Grokking",
    "InductionHeadODE",
    "InfinityGram",
    "LCPFNError",
    "LRSensitivity",
    "LatentPush",
    "Law",
    "LawComparison",
    "LawFit",
    "Lead",
    "LightningWatch",
    "MetricSwap",
    "News",
    "OUTest",
    "OverPrompt",
    "PFNConfig",
    "Passage",
    "PathTurn",
    "Phase",
    "PhaseChange",
    "Phases",
    "Plateau",
    "PredictedStop",
    "PriorCurves",
    "QuantisationProbe",
    "RankOneTensor",
    "Ranking",
    "Recipes",
    "Recovered",
    "RectifiedLaw",
    "Regime",
    "RunDigest",
    "RunSplit",
    "RunStore",
    "RunVariance",
    "RunWriter",
    "Segments",
    "Sink",
    "SinkEmergence",
    "StepsRatio",
    "StepsTo",
    "StoppedRuns",
    "Strategy",
    "StrategyPosterior",
    "TensorBoardSink",
    "Trace",
    "TrackioSink",
    "Trend",
    "Turn",
    "WandbSink",
    "Warnings",
    "Watch",
    "WatchCallback",
    "ablation_by_query",
    "accept_then_stop",
    "alarms",
    "architecture_of",
    "butterfly",
    "change_point",
    "checkpoints",
    "compare_laws",
    "concept_signal",
    "control",
    "curve_prior",
    "date_curves",
    "delay",
    "description_bits",
    "effective_rank",
    "elicit",
    "emergence_score",
    "extrapolate",
    "extrapolate_curve",
    "first_non_finite",
    "first_passage",
    "fit_curves",
    "fit_emergence",
    "fit_law",
    "forecast_crossing",
    "geometry_phases",
    "grokking_delay",
    "icl_iwl",
    "keyword_log_probs",
    "last_value_of",
    "latent_direction",
    "lazy_rich_index",
    "lead_time",
    "loss_barrier",
    "lr_sensitivity",
    "merge",
    "metric_swap",
    "ngram_agreement",
    "ou_deviance",
    "ou_lr_test",
    "overprompt",
    "path_turn",
    "phase_change",
    "plateaus",
    "predictive_stop",
    "priming",
    "priming_threshold",
    "rank_models",
    "recipe_grid",
    "recover",
    "regime",
    "relative_distance",
    "relative_distances",
    "required_items",
    "score_extrapolations",
    "segments",
    "selection_scores",
    "sink_emergence",
    "smooth",
    "stepping_stone",
    "steps_to",
    "stop_runs",
    "trace",
    "trend",
    "turning_points",
    "vote_shares",
    "watch",
    "weight_outliers",
    "wilson",
]


def __getattr__(name: str) -> Any:
    if name == "alarms":
        value: Any = importlib.import_module(f"{__name__}.alarms")
    elif name in _HOME_OF:
        value = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value  # found without this function from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
