"""Contrast: from two sets of examples to a clamp that leads from one to the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actome.clamps import Add, Project
from actome.core.errors import MeasureError
from actome.tasks.trials import auroc, split

from .directions import METHODS, Method, direction, gap
from .states import Over, count, is_pairs, states

if TYPE_CHECKING:
    import pandas as pd

    from actome.core.model import Model

_FEW = 8  # examples of a kind below which nothing is left to choose a layer on


@dataclass(frozen=True)
class Examples:
    """Two sets of examples: what the clamp should lead to, and what away from.

    Args:
        positive, negative: texts or token ids; or prompts with responses, as ``(prompts, responses)``.
    """

    positive: Any
    negative: Any

    @classmethod
    def of(cls, data: Any) -> Examples:
        """The data themselves, when they are examples.

        Raises:
            MeasureError: when not.
        """
        if isinstance(data, cls):
            return data
        raise MeasureError(f"fit takes Examples(positive, negative), not {type(data).__name__}")

    def __post_init__(self) -> None:
        for name in ("positive", "negative"):
            some = getattr(self, name)
            if isinstance(some, str) or not hasattr(some, "__len__"):
                raise MeasureError(f"give the {name} examples as a list of texts or token ids, not {some!r:.60}")
            if not count(some):
                raise MeasureError(f"there is no {name} example; a contrast takes two sets, {_FEW} of each at least")
            if count(some) < _FEW:
                raise MeasureError(f"{count(some)} {name} examples are too few; give {_FEW} at least")
        if is_pairs(self.positive) != is_pairs(self.negative):
            raise MeasureError("positive and negative examples must both be pairs of prompt and response, or neither")


@dataclass(frozen=True, eq=False)
class Steering(Add):
    """A fitted direction as a clamp: an `Add` that knows how it came about.

    ``scale=1`` brings the mean of the negative examples to that of the positive ones, along the direction.

    Attributes:
        directions: unit vectors by site, (D) each, for all sites that were looked at.
        gaps: how far apart the two means lie along them.
        separation: area under the ROC curve of projections of examples that the direction was not fitted on.
        about: method, tokens, numbers of examples.
    """

    directions: Mapping[str, Tensor] | None = None
    gaps: Mapping[str, float] | None = None
    separation: Mapping[str, float] | None = None
    about: Mapping[str, Any] | None = None

    def to(self, site: str, scale: float | None = None) -> Steering:
        """The same contrast at another of the sites that were looked at.

        Raises:
            MeasureError: a site that was not.
        """
        known = self.directions or {}
        if site not in known:
            raise MeasureError(f"the contrast was not fitted at {site!r}; it was at {', '.join(known)}")
        value = known[site] * (self.gaps or {})[site]
        return self.at(site=site, value=value, scale=self.scale if scale is None else scale)  # type: ignore[return-value]

    def ablate(self, site: str | None = None) -> Project:
        """Takes the direction out, at its own site or wherever a pattern says.

        One direction is taken out everywhere, as removing a trait asks for; see Arditi et al. 2024, Refusal in
        Language Models Is Mediated by a Single Direction.
        """
        return Project(site or self.site, self.unit)

    @property
    def unit(self) -> Tensor:
        """The direction at the clamp's own site, (D), of length one."""
        return (self.directions or {})[self.site]

    def monitor(self, model: Model, examples: Any, *, over: Over | None = None, batch_size: int = 8) -> Tensor:
        """Projections of examples on the direction, (N): high where they are like the positive ones."""
        over = over or (self.about or {}).get("over", "last")
        found = states(model, examples, self.site, over=over, batch_size=batch_size)[self.site]
        if found.shape[1] != len(self.unit):
            raise MeasureError(
                f"the direction is {len(self.unit)} wide, and {self.site} of {model.name} {found.shape[1]}"
            )
        return found @ self.unit

    @property
    def table(self) -> pd.DataFrame:
        """Site, gap and separation, one row a site."""
        import pandas as pd

        rows = [(site, (self.gaps or {})[site], (self.separation or {})[site]) for site in self.directions or {}]
        return pd.DataFrame(rows, columns=["site", "gap", "separation"])


@dataclass(frozen=True)
class Contrast:
    """Fits a direction between two sets of examples and gives it as a clamp.

    Args:
        sites: a name or pattern. Of several sites the clamp is put where directions fitted on one part of the examples
            best separate the others; `evaluate` chooses by what steering does.
        method: ``"means"``, ``"lda"``, ``"pca"`` or ``"logistic"``; see `direction`.
        over: which tokens of an example; see `states`.
        batch_size: rows a forward.
        seed: of the parts in which separation is looked at.

    >>> import actome as ac
    >>> model = ac.demo()
    >>> code = ["import os", "def f(x):", "return x", "for i in y:", "class A:", "x = [1]", "if x:", "print(x)"]
    >>> prose = ["The cat", "It is a", "When the", "This value", "An object", "You can", "See the", "There is"]
    >>> clamp = Contrast("blocks.{1..2}.resid.post").fit(model, Examples(code, prose))
    >>> with model.clamp(clamp.at(scale=2.0)):
    ...     text = model.generate("The value", max_new_tokens=4)
    >>> bool((clamp.monitor(model, code).mean() > clamp.monitor(model, prose).mean()))
    True
    """

    sites: str = "blocks.*.resid.post"
    method: Method = "means"
    over: Over = "last"
    batch_size: int = 8
    seed: int = 0

    def fit(self, model: Model, data: Examples) -> Steering:
        """The clamp.

        Raises:
            MeasureError: an unknown method; states that are the same in both sets, or not finite.
        """
        if self.method not in METHODS:
            raise MeasureError(f"method={self.method!r} does not exist; choose {', '.join(METHODS)}")
        options = {"over": self.over, "batch_size": self.batch_size}
        data = Examples.of(data)
        high, low = (states(model, some, self.sites, **options) for some in (data.positive, data.negative))
        directions = {site: direction(high[site], low[site], self.method) for site in high}
        gaps = {site: gap(directions[site], high[site], low[site]) for site in high}
        separation = {site: self._separation(high[site], low[site]) for site in high}
        best = max(separation, key=lambda site: (separation[site], -list(separation).index(site)))
        about = {
            "method": self.method,
            "over": self.over,
            "positive": count(data.positive),
            "negative": count(data.negative),
        }
        value = directions[best] * gaps[best]
        return Steering(best, value, directions=directions, gaps=gaps, separation=separation, about=about)

    def _separation(self, high_ND: Tensor, low_MD: Tensor) -> float:
        """Area under the ROC curve of examples projected on a direction that was fitted on the other half."""
        scores, labels = [], []
        if self.method == "pca":  # pairs stay together
            halves = [(part, part) for part in split(len(high_ND), [0.5, 0.5], self.seed)]
        else:
            both = (split(len(x), [0.5, 0.5], self.seed) for x in (high_ND, low_MD))
            halves = list(zip(*both, strict=True))
        for fitted, held in (halves, halves[::-1]):
            found = direction(high_ND[fitted[0]], low_MD[fitted[1]], self.method)
            # Along each direction in its own units, so that the two halves may be put together.
            middle = (high_ND[fitted[0]].mean(0) + low_MD[fitted[1]].mean(0)) / 2
            wide = max(gap(found, high_ND[fitted[0]], low_MD[fitted[1]]), 1e-12)
            for x, part, label in ((high_ND, held[0], 1), (low_MD, held[1], 0)):
                scores += (((x[part] - middle) @ found) / wide).tolist()
                labels += [label] * len(part)
        return auroc(torch.tensor(scores).numpy(), labels)
