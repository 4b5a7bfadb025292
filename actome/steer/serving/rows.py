"""Rows: sequences that are decoded together, one token a step, joining and leaving at any step.

A sequence that joins is read by itself first; its keys and values are then laid beside those of the others, padded on
the left. That changes nothing for anybody: keys carry their positions, and what is padded is masked.

Letters: B rows, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache, DynamicLayer

from actome.clamps import Add
from actome.core.clamp import Clamp

if TYPE_CHECKING:
    from collections.abc import Iterator

    from actome.core.model import Model

_GATES = ("positions", "rows", "phase", "steps", "when")


def together(clamps: Sequence[Clamp]) -> bool:
    """Whether clamps do the same at every token, so that each row of a batch may have its own."""
    return all(isinstance(one, Add) and all(getattr(one, gate) is None for gate in _GATES) for one in clamps)


class Rows:
    """A batch of sequences with one cache.

    Args:
        model: the network.
        alone: a batch for one sequence, whose clamps may depend on positions, phases, steps or conditions.

    Attributes:
        clamps: of each row.
        mergeable: whether sequences may join; known when the first one was read. Caches that keep only a window, or a
            state, cannot be laid beside one another.
    """

    def __init__(self, model: Model, alone: bool = False):
        self.model, self.alone = model, alone
        self.clamps: list[list[Clamp]] = []
        self.mergeable = not alone
        self._cache: DynamicCache | None = None
        self._mask_BT = torch.zeros(0, 0, dtype=torch.long, device=model.device)
        self._next_B = torch.zeros(0, dtype=torch.long, device=model.device)
        self._read: tuple[int, ...] | None = None  # of a lone sequence: what `Run` knew after its last forward
        self._context: Any = None

    def __len__(self) -> int:
        return len(self.clamps)

    @torch.inference_mode()
    def join(self, ids: Sequence[int], clamps: Sequence[Clamp]) -> Tensor:
        """Reads a prompt and takes it in; the logits after it, (V)."""
        cache = DynamicCache(config=self.model.config)
        ids_1T = torch.tensor([list(ids)], device=self.model.device)
        mask_1T = torch.ones_like(ids_1T)
        if self.alone:
            self._context, self._read = self._clamped(list(clamps)), None
        with self._context if self.alone else self._clamped(list(clamps)), self._counted():
            logits_V = self._forward(ids_1T, mask_1T, None, cache)[0]
        # With the position that the next token will have.
        next_1 = torch.tensor([len(ids)], device=self.model.device)
        if not len(self):
            self._cache, self._mask_BT, self._next_B = cache, mask_1T, next_1
            self.mergeable = not self.alone and all(type(layer) is DynamicLayer for layer in cache.layers)
        else:
            self._lay_beside(cache, mask_1T)
            self._next_B = torch.cat([self._next_B, next_1])
        self.clamps.append(list(clamps))
        if not self.alone:
            self._context = None  # made anew for the rows that there are now
        return logits_V

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> Tensor:
        """Reads one token of each row; the logits after it, (B, V)."""
        assert self._cache is not None
        ids_B1 = torch.tensor(tokens, device=self.model.device)[:, None]
        self._mask_BT = F.pad(self._mask_BT, (0, 1), value=1)
        if self._context is None:
            alike = all(len(clamps) == 1 and clamps[0] is self.clamps[0][0] for clamps in self.clamps)
            # Where all rows have the same one they need not be told apart.
            some = (
                self.clamps[0]
                if alike
                else [one.at(rows=[row]) for row, clamps in enumerate(self.clamps) for one in clamps]
            )
            self._context = self._clamped(some)
        with self._context, self._counted():
            logits_BV = self._forward(ids_B1, self._mask_BT, self._next_B[:, None], self._cache)
        self._next_B = self._next_B + 1
        return logits_BV

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        """Lets all other rows go."""
        if len(rows) == len(self):
            return
        self.clamps = [self.clamps[row] for row in rows]
        if not self.alone:
            self._context = None
        if not rows:
            self._cache, self._mask_BT = None, self._mask_BT[:0, :0]
            self._next_B = self._next_B[:0]
            return
        assert self._cache is not None
        index = torch.tensor(list(rows), device=self.model.device)
        self._mask_BT, self._next_B = self._mask_BT[index], self._next_B[index]
        empty = int(self._mask_BT.any(0).int().argmax())  # columns that no row needs any more
        self._mask_BT = self._mask_BT[:, empty:]
        for layer in self._cache.layers:
            layer.keys, layer.values = (x[index, :, empty:] for x in (layer.keys, layer.values))

    def _lay_beside(self, cache: DynamicCache, mask_1T: Tensor) -> None:
        assert self._cache is not None
        width = max(self._mask_BT.shape[1], mask_1T.shape[1])
        left, new = width - self._mask_BT.shape[1], width - mask_1T.shape[1]
        self._mask_BT = torch.cat([F.pad(self._mask_BT, (left, 0)), F.pad(mask_1T, (new, 0))])
        for mine, other in zip(self._cache.layers, cache.layers, strict=True):
            for name in ("keys", "values"):
                a, b = getattr(mine, name), getattr(other, name)
                setattr(mine, name, torch.cat([F.pad(a, (0, 0, left, 0)), F.pad(b, (0, 0, new, 0))]))

    def _forward(self, ids_BT: Tensor, mask_BT: Tensor, position_BT: Tensor | None, cache: DynamicCache) -> Tensor:
        """The logits of the last position, (B, V)."""
        names = self.model.forward_names
        arguments: dict[str, Any] = {"input_ids": ids_BT, "attention_mask": mask_BT, "past_key_values": cache}
        arguments["use_cache"] = True
        if position_BT is not None and "position_ids" in names:
            arguments["position_ids"] = position_BT
        if "logits_to_keep" in names:
            arguments["logits_to_keep"] = 1
        return self.model.module(**arguments).logits[:, -1].float()

    def _clamped(self, clamps: list[Clamp]) -> Any:
        return self.model.clamp(*clamps, strict=False) if clamps else nullcontext()

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Has a lone sequence's clamps know the phase and the step, among forwards of other batches."""
        if not self.alone:
            yield
            return
        # Within the clamps' context, which forgets what was before it.
        run = self.model.run
        run.reset()
        run.generating = True
        if self._read is not None:
            run.batch, run.length, run.start, run.step = self._read
        try:
            yield
            self._read = (run.batch, run.length, run.start, run.step)
        finally:
            run.generating = False
            run.reset()
