"""Trouble: a step whose gradients or loss are not finite, traced to the site where that began."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from actome.core.model import Model

from ..alarms.base import Reading
from .looks import origin
from .norms import EXACT
from .optimizers import OptimizerWatch
from .probe import first_of


class Trouble:
    """Finds where numbers were lost, once, until the loss is finite again.

    Args:
        model: the network.
        probe: batches that it is tried on.
        autocast: of the training's forwards.

    Attributes:
        now: whether there is trouble at the moment.
    """

    def __init__(self, model: Model, probe: list[Any], autocast: torch.dtype | None):
        self.model, self.probe, self.autocast = model, probe, autocast
        self.now = False
        self._since = 0
        self._found: list[Reading] = []
        self._before: dict[str, Tensor] | None = None

    def before_update(self, hooks: OptimizerWatch, at: int) -> None:
        """Gradients of a step are not finite, and the weights are still those that made them.

        When the probe does not show it, the weights are kept for a look at the batch itself, which the loop gives after
        the update.
        """
        if self.now:
            return
        self.now, self._since = True, at
        hooks.wanted = True  # the gradients' norms say which components are concerned
        found = origin(self.model, self.probe, self.autocast)
        if found is not None:
            self._found.append(found)
            return
        trained = hooks.trained()
        if sum(p.numel() for p in trained.values()) <= EXACT:
            self._before = {name: p.detach().clone() for name, p in trained.items()}

    def after_step(self, batch: Any) -> list[Reading]:
        """What was found, once the step is over; the batch is looked at when nothing else told."""
        if self._before is not None and batch is not None:
            found = origin(self.model, [first_of(batch)], self.autocast, self._before)
            self._found += [] if found is None else [found]
        self._before = None
        found, self._found = self._found, []
        return found

    def of_loss(self, at: int, loss: float, batch: Any) -> list[Reading]:
        """The same for a loss that was fetched: with the weights as they are now, unless it was traced before."""
        if math.isfinite(loss):
            self.now = self.now and at <= self._since
            return []
        if self.now:
            return []
        self.now, self._since = True, at
        found = origin(self.model, [*self.probe, *([] if batch is None else [first_of(batch)])], self.autocast)
        return [] if found is None else [found]
