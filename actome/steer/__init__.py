"""Estimators that fit clamps: from examples to a change of behaviour.

- `Contrast`, `Examples`, `Steering` (`contrast`): a direction between two sets of examples, as a clamp
- `bake`, `to_gguf`, `from_gguf` (`baking`, `gguf`): constant clamps shipped without actome
- `direction`, `states` (`directions`, `states`): what it is made of
"""

from .baking import Baked, bake
from .contrast import Contrast, Examples, Steering
from .directions import direction, gap
from .gguf import from_gguf, to_gguf
from .states import states

__all__ = ["Baked", "Contrast", "Examples", "Steering", "bake", "direction", "from_gguf", "gap", "states", "to_gguf"]
