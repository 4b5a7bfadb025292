"""Experts: which of them come with a behaviour, and what is left of it without them.

Letters: L routers, one a layer, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from actome.clamps import Mask
from actome.core.clamp import Clamp
from actome.core.clamping import Place
from actome.core.errors import ClampError, MeasureError

from .contrast import Examples
from .states import Over, chosen_tokens

if TYPE_CHECKING:
    import pandas as pd

    from actome.core.model import Model

_OFF = -1e30


@dataclass(frozen=True, eq=False)
class Force(Clamp):
    """Has some experts chosen: raises their router logits to the k-th largest, so that they are among the top k.

    An expert that would have been chosen anyway keeps its logit.

    Args:
        experts: their indices.
        k: how many experts a token gets.
    """

    experts: tuple[int, ...] = ()
    k: int = 1

    def transform(self, x: Tensor, place: Place) -> Tensor:
        if len(self.experts) > self.k:
            raise ClampError(f"{place.site.name}: {len(self.experts)} experts cannot all be among the top {self.k}")
        if self.k >= x.shape[-1]:
            return x  # all are chosen anyway
        chosen = torch.tensor(list(self.experts), device=x.device)
        others = x.index_fill(-1, chosen, float("-inf"))
        # Of the others k less these may stay: the first of those that must go is what has to be passed.
        rank = self.k - len(self.experts)
        bound = others.topk(rank + 1, dim=-1).values[..., -1:]
        step = torch.finfo(x.dtype).eps * bound.abs().clamp_min(1.0) * 2
        return x.index_copy(-1, chosen, torch.maximum(x.index_select(-1, chosen), (bound + step).to(x.dtype)))


@dataclass(frozen=True, eq=False)
class TunedExperts:
    """Experts ranked by how much more often they are chosen when a behaviour is shown.

    Attributes:
        scores: (L, E), share of prompts (or tokens) that choose an expert, shown less not shown.
        usage: (L, E), mean share over both groups.
        sites: the routers' sites, in order.
        top: (router, expert) of the `n` highest scores, in order; the router as its place in `sites`.
        k: experts a token gets.
    """

    scores: Tensor
    usage: Tensor
    sites: tuple[str, ...]
    top: tuple[tuple[int, int], ...]
    k: int

    def suppress(self) -> list[Clamp]:
        """Takes them out of the choice, before it is made: others fill their places and share their weight."""
        return self._clamps(self.top, off=True)

    def stimulate(self) -> list[Clamp]:
        """Forces them in; of more than k in one layer those with the highest scores."""
        return self._clamps(self.top, off=False)

    def random(self, seed: int) -> TunedExperts:
        """The control: as many other experts in each layer, as alike in usage as there are.

        For each expert one is drawn from the four whose usage is nearest, so that it is not one that is never chosen.
        """
        generator = torch.Generator().manual_seed(seed)
        taken = set(self.top)
        drawn: list[tuple[int, int]] = []
        for layer, expert in self.top:
            free = [e for e in range(self.scores.shape[1]) if (layer, e) not in taken]
            if not free:
                raise MeasureError(f"layer {layer} has no expert left to draw a control from")
            near = sorted(free, key=lambda e: abs(float(self.usage[layer, e] - self.usage[layer, expert])))[:4]
            one = near[int(torch.randint(len(near), (1,), generator=generator))]
            taken.add((layer, one))
            drawn.append((layer, one))
        return TunedExperts(self.scores, self.usage, self.sites, tuple(drawn), self.k)

    @property
    def table(self) -> pd.DataFrame:
        """The chosen experts: site, expert, score, usage."""
        import pandas as pd

        rows = [
            (self.sites[layer], e, float(self.scores[layer, e]), float(self.usage[layer, e])) for layer, e in self.top
        ]
        return pd.DataFrame(rows, columns=["site", "expert", "score", "usage"])

    def _clamps(self, some: tuple[tuple[int, int], ...], off: bool) -> list[Clamp]:
        clamps: list[Clamp] = []
        for layer, site in enumerate(self.sites):
            mine = [expert for at, expert in some if at == layer]
            if not mine:
                continue
            if off:
                experts = self.scores.shape[1]
                if experts - len(mine) < self.k:
                    raise ClampError(f"{site}: {experts - len(mine)} experts would be left, and a token gets {self.k}")
                keep = torch.ones(experts, dtype=torch.bool)
                keep[mine] = False
                clamps.append(_Off(site, keep=keep))
            else:
                clamps.append(Force(site, experts=tuple(mine[: self.k]), k=self.k))
        return clamps


@dataclass(frozen=True, eq=False)
class _Off(Mask):
    """Router logits that cannot be chosen; a zero, which `Mask` writes elsewhere, could."""

    def transform(self, x: Tensor, place: Place) -> Tensor:
        keep = place.fit(self.keep, x, "keep")
        assert isinstance(keep, Tensor)
        return x.masked_fill(~keep.bool(), _OFF if x.dtype.itemsize > 2 else -6e4)


@dataclass(frozen=True)
class ExpertTuner:
    """Finds the experts of a mixture that come with a behaviour, from two groups of prompts.

    Args:
        n: how many to take, over all layers.
        site: the routers' sites.
        over: count the choice at the ``"last"`` token of a prompt, or the ``"mean"`` share over all of them.
        k: experts a token gets; as many as its router chooses unless given.
        batch_size: rows a forward.

    Source: Mixture of Tunable Experts (contrast of routed activations; suppression before the choice). Which tokens are
    counted, and the weight of a forced expert, are our readings.
    """

    n: int = 10
    site: str = "blocks.*.moe.router"
    over: Over = "last"
    k: int | None = None
    batch_size: int = 8

    def fit(self, model: Model, data: Examples) -> TunedExperts:
        """Scores all experts; positive examples are those that show the behaviour.

        Raises:
            SiteError: a model without routers.
            ClampError: a router that does not choose the experts with the highest logits, such as those of DeepSeek-V3,
                which add a correction to them first: what is done to logits does not decide its choice.
            MeasureError: more experts wanted than there are, or a model that does not say how many a token gets.
        """
        data = Examples.of(data)
        k = self.k or _per_token(model, self.site)
        shown, hidden = (self._chosen(model, some, k) for some in (data.positive, data.negative))
        scores, usage = shown - hidden, (shown + hidden) / 2
        if not 1 <= self.n <= scores.numel():
            raise MeasureError(f"n={self.n}: from 1 to {scores.numel()} experts")
        order = scores.flatten().argsort(descending=True, stable=True)[: self.n].tolist()
        top = tuple(divmod(at, scores.shape[1]) for at in order)
        return TunedExperts(scores, usage, tuple(site.name for site in model.match(self.site)), top, k)

    def _chosen(self, model: Model, prompts: object, k: int) -> Tensor:
        """(L, E): share of prompts, or of their tokens, that choose an expert."""
        places = model.match(self.site)
        marks = {site.name: site.name.removesuffix("router") + "chosen" for site in places}
        known = {site.name for site in model.table}
        total: list[Tensor] = [torch.zeros(site.sizes[-1] or 0, dtype=torch.float64) for site in places]
        rows = 0
        for batch, counted_BT in chosen_tokens(model, prompts, self.over, self.batch_size):
            told = [mark for mark in marks.values() if mark in known]
            recording = model.record(batch, [*(site.name for site in places), *told])
            weight_BT = counted_BT.double() / counted_BT.sum(1, keepdim=True)
            rows += len(weight_BT)
            for i, site in enumerate(places):
                logits_BTE = recording[site.name].float().cpu()
                top_BTC = logits_BTE.topk(k).indices
                if self.k is None and marks[site.name] in known:
                    _by_logits(site.name, recording[marks[site.name]].cpu(), top_BTC, logits_BTE, counted_BT)
                chosen = torch.zeros_like(logits_BTE, dtype=torch.float64).scatter_(-1, top_BTC, 1.0)
                total[i] += torch.einsum("bt,bte->e", weight_BT, chosen)
        return torch.stack(total) / rows


def _by_logits(name: str, chosen_BTC: Tensor, top_BTC: Tensor, logits_BTE: Tensor, counted_BT: Tensor) -> None:
    """Refuses a router whose choice is not that of its logits, beyond ties."""
    least_BT1 = logits_BTE.gather(-1, top_BTC).amin(-1, keepdim=True)
    below_BTC = logits_BTE.gather(-1, chosen_BTC.long()) < least_BT1 - 1e-4 * least_BT1.abs().clamp_min(1.0)
    if bool(below_BTC.any(-1)[counted_BT.cpu()].any()):
        raise ClampError(
            f"{name} does not choose the experts with the highest logits; its router adds something to them, or limits "
            "the choice to groups, so that experts cannot be taken out or forced in by their logits"
        )


def _per_token(model: Model, pattern: str) -> int:
    """How many experts a router chooses for a token."""
    for site in model.match(pattern):
        chosen = site.name.removesuffix("router") + "chosen"
        for other in model.table:
            if other.name == chosen and other.size("choice"):
                return int(other.size("choice"))  # type: ignore[arg-type]
    raise MeasureError(f"it is not known how many experts a token of {model.name} gets; give k=")
