"""The loop that trains small models: any module, any batches, checkpoints at chosen steps, one result for one seed."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .losses import TrainingError, default_loss

Batch = tuple[Tensor, ...]


@dataclass(frozen=True)
class Training:
    """What a training left behind.

    Attributes:
        module: the trained module itself, in evaluation mode.
        losses: (step) float32, the loss of each step's batch before the step was taken.
        checkpoints: the weights by step, on the CPU; those of step s are the weights after s steps.
        seconds: how long it took.
    """

    module: nn.Module
    losses: Tensor
    checkpoints: dict[int, dict[str, Tensor]] = field(default_factory=dict, repr=False)
    seconds: float = 0.0

    def at(self, step: int) -> nn.Module:
        """A copy of the module with the weights of one checkpoint, in evaluation mode.

        Raises:
            TrainingError: there is no checkpoint of that step; names the nearest.
        """
        if step not in self.checkpoints:
            known = sorted(self.checkpoints, key=lambda one: (abs(one - step), one))
            there = f"nearest first, there are {', '.join(map(str, known))}" if known else "none were kept"
            raise TrainingError(f"no checkpoint of step {step}; {there} (train(..., checkpoints=...))")
        module = copy.deepcopy(self.module)
        module.load_state_dict(self.checkpoints[step])
        return module.eval()


def log_spaced(steps: int, count: int = 12) -> tuple[int, ...]:
    """Step 0, the last step, and steps between them at equal ratios; at most `count`, fewer where they would coincide.

    >>> log_spaced(1000, 7)
    (0, 1, 4, 16, 63, 251, 1000)
    """
    if steps < 0 or count < 2:
        raise ValueError(f"steps={steps}, count={count}: give at least 0 steps and a count of at least 2")
    if steps == 0:
        return (0,)
    between = [round(steps ** (i / max(count - 2, 1))) for i in range(count - 1)] if count > 2 else [steps]
    return tuple(sorted({0, *between}))


def train(
    module: nn.Module,
    batches: Tensor | Batch | Callable[[int], Tensor | Batch],
    steps: int | None = None,
    *,
    batch_size: int = 32,
    loss: Callable[..., Tensor] | None = None,
    lr: float = 3e-3,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.99),
    warmup: int | None = None,
    schedule: Literal["cosine", "constant"] = "cosine",
    clip: float | None = 1.0,
    optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer] | None = None,
    checkpoints: Literal["log"] | Iterable[int] | None = None,
    on_step: Callable[[int, float, nn.Module], Any] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Training:
    """Trains a module in place. Works under an active ``model.clamp(...)``, with gradients through it.

    Args:
        module: anything that gives logits for inputs: a subject, an MLP, any network.
        batches: sequences (N, pos), or a tuple of tensors with N rows each: ``(tokens, mask)`` with a bool mask of the
            targets that count, ``(inputs, targets)``, or whatever `loss` takes. Rows are used in the order in which
            they stand; when they run out, again in an order drawn from `seed`. Or a function that gives the batch of a
            step, counted from 0.
        steps: how many; ``None`` is one pass over the rows.
        batch_size: rows of a batch that is cut from tensors.
        loss: ``loss(module, *batch)``; by default `next_token_loss` or `target_loss`, as the batch calls for.
        lr, weight_decay, betas: of AdamW. Vectors (norms, biases) do not decay.
        warmup: steps of linear warm-up; ``None`` is a tenth of the steps, at most 100.
        schedule: after the warm-up, down to zero along a half cosine, or constant.
        clip: largest norm of the gradient; ``None`` for no limit.
        optimizer: makes another optimizer of parameter groups; its learning rate is scaled by the schedule.
        checkpoints: ``"log"`` for `log_spaced` steps, or the steps to keep, 0 for the start; ``None`` keeps none.
        on_step: called after each step with the steps done, the loss and the module; when it returns True the training
            ends there.
        seed: of the order of rows and of whatever the module draws, such as dropout. The caller's random state stays.
        progress: show a bar.

    Returns:
        A `Training`. The module itself is trained and left in evaluation mode.

    Raises:
        TrainingError: the loss is not finite, a batch does not fit, or no parameter asks for a gradient.

    >>> import torch
    >>> from actome.tasks import Subject, SubjectConfig, train
    >>> subject = Subject.fresh(SubjectConfig(vocab=8, d_model=16, heads=2, context=16))
    >>> tokens = torch.arange(16).remainder(8).repeat(64, 1)
    >>> training = train(subject, tokens, steps=30, batch_size=8, checkpoints="log")
    >>> bool(training.losses[-1] < training.losses[0] / 2), max(training.checkpoints)
    (True, 30)
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"train() takes an nn.Module, not {type(module).__name__}; of a Model give its .module")
    if schedule not in ("cosine", "constant"):
        raise ValueError(f"schedule={schedule!r} does not exist; choose 'cosine' or 'constant'")
    parameters = [p for p in module.parameters() if p.requires_grad]
    if not parameters:
        raise TrainingError(
            f"no parameter of this {type(module).__name__} asks for a gradient; there is nothing to train"
        )
    device = parameters[0].device
    take, steps = _batches(batches, steps, batch_size, seed, device)
    if steps < 0:
        raise TrainingError(f"steps={steps}: give 0 or more")
    keep = _steps_kept(checkpoints, steps)
    warm = min(steps // 10, 100) if warmup is None else warmup
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if optimizer is None:
        fused = all(p.is_floating_point() for p in parameters)
        adam = torch.optim.AdamW(groups, lr=lr, betas=betas, fused=fused)
    else:
        adam = optimizer(groups)
    rates = [float(group["lr"]) for group in adam.param_groups]
    loss = loss or default_loss
    kept, losses = {}, []
    begun = time.perf_counter()
    cuda = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), _bar(steps, progress) as advance:
        torch.manual_seed(seed)
        module.train()
        if 0 in keep:
            kept[0] = _weights(module)
        for step in range(steps):
            factor = _factor(step, steps, warm, schedule)
            for group, rate in zip(adam.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            batch_loss = loss(module, *take(step))
            if not isinstance(batch_loss, Tensor) or batch_loss.numel() != 1:
                given = tuple(batch_loss.shape) if isinstance(batch_loss, Tensor) else type(batch_loss).__name__
                raise TrainingError(f"loss(module, *batch) gives one number as a tensor, not {given}")
            adam.zero_grad()
            batch_loss.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(parameters, clip)
            losses.append(batch_loss.detach())
            if step % 50 == 49 or step == steps - 1:
                _finite(losses)
            adam.step()
            enough = on_step is not None and on_step(step + 1, float(losses[-1]), module) is True
            if step + 1 in keep:
                kept[step + 1] = _weights(module)
            advance()
            if enough:
                _finite(losses)
                break
    module.eval()
    module.zero_grad(set_to_none=True)
    whole = torch.stack(losses).float().cpu() if losses else torch.zeros(0)
    return Training(module, whole, kept, time.perf_counter() - begun)


def _factor(step: int, steps: int, warmup: int, schedule: str) -> float:
    """Of the learning rate at a step: up to one over the warm-up, then by the schedule; never zero."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


def _batches(
    batches: Any, steps: int | None, batch_size: int, seed: int, device: torch.device
) -> tuple[Callable[[int], Batch], int]:
    if callable(batches):
        if steps is None:
            raise TrainingError("batches made by a function have no end; say how many steps to train")

        def made(step: int) -> Batch:
            batch = batches(step)
            return tuple(x.to(device) for x in (batch if isinstance(batch, tuple | list) else (batch,)))

        return made, steps
    if not isinstance(batches, Tensor | tuple | list) or not len(batches):
        kind = type(batches).__name__
        raise TrainingError(f"`batches` is a tensor, a tuple of tensors or a function of the step, not {kind}")
    if batch_size < 1:
        raise TrainingError(f"batch_size={batch_size}: a batch has at least one row")
    columns = (batches,) if isinstance(batches, Tensor) else tuple(batches)
    rows = len(columns[0])
    if any(len(column) != rows for column in columns):
        raise TrainingError(f"the tensors of `batches` have {[len(c) for c in columns]} rows; they must be as many")
    if rows < batch_size:
        raise TrainingError(
            f"{rows} rows are too few for one batch of {batch_size}; give more, or a smaller batch_size"
        )
    per_pass = rows // batch_size
    orders: dict[int, Tensor] = {}

    def cut(step: int) -> Batch:
        turn, place = divmod(step, per_pass)
        part = slice(place * batch_size, (place + 1) * batch_size)
        if turn == 0:
            return tuple(column[part].to(device) for column in columns)
        if turn not in orders:
            orders.clear()
            orders[turn] = torch.randperm(rows, generator=torch.Generator().manual_seed(seed * 1_000_003 + turn))
        return tuple(column[orders[turn][part].to(column.device)].to(device) for column in columns)

    return cut, per_pass if steps is None else steps


def _steps_kept(checkpoints: Any, steps: int) -> set[int]:
    if checkpoints is None:
        return set()
    if isinstance(checkpoints, str):
        if checkpoints != "log":
            raise ValueError(f"checkpoints={checkpoints!r}: give 'log', the steps to keep, or None")
        return set(log_spaced(steps))
    keep = {int(step) for step in checkpoints}
    beyond = sorted(step for step in keep if not 0 <= step <= steps)
    if beyond:
        raise ValueError(f"checkpoints at {beyond} lie outside the {steps} steps of this training")
    return keep


def _weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().to("cpu", copy=True) for name, value in module.state_dict().items()}


def _finite(losses: list[Tensor]) -> None:
    recent = torch.stack(losses[-50:])
    if not bool(recent.isfinite().all()):
        first = len(losses) - len(recent) + int((~recent.isfinite()).nonzero()[0])
        raise TrainingError(
            f"the loss of step {first} is {float(losses[first])}; lower lr, clip the gradient, or check that every "
            "batch has a target that counts"
        )


@contextmanager
def _bar(steps: int, shown: bool) -> Iterator[Callable[[], None]]:
    """A progress bar, or nothing; gives what moves it on by one step."""
    if not shown:
        yield lambda: None
        return
    from rich.progress import Progress

    with Progress(transient=True) as progress:
        task = progress.add_task("training", total=steps)
        yield lambda: progress.advance(task)
