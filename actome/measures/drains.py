"""What is special about the first token: small values where attention is parked, a large norm in the stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..core.errors import MeasureError
from ..core.measure import Measure, MeasureTable, Reduction, double, ratio, real_tokens, token_norms
from .attention import SinkScore

if TYPE_CHECKING:
    from ..core.model import Model
    from ..core.sites import Site


class ResidualPeak(Measure):
    r"""Norm of the first token's vector against that of the others.

    ``residual_peak``: :math:`\mathrm{mean} \lVert h_0 \rVert / \mathrm{mean}_{j > 0} \lVert h_j \rVert`, means over the
    first tokens and over all other tokens. ``residual_norms``: mean norm at each position, the last entry for all
    positions from `positions` on; not in tables. Positions count from the first real token of each row. A peak well
    above 1 goes with attention sinks; look in ``residual_norms`` for peaks elsewhere.

    Over real tokens; those with a non-finite unit are left out.

    Args:
        positions: how many positions are told apart.

    Shapes: x (\*stack, batch, pos, unit); residual_peak (\*stack), residual_norms (\*stack, positions + 1), NaN where
    there was no token.

    Source: Guo et al. 2024, Active-Dormant Attention Heads (residual-state peaks).

    Example:
        >>> h = torch.ones(2, 5, 4)
        >>> h[:, 0] = 8.0
        >>> peak = ResidualPeak()
        >>> peak.update(h)
        >>> float(peak.compute()["residual_peak"])
        8.0
    """

    reductions: ClassVar[dict[str, Reduction]] = {"tokens": "sum", "norms": "sum"}
    value_dims: ClassVar[dict[str, tuple[str, ...]]] = {"residual_peak": (), "residual_norms": ("position",)}

    def __init__(self, positions: int = 16, **options: object):
        super().__init__(**options)
        if positions < 1:
            raise MeasureError(f"positions={positions}: how many first positions are told apart, 1 or more")
        self.positions = positions

    def site_statistics(self, x: Tensor, mask: Tensor | None = None, tokens: Tensor | None = None) -> dict[str, Tensor]:
        """tokens and norms (summed): (positions + 1)."""
        return _norms_by_position(x, mask, self.positions, 1, ("tokens", "norms"))

    def values(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See the class."""
        peak, norms = _first_against_rest(stats["tokens"][..., None, :], stats["norms"])
        return {"residual_peak": peak[..., 0], "residual_norms": norms[..., 0, :]}


class ValueDrain(Measure):
    r"""Norm of the first token's value vector against that of the others, head by head.

    ``value_drain``: :math:`\mathrm{mean} \lVert v_0 \rVert / \mathrm{mean}_{j > 0} \lVert v_j \rVert`. Where it is well
    below 1, the head can park its attention on the first token and add next to nothing; read it beside `SinkScore`.

    Over real tokens; those with a non-finite unit in any head are left out.

    Args:
        heads: how many heads the units of a token consist of, equal parts in order; ``None`` for as many as the site
            says it has (`Model.measure`), or one.

    Shapes: x (\*stack, batch, pos, head * d_head); value_drain (\*stack, head).

    Raises:
        MeasureError: the units are no multiple of the heads.

    Source: Guo et al. 2024, Active-Dormant Attention Heads (value-state drains).

    Example:
        >>> v = torch.ones(2, 5, 6)
        >>> v[:, 0, :3] = 0.25
        >>> drain = ValueDrain(heads=2)
        >>> drain.update(v)
        >>> drain.compute()["value_drain"].tolist()
        [0.25, 1.0]
    """

    reductions: ClassVar[dict[str, Reduction]] = {"value_tokens": "sum", "value_norms": "sum"}
    value_dims: ClassVar[dict[str, tuple[str, ...]]] = {"value_drain": ("head",)}

    def __init__(self, heads: int | None = None, **options: object):
        super().__init__(**options)
        if heads is not None and heads < 1:
            raise MeasureError(f"heads={heads}: a number of heads, 1 or more, or None for what the site has")
        self.heads = heads

    def at(self, sites: Sequence[Site]) -> Measure:
        """With the heads of the sites."""
        heads = sites[0].size("kv_head") or sites[0].size("head")
        return ValueDrain(heads) if self.heads is None and heads else self

    def site_statistics(self, x: Tensor, mask: Tensor | None = None, tokens: Tensor | None = None) -> dict[str, Tensor]:
        """value_tokens: (2), first ones and others; value_norms: (head, 2), summed."""
        heads = self.heads or 1
        if x.shape[-1] % heads:
            raise MeasureError(f"{x.shape[-1]} units are no {heads} heads of equal width; give the right heads=")
        return _norms_by_position(x, mask, 1, heads, ("value_tokens", "value_norms"))

    def values(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See the class."""
        drain, _ = _first_against_rest(stats["value_tokens"][..., None, :], stats["value_norms"])
        return {"value_drain": drain}


def extreme_tokens(model: Model, inputs: Any, *, eps: float = 0.3, **options: Any) -> MeasureTable:
    """The three that go together at the first token: attention sink, value drain and residual peak, in one pass.

    Args:
        inputs: as in `Model.measure`.
        eps: of `SinkScore`; 0.2 suits models of one or two layers.
        options: further arguments of `Model.measure`.

    Returns:
        A `MeasureTable` with `SinkScore` at the patterns, `ValueDrain` at the values, `ResidualPeak` at the stream.

    Raises:
        SiteError: the model has no attention or no residual stream.

    Example:
        >>> import actome as ac
        >>> table = extreme_tokens(ac.demo(), "The value of the expression is")
        >>> table.value("value_drain").shape, table.value("residual_peak").shape
        (torch.Size([4, 4]), torch.Size([4]))
    """
    measures = {
        "blocks.*.attn.pattern": SinkScore(eps=eps),
        "blocks.*.attn.v": ValueDrain(),
        "blocks.*.resid.post": ResidualPeak(),
    }
    return model.measure(inputs, measures, **options)


def _norms_by_position(
    x: Tensor, mask: Tensor | None, positions: int, heads: int, names: tuple[str, str]
) -> dict[str, Tensor]:
    """Counts (positions + 1) and sums of norms (head, positions + 1) of tokens by their position in the row."""
    kept = real_tokens(x, mask)
    if heads == 1:
        norm_BTH = token_norms(x, mask)[..., None]
    else:
        norm_BTH = torch.linalg.vector_norm(kept.x.unflatten(-1, (heads, -1)), dim=-1)
    real_BT = torch.ones(x.shape[:2], dtype=torch.long, device=x.device) if mask is None else mask.long()
    at_BT = (real_BT.cumsum(-1) - 1).clamp(0, positions)
    seen_BT = torch.ones_like(at_BT) if kept.keep is None else kept.keep.long()
    count = torch.zeros(positions + 1, dtype=torch.long, device=x.device)
    total = double(norm_BTH.new_zeros(positions + 1, heads))
    return {
        names[0]: count.index_add(0, at_BT.flatten(), seen_BT.flatten()),
        names[1]: total.index_add(0, at_BT.flatten(), double(norm_BTH).flatten(0, 1)).T,
    }


def _first_against_rest(tokens: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
    rest = ratio(norms[..., 1:].sum(-1), tokens[..., 1:].sum(-1))
    return ratio(norms[..., 0], tokens[..., 0]) / rest, ratio(norms, tokens)
