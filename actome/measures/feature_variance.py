"""How much of the variance of activations each known feature of the inputs occupies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.errors import MeasureError
from ..core.fold import Fold, Reduction
from ..core.real import double, ratio


class FeatureVariance(Fold):
    r"""Shares of the variance of a site's activations that known features of the inputs account for.

    With the centred activations :math:`H` (N tokens, U units) and the projection :math:`P_f` onto the indicators of the
    classes of feature *f*, that is onto its class means:

    - ``share``: :math:`\|P_f H\|^2 / \|H\|^2` for each feature, the between-class share of the variance. The shares of
      features that are independent in the data add up.
    - ``joint``: the same for all features together (additively, without interactions)
    - ``unique``: for each feature, what ``joint`` loses without it; equal to ``share`` for independent features
    - ``unit_share``: ``share`` unit by unit, the squared correlation ratio; of a feature with two classes the squared
      correlation with it
    - ``density``: share of units whose correlation (ratio) with the feature is above `threshold`

    A share says how much room a feature takes, not whether it can be read: compare it with the accuracy of a probe.
    A feature with C classes that has nothing to do with the activations gets (C - 1) / (N - 1) on average, so N should
    be many times C. NaN where the activations do not vary. Rows with a non-finite unit are left out.

    Args:
        classes: for each feature how many classes it has: its labels are 0 to classes - 1.
        threshold: of the density.

    Shapes: `update(x, labels)` takes x (N, unit) or (batch, pos, unit) and integer labels of the same leading dims and
    (feature) behind, or without it for a single feature; negative labels leave a row out. share, unique, density
    (feature); joint (); unit_share (feature, unit).

    Source: Lampinen, Chan and Hermann 2024, Learned feature representations are biased by complexity, learning order,
    position, and more.

    Example:
        >>> x = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [3.0, 1.0], [-3.0, 1.0]])
        >>> measure = FeatureVariance([2, 2])
        >>> measure.update(x, torch.tensor([[1, 0], [0, 0], [1, 1], [0, 1]]))
        >>> [round(float(value), 3) for value in measure.compute()["share"]]
        [0.973, 0.027]
    """

    reductions: ClassVar[dict[str, Reduction]] = {
        "rows": "sum", "total": "sum", "square": "sum", "class_total": "sum", "gram": "sum",
    }  # fmt: skip

    def __init__(self, classes: Sequence[int] | int, threshold: float = 0.3, **options: object):
        super().__init__(**options)
        self.classes = (classes,) if isinstance(classes, int) else tuple(classes)
        if not self.classes or min(self.classes) < 2:
            raise MeasureError(f"classes={classes!r}; each feature needs two classes or more")
        self.threshold = threshold

    def statistics(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """rows: (); total, square: (unit); class_total: (all classes, unit); gram: counts of pairs of classes."""
        if not isinstance(x, Tensor) or not isinstance(labels, Tensor):
            kinds = f"{type(x).__name__} and {type(labels).__name__}"
            raise MeasureError(f"FeatureVariance takes tensors, not {kinds}; see torch.as_tensor")
        labels = labels[..., None] if labels.ndim == x.ndim - 1 else labels
        if labels.shape[:-1] != x.shape[:-1] or labels.shape[-1] != len(self.classes):
            raise MeasureError(
                f"labels of the shape {tuple(labels.shape)} do not fit activations {tuple(x.shape)} "
                f"and {len(self.classes)} features"
            )
        if labels.is_floating_point():
            raise MeasureError(f"labels are class numbers, and these are {labels.dtype}")
        x_NU, labels_NF = x.detach().flatten(0, -2), labels.flatten(0, -2).to(x.device)
        keep = x_NU.isfinite().all(-1) & (labels_NF >= 0).all(-1)
        if not bool(keep.all()):
            x_NU, labels_NF = x_NU[keep], labels_NF[keep]
        sizes = torch.tensor(self.classes, device=x.device)
        if bool((labels_NF >= sizes).any()):
            found = labels_NF.amax(0).tolist()
            raise MeasureError(f"labels go up to {found}, and the features have {list(self.classes)} classes")
        x_NU = double(x_NU)
        start = F.pad(sizes.cumsum(0), (1, 0))[:-1]
        design_NK = torch.zeros(len(x_NU), sum(self.classes), dtype=x_NU.dtype, device=x.device)
        design_NK.scatter_(1, labels_NF.long() + start, 1.0)
        return {
            "rows": torch.tensor(len(x_NU), device=x.device),
            "total": x_NU.sum(0),
            "square": x_NU.square().sum(0),
            "class_total": design_NK.T @ x_NU,
            "gram": design_NK.T @ design_NK,
        }

    def values(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See the class."""
        rows = double(stats["rows"]).clamp_min(1)
        mean_U = stats["total"] / rows
        scatter_U = (stats["square"] - rows * mean_U.square()).clamp_min(0)
        # Below this the subtraction leaves only its own rounding: the unit does not vary.
        scatter_U = scatter_U.where(scatter_U > 1e-12 * stats["square"], 0.0)
        count_K = stats["gram"].diagonal()
        centred_KU = stats["class_total"] - count_K[:, None] * mean_U
        places = torch.arange(len(count_K), device=count_K.device).split(list(self.classes))
        between_FU = torch.stack([_explained(stats["gram"], centred_KU, place) for place in places])
        everything = torch.cat(places)
        joint_U = _explained(stats["gram"], centred_KU, everything)
        rest = [torch.cat([p for p in places if p is not place] or [place[:0]]) for place in places]
        rest_FU = torch.stack([_explained(stats["gram"], centred_KU, place) for place in rest])
        whole = scatter_U.sum()
        unit_share = (ratio(between_FU, scatter_U)).where(scatter_U > 0, torch.nan)
        return {
            "share": ratio(between_FU.where(scatter_U > 0, 0.0).sum(-1), whole),
            "joint": ratio(joint_U.where(scatter_U > 0, 0.0).sum(), whole),
            "unique": ratio((joint_U - rest_FU).where(scatter_U > 0, 0.0).sum(-1), whole),
            "unit_share": unit_share,
            "density": (unit_share > self.threshold**2).double().mean(-1),
        }


def _explained(gram_KK: Tensor, centred_KU: Tensor, place: Tensor) -> Tensor:
    """Sum of squares of each unit that the indicators at `place` account for, (unit)."""
    if not len(place):
        return centred_KU.new_zeros(centred_KU.shape[1])
    part = centred_KU[place]
    # The indicators of a feature add up to the constant, to which the centred activations are orthogonal, and classes
    # may be empty: the pseudo-inverse takes both.
    return (part * (torch.linalg.pinv(gram_KK[place][:, place], hermitian=True) @ part)).sum(0).clamp_min(0)


def feature_rsa(x: Tensor, labels: Tensor) -> Tensor:
    """How alike the geometry of activations and of each feature alone are: representational similarity analysis.

    The Spearman correlation, over all pairs of rows, of the Euclidean distance between activations with whether the
    feature differs. It follows the shares of variance, so a feature that takes little room looks absent although it can
    be read out perfectly.

    Args:
        x: (N, unit); all N (N - 1) / 2 pairs are taken, so a few hundred rows.
        labels: (N, feature) or (N).

    Returns:
        (feature), NaN for a feature that is constant.

    Raises:
        MeasureError: fewer than three rows.

    Source: as `FeatureVariance`.

    Example:
        >>> x = torch.tensor([[0.0], [0.1], [5.0], [5.2]])
        >>> round(float(feature_rsa(x, torch.tensor([0, 0, 1, 1]))), 2)
        0.83
    """
    from scipy.spatial.distance import pdist
    from scipy.stats import spearmanr

    labels = labels[:, None] if labels.ndim == 1 else labels
    if len(x) < 3 or len(x) != len(labels):
        raise MeasureError(f"{len(x)} activations and {len(labels)} labels; at least three rows of both are needed")
    distance = pdist(x.detach().double().cpu().numpy())
    found = []
    for one in labels.T:
        differs = pdist(one[:, None].double().cpu().numpy(), "hamming")
        constant = differs.min() == differs.max() or distance.min() == distance.max()
        found.append(float("nan") if constant else float(spearmanr(distance, differs).statistic))
    return torch.tensor(found, dtype=torch.float64)
