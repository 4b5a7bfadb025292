"""Lazy or rich: whether a training moved features, or only read out of those that were there.

Letters: N row, U unit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from actome.core.errors import MeasureError
from actome.core.model import Model
from actome.core.prove import evaluating
from actome.measures.alignment import parameters_of
from actome.measures.kernel_alignment import kernel_alignment, representation_alignment
from actome.measures.tangent_kernel import parameters_named, tangent_kernel


@dataclass(frozen=True)
class Regime:
    r"""How far a training went from where it began.

    Attributes:
        weight_change: :math:`\|\theta_T - \theta_0\|` over the chosen parameters, Euclidean (Frobenius).
        relative_change: the same over :math:`\|\theta_0\|`.
        RA: representation alignment, the mean over sites, at most 1; NaN without sites.
        KA: tangent-kernel alignment, at most 1; NaN without the kernel.
        index: `lazy_rich_index` of the two kernels; NaN without them.
        by_site: RA of each site.
        rank: singular directions in use, `rank_in_use`, of each weight matrix, before and after.
        verdict: ``"lazy"``, ``"rich"`` or ``"between"``.
    """

    weight_change: float
    relative_change: float
    RA: float
    KA: float
    index: float
    by_site: dict[str, float]
    rank: dict[str, tuple[float, float]]
    verdict: Literal["lazy", "rich", "between"]


def regime(
    before: nn.Module | Model,
    after: nn.Module | Model,
    probes: Any,
    sites: str | Sequence[str] = (),
    *,
    kernel: bool = True,
    weights: str | Sequence[str] = "*",
    lazy: float = 0.9,
    rich: float = 0.7,
    **options: Any,
) -> Regime:
    r"""Compares a network with what it was at the start, in weights, representations and tangent kernel.

    - weight change: :math:`\|\theta_T - \theta_0\|`
    - representation alignment: RA :math:`= \langle R_T, R_0 \rangle / (\|R_T\| \|R_0\|)`, with :math:`R = H H^\top` of
      the activations H of a site, a row for each probe (for each real token, where a site has positions)
    - tangent-kernel alignment: KA :math:`= \langle K_T, K_0 \rangle / (\|K_T\| \|K_0\|)`, with :math:`K = J J^\top` of
      the derivatives J of the outputs at the probes by all parameters

    High RA and KA and a small change are lazy. None of them is centred, so that even unrelated networks share a part
    (that of all inputs being alike): **compare runs with one another, at the same training loss**; the verdict holds RA
    and KA, as far as they were measured, against two conventional levels. Weight change alone does not tell.

    Args:
        before, after: of one architecture. Keep the start with ``copy.deepcopy`` before training, or take two
            checkpoints.
        probes: inputs, the same for both: a tensor, a mapping of arguments, or for models with a tokenizer text (then
            with ``kernel=False``, or as ids).
        sites: patterns of sites, such as ``"module:state"`` or ``"blocks.*.resid.post"``.
        kernel: also the tangent kernel, which costs a backward pass for every probe and output.
        weights: names or patterns of the parameters whose change and rank are told.
        lazy, rich: the verdict is ``"lazy"`` when the lower of RA and KA is at least `lazy`, ``"rich"`` below `rich`.
        options: of `actome.measures.tangent_kernel`: ``outputs`` (draw a few, the same for both), ``read``,
            ``parameters``, ``seed``.

    Raises:
        MeasureError: two architectures, neither sites nor a kernel, or activations that are zero.
        SiteError: a pattern that matches nothing.

    Source: Liu et al. 2024, How connectivity structure shapes rich and lazy learning in neural circuits.

    >>> import copy
    >>> from actome.tasks.nets import MLP, fit
    >>> x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    >>> net = MLP([4, 32, 2])
    >>> start = copy.deepcopy(net)
    >>> found = regime(start, fit(net, x, (x[:, 0] > 0).long(), steps=50), x[:16], "module:act.0")
    >>> found.verdict, 0.9 < found.RA < 1, 0.9 < found.KA < 1
    ('lazy', True, True)
    """
    patterns = [sites] if isinstance(sites, str) else list(sites)
    if not patterns and not kernel:
        raise MeasureError("neither sites nor a kernel: there is nothing to tell the regime from")
    if not 0 <= rich <= lazy <= 1:
        raise MeasureError(f"lazy={lazy}, rich={rich}: levels of an alignment, 0 <= rich <= lazy <= 1")
    start, end = (net if isinstance(net, Model) else Model(net) for net in (before, after))
    old, new = parameters_of(start.module), parameters_of(end.module)
    if {name: one.shape for name, one in old.items()} != {name: one.shape for name, one in new.items()}:
        raise MeasureError("the two networks do not have the same parameters; a regime is told of one that was trained")
    names = parameters_named(old, weights)
    change = math.sqrt(sum(float((new[name] - old[name].to(new[name])).square().sum()) for name in names))
    size = math.sqrt(sum(float(old[name].square().sum()) for name in names))

    by_site = _representations(start, end, probes, patterns) if patterns else {}
    ra = sum(by_site.values()) / len(by_site) if by_site else math.nan
    ka = index = math.nan
    if kernel:
        kernels = [tangent_kernel(net, _rows(net, probes), **options) for net in (start, end)]
        ka, index = kernel_alignment(kernels[0], kernels[1], centred=False), lazy_rich_index(*kernels)
    told = [one for one in (ra, ka) if not math.isnan(one)]
    if not told:
        if not all(bool(one.isfinite().all()) for net in (old, new) for one in net.values()):
            raise MeasureError("weights of one of the two networks are not finite, so there is nothing to align")
        raise MeasureError("activations or gradients are all zero, so there is nothing to align")
    least = min(told)
    ranks = {name: (rank_in_use(old[name]), rank_in_use(new[name])) for name in names if old[name].ndim == 2}
    verdict: Any = "lazy" if least >= lazy else "rich" if least < rich else "between"
    return Regime(change, change / size if size else math.nan, ra, ka, index, by_site, ranks, verdict)


def lazy_rich_index(initial: Tensor, now: Tensor) -> float:
    """How far a tangent kernel has gone from the initial one: 0 lazy (the same up to scale), towards 1 rich.

    One less the centred alignment, so that what all probes share does not count; the kernel distance.

    Args:
        initial, now: kernels on the same probes, (row, row), see `actome.measures.tangent_kernel`.

    Source: Fort et al. 2020, Deep learning versus kernel learning.

    >>> lazy_rich_index(torch.eye(4), 3 * torch.eye(4))
    0.0
    """
    return 1 - kernel_alignment(initial, now)


def rank_in_use(weight: Tensor) -> float:
    r"""How many singular directions a matrix makes use of, :math:`(\sum_k \sigma_k)^2 / \sum_k \sigma_k^2`.

    Not `actome.dynamics.effective_rank`, which is the exponential of their entropy.

    >>> rank_in_use(torch.eye(4)), rank_in_use(torch.ones(4, 3))
    (4.0, 1.0)
    """
    if weight.ndim != 2:
        raise MeasureError(f"a rank is of a matrix, not of {tuple(weight.shape)}")
    s = torch.linalg.svdvals(weight.double())
    return float(s.sum() ** 2 / s.square().sum()) if bool(s.any()) else 0.0


def _representations(start: Model, end: Model, probes: Any, patterns: list[str]) -> dict[str, float]:
    with evaluating(start.module), evaluating(end.module):
        old, new = (net.record(probes, patterns) for net in (start, end))
    return {
        site: representation_alignment(old.flat(site).flatten(1), new.flat(site).flatten(1)) for site in old.sites()
    }


def _rows(model: Model, probes: Any) -> Any:
    """What the kernel's forward takes: arguments, by name where the model has names for them."""
    if isinstance(probes, Tensor) and probes.is_floating_point():
        return probes
    return {name: one for name, one in model.arguments(probes)[0].items() if one is not None}
