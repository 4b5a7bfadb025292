"""What the tests of watching share: a small network, its loop, and the same loop without a watch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actome.dynamics import RunStore, Watch
from actome.tasks import Subject, SubjectConfig

VOCAB, LENGTH = 24, 16


def subject(seed: int = 0, **options: Any) -> Subject:
    config = {"vocab": VOCAB, "d_model": 16, "heads": 2, "layers": 2, "d_mlp": 32, "context": 32, **options}
    return Subject.fresh(SubjectConfig(**config), seed=seed)


def ids(seed: int, rows: int = 4) -> Tensor:
    return torch.randint(0, VOCAB, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))


PROBE = ids(10_000, 6)


def loss_of(module: Callable[..., Any], tokens: Tensor) -> Tensor:
    logits = module(tokens).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def trained(
    module: nn.Module, steps: int = 8, watch: Watch | None = None, optimizer: Any = None, lr: float = 1e-2, **told: Any
) -> list[float]:
    """A plain loop; the losses of its steps."""
    optimizer = optimizer or torch.optim.AdamW(module.parameters(), lr=lr)
    losses = []
    for step in range(steps):
        loss = loss_of(module, ids(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if watch is not None:
            watch.step(loss, **told)
    return losses


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def opened(path: Path | Watch) -> RunStore:
    return RunStore.open(path.path if isinstance(path, Watch) else path)


def events(path: Path | Watch, name: str) -> list[dict[str, Any]]:
    found = opened(path).events
    return found[found["name"] == name]["data"].tolist()
