"""Small networks for images and vectors, with names that say where one is: multilayer perceptrons and a CNN.

Wrap them with `actome.wrap`; their sites are module paths, such as ``module:act.0`` (after the first nonlinearity).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .draw import weights_from
from .training import train

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU, "silu": nn.SiLU, "identity": nn.Identity,
}  # fmt: skip


class MLP(nn.Module):
    """Linear layers `linear.i`, each but the last followed by `act.i`; ``widths`` from input to output.

    >>> net = MLP([64, 32, 10], seed=0)
    >>> net(torch.zeros(5, 64)).shape, [name for name, _ in net.named_modules() if name.startswith("act.")]
    (torch.Size([5, 10]), ['act.0'])
    """

    def __init__(self, widths: Sequence[int], act: str = "relu", seed: int = 0):
        super().__init__()
        if len(widths) < 2 or act not in ACTIVATIONS:
            raise ValueError(f"an MLP takes two widths or more and an activation out of {', '.join(ACTIVATIONS)}")
        with weights_from(seed):
            self.linear = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.act = nn.ModuleList(ACTIVATIONS[act]() for _ in widths[2:])

    def forward(self, x: Tensor) -> Tensor:
        for linear, act in zip(self.linear, self.act, strict=False):
            x = act(linear(x))
        return self.linear[-1](x)


class ResidualMLP(nn.Module):
    """An embedding, residual blocks ``x + down(act(up(norm(x))))`` in `blocks.i`, and a readout.

    >>> ResidualMLP(64, 32, 3, 10)(torch.zeros(5, 64)).shape
    torch.Size([5, 10])
    """

    def __init__(self, inputs: int, width: int, blocks: int, outputs: int, hidden: int | None = None, seed: int = 0):
        super().__init__()
        hidden = hidden or 2 * width
        with weights_from(seed):
            self.embed = nn.Linear(inputs, width)
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))
                for _ in range(blocks)
            )
            self.readout = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x)
        return self.readout(x)


class CNN(nn.Module):
    """3x3 convolutions `conv.i`, each followed by `act.i`, average pooling and a linear `readout`.

    Args:
        channels: of the input and after each convolution.
        outputs: of the readout.
        pool: halve the image after these convolutions (counted from 0).

    >>> CNN([1, 8, 16], 10)(torch.zeros(5, 1, 8, 8)).shape
    torch.Size([5, 10])
    """

    def __init__(self, channels: Sequence[int], outputs: int, pool: Sequence[int] = (), seed: int = 0):
        super().__init__()
        with weights_from(seed):
            self.conv = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(channels))
            self.readout = nn.Linear(channels[-1], outputs)
        self.act = nn.ModuleList(nn.ReLU() for _ in self.conv)
        self.pool = frozenset(pool)

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(self.features(x))

    def features(self, x: Tensor) -> Tensor:
        """What the readout reads, (batch, channels)."""
        for i, (conv, act) in enumerate(zip(self.conv, self.act, strict=True)):
            x = act(conv(x))
            if i in self.pool:
                x = F.avg_pool2d(x, 2)
        return x.mean((-2, -1))


def fit(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    steps: int,
    batch_size: int = 64,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    optimizer: str = "adam",
    momentum: float = 0.0,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    on_step: Callable[[int, float], None] | None = None,
    prepare: Callable[[Tensor, Tensor], Tensor] | None = None,
    seed: int = 0,
) -> nn.Module:
    """Trains a net on data that fits into memory, with batches drawn anew each epoch; changes and returns it.

    The plain case of `train`: a constant rate, no warm-up, no limit on the gradient, and a decay of all parameters.

    Args:
        x, y: the whole training set, (n, ...) and (n, ...).
        steps: optimiser steps.
        batch_size: rows a step; `len(x)` for full batches.
        optimizer: ``"adam"`` (AdamW) or ``"sgd"``.
        loss: of (output, target); cross-entropy by default.
        on_step: called after each step with the number of steps done and the loss; the net is in training mode.
        prepare: makes the input of a step from its rows and targets, for augmentation or attacks.
        seed: of the batches' order, and of whatever the net itself draws; the caller's random state stays.

    Raises:
        ValueError: no inputs, not as many targets, an empty batch, or an optimizer that does not exist.
        TrainingError: the loss is not finite.

    >>> data = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    >>> net = fit(MLP([4, 16, 2]), data, (data[:, 0] > 0).long(), steps=100, lr=1e-2)
    >>> accuracy(net, data, (data[:, 0] > 0).long()) > 0.9
    True
    """
    if len(x) != len(y) or not len(x):
        raise ValueError(f"{len(x)} inputs and {len(y)} targets; give as many of both, one at least")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: a batch has at least one row")
    if optimizer not in ("adam", "sgd"):
        raise ValueError(f"optimizer={optimizer!r} does not exist; choose 'adam' or 'sgd'")
    cut, compare = _epochs(x, y, min(batch_size, len(x)), seed), loss or F.cross_entropy

    def batch(step: int) -> tuple[Tensor, Tensor]:
        rows, targets = cut(step)
        return (rows if prepare is None else prepare(rows, targets)), targets

    def rule(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        # Every parameter decays here, vectors as well.
        parameters = [one for group in groups for one in group["params"]]
        if optimizer == "adam":
            return torch.optim.AdamW(parameters, lr, weight_decay=weight_decay)
        return torch.optim.SGD(parameters, lr, momentum=momentum, weight_decay=weight_decay)

    return train(
        net,
        batch,
        steps,
        loss=lambda module, inputs, targets: compare(module(inputs), targets),
        optimizer=rule,
        schedule="constant",
        warmup=0,
        clip=None,
        on_step=None if on_step is None else lambda step, value, _: on_step(step, value),
        seed=seed,
    ).module


def _epochs(x: Tensor, y: Tensor, batch_size: int, seed: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    """The batch of each step, asked for in turn: rows in an order drawn anew whenever too few are left for one."""
    generator = torch.Generator().manual_seed(seed)
    order, per_epoch = torch.empty(0), len(x) // batch_size

    def batch(step: int) -> tuple[Tensor, Tensor]:
        nonlocal order
        at = step % per_epoch * batch_size
        if at == 0:
            order = torch.randperm(len(x), generator=generator)
        rows = order[at : at + batch_size]
        return x[rows], y[rows]

    return batch


@torch.no_grad()
def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of rows whose largest output is the label, in evaluation mode."""
    training = net.training
    correct = (net.eval()(x).argmax(-1) == y).double().mean()
    net.train(training)
    return float(correct)
