"""What an MLP's output loses when its smallest contributions are dropped, threshold by threshold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.errors import MeasureError
from ..core.measure import Measure, MeasureTable, Reduction, double, ratio, real_tokens
from ..core.stream import batches, canonical, fitting
from ..core.taps import HookPoint
from .sampling import checked_every, sampled

if TYPE_CHECKING:
    from ..core.model import Model
    from ..core.sites import Site

# Entries of (token, unit) that are looked at together.
_CHUNK = 1 << 20


class CETT(Measure):
    r"""Cumulative error of tail truncation: the relative error of an MLP's output without its small contributions.

    The MLP's output is :math:`\sum_i n_i`, :math:`n_i = z_i W_{:,i}`, with :math:`z` what enters the down projection W
    (of a gated MLP the product of gate and up). At a threshold t, over N real tokens,

    .. math:: \mathrm{CETT}(t) = \frac{1}{N} \sum_x \Bigl\lVert \sum_{i : \lVert n_i \rVert < t} n_i \Bigr\rVert \Big/
              \Bigl\lVert \sum_i n_i \Bigr\rVert

    - ``cett``: CETT at each threshold; not in tables
    - ``cett_kept``: share of contributions that are at least as large as each threshold and not 0; not in tables
    - ``kept_at_error``: the share kept at the threshold where CETT is `error`, between thresholds by linear
      interpolation; NaN when no threshold reaches so far

    A bias of the down projection is no part of it. Tokens with a non-finite unit are left out; one whose output is 0
    has no error. Make one for each site with `cett`, which finds weights and thresholds.

    Args:
        weight: W, (d_model, unit); shared between copies of the measure, and not copied.
        thresholds: t, ascending, not negative.
        error: see ``kept_at_error``; 0.2 by default, where language models hardly change.
        every: take every n-th token of a row only, counted from its first real one; 8 by default. Each threshold costs
            as much as the down projection.

    Shapes: x (\*stack, batch, pos, unit); cett and cett_kept (\*stack, threshold), kept_at_error (\*stack).

    Raises:
        MeasureError: a weight of another width, thresholds that do not ascend.

    Source: Zhang et al. 2024, ReLU^2 Wins: Discovering Efficient Activation Functions for Sparse LLMs (CETT); Luo et
    al. 2024, Sparsing Law (PPL-p% sparsity).

    Example:
        >>> cett = CETT(torch.eye(2), [0.5, 2.0, 5.0], every=1)
        >>> cett.update(torch.tensor([[[3.0, 1.0], [4.0, 0.0]]]))
        >>> [round(error, 3) for error in cett.compute()["cett"].tolist()], cett.compute()["cett_kept"].tolist()
        ([0.0, 0.158, 1.0], [0.75, 0.5, 0.0])
    """

    reductions: ClassVar[dict[str, Reduction]] = {"tokens": "sum", "error": "sum", "kept": "sum"}
    value_dims: ClassVar[dict[str, tuple[str, ...]]] = {
        "cett": ("threshold",),
        "cett_kept": ("threshold",),
        "kept_at_error": (),
    }

    def __init__(
        self,
        weight: Tensor,
        thresholds: Sequence[float] | Tensor,
        error: float = 0.2,
        every: int = 8,
        **options: object,
    ):
        super().__init__(**options)
        self.thresholds = torch.as_tensor(thresholds, dtype=torch.float64)
        if weight.ndim != 2:
            raise MeasureError(f"the down projection's weight is (d_model, unit), not {tuple(weight.shape)}")
        if self.thresholds.ndim != 1 or not len(self.thresholds) or bool((self.thresholds.diff() <= 0).any()):
            raise MeasureError("thresholds are one or more numbers that ascend")
        self.down = _Down(weight.detach())
        self.target = error
        self.every = checked_every(every)

    def site_statistics(self, x: Tensor, mask: Tensor | None = None, tokens: Tensor | None = None) -> dict[str, Tensor]:
        """tokens: (); error: (threshold), sums over tokens; kept: (threshold), contributions."""
        kept = real_tokens(x, mask)
        z_NF, _ = sampled(kept, mask, self.every)
        weight_DF, norm_F = self.down.like(z_NF)
        if weight_DF.shape[1] != z_NF.shape[-1]:
            raise MeasureError(f"the site has {z_NF.shape[-1]} units, and the down projection {weight_DF.shape[1]}")
        error = double(z_NF.new_zeros(len(self.thresholds)))
        left = torch.zeros(len(self.thresholds), dtype=torch.long, device=x.device)
        for z in z_NF.split(max(1, _CHUNK // z_NF.shape[-1])):
            size = z.abs() * norm_F
            whole = torch.linalg.vector_norm(z @ weight_DF.T, dim=-1)
            share = whole.reciprocal().where(whole > 0, 0.0)
            for i, threshold in enumerate(self.thresholds.tolist()):
                small = size < threshold
                lost = torch.linalg.vector_norm((z * small) @ weight_DF.T, dim=-1)
                error[i] += double(lost * share).sum()
                left[i] += (size > 0).logical_and_(~small).sum()
        return {"tokens": torch.tensor(len(z_NF), device=x.device), "error": error, "kept": left}

    def values(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See the class."""
        tokens = stats["tokens"][..., None]
        error = ratio(stats["error"], tokens)
        kept = ratio(stats["kept"], tokens * self.down.weight.shape[1])
        flat = zip(error.reshape(-1, error.shape[-1]), kept.reshape(-1, kept.shape[-1]), strict=True)
        at = [_crossing(e.cummax(0).values, k, self.target) for e, k in flat]
        return {"cett": error, "cett_kept": kept, "kept_at_error": error.new_tensor(at).view(error.shape[:-1])}

    def threshold_at(self, error: float) -> float:
        """The threshold at which CETT first reaches `error`, interpolated; infinite from an error of 1 on.

        Raises:
            MeasureError: nothing was measured yet, or at more than one site.
        """
        errors = self.compute()["cett"]
        if errors.numel() != len(self.thresholds):
            raise MeasureError("thresholds are looked up site by site")
        errors = errors.flatten()
        if error >= 1:
            return float("inf")
        found = _crossing(errors.cummax(0).values, self.thresholds.to(errors), error)
        return float(self.thresholds[-1]) if found != found else found

    def units_thresholds(self, threshold: float) -> Tensor:
        """The same threshold on the activations themselves, t / ||W_i||, (unit)."""
        norm_F = self.down.norm
        return (threshold / norm_F).where(norm_F > 0, float("inf")) if threshold > 0 else torch.zeros_like(norm_F)


def cett(
    model: Model,
    inputs: Any,
    sites: str | Sequence[str] = "blocks.*.mlp.act",
    *,
    thresholds: int = 48,
    error: float = 0.2,
    every: int = 1,
    batch_size: int = 8,
) -> MeasureTable:
    """`CETT` at the sites of a model, with the weights of their down projections.

    The thresholds lie at equal steps of rank among the sizes of the first batch's contributions, and one above all.

    Args:
        inputs: as in `Model.measure`, but not an iterator that can be read only once.
        sites: names or patterns of what enters down projections.
        thresholds: how many, at each site.
        error, every: as in `CETT`.
        batch_size: rows a batch, for inputs that are not yet batched.

    Raises:
        MeasureError: a site that enters no projection.

    Example:
        >>> import actome as ac
        >>> table = cett(ac.demo(), "The value of the expression is", thresholds=8)
        >>> table.value("cett").shape, bool((table.value("cett")[:, -1] > 0.99).all())
        (torch.Size([4, 8]), True)
    """
    wanted = model.match(sites)
    weights = {site.name: down_projection(site) for site in wanted}
    grids: dict[str, Tensor] = {}
    arguments, _, mask = next(iter(batches(model, inputs, batch_size)))

    def look(site: Site) -> Any:
        def at(x: Tensor) -> None:
            x = canonical(x, site, "tokens")
            kept = real_tokens(x, fitting(mask, x, "tokens"))
            grids[site.name] = _grid(sampled(kept, fitting(mask, x, "tokens"), every).x, weights[site.name], thresholds)

        return at

    with model.tap([(site.address, look(site), "read") for site in wanted]), torch.no_grad():
        model.module(**arguments)
    measures = {site.name: CETT(weights[site.name], grids[site.name], error, every) for site in wanted}
    return model.measure(inputs, measures, batch_size=batch_size)


def down_projection(site: Site) -> Tensor:
    """The weight (d_model, unit) of the linear map that a site enters.

    Raises:
        MeasureError: it enters no linear map of its own.
    """
    point = site.address
    module = point.module if isinstance(point, HookPoint) and point.side == "in" else None
    if type(module) is nn.Linear:
        return module.weight.detach()
    width = site.sizes[-1] if site.sizes else None
    if module is None or width is None or not site.name.endswith("act"):
        raise MeasureError(f"{site.name} enters no projection; take sites such as blocks.*.mlp.act")
    # Whatever the module is (transposed, quantised, with adapters): a linear map is what it makes of the unit vectors.
    like = next((p for p in module.parameters() if p.is_floating_point()), torch.zeros(()))
    with torch.no_grad():
        eye = torch.eye(width, dtype=like.dtype, device=like.device)
        return (module.forward(eye) - module.forward(torch.zeros_like(eye[:1]))).T


class _Down:
    """A down projection, one for all copies of a measure."""

    def __init__(self, weight: Tensor):
        self.weight = weight
        self.norm = torch.linalg.vector_norm(weight.double(), dim=0)
        self._like: tuple[Tensor, Tensor] | None = None

    def like(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and norms in the dtype and on the device of `x`."""
        if self._like is None or self._like[0].dtype != x.dtype or self._like[0].device != x.device:
            self._like = (self.weight.to(x), self.norm.to(x))
        return self._like

    def __deepcopy__(self, memo: object) -> _Down:
        return self


def _grid(z_NF: Tensor, weight_DF: Tensor, count: int) -> Tensor:
    size = (z_NF.abs().double() * torch.linalg.vector_norm(weight_DF.double(), dim=0)).flatten()
    size = size[size > 0].sort().values
    if not len(size):
        return torch.tensor([1.0], dtype=torch.float64)
    ranks = torch.linspace(0, len(size) - 1, max(count - 1, 1)).long()
    return torch.cat([size[ranks], size[-1:] * 1.001]).unique()


def _crossing(error_G: Tensor, value_G: Tensor, target: float) -> float:
    """`value` where the rising `error` reaches `target`, between its entries by linear interpolation."""
    above = int((error_G <= target).sum())
    if above == len(error_G):
        return float(value_G[-1]) if bool(error_G[-1] == target) else float("nan")
    if not above:
        return float(value_G[0])
    low, high = float(error_G[above - 1]), float(error_G[above])
    share = (target - low) / (high - low)
    return float(value_G[above - 1] + share * (value_G[above] - value_G[above - 1]))
