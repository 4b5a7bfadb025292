"""Activation patterns as hash codes: which units are on, whether each example has its own code, what codes tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.errors import MeasureError
from ..core.fold import Fold, Reduction
from ..core.real import double
from .rows import finite_rows
from .tally import kept, packed, row_hashes, tallied


class ActivationCode(Fold):
    r"""The binary codes :math:`1[z > 0]` of examples at a layer: how many there are, and how far apart.

    Of n rows with d distinct codes of U bits:

    - ``redundancy``: :math:`(n - d) / n`; near 0 each example has a code of its own
    - ``distinct``: d, and ``distinct_error`` its standard error
    - ``entropy``: plug-in entropy of the codes in bits, and ``entropy_error`` its standard error; at most ``ceiling``,
      log2 n
    - ``distance``: mean share of bits in which two different rows differ, exactly, from how often each unit is on
    - ``always_on``, ``always_off``: share of units that never change. Many of them say that the inputs were not
      centred, and that a comparison of codes is one of few bits.
    - ``frequency``: (unit), share of rows with the unit on

    Exact up to `cap` distinct codes. Beyond, those with the smallest 64-bit hashes are kept and d is estimated from how
    densely they lie, with a standard error of d / sqrt(cap) (0.4 % by default); so is the entropy.

    Args:
        cap: distinct codes to keep, 16 bytes each.

    Shapes: update takes what goes into the nonlinearity, (rows, units), one tensor or several side by side (a list,
    for the code of several layers); rows with a non-finite unit are left out. Values () but frequency.

    Source: He et al. 2021, Neural networks behave as hash encoders: An empirical study (redundancy ratio); distinct
    codes by the k smallest hashes, Bar-Yossef et al. 2002.

    Example:
        >>> code = ActivationCode()
        >>> code.update(torch.tensor([[1.0, -1.0], [2.0, -0.5], [-1.0, 1.0], [1.0, 1.0]]))
        >>> float(code.compute()["redundancy"]), int(code.compute()["distinct"])
        (0.25, 3)
    """

    reductions: ClassVar[dict[str, Reduction]] = {"rows": "sum", "on": "sum", "codes": "cat"}

    def __init__(self, cap: int = 1 << 16, **options: object):
        super().__init__(**options)
        if cap < 16:
            raise MeasureError(f"cap={cap}: an estimate from so few codes says nothing; give 16 at least")
        self.cap = cap

    def statistics(self, z_NU: Tensor | Sequence[Tensor]) -> dict[str, Tensor]:
        """rows: (); on: (unit); codes: (hash, count)."""
        bits_NU = codes_of(z_NU)
        hashes = row_hashes(packed(bits_NU))
        rows = torch.stack([hashes, torch.ones_like(hashes)], -1)
        return {
            "rows": torch.tensor(len(bits_NU), device=bits_NU.device),
            "on": bits_NU.sum(0),
            "codes": tallied(rows, self.cap),
        }

    def bounded(self, name: str, rows: Tensor) -> Tensor:
        """Equal codes put together, those with the smallest hashes."""
        return tallied(rows, self.cap)

    def values(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See the class."""
        n = double(stats["rows"])
        if not int(n):
            raise MeasureError("no finite row came: there is no code")
        sample = kept(stats["codes"], self.cap)
        count = sample.counts[:, 0]
        distinct, distinct_error = sample.total(torch.ones_like(count))
        logs, logs_error = sample.total(torch.xlogy(count, count))
        frequency = stats["on"] / n
        # Of n (n - 1) ordered pairs of rows, on (n - on) differ twice in this bit.
        pairs = (n * (n - 1)).clamp_min(1)
        apart = 2 * stats["on"] * (stats["rows"] - stats["on"]) / pairs
        return {
            "redundancy": 1 - distinct / n,
            "distinct": distinct,
            "distinct_error": distinct_error,
            "entropy": (n.log() - logs / n) / torch.tensor(2.0).log().item(),
            "entropy_error": logs_error / n / torch.tensor(2.0).log().item(),
            "ceiling": n.log2(),
            "distance": apart.mean().where(n > 1, torch.nan),
            "always_on": double(frequency == 1).mean(),
            "always_off": double(frequency == 0).mean(),
            "frequency": frequency,
        }


def codes_of(z_NU: Tensor | Sequence[Tensor]) -> Tensor:
    """The binary code of each row, (rows, units) bool, of one layer or of several side by side.

    >>> codes_of(torch.tensor([[0.5, -0.5, 0.0]]))
    tensor([[ True, False, False]])
    """
    if not isinstance(z_NU, Tensor):
        if len({len(one) for one in z_NU}) != 1:
            raise MeasureError(f"layers of {[len(one) for one in z_NU]} rows make no common code")
        z_NU = torch.cat(list(z_NU), -1)
    (z_NU,) = finite_rows("codes_of", z_NU)
    return z_NU > 0


@dataclass(frozen=True)
class CodeAccuracy:
    """Accuracy on held-out examples of simple classifiers that see nothing but binary codes.

    Attributes:
        kmeans: clusters of the training codes, as many as classes, each named after one class (Hungarian matching).
        knn: vote of the nearest neighbours by Hamming distance.
        logistic: logistic regression, one against one.
    """

    kmeans: float
    knn: float
    logistic: float


def code_accuracy(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, *, neighbours: int = 9, seed: int = 0
) -> CodeAccuracy:
    """How well simple classifiers fitted on training codes read the class from test codes.

    Compare with the codes of the untrained net and of one trained on random labels, not with chance: random projections
    already keep much of the class.

    Args:
        train, test: codes (rows, units) bool, from `codes_of`; real-valued activations are refused.
        neighbours: of the vote.
        seed: of k-means.

    Source: He et al. 2021, Neural networks behave as hash encoders (categorisation by k-means, k-NN and logistic
    regression).

    >>> codes, labels = torch.eye(3).bool().repeat(10, 1), torch.arange(3).repeat(10)
    >>> code_accuracy(codes, labels, codes, labels)
    CodeAccuracy(kmeans=1.0, knn=1.0, logistic=1.0)
    """
    from sklearn.cluster import KMeans
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsOneClassifier

    if train.dtype != torch.bool or test.dtype != torch.bool:
        raise MeasureError(f"codes are bool, from codes_of(); these are {train.dtype} and {test.dtype}")
    if train.shape[1:] != test.shape[1:] or len(train) != len(train_labels) or len(test) != len(test_labels):
        raise MeasureError(f"codes {tuple(train.shape)} and {tuple(test.shape)} do not fit their labels or each other")
    classes, y = train_labels.unique(return_inverse=True)
    if len(train) < max(neighbours, len(classes)) or len(classes) < 2:
        raise MeasureError(f"{len(train)} codes of {len(classes)} classes are too few to fit on")
    a, b, y, truth = train.float().cpu().numpy(), test.float().cpu().numpy(), y.cpu(), test_labels.cpu()

    means = KMeans(len(classes), n_init=10, random_state=seed).fit(a)
    names = _matched(torch.from_numpy(means.labels_).long(), y, len(classes))
    logistic = OneVsOneClassifier(LogisticRegression(max_iter=500)).fit(a, y.numpy())
    guesses = {
        "kmeans": names[torch.from_numpy(means.predict(b)).long()],
        "knn": _vote(train, y.to(train.device), test, neighbours, len(classes)).cpu(),
        "logistic": torch.from_numpy(logistic.predict(b)).long(),
    }
    return CodeAccuracy(**{name: float((classes.cpu()[g] == truth).double().mean()) for name, g in guesses.items()})


def hamming(a_NU: Tensor, b_MU: Tensor) -> Tensor:
    """In how many bits each code of one set differs from each of the other, (n, m) float32, exact below 2^24 bits.

    >>> hamming(torch.tensor([[True, False]]), torch.tensor([[True, True], [False, True]])).tolist()
    [[1.0, 2.0]]
    """
    a, b = a_NU.float(), b_MU.float()
    return a.sum(1)[:, None] + b.sum(1)[None] - 2 * a @ b.T


def _vote(train: Tensor, y: Tensor, test: Tensor, neighbours: int, classes: int) -> Tensor:
    # Many are equally near in short codes: which of them vote is settled by their order among the training rows.
    order = torch.arange(len(train), device=train.device) / len(train)
    distances = (hamming(part, train) + order for part in test.split(1024))
    nearest = torch.cat([one.topk(neighbours, largest=False).indices for one in distances])
    return torch.nn.functional.one_hot(y[nearest], classes).sum(1).argmax(-1)


def _matched(clusters: Tensor, y: Tensor, classes: int) -> Any:
    """For each cluster the class that it stands for, so that as many training rows as possible are right."""
    from scipy.optimize import linear_sum_assignment

    table = torch.zeros(classes, classes, dtype=torch.int64)
    table.index_put_((clusters, y), torch.ones_like(y), accumulate=True)
    return torch.from_numpy(linear_sum_assignment(-table.numpy())[1])
