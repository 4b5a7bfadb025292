"""Prompts with their responses as rows of ids that remember where each response stands: what several measures read.

Letters: B batch, T position.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.errors import MeasureError
from ..core.tokens import Batch, encode, frame_of, pad_id, pad_right, tokenize

# Texts, or rows of token ids; a tensor (n, pos) is rows of one length.
Texts = Sequence[str] | Sequence[Sequence[int]] | Sequence[Tensor] | Tensor


@dataclass(frozen=True, eq=False)
class Spans:
    """A batch of rows with a response in each.

    Attributes:
        batch: the rows, padded on the right.
        prompt: (batch) lengths of the prompts.
        response: (batch) lengths of the responses, which follow the prompts directly.
        first: which row of the whole the first one of this batch is.
    """

    batch: Batch
    prompt: Tensor
    response: Tensor
    first: int

    @property
    def before(self) -> Tensor:
        """(batch, pos) bool: the positions from which the response is predicted, one for each of its tokens.

        They run from the last token of the prompt to the last but one of the response.
        """
        position_T = torch.arange(self.batch.ids.shape[1])
        start_B = self.prompt[:, None] - 1
        return (position_T >= start_B) & (position_T < start_B + self.response[:, None])

    @property
    def targets(self) -> Tensor:
        """The tokens of all responses, row by row, (N): those that `before` predicts, in its order."""
        return self.batch.ids[:, 1:][self.before[:, :-1]]

    @property
    def row(self) -> Tensor:
        """Which row each of `targets` belongs to, (N)."""
        return self.before.nonzero()[:, 0]


def spans(prompts: Texts, responses: Texts, tokenizer: Any = None, batch_size: int = 8) -> Iterator[Spans]:
    """Batches of prompts followed by responses.

    Args:
        prompts, responses: texts or token ids, as many of one as of the other. Strings need a tokenizer; the prompt
            gets what the tokenizer puts before a text, and the response nothing.
        batch_size: rows a batch.

    Raises:
        MeasureError: not as many responses as prompts, none at all, or an empty one.

    >>> one = next(spans([[1, 2], [3]], [[4], [5, 6]]))
    >>> one.targets.tolist(), one.row.tolist(), one.before.nonzero().tolist()
    ([4, 5, 6], [0, 1, 1], [[0, 1], [1, 0], [1, 1]])
    """
    first, second = rows_of(prompts, tokenizer, True, "prompt"), rows_of(responses, tokenizer, False, "response")
    if len(first) != len(second):
        raise MeasureError(f"there are {len(first)} prompts and {len(second)} responses; give one response a prompt")
    if batch_size < 1:
        raise MeasureError(f"batch_size={batch_size}; at least one row is needed")
    for at in range(0, len(first), batch_size):
        some = [a + b for a, b in zip(first[at : at + batch_size], second[at : at + batch_size], strict=True)]
        ids, mask = pad_right(some, pad_id(tokenizer))
        yield Spans(
            Batch(ids, mask, tuple(f"#{at + i}" for i in range(len(some))), tuple(range(at, at + len(some)))),
            torch.tensor([len(row) for row in first[at : at + batch_size]]),
            torch.tensor([len(row) for row in second[at : at + batch_size]]),
            at,
        )


def rows_of(texts: Texts, tokenizer: Any, opens: bool, name: str) -> list[list[int]]:
    """Texts or ids as lists of ids, none empty; with what the tokenizer puts before a text if they open a row."""
    if isinstance(texts, str) or not len(texts):
        raise MeasureError(f"give a list of {name}s, at least one, not {texts!r:.60}")
    if isinstance(texts[0], str):
        if tokenizer is None:
            raise MeasureError(f"the {name}s are text and there is no tokenizer; give token ids")
        before = frame_of(tokenizer, None).before if opens else []
        rows = [before + tokenize(tokenizer, text, special=False) for text in texts]
    else:
        rows = [encode(row).ids[0].tolist() if len(row) else [] for row in texts]
    empty = next((i for i, row in enumerate(rows) if not row), None)
    if empty is not None:
        raise MeasureError(f"{name} {empty} of {len(rows)} is empty; every {name} needs at least one token")
    return rows
