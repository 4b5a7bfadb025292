"""Training seen in coordinates of the data's concepts: how fast each is learned, in which order, and where paths turn.

A conditional generator is asked at every checkpoint for combinations of concepts, and what it makes is read out as a
point: 0 and 1 on each axis are the classes of one concept. Combinations that were never shown move through this space
on paths that say what has been understood, long before the loss or the picture does.

Source: Park et al. 2024, "Emergence of Hidden Capabilities: Exploring Learning Dynamics in Concept Space".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actome.core.errors import MeasureError
from actome.dynamics.dates import Lead, Passage, first_passage, lead_time
from actome.dynamics.path_turns import PathTurn, path_turn
from actome.dynamics.walk import over_runs

Array = np.ndarray
Combo = tuple[int, ...]


def _call(module: Any, prompt: Any) -> Tensor:
    return module(prompt)


@dataclass(frozen=True)
class ConceptSpace:
    """Read-outs of concepts, and how a generator is asked.

    Args:
        readouts: for each concept a function of outputs (n, ...) that gives (n), 0 and 1 at the centres of its two
            classes. Take care that none depends on anything else, such as brightness or place: `scaled` and `fit` make
            the scale right, not the read-out.
        generate: (module, prompt) -> outputs (n, ...); calls the module by default.

    >>> space = ConceptSpace({"height": lambda x: x[:, 0], "width": lambda x: x[:, 1]})
    >>> runs = [{s: torch.nn.Linear(2, 2, bias=False) for s in (0, 1)}]
    >>> for step, net in runs[0].items():
    ...     net.weight.data = torch.diag(torch.tensor([1.0, 0.1 + step]))
    >>> prompts = {(a, b): torch.tensor([[float(a), float(b)]]) for a in (0, 1) for b in (0, 1)}
    >>> trace = space.trace(runs, prompts, held_out=[(1, 1)])
    >>> trace.order(), trace.path((1, 1)).shape
    (('height', 'width'), (1, 2, 2))
    """

    readouts: Mapping[str, Callable[[Tensor], Tensor]]
    generate: Callable[[Any, Any], Tensor] = _call

    def __post_init__(self) -> None:
        if not self.readouts:
            raise MeasureError("a concept space needs a read-out at least: {name: function of outputs}")

    @property
    def concepts(self) -> tuple[str, ...]:
        return tuple(self.readouts)

    def check(self, combos: Sequence[Combo]) -> None:
        """Refuses what are no combinations of classes of the concepts."""
        for combo in combos:
            if len(combo) != len(self.concepts) or not set(combo) <= {0, 1}:
                raise MeasureError(f"{combo} is no combination of classes of {', '.join(self.concepts)}: a 0 or 1 each")

    def coordinates(self, outputs: Tensor) -> Tensor:
        """Where outputs (n, ...) lie, (n, concepts)."""
        found = [readout(outputs) for readout in self.readouts.values()]
        for name, one in zip(self.concepts, found, strict=True):
            if one.shape != (len(outputs),):
                raise MeasureError(
                    f"the read-out of {name!r} gave {tuple(one.shape)} for {len(outputs)} outputs; it gives one number "
                    "for each"
                )
        return torch.stack([one.detach().double().cpu() for one in found], 1)

    def scaled(self, outputs: Tensor, combos: Any) -> ConceptSpace:
        """The same read-outs shifted and scaled so that the classes' means over these examples are 0 and 1.

        Args:
            outputs: (n, ...), real ones, such as training images.
            combos: (n, concepts) of 0 and 1.

        Raises:
            MeasureError: a class without an example, or two classes that a read-out does not tell apart.
        """
        raw, of = self.coordinates(outputs), torch.as_tensor(combos)
        scaled = {}
        for i, (name, readout) in enumerate(self.readouts.items()):
            low, high = (_mean(raw[of[:, i] == one, i], name, one) for one in (0, 1))
            if math.isclose(low, high, rel_tol=1e-9, abs_tol=1e-12):
                raise MeasureError(f"the read-out of {name!r} gives {low:g} for both classes; it reads something else")
            scaled[name] = _scale(readout, low, high)
        return ConceptSpace(scaled, self.generate)

    @classmethod
    def fit(
        cls, outputs: Tensor, combos: Any, concepts: Sequence[str], *, ridge: float = 1e-3,
        generate: Callable[[Any, Any], Tensor] = _call,
    ) -> ConceptSpace:  # fmt: skip
        """Read-outs learned from examples: for each concept a linear regression of its class on the flat output.

        Give examples of every combination, also of those that the generator is not shown: where two concepts go
        together in the examples, one is read from the other.

        Args:
            outputs: (n, ...), real ones.
            combos: (n, concepts) of 0 and 1.
            concepts: names, in the order of `combos`.
            ridge: strength of the penalty, as a share of the outputs' mean variance.
            generate: as in the class.
        """
        x, y = outputs.flatten(1).double(), torch.as_tensor(combos).double()
        if y.shape != (len(x), len(concepts)):
            raise MeasureError(f"combos {tuple(y.shape)} for {len(x)} outputs and {len(concepts)} concepts")
        mean = x.mean(0)
        gram = (x - mean).T @ (x - mean) / len(x)
        penalty = ridge * float(gram.diagonal().mean()) * torch.eye(len(gram), dtype=torch.float64)
        weights = torch.linalg.solve(gram + penalty, (x - mean).T @ (y - y.mean(0)) / len(x))
        raw = {name: _linear(mean, weights[:, i]) for i, name in enumerate(concepts)}
        return cls(raw, generate).scaled(outputs, combos)

    @torch.no_grad()
    def trace(self, runs: Any, prompts: Mapping[Combo, Any], held_out: Sequence[Combo] = ()) -> ConceptTrace:
        """Follows what checkpoints make of prompts.

        Args:
            runs: one run or a list of runs of the same steps, each a `Training`, modules by step, or an iterator of
                (step, module).
            prompts: for each combination of classes what to ask for it, of several rows or one; rows are averaged.
            held_out: combinations that training did not show.

        Raises:
            MeasureError: combinations of another length than there are concepts, or runs of different steps.
        """
        self.check([*prompts, *held_out])

        def look(module: Any) -> Array:
            asked = (self.coordinates(self.generate(module, prompt)).mean(0) for prompt in prompts.values())
            return torch.stack(list(asked)).numpy()

        steps, found = over_runs(runs, look)
        paths_RSCF = np.array(found)
        paths = {combo: paths_RSCF[:, :, i] for i, combo in enumerate(prompts)}
        return ConceptTrace(steps, self.concepts, paths, tuple(map(tuple, held_out)))


@dataclass(frozen=True)
class ConceptTrace:
    """The paths of every combination.

    Attributes:
        steps: (steps).
        concepts: names of the coordinates.
        trajectories: by combination, (runs, steps, concepts).
        held_out: the combinations that training did not show.
    """

    steps: Array
    concepts: tuple[str, ...]
    trajectories: dict[Combo, Array] = field(repr=False)
    held_out: tuple[Combo, ...] = ()

    def path(self, combo: Combo, concept: str | None = None) -> Array:
        """(runs, steps, concepts) of one combination, or (runs, steps) of one of its coordinates."""
        if combo not in self.trajectories:
            raise MeasureError(f"{combo} was not asked for; there are {', '.join(map(str, self.trajectories))}")
        path = self.trajectories[combo]
        return path if concept is None else path[..., self._index(concept)]

    def _index(self, concept: str) -> int:
        if concept not in self.concepts:
            raise MeasureError(f"{concept!r} is no concept; there are {', '.join(self.concepts)}")
        return self.concepts.index(concept)

    def learned(self, concept: str, *, tolerance: float = 0.2, hold: int = 2) -> Passage:
        """When a concept is learned: its coordinate is within `tolerance` of the class on every trained combination.

        Args:
            hold: checkpoints in a row at which that has to be so.
        """
        i = self._index(concept)
        trained = [combo for combo in self.trajectories if combo not in self.held_out]
        if not trained:
            raise MeasureError("every combination was held out; a concept's date needs trained ones")
        error_RS = np.max([np.abs(self.trajectories[combo][..., i] - combo[i]) for combo in trained], 0)
        return first_passage(self.steps, error_RS, threshold=tolerance, rising=False, hold=hold)

    def order(self, *, tolerance: float = 0.2) -> tuple[str, ...]:
        """The concepts by the median date at which they are learned, those that never are last."""
        return tuple(sorted(self.concepts, key=lambda one: self.learned(one, tolerance=tolerance).at))

    def lead(self, first: str, second: str, *, tolerance: float = 0.2) -> Lead:
        """By how many steps one concept is learned before another, run by run, with a sign test."""
        return lead_time(*(self.learned(one, tolerance=tolerance) for one in (first, second)))

    def turn(
        self, combo: Combo, *, after: float = 0, bandwidth: float = 0.03, reach: float = 0.2, permutations: int = 99,
        seed: int = 0,
    ) -> PathTurn:  # fmt: skip
        """Where a path turns most, and whether that is more than its steps in any order would give.

        See `path_turn` for how, and for the control.

        Args:
            after: leave out the steps before, such as the first, in which an untrained generator finds the data.
            bandwidth: of `smooth` over checkpoints, as a share of their number.
            reach: of each of the two ways, as a share of the length of the path.
            permutations: of the control.
            seed: of the permutations, and of the interval over runs.

        Raises:
            MeasureError: fewer than 8 checkpoints, or a combination that was not asked for.
        """
        keep = self.steps >= after
        if keep.sum() < 8:
            raise MeasureError(f"{keep.sum()} checkpoints from step {after:g} on; a turn needs 8")
        return path_turn(
            self.steps[keep], self.path(combo)[:, keep], bandwidth=bandwidth, reach=reach, permutations=permutations,
            seed=seed,
        )  # fmt: skip


def concept_signal(generate: Callable[[Tensor], Tensor], values: Tensor, others: Tensor) -> Tensor:
    """How much of the output each concept moves: the mean distance when it alone goes from one value to the other.

    Args:
        generate: outputs (n, ...) of concept values (n, concepts), such as `Shapes2D.render`.
        values, others: (n, concepts); the two values of every concept.

    Returns:
        (concepts), in the units of the output: a mean of Euclidean norms. What has more of it is learned first.

    Source: Park et al. 2024, section 3 (the concept signal).

    >>> draw = lambda z: torch.stack([3 * z[:, 0], 4 * z[:, 0], z[:, 1]], 1)
    >>> concept_signal(draw, torch.zeros(5, 2), torch.ones(5, 2)).tolist()
    [5.0, 1.0]
    """
    if values.shape != others.shape or values.ndim != 2:
        raise MeasureError(f"values {tuple(values.shape)} and {tuple(others.shape)}; want (n, concepts) for both")
    base, signals = generate(values), []
    for i in range(values.shape[1]):
        moved = values.clone()
        moved[:, i] = others[:, i]
        signals.append((generate(moved) - base).flatten(1).norm(dim=1).mean())
    return torch.stack(signals)


def _mean(values: Tensor, name: str, one: int) -> float:
    if not len(values):
        raise MeasureError(f"no example of class {one} of {name!r}; a scale needs both classes")
    return float(values.mean())


def _scale(readout: Callable[[Tensor], Tensor], low: float, high: float) -> Callable[[Tensor], Tensor]:
    return lambda outputs: (readout(outputs) - low) / (high - low)


def _linear(mean: Tensor, weight: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda outputs: (outputs.flatten(1).double().to(mean.device) - mean) @ weight
