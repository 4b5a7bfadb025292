"""An optimizer whose largest updates are left out, so that what is learned spreads less to where it does not belong.

Source: Sun et al. 2025, "How new data permeates LLM knowledge and how to dilute it", section 6 ("ignore-topk").
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor


class IgnoreTopK(torch.optim.Optimizer):
    r"""Wraps any optimizer: of each step's update the `k` largest entries are taken back, the rest stays.

    The update is :math:`\Delta = \theta_\mathrm{new} - \theta_\mathrm{old}`, what the wrapped optimizer does to the
    weights, momentum, adaptive scaling and weight decay among it, and not the gradient, which Adam would rescale.
    Entries that stay are bit for bit those of the wrapped optimizer. Its state goes on as if nothing had been
    left out.

    Learning-rate schedulers, `torch.amp.GradScaler`, closures and ``state_dict`` work on it as on any optimizer. It
    holds one more copy of the weights that have a gradient during a step. Sharded parameters (DTensor) are refused: the
    largest entries of a shard are not those of the whole.

    Args:
        optimizer: to wrap; use only the wrapper from here on.
        k: share of the entries that are left out, 0 to 1; 0.08 in the paper.
        scope: ``"tensor"`` ranks the entries of each parameter for itself, ``"global"`` those of all together (the
            paper does not say which).
        choice: ``"top"``, or ``"random"`` entries, as many, for a control.
        seed: of the random ones.

    Raises:
        TypeError: what is wrapped is no optimizer, or its parameters are sharded.
        ValueError: a share beyond 0 to 1, or a scope or choice that does not exist.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(4))
        >>> optimizer = IgnoreTopK(torch.optim.SGD([weight], lr=1.0), k=0.25)
        >>> (weight * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
        >>> optimizer.step()
        >>> weight.tolist()
        [-1.0, -2.0, -3.0, 0.0]
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, k: float = 0.08, scope: Literal["tensor", "global"] = "tensor", *,
        choice: Literal["top", "random"] = "top", seed: int = 0,
    ):  # fmt: skip
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"IgnoreTopK wraps an optimizer, such as torch.optim.Adam(...), not {optimizer!r}")
        if not 0 <= k <= 1:
            raise ValueError(f"k={k} is no share of the entries; give a number from 0 to 1, such as 0.08")
        if scope not in ("tensor", "global"):
            raise ValueError(f"scope={scope!r} does not exist; choose 'tensor' or 'global'")
        if choice not in ("top", "random"):
            raise ValueError(f"choice={choice!r} does not exist; choose 'top' or 'random'")
        if any(hasattr(p, "device_mesh") for group in optimizer.param_groups for p in group["params"]):
            raise TypeError("IgnoreTopK ranks whole parameters, and these are sharded (DTensor); wrap them unsharded")
        self.optimizer, self.k, self.scope, self.choice = optimizer, k, scope, choice
        self._generator = torch.Generator().manual_seed(seed)
        super().__init__([dict(group) for group in optimizer.param_groups], optimizer.defaults)
        self._share()

    def _share(self) -> None:
        """Groups and state are the wrapped optimizer's own, so that whoever changes one changes the other."""
        self.param_groups, self.state = self.optimizer.param_groups, self.optimizer.state

    def __repr__(self) -> str:
        return f"IgnoreTopK({self.optimizer!r}, k={self.k}, scope={self.scope!r}, choice={self.choice!r})"

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the wrapped optimizer, less the entries that are left out; returns what its step returns."""
        moving = [
            p for group in self.param_groups for p in group["params"] if p.grad is not None or closure is not None
        ]
        before = [p.detach().clone() for p in moving]
        result = self.optimizer.step() if closure is None else self.optimizer.step(closure)
        with torch.no_grad():
            if self.scope == "tensor":
                for p, old in zip(moving, before, strict=True):
                    self._take_back([p], [old])
            elif moving:
                self._take_back(moving, before)
        return result

    def _take_back(self, moved: list[Tensor], before: list[Tensor]) -> None:
        sizes = [p.numel() for p in moved]
        count = int(self.k * sum(sizes) + 1e-9)
        if not count:
            return
        if self.choice == "random":
            left_out = torch.randperm(sum(sizes), generator=self._generator)[:count]
        else:
            # Parameters may be of several dtypes and devices; float32 on one of these ranks them all.
            size = [(p - old).abs().float().flatten().to(moved[0].device) for p, old in zip(moved, before, strict=True)]
            left_out = torch.cat(size).topk(count, sorted=False).indices
        start = 0
        for p, old, size in zip(moved, before, sizes, strict=True):
            here = left_out[(left_out >= start) & (left_out < start + size)].to(p.device) - start
            mask = torch.zeros(size, dtype=torch.bool, device=p.device).index_fill(0, here, True).view_as(p)
            p.copy_(torch.where(mask, old, p))
            start += size

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As of the wrapped optimizer."""
        if self.param_groups is self.optimizer.param_groups:
            self.optimizer.add_param_group(param_group)
        else:  # while the base class is being made, whose own list `_share` replaces
            super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's, with the state of the random choice under ``"ignore_topk"``."""
        return {**self.optimizer.state_dict(), "ignore_topk": {"generator": self._generator.get_state()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes a state of its own kind, or one of the wrapped optimizer alone."""
        rest = dict(state_dict)
        own = rest.pop("ignore_topk", None)
        self.optimizer.load_state_dict(rest)
        self._share()
        if own is not None:
            self._generator.set_state(own["generator"])
