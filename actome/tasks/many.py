"""Many small networks trained at once: R perceptrons as one batched matrix product a layer.

What takes a loop minutes, such as a hundred runs of one recipe to see how much they differ, takes seconds.

Letters: R run, B row of a batch, N row of a set, I unit in, O unit out.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .losses import TrainingError
from .nets import MLP


class ManyMLPs(nn.Module):
    """R perceptrons of one shape, each with the weights of the `MLP` of its seed; their outputs are (run, row, output).

    Attributes:
        weight, bias: one stacked parameter a layer, (run, out, in) and (run, 1, out).

    Args:
        widths, act: as `MLP`.
        seeds: of the initial weights, one a run; the same seed twice gives two copies.

    >>> many = ManyMLPs([4, 8, 3], seeds=[0, 1])
    >>> x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    >>> many(x).shape, torch.allclose(many(x)[1], MLP([4, 8, 3], seed=1)(x), atol=1e-6)
    (torch.Size([2, 5, 3]), True)
    """

    def __init__(self, widths: Sequence[int], act: str = "relu", *, seeds: Sequence[int]):
        super().__init__()
        if not len(seeds):
            raise ValueError("no seeds, so there is no run; give one a run")
        nets = [MLP(widths, act, seed) for seed in seeds]
        self.skeleton = (tuple(widths), act)
        layers = [[net.linear[i] for net in nets] for i in range(len(widths) - 1)]
        self.weight = nn.ParameterList(torch.stack([one.weight.detach() for one in layer]) for layer in layers)
        self.bias = nn.ParameterList(torch.stack([one.bias.detach() for one in layer])[:, None] for layer in layers)
        self.act = copy.deepcopy(nets[0].act)

    def __len__(self) -> int:
        return len(self.weight[0])

    def forward(self, x: Tensor) -> Tensor:
        """(run, row, output) of rows that all runs share (row, input), or of each run's own (run, row, input)."""
        x = x.expand(len(self), *x.shape) if x.ndim == 2 else x
        for weight, bias, act in itertools.zip_longest(self.weight, self.bias, self.act):
            x = torch.baddbmm(bias, x, weight.mT)
            x = x if act is None else act(x)
        return x

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """The class that each run chooses for each row, (run, row)."""
        return self(x).argmax(-1)

    @torch.no_grad()
    def run(self, index: int) -> MLP:
        """One of the runs as a network of its own."""
        net = MLP(*self.skeleton)
        for linear, weight, bias in zip(net.linear, self.weight, self.bias, strict=True):
            linear.weight.copy_(weight[index])
            linear.bias.copy_(bias[index, 0])
        return net


def fit_many(
    many: ManyMLPs, x: Tensor, y: Tensor, *, steps: int, seeds: Sequence[int], batch_size: int = 64, lr: float = 1e-3,
    optimizer: str = "adam", momentum: float = 0.0, weight_decay: float = 0.0,
) -> ManyMLPs:  # fmt: skip
    """Trains all runs side by side, each as `fit` would train it alone with its own seed; changes and returns them.

    Both optimizers work number by number, so that stacking changes nothing but rounding. A run's rows come in an order
    of its own, drawn anew each epoch.

    Args:
        x, y: the training set that all share, (row, input) and (row) of classes.
        seeds: of the order of rows, one a run; equal seeds see equal batches.
        steps, batch_size, lr, optimizer, momentum, weight_decay: as `fit`.

    Raises:
        ValueError: as many seeds as runs, as many targets as inputs, ``"adam"`` or ``"sgd"``: what does not hold.
        TrainingError: the loss of a run is not finite; names the run.

    >>> x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    >>> many, y = ManyMLPs([4, 16, 2], seeds=range(5)), (x[:, 0] > 0).long()
    >>> bool(((fit_many(many, x, y, steps=100, lr=1e-2, seeds=range(5)).predict(x) == y).float().mean(1) > 0.9).all())
    True
    """
    if len(seeds) != len(many):
        raise ValueError(f"{len(seeds)} seeds for {len(many)} runs; give one a run")
    if len(x) != len(y) or not len(x):
        raise ValueError(f"{len(x)} inputs and {len(y)} targets; give as many of both, one at least")
    if batch_size < 1 or steps < 0:
        raise ValueError(f"batch_size={batch_size}, steps={steps}: give one row and 0 steps at least")
    rule: dict[str, Any] = {
        "adam": lambda: torch.optim.AdamW(many.parameters(), lr, weight_decay=weight_decay),
        "sgd": lambda: torch.optim.SGD(many.parameters(), lr, momentum=momentum, weight_decay=weight_decay),
    }
    if optimizer not in rule:
        raise ValueError(f"optimizer={optimizer!r} does not exist; choose 'adam' or 'sgd'")
    optimiser = rule[optimizer]()
    batch_size = min(batch_size, len(x))
    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
    per_epoch, order_RN = len(x) // batch_size, torch.empty(0)
    for step in range(steps):
        at = step % per_epoch * batch_size
        if at == 0:
            order_RN = torch.stack([torch.randperm(len(x), generator=one) for one in generators]).to(x.device)
        rows_RB = order_RN[:, at : at + batch_size]
        logits_RBO = many(x[rows_RB])
        losses_R = F.cross_entropy(logits_RBO.flatten(0, 1), y[rows_RB].flatten(), reduction="none")
        losses_R = losses_R.view(rows_RB.shape).mean(1)
        if step % 50 == 49 or step == steps - 1:
            _finite(losses_R.detach(), step)
        optimiser.zero_grad()
        losses_R.sum().backward()  # a run's gradient is of its own loss alone
        optimiser.step()
    many.zero_grad(set_to_none=True)
    return many


def _finite(losses_R: Tensor, step: int) -> None:
    bad = (~losses_R.isfinite()).nonzero().flatten().tolist()
    if bad:
        runs = f"run {bad[0]} ({len(bad)} of {len(losses_R)} runs)"
        raise TrainingError(f"the loss of {runs} is not finite at step {step}; lower lr")
