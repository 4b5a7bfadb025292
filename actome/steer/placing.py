"""Placing: at which tokens of a prompt and its response a clamp acts, the same when scoring and when generating.

Letters: B rows, T position.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch

from actome.core.clamp import Clamp
from actome.core.errors import MeasureError

if TYPE_CHECKING:
    from actome.core.model import Model
    from actome.measures.spans import Spans

Placing = Literal["all", "prompt", "last", "response"]
PLACINGS: tuple[Placing, ...] = ("all", "prompt", "last", "response")

_GENERATING: dict[Placing, dict[str, Any]] = {
    "all": {},
    "prompt": {"phase": "prompt"},
    "last": {"positions": -1, "steps": 0},
    "response": {"positions": -1},
}


def while_generating(clamps: Sequence[Clamp], placing: Placing) -> list[Clamp]:
    """The clamps as they act in `model.generate`, where the newest token of each forward is its last.

    Raises:
        MeasureError: an unknown placing, or one beside a clamp's own positions, phase or steps.
    """
    if placing not in PLACINGS:
        raise MeasureError(f"there is no placing {placing!r}; choose {', '.join(PLACINGS)}")
    if placing == "all":
        return list(clamps)
    for one in clamps:
        if not all(gate is None for gate in (one.positions, one.phase, one.steps)):
            raise MeasureError(
                f"{type(one).__name__} at {one.site} says itself where it acts (positions, phase or steps), so that "
                "placings cannot be tried"
            )
    return [one.at(**_GENERATING[placing]) for one in clamps]


def while_scoring(clamps: Sequence[Clamp], placing: Placing, some: Spans) -> list[Clamp]:
    """The clamps as they act on prompts with given responses, read in one forward.

    ``"response"`` acts from the last token of the prompt on, at every position from which a token of the response is
    predicted, as it does in generation. So do clamps that say themselves that they act at the newest token
    (``positions=-1``, controllers): in one forward that would be the last of the response, which predicts nothing.
    """
    placed = while_generating(clamps, placing)
    if placing == "all":
        return [one.at(positions=some.before) if _of_the_newest(one) else one for one in placed]
    at_T = torch.arange(some.batch.ids.shape[1])
    prompt_B = some.prompt[:, None]
    chosen_BT = {
        "prompt": at_T < prompt_B,
        "last": at_T == prompt_B - 1,
        "response": some.before,
    }[placing]
    return [one.at(positions=chosen_BT) for one in clamps]


def _of_the_newest(clamp: Clamp) -> bool:
    """Whether a clamp acts at the newest token of every forward, and so at each from which a response is predicted."""
    if clamp.phase is not None or clamp.steps is not None:
        return False
    return clamp.positions is None if getattr(clamp, "newest", False) else _is_last(clamp.positions)


def _is_last(positions: Any) -> bool:
    return isinstance(positions, int) and positions == -1


def active(model: Model, clamps: Sequence[Clamp]) -> AbstractContextManager[Any]:
    """The clamps' context; of none, nothing. One that has a condition need not fire."""
    return model.clamp(*clamps, strict=all(one.when is None for one in clamps)) if clamps else nullcontext()
