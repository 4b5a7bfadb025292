"""Outcome probes: how much of the distribution of outcomes still to come a linear map reads off a state.

Letters: N rows (a position of a path each), D width, C outcomes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actome.core.errors import MeasureError

if TYPE_CHECKING:
    import pandas as pd

_FEW = 20  # rows or groups below which nothing can be held out
MARGINAL = "marginal"


@dataclass(frozen=True, eq=False)
class LinearMap:
    """A softmax-linear map fitted to soft targets: ``softmax(x @ weight + bias)``.

    Attributes:
        weight: (D, C), float64, on inputs as they come.
        bias: (C).
        penalty: the one that was chosen.
    """

    weight: Tensor
    bias: Tensor
    penalty: float

    def __call__(self, x_ND: Tensor) -> Tensor:
        """Predicted distributions, (N, C), float64."""
        return (x_ND.double().cpu() @ self.weight + self.bias).softmax(-1)


@dataclass(frozen=True, eq=False)
class OutcomeProbe:
    """What each input tells of the outcome distribution.

    Attributes:
        frame: a row an input: input, kind (``"site"``, ``"other"`` or ``"marginal"``), kl (held out, nats a row), low,
            high (95 % bootstrap interval over held-out groups), explained (1 - kl / kl of the marginal), penalty.
        maps: the fitted map of each input.
        kl: held-out KL of each held-out row, by input.
        held_out: indices of the rows that were held out.
    """

    frame: pd.DataFrame
    maps: Mapping[str, LinearMap] = field(repr=False)
    kl: Mapping[str, Tensor] = field(repr=False)
    held_out: Tensor = field(repr=False)

    def of(self, name: str) -> float:
        """Held-out KL of one input.

        Raises:
            MeasureError: an input that was not looked at.
        """
        if name not in self.kl:
            raise MeasureError(f"{name!r} was not looked at; there are {', '.join(self.kl)}")
        return float(self.kl[name].mean())


def outcome_probe(
    states: Mapping[str, Tensor],
    outcomes: Tensor,
    *,
    others: Mapping[str, Tensor] | None = None,
    groups: Tensor | Sequence[int] | None = None,
    test: float = 0.3,
    penalties: Sequence[float] = (1e-5, 1e-4, 1e-3, 1e-2),
    seed: int = 0,
) -> OutcomeProbe:
    r"""Fits :math:`\mathrm{softmax}(W h_t + b)` to the outcome distribution :math:`o_t` at each site and judges it on
    rows that were held out, by :math:`\mathrm{KL}(o_t \,\|\, \hat o_t)`.

    What a probe reaches says little alone. `others` are inputs that a state has to beat: embeddings of the current or
    of the previous token, states of another model or of one that was not trained, position. The marginal, the mean
    distribution of the fitted rows, is always among them.

    Weights are chosen by cross-entropy with soft targets, :math:`-\sum_c o_{tc} \log \hat o_{tc}`, plus a penalty
    :math:`\frac{\lambda}{2} \|W\|^2` on standardised inputs, a convex problem; the penalty is chosen for each input on
    a part of the rows that is neither fitted on nor held out.

    Args:
        states: by site, (N, D); rows as `Model.record` gives them, one position a row.
        outcomes: (N, C), the outcome distributions, such as `decode.forking_paths` gives; rows sum to one.
        others: by name, (N, D').
        groups: (N), rows of one group, such as the positions of one path, stay on the same side of the split.
        test: share of the groups that is held out; as large a share of the rest chooses the penalty.
        penalties: to choose among.
        seed: of the split and the intervals.

    Raises:
        MeasureError: rows that do not match, outcomes that are no distributions, values that are not finite, too few
            groups, or a name that is used twice.

    Source: Zur et al. 2025, Are language models aware of the road not taken? (linear probes of outcome distributions).

    >>> g = torch.Generator().manual_seed(0)
    >>> h = torch.randn(400, 5, generator=g)
    >>> o = (h @ torch.randn(5, 3, generator=g)).softmax(-1)
    >>> found = outcome_probe({"blocks.0.resid.post": h}, o, others={"noise": torch.randn(400, 2, generator=g)})
    >>> bool(found.of("blocks.0.resid.post") < 0.01 < found.of("noise"))
    True
    """
    import pandas as pd

    others = dict(others or {})
    twice = sorted(({*states} & {*others}) | ({MARGINAL} & {*states, *others}))
    if twice or not states:
        raise MeasureError(f"the name {twice[0]!r} is used twice" if twice else "there is no site to probe")
    o_NC = _distributions(outcomes)
    inputs = {name: _input(name, x, len(o_NC)) for name, x in {**states, **others}.items()}
    group_N = torch.arange(len(o_NC)) if groups is None else torch.as_tensor(groups).cpu()
    if group_N.shape != (len(o_NC),):
        raise MeasureError(f"groups has the shape {tuple(group_N.shape)}, and there are {len(o_NC)} rows")
    fitted, chosen_on, held = _parts(group_N, test, seed)

    maps: dict[str, LinearMap] = {}
    for name, x_ND in inputs.items():
        tried: list[LinearMap] = []
        for penalty in sorted(penalties, reverse=True):  # each starts where the smoother one ended
            tried.append(soft_regression(x_ND[fitted], o_NC[fitted], penalty, tried[-1] if tried else None))
        best = min(tried, key=lambda one: float(_kl(o_NC[chosen_on], one(x_ND[chosen_on])).mean()))
        rest = torch.cat([fitted, chosen_on])
        maps[name] = soft_regression(x_ND[rest], o_NC[rest], best.penalty, best)
    kl = {name: _kl(o_NC[held], one(inputs[name][held])) for name, one in maps.items()}
    mean_C = o_NC[torch.cat([fitted, chosen_on])].mean(0)
    kl[MARGINAL] = _kl(o_NC[held], mean_C.expand(len(held), -1))

    base = float(kl[MARGINAL].mean())
    rows = []
    for name, one in kl.items():
        kind = "site" if name in states else "other" if name in others else MARGINAL
        low, high = _interval(one, group_N[held], seed)
        value = float(one.mean())
        penalty = maps[name].penalty if name in maps else float("nan")
        rows.append((name, kind, value, low, high, 1 - value / base if base > 0 else float("nan"), penalty))
    columns = ["input", "kind", "kl", "low", "high", "explained", "penalty"]
    return OutcomeProbe(pd.DataFrame(rows, columns=columns), maps, kl, held)


def soft_regression(x_ND: Tensor, targets_NC: Tensor, penalty: float, start: LinearMap | None = None) -> LinearMap:
    """Multinomial logistic regression on distributions instead of labels, by L-BFGS in float64.

    Args:
        x_ND: inputs; standardised within, weights are given for inputs as they come.
        targets_NC: rows that sum to one.
        penalty: of the squared weights, per row, halved; the bias is free.
        start: where to begin; the problem is convex, so it only saves steps.
    """
    x, targets = x_ND.double().cpu(), targets_NC.double().cpu()
    centre, spread = x.mean(0), x.std(0)
    spread = torch.where(spread > 1e-9 * (1 + centre.abs()), spread, torch.inf)  # a constant unit tells nothing
    z = (x - centre) / spread
    finite = spread.where(spread.isfinite(), 0.0)
    if start is None:
        weight, bias = z.new_zeros(x.shape[1], targets.shape[1]), targets.mean(0).clamp_min(1e-9).log()
    else:
        weight, bias = start.weight * finite[:, None], start.bias + centre @ start.weight
    weight.requires_grad_()
    bias.requires_grad_()
    solver = torch.optim.LBFGS(
        [weight, bias], max_iter=200, tolerance_grad=1e-5, tolerance_change=1e-9, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        solver.zero_grad()
        with torch.enable_grad():
            log_p = (z @ weight + bias).log_softmax(-1)
            loss = -(targets * log_p).sum(-1).mean() + penalty / 2 * weight.square().sum()
        loss.backward()
        return loss

    solver.step(closure)
    scaled = weight.detach() / spread[:, None]
    return LinearMap(scaled, bias.detach() - centre @ scaled, penalty)


def _kl(p_NC: Tensor, q_NC: Tensor) -> Tensor:
    """KL(p || q) of each row, in nats."""
    return (p_NC * (p_NC.clamp_min(1e-300).log() - q_NC.clamp_min(1e-300).log())).sum(-1)


def _parts(group_N: Tensor, test: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows to fit on, to choose the penalty on, and to judge on, by group."""
    unique, index_N = group_N.unique(return_inverse=True)
    count = round(test * len(unique))
    if len(unique) < _FEW or count < 2 or len(unique) - 2 * count < 2:
        raise MeasureError(
            f"{len(unique)} rows or groups with test={test} are too few; give {_FEW} at least, and a share below a half"
        )
    part_G = torch.zeros(len(unique), dtype=torch.long)
    order = torch.randperm(len(unique), generator=torch.Generator().manual_seed(seed))
    part_G[order[:count]] = 2
    part_G[order[count : 2 * count]] = 1
    fitted, chosen_on, held = ((part_G[index_N] == part).nonzero()[:, 0] for part in range(3))
    return fitted, chosen_on, held


def _interval(value_N: Tensor, group_N: Tensor, seed: int, resamples: int = 500) -> tuple[float, float]:
    """Bootstrap interval of the mean over rows, groups being resampled whole."""
    unique, index_N = group_N.unique(return_inverse=True)
    sums = torch.zeros(2, len(unique), dtype=torch.float64)
    sums.index_add_(1, index_N, torch.stack([value_N, torch.ones_like(value_N)]))
    draw = torch.randint(len(unique), (resamples, len(unique)), generator=torch.Generator().manual_seed(seed))
    means = sums[0][draw].sum(1) / sums[1][draw].sum(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def _distributions(outcomes: Tensor) -> Tensor:
    o = torch.as_tensor(outcomes).double().cpu()
    if o.ndim != 2 or o.shape[1] < 2:
        raise MeasureError(f"outcomes are distributions (rows, outcomes) over two at least, not {tuple(o.shape)}")
    off = (o.sum(-1) - 1).abs()
    if not bool(o.isfinite().all()) or bool((o < 0).any()) or bool((off > 1e-3).any()):
        raise MeasureError("a row of outcomes is no distribution: not negative, summing to one")
    return o / o.sum(-1, keepdim=True)


def _input(name: str, x: Any, rows: int) -> Tensor:
    x = torch.as_tensor(x).detach().double().cpu()
    if x.ndim != 2 or len(x) != rows:
        raise MeasureError(f"{name} has the shape {tuple(x.shape)}, and there are {rows} outcome distributions")
    if not bool(x.isfinite().all()):
        raise MeasureError(f"{name} holds values that are not finite")
    return x
