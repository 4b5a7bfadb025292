"""Traces of noisy systems before a jump, or without one, of known kinds.

A system near a fold recovers ever more slowly from what disturbs it, and says so before it goes over. One that noise
throws out of its well, or that is pushed from outside, jumps without slowing down; one near a transcritical bifurcation
slows down without a jump. All are one equation dx = f(x, p(t)) dt + sigma dW, sampled evenly.

Source: Boettiger, Ross and Hastings 2013, "Early warning signals: the charted and uncharted territories" (the map of
kinds); Scheffer et al. 2009, "Early-warning signals for critical transitions" (the fold).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from actome.tasks.draw import counts

Kind = Literal["fold", "noise", "step", "transcritical", "none"]
KINDS: tuple[Kind, ...] = ("fold", "noise", "step", "transcritical", "none")
_SAMPLE, _SUBSTEPS = 1.0, 10  # time between samples, and Euler-Maruyama steps in it
_SETTLE = 100  # samples that a system runs before it is looked at
_GAP = 10  # samples before a jump that belong to the jump: so long takes the way over the saddle
_LONGEST = 200  # times the points, after which a system that noise did not throw out is given up


class Bifurcation(NamedTuple):
    """Traces of one kind.

    Attributes:
        traces: (runs, points), each ending just before its jump, where there is one.
        jumped: (runs) whether a jump follows.
    """

    traces: np.ndarray
    jumped: np.ndarray


def bifurcation(kind: Kind = "fold", runs: int = 100, points: int = 500, seed: int = 0) -> Bifurcation:
    """Simulates systems that approach a jump, jump without warning, slow down without a jump, or do nothing.

    Every run of a kind that jumps is kept, whenever it jumps: traces are not chosen by what they show. Each ends ten
    samples before the jump passes the point of no return.

    Args:
        kind: ``"fold"``: dx = mu - x^2, mu falling from 1 past 0, and over it goes; slows down. ``"noise"``: the double
            well dx = x - x^3 with enough noise to leave it, at no fixed time. ``"step"``: the system of ``"none"``,
            until something outside pushes it over. ``"transcritical"``: dx = 2 (r x - x^2) with r falling from 1 to
            0.2, kept above 0; slows down, and nothing jumps. ``"none"``: dx = 1 - x^2, stationary.
        runs, points: how many traces, and samples in each.
        seed: of the noise.

    >>> found = bifurcation("fold", runs=3, points=200, seed=1)
    >>> found.traces.shape, bool(found.jumped.all()), bool((found.traces > -1).all())
    ((3, 200), True, True)
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} does not exist; choose one of {', '.join(map(repr, KINDS))}")
    counts(runs=(runs, 1), points=(points, 20))
    rng = np.random.default_rng(seed)
    if kind == "noise":
        return _escape(runs, points, rng)
    total = points + _SETTLE + _GAP + (points // 2 if kind == "fold" else 0)
    x, kept = np.ones(runs), np.empty((total, runs))
    for t in range(total):
        share = max(0.0, (t - _SETTLE) / points)  # of the way, from where it is looked at
        for _ in range(_SUBSTEPS):
            dt = _SAMPLE / _SUBSTEPS
            noise = np.sqrt(dt) * rng.standard_normal(runs)
            if kind == "transcritical":
                r = 1 - 0.8 * min(share, 1.0)
                x = np.abs(x + 2 * (r * x - x * x) * dt + 0.05 * noise)
            else:
                mu = 1 - share if kind == "fold" else 1.0
                x = np.maximum(x + (mu - x * x) * dt + 0.05 * noise, -2.0)  # beyond: gone
        kept[t] = x
    if kind != "fold":
        return Bifurcation(kept[_SETTLE : _SETTLE + points].T.copy(), np.full(runs, kind == "step"))
    # Below the unstable branch, or below any equilibrium once there is none, nothing brings it back.
    share = np.maximum(0.0, (np.arange(total) - _SETTLE) / points)
    gone = kept < -np.sqrt(np.maximum(1 - share, 0.0))[:, None] - 0.1
    jumped = gone.any(0)
    end = np.where(jumped, gone.argmax(0), total)
    traces = np.stack([kept[max(0, one - _GAP - points) :, i][:points] for i, one in enumerate(end)])
    return Bifurcation(traces, jumped)


def _escape(runs: int, points: int, rng: np.random.Generator) -> Bifurcation:
    """Runs in the right well of x - x^3 until noise throws them over the saddle at 0; those that leave early go on
    from the start, since a trace has to be as long as all others."""
    sigma, dt = 0.29, _SAMPLE / _SUBSTEPS
    need = points + _GAP
    x, age = np.ones(runs), np.zeros(runs, dtype=np.int64)
    ring, traces = np.ones((need, runs)), np.empty((runs, points))
    open_ = np.ones(runs, dtype=bool)
    for t in range(_LONGEST * need):
        for _ in range(_SUBSTEPS):
            x = x + (x - x**3) * dt + sigma * np.sqrt(dt) * rng.standard_normal(runs)
        ring[t % need] = x
        age += 1
        over = open_ & (x < -0.2)  # past the saddle
        for i in np.flatnonzero(over):
            if age[i] > need:
                ordered = np.roll(ring[:, i], -(t % need) - 1)
                traces[i], open_[i] = ordered[:points], False
            else:
                x[i], age[i] = 1.0, 0
        if not open_.any():
            break
    for i in np.flatnonzero(open_):
        traces[i] = np.roll(ring[:, i], -(t % need) - 1)[:points]
    return Bifurcation(traces, ~open_)
