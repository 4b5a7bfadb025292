"""What a model does by itself and what it does when asked: two directions, what they share and what is of each alone.

Letters: N examples of a set, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from actome.clamps import Add
from actome.core.errors import MeasureError
from actome.tasks.trials import Null, null

from .contrast import Examples
from .directions import direction, gap
from .states import Over, states

if TYPE_CHECKING:
    from actome.core.model import Model


@dataclass(frozen=True)
class SplitDirection:
    """A direction in two parts. Every clamp is an `Add` of the same length, so that what each does can be compared.

    Attributes:
        intrinsic, prompted: the two directions that were fitted.
        shared_: the axis that explains most of both, their first singular direction.
        unique_int_: the intrinsic one without its part along the prompted one.
        unique_pr_: the prompted one without its part along the intrinsic one.
        cosine: of the two, beside its values when the labels of the intrinsic examples are permuted.
        gaps: how far apart the means of the two sets lie, along the intrinsic and along the prompted direction; the
            clamps' length is the mean of both.
    """

    intrinsic: Add
    prompted: Add
    shared_: Add
    unique_int_: Add
    unique_pr_: Add
    cosine: Null
    gaps: tuple[float, float]

    @property
    def clamps(self) -> dict[str, Add]:
        """All five by name, as `evaluate`, `interference` and `save_clamps` take them."""
        names = ("intrinsic", "prompted", "shared_", "unique_int_", "unique_pr_")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class SplitDirections:
    r"""Splits the direction of a value into what its expression unasked and on demand have in common, and the rest.

    With the unit differences of means :math:`u` of unprompted and :math:`p` of prompted responses, the shared axis is
    the first right singular vector of :math:`[u; p]`, which is :math:`(u \pm p) / \lVert u \pm p \rVert` with the sign
    of :math:`u \cdot p`; the unique parts are :math:`u - (u \cdot p) p` and :math:`p - (u \cdot p) u`. Where
    :math:`u \cdot p < 0` the axis is there and nothing is shared: look at the cosine first.

    Whether an example expresses the value must be read off the response. Labels that are taken from the prompt make
    the prompt's presence part of both directions.

    Args:
        site: where; one site with one vector a token.
        over: which tokens of an example; see `states`.
        permutations: of the null.
        batch_size: rows a forward.
        seed: of the permutations.

    Source: Han et al. 2025, Dual Mechanisms of Value Expression: Intrinsic vs. Prompted Values in LLMs; the
    orthogonalisation of the unique parts and the null are stated here as they are done.

    >>> generator = torch.Generator().manual_seed(0)
    >>> noise = torch.randn(4, 200, 64, generator=generator)
    >>> value, asked = 2 * torch.eye(64)[0], 2 * torch.eye(64)[1]
    >>> found = SplitDirections("blocks.1.resid.post").of_states(
    ...     noise[0] + value, noise[1], noise[2] + value + asked, noise[3])
    >>> bool(0.5 < found.cosine.value < 0.9), found.cosine.p < 0.01
    (True, True)
    >>> bool(found.unique_pr_.value[1] > 0.8 * found.unique_pr_.value.norm())  # that it was asked for
    True
    """

    site: str
    over: Over = "last"
    permutations: int = 200
    batch_size: int = 8
    seed: int = 0

    def fit(self, model: Model, intrinsic: Examples, prompted: Examples) -> SplitDirection:
        """The parts, from responses that a model gave.

        Args:
            model: whose states are read.
            intrinsic: without any instruction: examples that express the value, and that do not.
            prompted: the same with an instruction; as the negative side, those that do not express it, or responses
                without the instruction that do not.

        Raises:
            MeasureError: as `of_states`; a pattern of several sites.
        """
        names = [one.name for one in model.match(self.site)]
        if len(names) != 1:
            raise MeasureError(f"{self.site!r} is {len(names)} sites; a direction is split at one")
        sides = []
        for data in (Examples.of(intrinsic), Examples.of(prompted)):
            for some in (data.positive, data.negative):
                got = states(model, some, names[0], over=self.over, batch_size=self.batch_size)
                sides.append(got[names[0]])
        return self.of_states(*sides)

    def of_states(self, int_pos_ND: Tensor, int_neg_ND: Tensor, pr_pos_ND: Tensor, pr_neg_ND: Tensor) -> SplitDirection:
        """The parts, from states (N, D) with and without the value, unprompted and prompted.

        Raises:
            MeasureError: too few states, widths that differ, sets that are the same, two directions that are one.
        """
        u_D, p_D = direction(int_pos_ND, int_neg_ND).double(), direction(pr_pos_ND, pr_neg_ND).double()
        if len(u_D) != len(p_D):
            raise MeasureError(
                f"intrinsic states have the width {len(u_D)} and prompted ones {len(p_D)}; of two sites?"
            )
        cosine = float(u_D @ p_D)
        if 1 - abs(cosine) < 1e-6:
            raise MeasureError("the intrinsic and the prompted direction are the same; neither has a part of its own")
        gaps = (gap(u_D, int_pos_ND, int_neg_ND), gap(p_D, pr_pos_ND, pr_neg_ND))
        parts = (
            u_D,
            p_D,
            u_D + p_D if cosine >= 0 else u_D - p_D,
            u_D - cosine * p_D,
            p_D - cosine * u_D,
        )
        length = sum(gaps) / 2
        clamps = [Add(self.site, (one / one.norm() * length).float()) for one in parts]
        return SplitDirection(*clamps, self._null(int_pos_ND, int_neg_ND, p_D), gaps)

    def _null(self, int_pos_ND: Tensor, int_neg_ND: Tensor, p_D: Tensor) -> Null:
        x_ND = torch.cat((int_pos_ND, int_neg_ND)).double()
        label_N = torch.arange(len(x_ND)) < len(int_pos_ND)

        def statistic(x: Tensor, label: Tensor) -> float:
            apart_D = x[label].mean(0) - x[~label].mean(0)
            return float(apart_D @ p_D / apart_D.norm().clamp_min(1e-30))

        return null(statistic, x_ND, label_N, permutations=self.permutations, seed=self.seed)
