"""One dial from rich to lazy training: the scale of a network's output around its start."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


class OutputScale(nn.Module):
    r"""Trains any network at a chosen richness: :math:`F = \alpha\,(f - f_0)`, with :math:`f_0` the network as it was.

    At a large :math:`\alpha` tiny changes of the weights fit the data, so that features stay what they were (lazy); at
    a small one they have to move (rich). Three things belong together, and this class has all of them: the scale, the
    subtraction of the start (otherwise :math:`\alpha` only makes the initial error larger), and a loss divided by
    :math:`\alpha^2` (`loss`), without which a larger :math:`\alpha` is also a larger learning rate. The last holds for
    plain gradient descent; Adam does not see the scale of a loss, so lower its rate by :math:`\alpha` instead.

    Args:
        model: the network; it is trained in place, as `model`. Its output is a tensor, or has ``.logits``.
        alpha: the scale, above 0.

    Attributes:
        model: as given; start: a frozen copy of it, always in evaluation mode and without a part in `parameters`.

    Source: Chizat, Oyallon and Bach 2019, On Lazy Training in Differentiable Programming; as the cause of grokking,
    Kumar et al. 2024, Grokking as the Transition from Lazy to Rich Training Dynamics.

    >>> net = OutputScale(nn.Linear(3, 1), alpha=8.0)
    >>> net(torch.ones(2, 3)).tolist()
    [[0.0], [0.0]]
    >>> float(net.loss(torch.tensor(64.0)))
    1.0
    """

    def __init__(self, model: nn.Module, alpha: float):
        super().__init__()
        if not 0 < alpha < float("inf"):
            raise ValueError(f"alpha={alpha}: give a positive number; 1 is the network itself less its start")
        if not isinstance(model, nn.Module):
            raise TypeError(f"OutputScale takes an nn.Module, not {type(model).__name__}; of a Model give its .module")
        self.model, self.alpha = model, float(alpha)
        self.start = copy.deepcopy(model).eval().requires_grad_(False)

    def train(self, mode: bool = True) -> OutputScale:
        """As of any module, except that the start never leaves evaluation mode."""
        super().train(mode)
        self.start.eval()
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The scaled change of the output; of an object with ``.logits``, that object with them exchanged."""
        out = self.model(*args, **kwargs)
        with torch.no_grad():
            before = self.start(*args, **kwargs)
        if isinstance(out, Tensor):
            return self.alpha * (out - before)
        if not isinstance(getattr(out, "logits", None), Tensor):
            raise TypeError(f"{type(self.model).__name__} gives {type(out).__name__}: neither a tensor nor logits")
        out = copy.copy(out)
        out.logits = self.alpha * (out.logits - before.logits)
        return out

    def loss(self, value: Tensor) -> Tensor:
        r"""A loss of the scaled output, divided by :math:`\alpha^2`, for the backward pass."""
        return value / self.alpha**2
