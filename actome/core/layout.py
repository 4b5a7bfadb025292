"""Layout: how the dims of a site are laid out token by token, for `Recording.flat` and on disk.

- ``tokens``: one position dim (pos, query or key). Token by token: (tokens, *features).
- ``pairs``: two position dims (attention patterns and scores). One tensor for each sequence, cut to its length.
- ``rows``: no position dim (a classifier's output, an image). Sequence by sequence: (sequences, *rest).
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from .errors import RecordingError

POSITIONS = ("pos", "query", "key")
IMAGE = ("height", "width")

Layout = Literal["tokens", "pairs", "rows"]


def layout_of(dims: tuple[str, ...]) -> Layout:
    """Which of the layouts a site with these dims has.

    >>> layout_of(("batch", "head", "query", "key")), layout_of(("batch", "head", "query", "d_head"))
    ('pairs', 'tokens')
    """
    count = sum(dim in POSITIONS for dim in dims)
    return "rows" if count == 0 else "tokens" if count == 1 else "pairs"


def stored_dims(dims: tuple[str, ...]) -> tuple[str, ...]:
    """The dims of what is stored for a site: `token` or `sequence` first, or no batch for one sequence's pairs.

    >>> stored_dims(("batch", "head", "query", "d_head"))
    ('token', 'head', 'd_head')
    """
    layout = layout_of(dims)
    if layout == "tokens":
        return ("token", *(dim for dim in dims if dim != "batch" and dim not in POSITIONS))
    rest = tuple(dim for dim in dims if dim != "batch")
    return rest if layout == "pairs" else ("sequence", *rest)


def position_axes(dims: tuple[str, ...]) -> list[int]:
    """The axes that count positions."""
    return [axis for axis, dim in enumerate(dims) if dim in POSITIONS]


def batch_axis(name: str, dims: tuple[str, ...]) -> int:
    """Where the batch is; `RecordingError` for a site without one."""
    if "batch" not in dims:
        raise RecordingError(f"{name} has the dims ({', '.join(dims)}), and none of them is the batch")
    return dims.index("batch")


def token_major(name: str, x: Tensor, dims: tuple[str, ...]) -> Tensor:
    """A view with the batch in front, and then the position dim if there is one: (batch, pos, *features)."""
    axes = [batch_axis(name, dims)]
    if layout_of(dims) == "tokens":
        axes += position_axes(dims)
    return x.movedim(axes, list(range(len(axes))))


def from_token_major(x: Tensor, dims: tuple[str, ...]) -> Tensor:
    """The inverse of `token_major`."""
    axes = [dims.index("batch")]
    if layout_of(dims) == "tokens":
        axes += position_axes(dims)
    return x.movedim(list(range(len(axes))), axes)


def check_width(name: str, found: int, wanted: int) -> None:
    """Raises when a site's positions are not those of the tokens, so that the mask says nothing of them."""
    if found != wanted:
        raise RecordingError(
            f"{name} has {found} positions where the tokens have {wanted}, so the tokens' mask does not fit it; record "
            "separately what belongs to other tokens, such as a decoder's sites beside an encoder's, or keys beside "
            "a choice of positions"
        )
