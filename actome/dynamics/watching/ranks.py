"""Several processes that train one network: who writes, and what they have to agree upon."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from actome.core.errors import RunError

T = TypeVar("T")


class Ranks:
    """The processes of `torch.distributed`, or this one alone.

    Attributes:
        rank, count: which of how many.
        first: whether this is the one that writes.
    """

    def __init__(self) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.rank, self.count = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
        self.first = self.rank == 0

    @classmethod
    def only(cls) -> Ranks:
        """This process by itself, whatever others there are."""
        one = cls()
        one.rank, one.count, one.first = 0, 1, True
        return one

    @property
    def alone(self) -> bool:
        return self.count == 1

    def tell(self, what: T) -> T:
        """What the first of them says, to all."""
        if self.alone:
            return what
        told: list[Any] = [what]
        dist.broadcast_object_list(told, src=0)
        return told[0]

    def first_does(self, act: Callable[[], T]) -> T | None:
        """Lets the first do something; when that fails, all fail with it, and none waits for it in vain."""
        error, made = None, None
        if self.first:
            try:
                made = act()
            except Exception as caught:
                if self.alone:
                    raise
                error = caught
        said = self.tell(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        if said is not None:
            raise RunError(f"the first process could not go on: {said}")
        return made

    def mean(self, values: Tensor, device: torch.device) -> Tensor:
        """The mean over processes of a tensor of one shape in all of them, on the CPU."""
        if self.alone:
            return values
        # A backend of one device takes tensors of that device only.
        values = values.to(device if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(values)
        return (values / self.count).cpu()
