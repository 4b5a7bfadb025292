"""How early each layer's activations reach their final form, and how much of their rank its weights use.

Letters: N tokens, D width of a site, O and I outputs and inputs of a matrix, H heads, K head width.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from actome.core.errors import MeasureError
from actome.dynamics.trace_inputs import on_device
from actome.dynamics.trace_sources import checkpoints
from actome.dynamics.trace_table import Trace
from actome.measures.cka import LinearCKA

if TYPE_CHECKING:
    import pandas as pd

    from actome.core.model import Model

_VALUES = ("v_proj", "value", "v", "w_v", "v_lin")


@dataclass(frozen=True)
class Converged:
    """How the sites of one training converged.

    Attributes:
        trace: ``convergence`` (CKA with the final state) by site and step; ``weight_rank_share`` and
            ``update_rank_share``, the proportional effective rank of the site's output weights and of their change
            since the step before, for sites that have such weights.
        summary: one row a site: layer, ``early`` (mean convergence over the steps of the first fifth of the training,
            the start left out), ``t90`` (share of the training after which the convergence stays above the threshold),
            ``low`` and ``high`` (the steps on either side, as shares), ``roughness`` (way of the curve beyond its net
            change), ``weight_rank_share`` (mean over the training).
        threshold: of ``t90``.
    """

    trace: Trace
    summary: pd.DataFrame = field(repr=False)
    threshold: float

    def rank_correlation(
        self, value: str = "t90", *, permutations: int = 999, resamples: int = 1000, seed: int = 0
    ) -> dict[str, float]:
        """Spearman's correlation over sites of the weights' rank share with a column of `summary`; see `associated`."""
        return associated(self.summary["weight_rank_share"], self.summary[value], permutations, resamples, seed)


class Convergence:
    r"""Compares activations at every checkpoint with those of the last one.

    :math:`c(t)` is the linear CKA of :math:`A_t` and :math:`A_T`, the activations of the same tokens, debiased, so that
    few tokens do not flatter wide layers. The last step, which is 1 by definition, is no part of any mean.

    Args:
        sites: patterns; by default what attention and MLP of each block add.
        debiased: take the debiased estimate of CKA; the biased one for comparing with the paper.
        threshold: of ``t90``.

    Source: Diehl Martinez et al. 2024, Tending Towards Stability: Convergence Challenges in Small Language Models.
    There CKA is the biased one, and the weights are those of OV circuits and of the MLP's down projection.

    Example:
        >>> from actome.tasks.nets import MLP
        >>> nets = {step: MLP([4, 8, 8, 2], seed=0) for step in range(4)}
        >>> with torch.no_grad():
        ...     for step, net in nets.items():
        ...         _ = [w.mul_(1 + (3 - step) * torch.rand(w.shape)) for w in net.parameters()]
        >>> x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
        >>> found = Convergence("module:act.*").trace(nets, x)
        >>> float(found.trace.curve("convergence", "module:act.0")[3])
        1.0
    """

    def __init__(
        self,
        sites: str | Sequence[str] = ("blocks.*.attn.out", "blocks.*.mlp.out"),
        *,
        debiased: bool = True,
        threshold: float = 0.9,
    ):
        if not 0 < threshold < 1:
            raise MeasureError(f"threshold={threshold}: give a share between 0 and 1")
        self.sites = [sites] if isinstance(sites, str) else list(sites)
        self.debiased, self.threshold = debiased, threshold

    def trace(self, source: Any, probes: Any, **options: Any) -> Converged:
        """The convergence of every site over a training; the last checkpoint is opened first, the others one by one.

        Args:
            source, options: as `actome.dynamics.checkpoints` takes them.
            probes: what every checkpoint reads: token ids or other inputs as a tensor, a dict of forward arguments, or
                an iterable of either.

        Raises:
            MeasureError: fewer than three checkpoints, or fewer than four tokens.
            LoadError: as `trace` raises it.
        """
        found = checkpoints(source, **options)
        if len(found.items) < 3:
            raise MeasureError(f"{found.label} has {len(found.items)} checkpoints; convergence needs three or more")
        batches = [probes] if isinstance(probes, Tensor | dict) else list(probes)
        last, rows = found.items[-1], []
        final = self._activations(last.open(), batches)
        if last.fresh:
            gc.collect()
        before: dict[str, Weights] = {}
        for one in found.items:
            model = one.open()
            now = final if one is last else self._activations(model, batches)
            weights = {site.name: output_weights(model, site.name) for site in self._sites(model)}
            for site in self._sites(model):
                place = {"step": one.step, "site": site.name, "layer": site.layer}
                value = 1.0 if one is last else self._cka(now[site.name], final[site.name], site.name)
                rows.append({**place, "measure": "convergence", "value": value})
                rows += _ranks(place, weights[site.name], before.get(site.name))
            before = weights
            del model, now
            if one.fresh:
                gc.collect()  # a wrapped module is part of cycles, and only one is to be in memory
        import pandas as pd

        trace = Trace(pd.DataFrame(rows), {"source": found.label, "panel": "convergence"})
        return Converged(trace, _summary(trace, self.threshold), self.threshold)

    def _sites(self, model: Model) -> tuple[Any, ...]:
        return model.match(self.sites)

    def _activations(self, model: Model, batches: Iterable[Any]) -> dict[str, Tensor]:
        """The activations of each site, (N, D), on the CPU."""
        parts: dict[str, list[Tensor]] = {}
        for batch in batches:
            recording = model.record(on_device(batch, model.device), self.sites, device="cpu")
            for site in self._sites(model):
                x = recording[site.name]
                x = x.flatten(2) if x.ndim > 3 else x
                mask = recording.mask
                kept = x[mask.cpu()] if mask is not None and x.ndim == 3 else x.flatten(0, -2)
                parts.setdefault(site.name, []).append(kept.float())
        return {name: torch.cat(some) for name, some in parts.items()}

    def _cka(self, now_ND: Tensor, final_ND: Tensor, site: str) -> float:
        if now_ND.shape != final_ND.shape:
            raise MeasureError(
                f"{site} has the shape {tuple(now_ND.shape)} here and {tuple(final_ND.shape)} at the last step; the "
                "checkpoints are of several architectures, or the probes of several lengths"
            )
        cka = LinearCKA()
        # Taking the first row away changes no CKA, and keeps fourth powers small where there is a large mean.
        cka.update(now_ND.double() - now_ND[:1].double(), final_ND.double() - final_ND[:1].double())
        return float(cka.compute()["cka" if self.debiased else "cka_biased"])


def effective_rank(weight: Tensor, proportional: bool = False) -> float:
    r"""Effective rank of a matrix: :math:`\exp(-\sum_k p_k \ln p_k)` of its singular values' shares.

    Args:
        weight: (O, I), of any precision.
        proportional: over min(O, I), so that matrices of different sizes compare.

    Source: Roy and Vetterli 2007, The Effective Rank; its proportional form Diehl Martinez et al. 2024.

    >>> effective_rank(torch.eye(4)), effective_rank(torch.ones(4, 8), proportional=True)
    (4.0, 0.25)
    """
    if weight.ndim != 2:
        raise MeasureError(f"the rank of a matrix is asked for, and this has the shape {tuple(weight.shape)}")
    values = torch.linalg.svdvals(weight.detach().double().cpu())
    total = float(values.sum())
    if not total > 0 or not math.isfinite(total):
        return math.nan
    share = values / total
    rank = float(torch.special.entr(share).sum().exp())
    return round(rank / min(weight.shape) if proportional else rank, 12)


class Weights(NamedTuple):
    """Matrices that write to a site, (O, I) each and on the CPU, and the largest rank that one of them can have."""

    matrices: list[Tensor]
    most: int


def output_weights(model: Model, site: str) -> Weights:
    """The matrices that make what a site holds: of attention W_V W_O for each head, else the last linear map.

    There are none where a site has no weights of its own, as a nonlinearity has none.
    """
    (found,) = model.match(site)
    module = getattr(found.address, "module", None)
    own = _weight(module) if isinstance(module, nn.Module) else None
    if own is not None:
        return Weights([own], min(own.shape))
    if not isinstance(module, nn.Module):
        return Weights([], 0)
    linear = [(name.rpartition(".")[2], one) for name, one in module.named_modules() if _weight(one) is not None]
    if not linear:
        return Weights([], 0)
    output = linear[-1][1]
    values = next((one for name, one in linear if name in _VALUES), None)
    if values is not None and values is not output and found.local.endswith("attn.out"):
        return _per_head(_weight(values), _weight(output), int(model.info.get("head", 1)))  # type: ignore[arg-type]
    weight = _weight(output)
    assert weight is not None
    return Weights([weight], min(weight.shape))


def _weight(module: nn.Module) -> Tensor | None:
    """The matrix of a linear map, (O, I), copied to the CPU so that a later checkpoint does not change it."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or isinstance(module, nn.Embedding):
        return None
    weight = weight.detach().to("cpu", torch.float32, copy=True)
    return weight.T if type(module).__name__ == "Conv1D" else weight  # GPT-2's are (inputs, outputs)


def _per_head(value_OI: Tensor, output_OI: Tensor, heads: int) -> Weights:
    """W_V W_O of each head; heads that share values take the ones of their group."""
    width = output_OI.shape[1] // heads
    groups = value_OI.shape[0] // width
    if not groups or value_OI.shape[0] != groups * width or heads % groups:
        return Weights([output_OI], min(output_OI.shape))
    shared = heads // groups
    products = [
        output_OI[:, h * width : (h + 1) * width] @ value_OI[h // shared * width : (h // shared + 1) * width]
        for h in range(heads)
    ]
    return Weights(products, width)


def _ranks(place: dict[str, Any], weights: Weights, before: Weights | None) -> list[dict[str, Any]]:
    """Rank shares of weights, mean over heads, and of how they changed since the step before."""
    rows = []
    changes = [] if before is None else [now - then for now, then in zip(weights[0], before[0], strict=True)]
    # The change of a product of two has up to twice the rank of one.
    most = {"weight_rank_share": weights.most, "update_rank_share": 0}
    if changes:
        most["update_rank_share"] = min(2 * weights.most, *changes[0].shape) if len(changes) > 1 else weights.most
    for name, some in (("weight_rank_share", weights.matrices), ("update_rank_share", changes)):
        if some:
            value = float(np.mean([effective_rank(one) for one in some])) / most[name]
            rows.append({**place, "measure": name, "value": value})
    return rows


def _summary(trace: Trace, threshold: float) -> pd.DataFrame:
    import pandas as pd

    whole = trace.steps[-1] - trace.steps[0]
    rows = []
    ranked = "weight_rank_share" in trace.measures
    for curve in trace.each("convergence"):
        share = (curve.x - trace.steps[0]) / whole
        low, high, at = _stays(share, curve.y, threshold)
        early = (share > 0) & (share <= 0.2) & (share < 1)
        steps = np.diff(curve.y)
        site = curve.at["site"]
        ranks = trace.frame[(trace.frame["measure"] == "weight_rank_share") & (trace.frame["site"] == site)]
        rows.append(
            {
                "site": site,
                "layer": curve.at["layer"],
                "early": float(curve.y[early].mean()) if early.any() else math.nan,
                "t90": at,
                "low": low,
                "high": high,
                "roughness": float(np.abs(steps).sum() - abs(curve.y[-1] - curve.y[0])),
                "weight_rank_share": float(ranks["value"].mean()) if ranked and len(ranks) else math.nan,
            }
        )
    return pd.DataFrame(rows).astype({"layer": "Int64"})


def _stays(share: np.ndarray, y: np.ndarray, threshold: float) -> tuple[float, float, float]:
    """The shares on either side of where a curve rises above a threshold for good, and where on the line between."""
    below = np.flatnonzero(y <= threshold)
    if not len(below):
        return float(share[0]), float(share[0]), float(share[0])
    i = int(below[-1])
    if i + 1 >= len(y):
        return math.inf, math.inf, math.inf
    at = share[i] + (threshold - y[i]) / (y[i + 1] - y[i]) * (share[i + 1] - share[i])
    return float(share[i]), float(share[i + 1]), float(at)


def associated(
    a: Any, b: Any, permutations: int = 999, resamples: int = 1000, seed: int = 0, level: float = 0.95
) -> dict[str, float]:
    """Spearman's correlation of pairs with a bootstrap interval over the pairs and a two-sided permutation p.

    >>> found = associated([1, 2, 3, 4, 5, 6], [2, 1, 4, 3, 6, 5])
    >>> round(found["rho"], 2), found["p"] < 0.1, found["low"] < found["rho"] < found["high"]
    (0.83, True, True)
    """
    from actome.tasks.trials import spearman

    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    keep = np.isfinite(a) & np.isfinite(b)
    a, b = a[keep], b[keep]
    if len(a) < 3:
        raise MeasureError(f"a correlation needs three pairs, and there are {len(a)}")
    rng = np.random.default_rng(seed)
    rho = spearman(a, b)
    drawn = rng.integers(0, len(a), (resamples, len(a)))
    values = [spearman(a[i], b[i]) for i in drawn]
    low, high = np.nanquantile(values, [(1 - level) / 2, (1 + level) / 2])
    null = [abs(spearman(a, rng.permutation(b))) for _ in range(permutations)]
    p = (1 + sum(one >= abs(rho) - 1e-12 for one in null)) / (1 + permutations)
    return {"rho": rho, "low": float(low), "high": float(high), "p": float(p), "pairs": float(len(a))}
