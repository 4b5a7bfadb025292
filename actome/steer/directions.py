"""Directions: ways to draw one direction between two sets of states.

Letters: N examples, M examples of the other set, D width.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from actome.core.errors import MeasureError

Method = Literal["means", "lda", "pca", "logistic"]
METHODS: tuple[Method, ...] = ("means", "lda", "pca", "logistic")


def direction(positive_ND: Tensor, negative_MD: Tensor, method: Method = "means", *, c: float = 1.0) -> Tensor:
    r"""A unit vector that leads from the negative states to the positive ones, (D).

    - ``"means"``: :math:`\mu_+ - \mu_-`
    - ``"lda"``: :math:`\Sigma^{-1} (\mu_+ - \mu_-)`, with the covariance within the two sets, shrunk as Ledoit and Wolf
      do: best to *tell* the sets apart, and seldom best to steer with, since it leaves out what varies anyway
    - ``"pca"``: the first principal component of the pairs, each centred on its own mean, :math:`h_+ - (h_+ + h_-)/2`
      and its opposite; turned so that positive states lie higher. Takes as many of one as of the other, pair by pair
    - ``"logistic"``: the normal of a logistic regression on standardised states, taken back to the states' own scale

    Args:
        positive_ND, negative_MD: states, two of each at least.
        method: see above.
        c: of the logistic regression, the inverse of its regularisation.

    Raises:
        MeasureError: too few, widths that differ, values that are not finite, sets that are the same.

    Sources: means, Turner et al. 2023, Activation Addition; pca, Lee et al. 2025, Programming Refusal with Conditional
    Activation Steering (section 3.2); shrinkage, Ledoit and Wolf 2004.

    >>> high, low = torch.randn(50, 8) + 3 * torch.eye(8)[2], torch.randn(50, 8)
    >>> bool(direction(high, low)[2] > 0.8)
    True
    """
    if method not in METHODS:
        raise MeasureError(f"method={method!r} does not exist; choose {', '.join(METHODS)}")
    high, low = checked(positive_ND, negative_MD)
    apart = high.mean(0) - low.mean(0)
    if method == "lda":
        found = _lda(high, low, apart)
    elif method == "pca":
        found = _pca(high, low, apart)
    elif method == "logistic":
        found = _logistic(high, low, c)
    else:
        found = apart
    norm = found.norm()
    scale = torch.cat([high, low]).abs().amax()
    if not bool(norm > torch.finfo(torch.float32).eps * scale):
        raise MeasureError("the two sets of states are the same; there is no direction between them")
    return (found / norm).float()


def gap(direction_D: Tensor, positive_ND: Tensor, negative_MD: Tensor) -> float:
    """How far apart the means of two sets lie along a unit vector: what to add to bring one mean to the other."""
    return float((positive_ND.double().mean(0) - negative_MD.double().mean(0)) @ direction_D.double())


def checked(positive_ND: Tensor, negative_MD: Tensor) -> tuple[Tensor, Tensor]:
    """Two sets of states as float64, proved to be fit for a direction."""
    for name, x in (("positive", positive_ND), ("negative", negative_MD)):
        if x.ndim != 2 or len(x) < 2:
            raise MeasureError(f"{name} states have the shape {tuple(x.shape)}; give (N, D), two examples at least")
        if not bool(torch.isfinite(x).all()):
            raise MeasureError(f"{name} states hold values that are not finite")
    if positive_ND.shape[1] != negative_MD.shape[1]:
        raise MeasureError(f"states of the widths {positive_ND.shape[1]} and {negative_MD.shape[1]} are of two sites")
    return positive_ND.double(), negative_MD.double()


def _lda(high: Tensor, low: Tensor, apart: Tensor) -> Tensor:
    from sklearn.covariance import ledoit_wolf

    within = torch.cat([high - high.mean(0), low - low.mean(0)])
    covariance, _ = ledoit_wolf(within.numpy(), assume_centered=True)
    return torch.linalg.lstsq(torch.from_numpy(np.asarray(covariance)), apart[:, None]).solution[:, 0]


def _pca(high: Tensor, low: Tensor, apart: Tensor) -> Tensor:
    if len(high) != len(low):
        raise MeasureError(f"method='pca' takes pairs, and there are {len(high)} positive and {len(low)} negative")
    half = (high - low) / 2  # h+ less the pair's mean; the other of the pair is its opposite
    found = torch.linalg.svd(half, full_matrices=False).Vh[0]
    return found if bool(found @ apart >= 0) else -found


def _logistic(high: Tensor, low: Tensor, c: float) -> Tensor:
    from sklearn.linear_model import LogisticRegression

    x = torch.cat([high, low])
    spread = x.std(0).clamp_min(1e-12)
    fit = LogisticRegression(C=c, max_iter=2000).fit(
        ((x - x.mean(0)) / spread).numpy(), np.repeat([1, 0], [len(high), len(low)])
    )
    return torch.from_numpy(fit.coef_[0]) / spread
