"""Which way samples take through a model: the experts, or the strongest units, that each layer uses for them.

Letters: B batch, T position, U unit or expert, L layer, N samples, M symbols of a pathway, P pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from ..core.errors import MeasureError
from ..core.measure import Measure, Reduction, double, ratio
from .edit_distance import mean_distance
from .sampling import every_nth
from .tally import row_hashes

if TYPE_CHECKING:
    from ..core.model import Model
    from ..core.sites import Site

Of = Literal["weights", "logits", "units"]
_LAYER = 1 << 32  # symbols are layer * _LAYER + unit
_NONE = -1  # fills what a pathway is shorter than the longest


class _Choices(NamedTuple):
    """Of every sample: unit and weight of those chosen at each layer, (N, layer, choice); unit -1 for none."""

    unit: Tensor
    weight: Tensor


class _Pathways(Measure):
    """What measures of pathways share: how samples, their scores at each layer and the choice among them are taken."""

    layout = "sites"

    def __init__(
        self,
        k: int | float = 2,
        of: Of = "weights",
        sample: Literal["row", "token"] = "row",
        every: int = 1,
        **options: object,
    ):
        super().__init__(**options)
        if of not in ("weights", "logits", "units") or sample not in ("row", "token"):
            raise MeasureError(
                f"of={of!r}, sample={sample!r}; choose 'weights', 'logits' or 'units', and 'row' or 'token'"
            )
        if (k < 1 or every < 1) if isinstance(k, int) else not 0 < k < 1:
            raise MeasureError(
                f"k={k}, every={every}; k is how many to choose, at least 1, or a share of the weight between 0 and 1"
            )
        self.k, self.of, self.sample, self.every = k, of, sample, every

    def fits(self, site: Site) -> str | None:
        """Weights and logits are those of routers."""
        if self.of != "units" and "expert" not in site.dims:
            return f"of={self.of!r} reads a router; for a dense model take of='units' at blocks.*.mlp.act"
        wanted = {"weights": "moe.weights", "logits": "moe.router"}.get(self.of)
        if wanted and not site.local.endswith(wanted):
            return f"of={self.of!r} reads {wanted}"
        return None

    def prepare(self, x: Tensor, previous: Tensor | None, mask: Tensor | None = None) -> Tensor:
        """Every k-th position, (batch, pos / every, unit)."""
        return x.detach() if self.every == 1 else every_nth(x.detach(), mask, self.every).clone()

    def _choices(self, x: Sequence[Tensor], mask: Tensor | None) -> _Choices:
        if len({tuple(one.shape[:2]) for one in x}) > 1 or any(one.ndim != 3 for one in x):
            raise MeasureError(
                f"pathways are read at sites (batch, pos, unit) of one batch, not {[tuple(one.shape) for one in x]}"
            )
        keep = torch.ones(x[0].shape[:2], dtype=torch.bool, device=x[0].device)
        if mask is not None:
            keep = every_nth(mask, mask, self.every).clone()
        for one in x:
            keep &= one.isfinite().all(-1)
        scores = [self._scores(one, keep) for one in x]
        if isinstance(self.k, int):
            short = min(one.shape[-1] for one in scores)
            if self.k > short:
                raise MeasureError(f"k={self.k} of {short} units cannot be chosen; give a smaller k")
            parts = [one.topk(self.k, -1) for one in scores]
            # In the order of their ids, as pathways are written.
            orders = [part.indices.sort(-1) for part in parts]
            return _Choices(
                torch.stack([order.values for order in orders], 1),
                torch.stack([p.values.gather(-1, o.indices) for p, o in zip(parts, orders, strict=True)], 1),
            )
        return self._share(scores)

    def _scores(self, x: Tensor, keep: Tensor) -> Tensor:
        """How strongly each sample uses each unit, (N, unit)."""
        x = x if x.dtype == torch.float64 else x.float()
        if self.of == "logits":
            x = x.softmax(-1)
        elif self.of == "units":
            x = x.abs()
        if self.sample == "token":
            return x[keep]
        count = keep.sum(1)
        mean = x.masked_fill(~keep[..., None], 0.0).sum(1) / count[:, None]
        return mean[count > 0]

    def _share(self, scores: Sequence[Tensor]) -> _Choices:
        """The fewest units whose weight adds up to the share k of the whole."""
        units, weights = [], []
        for one in scores:
            sorted_, index = one.sort(dim=-1, descending=True, stable=True)
            before = sorted_.cumsum(-1) - sorted_
            taken = torch.zeros_like(one, dtype=torch.bool).scatter(-1, index, before < self.k * one.sum(-1, True))
            number = torch.arange(one.shape[-1], device=one.device)
            units.append(number.where(taken, _NONE))
            weights.append(one.where(taken, 0.0))
        width = max(one.shape[-1] for one in scores)
        pad = [(0, width - one.shape[-1]) for one in scores]
        return _Choices(
            torch.stack([torch.nn.functional.pad(u, p, value=_NONE) for u, p in zip(units, pad, strict=True)], 1),
            torch.stack([torch.nn.functional.pad(w, p) for w, p in zip(weights, pad, strict=True)], 1),
        )


class PathwayDistance(_Pathways):
    r"""How unlike the pathways of different samples are: 0 when all go the same way, 1 when no two share a step.

    A sample's pathway is written as a string: at each layer the units that it uses most, in the order of their ids,
    layer after layer; units of different layers are different symbols. How much it uses a unit is the mean over its
    tokens of the router's weight (of ``moe.weights``, or the softmax of ``moe.router``), or of the magnitude of an
    activation in a dense model.

    - ``pathway_distance``: mean over pairs of different samples of the edit distance of their pathways divided by the
      longer one's length; stands at the last site, NaN at the others
    - ``choice_distance``: the same of each layer's part alone
    - ``pathways``: how many different pathways there are; at the last site. Beyond `reservoir` an estimate

    What is kept of a stream is a histogram: up to `reservoir` different pathways, those with the lowest hashes, and
    how many samples took each. So it does not depend on the order of samples and merges exactly; with more pathways
    than fit, the distance is of the samples that took one of those kept, a random choice of pathways.

    Args:
        k: how many units a layer, for a mixture of experts usually as many as its router chooses; or, a float, the
            share of the weight that the fewest strongest units make up.
        of: what the sites hold: ``"weights"`` at ``blocks.*.moe.weights``, ``"logits"`` at ``blocks.*.moe.router``,
            ``"units"`` at ``blocks.*.mlp.act`` of a dense model.
        sample: ``"row"``, a sequence is a sample; or ``"token"``.
        every: take every k-th position only; the tensors of all sites are held until the forward ends. Counted from
            each row's first real token.
        reservoir: how many different pathways to keep.

    Shapes: sites (batch, pos, unit); every value (site).

    Source: Li, Fan and Zhou 2025, Where to Find Grokking in LLM Pretraining? (pathway distance).

    Example:
        >>> distance = PathwayDistance(k=1)
        >>> layers = [torch.eye(4)[:2, None], torch.eye(4)[[3, 3], None]]  # two samples part ways at the first layer
        >>> distance.update(layers)
        >>> distance.compute()["pathway_distance"].tolist(), distance.compute()["choice_distance"].tolist()
        ([nan, 0.5], [1.0, 0.0])
    """

    reductions: ClassVar[dict[str, Reduction]] = {"samples": "sum", "pathways": "cat"}
    value_dims: ClassVar[dict[str, tuple[str, ...]]] = {"pathway_distance": (), "choice_distance": (), "pathways": ()}

    def __init__(
        self,
        k: int | float = 2,
        of: Of = "weights",
        sample: Literal["row", "token"] = "row",
        every: int = 1,
        reservoir: int = 256,
        **options: object,
    ):
        super().__init__(k, of, sample, every, **options)
        if reservoir < 2:
            raise MeasureError(f"reservoir={reservoir}; a distance needs two pathways")
        self.reservoir = reservoir

    def site_statistics(
        self, x: Sequence[Tensor], mask: Tensor | None = None, tokens: Tensor | None = None
    ) -> dict[str, Tensor]:
        """samples: (site), all the same; pathways: rows of hash, count and symbols, int64, (kept, 2 + M)."""
        unit_NLC = self._choices(x, mask).unit
        layer_L = torch.arange(len(x), device=unit_NLC.device)[:, None]
        symbols_NM = torch.where(unit_NLC < 0, _NONE, unit_NLC + layer_L * _LAYER).flatten(1)
        rows = torch.cat([_hash(symbols_NM)[:, None], torch.ones_like(symbols_NM[:, :1]), symbols_NM], 1)
        samples = torch.full((len(x),), len(rows), device=rows.device)
        return {"samples": samples, "pathways": self.bounded("pathways", rows)}

    def bounded(self, name: str, rows: Tensor) -> Tensor:
        """The different pathways with the lowest hashes, in their order, counts added up."""
        if not len(rows):
            return rows
        # Hash in front: sorted by it. Which pathways are kept never depends on counts, so a kept one lost none.
        key = torch.cat([rows[:, :1], rows[:, 2:]], 1)
        unique, inverse = key.unique(dim=0, return_inverse=True)
        count = torch.zeros(len(unique), dtype=rows.dtype, device=rows.device).index_add_(0, inverse, rows[:, 1])
        kept = slice(self.reservoir)
        return torch.cat([unique[kept, :1], count[kept, None], unique[kept, 1:]], 1)

    def values(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See the class; NaN for fewer than two samples."""
        sites, rows = len(stats["samples"]), stats["pathways"].cpu()
        count_N, symbols_NM = rows[:, 1].double(), rows[:, 2:]
        last = torch.full((2, sites), torch.nan, dtype=torch.float64)
        last[0, -1] = mean_distance(symbols_NM, count_N)
        last[1, -1] = len(rows) if len(rows) else torch.nan
        if len(rows) == self.reservoir:
            # The largest of n hashes stands where n of all pathways' would stand.
            last[1, -1] = (len(rows) - 1) / (float(rows[-1, 0]) / 2.0**63)
        layers = torch.where(symbols_NM < 0, _NONE, symbols_NM // _LAYER)
        parts = [mean_distance(symbols_NM.where(layers == i, _NONE), count_N) for i in range(sites)]
        out = {"pathway_distance": last[0], "choice_distance": torch.stack(parts), "pathways": last[1]}
        return {name: value.to(stats["samples"].device) for name, value in out.items()}

    def histogram(self) -> dict[tuple[tuple[int, int], ...], int]:
        """The pathways that are kept, each as (layer, unit) pairs in order, and how many samples took it."""
        rows = self.__dict__["pathways"].cpu().tolist() if self.update_count else []
        return {tuple(divmod(s, _LAYER) for s in symbols if s >= 0): count for _, count, *symbols in rows}


class PathwayConsistency(_Pathways):
    r"""How much the experts that a sample uses change in kind from layer to layer: low for a simple pathway.

    With :math:`e_l` the sum of the embeddings of the experts that a sample chooses at layer l, times their weights,

    - ``pathway_complexity``: mean over samples of :math:`1 - \cos(e_{l-1}, e_l)`; NaN at the first site. The published
      complexity of a pathway is its mean over the other sites.

    Args:
        embeddings: one tensor a site, (expert, width). By default the routers' rows, which `Model.measure` finds out
            and `expert_embeddings` gives; for a dense model say the rows that units write, ``down.weight.T``.
        k, of, sample, every: as for `PathwayDistance`.

    Shapes: sites (batch, pos, unit), at least two; the value (site).

    Source: Li, Fan and Zhou 2025, Where to Find Grokking in LLM Pretraining? (pathway consistency; that an expert's
    embedding is its row of the router is a reading of it).

    Example:
        >>> consistency = PathwayConsistency([torch.eye(3), torch.eye(3)], k=1)
        >>> consistency.update([torch.eye(3)[:2, None], torch.eye(3)[[0, 2], None]])
        >>> consistency.compute()["pathway_complexity"].tolist()
        [nan, 0.5]
    """

    reductions: ClassVar[dict[str, Reduction]] = {"samples": "sum", "turns": "sum"}
    value_dims: ClassVar[dict[str, tuple[str, ...]]] = {"pathway_complexity": ()}

    def __init__(
        self,
        embeddings: Sequence[Tensor] | None = None,
        k: int | float = 2,
        of: Of = "weights",
        sample: Literal["row", "token"] = "row",
        every: int = 1,
        **options: object,
    ):
        super().__init__(k, of, sample, every, **options)
        if embeddings is not None and (len(embeddings) < 2 or len({one.shape[-1] for one in embeddings}) > 1):
            shapes = [tuple(one.shape) for one in embeddings]
            raise MeasureError(f"embeddings (expert, width) of at least two layers, of one width, not {shapes}")
        self.embeddings = None if embeddings is None else tuple(one.detach().float() for one in embeddings)

    def at(self, sites: Sequence[Site]) -> Measure:
        """With the rows of the sites' routers, where no embeddings were given."""
        if self.embeddings is None and len(sites) < 2:
            raise MeasureError(f"PathwayConsistency compares neighbouring layers, and there is only {sites[0].name}")
        if self.embeddings is not None or self.of == "units":
            return self
        return PathwayConsistency(_router_rows(sites), self.k, self.of, self.sample, self.every)

    def site_statistics(
        self, x: Sequence[Tensor], mask: Tensor | None = None, tokens: Tensor | None = None
    ) -> dict[str, Tensor]:
        """samples, those of which a cosine exists, and turns, sums of 1 - cos; both (site)."""
        if self.embeddings is None:
            raise MeasureError(
                "PathwayConsistency(embeddings) takes one tensor (expert, width) for each of two sites or more"
            )
        if [one.shape[-1] for one in x] != [len(one) for one in self.embeddings]:
            raise MeasureError(
                f"the sites have {[one.shape[-1] for one in x]} units and embeddings were given for "
                f"{[len(one) for one in self.embeddings]}"
            )
        chosen = self._choices(x, mask)
        vectors = []
        for layer, table in enumerate(self.embeddings):
            table = table.to(chosen.weight)
            weight = chosen.weight[:, layer].masked_fill(chosen.unit[:, layer] < 0, 0.0)
            vectors.append((table[chosen.unit[:, layer].clamp_min(0)] * weight[..., None]).sum(1))
        e_LND = torch.stack(vectors)
        norm_LN = torch.linalg.vector_norm(e_LND, dim=-1)
        cosine = (e_LND[1:] * e_LND[:-1]).sum(-1) / (norm_LN[1:] * norm_LN[:-1])
        there = (norm_LN[1:] > 0) & (norm_LN[:-1] > 0)
        turns = double((1 - cosine).where(there, 0.0)).sum(1)
        zero = torch.zeros(1, device=turns.device)
        return {"samples": torch.cat([zero.long(), there.sum(1)]), "turns": torch.cat([zero.to(turns), turns])}

    def values(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See the class."""
        return {"pathway_complexity": ratio(stats["turns"], stats["samples"])}


def expert_embeddings(model: Model, sites: str = "blocks.*.moe.router") -> list[Tensor]:
    """The row of each expert in the matrix of its router, a tensor (expert, d_model) for each site.

    Raises:
        SiteError: a model without routers.
        MeasureError: a site that is none.
    """
    return _router_rows(model.match(sites))


def _router_rows(sites: Sequence[Site]) -> list[Tensor]:
    found = []
    for site in sites:
        weight = getattr(getattr(site.address, "module", None), "weight", None)
        if "expert" not in site.dims or weight is None:
            raise MeasureError(f"{site.name} is no router, and its experts have no rows")
        found.append(weight.detach())
    return found


def _hash(symbols_NM: Tensor) -> Tensor:
    """A number from 0 to 2**63 for each row, the same for the same row and else as if drawn, (N)."""
    return row_hashes(symbols_NM) & 0x7FFFFFFFFFFFFFFF
