"""Control of generation, and what can be known of it from sampling: outcome distributions, uncertainty.

- `forking_paths`, `ForkingPaths` (`forking`): the distribution of outcomes at every token of a path
- `change_points`, `Changes` (`changes`): where such distributions change
"""

from .changes import Changes, change_points
from .forking import ForkingPaths, forking_paths

__all__ = ["Changes", "ForkingPaths", "change_points", "forking_paths"]
