"""What "the model does it by itself" and "the prompt asked for it" have in common, and what each has alone.

Letters: N, M, P, Q examples of the four kinds, D width, R permutations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from actome.clamps import Add
from actome.core.errors import ClampError, MeasureError
from actome.tasks.trials import Null

from .contrast import Examples
from .directions import checked
from .states import Over, states

if TYPE_CHECKING:
    import pandas as pd

    from actome.core.model import Model

Part = Literal["intrinsic", "prompted", "shared", "unique_int", "unique_pr"]
PARTS: tuple[Part, ...] = ("intrinsic", "prompted", "shared", "unique_int", "unique_pr")
_SAME = 1e-4  # length of what is left of a unit vector, below which it is rounding


@dataclass(frozen=True, eq=False)
class DirectionParts:
    """Two vectors for one behaviour and their parts; all directions are unit vectors (D), float32.

    Attributes:
        vector_int_, vector_pr_: the two differences of means, at their own lengths.
        cosine_: of the two, with what chance gives it: labels shuffled within each set, of states from which the
            difference itself is taken out.
        cosine_corrected_: the cosine without the noise that few examples leave in both vectors; NaN where one of them
            is no longer than its noise, and unsteady (it may exceed 1) where it is little longer. Takes examples to be
            independent. Below 1 by much, the two truly differ.
        site: where they were read, if that was said.
    """

    vector_int_: Tensor
    vector_pr_: Tensor
    cosine_: Null
    cosine_corrected_: float
    site: str | None = None

    @property
    def length_(self) -> float:
        """Mean length of the two vectors: what every part is scaled to when it steers."""
        return float(self.vector_int_.norm() + self.vector_pr_.norm()) / 2

    @property
    def intrinsic_(self) -> Tensor:
        """Direction of the unprompted difference."""
        return self.vector_int_ / self.vector_int_.norm()

    @property
    def prompted_(self) -> Tensor:
        """Direction of the prompted difference."""
        return self.vector_pr_ / self.vector_pr_.norm()

    @property
    def shared_(self) -> Tensor:
        """First singular direction of the two unit vectors, turned towards both.

        Raises:
            MeasureError: the two point away from one another, so that no direction leads towards both.
        """
        if self.cosine_.value <= 0:
            raise MeasureError(
                f"the intrinsic and the prompted vector have a cosine of {self.cosine_.value:.2f}: they share no "
                "direction that leads towards both; steer with either by itself"
            )
        both_2D = torch.stack([self.intrinsic_, self.prompted_]).double()
        found = torch.linalg.svd(both_2D, full_matrices=False).Vh[0]
        return (found if bool(found @ both_2D.sum(0) > 0) else -found).float()

    @property
    def unique_int_(self) -> Tensor:
        """What the intrinsic vector has beside the prompted one, at right angles to that."""
        return _beside(self.intrinsic_, self.prompted_)

    @property
    def unique_pr_(self) -> Tensor:
        """What the prompted vector has beside the intrinsic one, at right angles to that."""
        return _beside(self.prompted_, self.intrinsic_)

    def direction(self, part: Part) -> Tensor:
        """One of them by its name, (D).

        Raises:
            MeasureError: a name that is none of them, or a part that is not there.
        """
        if part not in PARTS:
            raise MeasureError(f"part={part!r} does not exist; choose {', '.join(PARTS)}")
        return getattr(self, f"{part}_")

    def clamp(self, part: Part = "shared", scale: float = 1.0, *, site: str | None = None) -> Add:
        """An `Add` along one part; at one scale, all parts push equally far: `length_` at scale 1.

        Args:
            part: see `PARTS`.
            scale: in lengths.
            site: where; by default where the vectors were read.

        Raises:
            ClampError: no site is known.
        """
        return self._add(self.direction(part), scale, site)

    def random(self, seed: int = 0, scale: float = 1.0, *, site: str | None = None) -> Add:
        """The same push along a random direction: the control."""
        noise = torch.randn(self.vector_int_.shape, generator=torch.Generator().manual_seed(seed))
        return self._add(noise / noise.norm(), scale, site)

    @property
    def table(self) -> pd.DataFrame:
        """Cosines of the five directions with one another; NaN for parts that are not there."""
        import pandas as pd

        found = {}
        for part in PARTS:
            try:
                found[part] = self.direction(part).double()
            except MeasureError:
                found[part] = torch.full_like(self.vector_int_.double(), float("nan"))
        stacked = torch.stack(list(found.values()))
        return pd.DataFrame((stacked @ stacked.T).numpy(), index=list(PARTS), columns=list(PARTS))

    def _add(self, direction_D: Tensor, scale: float, site: str | None) -> Add:
        where = site or self.site
        if where is None:
            raise ClampError("these vectors were fitted on states of an unnamed site; give site=")
        return Add(where, direction_D * self.length_, scale=scale)


@dataclass(frozen=True)
class SplitDirections:
    r"""Splits the direction of a behaviour by whether the model shows it by itself or was asked to.

    Of responses without a prompt for the behaviour, and of responses to prompts about it, each labelled by whether the
    *response* shows it, with unit vectors :math:`\hat v`:

    .. math::
        v_{int} = \bar h^{int}_{shown} - \bar h^{int}_{not}, \qquad v_{pr} = \bar h^{pr}_{shown} - \bar h^{pr}_{not},
        \qquad unique_{int} \propto \hat v_{int} - (\hat v_{int} \cdot \hat v_{pr}) \, \hat v_{pr},

    :math:`unique_{pr}` the other way round, and shared the first right singular vector of the two, stacked.

    A label taken from the prompt instead finds the prompt; and since the two vectors have different lengths, parts are
    comparable only at equal ones, which `DirectionParts.clamp` sees to.

    Args:
        site: where to read and to steer; needed for `fit_examples`, and for clamps unless they are given one.
        over: which tokens of an example; see `states`.
        permutations: of labels, for the null of the cosine.
        batch_size: rows a forward.
        seed: of the permutations.

    Source: Han et al. 2025, Dual Mechanisms of Value Expression: Intrinsic vs. Prompted Values in Large Language Models
    (differences of means; shared and unique axes). The correction for noise is ours, after Spearman's for attenuation.

    >>> g = torch.Generator().manual_seed(0)
    >>> both, asked = torch.eye(64)[0], torch.eye(64)[1]
    >>> noise = torch.randn(4, 200, 64, generator=g)
    >>> parts = SplitDirections().fit(noise[0] + 3 * both, noise[1], noise[2] + 2 * both + 2 * asked, noise[3])
    >>> bool(parts.unique_pr_ @ asked > 0.9), parts.cosine_.p < 0.01
    (True, True)
    """

    site: str | None = None
    over: Over = "response"
    permutations: int = 500
    batch_size: int = 8
    seed: int = 0

    def fit(self, int_pos: Tensor, int_neg: Tensor, pr_pos: Tensor, pr_neg: Tensor) -> DirectionParts:
        """From states of the four kinds, at one site.

        Args:
            int_pos, int_neg: (N, D) and (M, D), of unprompted responses that show the behaviour, and that do not.
            pr_pos, pr_neg: (P, D) and (Q, D), of prompted ones.

        Raises:
            MeasureError: fewer than two of a kind, widths that differ, values that are not finite, means that are the
                same, too few permutations.
        """
        if self.permutations < 1:
            raise MeasureError(f"permutations={self.permutations}; give one at least")
        sets = []
        for name, high, low in (("intrinsic", int_pos, int_neg), ("prompted", pr_pos, pr_neg)):
            try:
                high_ND, low_MD = (x.cpu() for x in checked(high, low))
            except MeasureError as error:
                raise MeasureError(f"{name}: {error}") from None
            if not bool((high_ND.mean(0) - low_MD.mean(0)).norm() > 1e-7 * high_ND.abs().amax()):
                raise MeasureError(f"{name}: the two sets of states are the same; there is no direction between them")
            sets.append((high_ND, low_MD))
        if sets[0][0].shape[1] != sets[1][0].shape[1]:
            raise MeasureError(
                f"intrinsic states are {sets[0][0].shape[1]} wide and prompted ones {sets[1][0].shape[1]}; read both "
                "at one site"
            )
        vectors = [high.mean(0) - low.mean(0) for high, low in sets]
        value = float(torch.cosine_similarity(*vectors, dim=0))
        generator = torch.Generator().manual_seed(self.seed)
        null_R = torch.cosine_similarity(*(self._shuffled(*one, generator) for one in sets), dim=1).numpy()
        signal = [float(v @ v) - _noise(*one) for v, one in zip(vectors, sets, strict=True)]
        corrected = float(vectors[0] @ vectors[1]) / np.sqrt(signal[0] * signal[1]) if min(signal) > 0 else np.nan
        spread = float(null_R.std())
        chance = Null(
            value,
            null_R,
            float((1 + (null_R >= value).sum()) / (1 + len(null_R))),
            (value - float(null_R.mean())) / spread if spread > 0 else float("nan"),
        )
        return DirectionParts(vectors[0].float(), vectors[1].float(), chance, float(corrected), self.site)

    def fit_examples(self, model: Model, intrinsic: Examples, prompted: Examples) -> DirectionParts:
        """From examples of the model's own responses.

        Args:
            model: whose states are read, at `site`.
            intrinsic: ``Examples(shown, not shown)`` without a prompt for the behaviour; with ``over="response"``, the
                default, each is ``(prompts, responses)``.
            prompted: the same with prompts about it; both kinds labelled by the responses.

        Raises:
            MeasureError: no site, or a pattern of several.
        """
        if self.site is None:
            raise MeasureError("site= says where to read; give one such as blocks.1.resid.post")
        places = model.match(self.site)
        if len(places) != 1:
            raise MeasureError(f"{self.site} selects {len(places)} sites; give one, such as {places[0].name}")
        read = [
            states(model, some, places[0].name, over=self.over, batch_size=self.batch_size)[places[0].name]
            for both in (Examples.of(intrinsic), Examples.of(prompted))
            for some in (both.positive, both.negative)
        ]
        return self.fit(*read)

    def _shuffled(self, high_ND: Tensor, low_MD: Tensor, generator: torch.Generator) -> Tensor:
        """Differences of means under shuffled labels, (R, D), of states without their own difference of means.

        Left in, that difference would be the main axis of what is shuffled, and come out of chance as well.
        """
        both = torch.cat([high_ND - high_ND.mean(0), low_MD - low_MD.mean(0)])
        weight = torch.cat([torch.full((len(x),), s / len(x)) for x, s in ((high_ND, 1.0), (low_MD, -1.0))]).double()
        order = torch.stack([torch.randperm(len(both), generator=generator) for _ in range(self.permutations)])
        return weight[order] @ both


def _beside(direction_D: Tensor, other_D: Tensor) -> Tensor:
    """The part of a unit vector at right angles to another, of length one."""
    a, b = direction_D.double(), other_D.double()
    left = a - (a @ b) * b
    if not bool(left.norm() > _SAME):
        raise MeasureError("the intrinsic and the prompted vector point the same way; neither has a part of its own")
    return (left / left.norm()).float()


def _noise(high_ND: Tensor, low_MD: Tensor) -> float:
    """What the squared length of a difference of means owes to the spread within the two sets, in expectation."""
    return sum(float(x.var(0).sum()) / len(x) for x in (high_ND, low_MD))
