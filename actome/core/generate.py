"""Generation with the key-value cache, under clamps and with recording, prompt and generated tokens told apart."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import SiteError, TextError
from .recording import Recording
from .sites import TIME_DIMS, axis_of

if TYPE_CHECKING:
    from .model import Model


@dataclass(frozen=True)
class Generation:
    """What was generated.

    Attributes:
        ids: (batch, pos) prompt and new tokens; prompts shorter than the longest are padded on the left.
        text: the new tokens of each row as text, or ``None`` without a tokenizer.
        prompt_length: positions that the prompt takes, padding included.
        recording: the recorded sites over prompt and generated tokens, or ``None``. The newest token has been
            chosen but not yet read by the model, so positions run to the one before it.
    """

    ids: Tensor
    prompt_length: int
    text: list[str] | None = None
    recording: Recording | None = field(default=None, repr=False)

    @property
    def new(self) -> Tensor:
        """(batch, new) the generated ids alone."""
        return self.ids[:, self.prompt_length :]

    def __str__(self) -> str:
        return "\n".join(self.text) if self.text is not None else str(self.new.tolist())


class _Chunks:
    """What one site gave, forward after forward."""

    def __init__(self, dims: tuple[str, ...]):
        self.dims = dims
        self.parts: list[Tensor] = []

    def __call__(self, x: Tensor) -> None:
        self.parts.append(x.detach().clone())

    def whole(self) -> Tensor:
        dims = self.dims
        time = axis_of(dims, TIME_DIMS)
        if time is None:
            # Keys and values come with the cache: the last forward has them all.
            return self.parts[-1] if "key" in dims else torch.stack(self.parts)
        parts = self.parts
        if "key" in dims:
            # A row of a pattern is as long as what could be seen then; the rest of it is zero.
            widest = parts[-1].shape[-1]
            fill = float("-inf") if parts[0].min() < -1e4 else 0.0
            parts = [F.pad(part, (0, widest - part.shape[-1]), value=fill) for part in parts]
        return torch.cat(parts, dim=time)


def _prompt_lengths(mask: Tensor | None, length: int, rows: int) -> tuple[int, ...]:
    return (length,) * rows if mask is None else tuple(mask.sum(dim=1).tolist())


def generate(
    model: Model,
    prompt: Any,
    max_new_tokens: int = 20,
    *,
    record: str | Sequence[str] | None = None,
    seed: int | None = None,
    **options: Any,
) -> Generation:
    """Generates text with transformers' own `generate`: greedy unless told otherwise.

    Clamps that are active apply to every forward; their gates tell prompt and generated tokens apart
    (``phase="generated"``), count steps (``steps=range(1, 4)``) and positions over the whole sequence.

    Args:
        prompt: text, a list of texts (padded on the left), or token ids (pos) or (batch, pos).
        max_new_tokens: how many tokens at most.
        record: sites to record over prompt and generated tokens; ``recording.meta["prompt_length"]`` says where the
            generated ones begin.
        seed: for sampling.
        options: anything that ``transformers.GenerationMixin.generate`` takes, such as ``do_sample=True``.

    Returns:
        A `Generation`; ``str()`` of it is the new text.

    Raises:
        SiteError: the model cannot generate.
        TextError: more tokens than the model has learned positions for.

    Example:
        >>> import actome as ac
        >>> model = ac.demo()
        >>> out = model.generate("import ", max_new_tokens=4, record="blocks.0.resid.post")
        >>> out.new.shape[1] <= 4, out.recording.meta["prompt_length"] == out.prompt_length
        (True, True)
    """
    module = model.module
    if not getattr(module, "can_generate", lambda: False)():
        raise SiteError(f"{type(module).__name__} cannot generate; load a class with a language-model head")
    arguments, ids, mask = model.arguments(prompt, padding="left")
    if ids is None:
        raise TextError("generate() takes text, a list of texts, or integer token ids of shape (pos) or (batch, pos)")
    if not getattr(model.config, "is_encoder_decoder", False):
        # The last one is not read again.
        model.check_length(ids.shape[1] + max_new_tokens - 1)
    for name in ("use_cache", "position_ids", "decoder_input_ids", "decoder_attention_mask"):
        arguments.pop(name, None)
    if "attention_mask" not in arguments and "input_ids" in arguments:
        # Said outright, so that transformers need not guess it from the padding id.
        arguments["attention_mask"] = torch.ones_like(arguments["input_ids"])
    if "pad_token_id" not in options and getattr(module.generation_config, "pad_token_id", None) is None:
        end = getattr(module.generation_config, "eos_token_id", None)
        options["pad_token_id"] = end[0] if isinstance(end, list) else end if end is not None else 0
    options.setdefault("do_sample", False)
    sites = model.match(record) if record is not None else ()
    chunks = {site.name: _Chunks(site.dims) for site in sites}
    for site in sites:
        if not site.dims:
            raise SiteError(f"{site.name}: sites of plain modules cannot be recorded while generating")
    taps: list[Any] = [(site.address, chunks[site.name], "read") for site in sites]
    if seed is not None:
        torch.manual_seed(seed)
    # Steps and phases are counted only when somebody asks for them: this recording, or a clamp around us.
    watched = model.tap(taps, track=True) if taps else nullcontext()
    with watched, model.run.generation(), torch.no_grad():
        out = module.generate(**arguments, max_new_tokens=max_new_tokens, **options)
    out = out if isinstance(out, Tensor) else out.sequences
    encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
    length = 1 if encoder_decoder else ids.shape[1]
    recording = None
    if sites:
        tensors = {name: chunk.whole() for name, chunk in chunks.items()}
        read = out[:, :-1]
        full = None
        if mask is not None and not encoder_decoder:
            full = torch.cat([mask, mask.new_ones(len(out), read.shape[1] - length)], dim=1)
        recording = Recording(
            tensors,
            {site.name: site.dims for site in sites},
            tokens=read,
            mask=full,
            prompt_length=_prompt_lengths(mask, length, len(out)),
            meta={"model": model.name, "prompt_length": length},
        )
    text = None
    if model.tokenizer is not None:
        text = [model.tokenizer.decode(row, skip_special_tokens=True) for row in out[:, length:]]
    return Generation(out, length, text, recording)
