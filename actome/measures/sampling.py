"""Every n-th token of each row, for measures too dear to take at all of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..core.errors import MeasureError
from ..core.measure import Tokens


class Sample(NamedTuple):
    """Tokens taken out of a batch.

    Attributes:
        x: (token, unit), the activations of those taken.
        row: (token), which row of the batch each comes from.
    """

    x: Tensor
    row: Tensor


def sampled(kept: Tokens, mask_BT: Tensor | None, every: int, start: int = 0) -> Sample:
    """The tokens at positions s, s + n, s + 2n, ... of each row, counted from its first real token.

    Which tokens are taken depends on their positions alone, so it is the same however the text is cut into batches and
    on whichever side it is padded. Tokens left out for a non-finite unit are not replaced by their neighbours.

    >>> from actome.core.measure import real_tokens
    >>> x = torch.arange(5.0).view(1, 5, 1)
    >>> sampled(real_tokens(x), None, 2).x.flatten()
    tensor([0., 2., 4.])
    """
    return taken(kept.x, kept.keep, mask_BT, every, start)


def taken(x_BTU: Tensor, keep_BT: Tensor | None, mask_BT: Tensor | None, every: int, start: int = 0) -> Sample:
    """The same of any tensor and of the tokens that `keep_BT` names, ``None`` for all."""
    if keep_BT is None:
        x_BTU = x_BTU[:, start::every]
        row_B = torch.arange(len(x_BTU), device=x_BTU.device)
        return Sample(x_BTU.flatten(0, 1), row_B.repeat_interleave(x_BTU.shape[1]))
    if every > 1 or start:
        at_BT = torch.arange(x_BTU.shape[1], device=x_BTU.device) if mask_BT is None else mask_BT.long().cumsum(-1) - 1
        keep_BT = keep_BT & (at_BT >= start) & ((at_BT - start) % every == 0)
    row, at = keep_BT.nonzero(as_tuple=True)
    return Sample(x_BTU[row, at], row)


def every_nth(x_BT: Tensor, mask_BT: Tensor | None, every: int) -> Tensor:
    """A tensor (batch, pos, ...) or the mask itself at every n-th position, counted from each row's first real token.

    Where rows are padded on the left, those of the mask that lie beyond the end are False.

    >>> mask = torch.tensor([[False, True, True, True]])
    >>> every_nth(torch.arange(4)[None], mask, 2).tolist(), every_nth(mask, mask, 2).tolist()
    ([[1, 3]], [[True, True]])
    """
    if every == 1 or mask_BT is None:
        return x_BT[:, ::every]
    length = mask_BT.shape[1]
    at_BT = mask_BT.long().argmax(1, keepdim=True) + torch.arange(0, length, every, device=mask_BT.device)
    taken_BT = x_BT[torch.arange(len(x_BT), device=x_BT.device)[:, None], at_BT.clamp(max=length - 1)]
    return taken_BT & (at_BT < length) if x_BT is mask_BT else taken_BT


def checked_every(every: int) -> int:
    """The option `every` of a measure, proved to be a step.

    >>> checked_every(0)
    Traceback (most recent call last):
    actome.core.errors.MeasureError: every is 0; give a whole number of tokens from 1 on
    """
    if not isinstance(every, int) or every < 1:
        raise MeasureError(f"every is {every!r}; give a whole number of tokens from 1 on")
    return every
