"""Steps in demonstrations, and a reward that tells how far along an observation is.

Letters: T frame, D unit, S step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from ..core.errors import MeasureError
from ..core.real import double, wide


class StepSegmenter:
    r"""Cuts demonstrations into the same number of steps, each as uniform as possible.

    Minimises the sum over steps of the mean over units of the standard deviation within the step. With several
    demonstrations each has cuts of its own, and the deviation is that of all frames of one step together, so a step
    looks alike in all of them.

    A single demonstration is cut optimally, by dynamic programming (the paper tries all cuts by recursion, and cuts
    each demonstration by itself). Several are cut one by one first, and then each in turn optimally given the others,
    until nothing changes: the objective falls with every turn, to a local minimum.

    Args:
        steps: how many.
        min_len: frames that each step has at least.

    Attributes:
        cuts_: for each demonstration where steps 2, 3, ... begin.
        cost_: the objective at these cuts.

    Source: Sermanet, Xu and Levine 2017, Unsupervised Perceptual Rewards for Imitation Learning (algorithm 1).

    Example:
        >>> frames = torch.tensor([[0.0], [0.1], [0.0], [5.0], [5.1], [9.0], [9.1]])
        >>> StepSegmenter(3, min_len=2).fit([frames]).cuts_
        [[3, 5]]
    """

    def __init__(self, steps: int, min_len: int = 2):
        if steps < 1 or min_len < 1:
            raise MeasureError(f"steps={steps} and min_len={min_len} must both be at least 1")
        self.steps, self.min_len = steps, min_len

    def fit(self, demos: Sequence[Tensor], rounds: int = 10) -> Self:
        """Finds the cuts.

        Args:
            demos: the activations of each, (T, D), of the same units; bring units to comparable scales first.
            rounds: turns over all demonstrations at most.

        Raises:
            MeasureError: no demonstration, one shorter than ``steps * min_len``, or units that are not finite.
        """
        self.cuts_: list[list[int]] = []
        frames = [_checked(one, self.steps * self.min_len) for one in demos]
        if not frames or len({one.shape[1] for one in frames}) != 1:
            raise MeasureError("steps are found in one demonstration or more, all of the same units")
        nothing = _Sums.of(frames[0][:0])
        self.cuts_ = [self._cut(one, [nothing] * self.steps) for one in frames]
        for _ in range(rounds if len(frames) > 1 else 0):
            before = [list(cuts) for cuts in self.cuts_]
            for i, one in enumerate(frames):
                rest = [self._pooled(frames, step, leave=i) for step in range(self.steps)]
                self.cuts_[i] = self._cut(one, rest)
            if self.cuts_ == before:
                break
        self.cost_ = float(sum(self._pooled(frames, step).deviation() for step in range(self.steps)))
        return self

    def labels(self, lengths: Sequence[int]) -> list[Tensor]:
        """The step of each frame of the fitted demonstrations, from 0."""
        return [_labels(cuts, length) for cuts, length in zip(self.cuts_, lengths, strict=True)]

    def _pooled(self, frames: list[Tensor], step: int, leave: int = -1) -> _Sums:
        parts = [_segment(one, self.cuts_[j], step) for j, one in enumerate(frames) if j != leave]
        return _Sums.of(torch.cat(parts))

    def _cut(self, frames: Tensor, rest: list[_Sums]) -> list[int]:
        """The best cuts of one demonstration when the frames of `rest` already belong to the steps."""
        T, S, L = len(frames), self.steps, self.min_len
        running = _Sums(
            torch.arange(T + 1, dtype=frames.dtype, device=frames.device)[:, None],
            _from_zero(frames.cumsum(0)),
            _from_zero(frames.square().cumsum(0)),
        )
        # best[s][t]: the least cost of putting the first t frames into the first s steps.
        best = torch.full((S + 1, T + 1), math.inf, dtype=torch.float64)
        best[0, 0] = 0.0
        came = torch.zeros(S + 1, T + 1, dtype=torch.long)
        for s in range(1, S + 1):
            for t in range(s * L, T - (S - s) * L + 1):
                starts = torch.arange((s - 1) * L, t - L + 1)
                cost = best[s - 1, starts] + running.between(starts, t).plus(rest[s - 1]).deviation().cpu()
                at = int(cost.argmin())
                best[s, t], came[s, t] = cost[at], starts[at]
        cuts, t = [], T
        for s in range(S, 1, -1):
            t = int(came[s, t])
            cuts.append(t)
        return cuts[::-1]


class PerceptualReward:
    r"""A dense reward from a few demonstrations: how much a frame looks like the later steps of them.

    For step *i* and unit *j*, with mean and deviation over the frames inside (+) and outside (-) of the step, the
    units with the largest :math:`a|\mu^+ - \mu^-| - (\sigma^+ + \sigma^-)` are kept, as far as that is above 0, and

    .. math:: R_i(s) = \exp\big(-\tfrac14 \operatorname{mean}_j (s_j - \mu^+_{ij})^2 / \sigma^{+2}_{ij}\big), \qquad
              R(s) = \sum_{i \ge 2} 2^{i-1} R_i(s)

    so that later steps outweigh all earlier ones together. A step that no unit tells from the others by more than its
    spread gives no reward: demonstrations without steps give a reward that is 0 throughout. Units are standardised
    over the frames of the demonstrations; those that never vary are left out. Time must not be a unit.

    Args:
        steps: how many, 2 to 4 in the paper.
        top: units kept for each step at most.
        weight: *a*.
        min_len: of a step, as in `StepSegmenter`.
        floor: the least deviation, in units of the standardised activations. A unit that does not vary at all within
            a step would otherwise give no reward to anything but those very frames.

    Attributes:
        segmenter_: the fitted `StepSegmenter`.
        units_: for each step the units kept, counted among all.

    Source: Sermanet, Xu and Levine 2017, Unsupervised Perceptual Rewards for Imitation Learning; the squashing by an
    exponential, *a* (5 in the paper), the floor and leaving out units below 0 are choices made here.

    Example:
        >>> demo = torch.cat([torch.zeros(5, 2), torch.ones(5, 2), torch.full((5, 2), 2.0)])
        >>> demo = demo + 0.01 * torch.randn(demo.shape, generator=torch.Generator().manual_seed(0))
        >>> reward = PerceptualReward(3, top=2).fit([demo]).score(demo)
        >>> bool(reward[:5].max() < reward[5:10].min()), bool(reward[5:10].max() < reward[10:].min())
        (True, True)
    """

    def __init__(self, steps: int = 3, top: int = 32, weight: float = 1.0, min_len: int = 2, floor: float = 0.1):
        if steps < 2:
            raise MeasureError(f"steps={steps}; the reward is for the second step and later, so at least 2 are needed")
        if top < 1 or floor <= 0:
            raise MeasureError(f"top={top} must be at least 1 and floor={floor} above 0")
        self.steps, self.top, self.weight, self.min_len, self.floor = steps, top, weight, min_len, floor

    def fit(self, demos: Sequence[Tensor]) -> Self:
        """Finds steps and units.

        Args:
            demos: the activations of each demonstration, (T, D), as `model.record` gives them.

        Raises:
            MeasureError: as `StepSegmenter.fit`, or no unit varies.
        """
        frames = [_checked(one, self.steps * self.min_len) for one in demos]
        everything = torch.cat(frames) if frames else torch.empty(0, 1)
        self.mean_, deviation = everything.mean(0), everything.std(0, correction=0)
        self.varies_ = deviation > 1e-6 * everything.abs().amax(0)
        if not bool(self.varies_.any()):
            raise MeasureError("no unit varies over the demonstrations, so no step can be told from another")
        self.scale_ = deviation.where(self.varies_, 1.0)
        frames = [self._standardised(one) for one in frames]
        self.segmenter_ = StepSegmenter(self.steps, self.min_len).fit(frames)
        labels = torch.cat(self.segmenter_.labels([len(one) for one in frames]))
        everything = torch.cat(frames)
        place = self.varies_.nonzero()[:, 0]
        self.units_: list[Tensor] = []
        self._kept: list[tuple[Tensor, Tensor, Tensor]] = []
        for step in range(self.steps):
            inside, outside = everything[labels == step], everything[labels != step]
            mean, deviation = inside.mean(0), inside.std(0, correction=0)
            apart = (mean - outside.mean(0)).abs()
            score = self.weight * apart - (deviation + outside.std(0, correction=0))
            chosen = score.topk(min(self.top, len(score))).indices
            chosen = chosen[score[chosen] > 0]
            self.units_.append(place[chosen])
            self._kept.append((chosen, mean[chosen], deviation[chosen].clamp_min(self.floor)))
        return self

    def step_scores(self, frames: Tensor) -> Tensor:
        """:math:`R_i` of each frame and step, (T, S), between 0 and 1; 0 for a step that no unit tells."""
        x = self._standardised(_checked(frames, 1))
        scores = [(-((x[:, units] - mean) / spread).square().mean(-1) / 4).exp() for units, mean, spread in self._kept]
        return torch.stack(scores, -1).nan_to_num(0.0)  # the mean over no unit

    def score(self, frames: Tensor) -> Tensor:
        """The reward of each frame, (T)."""
        weights = 2.0 ** torch.arange(self.steps, dtype=torch.float64, device=frames.device)
        return self.step_scores(frames)[:, 1:] @ weights[1:]

    def _standardised(self, frames: Tensor) -> Tensor:
        return ((frames - self.mean_) / self.scale_)[:, self.varies_]


class _Sums:
    """Counts, sums and sums of squares of frames, from which deviations follow."""

    def __init__(self, count: Tensor, total: Tensor, square: Tensor):
        self.count, self.total, self.square = count, total, square

    @classmethod
    def of(cls, frames: Tensor) -> _Sums:
        return cls(frames.new_full((1,), float(len(frames))), frames.sum(0), frames.square().sum(0))

    def between(self, starts: Tensor, end: int) -> _Sums:
        return _Sums(*(one[end] - one[starts] for one in (self.count, self.total, self.square)))

    def plus(self, other: _Sums) -> _Sums:
        return _Sums(self.count + other.count, self.total + other.total, self.square + other.square)

    def deviation(self) -> Tensor:
        """The mean over units of the standard deviation."""
        mean = self.total / self.count
        return (self.square / self.count - mean.square()).clamp_min(0).sqrt().mean(-1)


def _segment(frames: Tensor, cuts: list[int], step: int) -> Tensor:
    edges = [0, *cuts, len(frames)]
    return frames[edges[step] : edges[step + 1]]


def _labels(cuts: list[int], length: int) -> Tensor:
    return torch.bucketize(torch.arange(length), torch.tensor(cuts, dtype=torch.long), right=True)


def _from_zero(x: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(x[:1]), x])


def _checked(frames: Tensor, least: int) -> Tensor:
    if frames.ndim != 2 or len(frames) < least:
        raise MeasureError(f"a demonstration is (T, D) with at least {least} frames, not {tuple(frames.shape)}")
    frames = double(wide(frames.detach()))
    if not bool(frames.isfinite().all()):
        raise MeasureError("a demonstration holds activations that are not finite")
    return frames
