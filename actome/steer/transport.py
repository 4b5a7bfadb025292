"""Transport: carry each unit's activations from their distribution on one set of examples to that on another.

Letters: N, M examples, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from actome.core.clamp import Clamp
from actome.core.clamping import Place
from actome.core.errors import ClampError, MeasureError

from .contrast import Examples
from .quantiles import Quantiles
from .states import Over, states

if TYPE_CHECKING:
    from actome.core.model import Model

Kind = Literal["linear", "mean", "gaussian"]
Support = bool | tuple[float, float]


@dataclass(frozen=True, eq=False)
class Transport(Clamp):
    r"""Moves activations along a fitted map, :math:`a' = (1 - \lambda) a + \lambda T(a)`, where a was seen.

    Args:
        factor: unit by unit (D), :math:`T(a) = w a + c`; or a matrix (D, D), :math:`T(a) = W a + c`.
        offset: (D), :math:`c`.
        low, high: (D), the range of the source, outside of which a unit is left as it is; None everywhere. With a
            matrix no unit is left out, since each depends on all.
        scale: :math:`\lambda`; 1 carries the whole way.

    Raises:
        ClampError: shapes that do not fit the site.

    Source: Rodriguez et al. 2025, Controlling Language and Diffusion Models by Transporting Activations, equations 3
    and 5 (unit by unit; its released code moves every activation by default, as ``support=False`` does); the matrix
    form is the optimal map between Gaussians (Peyré and Cuturi 2019, remark 2.31).
    """

    factor: Tensor | None = None
    offset: Tensor | None = None
    low: Tensor | None = None
    high: Tensor | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.factor, Tensor) or not isinstance(self.offset, Tensor):
            raise ClampError("Transport takes a factor (D) or (D, D) and an offset (D)")
        if self.factor.shape[-1] != len(self.offset) or self.factor.ndim not in (1, 2):
            raise ClampError(f"a factor {tuple(self.factor.shape)} and an offset {tuple(self.offset.shape)} do not fit")

    @classmethod
    def between(
        cls,
        site: str,
        source: Tensor | Quantiles,
        target: Tensor | Quantiles,
        kind: Literal["linear", "mean"] = "linear",
        *,
        support: Support = True,
    ) -> Transport:
        """The unit by unit map at a site, between two samples (N, D) or what `Quantiles` have seen of two streams.

        Raises:
            MeasureError: an unknown kind, samples that do not fit, or shares that are no range.

        >>> clamp = Transport.between("embed", torch.tensor([[0.0], [1.0]]), torch.tensor([[7.0], [5.0]]))
        >>> clamp.factor.item(), clamp.offset.item(), clamp.high.item()
        (2.0, 5.0, 1.0)
        """
        factor, offset = unit_maps(source, target, kind)
        low, high = _range(source, support)
        return cls(site, factor=factor, offset=offset, low=low, high=high)

    def transform(self, x: Tensor, place: Place) -> Tensor:
        assert self.factor is not None
        assert self.offset is not None
        if x.shape[-1] != len(self.offset):
            raise ClampError(f"{place.site.name}: the map has width {len(self.offset)}, the site {x.shape[-1]}")
        wide = x.float()
        factor, offset = self.factor.to(wide), self.offset.to(wide)
        moved = wide * factor + offset if factor.ndim == 1 else wide @ factor.T + offset
        if self.low is not None and self.high is not None:
            seen = (wide >= self.low.to(wide)) & (wide <= self.high.to(wide))
            moved = moved.where(seen, wide)
        return (wide + self.scale * (moved - wide)).to(x.dtype)


@dataclass(frozen=True)
class ActivationTransport:
    """Fits transport from the negative examples to the positive ones, at one site or at several in order.

    Args:
        sites: a name or pattern; the paper's are what norms and blocks give.
        kind: ``"linear"``, a factor and an offset for each unit from sorted samples; ``"mean"``, the offset alone;
            ``"gaussian"``, all units together, between Gaussians with the means and covariances of the two sets.
        support: leave a unit as it is where its activation lies outside of the source's range; or outside two of its
            quantiles, such as (0.01, 0.99). The range is of pooled states: with ``over="mean"`` single tokens often
            lie outside of it, and are left alone where a map for all (False) would move them.
        sequential: fit a later site under the maps of the earlier ones. Maps that are fitted at the same time each
            carry the whole way, and together too far.
        over: which tokens of an example are pooled.
        positions: where the maps apply, while fitting and after; None at every token. See `Clamp`.
        shrink: of the covariances towards their diagonal, for ``"gaussian"``.
        batch_size: rows a forward.

    >>> import actome as ac
    >>> model = ac.demo()
    >>> code = ["import os", "def f(x):", "return x", "for i in y:", "class A:", "x = [1]", "if x:", "print(x)"]
    >>> prose = ["The cat", "It is a", "When the", "This value", "An object", "You can", "See the", "There is"]
    >>> clamps = ActivationTransport("blocks.{1..2}.resid.post").fit(model, Examples(code, prose))
    >>> [clamp.site for clamp in clamps]
    ['blocks.1.resid.post', 'blocks.2.resid.post']
    """

    sites: str = "blocks.*.resid.post"
    kind: Kind = "linear"
    support: Support = True
    sequential: bool = True
    over: Over = "mean"
    positions: Any = None
    shrink: float = 0.1
    batch_size: int = 8

    def fit(self, model: Model, data: Examples) -> list[Transport]:
        """One clamp for each site, in the order of the forward; give all of them to ``model.clamp``.

        Raises:
            MeasureError: an unknown kind.
        """
        if self.kind not in ("linear", "mean", "gaussian"):
            raise MeasureError(f"kind={self.kind!r} does not exist; choose linear, mean or gaussian")
        options = {"over": self.over, "batch_size": self.batch_size}
        data = Examples.of(data)
        names = [site.name for site in model.match(self.sites)]
        targets = states(model, data.positive, self.sites, **options)
        if not self.sequential:
            sources = states(model, data.negative, self.sites, **options)
            return [self._map(name, sources[name], targets[name]) for name in names]
        clamps: list[Transport] = []
        for name in names:
            if clamps:
                with model.clamp(*clamps):
                    source = states(model, data.negative, name, **options)[name]
            else:
                source = states(model, data.negative, name, **options)[name]
            clamps.append(self._map(name, source, targets[name]))
        return clamps

    def _map(self, site: str, source_ND: Tensor, target_MD: Tensor) -> Transport:
        if self.kind == "gaussian":
            factor, offset = gaussian_map(source_ND, target_MD, self.shrink)
            return Transport(site, factor=factor, offset=offset, positions=self.positions)
        clamp = Transport.between(site, source_ND, target_MD, self.kind, support=self.support)
        return replace(clamp, positions=self.positions)


def unit_maps(
    source: Tensor | Quantiles, target: Tensor | Quantiles, kind: Literal["linear", "mean"]
) -> tuple[Tensor, Tensor]:
    """Factor and offset of each unit, (D) each: least squares between order statistics, which is transport in one dim.

    Sets of different sizes are compared at as many quantiles as the smaller one has.

    Args:
        source, target: samples (N, D) and (M, D), or what `Quantiles` have seen.
        kind: ``"mean"`` is the offset alone.

    Raises:
        MeasureError: an unknown kind, no sample, or other units.

    >>> factor, offset = unit_maps(torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[9.0], [5.0], [7.0]]), "linear")
    >>> factor.item(), offset.item()
    (2.0, 5.0)
    """
    if kind not in ("linear", "mean"):
        raise MeasureError(f"kind={kind!r} does not exist unit by unit; choose linear or mean")
    mean, other = (x.mean if isinstance(x, Quantiles) else x.double().mean(0) for x in (source, target))
    if not len(mean) or mean.shape != other.shape or bool(mean.isnan().any() | other.isnan().any()):
        raise MeasureError(f"samples of {len(mean)} and {len(other)} units, or empty ones, give no map")
    if kind == "mean":
        return torch.ones_like(mean).float(), (other - mean).float()
    count = min(x.size if isinstance(x, Quantiles) and x.count > x.size else _length(x) for x in (source, target))
    at = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    a, b = (x.at(at) if isinstance(x, Quantiles) else _quantiles(x.double(), at) for x in (source, target))
    a, b = a - a.mean(0), b - b.mean(0)
    spread = (a * a).sum(0)
    # A unit that does not vary in the source can only be shifted.
    factor = torch.where(spread > 1e-12 * (1 + mean**2), (a * b).sum(0) / spread.clamp_min(1e-300), 1.0)
    return factor.float(), (other - factor * mean).float()


def _length(x: Tensor | Quantiles) -> int:
    return x.count if isinstance(x, Quantiles) else len(x)


def _range(source: Tensor | Quantiles, support: Support) -> tuple[Tensor | None, Tensor | None]:
    """Between what values of the source a unit is carried."""
    if isinstance(support, bool):
        if not support:
            return None, None
        if isinstance(source, Quantiles):
            return source.low.float(), source.high.float()
        return source.amin(0).float(), source.amax(0).float()
    low, high = support
    if not 0 <= low < high <= 1:
        raise MeasureError(f"support={support}: True, False, or two shares from 0 to 1, the smaller one first")
    at = torch.tensor([low, high], dtype=torch.float64)
    found = source.at(at) if isinstance(source, Quantiles) else torch.quantile(source.double(), at, 0)
    return found[0].float(), found[1].float()


def _quantiles(x_ND: Tensor, at: Tensor) -> Tensor:
    """Sorted values at the middles of equal shares; those themselves where there are as many as asked for."""
    ordered = x_ND.sort(0).values
    if len(ordered) == len(at):
        return ordered
    place = at * len(ordered) - 0.5
    low = place.floor().clamp(0, len(ordered) - 1).long()
    high = (low + 1).clamp_max(len(ordered) - 1)
    weight = (place - low).clamp(0, 1)[:, None]
    return ordered[low] * (1 - weight) + ordered[high] * weight


def gaussian_map(source_ND: Tensor, target_MD: Tensor, shrink: float = 0.1) -> tuple[Tensor, Tensor]:
    r"""The optimal transport between Gaussians, (D, D) and (D).

    .. math:: W = \Sigma_1^{-1/2} (\Sigma_1^{1/2} \Sigma_2 \Sigma_1^{1/2})^{1/2} \Sigma_1^{-1/2}, \qquad
        c = \mu_2 - W \mu_1

    Args:
        shrink: the share of each covariance that is taken from its diagonal alone, so that few examples will do.
    """
    if not 0 <= shrink <= 1:
        raise MeasureError(f"shrink={shrink}: a share from 0 to 1")
    covariances = []
    for x in (source_ND.double(), target_MD.double()):
        full = torch.cov(x.T).reshape(x.shape[1], x.shape[1])  # of one unit it gives a number
        covariances.append((1 - shrink) * full + shrink * torch.diag(full.diagonal().clamp_min(1e-12)))
    first, second = covariances
    root, inverse = _roots(first)
    middle, _ = _roots(root @ second @ root)
    factor = inverse @ middle @ inverse
    offset = target_MD.double().mean(0) - factor @ source_ND.double().mean(0)
    return factor.float(), offset.float()


def _roots(x: Tensor) -> tuple[Tensor, Tensor]:
    """Square root of a symmetric positive matrix, and the inverse of that."""
    values, vectors = torch.linalg.eigh(x)
    values = values.clamp_min(values[-1] * 1e-10).sqrt()
    return (vectors * values) @ vectors.T, (vectors / values) @ vectors.T
