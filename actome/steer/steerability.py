"""Steerability: how far adding a vector at one position of a path moves its outcome, position by position.

Letters: N paths, T position, C outcomes (targets), D width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from actome.clamps import Add
from actome.core.continuations import rows_of
from actome.core.errors import MeasureError
from actome.tasks.trials import spearman

from .chances import Chance

if TYPE_CHECKING:
    import pandas as pd

    from actome.core.model import Model

Gain = Literal["excess", "directed", "random", "share", "excess_logit"]
_GAINS = ("excess", "directed", "random", "share", "excess_logit")


@dataclass(frozen=True, eq=False)
class Steerability:
    """How far paths can be steered at each of their positions.

    Attributes:
        frame: a row for each path and position: path, pos, target, uncertainty, p (chance of the target without
            steering), directed and random (rise of it by the vector, and in the mean by random ones of its norm),
            excess (the first minus the second), share (excess as a part of 1 - p, all there is to gain),
            excess_logit (the same difference of rises in log-odds, which have no bound).
    """

    frame: pd.DataFrame = field(repr=False)

    @property
    def table(self) -> pd.DataFrame:
        """Means over paths, a row a position: pos, paths, uncertainty, p, directed, random, excess, share."""
        columns = ["uncertainty", "p", "directed", "random", "excess", "share"]
        by = self.frame.groupby("pos")
        return by[columns].mean().assign(paths=by.size()).reset_index()[["pos", "paths", *columns]]

    def association(
        self, positions: Iterable[int] | None = None, *, gain: Gain = "excess", bins: int = 5
    ) -> dict[str, float]:
        """Whether paths that are more uncertain are easier to steer, over paths and the positions given.

        A chance p can rise by 1 - p at most, and a fixed push in log-odds moves it by about p (1 - p); so certain
        states are hard to move whatever the model knows. `rho` does not see that. `partial` and `within` compare
        states of like p, and ``gain="excess_logit"`` has no bound: a fixed push in log-odds counts the same anywhere.

        Args:
            positions: those that count; all unless given.
            gain: which column of the frame.
            bins: of p, with equally many states each, for `within`.

        Returns:
            rho: rank correlation of gain and uncertainty. partial: the same with what a parabola in the ranks of p
            explains taken out of both. within: mean of the rank correlations within bins of p, by their sizes.
            count: states.

        Raises:
            MeasureError: an unknown gain, no such position, or no uncertainty given.
        """
        if gain not in _GAINS:
            raise MeasureError(f"gain={gain!r} does not exist; choose {', '.join(_GAINS)}")
        some = self.frame if positions is None else self.frame[self.frame["pos"].isin(list(positions))]
        if some.empty:
            raise MeasureError(
                f"no state at positions {list(positions or [])}; there are {sorted(set(self.frame.pos))}"
            )
        if some["uncertainty"].isna().any():
            raise MeasureError("steerability was measured without uncertainty=, so nothing can be compared with it")
        y, x, p = (some[name].to_numpy(dtype=float) for name in (gain, "uncertainty", "p"))
        order = np.argsort(np.argsort(p, kind="stable"), kind="stable")
        bin_ = order * bins // len(p)
        rhos = [(spearman(y[bin_ == b], x[bin_ == b]), int((bin_ == b).sum())) for b in range(bins)]
        known = [(rho, n) for rho, n in rhos if not np.isnan(rho)]
        within = sum(rho * n for rho, n in known) / sum(n for _, n in known) if known else float("nan")
        return {"rho": spearman(y, x), "partial": _partial(y, x, p), "within": within, "count": len(some)}


def steerability(
    model: Model,
    paths: Any,
    site: str,
    vectors: Tensor,
    chance: Chance,
    *,
    targets: Tensor | Iterable[int] | None = None,
    uncertainty: Tensor | None = None,
    positions: Iterable[int] | None = None,
    norm: float | None = None,
    random: int = 4,
    batch_size: int = 256,
    seed: int = 0,
) -> Steerability:
    r"""Adds a vector at one position of each path, and asks how much likelier its outcome becomes.

    At position t of a path cut after it, :math:`c \, s_t / \|s_t\|` is added at `site`, at that position alone, where c
    is `norm`; the rise of the chance of the target is the gain. Random vectors of the same norm say how much of that
    any push would have done: uncertain states are moved by all of them.

    Args:
        model: whose paths these are.
        paths: token ids or texts; each is steered at each of its positions.
        site: a site with one vector a token.
        vectors: (D), (T, D), or (C, T, D) with one for each target, as `outcome_vectors` gives.
        chance: how probable a target is after a path: `Asked`, `Resampled`, or a function of (model, paths, target).
        targets: (N), for each path the outcome towards which it is steered; 0 unless given.
        uncertainty: (N, T), how open the outcome is before steering, such as the entropy of o_t.
        positions: those to steer at; all unless given.
        norm: length of what is added; that of each vector unless given.
        random: directions for the control, drawn for each position and target.
        batch_size: paths a forward.
        seed: of those directions.

    Raises:
        MeasureError: shapes that do not match the paths, a vector of zeros, targets without a vector.

    Source: Zur et al. 2025, Are language models aware of the road not taken?; the control with random vectors and the
    corrections for 1 - p are ours.

    >>> import actome as ac
    >>> from actome.steer import Asked
    >>> paths, push = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.ones(112)
    >>> found = steerability(ac.demo(), paths, "blocks.0.resid.post", push, Asked([7], [8, 9]), norm=4.0)
    >>> found.table[["pos", "paths"]].values.tolist()
    [[0, 2], [1, 2], [2, 2]]
    """
    import pandas as pd

    rows = rows_of(model, paths)
    longest = max(map(len, rows))
    target_N = torch.zeros(len(rows), dtype=torch.long) if targets is None else torch.as_tensor(targets).long().cpu()
    if target_N.shape != (len(rows),) or int(target_N.min()) < 0:
        raise MeasureError(
            f"targets {tuple(target_N.shape)} are not one number from 0 on for each of {len(rows)} paths"
        )
    push_CTD = _pushes(vectors, int(target_N.max()) + 1, longest, norm)
    open_NT = None if uncertainty is None else torch.as_tensor(uncertainty).double().cpu()
    if open_NT is not None and open_NT.shape != (len(rows), longest):
        raise MeasureError(f"uncertainty {tuple(open_NT.shape)} is not (paths {len(rows)}, positions {longest})")
    if random < 1 or batch_size < 1:
        raise MeasureError(f"random={random} and batch_size={batch_size} must be 1 at least")
    wanted = range(longest) if positions is None else sorted({int(t) for t in positions})
    if not wanted or min(wanted) < 0 or max(wanted) >= longest:
        raise MeasureError(f"positions {list(wanted)} are not among the {longest} of the paths")

    generator = torch.Generator().manual_seed(seed)
    records = []
    for t in wanted:
        for target in target_N.unique().tolist():
            noise_RD = torch.randn(random, push_CTD.shape[-1], generator=generator)
            push_D = push_CTD[target, t]
            noise_RD = noise_RD / noise_RD.norm(dim=-1, keepdim=True) * push_D.norm()
            here = [i for i in range(len(rows)) if int(target_N[i]) == target and len(rows[i]) > t]
            for at in range(0, len(here), batch_size):
                part = here[at : at + batch_size]
                ids = torch.tensor([rows[i][: t + 1] for i in part])
                p = chance(model, ids, target).double().cpu()
                pushed = []
                for value in (push_D, *noise_RD):
                    with model.clamp(Add(site, value, positions=t)):
                        pushed.append(chance(model, ids, target).double().cpu())
                directed, others = pushed[0], torch.stack(pushed[1:])
                logit = _log_odds(directed) - _log_odds(others).mean(0)
                for j, i in enumerate(part):
                    open_ = float("nan") if open_NT is None else float(open_NT[i, t])
                    a, b, c = float(p[j]), float(directed[j]), float(others[:, j].mean())
                    share = (b - c) / max(1 - a, 1e-9)
                    records.append((i, t, target, open_, a, b - a, c - a, b - c, share, float(logit[j])))
    columns = ["path", "pos", "target", "uncertainty", "p", "directed", "random", "excess", "share", "excess_logit"]
    frame = pd.DataFrame(records, columns=columns).sort_values(["path", "pos"], ignore_index=True)
    return Steerability(frame)


def outcome_vectors(states_NTD: Tensor, outcomes: Tensor) -> Tensor:
    r"""By outcome and position, :math:`s_t = E[h_t \mid A] - E[h_t \mid \text{not } A]`, (C, T, D), float32.

    Args:
        states_NTD: states of paths of one length.
        outcomes: (N), the number of the outcome of each path; or (N, C), chances, which weight the means.

    Raises:
        MeasureError: numbers of paths that differ, or an outcome that all or none of the paths have.

    >>> outcome_vectors(torch.tensor([[[1.0]], [[3.0]], [[5.0]]]), torch.tensor([0, 0, 1])).flatten().tolist()
    [-3.0, 3.0]
    """
    states = states_NTD.detach().double().cpu()
    outcomes = torch.as_tensor(outcomes).cpu()
    if states.ndim != 3 or len(outcomes) != len(states):
        raise MeasureError(f"states {tuple(states.shape)} are not (N, T, D) of {len(outcomes)} outcomes")
    if not outcomes.is_floating_point():
        outcomes = torch.nn.functional.one_hot(outcomes.long())
    weight_NC = outcomes.double()
    total_C, count = weight_NC.sum(0), len(states)
    if bool((total_C < 1e-9).any()) or bool((total_C > count - 1e-9).any()):
        raise MeasureError("an outcome that all paths have, or none, has no direction; leave it out")
    with_CTD = torch.einsum("nc,ntd->ctd", weight_NC, states) / total_C[:, None, None]
    without_CTD = torch.einsum("nc,ntd->ctd", 1 - weight_NC, states) / (count - total_C)[:, None, None]
    return (with_CTD - without_CTD).float()


def _pushes(vectors: Tensor, targets: int, positions: int, norm: float | None) -> Tensor:
    """(C, T, D), of the length asked for."""
    if norm is not None and not 0 < norm < float("inf"):
        raise MeasureError(f"norm={norm}: a length above zero")
    v = torch.as_tensor(vectors).detach().float().cpu()
    if v.ndim == 1:
        v = v.expand(positions, -1)
    if v.ndim == 2:
        v = v.expand(targets, *v.shape)
    if v.ndim != 3 or v.shape[0] < targets or v.shape[1] != positions:
        raise MeasureError(
            f"vectors of shape {tuple(torch.as_tensor(vectors).shape)} are not (D), (T, D) or (C, T, D) with "
            f"{positions} positions and {targets} targets"
        )
    length = v.norm(dim=-1, keepdim=True)
    if not bool(v.isfinite().all()) or bool((length == 0).any()):
        raise MeasureError("a vector of zeros or of values that are not finite steers nowhere")
    return v if norm is None else v / length * norm


def _log_odds(p: Tensor) -> Tensor:
    return p.clamp(1e-9, 1 - 1e-9).logit()


def _partial(y: np.ndarray, x: np.ndarray, p: np.ndarray) -> float:
    """Correlation of ranks of y and x, both without what a parabola in the ranks of p explains."""
    from scipy.stats import rankdata

    ranks = [rankdata(one) / len(one) for one in (y, x, p)]
    design = np.stack([np.ones_like(p), ranks[2], ranks[2] ** 2], 1)
    a, b = (one - design @ np.linalg.lstsq(design, one, rcond=None)[0] for one in ranks[:2])
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / scale if scale > 1e-9 * len(p) else float("nan")
