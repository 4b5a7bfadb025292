"""The probe: the text, always the same, at which a network in training is looked at."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from actome.core.errors import RunError, TextError
from actome.core.model import Model
from actome.core.text import Text
from actome.core.tokens import Batch

# Of plain text, so long are the rows, and so many tokens are taken: enough for shares and ranks of small networks, and
# no more than a step of training usually reads.
CONTEXT, TOKENS = 128, 2048
# What is given as batches is taken as it is, up to so many: an endless loader must end somewhere.
BATCHES = 64
_REPEATED_ROWS, _REPEATED_LENGTH = 4, 32


def probe_batches(model: Model, text: Any, context: int | None, tokens: int) -> list[Any]:
    """What `Model.measure` is to read at each look, on the model's device.

    Args:
        model: whose tokenizer makes ids of strings.
        text: strings, which are packed into rows of `context` tokens, up to `tokens` of them; a `Text`; token ids; or
            batches as the forward takes them: tensors, dicts of arguments, `Batch`.
        context: the length of a row of strings; by default 128, or the model's own if that is less.
        tokens: how many of a string's or a `Text`'s are taken.

    Raises:
        TextError: nothing in it, too little for one row, strings without a tokenizer.
    """
    if isinstance(text, str) or (isinstance(text, (list, tuple)) and text and isinstance(text[0], str)):
        if model.tokenizer is None:
            raise TextError(
                "the probe is text, and the model has no tokenizer to read it: give tokenizer=, or a probe of token ids"
            )
        limit = min(model.context or CONTEXT, CONTEXT) if context is None else context
        if model.context is not None and limit > model.context:
            raise TextError(f"context={limit} is more than the {model.context} positions that the model has")
        source = [text] if isinstance(text, str) else list(text)
        text = Text(source, model.tokenizer, context=limit)
    if isinstance(text, Text):
        return _of_text(model, text, tokens)
    if isinstance(text, Tensor):
        text = text[None] if text.ndim == 1 and not text.is_floating_point() else text
        text = list(text.split(8)) if text.ndim else [text]
    elif isinstance(text, (Mapping, Batch)):
        text = [text]
    if not isinstance(text, Iterable):
        raise TextError(f"the probe is text, token ids or batches, not {type(text).__name__}")
    batches = [_moved(first_of(one), model.device) for one in itertools.islice(text, BATCHES)]
    if not batches or all(rows_of(one) == 0 for one in batches):
        raise TextError("the probe is empty: give text, token ids or batches, as many as one look should read")
    return batches


def _of_text(model: Model, text: Text, tokens: int) -> list[Any]:
    taken, count = [], 0
    for batch in text:
        if text.pack and not taken and batch.n_tokens < text.context:
            raise TextError(
                f"the probe text has {batch.n_tokens} tokens, which do not fill one row of {text.context} (context): "
                f"give more text, or context={max(batch.n_tokens, 2)}"
            )
        rows = max(1, (tokens - count) // text.context)
        # A last row that is shorter than the others would weigh its few tokens like theirs.
        whole = rows if batch.mask is None or not text.pack else min(rows, int(batch.mask.all(1).sum()))
        if whole:
            part = _rows(batch, slice(whole), model.device)
            taken.append(part)
            count += part.n_tokens
        if count + text.context > tokens:
            break
    if not taken:
        raise TextError("the probe text is empty: give text, as much as one look should read")
    return taken


def shares(batches: list[Any], rank: int, ranks: int) -> list[Any]:
    """The part of the probe that one of several processes reads: every so-manieth row of each batch.

    >>> shares([torch.arange(6).view(3, 2)], 1, 2)
    [tensor([[2, 3]])]
    """
    if ranks == 1:
        return batches
    parts = [_every(one, rank, ranks) for one in batches]
    return [one for one in parts if rows_of(one)]


def _every(batch: Any, rank: int, ranks: int) -> Any:
    if isinstance(batch, Batch):
        return _rows(batch, slice(rank, None, ranks))
    if isinstance(batch, Mapping):
        rows = rows_of(batch)
        return {
            k: v[rank::ranks] if isinstance(v, Tensor) and v.ndim and len(v) == rows else v for k, v in batch.items()
        }
    return batch[rank::ranks]


def repeated_tokens(model: Model) -> Tensor | None:
    """Random tokens said twice, (4, 64) or as long as the model reads, by which induction is seen; the same each time.

    None for a model that reads no tokens or too few of them.
    """
    vocab = next((site.size("vocab") for site in model.table if site.name == "logits"), None)
    length = min(_REPEATED_LENGTH, (model.context or 2 * _REPEATED_LENGTH) // 2)
    if not vocab or vocab < 4 or length < 4:
        return None
    generator = torch.Generator().manual_seed(0)
    once = torch.randint(0, vocab, (_REPEATED_ROWS, length), generator=generator)
    return once.repeat(1, 2).to(model.device)


def _rows(batch: Batch, some: slice, device: torch.device | None = None) -> Batch:
    """Some rows of a batch, without a mask where none of them is padded."""
    ids, mask = batch.ids[some], None if batch.mask is None else batch.mask[some]
    mask = None if mask is None or bool(mask.all()) else mask
    if device is not None:
        ids, mask = ids.to(device), None if mask is None else mask.to(device)
    return Batch(ids, mask, batch.source[some], batch.sequence[some])


def check_share(batches: list[Any], ranks: int) -> None:
    """That every process gets something to read."""
    rows = max(map(rows_of, batches))
    if rows < ranks:
        raise RunError(
            f"the probe has batches of {rows} rows, and {ranks} processes share them; give {ranks} rows or more"
        )


def first_of(batch: Any) -> Any:
    """Loaders give (inputs, targets); the inputs are what the forward takes."""
    return batch[0] if isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], Tensor) else batch


def rows_of(batch: Any) -> int:
    """How many rows a batch has."""
    if isinstance(batch, Batch):
        return len(batch.ids)
    if isinstance(batch, Mapping):
        sizes = [len(v) for v in batch.values() if isinstance(v, Tensor) and v.ndim]
        return max(sizes, default=0)
    return len(batch) if hasattr(batch, "__len__") else 1


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.detach().to(device)
    if isinstance(batch, Batch):
        return _rows(batch, slice(None), device)
    if isinstance(batch, Mapping):
        # What is there to train with, such as labels, would only be computed for nothing.
        kept = {k: v for k, v in batch.items() if k not in ("labels", "decoder_labels")}
        return {k: v.detach().to(device) if isinstance(v, Tensor) else v for k, v in kept.items()}
    return batch
