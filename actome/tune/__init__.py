"""Training-time methods.

- `IgnoreTopK` (`ignore_topk`): an optimizer whose largest updates are left out
- `low_rank_` (`init`): initial weights of a chosen rank at the same norm
- `OutputScale` (`output_scale`): one dial from rich to lazy training
"""

from .ignore_topk import IgnoreTopK
from .init import low_rank_
from .output_scale import OutputScale

__all__ = ["IgnoreTopK", "OutputScale", "low_rank_"]
