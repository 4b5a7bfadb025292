"""Watching a training: one line in its loop, and everything that is due is taken, written and looked at.

- `watch`, `Watch` (`watch`): the context manager and its `step`
- `first_non_finite` (`locate`): where the first number that is none comes from
- `components` (`components`): the parameters in groups named like sites
- `agenda`, `cadence`: when to look; `looks`, `probe`: at what; `optimizers`, `norms`: around the optimizer's step
- `scalars`, `logbook`, `alerts`, `trouble`: from numbers to rows and alarms; `ranks`, `unwrap`, `untouched`: the
  training around it
"""

from .components import components
from .locate import first_non_finite
from .watch import Watch, watch

__all__ = ["Watch", "components", "first_non_finite", "watch"]
