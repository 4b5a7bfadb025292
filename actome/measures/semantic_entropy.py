"""Uncertainty over meanings: entropy over groups of answers that say the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ..core.errors import MeasureError

Answer = TypeVar("Answer")


def meanings(samples: Sequence[Answer], equivalence: Callable[[Answer, Answer], bool]) -> list[int]:
    """Which meaning each sample has, numbered in order of appearance.

    A sample joins the first group whose *first member* it is equivalent to, and opens a group otherwise: each is
    compared with one member a group. An equivalence that is no equivalence relation (a model of entailment need not be
    transitive) still gives one partition, which then depends on the order of the samples.

    Args:
        equivalence: called with the first member of a group and the sample; for text, whether each entails the other.

    Source: Kuhn et al. 2023, Semantic Uncertainty (algorithm 1).

    >>> meanings(["Paris", "paris", "Rome"], lambda a, b: a.lower() == b.lower())
    [0, 0, 1]
    """
    firsts: list[Answer] = []
    groups: list[int] = []
    for sample in samples:
        group = next((i for i, first in enumerate(firsts) if equivalence(first, sample)), len(firsts))
        if group == len(firsts):
            firsts.append(sample)
        groups.append(group)
    return groups


def semantic_entropy(
    samples: Sequence[Answer],
    equivalence: Callable[[Answer, Answer], bool],
    logprobs: Sequence[float] | Tensor | None = None,
) -> float:
    r"""Entropy of the meanings of sampled answers, in nats: 0 when all say the same.

    With groups c of answers that mean the same (`meanings`), :math:`-\sum_c p(c) \log p(c)`, where

    - without `logprobs`, p(c) is the share of samples in c (the discrete form, for models whose probabilities one does
      not have; biased downwards for few samples);
    - with them, :math:`p(c) \propto \sum_{s \in c} p(s \mid x)` over the samples (the Rao-Blackwellised form). A
      sample that was drawn twice counts twice, as in the published code; give each once to count it once.

    Args:
        samples: the answers to one question, at least one.
        equivalence: whether two answers mean the same.
        logprobs: log probability of each answer given the question; divided by its length, if lengths differ much.

    Raises:
        MeasureError: no samples, or not one finite log probability each.

    Source: Kuhn et al. 2023, Semantic Uncertainty; Farquhar et al. 2024, Detecting Hallucinations in Large Language
    Models Using Semantic Entropy (both estimators).

    >>> round(semantic_entropy(["4", "four", "5"], lambda a, b: {a, b} <= {"4", "four"} or a == b), 3)
    0.637
    """
    if not len(samples):
        raise MeasureError("semantic entropy is over samples, and there are none; sample at least one answer")
    groups = torch.tensor(meanings(samples, equivalence))
    if logprobs is None:
        weights = torch.ones(len(samples), dtype=torch.float64)
    else:
        logs = torch.as_tensor(logprobs, dtype=torch.float64, device="cpu").detach()
        if logs.shape != (len(samples),) or not bool(logs.isfinite().all()):
            raise MeasureError(
                f"{len(samples)} samples need a finite log probability each, not {tuple(logs.shape)}: {logs}"
            )
        weights = (logs - logs.amax()).exp()
    mass = torch.zeros(int(groups.max()) + 1, dtype=torch.float64).index_add_(0, groups, weights)
    return float(torch.special.entr(mass / mass.sum()).sum())
