"""Which layers decide: patching growing and shrinking ranges of layers from a run with the opposite intent.

Letters: N inputs, B batch, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actome.clamps import Patch
from actome.core.errors import MeasureError
from actome.core.tokens import Batch, encode

if TYPE_CHECKING:
    import pandas as pd

    from actome.core.model import Model


@dataclass(frozen=True)
class LayerRange:
    """The layers that a flip takes, as `layer_range_search` found them.

    Attributes:
        start, end: first and last of the range, places in `sites`.
        rate: share of inputs that give their other answer when just these are patched.
        sites: all that were looked at, in order.
        frame: one row a range that was tried: start, end, `flipped` (share that give the label) and, where the sources'
            answers were told, `imported` (share that give those).
    """

    start: int
    end: int
    rate: float
    sites: tuple[str, ...]
    frame: pd.DataFrame


def layer_range_search(
    model: Model,
    base_inputs: Any,
    source_inputs: Any,
    labels: Sequence[int] | Tensor,
    *,
    source_answers: Sequence[int] | Tensor | None = None,
    sites: str = "blocks.*.attn.out",
    pos: int = -1,
    near: float = 0.95,
    batch_size: int = 64,
) -> LayerRange:
    """The shortest range of layers whose states at one position carry an intent from one run into another.

    At one position, the last, the states of a source run with the opposite intent, about something else, take the
    place of the base run's in the layers 0 to e, for each e. While e grows, first the intent comes along and then the
    source's answer too. So what counts is the share of base inputs that give *their own* answer under the source's
    intent, less the share that give the source's, where that is told. The end is the smallest e within `near` of the
    highest. From there layers are given back from below, and the start is the largest that keeps `near` of what the end
    has. So the cost is linear in depth, at most two forwards a layer.

    Args:
        model: answers with one token after the last of an input.
        base_inputs, source_inputs: texts or token ids, in pairs, all of one length in tokens.
        labels: (N) token ids: what the base input should be answered under its source's intent.
        source_answers: (N) token ids: what the source is answered; other than the label, or an answer that was copied
            would count as an intent that was taken over.
        sites: what is patched, one a layer; those of the sites that one range goes over.
        pos: the position; patching all of them would bring the source's question along.
        near: share of the best that is near enough.
        batch_size: pairs a forward.

    Returns:
        A `LayerRange`; look at its `rate` before believing it.

    Raises:
        MeasureError: numbers that differ, lengths that differ, labels that the sources answer too, or `near` not a
            share above zero.

    Source: Minder et al. 2025, Controllable Context Sensitivity and the Knob Behind It (the search in two passes; when
    a share is near enough is ours).

    >>> import actome as ac
    >>> base, source = [[5, 6, 7], [8, 9, 10]], [[11, 6, 7], [12, 9, 10]]
    >>> found = layer_range_search(ac.demo(), base, source, labels=[4, 4])
    >>> found.frame.columns.tolist(), len(found.sites)
    (['start', 'end', 'flipped'], 4)
    """
    labels_N = torch.as_tensor(labels, dtype=torch.long)
    base, source = (encode(inputs, model.tokenizer) for inputs in (base_inputs, source_inputs))
    answers_N = None if source_answers is None else torch.as_tensor(source_answers, dtype=torch.long)
    _checked(base, source, labels_N, answers_N, near)
    names = tuple(site.name for site in model.match(sites))
    import pandas as pd

    rows: list[dict[str, float]] = []

    def tried(start: int, end: int) -> float:
        answers = _patched(model, base, source, names[start : end + 1], pos, batch_size)
        row = {"start": start, "end": end, "flipped": float((answers == labels_N).double().mean())}
        if answers_N is not None:
            row["imported"] = float((answers == answers_N).double().mean())
        rows.append(row)
        return row["flipped"] - row.get("imported", 0.0)

    ends = [tried(0, end) for end in range(len(names))]
    enough = max(ends) - (1 - near) * abs(max(ends))
    end = next(e for e, share in enumerate(ends) if share >= enough)
    enough = ends[end] - (1 - near) * abs(ends[end])
    start = max([0, *(one for one in range(1, end + 1) if tried(one, end) >= enough)])
    frame = pd.DataFrame(rows)
    rate = frame.set_index(["start", "end"]).loc[(start, end), "flipped"]
    return LayerRange(start, end, float(rate), names, frame)


def _checked(base: Batch, source: Batch, labels_N: Tensor, answers_N: Tensor | None, near: float) -> None:
    if not len(base.ids) == len(source.ids) == len(labels_N) or (
        answers_N is not None and len(answers_N) != len(labels_N)
    ):
        told = "" if answers_N is None else f" and {len(answers_N)} answers of sources"
        raise MeasureError(
            f"{len(base.ids)} base inputs, {len(source.ids)} sources, {len(labels_N)} labels{told}; "
            "give as many of each"
        )
    if base.mask is not None or source.mask is not None or base.ids.shape != source.ids.shape:
        raise MeasureError("base inputs and sources must all be of one length in tokens; pad or cut the texts")
    if answers_N is not None and bool((answers_N == labels_N).any()):
        same = int((answers_N == labels_N).sum())
        raise MeasureError(
            f"{same} of {len(labels_N)} sources have the very answer that their base input should change to, so that "
            "copying it would count as a flip; pair them otherwise"
        )
    if not 0 < near <= 1:
        raise MeasureError(f"near={near}: a share above zero, at most 1")


@torch.no_grad()
def _patched(model: Model, base: Batch, source: Batch, names: Sequence[str], pos: int, batch_size: int) -> Tensor:
    """The most likely token after each base input with some sites patched, (N)."""
    found = []
    for at in range(0, len(base.ids), batch_size):
        rows = slice(at, at + batch_size)
        recording = model.record(source.ids[rows], list(names))
        with model.clamp(*(Patch(name, recording, positions=pos) for name in names)):
            found.append(model.logits(base.ids[rows])[:, -1].argmax(-1).cpu())
    return torch.cat(found)
