"""Estimators that fit clamps: from examples to a change of behaviour.

- `Contrast`, `Examples`, `Steering` (`contrast`): a direction between two sets of examples, as a clamp
- `ActivationTransport`, `Transport` (`transport`): from one distribution of activations to another
- `ExpertTuner`, `TunedExperts` (`experts`): experts that come with a behaviour, taken out or forced in
- `Condition`, `Similar`, `Rule`, `when` (`conditions`): steer only when the prompt says so
- `bake`, `to_gguf`, `from_gguf` (`baking`, `gguf`): constant clamps shipped without actome; `serving` has a server
- `evaluate`, `Evaluation`, `Pairs` (`evaluate`, `preference`): dose and response, with controls and a recommendation
- `preference_utility`, `odds`, `Manifold` (`preference`, `manifold`): what it is made of
- `direction`, `states` (`directions`, `states`): what estimators are made of
"""

from .baking import Baked, bake
from .conditions import Condition, Rule, Similar, when
from .contrast import Contrast, Examples, Steering
from .directions import direction, gap
from .evaluate import Evaluation, evaluate
from .experts import ExpertTuner, TunedExperts
from .gguf import from_gguf, to_gguf
from .manifold import Manifold
from .preference import Odds, Pairs, odds, preference_utility
from .states import states
from .transport import ActivationTransport, Transport

__all__ = [
    "ActivationTransport",
    "Baked",
    "Condition",
    "Contrast",
    "Evaluation",
    "Examples",
    "ExpertTuner",
    "Manifold",
    "Odds",
    "Pairs",
    "Rule",
    "Similar",
    "Steering",
    "Transport",
    "TunedExperts",
    "bake",
    "direction",
    "evaluate",
    "from_gguf",
    "gap",
    "odds",
    "preference_utility",
    "states",
    "to_gguf",
    "when",
]
