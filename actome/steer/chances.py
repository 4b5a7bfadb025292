"""Chances: how probable an outcome is after a path, asked for directly or counted from continuations.

Letters: B batch, T position.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from actome.core.continuations import Outcome, continuations, outcome_of
from actome.core.errors import MeasureError

if TYPE_CHECKING:
    from actome.core.model import Model

# From a model, paths (B, T) and an outcome's number to the chance of that outcome after each path, (B).
Chance = Callable[["Model", Tensor, int], Tensor]


@dataclass(frozen=True)
class Asked:
    """The chance of an outcome as the model's answer when it is asked now.

    Args:
        cue: ids that ask for the answer, put behind the path.
        answers: the id of each outcome; chances are among these.

    >>> import actome as ac
    >>> chance = Asked(cue=[5], answers=[10, 11, 12])
    >>> p = torch.stack([chance(ac.demo(), torch.tensor([[1, 2]]), target) for target in range(3)])
    >>> round(float(p.sum()), 4)
    1.0
    """

    cue: Sequence[int]
    answers: Sequence[int]

    def __post_init__(self) -> None:
        if len(self.answers) < 2:
            raise MeasureError(f"answers={list(self.answers)}: give the ids of two outcomes at least")

    def __call__(self, model: Model, paths_BT: Tensor, target: int) -> Tensor:
        cue = torch.as_tensor(list(self.cue), dtype=torch.long).expand(len(paths_BT), -1)
        logits = model.logits(torch.cat([paths_BT.cpu(), cue], 1))[:, -1]
        if not all(0 <= one < logits.shape[-1] for one in self.answers):
            raise MeasureError(f"answers={list(self.answers)}: {model.name} has ids from 0 to {logits.shape[-1] - 1}")
        return logits[:, list(self.answers)].double().cpu().softmax(-1)[:, target]


@dataclass(frozen=True)
class Resampled:
    """The share of sampled continuations that come to an outcome.

    Args:
        outcome: from what follows the path, a list of ids, to what it comes to.
        outcomes: what counts as each target.
        samples: continuations of each path.
        max_new_tokens: of each.
        stop: ids that end one; those of the model's generation configuration unless given.
        temperature: of the sampling.
        batch_size: rows a forward.
        seed: the same draws with and without a clamp, so that their difference is less noisy.
    """

    outcome: Outcome
    outcomes: Sequence[Hashable]
    samples: int = 20
    max_new_tokens: int = 32
    stop: int | Sequence[int] | None = None
    temperature: float = 1.0
    batch_size: int = 64
    seed: int = 0

    def __call__(self, model: Model, paths_BT: Tensor, target: int) -> Tensor:
        if not 0 <= target < len(self.outcomes):
            raise MeasureError(f"target {target} is not among the {len(self.outcomes)} outcomes")
        found = continuations(
            model, paths_BT, self.samples, self.max_new_tokens, temperature=self.temperature, stop=self.stop,
            batch_size=self.batch_size, seed=self.seed,
        )  # fmt: skip
        wanted = self.outcomes[target]
        hits = [[outcome_of(model, self.outcome, ids, False) == wanted for ids in rows] for rows in found]
        return torch.tensor(hits, dtype=torch.float64).mean(1)
