"""Which of thousands of features carry information about an outcome, whatever the shape of the relation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..core.errors import MeasureError
from .feature_information import FeatureInformation
from .rows import finite_rows, nats_per

Method = Literal["kde", "bin", "knn"]


@dataclass(frozen=True)
class Screening:
    """Features by how much they tell of an outcome.

    Attributes:
        indices: of the best, best first.
        information: theirs, in `unit`.
        p: for each of them, the share of permuted outcomes with which it had as much, the true one counted. It does not
            account for having been chosen among many: with F features, the smallest of F such p is near 1/F by chance.
        all_information: of every feature.
        unit: ``"bits"`` or ``"nats"``.
    """

    indices: Tensor
    information: Tensor
    p: Tensor
    all_information: Tensor
    unit: str


def screen(
    acts: Tensor,
    y: Tensor,
    method: Method = "kde",
    top: int = 50,
    *,
    permutations: int = 99,
    seed: int = 0,
    unit: Literal["bits", "nats"] = "bits",
    **options: Any,
) -> Screening:
    """Ranks features by mutual information with an outcome, and says which of the best could be chance.

    A relation that is not monotone, which a correlation misses, is found. Features with many distinct values get more
    by chance from every estimator; that is what the permutations are for.

    Args:
        acts: (rows, features).
        y: (rows); integers are classes, floats a continuous outcome.
        method: ``"kde"`` or ``"bin"`` (`FeatureInformation`), or ``"knn"`` (Kraskov's estimator with 3 neighbours, from
            scikit-learn; much slower).
        top: how many to keep.
        permutations: of y, for the p-values; 0 for none (p is NaN).
        options: of `FeatureInformation` (grid, bins).

    Source: Yang et al. 2024, fastHDMI; Kraskov et al. 2004 and Ross 2014 for knn.

    >>> g = torch.Generator().manual_seed(0)
    >>> x = torch.randn(400, 30, generator=g)
    >>> found = screen(x, x[:, 7] ** 2, "bin", top=2)
    >>> int(found.indices[0]), float(found.p[0])
    (7, 0.01)
    """
    if method not in ("kde", "bin", "knn"):
        raise MeasureError(f"method={method!r} does not exist; choose 'kde', 'bin' or 'knn'")
    if not isinstance(acts, Tensor) or not isinstance(y, Tensor):
        kinds = f"{type(acts).__name__} and {type(y).__name__}"
        raise MeasureError(f"screen takes tensors, activations and outcome, not {kinds}; see torch.as_tensor")
    classes = None if y.is_floating_point() else int(y.max()) + 1
    everything = _estimate(acts, y, method, classes, seed, unit, options)
    indices = everything.argsort(descending=True, stable=True)[:top]
    best, p = everything[indices], torch.full((len(indices),), torch.nan, dtype=torch.float64)
    if permutations:
        generator = torch.Generator().manual_seed(seed)
        chosen, as_much = acts[:, indices], torch.ones(len(indices))
        for _ in range(permutations):
            shuffled = y[torch.randperm(len(y), generator=generator).to(y.device)]
            as_much += (_estimate(chosen, shuffled, method, classes, seed, unit, options) >= best).cpu()
        p = as_much.double() / (1 + permutations)
    return Screening(indices, best, p, everything, unit)


def _estimate(
    x: Tensor, y: Tensor, method: Method, classes: int | None, seed: int, unit: Any, options: dict[str, Any]
) -> Tensor:
    if method != "knn":
        one = FeatureInformation(method, num_classes=classes, unit=unit, **options)
        one.update(x, y)
        return one.compute()["information"]
    from sklearn.feature_selection import mutual_info_classif, mutual_info_regression

    (x, y) = finite_rows("screen", x, y)
    estimate = mutual_info_regression if classes is None else mutual_info_classif
    found = estimate(x.double().cpu().numpy(), y.cpu().numpy(), n_neighbors=3, random_state=seed, **options)
    return torch.from_numpy(found) / nats_per(unit)
