"""Neural collapse: how far the features of each class shrink to one point, and where those points lie."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..core.errors import MeasureError
from ..core.fold import Fold, Reduction
from ..core.real import double
from .rows import checked_labels, finite_rows

if TYPE_CHECKING:
    from ..core.model import Model

# Eigenvalues of the between-class covariance below this share of the largest are the rounding of its float64 sums.
_CUT = 1e-10


class NeuralCollapse(Fold):
    r"""Neural collapse of features: within-class scatter, and how close the class means are to a simplex.

    With class means :math:`\mu_c` over :math:`n_c` rows of N, their mean weighted by :math:`n_c` :math:`\mu_G`,
    :math:`S_W = \frac1N \sum_i (x_i - \mu_{y_i})(x_i - \mu_{y_i})^\top` and
    :math:`S_B = \frac1N \sum_c n_c (\mu_c - \mu_G)(\mu_c - \mu_G)^\top`:

    - ``nc1``: :math:`\mathrm{tr}\, S_W / \mathrm{tr}\, S_B`
    - ``nc1_pinv``: :math:`\mathrm{tr}(S_W S_B^+) / K`; of the at most K - 1 directions of S_B those below 1e-10 of the
      largest are rounding and are cut
    - ``nc2``: with the means centred at their own mean and put side by side in M,
      :math:`\lVert M^\top M / \lVert M^\top M \rVert_F - (I - 11^\top / K) / \sqrt{K - 1} \rVert_F`
    - ``equinorm``: standard deviation over mean of the centred means' lengths
    - ``equiangle``: standard deviation of their pairwise cosines
    - ``max_angle``: mean of :math:`|\cos + 1/(K-1)|` over pairs
    - ``nc3``: if `weights` are given, :math:`\lVert W^\top / \lVert W \rVert_F - M / \lVert M \rVert_F \rVert_F`
    - ``classes``, ``singletons``: how many classes came at all, and with one row only

    All go to 0 in collapse. A class with a single row has no within-class scatter and would lower NC1: it is left out
    of it. Absent classes are left out of everything, K being the classes that came (two are needed, or NaN).
    NC4 (does the nearest class mean predict as the classifier does?) needs the means before it can be counted: take
    `means` and fold a second time into `CentreAgreement`.

    Args:
        num_classes: labels are 0 to num_classes - 1.
        weights: of the classifier on these features, (class, unit), for NC3.
        max_width: more units are refused; U units hold U^2 float64 numbers.

    Shapes: update takes features (rows, units) and labels (rows); values (). Rows with a non-finite unit are left out.
    Sums are in float64: scatter below 1e-13 of the squared length of the features is rounding.

    Source: Papyan, Han and Donoho 2020, Prevalence of Neural Collapse; in the forms of Tirer, Huang and Niles-Weed
    2023, Perturbation Analysis of Neural Collapse.

    Example:
        >>> collapse = NeuralCollapse(num_classes=2)
        >>> x = torch.tensor([[1.0, 0.1], [1.0, -0.1], [-1.0, 0.1], [-1.0, -0.1]])
        >>> collapse.update(x, torch.tensor([0, 0, 1, 1]))
        >>> round(float(collapse.compute()["nc1"]), 4), round(float(collapse.compute()["nc2"]), 4)
        (0.01, 0.0)
    """

    reductions: ClassVar[dict[str, Reduction]] = {"count": "sum", "total": "sum", "moment": "sum"}

    def __init__(self, num_classes: int, weights: Tensor | None = None, max_width: int = 4096, **options: object):
        super().__init__(**options)
        if num_classes < 2:
            raise MeasureError(f"num_classes={num_classes}: collapse is a matter of two classes or more")
        if weights is not None and (weights.ndim != 2 or len(weights) != num_classes):
            raise MeasureError(f"weights are (class, unit) of {num_classes} classes, not {tuple(weights.shape)}")
        self.num_classes, self.max_width = num_classes, max_width
        self.weights = None if weights is None else weights.detach()

    def statistics(self, x_NU: Tensor, y_N: Tensor) -> dict[str, Tensor]:
        """count: (class); total: (class, unit), sums; moment: (unit, unit), summed outer products of all rows."""
        x_NU, y_N = finite_rows("NeuralCollapse", x_NU, y_N)
        if x_NU.shape[1] > self.max_width:
            raise MeasureError(f"{x_NU.shape[1]} units are more than NeuralCollapse(max_width={self.max_width}) takes")
        y_N = checked_labels("NeuralCollapse", y_N, self.num_classes)
        x = double(x_NU)
        total = x.new_zeros(self.num_classes, x.shape[1]).index_add_(0, y_N, x)
        return {"count": y_N.bincount(minlength=self.num_classes), "total": total, "moment": x.T @ x}

    def values(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See the class."""
        count, total = stats["count"], double(stats["total"])
        many, seen = count > 1, count > 0
        out = dict(zip(("nc1", "nc1_pinv"), self._within(stats, many), strict=True))
        means = total[seen] / count[seen, None]
        out |= _simplex(means)
        if self.weights is not None:
            duality = _duality(self.weights.to(means.device)[seen], means)
            out["nc3"] = duality.where(seen.any(), torch.nan)
        return out | {"classes": seen.sum(), "singletons": (count == 1).sum()}

    @property
    def means(self) -> Tensor:
        """The mean of each class, (class, unit); NaN for classes that did not come."""
        if not self._update_count:
            raise MeasureError("NeuralCollapse has seen nothing yet; call update first")
        return double(self.total) / self.count[:, None]

    def _within(self, stats: Mapping[str, Tensor], many: Tensor) -> tuple[Tensor, Tensor]:
        count, total = double(stats["count"]), double(stats["total"])
        nothing = torch.full((), torch.nan, dtype=total.dtype, device=total.device)
        if int(many.sum()) < 2:
            return nothing, nothing
        alone = total[stats["count"] == 1]
        n, count, total = count[many].sum(), count[many], total[many]
        means = total / count[:, None]
        # A class of one adds the same to both, hence nothing.
        within = (stats["moment"] - alone.T @ alone - means.T @ total) / n
        away = (means - total.sum(0) / n) * (count / n).sqrt()[:, None]
        nc1 = within.trace().clamp_min(0) / away.square().sum()
        # The directions of S_B = away^T away, from the small matrix of the classes instead of the large one.
        _, singular, right = torch.linalg.svd(away, full_matrices=False)
        keep = singular.square() > _CUT * singular[0].square()
        directions = right[keep]
        inside = torch.einsum("ku,uv,kv->k", directions, within, directions).clamp_min(0)
        pinv = (inside / singular[keep].square()).sum() / int(many.sum())
        return nc1, pinv.where(singular[0] > 0, torch.nan)


class CentreAgreement(Fold):
    """NC4: how often the nearest class mean and the classifier disagree; a second pass, after the means are known.

    - ``nc4``: share of rows whose nearest mean is of another class than the classifier's largest output; 0 in collapse
    - ``nearest_mean_accuracy``: share whose nearest mean is of their own class

    Args:
        means: (class, unit), from `NeuralCollapse.means`; classes with NaN are never the nearest.

    Shapes: update takes features (rows, units), labels (rows) and the classifier's outputs (rows, classes).

    Source: Papyan, Han and Donoho 2020.

    Example:
        >>> nc4 = CentreAgreement(torch.tensor([[0.0], [1.0]]))
        >>> nc4.update(torch.tensor([[0.1], [0.9]]), torch.tensor([0, 1]), torch.tensor([[2.0, 1.0], [2.0, 1.0]]))
        >>> float(nc4.compute()["nc4"])
        0.5
    """

    reductions: ClassVar[dict[str, Reduction]] = {"rows": "sum", "apart": "sum", "correct": "sum"}

    def __init__(self, means: Tensor, **options: object):
        super().__init__(**options)
        self.means = double(means)

    def statistics(self, x_NU: Tensor, y_N: Tensor, outputs_NC: Tensor) -> dict[str, Tensor]:
        """rows, apart, correct: ()."""
        x_NU, y_N, outputs_NC = finite_rows("CentreAgreement", x_NU, y_N, outputs_NC)
        means = self.means.to(x_NU.device)
        if outputs_NC.ndim != 2 or x_NU.shape[1] != means.shape[1] or outputs_NC.shape[1] != len(means):
            raise MeasureError(
                f"means {tuple(means.shape)} (class, unit) do not fit features {tuple(x_NU.shape)} "
                f"and outputs {tuple(outputs_NC.shape)}"
            )
        distance = torch.cdist(double(x_NU), means.nan_to_num(), compute_mode="donot_use_mm_for_euclid_dist")
        nearest = distance.masked_fill(means.isnan().any(-1), torch.inf).argmin(-1)
        return {
            "rows": torch.tensor(len(x_NU), device=x_NU.device),
            "apart": (nearest != outputs_NC.argmax(-1)).sum(),
            "correct": (nearest == y_N).sum(),
        }

    def values(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See the class."""
        rows = double(stats["rows"])
        return {"nc4": stats["apart"] / rows, "nearest_mean_accuracy": stats["correct"] / rows}


def layerwise_collapse(
    model: Model, batches: Iterable[Sequence[Any]], sites: str | Sequence[str], num_classes: int, *, pool: Any = "flat"
) -> dict[str, dict[str, Tensor]]:
    """Neural collapse of the features of several sites, in one pass.

    Args:
        batches: of (inputs, labels).
        sites: patterns; pool: how the features of a row are made (`actome.core.labelled.fold`).

    Returns:
        For each site, in the order of the patterns, the values of `NeuralCollapse`.

    >>> import actome as ac
    >>> model = ac.wrap(torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.ReLU()))
    >>> batch = (torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.0, 1.1]]), torch.tensor([0, 0, 1, 1]))
    >>> list(layerwise_collapse(model, [batch], ["module:0", "module:1"], num_classes=2))
    ['module:0', 'module:1']
    """
    patterns = (sites,) if isinstance(sites, str) else tuple(sites)
    # One fold for all patterns; `fold` copies it for each site.
    found = model.fold(batches, {pattern: NeuralCollapse(num_classes) for pattern in patterns}, pool=pool)
    return {site: one.compute() for site, one in found.items()}


def nc1(x_NU: Tensor, y_N: Tensor) -> float:
    """tr(S_W) / tr(S_B) of features that are in memory.

    >>> round(nc1(torch.tensor([[1.0, 0.1], [1.0, -0.1], [-1.0, 0.1], [-1.0, -0.1]]), torch.tensor([0, 0, 1, 1])), 4)
    0.01
    """
    fold = NeuralCollapse(int(y_N.max()) + 1)
    fold.update(x_NU, y_N)
    return float(fold.compute()["nc1"])


@dataclass(frozen=True)
class NearCollapse:
    """What features become that may move away from given ones at a price.

    Attributes:
        features: (rows, units), the optimal ones.
        weights: (class, unit), the optimal classifier.
        loss: at the end.
        change: the largest relative change of the features in the last step; large when there were too few steps.
    """

    features: Tensor
    weights: Tensor
    loss: float
    change: float


def near_collapse_model(
    h0_NU: Tensor, y_N: Tensor, beta: float, lam: float = 5e-3, *, steps: int = 3000, tolerance: float = 1e-9
) -> NearCollapse:
    r"""How far features collapse that must stay near given ones: predicts a layer's collapse from the layer before.

    Minimises over W (K, d) and H (d, Kn), Y being one-hot,
    :math:`\frac{1}{2Kn}\lVert WH - Y\rVert^2 + \frac{\lambda}{2K}\lVert W\rVert^2 +
    \frac{\beta}{2Kn}\lVert H - H_0\rVert^2`, by turns exactly: :math:`W = Y H^\top (H H^\top + n \lambda I)^{-1}`,
    :math:`H = (W^\top W + \beta I)^{-1} (W^\top Y + \beta H_0)`. For beta -> 0 this is the model of unconstrained
    features, whose optimum has collapsed; a large beta keeps H_0. Small beta moves slowly: thousands of steps.

    Args:
        h0_NU: (rows, units), the features to stay near, in float64 inside; y_N: labels, K of them and none absent.
        beta, lam: the prices of moving and of the weights.
        steps, tolerance: at most so many turns, fewer when no feature moves by more than this share.

    Source: Tirer, Huang and Niles-Weed 2023, Perturbation Analysis of Neural Collapse.

    >>> h0, y = torch.randn(40, 8, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 4
    >>> found = near_collapse_model(h0, y, beta=1e-2, steps=200)
    >>> nc1(found.features, y) < nc1(h0, y)
    True
    """
    if beta <= 0 or lam <= 0:
        raise MeasureError(f"beta={beta} and lam={lam}: both prices are above 0")
    h0_NU, y_N = finite_rows("near_collapse_model", h0_NU, y_N)
    classes = int(y_N.max()) + 1
    y_CN = torch.nn.functional.one_hot(checked_labels("near_collapse_model", y_N, classes), classes).double().T
    if bool((y_CN.sum(1) == 0).any()):
        raise MeasureError("a class has no row: number the classes that came from 0 on")
    h0 = h0_NU.double().T
    n = h0.shape[1] / classes
    eye = torch.eye(len(h0), dtype=h0.dtype, device=h0.device)
    eye_C = torch.eye(classes, dtype=h0.dtype, device=h0.device)
    h, w, change = h0, torch.zeros(classes, len(h0), dtype=h0.dtype, device=h0.device), torch.inf
    for _ in range(steps):
        w = torch.linalg.solve(h @ h.T + n * lam * eye, h @ y_CN.T).T
        # (W'W + beta I)^-1 (W'Y + beta H0) = H0 + W' (WW' + beta I)^-1 (Y - W H0): a system of K and not of d.
        new = h0 + w.T @ torch.linalg.solve(w @ w.T + beta * eye_C, y_CN - w @ h0)
        change = float((new - h).abs().max() / new.abs().max())
        h = new
        if change < tolerance:
            break
    fit, size, moved = ((one**2).sum() for one in (w @ h - y_CN, w, h - h0))
    loss = fit / (2 * h.shape[1]) + lam * size / (2 * classes) + beta * moved / (2 * h.shape[1])
    return NearCollapse(h.T.contiguous(), w, float(loss), change)


def _simplex(means_CU: Tensor) -> dict[str, Tensor]:
    """Distances of class means from a simplex equiangular tight frame."""
    k = len(means_CU)
    names = ("nc2", "equinorm", "equiangle", "max_angle")
    centred = means_CU - means_CU.mean(0)
    length = centred.norm(dim=1)
    if k < 2 or float(length.amax()) == 0:
        return {name: torch.full((), torch.nan, dtype=means_CU.dtype, device=means_CU.device) for name in names}
    gram = centred @ centred.T
    simplex = (torch.eye(k, dtype=gram.dtype, device=gram.device) - 1 / k) / (k - 1) ** 0.5
    cosines = gram / length.outer(length)
    pairs = cosines[~torch.eye(k, dtype=torch.bool, device=gram.device)]
    return {
        "nc2": (gram / gram.norm() - simplex).norm(),
        "equinorm": length.std(correction=0) / length.mean(),
        "equiangle": pairs.std(correction=0),
        "max_angle": (pairs + 1 / (k - 1)).abs().mean(),
    }


def _duality(weights_CU: Tensor, means_CU: Tensor) -> Tensor:
    if weights_CU.shape != means_CU.shape:
        raise MeasureError(f"weights {tuple(weights_CU.shape)} do not fit means {tuple(means_CU.shape)} (class, unit)")
    weights, centred = weights_CU.to(means_CU.dtype), means_CU - means_CU.mean(0)
    return (weights / weights.norm() - centred / centred.norm()).norm()
