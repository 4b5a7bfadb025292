"""Training-time methods.

- `low_rank_` (`init`): initial weights of a chosen rank at the same norm
- `OutputScale` (`output_scale`): one dial from rich to lazy training
"""

from .init import low_rank_
from .output_scale import OutputScale

__all__ = ["OutputScale", "low_rank_"]
