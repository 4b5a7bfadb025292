"""Training-time methods.

<<<<<<< HEAD
- `IgnoreTopK` (`ignore_topk`): an optimizer whose largest updates are left out
"""

from .ignore_topk import IgnoreTopK

__all__ = ["IgnoreTopK"]
=======
- `low_rank_` (`init`): initial weights of a chosen rank at the same norm
- `OutputScale` (`output_scale`): one dial from rich to lazy training
"""

from .init import low_rank_
from .output_scale import OutputScale

__all__ = ["OutputScale", "low_rank_"]
>>>>>>> regimes
