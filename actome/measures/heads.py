"""Heads that work in one domain and idle in another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..core.errors import MeasureError
from ..core.measure import Measure, Reduction, double, ratio
from .attention import SinkScore, _real_queries
from .loss import NextTokenLoss

if TYPE_CHECKING:
    import pandas as pd

    from ..core.model import Model


class DormantHeads(Measure):
    r"""How much of a head's attention is parked on the first token, domain by domain.

    A head is *dormant* on a sequence when the queries of a domain put more than :math:`\epsilon` of their attention,
    beyond the uniform share, on the first token; `SinkScore` with its queries sorted by label. Over real queries.

    - ``domain_sink``: mean attention to the first token of the queries of a domain, minus the uniform share
    - ``dormant_rate``: share of the sequences with a query of the domain on which the head is dormant there

    A head that is dormant in one domain and active in another is *active-dormant*; whether it does anything where it
    is dormant is for `head_ablation_by_domain` to say.

    Args:
        domains: the names of the domains; labels are their indices.
        eps: :math:`\epsilon`, 0.3 by default; 0.2 suits models of one or two layers.

    Shapes: `update` takes x (\*stack, batch, head, query, key), mask (batch, key) and ``domains`` (batch) or (batch,
    query), integers; -1 leaves out. Both values (\*stack, domain, head), not in tables.

    Raises:
        MeasureError: labels that are missing, of another shape, or of a domain that is not there.

    Source: Guo et al. 2024, Active-Dormant Attention Heads.

    Example:
        >>> even = torch.ones(4, 4).tril() / torch.arange(1, 5)[:, None]
        >>> parked = 0.1 * even + 0.9 * torch.tensor([1.0, 0.0, 0.0, 0.0])
        >>> pattern = torch.stack([even, parked])[:, None]
        >>> heads = DormantHeads(("code", "prose"))
        >>> heads.update(pattern, domains=torch.tensor([0, 1]))
        >>> heads.compute()["dormant_rate"].flatten().tolist()
        [0.0, 1.0]
    """

    layout = "pattern"
    reductions: ClassVar[dict[str, Reduction]] = {"queries": "sum", "excess": "sum", "rows": "sum", "dormant": "sum"}
    value_dims: ClassVar[dict[str, tuple[str, ...]]] = {
        "domain_sink": ("domain", "head"),
        "dormant_rate": ("domain", "head"),
    }

    def __init__(self, domains: Sequence[str], eps: float = 0.3, **options: object):
        super().__init__(**options)
        if isinstance(domains, str) or not domains:
            raise MeasureError(f"domains is {domains!r}; give their names, such as ('code', 'prose')")
        self.domains = tuple(domains)
        self.eps = eps
        self._labels: Tensor | None = None

    def update(
        self, x: Tensor, mask: Tensor | None = None, tokens: Tensor | None = None, domains: Tensor | None = None
    ) -> None:
        """Folds one batch of patterns with the labels of its rows or queries; see the class."""
        self._labels = domains
        try:
            super().update(x, mask, tokens)
        finally:
            self._labels = None

    def site_statistics(self, x: Tensor, mask: Tensor | None = None, tokens: Tensor | None = None) -> dict[str, Tensor]:
        """queries, rows: (domain), counts; excess and dormant (rows): (domain, head)."""
        labels_BQ = self._checked(x)
        kept = _real_queries(x, mask)
        visible_BQS = kept.visible
        first_B = torch.zeros(len(x), dtype=torch.long, device=x.device) if mask is None else mask.long().argmax(-1)
        at = first_B[:, None, None]
        first_BHQ = kept.pattern.gather(-1, at[..., None].expand(*x.shape[:3], 1))[..., 0]
        sees_BQ = visible_BQS.gather(-1, at.expand(*visible_BQS.shape[:2], 1))[..., 0]
        uniform_BQ = sees_BQ / visible_BQS.sum(-1).clamp_min(1)
        excess_BHQ = double(first_BHQ - uniform_BQ[:, None])
        of_BQC = torch.stack([(labels_BQ == c) & kept.queries for c in range(len(self.domains))], -1)
        count_BC = of_BQC.sum(1)
        excess_BCH = torch.einsum("bhq,bqc->bch", excess_BHQ, of_BQC.to(excess_BHQ.dtype))
        return {
            "queries": count_BC.sum(0),
            "excess": excess_BCH.sum(0),
            "rows": (count_BC > 0).sum(0),
            "dormant": (excess_BCH > self.eps * count_BC.clamp_min(1)[..., None]).sum(0),
        }

    def _checked(self, x: Tensor) -> Tensor:
        labels = self._labels
        batch, queries = x.shape[0], x.shape[-2]
        if labels is None:
            raise MeasureError("DormantHeads needs update(..., domains=labels), a label for each row or query")
        if labels.is_floating_point() or tuple(labels.shape) not in ((batch,), (batch, queries)):
            raise MeasureError(
                f"domains are integers of the shape {(batch,)} or {(batch, queries)}, "
                f"not {labels.dtype} {tuple(labels.shape)}"
            )
        if labels.numel() and not -1 <= int(labels.min()) <= int(labels.max()) < len(self.domains):
            raise MeasureError(
                f"a label is {int(labels.max())} or {int(labels.min())}; there are the domains 0 to "
                f"{len(self.domains) - 1} ({', '.join(self.domains)}), and -1 for none"
            )
        labels = labels.to(x.device)
        return labels if labels.ndim == 2 else labels[:, None].expand(batch, queries)

    def values(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See the class."""
        return {
            "domain_sink": ratio(stats["excess"], stats["queries"][..., None]),
            "dormant_rate": ratio(stats["dormant"], stats["rows"][..., None]),
        }


def dormant_heads(
    model: Model, domains: Mapping[str, Any], *, eps: float = 0.3, apart: float = 0.5, **options: Any
) -> pd.DataFrame:
    """Which heads idle on the first token in which domain.

    Args:
        domains: for each domain its text, as in `Model.measure`.
        eps: of `SinkScore`.
        apart: difference of dormant rates from which on a head is called active-dormant.
        options: further arguments of `Model.measure`.

    Returns:
        One row for each head: layer, head, ``sink_excess`` and ``dormant_rate`` of each domain as columns
        ``NAME sink_excess`` and ``NAME dormant_rate``, and ``kind``: ``"active-dormant"`` when the rates of two
        domains are `apart`, else ``"dormant"`` when all are above a half, else ``"active"``.

    Raises:
        MeasureError: fewer than two domains.

    Example:
        >>> import actome as ac
        >>> texts = {"code": "def f(x):\\n    return x + 1", "prose": "It was the best of times"}
        >>> heads = dormant_heads(ac.demo(), texts)
        >>> len(heads), sorted(set(heads["kind"]) | {"active"})[0]
        (16, 'active')
    """
    import pandas as pd

    if len(domains) < 2:
        raise MeasureError(f"{len(domains)} domain was given; heads are compared between two or more")
    columns: dict[str, Any] = {}
    rates = []
    for name, inputs in domains.items():
        table = model.measure(inputs, {"blocks.*.attn.pattern": SinkScore(eps=eps)}, **options)
        rate_LH = table.value("sink_rate")
        layer, head = torch.meshgrid(*(torch.arange(n) for n in rate_LH.shape), indexing="ij")
        layers = torch.tensor([site.layer for site in table.sites("sink_rate")])
        columns |= {"layer": layers[layer.flatten()], "head": head.flatten()}
        columns[f"{name} sink_excess"] = table.value("sink_excess").flatten()
        columns[f"{name} dormant_rate"] = rate_LH.flatten()
        rates.append(rate_LH.flatten())
    rate_CN = torch.stack(rates)
    spread_N = rate_CN.amax(0) - rate_CN.amin(0)
    kinds = [
        "active-dormant" if spread >= apart else "dormant" if low > 0.5 else "active"
        for spread, low in zip(spread_N.tolist(), rate_CN.amin(0).tolist(), strict=True)
    ]
    return pd.DataFrame({name: column.numpy() for name, column in columns.items()}).assign(kind=kinds)


def head_ablation_by_domain(
    model: Model, domains: Mapping[str, Any], sites: str = "blocks.*.attn.z", **options: Any
) -> pd.DataFrame:
    """How much the next-token loss rises in each domain when one head's output is set to zero.

    One pass for each head and domain. Where a dormant head truly does nothing, its removal costs nothing.

    Args:
        domains: for each domain its text, as in `Model.measure`.
        sites: the heads' outputs, (batch, pos, head, d_head); narrow it to look at some layers only.
        options: further arguments of `Model.measure`.

    Returns:
        One row for each head: layer, head, and a column ``NAME rise`` in nats for each domain.

    Raises:
        MeasureError: no domain, or a site without heads.

    Example:
        >>> import actome as ac
        >>> texts = {"code": "def f(x):\\n    return x + 1", "prose": "It was the best of times"}
        >>> head_ablation_by_domain(ac.demo(), texts, "blocks.0.attn.z").shape
        (4, 4)
    """
    import pandas as pd

    if not domains:
        raise MeasureError("no domain was given; give {name: text}")
    measures = {"logits": NextTokenLoss()}
    before = {name: float(model.measure(text, measures, **options).value("loss")) for name, text in domains.items()}
    rows = []
    for site in model.match(sites):
        if "head" not in site.dims:
            raise MeasureError(f"{site.name} has no heads (its dims are {', '.join(site.dims)}); take attn.z")
        axis = site.dims.index("head")
        for head in range(site.size("head") or 0):

            def silence(x: Tensor, axis: int = axis, head: int = head) -> Tensor:
                return x.index_fill(axis, torch.tensor([head], device=x.device), 0.0)

            rises = {}
            for name, text in domains.items():
                with model.tap([(site.address, silence, "write")]):
                    after = float(model.measure(text, measures, **options).value("loss"))
                rises[f"{name} rise"] = after - before[name]
            rows.append({"layer": site.layer, "head": head, **rises})
    return pd.DataFrame(rows)
