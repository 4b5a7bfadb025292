"""A tokenizer of numbered words, so that worlds of tokens can be used where a method takes text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .draw import counts


def numbered(vocab: int) -> Any:
    """A transformers tokenizer in which token i is the word ``"ti"``; `words` writes tokens that way.

    Args:
        vocab: number of tokens. Token 0 pads, and stands for words that are none.

    >>> numbered(8)("t3 t5").input_ids, words([3, 5])
    ([3, 5], 't3 t5')
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    counts(vocab=(vocab, 1))
    tokenizer = Tokenizer(WordLevel({f"t{i}": i for i in range(vocab)}, unk_token="t0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="t0")


def words(tokens: Iterable[Any]) -> str:
    """Tokens as text that `numbered` reads back."""
    return " ".join(f"t{int(one)}" for one in tokens)
