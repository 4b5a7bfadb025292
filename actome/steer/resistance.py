"""Whether a model notices that it is pushed off its answer, and takes the answer back while the push is still on.

Letters: N answers, V steering vectors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from actome.core.clamp import Clamp
from actome.core.errors import MeasureError
from actome.tasks.trials import interval, split

from .preference import scaled
from .states import subset

if TYPE_CHECKING:
    import pandas as pd

    from actome.core.model import Model

Judge = Callable[[Any, Any], float]
Interval = tuple[float, float, float]


@dataclass(frozen=True)
class Resistance:
    """Answers under steering, attempt by attempt.

    Figures are (mean, low, high), over all answers to held-out prompts under all vectors whose strength could be set;
    95 % intervals are over vectors, as answers under one of them are alike.

    Attributes:
        first: score of the first attempt.
        multi_attempt: share of answers with two attempts or more.
        esr: share of answers in which a later attempt scores higher than the first.
        improvement: last score less first, of answers with two attempts or more; NaN where there are none.
        control: the same four without steering, on the same prompts, with intervals over prompts.
        table: a row a vector: vector, scale (a multiple of its own), calibrated (score of first attempts on the prompts
            that set the scale), reached (whether that is near the target), first, multi_attempt, esr, improvement.
        frame: a row an answer: vector (-1 without steering), prompt, attempts, first, last, best (of later attempts).
        about: how it was done.
    """

    first: Interval
    multi_attempt: Interval
    esr: Interval
    improvement: Interval
    control: dict[str, Interval]
    table: pd.DataFrame
    frame: pd.DataFrame
    about: dict[str, Any] = field(default_factory=dict)


def _check_marks(marks: Sequence[Any]) -> None:
    """Refuses what would cut answers between any two letters."""
    if isinstance(marks, str) or any(one == "" for one in marks):
        raise MeasureError(f"marks={marks!r:.60}: give a list of texts, none of them empty, or of token ids")


def attempts(answer: Any, marks: Sequence[Any]) -> list[Any]:
    """An answer cut at its correction marks, the marks left out: a list of attempts, one where there is no mark.

    Args:
        answer: a text, or token ids.
        marks: texts (found in any case) for a text, ids for ids.

    >>> attempts([5, 9, 7], marks=[9]), attempts("Paris. Wait, Rome.", marks=["wait,"])
    ([[5], [7]], ['Paris. ', ' Rome.'])
    """
    _check_marks(marks)
    if isinstance(answer, str):
        return re.split("|".join(re.escape(mark) for mark in marks), answer, flags=re.IGNORECASE)
    parts: list[list[int]] = [[]]
    for token in torch.as_tensor(answer).tolist():
        if token in marks:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts


def resistance(
    model: Model,
    steer_set: Sequence[Clamp],
    judge: Judge,
    *,
    prompts: Any,
    marks: Sequence[Any],
    calibrate: float | Resistance = 0.5,
    beside: Sequence[Clamp] = (),
    samples: int = 1,
    new_tokens: int = 24,
    stop: Sequence[int] | None = None,
    tolerance: float = 0.1,
    rounds: int = 6,
    batch_size: int = 64,
    seed: int = 0,
    **options: Any,
) -> Resistance:
    """Steers away from the answer, at strengths set for each vector, and counts attempts and what they gain.

    Half of the prompts set the strengths: for each vector the scale is searched, by doubling and halving, at which
    first attempts have the target as their mean score. The other half are answered with steering on in every forward,
    and once more without. The judge scores quality; that there is a mark counts for nothing but the cut.

    Args:
        model: that generates.
        steer_set: clamps with a `scale`, such as `Add` along directions that have nothing to do with the prompts.
        judge: ``judge(prompt, attempt)`` gives a score from 0 to 1. It gets texts where the marks are texts, else ids.
        prompts: texts or ids, eight at least; ids of one length, as a tensor.
        marks: what an attempt is taken back with: texts, or token ids.
        calibrate: the target, or a report whose strengths are used again (to ablate something, or for the same vectors
            in another model); the vectors must then be the same, in their order.
        beside: clamps held all along, with and without steering, such as an ablation of what may do the noticing.
        samples: answers a prompt.
        new_tokens: of each answer, at most.
        stop: token ids at which an answer ends; the model's own end unless given.
        tolerance: how far from the target a vector's score may be left; those further off are kept out of the figures.
        rounds: halvings of the search.
        batch_size: answers a forward.
        seed: of the halves and of sampling.
        options: for generation; by default it samples at temperature 1.

    Raises:
        MeasureError: too few prompts; a clamp without a scale; answers without steering that are below the target; no
            vector that reaches it; steering that was off in some forward.

    >>> import actome as ac
    >>> model, seen = ac.demo(), []
    >>> push = ac.Add("blocks.1.resid.post", torch.randn(112, generator=torch.Generator().manual_seed(0)))
    >>> found = resistance(model, [push], lambda prompt, attempt: float("a" in attempt), prompts=["The", "It"] * 4,
    ...                    marks=["no,"], calibrate=0.2, tolerance=0.5, rounds=2, new_tokens=6)
    >>> found.table.shape, sorted(found.control)
    ((1, 8), ['esr', 'first', 'improvement', 'multi_attempt'])

    Source: McKenzie et al. 2026, Endogenous Resistance to Activation Steering in Language Models; the search for the
    strength is by bisection, theirs is probabilistic.
    """
    import pandas as pd

    if isinstance(steer_set, Clamp):
        steer_set = [steer_set]
    if isinstance(prompts, str):
        raise MeasureError(f"give a list of prompts, not one text: {prompts!r:.60}")
    if not len(steer_set):
        raise MeasureError("there is no steering vector; give clamps such as Add")
    if len(prompts) < 8:
        raise MeasureError(
            f"{len(prompts)} prompts are too few to set strengths on one half and judge the other; give 8"
        )
    _check_marks(marks)
    if not marks:
        raise MeasureError("there is no correction mark; give the texts or token ids that take an attempt back")
    steer_set = [scaled(clamp, 1.0) for clamp in steer_set]
    lab = _Lab(model, judge, marks, tuple(beside), samples, new_tokens, stop, batch_size, seed, options)
    setting, judging = (subset(prompts, part.tolist()) for part in split(len(prompts), [0.5, 0.5], seed))
    if isinstance(calibrate, Resistance):
        known = calibrate.table
        if len(known) != len(steer_set):
            raise MeasureError(f"the report has strengths of {len(known)} vectors, and there are {len(steer_set)}")
        strengths = list(zip(known["scale"], known["calibrated"], known["reached"], strict=True))
        target = calibrate.about["target"]
    else:
        target = float(calibrate)
        strengths = _calibrated(lab, setting, steer_set, target, tolerance, rounds)
    rows = []
    for i, (clamp, (scale, _, reached)) in enumerate(zip(steer_set, strengths, strict=True)):
        if reached:
            rows += [(i, *row) for row in lab.answered(judging, scaled(clamp, scale))]
    rows += [(-1, *row) for row in lab.answered(judging, None)]
    frame = pd.DataFrame(rows, columns=["vector", "prompt", "attempts", "first", "last", "best"])
    steered = frame[frame["vector"] >= 0]
    if steered.empty:
        raise MeasureError(
            f"no vector brings first attempts to {target:g} within {tolerance:g}; they are left at "
            + ", ".join(f"{score:.2f}" for _, score, _ in strengths)
        )
    table = pd.DataFrame(
        [
            (i, *strength, *(value[0] for value in _figures(part, "prompt", seed).values()))
            if len(part := steered[steered["vector"] == i])
            else (i, *strength, *[float("nan")] * 4)
            for i, strength in enumerate(strengths)
        ],
        columns=["vector", "scale", "calibrated", "reached", "first", "multi_attempt", "esr", "improvement"],
    )
    control = _figures(frame[frame["vector"] < 0], "prompt", seed)
    about = {"target": target, "prompts": len(prompts), "samples": samples, "seed": seed, "vectors": len(steer_set)}
    return Resistance(**_figures(steered, "vector", seed), control=control, table=table, frame=frame, about=about)


@dataclass(frozen=True)
class _Lab:
    """Answers and their scores at one strength."""

    model: Model
    judge: Judge
    marks: Sequence[Any]
    beside: tuple[Clamp, ...]
    samples: int
    new_tokens: int
    stop: Sequence[int] | None
    batch_size: int
    seed: int
    options: dict[str, Any]

    def answered(self, prompts: Any, clamp: Clamp | None) -> list[tuple[int, int, float, float, float]]:
        """For each answer: prompt, attempts, scores of the first, of the last, and the best of later ones."""
        rows = []
        texts = isinstance(self.marks[0], str)
        order = [i for i in range(len(prompts)) for _ in range(self.samples)]
        for at in range(0, len(order), self.batch_size):
            some = order[at : at + self.batch_size]
            for i, answer in zip(some, self._generated(subset(prompts, some), clamp, at, texts), strict=True):
                scores = [float(self.judge(prompts[i], one)) for one in attempts(answer, self.marks)]
                later = max(scores[1:], default=float("nan"))
                rows.append((i, len(scores), scores[0], scores[-1], later))
        return rows

    def first(self, prompts: Any, clamp: Clamp | None) -> float:
        """Mean score of first attempts."""
        return float(np.mean([row[2] for row in self.answered(prompts, clamp)]))

    def _generated(self, prompts: Any, clamp: Clamp | None, at: int, texts: bool) -> list[Any]:
        """New tokens of each row up to its end, or the text of them."""
        clamps = (*(() if clamp is None else (clamp,)), *self.beside)
        options = {"do_sample": True} | self.options
        if self.stop is not None:
            options["eos_token_id"] = list(self.stop)
        with torch.random.fork_rng(), self.model.clamp(*clamps) if clamps else nullcontext() as active:
            found = self.model.generate(prompts, max_new_tokens=self.new_tokens, seed=self.seed + at, **options)
        steering = [] if clamp is None or active is None else [one for one in active.active if one.clamp is clamp]
        off = [one for one in steering if one.fired < one.reached]
        if off:
            raise MeasureError(
                f"{type(off[0].clamp).__name__} at {off[0].site.name} held in {off[0].fired} of {off[0].reached} "
                "forwards; steering has to stay on throughout: leave out phase=, steps=, positions= and conditions"
            )
        ends = set(self.stop) if self.stop is not None else _ends(self.model)
        rows = [_cut(row.tolist(), ends) for row in found.new]
        if not texts:
            return rows
        if self.model.tokenizer is None:
            raise MeasureError("the marks are texts and there is no tokenizer; give token ids")
        return [self.model.tokenizer.decode(row, skip_special_tokens=True) for row in rows]


def _ends(model: Model) -> set[int]:
    end = getattr(getattr(model.module, "generation_config", None), "eos_token_id", None)
    return set() if end is None else set(end) if isinstance(end, list) else {end}


def _cut(row: list[int], ends: set[int]) -> list[int]:
    stop = next((i for i, token in enumerate(row) if token in ends), len(row))
    return row[:stop]


def _calibrated(
    lab: _Lab, prompts: Any, steer_set: Sequence[Clamp], target: float, tolerance: float, rounds: int
) -> list[tuple[float, float, bool]]:
    """For each vector a scale, the score of first attempts there, and whether it is near the target."""
    bare = lab.first(prompts, None)
    if bare < target:
        raise MeasureError(
            f"without steering first attempts score {bare:.2f}, below the target of {target:g}; lower it"
        )
    found = []
    for clamp in steer_set:
        tried: dict[float, float] = {}
        low, high = 0.0, 0.5
        # The same random numbers each time, so that scores are compared and not draws.
        for _ in range(8):
            tried[high] = lab.first(prompts, scaled(clamp, high))
            if tried[high] <= target:
                break
            low, high = high, 2 * high
        for _ in range(rounds):
            middle = (low + high) / 2
            tried[middle] = lab.first(prompts, scaled(clamp, middle))
            low, high = (middle, high) if tried[middle] > target else (low, middle)
        scale = min(tried, key=lambda one: (abs(tried[one] - target), one))
        found.append((scale, tried[scale], abs(tried[scale] - target) <= tolerance))
    return found


def _figures(frame: pd.DataFrame, over: str, seed: int) -> dict[str, Interval]:
    """The four figures with intervals over groups of answers."""
    several = frame["attempts"] > 1
    every = frame["attempts"] > 0
    values = {
        "first": (frame["first"], every),
        "multi_attempt": (several, every),
        "esr": (frame["best"] > frame["first"], every),
        "improvement": ((frame["last"] - frame["first"]).where(several, 0.0), several),
    }
    out = {}
    for name, (value, counted) in values.items():
        sums, counts = (one.astype(float).groupby(frame[over]).sum().to_numpy() for one in (value, counted))
        some = counts > 0
        out[name] = interval(sums[some], seed, counts[some]) if some.any() else (float("nan"),) * 3
    return out
