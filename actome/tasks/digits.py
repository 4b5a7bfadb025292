"""Handwritten digits, split once and for all: the images that ship with scikit-learn."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Digits:
    """Images of digits and their labels, in parts that do not overlap.

    Attributes:
        train, test: (n, 64) or (n, 1, 8, 8), float32.
        train_labels, test_labels: (n), int64, 0 to 9.
    """

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


def digits(
    seed: int = 0, *, train: int = 1297, test: int = 500, standardise: bool = True, images: bool = False
) -> Digits:
    """The 1797 8x8 digits, in a random split.

    Args:
        seed: of the split.
        train, test: how many of each; together 1797 at most.
        standardise: subtract the training part's mean pixel by pixel and divide by its overall standard deviation, so
            that inputs are centred and pixels that are always dark stay 0. Otherwise pixels are in [0, 1].
        images: (n, 1, 8, 8) instead of (n, 64).

    >>> data = digits(0)
    >>> data.train.shape, data.test_labels.shape, round(float(data.train.mean()), 3)
    (torch.Size([1297, 64]), torch.Size([500]), 0.0)
    """
    x, y = _all()
    if train < 1 or test < 0 or train + test > len(x):
        raise ValueError(f"train={train} and test={test} do not fit into {len(x)} images")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    x, y = x[order], y[order]
    if standardise:
        known = x[:train]
        mean = known.mean(0)
        x = (x - mean) / (known - mean).std()
    if images:
        x = x.view(-1, 1, 8, 8)
    end = train + test
    return Digits(x[:train].clone(), y[:train].clone(), x[train:end].clone(), y[train:end].clone())


@lru_cache(maxsize=1)
def _all() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.from_numpy(data.data).float() / 16, torch.from_numpy(data.target).long()
