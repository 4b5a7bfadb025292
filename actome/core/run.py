"""What a tap knows of the forward that it stands in: which tokens, which phase, which step.

Positions are counted within a row from its first real token, so padding on either side changes nothing; negative ones
count back from the last real token of the forward at hand (while generating: from the newest token).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Positions = int | slice | range | Iterable[int] | Tensor | None


class Run:
    """The state of the current forward, refreshed by a pre-hook on the root module.

    Attributes:
        batch, length: the shape of the tokens of this forward.
        start: how many tokens of each row the cache already holds.
        step: 0 for the prompt, k for the forward that reads the k-th generated token.
        phase: ``"prompt"`` or ``"generated"``.
        mask: (batch, start + length) bool, or ``None`` when every token is real.
        source: the mask of an encoder's tokens beside a decoder; that of the tokens themselves without a decoder.
    """

    __slots__ = ("_offset", "batch", "generating", "length", "mask", "source", "start", "step")

    def __init__(self) -> None:
        self.generating = False
        self.reset()

    def reset(self) -> None:
        """Forgets the last forward."""
        self.batch = self.length = self.start = self.step = 0
        self.mask: Tensor | None = None
        self.source: Tensor | None = None
        self._offset: Tensor | None = None

    @contextmanager
    def generation(self) -> Iterator[None]:
        """For the time of one generation: its first forward reads the prompt, each later one a generated token."""
        self.reset()
        self.generating = True
        try:
            yield
        finally:
            self.generating = False
            self.reset()

    @property
    def phase(self) -> str:
        return "generated" if self.step else "prompt"

    def begin(self, ids: Tensor | None, mask: Tensor | None, start: int) -> None:
        """Takes in the arguments of a forward; `mask` covers cached and new tokens."""
        if ids is not None:
            self.batch, self.length = ids.shape[0], ids.shape[1] if ids.ndim > 1 else 1
        if self.generating:
            self.step = self.step + 1 if start else 0
        self.start = start
        padded = mask is not None and mask.ndim == 2 and not bool(mask.all())
        self.mask = mask.bool() if padded else None
        self._offset = None

    def where(self, positions: Any, length: int, device: torch.device) -> Tensor | list[int] | None:
        """Which of `length` tokens a choice of positions means.

        Args:
            positions: int, slice, range, list of ints, a bool tensor (batch, pos), or ``None`` for all.
            length: positions of the tensor at hand; fewer than the forward's when only the last are there.

        Returns:
            ``None`` for all of them; a list of indices when all rows agree; else a bool tensor (batch, length).
        """
        if positions is None:
            return None
        if isinstance(positions, Tensor) and positions.dtype == torch.bool:
            return positions.to(device)
        start, total = self.start + self.length - length, self.start + self.length
        if self.mask is None:
            # In a lone chunk of tokens every row has the same positions; rows start at zero.
            return [p - start for p in absolute(positions, total) if start <= p < total]
        if self._offset is None:
            self._offset = self.mask.int().argmax(dim=1)
        mask = self.mask[:, start:total]
        place = torch.arange(start, total, device=mask.device) - self._offset[:, None]
        hit = torch.zeros_like(mask)
        counts = self.mask.sum(dim=1)
        for count in counts.unique().tolist():
            chosen = torch.tensor(absolute(positions, int(count)), dtype=torch.long, device=mask.device)
            hit |= torch.isin(place, chosen) & (counts == count)[:, None]
        return (hit & mask).to(device)

    def where_in_source(self, positions: Any, length: int, device: torch.device) -> Tensor | list[int]:
        """The same for `length` tokens of an encoder, which sees all of them at once and has its own padding."""
        source = Run()
        source.length, mask = length, self.source
        if mask is not None and mask.shape[1] == length and not bool(mask.all()):
            source.mask = mask.bool()
        found = source.where(positions, length, device)
        assert found is not None
        return found


def absolute(positions: Positions, total: int) -> list[int]:
    """The positions as ascending non-negative indices below `total`; those outside are left out.

    >>> absolute(-1, 5), absolute(slice(3, None), 5), absolute([0, 9], 5)
    ([4], [3, 4], [0])
    """
    if isinstance(positions, int):
        positions = (positions,)
    elif isinstance(positions, slice):
        positions = range(*positions.indices(total))
    elif isinstance(positions, Tensor):
        positions = positions.tolist()
    resolved = {int(p) + total if p < 0 else int(p) for p in positions}
    return sorted(p for p in resolved if 0 <= p < total)


def track(root: nn.Module, run: Run) -> Any:
    """Keeps `run` up to date from the root module's arguments; returns the hook's handle."""

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Beside an encoder it is the decoder's tokens that are counted, cached and generated.
        names = ("decoder_input_ids", "decoder_inputs_embeds", "input_ids", "inputs_embeds")
        name = next((name for name in names if kwargs.get(name) is not None), "")
        ids = kwargs.get(name)
        if ids is None and args and isinstance(args[0], Tensor):
            ids = args[0]
        mask = kwargs.get("decoder_attention_mask" if name.startswith("decoder") else "attention_mask")
        source = kwargs.get("attention_mask")
        run.source = source if isinstance(source, Tensor) and source.ndim == 2 else None
        cache = kwargs.get("past_key_values")
        start = int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0
        if not start and run.generating:
            # State-space models keep no keys; what was read so far is what we counted.
            start = run.start + run.length if run.batch else 0
        if mask is not None and ids is not None and mask.shape[-1] != start + ids.shape[1]:
            mask = None
        run.begin(ids, mask, start)

    return root.register_forward_pre_hook(before, with_kwargs=True)
