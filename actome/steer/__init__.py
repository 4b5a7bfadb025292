"""Estimators that fit clamps: from examples to a change of behaviour.

- `Contrast`, `Examples`, `Steering` (`contrast`): a direction between two sets of examples, as a clamp
- `bake`, `to_gguf`, `from_gguf` (`baking`, `gguf`): constant clamps shipped without actome
- `evaluate`, `Evaluation`, `Pairs` (`evaluate`, `preference`): dose and response, with controls and a recommendation
- `preference_utility`, `odds`, `Manifold` (`preference`, `manifold`): what it is made of
- `direction`, `states` (`directions`, `states`): what it is made of
"""

from .baking import Baked, bake
from .contrast import Contrast, Examples, Steering
from .directions import direction, gap
from .evaluate import Evaluation, evaluate
from .gguf import from_gguf, to_gguf
from .manifold import Manifold
from .preference import Odds, Pairs, odds, preference_utility
from .states import states

__all__ = [
    "Baked",
    "Contrast",
    "Evaluation",
    "Examples",
    "Manifold",
    "Odds",
    "Pairs",
    "Steering",
    "bake",
    "direction",
    "evaluate",
    "from_gguf",
    "gap",
    "odds",
    "preference_utility",
    "states",
    "to_gguf",
]
