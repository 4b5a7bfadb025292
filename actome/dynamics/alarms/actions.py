"""What is done about an alarm: stop, lower the learning rate, save the weights, or anything that can be called."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from actome.core.errors import MeasureError

from .base import Alarm


class Watching(Protocol):
    """What an action may ask of whoever watches a training.

    Attributes:
        module: that is trained.
        optimizers: those that are known; empty when there are none.
        at: the step that the training is at; an alarm may be of an earlier one.
    """

    module: nn.Module
    optimizers: Sequence[torch.optim.Optimizer]
    at: int

    def stop(self, reason: str) -> None:
        """Asks the training to end after this step."""


# Called with the alarm and the watch (None offline); may say in words what it did.
Action = Callable[[Alarm, Any], "str | None"]


class Acted(NamedTuple):
    """What came of an action.

    Attributes:
        action: its name.
        done: False when it raised.
        note: what it did, or the error.
    """

    action: str
    done: bool
    note: str


def perform(action: Action, alarm: Alarm, watch: Watching | None) -> Acted:
    """Calls an action; whatever it raises is told and goes no further, for a training must not end by its alarm."""
    name = getattr(action, "__name__", type(action).__name__)
    try:
        return Acted(name, True, action(alarm, watch) or "")
    except Exception as error:  # an action is anybody's code
        return Acted(name, False, f"{type(error).__name__}: {error}")


@dataclass(frozen=True)
class Stop:
    """Asks the training to end. A plain loop looks at what its watch says; trainers are told in their own way."""

    def __call__(self, alarm: Alarm, watch: Watching) -> str:
        watch.stop(f"{alarm.name} at step {alarm.step}: {alarm.message}")
        return "asked the training to stop"


@dataclass(frozen=True)
class LowerLR:
    """Multiplies the learning rate by a factor from now on, whatever a schedule goes on to set.

    The factor is put on during each `optimizer.step` and taken off after it, by hooks: a schedule computes its own
    rates from the rates that it left, and would be thrown off by, or overwrite, a change that stays. So
    ``param_groups`` shows the schedule's rate between steps; `scale_of` tells the factor. A checkpoint does not keep
    it. Each further alarm multiplies again.

    Args:
        factor: above 0 and below 1.
        floor: learning rates are not lowered below it; those that a schedule brings below it stay as they are.

    Raises:
        MeasureError: for a factor or floor outside its range.
    """

    factor: float = 0.5
    floor: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.factor < 1 or not self.floor >= 0:
            raise MeasureError(f"factor={self.factor} lies between 0 and 1, floor={self.floor} is 0 or more")

    def __call__(self, alarm: Alarm, watch: Watching) -> str:
        if not watch.optimizers:
            raise MeasureError("no optimizer is known to this watch; give it the optimizer when it is made")
        said = []
        for optimizer in watch.optimizers:
            scaled = _SCALES.get(optimizer) or _Scaled(optimizer)
            rates = dict.fromkeys(float(group["lr"]) for group in optimizer.param_groups)
            before = [scaled.rate(lr) for lr in rates]
            scaled.lower(self.factor, self.floor)
            said += [f"{old:.3g} to {scaled.rate(lr):.3g}" for old, lr in zip(before, rates, strict=True)]
        return f"learning rate from {', '.join(said)}"


@dataclass(frozen=True)
class SaveCheckpoint:
    """Saves the weights, and the state of the optimizers, as they are now.

    One file ``step-STEP-ALARM.pt`` an alarm, for ``torch.load(..., weights_only=True)``: ``step``, ``alarm`` (its
    name), ``model`` and ``optimizers`` (a list of states). It is moved into place once it is whole.

    Args:
        folder: made if it is not there.
        optimizers: whether to save their states.
    """

    folder: str | os.PathLike[str]
    optimizers: bool = True

    def __call__(self, alarm: Alarm, watch: Watching) -> str:
        folder = Path(self.folder).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"step-{watch.at}-{alarm.name}.pt"
        held = {"step": watch.at, "alarm": alarm.name, "model": watch.module.state_dict()}
        if self.optimizers:
            held["optimizers"] = [one.state_dict() for one in watch.optimizers]
        part = path.with_suffix(".part")
        try:
            torch.save(held, part)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        return f"saved {path}"


def scale_of(optimizer: torch.optim.Optimizer) -> float:
    """The factor that `LowerLR` has put on an optimizer's learning rates; 1 where it was not called."""
    scaled = _SCALES.get(optimizer)
    return 1.0 if scaled is None else scaled.factor


class _Scaled:
    """The factor on one optimizer's learning rates, put on before each step and taken off after it."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.factor, self.floor = 1.0, 0.0
        self._kept: list[Any] | None = None
        optimizer.register_step_pre_hook(self._put_on)
        optimizer.register_step_post_hook(self._take_off)
        _SCALES[optimizer] = self

    def lower(self, factor: float, floor: float) -> None:
        self.factor, self.floor = self.factor * factor, max(self.floor, floor)

    def rate(self, lr: Any) -> Any:
        """What a learning rate becomes; a tensor for a tensor."""
        scaled = lr * self.factor
        return scaled if scaled >= self.floor else lr if lr <= self.floor else lr * 0 + self.floor

    def _put_on(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._take_off(optimizer)  # left on by a step that raised
        self._kept = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = self.rate(group["lr"])

    def _take_off(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if self._kept is not None:
            for group, lr in zip(optimizer.param_groups, self._kept, strict=True):
                group["lr"] = lr
            self._kept = None


_SCALES: weakref.WeakKeyDictionary[torch.optim.Optimizer, _Scaled] = weakref.WeakKeyDictionary()
