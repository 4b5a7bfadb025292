"""Placing: at which tokens of a prompt and its response a clamp acts, the same when scoring and when generating.

Letters: B rows, T position.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from actome.core.clamp import Clamp
from actome.core.errors import MeasureError
from actome.core.run import absolute
from actome.core.select import chosen

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


def while_scoring(model: Model, clamps: Sequence[Clamp], placing: Placing, some: Spans) -> list[Clamp]:
    """The clamps as they act on prompts with given responses, read in one forward, just as if these were generated.

    What looks at the newest token (``positions=-1``, controllers), at the phase or at steps means, in one forward, the
    positions at which that would be so. A latched condition is judged on the prompts alone; clamps that then apply to
    no row are left out.

    Raises:
        MeasureError: see `while_generating`; or positions beside a phase or steps that cannot be read at once.
    """
    placed = while_generating(_judged(model, clamps, some), placing)
    return [_at_once(one, some) for one in placed]


def _at_once(clamp: Clamp, some: Spans) -> Clamp:
    """A clamp with its positions, phase and steps said as positions (batch, pos) of rows that hold the response."""
    newest = clamp.positions is None if getattr(clamp, "newest", False) else _is_last(clamp.positions)
    if not newest and clamp.phase is None and clamp.steps is None:
        return clamp
    at_T = torch.arange(some.batch.ids.shape[1])
    # Step 0 reads the prompt, step k the k-th token of the response.
    step_BT = (at_T - some.prompt[:, None] + 1).clamp_min(0)
    chosen_BT = at_T < (some.prompt + some.response)[:, None]
    if newest:
        chosen_BT = chosen_BT & (at_T >= some.prompt[:, None] - 1)
    elif clamp.positions is not None:
        chosen_BT = chosen_BT & _named(clamp, len(at_T))
    if clamp.phase is not None:
        chosen_BT = chosen_BT & ((step_BT == 0) == (clamp.phase == "prompt"))
    if clamp.steps is not None:
        chosen_BT = chosen_BT & torch.isin(step_BT, torch.tensor(absolute(clamp.steps, int(step_BT.max()) + 1)))
    return clamp.at(positions=chosen_BT, phase=None, steps=None)


def _named(clamp: Clamp, length: int) -> Tensor:
    """Positions that a clamp names from the row's beginning on, (pos)."""
    some = clamp.positions
    ends = (some.start or 0, some.stop or 0) if isinstance(some, slice) else (some,) if isinstance(some, int) else some
    if isinstance(some, Tensor) or min(ends, default=0) < 0:
        raise MeasureError(
            f"{type(clamp).__name__} at {clamp.site}: positions={some} beside a phase or steps are not those of a "
            "whole response; count them from its beginning"
        )
    return torch.isin(torch.arange(length), torch.tensor(absolute(some, length)))


def _judged(model: Model, clamps: Sequence[Clamp], some: Spans) -> list[Clamp]:
    """The clamps with their latched conditions turned into rows, by a forward of the prompts."""
    if not any(one.when is not None and one.when.latch for one in clamps):
        return list(clamps)
    prompts = [row[:end].tolist() for row, end in zip(some.batch.ids, some.prompt.tolist(), strict=True)]
    judged: list[Clamp] = []
    for one in clamps:
        if one.when is None or not one.when.latch:
            judged.append(one)
            continue
        parts = one.when.parts
        # Under the clamps before it, since they may change what it judges.
        with model.clamp(*judged, strict=False) if judged else nullcontext():
            read = model.record(prompts, list(dict.fromkeys(part.site for part in parts)))
        found = one.when.combine(tuple(part.holds(read[part.site], read.mask) for part in parts))
        true_B = torch.as_tensor(found.any(1) if found.ndim > 1 else found).expand(len(prompts))
        rows = true_B.nonzero().flatten().tolist()
        if one.rows is not None:
            meant = chosen(one.rows, len(prompts), "row")
            rows = [row for row in rows if row in meant]
        if rows:
            judged.append(one.at(when=None, rows=rows))
    return judged


def _is_last(positions: Any) -> bool:
    return isinstance(positions, int) and positions == -1


def active(model: Model, clamps: Sequence[Clamp]) -> AbstractContextManager[Any]:
    """The clamps' context; of none, nothing. One that has a condition need not fire."""
    return model.clamp(*clamps, strict=all(one.when is None for one in clamps)) if clamps else nullcontext()
