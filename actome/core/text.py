"""Text: what a model is given to read, as batches of token ids that stream from files, folders or datasets."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from .documents import Documents
from .errors import TextError
from .tokens import Batch, encode, frame_of, pad_id, pad_right, tokenize

__all__ = ["Batch", "Counts", "Text", "encode"]

# Rows are no longer than this unless asked: a row costs memory by its length, and attention patterns by its square.
DEFAULT_CONTEXT = 1024

Overlong = Literal["split", "truncate", "error"]
Row = tuple[list[int], str]


@dataclass(slots=True)
class Counts:
    """What one pass over a text has met so far.

    `documents` with text in them; `sequences` and `tokens` (special ones included) in the rows made of them; `empty`
    documents passed over; `binary` files of a folder left out; documents `split` over rows or `truncated`, and the
    `dropped` tokens of the latter; `complete` once the pass reached the end or the limit.
    """

    documents: int = 0
    sequences: int = 0
    tokens: int = 0
    empty: int = 0
    binary: int = 0
    split: int = 0
    truncated: int = 0
    dropped: int = 0
    complete: bool = False


class Text:
    """Text as a stream of batches; iterating tokenises as it goes and holds no more than a document and a batch.

    With ``pack=True`` the documents are joined, with the tokenizer's end-of-text token between two of them (EOS, else
    SEP, else BOS), and cut into rows of exactly `context` tokens; what remains at the end is a shorter row. Without
    packing each document begins a row of its own. Documents that are empty or only whitespace are passed over.

    Special tokens around a row are those that the tokenizer itself puts around a text when it is called, since those
    are what the model was trained with: BOS for Llama or Gemma, none for GPT-2, Pythia or Qwen (although these name
    one), [CLS] and [SEP] for BERT, a closing </s> for T5. ``bos=True`` puts BOS (else CLS) in front of every row
    whatever the tokenizer does; ``bos=False`` puts nothing there.

    Args:
        source: a file, a folder, a glob; an iterable of strings or of (name, text) pairs; a dataset of the `datasets`
            library or a DataFrame; a mapping of names to texts. See `actome.core.documents.Documents`.
        tokenizer: a Hugging Face tokenizer.
        context: the most tokens in a row, special ones included; ``None`` is the tokenizer's `model_max_length`, but
            no more than 1024.
        batch_size: rows in a batch; the last batch may have fewer.
        pack: fill rows with several documents.
        overlong: without packing, what becomes of a document that does not fit a row: ``"split"`` over several rows,
            ``"truncate"`` (counted, see `describe`), or ``"error"``.
        limit: the text ends after this many tokens, special ones included; the last row is cut short there.
        column: which column of a dataset, table or row holds the text.
        encoding: of files.
        bos: see above; ``None`` does as the tokenizer does.

    Raises:
        TextError: for a missing tokenizer or source; while iterating, for text that is empty, not decodable, binary,
            or too long with ``overlong="error"``, and for a generator iterated twice.

    >>> from tokenizers import Tokenizer, models, pre_tokenizers
    >>> from transformers import PreTrainedTokenizerFast
    >>> words = Tokenizer(models.WordLevel({"<end>": 0, "the": 1, "cat": 2, "sat": 3}, unk_token="<end>"))
    >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
    >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")
    >>> for batch in Text([("one", "the cat sat"), ("two", "sat")], tokenizer, context=3):
    ...     print(batch.ids.tolist(), batch.mask, batch.source)
    [[1, 2, 3], [0, 3, 0]] tensor([[ True,  True,  True], [ True,  True, False]]) ('one', 'two')
    """

    def __init__(
        self,
        source: Any,
        tokenizer: Any,
        *,
        context: int | None = None,
        batch_size: int = 8,
        pack: bool = True,
        overlong: Overlong = "split",
        limit: int | None = None,
        column: str | None = None,
        encoding: str = "utf-8",
        bos: bool | None = None,
    ):
        if not callable(tokenizer):
            raise TextError(
                f"text needs a tokenizer, and this is {type(tokenizer).__name__}; pass the model's own, such as "
                "transformers.AutoTokenizer.from_pretrained(...)"
            )
        if overlong not in ("split", "truncate", "error"):
            raise TextError(f"overlong is 'split', 'truncate' or 'error', not {overlong!r}")
        if batch_size < 1:
            raise TextError(f"batch_size is {batch_size}; it must be at least 1")
        self.tokenizer, self.batch_size, self.pack, self.overlong, self.limit = (
            tokenizer, batch_size, pack, overlong, limit,
        )  # fmt: skip
        longest = getattr(tokenizer, "model_max_length", None) or DEFAULT_CONTEXT
        self.context = min(longest, DEFAULT_CONTEXT) if context is None else context
        self._frame = frame_of(tokenizer, bos)
        if self.context <= self._frame.size:
            raise TextError(f"context={self.context} leaves no room beside {self._frame.size} special tokens in a row")
        if limit is not None and limit <= len(self._frame.before):
            raise TextError(f"limit={limit} leaves no room for text")
        self._documents = Documents(source, column, encoding)
        self._counts: Counts | None = None
        self._first, self._step = 0, 1

    def skip(self, sequences: int) -> Text:
        """The same text without its first `sequences` rows, which keep their numbers: how an interrupted run goes on.

        >>> text.skip(writer.done)  # doctest: +SKIP
        """
        if sequences < 0:
            raise TextError(f"cannot skip {sequences} sequences")
        later = copy.copy(self)
        later._first += sequences * self._step
        return later

    def shard(self, index: int, count: int) -> Text:
        """Every `count`-th row, from the `index`-th on: the part of one of `count` workers that share the text."""
        if not 0 <= index < count:
            raise TextError(f"there is no shard {index} of {count}; shards count from 0 to {count - 1}")
        part = copy.copy(self)
        part._first, part._step = self._first + index * self._step, self._step * count
        return part

    def __iter__(self) -> Iterator[Batch]:
        numbered = itertools.islice(enumerate(self._rows()), self._first, None, self._step)
        pad = pad_id(self.tokenizer)
        while rows := list(itertools.islice(numbered, self.batch_size)):
            ids, mask = pad_right([ids for _, (ids, _) in rows], pad)
            yield Batch(ids, mask, tuple(name for _, (_, name) in rows), tuple(number for number, _ in rows))

    def describe(self) -> dict[str, Any]:
        """What this text is, ready for JSON; `counts` are those of the latest pass, ``None`` before the first.

        The counts are of the whole text, also for a part made by `skip` or `shard`.
        """
        name = getattr(self.tokenizer, "name_or_path", None)
        show = self.tokenizer.convert_ids_to_tokens
        return {
            "source": self._documents.label,
            **({"tokenizer": name} if name else {}),
            "context": self.context,
            "packed": self.pack,
            "special": {side: show(getattr(self._frame, side)) for side in ("before", "between", "after")},
            "overlong": "split" if self.pack else self.overlong,
            "limit": self.limit,
            **({"shard": [self._first % self._step, self._step]} if self._step > 1 else {}),
            "counts": asdict(self._counts) if self._counts else None,
        }

    def __repr__(self) -> str:
        packed = "packed" if self.pack else "one document a row"
        return f"Text({self._documents.label}, {packed}, context {self.context}, batch_size {self.batch_size})"

    def _rows(self) -> Iterator[Row]:
        """All rows of the whole text, with special tokens, up to the limit."""
        counts = self._counts = Counts()
        left = self.limit
        for content, name in self._pack(counts) if self.pack else self._lay_out(counts):
            ids = [*self._frame.before, *content, *self._frame.after][:left]
            if left is not None:
                if left <= len(self._frame.before):  # room for no text
                    break
                left -= len(ids)
            counts.sequences += 1
            counts.tokens += len(ids)
            yield ids, name
            if left == 0:
                break
        counts.binary = len(self._documents.binary)
        counts.complete = True
        if not counts.sequences:
            raise TextError(f"there is no text in {self._documents.label}: {_why_empty(counts)}")

    def _tokens(self, counts: Counts) -> Iterator[tuple[str, list[int], bool]]:
        """(name, ids, whether the document ends here) of every piece of every document that has text."""
        begun = False
        for piece in self._documents:
            if not begun and piece.last and not piece.text.strip():
                counts.empty += 1
                continue
            counts.documents += not begun
            begun = not piece.last
            yield piece.name, tokenize(self.tokenizer, piece.text, special=False), piece.last

    def _pack(self, counts: Counts) -> Iterator[Row]:
        room = self.context - self._frame.size
        held: list[int] = []
        names: list[str] = []  # of the documents that `held` has tokens of
        begun = False
        for name, ids, last in self._tokens(counts):
            if not begun and counts.documents > 1:
                held += self._frame.between
            begun = not last
            at, ids = 0, held + ids
            names = names if name in names[-1:] else [*names, name]
            while len(ids) - at >= room:
                yield ids[at : at + room], _joined(names)
                at, names = at + room, [name]
            held = ids[at:]
            names = names if held else []
        if held:
            yield held, _joined(names)

    def _lay_out(self, counts: Counts) -> Iterator[Row]:
        room = self.context - self._frame.size
        held: list[int] = []
        length = 0  # of the document so far
        for name, ids, last in self._tokens(counts):
            length += len(ids)
            # Once the first row of a document is full, truncating needs only the length of the rest.
            held += ids if self.overlong == "split" else ids[: max(0, room - len(held))]
            at = 0
            while self.overlong == "split" and len(held) - at > room:
                yield held[at : at + room], name
                at += room
            held = held[at:]
            if not last:
                continue
            if length > room and self.overlong == "error":
                raise TextError(
                    f"document {name!r} has {length} tokens and a row has room for {room} (context={self.context}); "
                    "use a longer context, overlong='split' or overlong='truncate', or pack=True"
                )
            if length > room and self.overlong == "truncate":
                counts.truncated, counts.dropped = counts.truncated + 1, counts.dropped + length - room
            elif length > room:
                counts.split += 1
            if held:
                yield held, name
            held, length = [], 0


def _joined(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names) if len(names) <= 3 else f"{names[0]} ... {names[-1]} ({len(names)} documents)"


def _why_empty(counts: Counts) -> str:
    if counts.binary and not counts.empty:
        return f"its {counts.binary} files are binary"
    if counts.empty:
        return "it is empty or only whitespace" + (f", and {counts.binary} files are binary" if counts.binary else "")
    return "the tokenizer made no tokens of it" if counts.documents else "it has no documents"
