"""How a mixture of experts shares out its tokens, and how sure its router is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..core.measure import Measure, Reduction, double, ratio, real_tokens

if TYPE_CHECKING:
    from ..core.sites import Site


class ExpertLoad(Measure):
    r"""How the choices of a router spread over the experts.

    Over real tokens, from the combine weights of E experts, which are zero where an expert was not chosen:

    - ``load``: for each expert its share of all choices, :math:`f_e`; ``importance``: its share of all weight
    - ``load_entropy``: :math:`-\sum_e f_e \log f_e / \log E`, 1 when all are chosen alike and 0 when one is
    - ``load_cv``: standard deviation of :math:`f_e` over their mean
    - ``max_load``: :math:`E \max_e f_e`, how many times its fair share the busiest expert takes
    - ``dead_experts``: share of experts that no token chose
    - ``experts_per_token``: mean number of experts that a token chose

    Shapes: x (\*stack, batch, pos, expert), at ``blocks.*.moe.weights``; load and importance (\*stack, expert), the
    others (\*stack). NaN where nothing was chosen.

    Source: load and importance, and their coefficient of variation, after Shazeer et al. 2017, Outrageously Large
    Neural Networks (section 4); entropy of the load is standard.

    Example:
        >>> load = ExpertLoad()
        >>> load.update(torch.tensor([[[0.5, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]]))
        >>> got = load.compute()
        >>> [round(one, 3) for one in got["load"].tolist()], float(got["dead_experts"])
        ([0.667, 0.333, 0.0, 0.0], 0.5)
    """

    reductions: ClassVar[dict[str, Reduction]] = {"tokens": "sum", "chosen": "sum", "weight": "sum"}
    value_dims: ClassVar[dict[str, tuple[str, ...]]] = {
        "load": ("unit",),
        "importance": ("unit",),
        "load_entropy": (),
        "load_cv": (),
        "max_load": (),
        "dead_experts": (),
        "experts_per_token": (),
    }

    def fits(self, site: Site) -> str | None:
        """Combine weights, which say what was chosen."""
        if site.local.endswith("moe.weights"):
            return None
        return "it reads which experts were chosen; take blocks.*.moe.weights"

    def site_statistics(self, x: Tensor, mask: Tensor | None = None, tokens: Tensor | None = None) -> dict[str, Tensor]:
        """tokens: (); chosen: times each was chosen, and weight: sum of its weights, (expert)."""
        found = real_tokens(x, mask)
        return {
            "tokens": found.count,
            "chosen": (found.x != 0).sum((0, 1)),
            "weight": found.x.sum((0, 1), dtype=torch.float32 if x.device.type == "mps" else torch.float64),
        }

    def values(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See the class."""
        chosen = double(stats["chosen"])
        whole, experts = chosen.sum(-1, keepdim=True), chosen.shape[-1]
        load = chosen / whole
        some = whole[..., 0] > 0
        # One expert is always chosen alike: the limit of 0 / 0.
        entropy = torch.special.entr(load).sum(-1) / math.log(experts) if experts > 1 else torch.ones_like(load[..., 0])
        return {
            "load": load,
            "importance": ratio(stats["weight"], stats["weight"].sum(-1, keepdim=True)),
            "load_entropy": entropy.where(some, torch.nan),
            "load_cv": load.std(-1, correction=0) * experts,
            "max_load": load.amax(-1) * experts,
            "dead_experts": double(chosen == 0).mean(-1).where(some, torch.nan),
            "experts_per_token": ratio(whole[..., 0], stats["tokens"]),
        }


class RouterEntropy(Measure):
    r"""How sure a router is of its choices, and how much they tell tokens apart.

    With :math:`p_t` the softmax of the router's logits over E experts, means over real tokens of

    - ``router_entropy``: :math:`H(p_t) / \log E`, from 0 (sure) to 1 (indifferent)
    - ``router_confidence``: :math:`\max_e p_{te}`; ``router_margin``: largest minus second largest
    - ``router_z``: :math:`(\log \sum_e \exp z_{te})^2`, which the z-loss keeps small
    - ``router_information``: :math:`(H(\bar p) - \overline{H(p_t)}) / \log E`, what the choice of an expert tells of
      the token: 0 when every token is routed alike, 1 when each is sent surely and all experts are used alike

    Shapes: x (\*stack, batch, pos, expert), at ``blocks.*.moe.router``, at least two experts; every value (\*stack).
    A router that scores by something else than a softmax is read as if it did.

    Source: z-loss of Zoph et al. 2022, ST-MoE (equation 5); mutual information is standard.

    Example:
        >>> entropy = RouterEntropy()
        >>> entropy.update(torch.tensor([[[9.0, -9.0], [-9.0, 9.0]]]))
        >>> {name: round(float(value), 2) for name, value in entropy.compute().items() if "z" not in name}
        {'router_entropy': 0.0, 'router_confidence': 1.0, 'router_margin': 1.0, 'router_information': 1.0}
    """

    reductions: ClassVar[dict[str, Reduction]] = {
        "tokens": "sum",
        "entropy": "sum",
        "confidence": "sum",
        "margin": "sum",
        "square_z": "sum",
        "probability": "sum",
    }
    value_dims: ClassVar[dict[str, tuple[str, ...]]] = {
        "router_entropy": (),
        "router_confidence": (),
        "router_margin": (),
        "router_z": (),
        "router_information": (),
    }

    def fits(self, site: Site) -> str | None:
        """Router logits of two or more experts."""
        if not site.local.endswith("moe.router"):
            return "it reads the logits of a router; take blocks.*.moe.router"
        return "one expert leaves nothing to choose" if site.size("expert") == 1 else None

    def site_statistics(self, x: Tensor, mask: Tensor | None = None, tokens: Tensor | None = None) -> dict[str, Tensor]:
        """tokens: count; probability: (expert); the others sums over tokens, ()."""
        found = real_tokens(x, mask)
        log_z = found.x.logsumexp(-1)
        p = (found.x - log_z[..., None]).exp_()
        two = p.topk(2, -1).values
        keep = torch.ones_like(log_z, dtype=torch.bool) if found.keep is None else found.keep

        def total(of: Tensor) -> Tensor:
            return double(of.where(keep, 0.0)).sum()

        return {
            "tokens": found.count,
            "entropy": total(torch.special.entr(p).sum(-1)),
            "confidence": total(two[..., 0]),
            "margin": total(two[..., 0] - two[..., 1]),
            "square_z": total(log_z.square()),
            "probability": double(p.where(keep[..., None], 0.0)).sum((0, 1)),
        }

    def values(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See the class."""
        n = stats["tokens"]
        p = ratio(stats["probability"], n[..., None])
        scale = math.log(p.shape[-1])
        entropy = ratio(stats["entropy"], n) / scale
        return {
            "router_entropy": entropy,
            "router_confidence": ratio(stats["confidence"], n),
            "router_margin": ratio(stats["margin"], n),
            "router_z": ratio(stats["square_z"], n),
            "router_information": torch.special.entr(p).sum(-1) / scale - entropy,
        }
