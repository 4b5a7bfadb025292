"""Representations that lose their directions, and outputs that repeat while the loss stands still."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from actome.core.errors import MeasureError

from .base import Alarm, Detector, Level, Reading
from .history import Best, Track
from .places import in_forward_order

_RANKS = ("effective_rank", "effective_rank_share")


class RankCollapse(Detector):
    """The effective rank of a site falls to a small part of what it was, and is low by itself.

    Both have to hold at `hold` samples in a row: the rank is below `fall` of the highest that two neighbouring samples
    had so far, and below `share` of the site's width (or, where the width is not known, below `low` directions). Early
    in training ranks fall and rise again in healthy runs, which stay above one or the other.

    Where massive activations come up at the site (``massive_ratio`` above 100), a few coordinates take nearly all
    of the variance, as they do in healthy language models: that is told as ``info``.

    Args:
        fall: of the highest rank so far.
        share: of the width.
        low: directions.
        hold: samples in a row.

    Delay: `hold` samples.

    Source: RankMe (the effective rank as a sign of collapse); the share and the history are ours.
    """

    name: ClassVar[str] = "rank_collapse"
    needs: ClassVar[tuple[str, ...]] = (*_RANKS, "massive_ratio")

    def __init__(self, fall: float = 0.3, share: float = 0.1, low: float = 2.0, hold: int = 2):
        if not 0 < fall < 1 or not 0 < share < 1 or low < 1 or hold < 1:
            raise MeasureError(f"fall={fall}, share={share}, low={low}, hold={hold}: want two shares, and 1 or more")
        self.fall, self.share, self.low, self.hold = fall, share, low, hold
        self._tracks: dict[tuple[str, str], Track] = {}
        self._highest: dict[str, Best] = {}
        self._massive: dict[str, Track] = {}

    def update(self, step: int, readings: Sequence[Reading]) -> list[Alarm] | None:
        sites = []
        for one in readings:
            if one.site is None or not math.isfinite(one.value):
                continue
            if one.measure == "massive_ratio":
                self._massive.setdefault(one.site, Track(1)).add(step, one.value)
            else:
                self._tracks.setdefault((one.measure, one.site), Track(max(self.hold, 2))).add(step, one.value)
                sites.append(one.site)
        if not sites:
            return None
        found = []
        for site in in_forward_order(sites):
            alarm = self._judge(step, site)
            if alarm is not None:
                found.append(alarm)
        return found

    def rewind(self, step: int) -> None:
        for tracks in (self._tracks, self._highest, self._massive):
            for one in tracks.values():
                one.rewind(step)

    def _judge(self, step: int, site: str) -> Alarm | None:
        ranks = self._tracks.get(("effective_rank", site)) or self._tracks["effective_rank_share", site]
        shares = self._tracks.get(("effective_rank_share", site))
        highest = self._highest.setdefault(site, Best())
        if len(ranks) >= 2:
            highest.add(step, -min(ranks.last(2)))  # the lower of two neighbours: one odd sample is no history
        if len(ranks) < self.hold or highest.step is None:
            return None
        now, most = max(ranks.last(self.hold)), -highest.value
        low = max(shares.last(self.hold)) <= self.share if shares else now <= self.low
        if not low or now > self.fall * most:
            return None
        massive = self._massive.get(site)
        ratio = massive.values[-1] if massive else 0.0
        level: Level = "info" if ratio > 100 else "warning"
        evidence: dict[str, Any] = {"rank": now, "highest": most, "highest_step": highest.step}
        if shares:
            evidence["share"] = shares.values[-1]
        if ratio > 100:
            evidence["massive_ratio"] = ratio
        began = list(ranks.steps)[-self.hold]
        owed = "; massive activations take the variance" if ratio > 100 else ""
        return Alarm(
            began, self.name,
            f"the effective rank at {site} fell to {now:.3g}, from {most:.3g} at step {highest.step}{owed}", site,
            level,
            "look whether all tokens have become alike there (TokenCollapse): lower the learning rate or the weight "
            "decay, and check the norms before this site", evidence,
            "RankMe: Assessing the Downstream Performance of Pretrained Self-Supervised Representations by Their Rank",
        )  # fmt: skip


class CollapsePlateau(Detector):
    """The loss stands still, while tokens look alike and outputs repeat: a plateau of the abrupt kind.

    Three things hold at once over the last `window` samples: the loss did not fall (a line through it falls by less
    than `fall` of its level over the window, and its slope is within the noise); the mean cosine between tokens is at
    least `cosine` at some site; and outputs repeat (``repetition``) at `repetition` or more and three times as often as
    the data do. Such a plateau often ends by itself in a jump, when attention has found its targets.

    Args:
        window: samples.
        fall, cosine, repetition: as above.

    Delay: `window` samples after the loss has come to stand.

    Source: What Happens During the Loss Plateau? Understanding Abrupt Learning in Transformers.
    """

    name: ClassVar[str] = "collapse_plateau"
    needs: ClassVar[tuple[str, ...]] = ("token_cosine", "repetition", "repetition_of_data", "loss")

    def __init__(self, window: int = 6, fall: float = 0.02, cosine: float = 0.9, repetition: float = 0.3):
        if window < 4 or not 0 < fall < 1 or not 0 < cosine < 1 or not 0 < repetition < 1:
            raise MeasureError(
                f"window={window}, fall={fall}, cosine={cosine}, repetition={repetition}: want 4, shares"
            )
        self.window, self.fall, self.cosine, self.repetition = window, fall, cosine, repetition
        self._losses = Track(4096)  # the losses of each step, thinned to those since the first sample of the window
        self._samples = Track(window)
        self._cosines: dict[str, Track] = {}
        self._repeats, self._data = Track(window), Track(window)

    def update(self, step: int, readings: Sequence[Reading]) -> list[Alarm] | None:
        sampled = False
        for one in readings:
            if not math.isfinite(one.value):
                continue
            if one.measure == "loss" and one.site is None:
                self._losses.add(step, one.value)
            elif one.measure == "token_cosine" and one.site is not None:
                self._cosines.setdefault(one.site, Track(self.window)).add(step, one.value)
                sampled = True
            elif one.measure == "repetition":
                self._repeats.add(step, one.value)
            elif one.measure == "repetition_of_data":
                self._data.add(step, one.value)
        if not sampled:
            return None
        self._samples.add(step, 0.0)
        if min(len(self._samples), len(self._repeats)) < self.window:
            return None
        alike = {site: min(track.values) for site, track in self._cosines.items() if len(track) == self.window}
        sites = in_forward_order([site for site, value in alike.items() if value >= self.cosine])
        repeats, data = min(self._repeats.values), max(self._data.values, default=0.0)
        if not sites or repeats < max(self.repetition, 3 * data):
            return []
        flat = self._flat(self._samples.steps[0])
        if flat is None:
            return None
        still, level, change = flat
        if not still:
            return []
        began = self._samples.steps[0]
        return [
            Alarm(
                began, self.name,
                f"the loss stands at {level:.4g} since step {began}, tokens at {sites[0]} have a mean cosine of "
                f"{alike[sites[0]]:.2f} or more, and {repeats:.0%} of outputs repeat ({data:.0%} in the data)",
                sites[0], "warning",
                "wait, if the task is of the kind that is learned at once; look at where attention goes "
                "(AttentionProgress), raise the learning rate, or make the task easier at first",
                {"loss": level, "loss_change": change, "token_cosine": alike[sites[0]], "repetition": repeats,
                 "repetition_of_data": data, "sites": sites[:32]},
                "What Happens During the Loss Plateau? Understanding Abrupt Learning in Transformers",
            )
        ]  # fmt: skip

    def rewind(self, step: int) -> None:
        for one in (self._losses, self._samples, self._repeats, self._data, *self._cosines.values()):
            one.rewind(step)

    def _flat(self, since: int) -> tuple[bool, float, float] | None:
        """Whether the loss stood still since a step, its level, and by what share of it a line through it changed."""
        steps, losses = self._losses.arrays()
        steps, losses = steps[steps >= since], losses[steps >= since]
        if len(losses) < 4:
            return None
        u = (steps - steps.mean()) / np.ptp(steps)
        slope = float(u @ losses / (u @ u))  # over the whole window
        level = float(losses.mean())
        error = float(np.std(losses - level - slope * u, ddof=2) / math.sqrt(u @ u))
        return slope > -max(self.fall * abs(level), 2 * error), level, slope / level if level else math.nan
