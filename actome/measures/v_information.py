"""Usable information: what a probe of a given kind can read of a label, in held-out bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..core.errors import MeasureError
from .rows import finite_rows, nats_per

Probe = Literal["logistic", "knn", "tree"]


@dataclass(frozen=True)
class VInformation:
    """What a family of probes could use.

    Attributes:
        information: H_V(Y) - H_V(Y|X) on held-out rows; may be below 0 when the probe overfits.
        entropy: H_V(Y), the held-out loss of the best constant prediction.
        conditional: H_V(Y|X), the held-out loss of the probe.
        control: the same as `information` with labels shuffled before fitting; 0 or below when all is well.
        pointwise: (test rows), what each row's features tell of its own label; their mean is `information`.
        fitted, tested: how many rows.
        unit: ``"bits"`` or ``"nats"``, of everything.
    """

    information: float
    entropy: float
    conditional: float
    control: float
    pointwise: Tensor
    fitted: int
    tested: int
    unit: str


def v_information(
    x: Tensor,
    y: Tensor,
    probe: Probe | Any = "logistic",
    *,
    test: float = 0.5,
    seed: int = 0,
    unit: Literal["bits", "nats"] = "bits",
) -> VInformation:
    r"""Information about a label that probes of one kind can use: :math:`I_V(X \to Y) = H_V(Y) - H_V(Y|X)`.

    :math:`H_V(Y|X) = \inf_{f \in V} E[-\log f[X](Y)]`. The infimum is taken by fitting on one part of the rows and its
    expectation on the other, so it is a lower bound up to the noise of the split. Unlike Shannon's information it can
    grow as a layer makes the label easier to read, and it never exceeds H(Y).

    Args:
        x: features (rows, units); rows with a non-finite unit are left out. Standardised for the probes by name.
        y: integer labels (rows).
        probe: ``"logistic"`` (L2-regularised), ``"knn"`` (15 neighbours), ``"tree"`` (random forest), or any
            scikit-learn classifier with ``predict_proba``, which is cloned.
        test: share of the rows that is held out.
        seed: of the split, the shuffled labels and the forest.

    Raises:
        MeasureError: labels that are no integers, a single class, or fewer than 10 rows in a part.

    Source: Xu et al. 2020, A Theory of Usable Information under Computational Constraints (definitions 1 to 3);
    pointwise form Ethayarajh et al. 2022.

    >>> g = torch.Generator().manual_seed(0)
    >>> y = torch.randint(0, 2, (400,), generator=g)
    >>> found = v_information(torch.randn(400, 3, generator=g) + 6 * y[:, None], y)
    >>> found.information > 0.9, abs(found.control) < 0.1
    (True, True)
    """
    import numpy as np

    nats = nats_per(unit)
    x, y = finite_rows("v_information", x, y)
    if y.is_floating_point() or y.ndim != 1:
        raise MeasureError(f"v_information takes integer labels (rows), not {y.dtype} {tuple(y.shape)}")
    features, labels = x.double().cpu().numpy(), y.cpu().numpy()
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    tested = round(test * len(labels))
    held, fitted = order[:tested], order[tested:]
    if min(len(held), len(fitted)) < 10:
        raise MeasureError(f"{len(labels)} rows give {len(fitted)} to fit and {len(held)} to test; 10 each are needed")
    classes = np.unique(labels)
    if len(classes) < 2:
        raise MeasureError(f"all labels are {classes[0]}: there is nothing to know of them")
    # Every class gets half a count, so that one which only the test part holds costs much and not infinitely much.
    counts = np.array([(labels[fitted] == c).sum() for c in classes]) + 0.5
    prior = counts / counts.sum()
    at = np.searchsorted(classes, labels[held])

    def surprise(train_labels: Any) -> Any:
        model = _probe(probe, seed)
        model.fit(features[fitted], train_labels)
        p = np.full((len(held), len(classes)), 0.0)
        p[:, np.searchsorted(classes, model.classes_)] = model.predict_proba(features[held])
        # A mixture with a pinch of the prior: a probe that says 0 (neighbours, trees) would cost infinitely much.
        p = (1 - 1e-3) * p + 1e-3 * prior
        return -np.log(p[np.arange(len(held)), at]) / nats

    constant = -np.log(prior[at]) / nats
    found = surprise(labels[fitted])
    control = surprise(rng.permutation(labels[fitted]))
    return VInformation(
        information=float((constant - found).mean()),
        entropy=float(constant.mean()),
        conditional=float(found.mean()),
        control=float((constant - control).mean()),
        pointwise=torch.from_numpy(constant - found),
        fitted=len(fitted),
        tested=len(held),
        unit=unit,
    )


def _probe(probe: Probe | Any, seed: int) -> Any:
    from sklearn.base import clone
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if not isinstance(probe, str):
        if not hasattr(probe, "predict_proba"):
            raise MeasureError(f"{type(probe).__name__} has no predict_proba: information needs probabilities")
        return clone(probe)
    known = {
        "logistic": lambda: LogisticRegression(C=0.1, max_iter=1000),
        "knn": lambda: KNeighborsClassifier(15),
        "tree": lambda: RandomForestClassifier(200, min_samples_leaf=5, random_state=seed),
    }
    if probe not in known:
        raise MeasureError(f"probe={probe!r} does not exist; choose {', '.join(known)} or a scikit-learn classifier")
    return make_pipeline(StandardScaler(), known[probe]())
