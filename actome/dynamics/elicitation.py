"""Ways to bring out what a generator can do and is not yet asked for rightly: stronger prompts, pushed embeddings.

A capability is hidden while one of these ways gives the combination and the plain prompt does not.

Source: Park et al. 2024, "Emergence of Hidden Capabilities: Exploring Learning Dynamics in Concept Space", section 5
(over-prompting and linear latent interventions).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actome.clamps import Add
from actome.core.errors import MeasureError
from actome.core.load import wrap
from actome.core.model import Model
from actome.dynamics.concept_space import Combo, ConceptSpace
from actome.dynamics.dates import Lead, Passage, first_passage, lead_time
from actome.dynamics.walk import over_runs

Array = np.ndarray
Way = Callable[[ConceptSpace, Any], Iterable[Tensor]]


def overprompt(conditions: Tensor, about: Tensor, mean: Tensor, kappa: float) -> Tensor:
    """Conditions that say one factor more strongly: its entries are taken `kappa` times as far from their mean.

    Args:
        conditions: (n, entries).
        about: bool (entries): those that say the factor.
        mean: (entries), over the training set.
        kappa: 1 leaves all as it is; beyond 2 any model may seem to succeed.

    >>> overprompt(torch.tensor([[0.6, 0.2]]), torch.tensor([True, False]), torch.tensor([0.5, 0.5]), 2.0)
    tensor([[0.7000, 0.2000]])
    """
    if about.shape != conditions.shape[-1:] or mean.shape != conditions.shape[-1:]:
        raise MeasureError(
            f"about {tuple(about.shape)} and mean {tuple(mean.shape)} for conditions of {conditions.shape[-1]} entries"
        )
    return torch.where(about, mean + kappa * (conditions - mean), conditions)


def latent_direction(model: Model, site: str, high: Any, low: Any) -> Tensor:
    """The mean difference of activations between two sets of inputs: what points from one class to the other.

    The means are over real tokens, without padding. Add it with ``ac.Add(site, direction, scale=...)``.

    Args:
        site: one site, with its units in the last dim.
        high, low: inputs of either class, as in `Model.record`.

    Returns:
        (units), float32.

    Raises:
        MeasureError: a pattern that names several sites.

    >>> model = wrap(torch.nn.Sequential(torch.nn.Identity()))
    >>> latent_direction(model, "module:0", torch.ones(3, 2), torch.zeros(5, 2))
    tensor([1., 1.])
    """
    sites = model.match(site)
    if len(sites) != 1:
        raise MeasureError(f"{site!r} names {len(sites)} sites; a direction belongs to one")
    means = []
    for inputs in (high, low):
        rows = model.record(inputs, sites[0].name).flat(sites[0].name)
        means.append(rows.float().flatten(0, -2).mean(0))
    return means[0] - means[1]


@dataclass(frozen=True)
class OverPrompt:
    """A way for `elicit`: the prompt with one factor said ever more strongly.

    Args:
        prompt: conditions (n, entries).
        about, mean: as in `overprompt`.
        kappas: how strongly; each is tried.
    """

    prompt: Tensor
    about: Tensor
    mean: Tensor
    kappas: Sequence[float] = (1.25, 1.5, 1.75, 2.0)

    def __call__(self, space: ConceptSpace, module: Any) -> Iterator[Tensor]:
        for kappa in self.kappas:
            yield space.generate(module, overprompt(self.prompt, self.about, self.mean, kappa))


@dataclass(frozen=True)
class LatentPush:
    """A way for `elicit`: the plain prompt, with its embedding pushed from one class of a concept towards the other.

    Args:
        prompt: what is asked.
        site: of the embedding, such as ``"module:act"``.
        high, low: trained inputs of the wanted class and of the other, which the direction is made of.
        strengths: how far, in units of the distance between the classes; each is tried.
    """

    prompt: Any
    site: str
    high: Any
    low: Any
    strengths: Sequence[float] = (0.25, 0.5, 0.75, 1.0)

    def __call__(self, space: ConceptSpace, module: Any) -> Iterator[Tensor]:
        model = module if isinstance(module, Model) else wrap(module)
        direction = latent_direction(model, self.site, self.high, self.low)
        for strength in self.strengths:
            with model.clamp(Add(self.site, direction, scale=strength)):
                outputs = space.generate(module, self.prompt)
            # Outside the clamp: whoever takes no more attempts must not leave it on.
            yield outputs


@dataclass(frozen=True)
class Elicitation:
    """When each way first gave the wanted combination.

    Attributes:
        steps: (steps).
        reached: by way, bool (runs, steps); ``"naive"`` is the plain prompt.
        dates: by way.
        leads: by way, its lead over the plain prompt; missing where neither came.
        hidden: share of runs and checkpoints at which a way gave the combination and the plain prompt did not.
    """

    steps: Array
    reached: dict[str, Array] = field(repr=False)
    dates: dict[str, Passage]
    leads: dict[str, Lead]
    hidden: float


@torch.no_grad()
def elicit(
    space: ConceptSpace, runs: Any, target: Combo, prompt: Any, ways: Mapping[str, Way], *, pushed: str,
    tolerance: float = 0.2, hold: int = 2,
) -> Elicitation:  # fmt: skip
    """Tries several ways to get a combination from every checkpoint.

    A combination is given when the pushed concept is nearer to the wanted class than to the other, and every other
    concept is within `tolerance` of its own class: a push that breaks something else is no success. The plain prompt is
    held to the same.

    Args:
        space: of the concepts.
        runs: as in `ConceptSpace.trace`.
        target: the wanted combination.
        prompt: the plain prompt for it.
        ways: by name, (space, module) -> outputs of each attempt, such as `OverPrompt` and `LatentPush`.
        pushed: the concept that the ways push.
        tolerance: for the other concepts.
        hold: checkpoints in a row that have to give the combination, from its date on.

    Raises:
        MeasureError: no way, a combination or a concept that the space does not have, or runs of different steps.
    """
    space.check([target])
    if not ways:
        raise MeasureError("no way was given: {name: OverPrompt(...)}, or any (space, module) -> outputs of attempts")
    if pushed not in space.concepts:
        raise MeasureError(f"pushed={pushed!r} is no concept; there are {', '.join(space.concepts)}")
    if "naive" in ways:
        raise MeasureError("'naive' is the plain prompt; give the way another name")
    every: dict[str, Way] = {"naive": lambda space, module: [space.generate(module, prompt)], **ways}
    wanted = torch.tensor(target, dtype=torch.float64)
    is_pushed = torch.tensor([one == pushed for one in space.concepts])

    def given(outputs: Tensor) -> bool:
        at = space.coordinates(outputs).mean(0)
        nearer = (at - 0.5) * (2 * wanted - 1) > 0
        return bool(torch.where(is_pushed, nearer, (at - wanted).abs() <= tolerance).all())

    steps, found = over_runs(runs, lambda module: [any(map(given, way(space, module))) for way in every.values()])
    reached_RSW = np.array(found)
    reached = {name: reached_RSW[..., i] for i, name in enumerate(every)}
    dates = {
        name: first_passage(steps, one.astype(float), threshold=0.5, rising=True, hold=hold, interpolate=False)
        for name, one in reached.items()
    }
    came = {name for name, date in dates.items() if date.censored < 1}
    leads = {name: lead_time(dates[name], dates["naive"]) for name in ways if came & {name, "naive"}}
    hidden = np.any([reached[name] for name in ways], 0) & ~reached["naive"]
    return Elicitation(steps, reached, dates, leads, float(hidden.mean()))
