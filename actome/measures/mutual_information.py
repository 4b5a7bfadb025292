"""Mutual information of a layer with its input and with the label, by estimators that adapt to the activations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..core.errors import MeasureError
from ..core.fold import Fold, Reduction
from .rows import checked_labels, finite_rows, nats_per
from .tally import kept, mixed, row_hashes, tallied

Estimator = Literal["ebab", "fixed", "akde"]


class AdaptiveEdges(Fold):
    r"""First pass of entropy-based adaptive binning: edges between which equally many *unique* values lie.

    Fold into one of these everything that shall share its bins: all units of a layer, over all rows and, when training
    is followed, over all epochs. Edges made anew each epoch follow the activations and hide what changes.

    ``edges``: of the sorted unique values :math:`v_0 < \dots < v_{m-1}`, exact zeros left out, the values
    :math:`v_{\lfloor k m / b \rfloor}`, k = 0 to b - 1, (bins). What lies below the first is a bin of its own: for ReLU
    the zeros. ``unique``: m, (), or `cap` beyond it.

    Exact up to `cap` unique values. Beyond, it keeps those with the smallest hashes, a random sample of the unique
    values which does not depend on their order or on how the stream was cut; the rank of an edge among all values is
    then off by less than about 1/sqrt(cap) (two standard errors), 0.4 % by default.

    Args:
        bins: how many.
        cap: unique values to keep, 4 bytes each.

    Shapes: update takes (rows, units); rows with a non-finite unit are left out. Values are compared in float32.

    Source: Chelombiev, Houghton and O'Donnell 2019, Adaptive Estimators Show Information Compression in Deep Neural
    Networks (EBAB); a bin for the zeros as in their code, which makes edges anew for each epoch and layer.

    Example:
        >>> edges = AdaptiveEdges(bins=2)
        >>> edges.update(torch.tensor([[0.0, 1.0], [1.0, 2.0], [3.0, 40.0]]))
        >>> edges.compute()["edges"].tolist()
        [1.0, 3.0]
    """

    reductions: ClassVar[dict[str, Reduction]] = {"unique_values": "cat"}

    def __init__(self, bins: int = 30, cap: int = 1 << 16, **options: object):
        super().__init__(**options)
        if bins < 2 or cap < bins:
            raise MeasureError(f"bins={bins} and cap={cap}: at least 2 bins, and a cap of as many values")
        self.bins, self.cap = bins, cap

    def statistics(self, x_NU: Tensor) -> dict[str, Tensor]:
        """unique_values: (value, 1)."""
        (x_NU,) = finite_rows("AdaptiveEdges", x_NU)
        values = x_NU.float().flatten().unique()
        return {"unique_values": values[values != 0][:, None]}

    def bounded(self, name: str, rows: Tensor) -> Tensor:
        """The unique ones among them, those with the smallest hashes when there are more than the cap."""
        values = rows[:, 0].unique()
        if len(values) > self.cap:
            order = mixed(values.contiguous().view(torch.int32)).argsort()
            values = values[order[: self.cap]].sort().values
        return values[:, None]

    def values(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See the class."""
        found = stats["unique_values"][:, 0]
        if not len(found):
            raise MeasureError("all activations are exactly 0: there is nothing to put bin edges between")
        at = torch.arange(self.bins, device=found.device) * len(found) // self.bins
        return {"edges": found[at], "unique": torch.tensor(len(found), device=found.device)}


class MutualInformation(Fold):
    r"""Information that a layer T keeps of its input X and of the label Y, for a deterministic net.

    A deterministic net makes T a function of X, so :math:`I(X;T) = H(T)`, and an estimate of either rests on how finely
    T is read: by bins or by noise. The estimators:

    - ``"ebab"``: each activation becomes the number of its bin between `edges` (from `AdaptiveEdges`), each row of them
      a symbol; :math:`I(X;T) = H(T)`, :math:`I(T;Y) = H(T) - \sum_y p(y) H(T|y)`, with relative frequencies as
      probabilities.
    - ``"fixed"``: the same with `bins` equal bins over `limits`; the classic choice, for bounded activations only.
    - ``"akde"``: T plus Gaussian noise of standard deviation :math:`\sigma = \sqrt{s}\,\max|T|`, s the `noise`, so that
      scaling a layer changes nothing; :math:`I(X;T) \le -\frac1n \sum_i \ln \frac1n \sum_j
      \exp(-\lVert t_i - t_j \rVert^2 / 2\sigma^2)`, and the lower bound with :math:`8\sigma^2`; I(T;Y) by subtracting
      the same within classes. It compares all pairs: rows are kept, at most `max_rows`, and more are refused.

    Values, all (), in `unit`:

    - ``i_xt``, ``i_ty``: the two informations; for akde from the upper bound, and ``i_xt_lower``, ``i_ty_lower`` from
      the lower one (differences of bounds, as ``i_ty`` is, are estimates and no bounds)
    - ``h_t``: H(T), for the binned estimators the same as ``i_xt``
    - ``ceiling``: log n. No estimate can exceed it: a value close to it says that the rows are too few or the layer too
      wide, and nothing of compression.
    - ``h_y``: H(Y), what i_ty can reach
    - ``error``: standard error of ``h_t``, 0 unless there were more than `max_symbols` distinct symbols, of which a
      random sample is kept then

    Args:
        estimator: ``"ebab"``, ``"fixed"`` or ``"akde"``.
        num_classes: labels are 0 to num_classes - 1.
        edges: (bins), for ebab.
        bins, limits: for fixed; what is outside the limits falls into the outermost bins.
        noise: :math:`\sigma^2 / \max|T|^2`, for akde.
        unit: ``"bits"`` or ``"nats"``, of every value.

    Shapes: update takes features (rows, units) and labels (rows). Rows with a non-finite unit are left out.

    Source: Chelombiev, Houghton and O'Donnell 2019 (ebab, akde); Kolchinsky and Tracey 2017 (the bounds);
    Shwartz-Ziv and Tishby 2017 (fixed bins). The scale of akde's noise is relative to the largest magnitude, per call
    of `compute`.

    Example:
        >>> t = torch.tensor([[0.1], [0.2], [5.0], [9.0]])
        >>> edges = AdaptiveEdges(bins=2)
        >>> edges.update(t)
        >>> information = MutualInformation("ebab", num_classes=2, edges=edges.compute()["edges"])
        >>> information.update(t, torch.tensor([0, 0, 1, 1]))
        >>> {name: float(information.compute()[name]) for name in ("i_xt", "i_ty", "ceiling")}
        {'i_xt': 1.0, 'i_ty': 1.0, 'ceiling': 2.0}
    """

    reductions: ClassVar[dict[str, Reduction]] = {"labels": "sum", "rows": "cat"}

    def __init__(
        self,
        estimator: Estimator = "ebab",
        *,
        num_classes: int,
        edges: Tensor | None = None,
        bins: int = 30,
        limits: tuple[float, float] = (-1.0, 1.0),
        noise: float = 1e-3,
        unit: Literal["bits", "nats"] = "bits",
        max_symbols: int = 1 << 17,
        max_rows: int = 8192,
        **options: object,
    ):
        super().__init__(**options)
        if estimator not in ("ebab", "fixed", "akde"):
            raise MeasureError(f"estimator={estimator!r} does not exist; choose 'ebab', 'fixed' or 'akde'")
        if (edges is None) == (estimator == "ebab"):
            if edges is not None:
                raise MeasureError(f"estimator={estimator!r} makes its own bins; leave edges= out, or take 'ebab'")
            raise MeasureError(
                "estimator='ebab' puts its bins where the activations are: fold them with AdaptiveEdges first, and "
                "give edges=, its compute()['edges']; or take 'fixed' or 'akde'"
            )
        self.estimator, self.num_classes, self.noise, self.unit = estimator, num_classes, noise, unit
        self.max_symbols, self.max_rows = max_symbols, max_rows
        self._nats = nats_per(unit)
        if estimator == "fixed":
            edges = torch.linspace(*limits, bins + 1, dtype=torch.float32)[1:-1]
        self.edges = edges

    def statistics(self, x_NU: Tensor, y_N: Tensor) -> dict[str, Tensor]:
        """labels: (class) counts; rows: symbols (hash, count by class), or for akde (label, activations)."""
        x_NU, y_N = finite_rows("MutualInformation", x_NU, y_N)
        y_N = checked_labels("MutualInformation", y_N, self.num_classes)
        labels = y_N.bincount(minlength=self.num_classes)
        if self.edges is None:
            return {"labels": labels, "rows": torch.cat([y_N[:, None].double(), x_NU.double()], -1)}
        bins_NU = torch.bucketize(x_NU.float().contiguous(), self.edges.to(x_NU.device), right=True)
        one_hot = torch.nn.functional.one_hot(y_N, self.num_classes)
        rows = torch.cat([row_hashes(bins_NU)[:, None], one_hot], -1)
        return {"labels": labels, "rows": tallied(rows, self.max_symbols)}

    def bounded(self, name: str, rows: Tensor) -> Tensor:
        """One row a symbol; for akde as they are, up to `max_rows`."""
        if self.edges is not None:
            return tallied(rows, self.max_symbols)
        if len(rows) > self.max_rows:
            raise MeasureError(
                f"akde compares all pairs of rows and holds at most max_rows={self.max_rows}; "
                f"there are {len(rows)} now: fold a sample of them, or use 'ebab'"
            )
        return rows

    def values(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See the class."""
        labels = stats["labels"].double()
        n = labels.sum()
        if n < 2:
            raise MeasureError(f"information needs at least two rows, and {int(n)} came")
        p_C = labels / n
        found = self._pairs(stats["rows"], p_C) if self.edges is None else self._symbols(stats["rows"], labels)
        found |= {"ceiling": n.log(), "h_y": torch.special.entr(p_C).sum()}
        return {name: value / self._nats for name, value in found.items()}

    def _symbols(self, rows: Tensor, labels_C: Tensor) -> dict[str, Tensor]:
        """From the counts of symbols, in nats: H = log n - (1/n) sum c log c."""
        sample = kept(rows, self.max_symbols)
        together = sample.counts.sum(1)
        n = labels_C.sum()
        all_of_them, error = sample.total(torch.xlogy(together, together))
        by_class, _ = sample.total(torch.xlogy(sample.counts, sample.counts))
        h_t = n.log() - all_of_them / n
        # sum_y p(y) H(T|y), the classes that did not occur adding nothing.
        h_t_given_y = (torch.xlogy(labels_C, labels_C) - by_class).sum() / n
        return {"i_xt": h_t, "i_ty": h_t - h_t_given_y, "h_t": h_t, "error": error / n}

    def _pairs(self, rows: Tensor, p_C: Tensor) -> dict[str, Tensor]:
        y_N, x_NU = rows[:, 0].long(), rows[:, 1:]
        largest = x_NU.abs().max()
        # A layer that is zero throughout says nothing, whatever the noise.
        variance = self.noise * torch.where(largest > 0, largest, 1.0) ** 2
        out = {}
        for name, scale in (("", 2.0), ("_lower", 8.0)):
            whole = _spread(x_NU, scale * variance)
            within = sum(p * _spread(x_NU[y_N == c], scale * variance) for c, p in enumerate(p_C) if p > 0)
            out |= {f"i_xt{name}": whole, f"i_ty{name}": whole - within}
        out["h_t"], out["error"] = out["i_xt"], torch.zeros_like(largest)
        return out


def compression(information: Tensor) -> Tensor:
    """How much of the information that a layer once had was lost by the end: (max - last) / max over epochs.

    Args:
        information: (epoch, ...), such as I(X;T) of each layer.

    Returns:
        (...), between 0 and 1; NaN where there never was any.

    Source: Chelombiev, Houghton and O'Donnell 2019.

    >>> compression(torch.tensor([[1.0], [4.0], [3.0]]))
    tensor([0.2500])
    """
    if information.ndim < 1 or len(information) < 2:
        raise MeasureError(f"compression needs two epochs or more, (epoch, ...), not {tuple(information.shape)}")
    most = information.amax(0)
    return ((most - information[-1]) / most).where(most > 0, torch.nan)


def _spread(x_NU: Tensor, scale: Tensor, rows: int = 1024) -> Tensor:
    """-(1/n) sum_i log (1/n) sum_j exp(-|x_i - x_j|^2 / scale), a block of rows at a time, in nats."""
    near = torch.cat([torch.logsumexp(-torch.cdist(block, x_NU).square() / scale, -1) for block in x_NU.split(rows)])
    return math.log(len(x_NU)) - near.mean()
