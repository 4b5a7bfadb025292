"""Inputs of a trace: what every checkpoint reads, tokenised once, and the repeats that induction shows on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actome.core.errors import MeasureError, TextError

if TYPE_CHECKING:
    from torch import Tensor

    from actome.core.model import Model

LONGEST = 512  # tokens in a row, unless asked for: patterns take memory with its square
SHIPPED = "held-out manual and library source of Python"
_REPEAT_CONTEXT = 128


@dataclass(frozen=True)
class Inputs:
    """Batches that are read at every checkpoint.

    Attributes:
        batches: held in memory, on the CPU.
        about: what they are, ready for JSON.
        mark: a fingerprint of all tokens; the same inputs have the same.
    """

    batches: list[Any]
    about: dict[str, Any]
    mark: str


def inputs_for(
    model: Model, text: Any, *, tokens: int | None, context: int | None, batch_size: int, tokenizer: Any = None
) -> Inputs:
    """What a trace reads, for the tokenizer and the context of its models.

    Args:
        model: the first of them.
        text: a `Text`; a file, a folder or a list of strings; token ids or other inputs as a tensor; an iterable of
            batches as `Model.measure` takes them; None for held-out text that ships with Python.
        tokens: read no more than this many of a text.
        context: tokens in a row.
        batch_size: rows in a batch.

    Raises:
        TextError: text without a tokenizer, or without tokens.
        MeasureError: inputs without a batch.
    """
    import torch

    from actome.core.text import Text

    if isinstance(text, torch.Tensor):
        if not len(text):
            raise MeasureError("the inputs hold no row")
        batches: list[Any] = list(text.split(batch_size)) if text.ndim > 1 else [text]
        return Inputs(batches, {"source": f"tensor {tuple(text.shape)}"}, _mark(batches))
    if text is not None and not isinstance(text, str | Path | Text) and not _strings(text):
        batches = list(text)
        if not batches:
            raise MeasureError("the inputs hold no batch; an iterator can be read only once")
        return Inputs(batches, {"source": f"{len(batches)} batches"}, _mark(batches))
    shipped = text is None
    if not isinstance(text, Text):
        spells = tokenizer if tokenizer is not None else model.tokenizer
        if spells is None:
            raise TextError(
                f"text needs a tokenizer, and {model.name} comes without one; give tokenizer=..., token ids as a "
                "tensor, or the inputs that it takes as batches"
            )
        rows = context or min(model.context or LONGEST, LONGEST)
        text = Text(_shipped() if shipped else text, spells, context=rows, batch_size=batch_size, limit=tokens)
    batches = list(text)
    about = text.describe() | ({"source": SHIPPED} if shipped else {})
    return Inputs(batches, about, _mark(batches))


def _strings(text: Any) -> bool:
    return isinstance(text, list) and bool(text) and all(isinstance(one, str) for one in text)


def _shipped() -> list[tuple[str, str]]:
    from actome.tasks.corpus import documents

    return [(one.title, one.text) for one in documents("heldout")]


def repeats_for(model: Model, rows: int, seed: int, batch_size: int) -> Inputs | None:
    """Random tokens that are repeated, for `InductionScore`; None for a model that has no causal pattern or vocabulary.

    Each row is the begin token, where the tokenizer has one, and a random segment of distinct ordinary tokens again and
    again: nothing but the repeating can be learned from it, and what a model knows of text does not help.
    """
    import torch

    from actome.tasks.induction import RepeatedSegments

    vocab = model.table["logits"].size("vocab") if "logits" in model.order else None
    patterned = any(site.name.endswith("attn.pattern") for site in model.table)
    if not vocab or not patterned or any(site.name.startswith("encoder.") for site in model.table):
        return None
    spells = model.tokenizer
    special = set(getattr(spells, "all_special_ids", ()) or ())
    known = min(vocab, len(spells)) if spells is not None else vocab
    ordinary = [token for token in range(known) if token not in special]
    length = min(model.context or _REPEAT_CONTEXT, _REPEAT_CONTEXT)
    # Two or three times each: where a segment comes more often, attention is shared out over all that came before.
    longest = min(length // 2, len(ordinary) - 1)
    if longest < 6:
        return None
    world = RepeatedSegments(len(ordinary) + 1, shortest=2 * longest // 3, longest=longest)
    begin = getattr(spells, "bos_token_id", None)
    places = torch.tensor([0 if begin is None else begin, *ordinary])
    ids = places[world.sample(rows, length, seed).tokens]
    ids = ids[:, 1:] if begin is None else ids
    batches = list(ids.split(batch_size))
    return Inputs(batches, {"source": f"repeated random tokens {tuple(ids.shape)}, seed {seed}"}, _mark(batches))


def _mark(batches: Iterable[Any]) -> str:
    import torch

    digest = hashlib.sha256()
    for batch in batches:
        for name, tensor in _tensors(batch):
            raw = tensor.detach().cpu().contiguous()
            digest.update(f"{name}:{raw.dtype}:{tuple(raw.shape)}:".encode())
            digest.update(raw.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def on_device(batch: Any, device: Any) -> Any:
    """A batch where the model is; what `Text` gives is moved by the model itself."""
    import torch

    if isinstance(batch, torch.Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: on_device(one, device) for name, one in batch.items()}
    return type(batch)(on_device(one, device) for one in batch) if isinstance(batch, list | tuple) else batch


def _tensors(batch: Any) -> list[tuple[str, Tensor]]:
    import torch

    if isinstance(batch, torch.Tensor):
        return [("", batch)]
    if hasattr(batch, "ids"):
        return [("ids", batch.ids), *([("mask", batch.mask)] if batch.mask is not None else [])]
    items = batch.items() if isinstance(batch, Mapping) else enumerate(batch) if isinstance(batch, list | tuple) else ()
    found = [(str(name), one) for name, one in items if isinstance(one, torch.Tensor)]
    if not found:
        raise MeasureError(f"a batch is a tensor or a dict of forward arguments, not {type(batch).__name__}")
    return found
