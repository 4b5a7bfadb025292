"""Recording a stream of batches, into memory or onto disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import RecordingError
from .record import Job
from .recording import Recording

Progress = Callable[[int], None] | None


def record_to_memory(job: Job, text: Any, progress: Progress) -> Recording:
    """Every batch of a `Text` in one recording, rows padded to the longest."""
    parts: dict[str, list[Tensor]] = {site.name: [] for site in job.plan.asked}
    tokens: list[Tensor] = []
    masks: list[Tensor] = []
    source: list[str] = []
    numbers: list[int] = []
    dims: dict[str, tuple[str, ...]] = {}
    done = 0
    for batch in text:
        tensors, ids, mask = _one_batch(job, batch)
        dims = dims or job.dims(tensors)
        for name, x in tensors.items():
            parts[name].append(x)
        tokens.append(ids)
        masks.append(mask if mask is not None else torch.ones_like(ids, dtype=torch.bool))
        source += batch.source
        numbers += batch.sequence
        done += batch.n_tokens
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
        numbers=tuple(numbers),
        meta={"model": job.model.name, "text": text.describe()},
    )


def _lengthen(x: Tensor, dims: tuple[str, ...], length: int) -> Tensor:
    widths: list[int] = []
    for dim, size in zip(reversed(dims), reversed(x.shape), strict=True):
        widths += [0, length - size if dim in ("pos", "query", "key") else 0]
    return F.pad(x, widths) if any(widths) else x


def _one_batch(job: Job, batch: Any) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
    arguments, ids, mask = job.model.arguments(batch)
    capture = job.forward(arguments, mask)
    ids, mask = job.tokens(ids, mask)
    assert ids is not None
    return capture.tensors, ids.cpu(), mask.cpu() if mask is not None else None


def record_to_disk(
    job: Job, text: Any, path: Path, modes: dict[str, bool], batch_size: int, progress: Progress
) -> Recording:
    """Streams every batch to a folder as it comes; what is written stays readable whatever happens."""
    from .store import Writer
    from .text import Text

    if sum(modes.values()) > 1:
        raise RecordingError("append, resume and overwrite exclude one another; choose one")
    if not job.plan.fixed:
        raise RecordingError("sites of plain modules can be recorded in memory only: their dims have no fixed meaning")
    job.device = "cpu"
    if not isinstance(text, Text):
        if modes["resume"]:
            raise RecordingError("resume= needs a Text, whose sequences are numbered; give ac.Text(...)")
        text = job.model.read(text, batch_size)
    positions = job.selection.positions
    positions = None if positions is None else repr(positions)
    meta = {"model": job.model.info, "text": text.describe(), "positions": positions}
    with Writer(path, job.plan.dims, meta=meta, **modes) as writer:
        done = 0
        for batch in text.skip(writer.done) if modes["resume"] else text:
            tensors, ids, mask = _one_batch(job, batch)
            writer.add(tensors, ids, mask, batch.source, batch.sequence)
            done += batch.n_tokens
            if progress is not None:
                progress(done)
        writer.meta["text"] = text.describe()  # with the counts, now that they are known
    return Recording.open(path)
