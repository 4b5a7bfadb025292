"""How little a site cares about a transformation of its inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..core.errors import MeasureError
from ..core.fold import Fold
from ..core.real import double, ratio, wide
from .paired import CrossMoments, centred_products, cross_moments

if TYPE_CHECKING:
    import pandas as pd

Metric = Literal["l2", "cos", "cka"]
_PAIRS = ("same", "same_count", "different", "different_count")


class Invariance(Fold):
    r"""How far representations move when their inputs are transformed, against how far they lie apart anyhow.

    From the representations :math:`z(t_1 x)` and :math:`z(t_2 x)` of two transformed copies of the same inputs:

    - ``l2``: ``sensitivity`` is :math:`\mathrm E_x \|z(t_1 x) - z(t_2 x)\| \,/\,
      \mathrm E_{x \ne x'} \|z(t_1 x) - z(t_2 x')\|`: 0 invariant, 1 as far apart as different inputs are, which are
      transformed by the same draws
    - ``cos``: ``sensitivity`` is the ratio of the mean cosines, in the same order: 1 as unlike as different inputs,
      larger the more invariant. Meaningful where cosines are positive, as after a ReLU.
    - ``cka``: ``cka`` is the linear CKA between the copies; 1 invariant up to rotation and scale, not normalised
      by anything else
    - with ``l2`` and ``cos`` also ``same`` and ``different``, the two means

    Over inputs; those with a non-finite unit in either copy are left out. Different inputs are taken within a batch:
    each is paired with `shifts` others (all when the batch has no more), so batches should hold dozens of inputs in
    random order. NaN when nothing was paired, and for representations that are the same for every input.

    Args:
        metric: ``"l2"``, ``"cos"`` or ``"cka"``.
        shifts: how many other inputs each one is compared with.
        max_width: of ``"cka"``, which holds three unit x unit matrices in float64.

    Shapes: `update(first, second)` takes two tensors (N, unit), row by row of the same inputs. All values ().

    Source: Speicher, Nanda and Gummadi 2024, Understanding the Role of Invariance in Transfer Learning.
    Their code normalises within the first copy, with a shuffle that leaves some inputs in place; here it is between
    the copies and never the same input. Linear CKA: Kornblith et al. 2019.

    Example:
        >>> z = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]])
        >>> measure = Invariance()
        >>> measure.update(z, z + torch.tensor([1.0, 0.0]))
        >>> {name: round(float(value), 3) for name, value in measure.compute().items()}
        {'sensitivity': 0.217, 'same': 1.0, 'different': 4.608}
    """

    reductions = {}  # noqa: RUF012  set for each metric

    def __init__(self, metric: Metric = "l2", shifts: int = 8, max_width: int = 4096, **options: object):
        if metric not in ("l2", "cos", "cka"):
            raise MeasureError(f"metric={metric!r} does not exist; choose 'l2', 'cos' or 'cka'")
        if shifts < 1:
            raise MeasureError(f"shifts={shifts}; each input must be compared with at least one other")
        names = tuple(CrossMoments.reductions) if metric == "cka" else _PAIRS
        # Each metric keeps statistics of its own; they have to be known before the base declares them as state.
        self.__dict__["reductions"] = dict.fromkeys(names, "sum")
        super().__init__(**options)
        self.metric, self.shifts, self.max_width = metric, shifts, max_width

    def statistics(self, first: Tensor, second: Tensor) -> dict[str, Tensor]:
        """Sums and counts of pairs, or the moments of both copies."""
        if first.shape != second.shape or first.ndim != 2:
            raise MeasureError(
                f"Invariance takes two copies of the shape (N, unit), "
                f"not {tuple(first.shape)} and {tuple(second.shape)}"
            )
        first, second = wide(first.detach()), wide(second.detach())
        keep = first.isfinite().all(-1) & second.isfinite().all(-1)
        first, second = first[keep], second[keep]
        if self.metric == "cka":
            return self._moments(first, second)
        N, count = len(first), min(self.shifts, max(len(first) - 1, 0))
        # Evenly spaced shifts of the rows: every input meets `count` others, never itself, without a random draw.
        shifts = sorted({1 + (N - 1) * i // count for i in range(count)}) if count else []
        between = double(first.new_zeros(()))
        for shift in shifts:
            between += self._compare(first, second.roll(shift, 0)).sum()
        return {
            "same": self._compare(first, second).sum(),
            "same_count": torch.tensor(N, device=first.device),
            "different": between,
            "different_count": torch.tensor(N * len(shifts), device=first.device),
        }

    def _compare(self, first: Tensor, second: Tensor) -> Tensor:
        if self.metric == "l2":
            return double((first - second).norm(dim=-1))
        return double(torch.cosine_similarity(first, second, dim=-1))

    def _moments(self, first: Tensor, second: Tensor) -> dict[str, Tensor]:
        if first.shape[1] > self.max_width:
            raise MeasureError(
                f"{first.shape[1]} units are more than Invariance(metric='cka', max_width={self.max_width}) takes; "
                f"a larger max_width needs {24e-6 * first.shape[1] ** 2:.0f} MB for each site"
            )
        return cross_moments(double(first), double(second))

    def values(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See the class."""
        if self.metric != "cka":
            same = ratio(stats["same"], stats["same_count"])
            different = ratio(stats["different"], stats["different_count"])
            return {"sensitivity": same / different, "same": same, "different": different}
        m = centred_products(stats)
        return {"cka": m.xy.square().sum() / (m.xx.norm() * m.yy.norm())}


def measure_invariance(
    model: Any,
    batches: Iterable[Tensor],
    transform: Callable[[Tensor, torch.Generator], Tensor],
    pattern: str,
    *,
    metric: Metric = "l2",
    pool: str | int = "mean",
    shifts: int = 8,
    seed: int = 0,
) -> pd.DataFrame:
    """How invariant the sites of a model are to a transformation of its inputs.

    Args:
        model: an actome `Model`.
        batches: of untransformed inputs, (batch, ...).
        transform: ``transform(inputs, generator)``: a freshly transformed copy, each input with a draw of its own.
        pattern: of sites.
        pool: how tokens or pixels become one vector an input, as in `Model.fold`: ``"mean"``, ``"flat"``, ``"last"``.
        metric, shifts: as in `Invariance`.
        seed: of the transformations.

    Returns:
        One row a site: ``site`` and the values of `Invariance`.

    Raises:
        SiteError: no site matches. MeasureError: no batch.

    Example:
        >>> import actome as ac
        >>> model = ac.wrap(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU()))
        >>> def same(x, generator):
        ...     return x
        >>> frame = measure_invariance(model, [torch.eye(4)], same, "module:*", pool="flat")
        >>> frame["sensitivity"].tolist()
        [0.0, 0.0]
    """
    import pandas as pd

    generator = torch.Generator().manual_seed(seed)

    def copies() -> Iterable[tuple[Tensor]]:
        for batch in batches:
            # Both copies in one forward: those of the same inputs stay together whatever the model does to a batch.
            yield (torch.cat([transform(batch, generator), transform(batch, generator)]),)

    folds = model.fold(copies(), {pattern: _Copies(Invariance(metric, shifts))}, pool=pool)
    rows = [
        {"site": site, **{name: float(value) for name, value in one.inner.compute().items()}}
        for site, one in folds.items()
    ]
    return pd.DataFrame(rows)


class _Copies(Fold):
    """Feeds a fold of two copies from one tensor that holds both, one below the other."""

    reductions = {}  # noqa: RUF012

    def __init__(self, inner: Invariance):
        super().__init__()
        self.inner = inner

    def update(self, x: Tensor) -> None:
        self.inner.update(*x.chunk(2))
