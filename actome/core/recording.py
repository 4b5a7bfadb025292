"""Recording: the tensors that a model's sites carried, in memory or, with the same methods, in a folder on disk."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .errors import RecordingError, SiteError, nearest
from .layout import IMAGE, batch_axis, check_width, layout_of, position_axes, token_major
from .show import in_words, table
from .sites import Site, select

Stacks = Mapping[str, tuple[Tensor, tuple[str, ...]]]


class Recording(Mapping[str, Tensor]):
    """Tensors by site, with what is needed to read them; a mapping from site names to tensors.

    No method changes a recording; `to` and `batches` give new ones, which may share memory with it.

    Args:
        tensors: by site; a site that is part of a stack may be left out.
        dims: for each site the words of its dims; their order is the order of the sites.
        tokens: (batch, pos) int64, the ids that were read, or ``None`` for models that read something else.
        mask: (batch, pos) bool, False where a row is padded; ``None`` when every token is real.
        source: for each row, the name of what it was read from.
        numbers: for each row, its running number in the text; counts from 0 unless given.
        prompt_length: for each row, how many of its tokens were given, when the others were generated.
        meta: model, text and whatever else is worth keeping; must go into JSON to be saved.
        stacks: sites that lie in one tensor, by what a pattern calls them:
            ``{"blocks.*.resid.post": (tensor with the layers first, names of the layers' sites)}``.

    >>> recording = Recording({"embed": torch.arange(12.0).view(2, 3, 2)}, {"embed": ("batch", "pos", "d_model")},
    ...                       mask=torch.tensor([[True, True, True], [True, False, False]]))
    >>> recording
    Recording of 2 sequences, 4 tokens, 48 B
      embed  batch 2, pos 3, d_model 2  float32  48 B
    >>> recording.flat("embed")
    tensor([[0., 1.], [2., 3.], [4., 5.], [6., 7.]])
    """

    __slots__ = ("_stacks", "_tensors", "dims", "mask", "meta", "numbers", "prompt_length", "source", "tokens")

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        dims: Mapping[str, tuple[str, ...]],
        tokens: Tensor | None = None,
        mask: Tensor | None = None,
        source: tuple[str, ...] = (),
        numbers: tuple[int, ...] = (),
        *,
        prompt_length: tuple[int, ...] | None = None,
        meta: Mapping[str, Any] | None = None,
        stacks: Stacks | None = None,
    ):
        # Made at every recorded forward: nothing here may cost time.
        self._tensors, self._stacks = tensors, stacks or {}
        self.dims, self.tokens, self.mask = dims, tokens, mask
        self.source, self.numbers, self.prompt_length, self.meta = source, numbers, prompt_length, meta or {}

    @staticmethod
    def open(path: str | os.PathLike[str]) -> Recording:
        """The recording in a folder; its tensors are read when they are asked for.

        Raises:
            RecordingError: when there is none, or when a part of it is missing or damaged; it names the part.
        """
        from .stored import StoredRecording

        return StoredRecording(path)

    # -- what is there ------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[str]:
        return iter(self.dims)

    def __len__(self) -> int:
        return len(self.dims)

    def __contains__(self, name: object) -> bool:
        return name in self.dims

    # A mapping compares its values, which for tensors has no single answer.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def sites(self, pattern: str | None = None) -> tuple[str, ...]:
        """The names of the sites, or of those that a pattern (`*`, `{a..b}`, `{x,y}`) selects."""
        return tuple(self.dims) if pattern is None else tuple(select(pattern, self.dims, self._hint))

    @property
    def n_sequences(self) -> int:
        """How many rows there are."""
        if self.tokens is not None:
            return self.tokens.shape[0]
        name = next(iter(self.dims), None)
        return 0 if name is None else self[name].shape[batch_axis(name, self.dims[name])]

    @property
    def n_tokens(self) -> int:
        """How many real tokens there are; 0 when no site has a position for each token."""
        if self.mask is not None:
            return int(self.mask.sum())
        if self.tokens is not None:
            return self.tokens.numel()
        name = next((name for name, dims in self.dims.items() if layout_of(dims) == "tokens"), None)
        return 0 if name is None else token_major(name, self[name], self.dims[name])[..., :1].shape[:2].numel()

    # -- reading ------------------------------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> Tensor:
        """The tensor of a site in its own dims, padded; for a pattern, those of its sites stacked in front.

        A stack is a view when the sites were recorded into one tensor, and a copy otherwise.

        Raises:
            SiteError: for a name or pattern that matches nothing, with the nearest names.
            RecordingError: for a pattern whose sites disagree in shape.
        """
        if name in self.dims:
            return self._tensor(name)
        if name in self._stacks:
            return self._stacks[name][0]
        if "*" not in name and "{" not in name:
            raise SiteError(f"this recording has no site {name!r}{self._hint(name)}")
        names = self.sites(name)
        for stack, members in self._stacks.values():
            if names[0] in members:
                first = members.index(names[0])
                if members[first : first + len(names)] == names:
                    return stack[first : first + len(names)]
        return _stack(names, self._tensor)

    def get(self, name: str, default: Any = None) -> Any:
        """The tensor of a site, or `default` when the recording does not have it."""
        return self._tensor(name) if name in self.dims else default

    def flat(self, name: str) -> Tensor:
        """The tensor of a site token by token, without padding.

        Returns:
            (tokens, *features), in the order of the rows; (layer, tokens, *features) for a pattern. Heads come after
            the tokens. Sites without positions give (sequences, *features), images (sequences * height * width,
            *features).

        Raises:
            RecordingError: for sites with two position dims, such as attention patterns; use `sequence`.
        """
        if name not in self.dims:
            if "*" in name or "{" in name:
                return _stack(self.sites(name), self.flat)
            return self[name]  # raises
        dims = self.dims[name]
        layout = layout_of(dims)
        if layout == "pairs":
            pairs = ", ".join(dims)
            raise RecordingError(f"{name} has a value for each pair of positions ({pairs}); use sequence(i, {name!r})")
        if layout == "rows":
            axes = [batch_axis(name, dims), *(axis for axis, dim in enumerate(dims) if dim in IMAGE)]
            return self[name].movedim(axes, list(range(len(axes)))).flatten(0, len(axes) - 1)
        x = token_major(name, self[name], dims)
        if self.mask is None:
            return x.flatten(0, 1)
        check_width(name, x.shape[1], self.mask.shape[1])
        return x[self.mask.to(x.device)]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """`flat(name)[start:stop]`, reading no more than that from disk."""
        return self.flat(name)[start:stop]

    def sequence(self, row: int, name: str) -> Tensor:
        """What a site carried in one row, without padding: (pos, *features), or (head, query, key) for pairs.

        Args:
            row: counts the rows of this recording from 0, negative ones from its end.
            name: a site.
        """
        dims, x = self.dims.get(name), self[name]
        if dims is None:
            raise SiteError(f"sequence() takes one site, not the pattern {name!r}")
        x = token_major(name, x, dims)[row]
        if self.mask is None:
            return x
        keep = self.mask[row].nonzero().flatten().to(x.device)
        layout = layout_of(dims)
        if layout == "tokens":
            check_width(name, x.shape[0], self.mask.shape[1])
            return x[keep]
        for axis in position_axes(tuple(dim for dim in dims if dim != "batch")):
            # Attention across sequences or into a cache has a side that the tokens at hand say nothing of.
            if x.shape[axis] == self.mask.shape[1]:
                x = x.index_select(axis, keep)
        return x

    def batches(self, size: int, pattern: str | None = None) -> Iterator[Recording]:
        """Recordings of `size` rows each, in order; of the sites that `pattern` selects, if given."""
        names = self.sites(pattern)
        for start in range(0, self.n_sequences, size):
            yield self._part(names, start, min(start + size, self.n_sequences))

    # -- moving and keeping -------------------------------------------------------------------------------------------

    def to(
        self,
        *targets: torch.dtype | torch.device | str,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Recording:
        """The recording in another dtype, on another device, or both: ``to("cuda")``, ``to(torch.float32)``.

        Integer and bool tensors keep their dtype. A recording on disk is read into memory as a whole.
        """
        for target in targets:
            if isinstance(target, torch.dtype):
                dtype = target
            else:
                device = target

        def moved(x: Tensor) -> Tensor:
            return x.to(device=device, dtype=dtype if x.is_floating_point() else None)

        stacks = {key: (moved(stack), names) for key, (stack, names) in self._stacks.items()}
        stacked = {name for _, names in stacks.values() for name in names}
        return Recording(
            {name: moved(self._tensor(name)) for name in self.dims if name not in stacked},
            self.dims,
            None if self.tokens is None else self.tokens.to(device),
            None if self.mask is None else self.mask.to(device),
            self.source,
            self.numbers,
            prompt_length=self.prompt_length,
            meta=self.meta,
            stacks=stacks,
        )

    def save(
        self, path: str | os.PathLike[str], *, append: bool = False, overwrite: bool = False, **options: Any
    ) -> None:
        """Writes the recording to a folder; see `actome.core.store.Writer` for the options and errors."""
        from .store import Writer

        dims = {name: tuple(dims) for name, dims in self.dims.items()}
        with Writer(path, dims, append=append, overwrite=overwrite, meta=self.meta, **options) as writer:
            for part in self.batches(self._save_rows()):
                writer.add(
                    dict(part), part.tokens, part.mask, part.source, part.numbers, prompt_length=part.prompt_length
                )

    def __repr__(self) -> str:
        sizes = {name: self._size(name) for name in self.dims}
        total = in_words(sum(nbytes for _, _, nbytes in sizes.values()))
        head = f"Recording{self._place()} of {self.n_sequences} sequences, {self.n_tokens} tokens, {total}"
        return "\n  ".join([head, *table(self.dims, sizes)])

    # -- what a recording on disk does differently --------------------------------------------------------------------

    def _tensor(self, name: str) -> Tensor:
        x = self._tensors.get(name)
        if x is None:
            x = next(stack[names.index(name)] for stack, names in self._stacks.values() if name in names)
        return x

    def _size(self, name: str) -> tuple[tuple[int, ...], str, int]:
        x = self._tensor(name)
        return tuple(x.shape), str(x.dtype).removeprefix("torch."), x.nbytes

    def _place(self) -> str:
        return ""

    def _save_rows(self) -> int:
        return max(1, self.n_sequences)

    def _part(self, names: tuple[str, ...], start: int, stop: int) -> Recording:
        def rows(name: str) -> Tensor:
            x = self._tensor(name)
            return x.narrow(batch_axis(name, self.dims[name]), start, stop - start)

        return Recording(
            {name: rows(name) for name in names},
            {name: self.dims[name] for name in names},
            None if self.tokens is None else self.tokens[start:stop],
            None if self.mask is None else self.mask[start:stop],
            self.source[start:stop] if self.source else (),
            self.numbers[start:stop] if self.numbers else tuple(range(start, stop)),
            prompt_length=None if self.prompt_length is None else self.prompt_length[start:stop],
            meta=self.meta,
        )

    def _hint(self, name: str) -> str:
        known = dict.fromkeys(Site(one, ()).local for one in self.dims) if "*" in name else self.dims
        return nearest(name, known) or f"; it has {len(self.dims)}: {', '.join(list(self.dims)[:8])}"


def _stack(names: tuple[str, ...], read: Any) -> Tensor:
    first = read(names[0])
    stack = first.new_empty((len(names), *first.shape))
    for i, name in enumerate(names):
        x = read(name) if i else first
        if x.shape != first.shape or x.dtype != first.dtype:
            raise RecordingError(
                f"{names[0]} is {tuple(first.shape)} {first.dtype} and {name} is {tuple(x.shape)} {x.dtype}; sites of "
                "several shapes cannot be stacked: take them one by one"
            )
        stack[i] = x
    return stack
