"""Phases of representation geometry in training: collapse, expansion and compression of the spectrum over steps."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from actome.core.errors import MeasureError
from actome.dynamics.series import lag1
from actome.dynamics.smoothing import smoother

if TYPE_CHECKING:
    import pandas as pd

    from actome.dynamics.trace_table import Trace

Array = np.ndarray
COLLAPSE, SEEKING, COMPRESSION, FLAT = "warm-up collapse", "entropy-seeking", "compression-seeking", "no movement"

_SMOOTHED = 12  # checkpoints from which on a curve is smoothed


@dataclass(frozen=True)
class Phase:
    """One stretch of training in which the spectrum moves one way.

    Attributes:
        name: ``"warm-up collapse"`` (the rank falls before it ever rose), ``"entropy-seeking"`` (it rises),
            ``"compression-seeking"`` (after a rise it falls, or stands still while alpha rises), or ``"no movement"``.
        start, end: steps.
        low, high: bootstrap interval of `start`, from the checkpoint before to the one after at least; equal to it for
            the first phase.
        support: share of resamples that have a phase of this name begin nearer to `start` than to any other boundary.
        rank, alpha: smoothed values at its start and its end.
    """

    name: str
    start: float
    end: float
    low: float
    high: float
    support: float
    rank: tuple[float, float]
    alpha: tuple[float, float]


@dataclass(frozen=True)
class Phases:
    """The phases of one training.

    Attributes:
        items: in order of step.
        steps: (points).
        rank, alpha: smoothed, (points).
        band: of the smoothed rank, low and high, (points) each.
        r2: share of the rank's variance that its smoothed curve explains; NaN where nothing was smoothed.
        control: the median of the same for the ranks in shuffled order.
        p: share of shuffled orders whose way through the ranks is as short, the given order itself counted; above 0.05
            the rank does not follow the steps, and phases are of noise.
    """

    items: tuple[Phase, ...]
    steps: Array = field(repr=False)
    rank: Array = field(repr=False)
    alpha: Array = field(repr=False)
    band: tuple[Array, Array] = field(repr=False)
    r2: float
    control: float
    p: float

    def __iter__(self):
        return iter(self.items)

    @property
    def names(self) -> list[str]:
        """The names of the phases, in order."""
        return [one.name for one in self.items]

    @property
    def frame(self) -> pd.DataFrame:
        """One row for each phase."""
        import pandas as pd

        rows = [{**vars(one), "rank_start": one.rank[0], "rank_end": one.rank[1]} for one in self.items]
        return pd.DataFrame(rows).drop(columns=["rank", "alpha"])


def geometry_phases(
    trace: Trace | Any,
    rank: Any = None,
    alpha: Any = None,
    *,
    site: str | None = None,
    measure: str = "effective_rank",
    bandwidth: float = 0.04,
    least: float = 0.15,
    resamples: int = 200,
    level: float = 0.95,
    seed: int = 0,
) -> Phases:
    """Parts a training into phases by the turns of the effective rank of its representations.

    The rank is smoothed over log step (step 0 is put one smallest step before it), and parted where it turns by more
    than `least` of its range. Fewer than twelve checkpoints are not smoothed, for that would move the turns. A last
    rise is parted once more where the rank has come within `least` of its range of the end and alpha rises from there.

    Args:
        trace: a `Trace` with ``effective_rank`` and, if it has one, ``alpha``; or steps (points), with `rank` and
            `alpha` (points) given too.
        site: of a trace: the last layer's ``resid.post`` unless given.
        measure: which rank of a trace: ``effective_rank`` (of singular values), or ``shannon_rank`` (of eigenvalues of
            the covariance), which moves more and is the one of the paper.
        bandwidth: of the smoothing, as a share of the range of log step.
        least: how large a turn is, as a share of the rank's range.
        resamples, level, seed: of the bootstrap, which draws the residuals of the smoothing anew, as correlated as they
            are.

    Raises:
        MeasureError: fewer than six steps, or a trace without an effective rank at such a site.

    Source: Li et al. 2025, Tracing the Representation Geometry of Language Models from Pretraining to Post-training:
    RankMe and alpha-ReQ of the last layer; smoothing and turns are this library's.

    >>> steps = np.array([0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024])
    >>> found = geometry_phases(steps, [28, 26, 20, 14, 12, 13, 17, 22, 26, 24, 20, 16], [1.0] * 12)
    >>> found.names
    ['warm-up collapse', 'entropy-seeking', 'compression-seeking']
    """
    if hasattr(trace, "curve"):
        steps, rank, alpha = _of_trace(trace, site, measure)
    else:
        if rank is None or isinstance(trace, str) or hasattr(trace, "columns"):
            raise MeasureError(
                f"phases are of a Trace, or of steps and ranks, geometry_phases(steps, rank); {type(trace).__name__} "
                f"{'without ranks ' if rank is None else ''}is neither (Trace(frame) makes one of a tidy frame)"
            )
        steps = np.asarray(trace, dtype=np.float64)
        alpha = np.full(len(steps), np.nan) if alpha is None else alpha
    x, y, a = (np.asarray(one, dtype=np.float64) for one in (steps, rank, alpha))
    if not x.shape == y.shape == a.shape or x.ndim != 1:
        raise MeasureError(f"steps {x.shape}, ranks {y.shape} and alphas {a.shape}; want (points), one of each a step")
    keep = np.isfinite(y)
    x, y, a = x[keep], y[keep], a[keep]
    if len(x) < 6:
        raise MeasureError(f"phases need six steps with a rank, and there are {len(x)}")
    if not np.isfinite(x).all() or (np.diff(x) <= 0).any() or x[0] < 0:
        raise MeasureError("steps must be finite and rise, from 0 or more")
    positive = x[x > 0]
    along = np.log(x + positive[0]) if x[0] == 0 else np.log(x)
    bandwidth = bandwidth if len(x) >= _SMOOTHED else 0.0
    operator = smoother(along, bandwidth)
    smooth, smooth_a = operator @ y, _smoothed(along, a, bandwidth)
    names, starts = _parted(smooth, smooth_a, least)

    rng = np.random.default_rng(seed)
    residuals = y - smooth
    taken = float(np.trace(2 * operator - operator @ operator.T))
    inflated = (residuals - residuals.mean()) * math.sqrt(len(y) / max(len(y) - taken, 1.0))
    drawn = [operator @ (smooth + _noise(inflated, rng)) for _ in range(resamples)]
    parted = [_parted(one, smooth_a, least) for one in drawn]
    items = []
    for i, (name, start) in enumerate(zip(names, starts, strict=True)):
        end = starts[i + 1] if i + 1 < len(starts) else len(x) - 1
        hits = [j for j in (_nearest_start(one, name, start, starts) for one in parted) if j is not None] if i else []
        low, high = np.quantile(x[hits], [(1 - level) / 2, (1 + level) / 2]) if hits else (x[start], x[start])
        if i:  # a turn at a checkpoint lies anywhere between its neighbours
            low, high = min(low, x[start - 1]), max(high, x[min(start + 1, len(x) - 1)])
        alike = len(hits) if i else sum(one[0][0] == name for one in parted)
        support = alike / resamples if resamples else math.nan
        items.append(
            Phase(
                name, float(x[start]), float(x[end]), float(low), float(high), support,
                (float(smooth[start]), float(smooth[end])), (float(smooth_a[start]), float(smooth_a[end])),
            )
        )  # fmt: skip
    shuffled = rng.permuted(np.tile(y, (199, 1)), axis=1)
    paths = np.abs(np.diff(shuffled, axis=1)).sum(1)
    p = (1 + int((paths <= np.abs(np.diff(y)).sum() * (1 + 1e-12)).sum())) / 200
    # A curve that was not smoothed explains itself, and its r2 says nothing.
    total = float(((y - y.mean()) ** 2).sum()) if bandwidth else 0.0
    left = ((shuffled - shuffled @ operator.T) ** 2).sum(1)
    control = float(np.median(1 - left / total)) if total else math.nan
    edges = ((1 - level) / 2, (1 + level) / 2)
    band = np.quantile(drawn, edges, axis=0) if drawn else np.tile(smooth, (2, 1))
    r2 = 1 - float((residuals**2).sum()) / total if total else math.nan
    return Phases(tuple(items), x, smooth, smooth_a, (band[0], band[1]), r2, control, p)


def _of_trace(trace: Trace, site: str | None, measure: str) -> tuple[Array, Array, Array]:
    rows = trace.rows(measure, site)
    if site is None:
        stream = rows[rows["site"].str.endswith("resid.post")]
        rows = stream if len(stream) else rows
        rows = rows[rows["layer"] == rows["layer"].max()] if rows["layer"].notna().any() else rows
    places = list(dict.fromkeys(rows["place"]))
    if len(places) > 1:
        raise MeasureError(f"{measure!r} was measured at {', '.join(places[:4])}; name one by site=")
    ranks = rows.set_index("step")["value"]
    alphas = ranks * np.nan
    if "alpha" in trace.measures:
        found = trace.frame[(trace.frame["measure"] == "alpha") & (trace.frame["site"] == rows["site"].iloc[0])]
        alphas = found.set_index("step")["value"].reindex(ranks.index)
    return ranks.index.to_numpy(float), ranks.to_numpy(), alphas.to_numpy()


def _smoothed(along: Array, a: Array, bandwidth: float) -> Array:
    """Alpha smoothed where there are enough of its values; NaN elsewhere."""
    there = np.isfinite(a)
    out = np.full(len(a), np.nan)
    if there.sum() >= 4:
        out[there] = smoother(along[there], bandwidth) @ a[there]
    return out


def _noise(residuals: Array, rng: np.random.Generator) -> Array:
    from actome.dynamics.series import autoregressive

    rho = max(lag1(residuals), 0.0) if residuals.any() else 0.0
    return autoregressive(residuals, min(rho, 0.9), rng)


def _parted(rank: Array, alpha: Array, least: float) -> tuple[list[str], list[int]]:
    """Names of the phases and the index at which each begins."""
    floor = least * float(np.ptp(rank))
    if floor <= 1e-9 * max(float(np.abs(rank).max()), 1e-300):
        return [FLAT], [0]
    turns = _turns(rank, floor)
    names, starts, risen = [], [0, *turns], False
    for i, start in enumerate(starts):
        end = starts[i + 1] if i + 1 < len(starts) else len(rank) - 1
        rising = rank[end] > rank[start]
        names.append(SEEKING if rising else COMPRESSION if risen else COLLAPSE)
        risen = risen or bool(rising)
    if names[-1] == SEEKING:
        still = [i for i in range(starts[-1] + 1, len(rank) - 2) if np.abs(rank[i:] - rank[-1]).max() <= floor]
        reach = np.nanmax(alpha) - np.nanmin(alpha) if np.isfinite(alpha).any() else math.inf
        if still and alpha[-1] - alpha[still[0]] > least * reach:
            names.append(COMPRESSION)
            starts.append(still[0])
    return names, starts


def _turns(y: Array, floor: float) -> list[int]:
    """Tops and bottoms in alternation, each more than `floor` from its neighbours."""
    found, high, low, way = [], 0, 0, 0
    for i in range(1, len(y)):
        high, low = (i if y[i] > y[high] else high), (i if y[i] < y[low] else low)
        if way >= 0 and y[high] - y[i] >= floor:
            found += [high] if high > 0 else []
            way, low, high = -1, i, i
        elif way <= 0 and y[i] - y[low] >= floor:
            found += [low] if low > 0 else []
            way, low, high = 1, i, i
    # A first turn that is hardly away from the start is noise on the way that follows.
    return found[1:] if found and abs(y[found[0]] - y[0]) < floor else found


def _nearest_start(parted: tuple[list[str], list[int]], name: str, start: int, starts: list[int]) -> int | None:
    """Where a resample has a phase of this name begin, if it is nearer to this boundary than to the others."""
    same = [at for one, at in zip(*parted, strict=True) if one == name and at > 0]
    if not same:
        return None
    at = min(same, key=lambda one: abs(one - start))
    return at if min(starts[1:], key=lambda one: abs(one - at)) == start else None
