"""Training-time methods.

- `IgnoreTopK` (`ignore_topk`): an optimizer whose largest updates are left out
"""

from .ignore_topk import IgnoreTopK

__all__ = ["IgnoreTopK"]
