"""Recording a stream of batches, into memory or onto disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import RecordingError
from .record import capture_forward, dims_at, iterate, take_positions
from .recording import Recording
from .sites import Site

if TYPE_CHECKING:
    from .model import Model

Progress = Callable[[int], None] | None


def record_to_memory(
    model: Model, text: Any, found: Sequence[Site], last: str | None, options: dict[str, Any], progress: Progress
) -> Recording:
    """Every batch of a `Text` in one recording, rows padded to the longest."""
    parts: dict[str, list[Tensor]] = {site.name: [] for site in found}
    tokens: list[Tensor] = []
    masks: list[Tensor] = []
    source: list[str] = []
    dims: dict[str, tuple[str, ...]] = {}
    done = 0
    for batch in iterate(text, 8, model):
        tensors, ids, mask = _one_batch(model, batch, found, last, options)
        for site in found:
            dims.setdefault(site.name, dims_at(model, site, tensors[site.name]))
            parts[site.name].append(tensors[site.name])
        tokens.append(ids)
        masks.append(mask if mask is not None else torch.ones_like(ids, dtype=torch.bool))
        source += batch.source
        done += batch.ids.numel()
        if progress is not None:
            progress(done)
    longest = max(t.shape[1] for t in tokens)
    mask = torch.cat([_lengthen(m, ("batch", "pos"), longest) for m in masks])
    return Recording(
        {name: torch.cat([_lengthen(x, dims[name], longest) for x in xs]) for name, xs in parts.items()},
        dims,
        tokens=torch.cat([_lengthen(t, ("batch", "pos"), longest) for t in tokens]),
        mask=None if bool(mask.all()) else mask,
        source=tuple(source),
        meta={"model": model.name},
    )


def _lengthen(x: Tensor, dims: tuple[str, ...], length: int) -> Tensor:
    widths: list[int] = []
    for dim, size in zip(reversed(dims), reversed(x.shape), strict=True):
        widths += [0, length - size if dim in ("pos", "query", "key") else 0]
    return F.pad(x, widths) if any(widths) else x


def _one_batch(
    model: Model, batch: Any, found: Sequence[Site], last: str | None, options: dict[str, Any]
) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
    arguments, ids, mask = model.arguments(batch)
    assert ids is not None
    capture = capture_forward(model, arguments, found, mask, last, False, options)
    if options["positions"] is not None:
        ids, mask = take_positions(ids, 1, options["positions"], mask), None
    return capture.tensors, ids.cpu(), mask.cpu() if mask is not None else None


def record_to_disk(
    model: Model,
    text: Any,
    found: Sequence[Site],
    last: str | None,
    options: dict[str, Any],
    path: Path,
    modes: dict[str, bool],
    batch_size: int,
    progress: Progress,
) -> Recording:
    """Streams every batch to a folder as it comes; what is written stays readable whatever happens."""
    from .store import Writer

    if sum(modes.values()) > 1:
        raise RecordingError("append, resume and overwrite exclude one another; choose one")
    options = {**options, "device": "cpu"}
    batches = text if hasattr(text, "skip") else None
    dims = {site.name: site.dims for site in found}
    if any(not d for d in dims.values()):
        raise RecordingError("sites of plain modules can be recorded in memory only: their dims have no fixed meaning")
    meta = {"model": model.info, "positions": repr(options["positions"]) if options["positions"] is not None else None}
    if batches is not None:
        meta["text"] = text.describe()
    with Writer(path, dims, meta=meta, **modes) as writer:
        if batches is not None and modes["resume"]:
            batches = text.skip(writer.done)
        elif batches is None and modes["resume"]:
            raise RecordingError("resume= needs a Text, whose sequences are numbered; give ac.Text(...)")
        done = 0
        for batch in batches if batches is not None else iterate(text, batch_size, model):
            tensors, ids, mask = _one_batch(model, batch, found, last, options)
            writer.add(tensors, ids, mask, batch.source, batch.sequence)
            done += batch.ids.numel()
            if progress is not None:
                progress(done)
    return Recording.open(path)
