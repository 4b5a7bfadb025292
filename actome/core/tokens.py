"""Tokens: what a model reads, as rows of ids with a mask, and how they are made of strings or given as ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .errors import TextError


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Rows of tokens, padded on the right.

    Attributes:
        ids: (batch, pos) int64.
        mask: (batch, pos) bool, False where a row is padded; ``None`` when every token is real.
        source: for each row, the name of the document or documents that it holds.
        sequence: the running number of each row in the whole text, by which an interrupted run goes on.
    """

    ids: Tensor
    mask: Tensor | None
    source: tuple[str, ...]
    sequence: tuple[int, ...]

    @property
    def n_tokens(self) -> int:
        """How many tokens are real."""
        return self.ids.numel() if self.mask is None else int(self.mask.sum())


def encode(inputs: str | Sequence[str] | Tensor | Sequence[Any], tokenizer: Any = None) -> Batch:
    """A batch of what `Model.record` may be given.

    Args:
        inputs: a string, a list of strings; token ids as an integer tensor (pos) or (batch, pos), or as a list of
            ints or a list of lists of ints, which need not be of one length.
        tokenizer: needed for strings; adds the special tokens that it adds by default.

    Returns:
        Rows padded on the right; the mask is ``None`` when they are of one length.
        Int64 ids given as a tensor are not copied.

    Raises:
        TextError: for an empty input, for ids that are not integers, and for strings without a tokenizer.

    >>> encode([[5, 6, 7], [8]]).ids
    tensor([[5, 6, 7], [8, 0, 0]])
    """
    if isinstance(inputs, str):
        inputs = [inputs]
    elif not isinstance(inputs, (Tensor, list, tuple)):
        inputs = _as_tensor(inputs)
    mask = None
    if isinstance(inputs, Tensor):
        ids = _integers(inputs)
    elif not inputs:
        raise TextError("there is nothing to read: the list is empty")
    elif all(isinstance(text, str) for text in inputs):
        if tokenizer is None:
            raise TextError("there is no tokenizer for this text; pass token ids, or wrap the model with tokenizer=")
        rows = [tokenize(tokenizer, text, special=True) if text else [] for text in inputs]
        ids, mask = pad_right(_filled(rows), pad_id(tokenizer))
    elif all(isinstance(row, (list, tuple, Tensor)) for row in inputs):
        rows = [_integers(_as_tensor(row)).tolist() if len(row) else [] for row in inputs]
        ids, mask = pad_right(_filled(rows), pad_id(tokenizer))
    else:
        ids = _integers(_as_tensor(inputs))
    if ids.ndim == 1:
        ids = ids[None]
    if ids.ndim != 2 or not ids.numel():
        raise TextError(f"token ids have the shape (pos) or (batch, pos), none of them empty, not {tuple(ids.shape)}")
    n = ids.shape[0]
    return Batch(ids, mask, tuple(f"#{row}" for row in range(n)), tuple(range(n)))


@dataclass(slots=True)
class Frame:
    """The special tokens around the contents of a row, and those between two documents in it."""

    before: list[int] = field(default_factory=list)
    after: list[int] = field(default_factory=list)
    between: list[int] = field(default_factory=list)

    @property
    def size(self) -> int:
        return len(self.before) + len(self.after)


def tokenize(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    """The ids of a text, with the special tokens that the tokenizer adds, or without any."""
    # Not verbose: its warning about the model's maximum length does not hold here, where rows are cut afterwards.
    return tokenizer(
        text, add_special_tokens=special, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )["input_ids"]


def frame_of(tokenizer: Any, bos: bool | None) -> Frame:
    """What the tokenizer puts around a text, with a BOS forced (True) or kept away (False) on demand."""
    first = [i for name in ("bos_token_id", "cls_token_id") if (i := getattr(tokenizer, name, None)) is not None]
    between = next(
        ([i] for end in ("eos", "sep", "bos") if (i := getattr(tokenizer, f"{end}_token_id", None)) is not None), []
    )
    frame = Frame(between=between)
    # Asking it is surer than its attributes, which some tokenizers have and do not act upon.
    bare, full = tokenize(tokenizer, "a", special=False), tokenize(tokenizer, "a", special=True)
    for at in range(len(full) - len(bare) + 1 if bare else 0):
        if full[at : at + len(bare)] == bare:
            frame.before, frame.after = full[:at], full[at + len(bare) :]
            break
    if bos is False:
        frame.before = [i for i in frame.before if i not in first]
    elif bos and not any(i in first for i in frame.before):
        if not first:
            raise TextError("bos=True, and this tokenizer has neither a BOS nor a CLS token")
        frame.before = [first[0], *frame.before]
    return frame


def pad_id(tokenizer: Any) -> int:
    """What padding is filled with; the mask hides it, so any id that exists will do."""
    known = (getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
    return next((i for i in known if i is not None), 0)


def pad_right(rows: Sequence[list[int]], pad: int) -> tuple[Tensor, Tensor | None]:
    """Ids and mask, both (batch, pos); no mask when the rows are of one length."""
    width = max(map(len, rows))
    if all(len(row) == width for row in rows):
        return torch.tensor(rows, dtype=torch.long), None
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], dtype=torch.long)
    return ids, torch.arange(width) < torch.tensor([[len(row)] for row in rows])


def _filled(rows: list[list[int]]) -> list[list[int]]:
    empty = next((number for number, row in enumerate(rows) if not row), None)
    if empty is not None:
        raise TextError(f"row {empty} of {len(rows)} is empty" if len(rows) > 1 else "the text is empty")
    return rows


def _integers(ids: Tensor) -> Tensor:
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
        raise TextError(f"token ids are integers, and this tensor is {str(ids.dtype).removeprefix('torch.')}")
    return ids.long()


def _as_tensor(values: Any) -> Tensor:
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        kind = type(values).__name__
        raise TextError(f"give a string, a list of strings, or token ids, not this {kind}: {values!r:.80}") from None
