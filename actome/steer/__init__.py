"""Estimators that fit clamps: from examples to a change of behaviour.

- `Contrast`, `Examples`, `Steering` (`contrast`): a direction between two sets of examples, as a clamp
- `PersonaVector`, `Trait`, `prevent`, `screen`, `shift` (`persona`): a trait in words, to watch, to add, to prevent
- `ActivationTransport`, `Transport` (`transport`), `Quantiles` (`quantiles`): from one distribution of activations to
  another, also of streams
- `ExpertTuner`, `TunedExperts` (`experts`): experts that come with a behaviour, taken out or forced in
- `WeightedController`, `Controlled` (`controller`): a small network sets the strength, by layer
- `SPLIT` (`split`): an update of one linear map, trained for preference and utility together
- `Condition`, `Similar`, `Rule`, `when` (`conditions`): steer only when the prompt says so
- `RankOneDAS`, `RankOneSubspace` (`knob`): a direction that decides between two ways to answer, and sets which
- `bake`, `to_gguf`, `from_gguf` (`baking`, `gguf`): constant clamps shipped without actome; `serving` has a server
- `evaluate`, `Evaluation` (`evaluate`): dose and response, with controls and a recommendation
- `Pairs`, `odds`, `Choices`, `accuracy` (`preference`, `choices`): what it is judged by
- `interference`, `cosines` (`combine`): several clamps at once
- `select_layer`, `LayerChoice` (`layers`): the site of a contrast, by what it does there
- `preference_utility`, `Manifold` (`preference`, `manifold`): what it is made of
- `EntropicSteering`, `EntropicClamp`, `SampledActions`, `action_entropy`, `entropic_curve` (`entropic`): how uncertain
  an agent is about its action, raised or lowered
- `steerability`, `Steerability`, `outcome_vectors` (`steerability`), `Asked`, `Resampled` (`chances`): how far a path
  can be moved at each of its positions
- `SplitDirections`, `DirectionParts` (`split_directions`): what the model does by itself, and what when asked
- `resistance`, `attempts` (`resistance`): whether a model takes back what it was steered to
- `fit_curves`, `equal_preference`, `Curves` (`curves`): how preference and utility go with strength, methods compared
- `direction`, `states` (`directions`, `states`): what estimators are made of
"""

from .baking import Baked, bake
from .chances import Asked, Resampled
from .choices import Choices, accuracy
from .combine import Interference, cosines, interference
from .conditions import Condition, Rule, Similar, when
from .contrast import Contrast, Examples, Steering
from .controller import Controlled, WeightedController
from .curves import Curve, Curves, Decay, equal_preference, fit_curves
from .directions import direction, gap
from .entropic import EntropicClamp, EntropicSteering, SampledActions, action_entropy, entropic_curve
from .evaluate import Evaluation, evaluate
from .experts import ExpertTuner, TunedExperts
from .gguf import from_gguf, to_gguf
from .knob import RankOneDAS, RankOneSubspace
from .layers import LayerChoice, select_layer
from .manifold import Manifold
from .persona import PersonaVector, Trait, prevent, screen, shift
from .preference import Odds, Pairs, odds, preference_utility
from .quantiles import Quantiles
from .resistance import Resistance, attempts, resistance
from .split import SPLIT
from .split_directions import DirectionParts, SplitDirections
from .states import states
from .steerability import Steerability, outcome_vectors, steerability
from .transport import ActivationTransport, Transport

__all__ = [
    "SPLIT",
    "ActivationTransport",
    "Asked",
    "Baked",
    "Choices",
    "Condition",
    "Contrast",
    "Controlled",
    "Curve",
    "Curves",
    "Decay",
    "DirectionParts",
    "EntropicClamp",
    "EntropicSteering",
    "Evaluation",
    "Examples",
    "ExpertTuner",
    "Interference",
    "LayerChoice",
    "Manifold",
    "Odds",
    "Pairs",
    "PersonaVector",
    "Quantiles",
    "RankOneDAS",
    "RankOneSubspace",
    "Resampled",
    "Resistance",
    "Rule",
    "SampledActions",
    "Similar",
    "SplitDirections",
    "Steerability",
    "Steering",
    "Trait",
    "Transport",
    "TunedExperts",
    "WeightedController",
    "accuracy",
    "action_entropy",
    "attempts",
    "bake",
    "cosines",
    "direction",
    "entropic_curve",
    "equal_preference",
    "evaluate",
    "fit_curves",
    "from_gguf",
    "gap",
    "interference",
    "odds",
    "outcome_vectors",
    "preference_utility",
    "prevent",
    "resistance",
    "screen",
    "select_layer",
    "shift",
    "states",
    "steerability",
    "to_gguf",
    "when",
]
