"""Estimators that fit clamps: from examples to a change of behaviour.

- `Contrast`, `Examples`, `Steering` (`contrast`): a direction between two sets of examples, as a clamp
- `PersonaVector`, `Trait`, `prevent`, `screen`, `shift` (`persona`): a trait in words, to watch, to add, to prevent
- `ActivationTransport`, `Transport` (`transport`): from one distribution of activations to another
- `ExpertTuner`, `TunedExperts` (`experts`): experts that come with a behaviour, taken out or forced in
- `WeightedController`, `Controlled` (`controller`): a small network sets the strength, by layer
- `Condition`, `Similar`, `Rule`, `when` (`conditions`): steer only when the prompt says so
- `bake`, `to_gguf`, `from_gguf` (`baking`, `gguf`): constant clamps shipped without actome; `serving` has a server
- `evaluate`, `Evaluation` (`evaluate`): dose and response, with controls and a recommendation
- `Pairs`, `odds`, `Choices`, `accuracy` (`preference`, `choices`): what it is judged by
- `interference` (`combine`): several clamps at once
- `preference_utility`, `Manifold` (`preference`, `manifold`): what it is made of
- `direction`, `states` (`directions`, `states`): what estimators are made of
"""

from .baking import Baked, bake
from .choices import Choices, accuracy
from .combine import Interference, interference
from .conditions import Condition, Rule, Similar, when
from .contrast import Contrast, Examples, Steering
from .controller import Controlled, WeightedController
from .directions import direction, gap
from .evaluate import Evaluation, evaluate
from .experts import ExpertTuner, TunedExperts
from .gguf import from_gguf, to_gguf
from .manifold import Manifold
from .persona import PersonaVector, Trait, prevent, screen, shift
from .preference import Odds, Pairs, odds, preference_utility
from .states import states
from .transport import ActivationTransport, Transport

__all__ = [
    "ActivationTransport",
    "Baked",
    "Choices",
    "Condition",
    "Contrast",
    "Controlled",
    "Evaluation",
    "Examples",
    "ExpertTuner",
    "Interference",
    "Manifold",
    "Odds",
    "Pairs",
    "PersonaVector",
    "Rule",
    "Similar",
    "Steering",
    "Trait",
    "Transport",
    "TunedExperts",
    "WeightedController",
    "accuracy",
    "bake",
    "direction",
    "evaluate",
    "from_gguf",
    "gap",
    "interference",
    "odds",
    "preference_utility",
    "prevent",
    "screen",
    "shift",
    "states",
    "to_gguf",
    "when",
]
