"""Information that each of many features has of an outcome, from histograms that merge."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..core.errors import MeasureError
from ..core.fold import Fold, Reduction
from .rows import checked_labels, finite_rows, nats_per

_REACH = 4.5  # standard deviations that the grid of the KDE covers to either side
_CHUNK = 1 << 22  # entries of the grids that are transformed at once
_OTHER_LIMITS = (
    "these histograms have different limits and cannot be added; take limits_of one batch and give them to all: "
    "FeatureInformation(..., limits=limits)"
)


class FeatureInformation(Fold):
    r"""Mutual information of each of many features with one outcome, from histograms that merge.

    - ``"kde"``: features (and a continuous outcome) are standardised; each pair is spread over the four nearest points
      of a `grid` x `grid` lattice over +-4.5 standard deviations (linear binning), which is smoothed by a Gaussian of
      standard deviation :math:`n^{-1/6}` with an FFT at the end. Density p on the lattice, marginals by summing,
      :math:`I = \sum p \ln \frac{p}{p_x p_y}`. For a discrete outcome one lattice a class with the
      bandwidth :math:`n_y^{-1/5}` of one dimension, and :math:`I = \sum_y p_y \mathrm{KL}(p(x|y) \| p(x))` with
      :math:`p(x) = \sum_y p_y p(x|y)`.
    - ``"bin"``: equally frequent bins of features and outcome, plug-in information of the table.

    The limits (means and deviations, or bin edges) are those of the first batch unless `limits` are given, and stay.
    Accumulators with different limits count different things, and merging them is refused: take limits from one
    batch with `limits_of`, and give them to all. What is beyond 4.5 deviations counts at the border: ``clipped`` says
    how much that is for each feature; a heavy tail wants ``"bin"``.

    Values: ``information`` (feature) in `unit`, ``clipped`` (feature). Both estimates of n rows are above 0 when there
    is nothing: compare with permuted outcomes (`screen`).

    Args:
        method: ``"kde"`` or ``"bin"``.
        num_classes: for a discrete outcome; ``None`` for a continuous one.
        grid: points a side; bins: of the features and of a continuous outcome.
        limits: from `limits_of`.
        unit: ``"bits"`` or ``"nats"``.

    Shapes: update takes x (rows, features) and y (rows). Rows with anything non-finite are left out. Memory:
    8 grid^2 (or bins^2, or grid or bins times classes) bytes a feature.

    Source: Yang et al. 2024, fastHDMI: Fast Mutual Information Estimation for High-Dimensional Data.

    Example:
        >>> x = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0))
        >>> information = FeatureInformation("bin", bins=8)
        >>> information.update(x, x[:, 1] ** 2)
        >>> [round(float(one), 1) for one in information.compute()["information"]]
        [0.0, 1.9]
    """

    reductions: ClassVar[dict[str, Reduction]] = {
        "rows": "sum",
        "table": "sum",
        "clipped": "sum",
        "lowest": "min",
        "highest": "max",
    }

    def __init__(
        self,
        method: Literal["kde", "bin"] = "kde",
        *,
        num_classes: int | None = None,
        grid: int = 64,
        bins: int = 8,
        limits: Tensor | None = None,
        unit: Literal["bits", "nats"] = "bits",
        **options: object,
    ):
        super().__init__(**options)
        if method not in ("kde", "bin"):
            raise MeasureError(f"method={method!r} does not merge or does not exist; choose 'kde' or 'bin'")
        if grid < 8 or bins < 2:
            raise MeasureError(f"grid={grid} and bins={bins}: at least 8 points and 2 bins")
        self.method, self.num_classes, self.unit = method, num_classes, unit
        self.cells = grid if method == "kde" else bins
        self.limits = limits
        self._nats = nats_per(unit)

    def limits_of(self, x_NF: Tensor, y_N: Tensor) -> Tensor:
        """The limits that a batch gives: (features + 1, 2) means and deviations, or (features + 1, bins - 1) edges.

        The last row is the outcome's; zeros for a discrete one.
        """
        x_NF, y_N = finite_rows("FeatureInformation", x_NF, self._outcome(x_NF, y_N))
        if len(x_NF) < 2:
            raise MeasureError(f"limits need two rows at least, and {len(x_NF)} finite ones came")
        y_N = torch.zeros_like(x_NF[:, 0]) if self.num_classes else y_N.to(x_NF.dtype)
        both = torch.cat([x_NF, y_N[:, None]], -1).double()
        if self.method == "bin":
            inner = torch.arange(1, self.cells, device=both.device, dtype=both.dtype) / self.cells
            return both.quantile(inner, dim=0).T.contiguous()
        return torch.stack([both.mean(0), both.std(0)], -1)

    def update(self, x_NF: Tensor, y_N: Tensor) -> None:
        """Folds one batch; the first one fixes the limits unless they were given."""
        if self.limits is None:
            self.limits = self.limits_of(x_NF, y_N)
        super().update(x_NF, y_N)

    def statistics(self, x_NF: Tensor, y_N: Tensor) -> dict[str, Tensor]:
        """rows: (); table: (feature, cell, cell or class); clipped: (feature); lowest, highest: the limits, twice."""
        if self.limits is None:
            raise MeasureError("limits are not known yet: give them, or let update see a batch first")
        x_NF, y_N = finite_rows("FeatureInformation", x_NF, self._outcome(x_NF, y_N))
        limits = self.limits.to(x_NF.device)
        if x_NF.shape[1] + 1 != len(limits):
            raise MeasureError(f"the limits are those of {len(limits) - 1} features, and {x_NF.shape[1]} came")
        y_cells, y_weights = self._columns(y_N, limits)
        tables, clipped = [], []
        step = max(1, _CHUNK // max(1, 4 * len(x_NF)))
        for at in range(0, x_NF.shape[1], step):
            x_NF_part, limit = x_NF[:, at : at + step], limits[:-1][at : at + step]
            x_cells, x_weights = self._cells(x_NF_part.T.contiguous(), limit)
            tables.append(_scattered(x_cells, x_weights, y_cells, y_weights, self.cells, self._width))
            if self.method == "kde":
                z = (x_NF_part - limit[:, 0]) / limit[:, 1]
                clipped.append((z.abs() > _REACH).sum(0))
            else:
                clipped.append(torch.zeros(len(limit), dtype=torch.int64, device=x_NF.device))
        return {
            "rows": torch.tensor(len(x_NF), device=x_NF.device),
            "table": torch.cat(tables),
            "clipped": torch.cat(clipped),
            "lowest": limits,
            "highest": limits,
        }

    def values(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See the class."""
        if not torch.equal(stats["lowest"], stats["highest"]):
            raise MeasureError(_OTHER_LIMITS)
        table, n = stats["table"], stats["rows"]
        if self.method == "kde":
            step = max(1, _CHUNK // (4 * self.cells * self._width))
            information = torch.cat([self._smoothed(part) for part in table.split(step)])
        else:
            information = _information(table)
        # A feature that never varies has no standard score and no information.
        known = stats["lowest"][:-1]
        constant = known[:, 1] == 0 if self.method == "kde" else torch.zeros_like(known[:, 0], dtype=torch.bool)
        return {
            "information": information.where(~constant, 0.0) / self._nats,
            "clipped": stats["clipped"].double() / n,
        }

    def merge_state(self, incoming_state: Any) -> None:
        """Takes in another's counts, refused when they were counted with other limits."""
        theirs = incoming_state["lowest"] if isinstance(incoming_state, dict) else incoming_state.lowest
        if theirs.ndim:
            if self.limits is None:
                self.limits = theirs.clone()
            elif self.limits.shape != theirs.shape or not torch.equal(self.limits, theirs.to(self.limits.device)):
                raise MeasureError(_OTHER_LIMITS)
        super().merge_state(incoming_state)

    @property
    def _width(self) -> int:
        return self.num_classes or self.cells

    def _outcome(self, x_NF: Tensor, y_N: Tensor) -> Tensor:
        if self.num_classes:
            return checked_labels("FeatureInformation", y_N, self.num_classes)
        if not y_N.is_floating_point():
            raise MeasureError("an outcome of integers may be a number or a class: give num_classes, or y.float()")
        # Rows whose outcome is not finite are found by `finite_rows` with the features, hence marked there.
        if y_N.shape != x_NF.shape[:1]:
            raise MeasureError(f"outcomes {tuple(y_N.shape)} do not belong to features {tuple(x_NF.shape)}")
        if not bool(y_N.isfinite().all()):
            raise MeasureError("the outcome holds NaN or infinity: leave those rows out")
        return y_N

    def _columns(self, y_N: Tensor, limits: Tensor) -> tuple[list[Tensor], list[Tensor | None]]:
        if self.num_classes:
            return [y_N[None]], [None]
        return self._cells(y_N[None].to(limits.dtype), limits[-1:])

    def _cells(self, x_FN: Tensor, limits: Tensor) -> tuple[list[Tensor], list[Tensor | None]]:
        """In which cells each entry lies, and with which weights: one cell for bins, two for linear binning."""
        if self.method == "bin":
            return [torch.searchsorted(limits, x_FN.to(limits.dtype), right=True)], [None]
        z = (x_FN - limits[:, :1]) / limits[:, 1:].where(limits[:, 1:] > 0, 1.0)
        place = (z.clamp(-_REACH, _REACH) + _REACH) * ((self.cells - 1) / (2 * _REACH))
        low = place.floor().clamp_max(self.cells - 2)
        above = place - low
        return [low.long(), low.long() + 1], [1 - above, above]

    def _smoothed(self, table: Tensor) -> Tensor:
        """Information of the smoothed lattice, in nats, (feature)."""
        step = 2 * _REACH / (self.cells - 1)
        if self.num_classes is None:
            n = table[0].sum()
            return _information(_blurred(_blurred(table, float(n) ** (-1 / 6) / step), float(n) ** (-1 / 6) / step, 1))
        counts_C = table[0].sum(0)
        # Smoothing keeps the mass of each class, so that classes weigh as many rows as they have.
        smooth = [_blurred(table[..., c], max(float(n), 1.0) ** (-1 / 5) / step) for c, n in enumerate(counts_C)]
        return _information(torch.stack([one.where(n > 0, 0.0) for one, n in zip(smooth, counts_C, strict=True)], -1))


def _scattered(
    x_cells: list[Tensor],
    x_weights: list[Tensor | None],
    y_cells: list[Tensor],
    y_weights: list[Tensor | None],
    rows: int,
    columns: int,
) -> Tensor:
    """How much lies in each cell of each feature's table, (feature, row, column), float64."""
    features = len(x_cells[0])
    first = torch.arange(features, device=x_cells[0].device)[:, None] * (rows * columns)
    table = torch.zeros(features * rows * columns, dtype=torch.float64, device=first.device)
    for cell_x, weight_x in zip(x_cells, x_weights, strict=True):
        for cell_y, weight_y in zip(y_cells, y_weights, strict=True):
            at = (first + cell_x * columns + cell_y).flatten()
            weights = [one for one in (weight_x, weight_y) if one is not None]
            weight = math.prod(weights[1:], start=weights[0]) if weights else torch.ones((), device=first.device)
            table.index_add_(0, at, weight.expand(features, cell_x.shape[1]).flatten().double())
    return table.view(features, rows, columns)


def _blurred(table: Tensor, deviation: float, dim: int = -1) -> Tensor:
    """Smoothed along one dim by a Gaussian of so many cells, through an FFT padded so that no end meets the other."""
    table = table.movedim(dim, -1)
    n = table.shape[-1]
    reach = torch.arange(n, dtype=table.dtype, device=table.device)
    kernel = torch.exp(-0.5 * (reach / max(deviation, 1e-6)) ** 2)
    wrapped = torch.cat([kernel, kernel.new_zeros(1), kernel[1:].flip(0)])
    out = torch.fft.irfft(torch.fft.rfft(table, 2 * n) * torch.fft.rfft(wrapped), 2 * n)[..., :n].clamp_min(0)
    # A bump that hangs over the border keeps its mass, so that the marginals stay those of the counts.
    total = out.sum(-1, keepdim=True)
    out = out * (table.sum(-1, keepdim=True) / total.where(total > 0, 1.0))
    return out.movedim(-1, dim)


def _information(table_FXY: Tensor) -> Tensor:
    """Of each joint table of counts or densities, in nats, never below 0 but by rounding: (feature)."""
    p = table_FXY / table_FXY.sum((-2, -1), keepdim=True)
    entropy = [torch.special.entr(one).sum(-1) for one in (p.sum(-1), p.sum(-2), p.flatten(-2))]
    return (entropy[0] + entropy[1] - entropy[2]).clamp_min(0)
