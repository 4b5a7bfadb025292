"""Convolution filters: how many different ones a layer holds, and how far two sets of them are apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..core.errors import MeasureError

if TYPE_CHECKING:
    import pandas as pd

MIN_FILTERS = 32


@dataclass(frozen=True)
class Filters:
    """What the filters of one layer are like.

    Attributes:
        filters: how many there are, output times input channels.
        sparsity: share whose every weight is below 0.01 of the layer's largest.
        entropy: variance entropy, in decimal digits: 0 for one pattern only, about 0.954 for random 3x3 filters.
        entropy_ratio: the same over what random filters have at this number of them; NaN for fewer than 32.
        orthogonality: 1 minus the mean absolute cosine of two output channels; NaN for a single one.
    """

    filters: int
    sparsity: float
    entropy: float
    entropy_ratio: float
    orthogonality: float


class FilterQuality:
    r"""Diversity, sparsity and randomness of the 3x3 filters of every convolution: a look at weights, not activations.

    A layer's weight is N rows of 9, one for each output and input channel. With the singular values of the centred rows
    and :math:`p_i = s_i^2 / \sum_j s_j^2`, the variance entropy is :math:`H = -\sum_i p_i \log_{10} p_i`. Over what
    random filters have, :math:`T(N) = 1.2618 / (1 + e^{-0.88768 (\log_2 N - 2.30436)}) - 0.31051`: a ratio of 1 or
    more cannot be told from random initialisation; a low one, or a high sparsity, marks a degenerate layer.
    The fit T was made on layers larger than a few dozen filters: for fewer than 32 the ratio is NaN.

    Args:
        threshold: below which share of a layer's largest weight a filter counts as absent.

    Source: Gavrikov and Keuper 2022, CNN Filter DB: An Empirical Investigation of Trained Convolutional Filters; the
    numbers are those of their package torchconvquality.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> table = FilterQuality().measure(nn.Sequential(nn.Conv2d(8, 16, 3), nn.Conv2d(16, 4, 1)))
        >>> table.layer.tolist(), table.filters.tolist(), round(float(table.entropy_ratio[0]), 1)
        (['0'], [128], 1.0)
    """

    def __init__(self, threshold: float = 0.01):
        self.threshold = threshold

    def measure(self, model: Any) -> pd.DataFrame:
        """One row for each 3x3 convolution: layer, and the fields of `Filters`.

        Raises:
            MeasureError: the model has none.
        """
        import pandas as pd

        found = convolutions(model)
        return pd.DataFrame([{"layer": name} | asdict(self.of(weight)) for name, weight in found.items()])

    def of(self, weight: Tensor) -> Filters:
        """The same for one weight (output channel, input channel, height, width) of any kernel.

        The entropy ratio is that of 3x3 filters and NaN for others.
        """
        if weight.ndim != 4 or not weight.numel():
            raise MeasureError(f"a convolution's weight is (output, input, height, width), not {tuple(weight.shape)}")
        weight = weight.detach().double()
        if not bool(weight.isfinite().all()):
            raise MeasureError("the weight holds NaN or infinity")
        rows = weight.flatten(0, 1).flatten(1)
        largest = rows.abs().amax()
        absent = (rows.abs() < self.threshold * largest).all(1) if largest > 0 else torch.ones(len(rows)).bool()
        entropy = variance_entropy(rows)
        known = len(rows) >= MIN_FILTERS and rows.shape[1] == 9
        return Filters(
            filters=len(rows),
            sparsity=float(absent.double().mean()),
            entropy=entropy,
            entropy_ratio=entropy / random_entropy(len(rows)) if known else math.nan,
            orthogonality=_orthogonality(weight.flatten(1)),
        )


def variance_entropy(rows_NK: Tensor) -> float:
    """Entropy of the shares of variance of the principal directions, in decimal digits; 0 without variance.

    >>> round(variance_entropy(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])), 4)
    0.301
    """
    singular = torch.linalg.svdvals((rows_NK - rows_NK.mean(0)).double())
    variance = singular.square()
    if float(variance.sum()) == 0:
        return 0.0
    return float(torch.special.entr(variance / variance.sum()).sum()) / math.log(10)


def random_entropy(filters: int) -> float:
    """The least variance entropy that so many random 3x3 filters have, a fit by the paper.

    >>> round(random_entropy(1024), 3)
    0.95
    """
    return 1.2618047 / (1 + math.exp(-0.88767525 * (math.log2(filters) - 2.30436435))) - 0.31050834


def filter_drift(a: Any, b: Any, *, bins: int = 70) -> float:
    r"""How far apart two sets of filters are: symmetric divergence of their coordinates along common directions.

    Each filter is divided by its largest magnitude. The principal directions of both sets pooled are common axes; along
    each, histograms over the pooled range with empty bins set to 1.2e-7; then
    :math:`D = \sum_i r_i (\mathrm{KL}(p_i \| q_i) + \mathrm{KL}(q_i \| p_i))` in nats, :math:`r_i` the explained
    share of variance. 0 for equal sets. Few filters leave bins empty and raise D: compare sets of the same sizes, and
    with what two random halves give.

    Args:
        a, b: filters (N, 9), weights (output, input, height, width), or models, all of whose 3x3 filters are taken.
        bins: of each histogram.

    Raises:
        MeasureError: fewer than 32 filters in a set, or of different sizes.

    Source: Gavrikov and Keuper 2022, CNN Filter DB (section on distribution shifts).

    >>> g = torch.Generator().manual_seed(0)
    >>> a = torch.rand(500, 9, generator=g)
    >>> filter_drift(a, a), filter_drift(a, a - 0.5) > 1
    (0.0, True)
    """
    rows = [_rows(one) for one in (a, b)]
    if rows[0].shape[1] != rows[1].shape[1] or min(map(len, rows)) < MIN_FILTERS:
        raise MeasureError(
            f"filter_drift compares {MIN_FILTERS} filters or more of one size, "
            f"not {tuple(rows[0].shape)} and {tuple(rows[1].shape)}"
        )
    both = torch.cat(rows)
    mean = both.mean(0)
    _, singular, directions = torch.linalg.svd(both - mean, full_matrices=False)
    ratio = singular.square() / singular.square().sum()
    if not bool(ratio.isfinite().all()):
        return 0.0
    total = 0.0
    for share, direction in zip(ratio.tolist(), directions, strict=True):
        along = [(one - mean) @ direction for one in rows]
        low, high = (float(edge(torch.cat(along))) for edge in (torch.min, torch.max))
        if low == high:
            continue
        p, q = (_histogram(one, bins, low, high) for one in along)
        total += share * float(((p - q) * (p / q).log()).sum())
    return total


def convolutions(model: Any, kernel: tuple[int, int] = (3, 3)) -> dict[str, Tensor]:
    """The weights of all 2-D convolutions of one kernel size, by module path.

    >>> list(convolutions(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 1))))
    ['0']
    """
    module = model if isinstance(model, nn.Module) else model.module
    found = {
        name: one.weight.detach()
        for name, one in module.named_modules()
        if isinstance(one, nn.Conv2d) and one.kernel_size == kernel
    }
    if not found:
        raise MeasureError(f"this module has no {kernel[0]}x{kernel[1]} convolution")
    return found


def _rows(x: Any) -> Tensor:
    if not isinstance(x, Tensor):
        weights: Sequence[Tensor] = list(convolutions(x).values())
        rows = torch.cat([one.flatten(0, 1).flatten(1) for one in weights])
    else:
        rows = x.detach().flatten(0, 1).flatten(1) if x.ndim == 4 else x.detach()
    if rows.ndim != 2 or not bool(rows.isfinite().all()):
        raise MeasureError(f"filters are finite and (N, 9) or (output, input, height, width), not {tuple(x.shape)}")
    rows = rows.double().cpu()
    largest = rows.abs().amax(1, keepdim=True)
    return rows / largest.where(largest > 0, 1.0)


def _histogram(x: Tensor, bins: int, low: float, high: float) -> Tensor:
    counts = torch.histc(x, bins, low, high)
    return (counts / counts.sum()).clamp_min(torch.finfo(torch.float32).eps)


def _orthogonality(rows_NK: Tensor) -> float:
    n = len(rows_NK)
    if n < 2:
        return math.nan
    length = rows_NK.norm(dim=1, keepdim=True)
    unit = rows_NK / length.where(length > 0, 1.0)
    cosines = (unit @ unit.T).abs()
    return 1 - float((cosines.sum() - cosines.diagonal().sum()) / (n * (n - 1)))
