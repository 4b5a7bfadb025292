"""Several sampled continuations of each prompt: what outcomes and actions are counted from."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import MeasureError
from .tokens import encode

if TYPE_CHECKING:
    from .model import Model

# Said outright, or the penalties and cuts of a model's own generation configuration would hold.
_PLAIN = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
_WHOLE = {"do_sample": True, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0}

# What a whole continuation comes to: an answer, an action, a class; None where none can be read.
Outcome = Callable[[Any], Hashable]


def continuations(
    model: Model,
    prompts: Any,
    samples: int,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    stop: int | Sequence[int] | None = None,
    batch_size: int = 64,
    seed: int = 0,
) -> list[list[list[int]]]:
    """Samples from the model's whole distribution, without the cuts and penalties of its generation configuration.

    Prompts of one length share a forward and none is padded, so that clamps with ``positions=`` mean the same token in
    all of them. Clamps that are active apply. The caller's random state stays as it is.

    Args:
        model: any model that generates by itself (no encoder-decoder).
        prompts: texts or token ids, one or several.
        samples: continuations of each prompt.
        max_new_tokens: at most so long.
        temperature: of the sampling; 0 takes the likeliest token.
        stop: ids that end a continuation; those of the model's generation configuration unless given.
        batch_size: rows a forward.
        seed: of the draws; the same seed and batch size give the same continuations.

    Returns:
        For each prompt, `samples` lists of new ids, the one that ended it included.

    Raises:
        MeasureError: counts below one, a negative temperature, or an encoder-decoder.

    >>> import actome as ac
    >>> found = continuations(ac.demo(), ["import ", "def f("], samples=3, max_new_tokens=4)
    >>> len(found), len(found[0]), max(len(row) for row in found[0])
    (2, 3, 4)
    """
    if min(samples, max_new_tokens, batch_size) < 1 or temperature < 0:
        raise MeasureError(
            f"samples={samples}, max_new_tokens={max_new_tokens} and batch_size={batch_size} must be 1 at least and "
            f"temperature={temperature} not negative"
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise MeasureError(f"{model.name} is an encoder-decoder; continuations are of models that read what they write")
    ends = stops(model, stop)
    options: dict[str, Any] = {"eos_token_id": sorted(ends)} if ends else {}
    options |= _PLAIN | (_WHOLE | {"temperature": float(temperature)} if temperature else {})
    rows = rows_of(model, prompts)
    by_length: dict[int, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        by_length[len(row)] += [i] * samples
    found: list[list[list[int]]] = [[] for _ in rows]
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        for length, owners in by_length.items():
            for at in range(0, len(owners), batch_size):
                part = owners[at : at + batch_size]
                ids = torch.tensor([rows[i] for i in part])
                out = model.generate(ids, max_new_tokens=max_new_tokens, **options).ids[:, length:]
                for i, new in zip(part, out.tolist(), strict=True):
                    found[i].append(_until(new, ends))
    return found


def rows_of(model: Model, prompts: Any) -> list[list[int]]:
    """The ids of each prompt, without padding."""
    batch = encode(prompts, model.tokenizer)
    if batch.mask is None:
        return batch.ids.tolist()
    return [row[real].tolist() for row, real in zip(batch.ids, batch.mask, strict=True)]


def stops(model: Model, stop: int | Sequence[int] | None) -> frozenset[int]:
    """The ids that end a continuation: those given, else those that the model's generation configuration names."""
    if stop is None:
        stop = getattr(getattr(model.module, "generation_config", None), "eos_token_id", None)
    if stop is None:
        return frozenset()
    return frozenset([stop] if isinstance(stop, int) else (int(one) for one in stop))


def outcome_of(model: Model, outcome: Outcome, ids: Sequence[int] | Tensor, as_text: bool) -> Hashable:
    """What a continuation comes to: `outcome` of its text, or of its ids as a list.

    Raises:
        MeasureError: an outcome that cannot be counted, such as a list or a tensor.
    """
    ids = [int(one) for one in ids]
    found = outcome(model.tokenizer.decode(ids, skip_special_tokens=True) if as_text else ids)
    if isinstance(found, Tensor) or not isinstance(found, Hashable):
        raise MeasureError(
            f"outcome() gave a {type(found).__name__}, which cannot be counted; give a number, a text or None"
        )
    return found


def is_text(prompts: Any) -> bool:
    """Whether prompts were given as text, so that outcomes are read from text as well."""
    return isinstance(prompts, str) or (
        isinstance(prompts, list | tuple) and bool(prompts) and isinstance(prompts[0], str)
    )


def _until(ids: list[int], ends: frozenset[int]) -> list[int]:
    for i, one in enumerate(ids):
        if one in ends:
            return ids[: i + 1]
    return ids
