"""How much a recipe depends on its learning rate: one number over three decades of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from actome.core.errors import MeasureError


@dataclass(frozen=True)
class LRSensitivity:
    """What a recipe loses by a learning rate that is not its best.

    Attributes:
        value: mean over the grid of min(loss, loss at initialisation) - the lowest loss. 0 for a recipe that does not
            care; the whole gain of training for one that works at a single point of a wide grid.
        best_lr, best_loss: the lowest point.
        lrs, losses: the curve, as it came; NaN and infinite where training broke.
        clipped: the losses that were counted: at most that at initialisation.
        initial: the loss at initialisation.
    """

    value: float
    best_lr: float
    best_loss: float
    lrs: tuple[float, ...]
    losses: tuple[float, ...]
    clipped: tuple[float, ...]
    initial: float


def lr_sensitivity(train_fn: Callable[[float], float], lrs: Sequence[float], *, initial: float) -> LRSensitivity:
    """Trains at each learning rate of a grid and says how much the loss depends on it.

    Compare recipes on the same grid, evenly spaced in logarithms over about three decades, and several seeds. A
    training that ends in NaN, or above where it began, counts as the loss at initialisation: otherwise one point that diverged
    would be all that the number tells.

    Args:
        train_fn: from a learning rate to the final loss; may give NaN or an infinite one.
        lrs: the grid, two or more.
        initial: the loss before training.

    Raises:
        MeasureError: for fewer than two learning rates, one of 0 or below, or a loss at initialisation that is no
            number.

    Source: Small-scale proxies for large-scale Transformer training instabilities, section 2.2 (LR sensitivity).

    >>> found = lr_sensitivity({0.01: 2.0, 0.1: 1.0, 1.0: math.nan}.get, [0.01, 0.1, 1.0], initial=3.0)
    >>> found.value, found.best_lr                                  # (1 + 0 + 2) / 3
    (1.0, 0.1)
    """
    lrs = [float(lr) for lr in lrs]
    if len(lrs) < 2 or not all(lr > 0 and math.isfinite(lr) for lr in lrs):
        raise MeasureError(f"lrs={lrs}: a grid of two or more learning rates above 0 is wanted")
    if not math.isfinite(initial):
        raise MeasureError(f"initial={initial}: the loss before training, a number, is wanted")
    losses = [float(train_fn(lr)) for lr in lrs]
    clipped = [min(loss, initial) if not math.isnan(loss) else initial for loss in losses]
    best = min(clipped)
    return LRSensitivity(
        sum(clipped) / len(clipped) - best, lrs[clipped.index(best)], best, tuple(lrs), tuple(losses), tuple(clipped),
        initial,
    )  # fmt: skip
