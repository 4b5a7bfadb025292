"""Tokens as text while they come: no half characters, and nothing of a stop string is given out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_HALF = "\N{REPLACEMENT CHARACTER}"


class Decoder:
    """Turns token ids into text, piece by piece.

    Args:
        tokenizer: a transformers tokenizer.
        stop: texts at which to end; they are not part of the text.

    Attributes:
        stopped: whether a stop string has come.

    >>> import actome as ac
    >>> tokenizer = ac.demo().tokenizer
    >>> decoder = Decoder(tokenizer, stop=["return"])
    >>> "".join(decoder.push(i) for i in tokenizer(" a b return c", add_special_tokens=False)["input_ids"])
    ' a b '
    >>> decoder.stopped
    True
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()):
        self._tokenizer, self._stop = tokenizer, [text for text in stop if text]
        self._ids: list[int] = []
        self._settled = 0  # ids whose text is whole and given over to `_waiting`
        self._waiting = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that is certain after one more token; empty while a character or a stop string may be unfinished."""
        if self.stopped:
            return ""
        self._ids.append(token)
        # A few tokens of context, since some tokenizers write a token otherwise at the beginning.
        start = max(self._settled - 4, 0)
        before = self._text(start, self._settled)
        now = self._text(start, len(self._ids))
        if now.endswith(_HALF) and len(self._ids) - self._settled < 8:
            return ""
        self._waiting += now[len(before) :]
        self._settled = len(self._ids)
        return self._release(final=False)

    def finish(self) -> str:
        """What was held back, when no more tokens come."""
        if self.stopped:
            return ""
        start = max(self._settled - 4, 0)
        self._waiting += self._text(start, len(self._ids))[len(self._text(start, self._settled)) :]
        self._settled = len(self._ids)
        return self._release(final=True)

    def _text(self, start: int, end: int) -> str:
        return self._tokenizer.decode(self._ids[start:end], skip_special_tokens=True)

    def _release(self, final: bool) -> str:
        places = [at for stop in self._stop if (at := self._waiting.find(stop)) >= 0]
        if places:
            out, self._waiting, self.stopped = self._waiting[: min(places)], "", True
            return out
        held = 0 if final else max((_overlap(self._waiting, stop) for stop in self._stop), default=0)
        cut = len(self._waiting) - held
        out, self._waiting = self._waiting[:cut], self._waiting[cut:]
        return out


def _overlap(text: str, stop: str) -> int:
    """How much of the end of `text` may be the beginning of `stop`.

    >>> _overlap("the re", "return"), _overlap("the", "return")
    (2, 0)
    """
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
