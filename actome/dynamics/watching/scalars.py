"""Scalars of every step, kept where they are until many can be fetched at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from actome.core.errors import MeasureError

from ..alarms.base import Reading
from .norms import fetch
from .ranks import Ranks

Scalar = Tensor | float


@dataclass(slots=True)
class Step:
    """What is known of one step.

    Attributes:
        at: its number.
        shared: scalars that every process has its own of; their mean is what is logged.
        own: numbers of this process.
        skips: what the optimizers found of overflows, above 0 for a step that was passed over.
        readings: what looks and norms gave.
    """

    at: int
    shared: dict[str, Scalar] = field(default_factory=dict)
    own: dict[str, float] = field(default_factory=dict)
    skips: list[Scalar] = field(default_factory=list)
    readings: list[Reading] = field(default_factory=list)


def scalar(name: str, value: Any) -> Scalar:
    """A number as it may be kept: a tensor's own copy on its device, without its graph.

    Raises:
        MeasureError: not one number.

    >>> scalar("loss", torch.ones(2))
    Traceback (most recent call last):
        ...
    actome.core.errors.MeasureError: loss has the shape (2,), and a step has one number: take its mean, loss.mean()
    """
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise MeasureError(
                f"{name} has the shape {tuple(value.shape)}, and a step has one number: take its mean, loss.mean()"
            )
        # A copy: the loop may go on to write into it, and a captured graph writes the next step's there.
        return value.detach().reshape(()).clone()
    try:
        return float(value)
    except (TypeError, ValueError):
        raise MeasureError(
            f"{name} is {value!r} ({type(value).__name__}); a number or a tensor of one is wanted"
        ) from None


def mean(values: list[Scalar]) -> Scalar:
    """The mean of what several backward passes of one step gave."""
    return values[0] if len(values) == 1 else sum(values[1:], values[0]) / len(values)


def named(loss: Scalar | None, components: Mapping[str, Any] | None) -> dict[str, Scalar]:
    """The loss and its components under the names of their rows."""
    found: dict[str, Scalar] = {} if loss is None else {"loss": loss}
    for name, value in (components or {}).items():
        found[f"loss/{name}"] = scalar(f"loss/{name}", value)
    return found


def fetched(steps: list[Step], ranks: Ranks, device: torch.device) -> list[tuple[dict[str, float], bool]]:
    """For each step its shared scalars, meaned over the processes, and whether it was passed over.

    One transfer and one reduction for all of them.
    """
    places = [(i, name) for i, step in enumerate(steps) for name in step.shared]
    skips = [(i, one) for i, step in enumerate(steps) for one in step.skips]
    values = [steps[i].shared[name] for i, name in places] + [one for _, one in skips]
    numbers = iter(fetch(value for value in values if isinstance(value, Tensor)))
    plain = [next(numbers) if isinstance(value, Tensor) else value for value in values]
    passed = {i for (i, _), found in zip(skips, plain[len(places) :], strict=True) if found}
    plain = plain[: len(places)]
    if plain and not ranks.alone:
        plain = ranks.mean(torch.tensor(plain, dtype=torch.float64), device).tolist()
    out: list[dict[str, float]] = [{} for _ in steps]
    for (i, name), value in zip(places, plain, strict=True):
        out[i][name] = value
    return [(one, i in passed) for i, one in enumerate(out)]
