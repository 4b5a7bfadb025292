"""Where the first number that is none comes from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from actome.core.load import wrap
from actome.core.model import Model
from actome.core.sites import Site
from actome.core.taps import StopForward

from .untouched import untouched


class _Found(StopForward):
    """Ends the forward once something was found."""


def first_non_finite(
    model: Model | nn.Module, batch: Any, *, weights: Mapping[str, Tensor] | None = None
) -> tuple[str, int] | None:
    """The first site, in the order of the forward, whose activations are not all finite.

    The forward is made in evaluation mode without gradients, and leaves no trace in the module. Scores and logits may
    hold -inf where nothing may be seen or said; that is not counted.

    Args:
        model: a `Model`, or any module: one without named sites is looked through module by module.
        batch: what the forward takes: token ids, a dict of arguments, a tensor of numbers.
        weights: other values for some of the parameters, by name, such as those before the last step.

    Returns:
        The site's name and how many of its activations are NaN or infinite; None when all are finite.

    >>> import actome as ac
    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> net[2].bias.data[1] = torch.nan
    >>> first_non_finite(net, torch.ones(5, 2))
    ('module:2', 5)
    """
    found = search(model if isinstance(model, Model) else wrap(model), batch, weights)
    return None if found is None else (found.site.name, found.count)


class Lost(NamedTuple):
    """Where numbers were lost.

    Attributes:
        site: the first site.
        count, share: how many of its activations are not finite, and which share of all.
    """

    site: Site
    count: int
    share: float


def search(model: Model, batch: Any, weights: Mapping[str, Tensor] | None = None) -> Lost | None:
    """`first_non_finite`, with the site itself and the share of it."""
    found: list[Lost] = []

    def look(site: Site) -> Any:
        spared = site.name == "logits" or site.name.endswith(".scores")

        def see(x: Tensor) -> None:
            count = _count(x, spared)
            if count:
                found.append(Lost(site, count, count / x.numel()))
                raise _Found

        return see

    # Modules of a plain network are tapped at their output, so that what a container holds comes before it.
    taps: list[Any] = [(site.address, look(site), "read") for site in model.sites()]
    arguments, _, _ = model.arguments(batch)
    with untouched(model.module), model.tap(taps), contextlib.suppress(_Found):
        if weights:
            torch.func.functional_call(model.module, dict(weights), (), arguments)
        else:
            model.module(**arguments)
    return found[0] if found else None


def non_finite(tensors: Iterable[tuple[str, Tensor | None]]) -> Iterator[tuple[str, int]]:
    """Of named tensors those that hold a NaN or an infinity, and how many.

    >>> list(non_finite({"a": torch.ones(2), "b": torch.tensor([1.0, torch.nan])}.items()))
    [('b', 1)]
    """
    for name, tensor in tensors:
        if tensor is not None and (count := _count(tensor.coalesce().values() if tensor.is_sparse else tensor, False)):
            yield name, count


def _count(x: Tensor, spared: bool) -> int:
    """How many entries are NaN or infinite; -inf not counted where it is `spared`."""
    if not x.is_floating_point() and not x.is_complex():
        return 0
    bad = x.isnan() | (x == torch.inf) if spared else ~x.isfinite()
    return int(bad.sum())
