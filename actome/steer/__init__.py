"""Estimators that fit clamps: from examples to a change of behaviour.

- `Contrast`, `Examples`, `Steering` (`contrast`): a direction between two sets of examples, as a clamp
- `direction`, `states` (`directions`, `states`): what it is made of
"""

from .contrast import Contrast, Examples, Steering
from .directions import direction, gap
from .states import states

__all__ = ["Contrast", "Examples", "Steering", "direction", "gap", "states"]
