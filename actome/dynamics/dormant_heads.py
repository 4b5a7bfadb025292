"""Heads that idle on one kind of query, what they park their attention on, and how that comes about in training.

Where a head has nothing to do, softmax still makes it look somewhere: at the first token, whose value shrinks so that
looking there adds nothing, and whose norm in the stream may rise. The two feed each other, so the scores of the first
token go on growing, ever more slowly.

Source: Guo et al. 2024, "Active-Dormant Attention Heads: Mechanistically Demystifying Extreme-Token Phenomena in LLMs".

Dims: N sequences, T position, H head, Q query, S key, C domain.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actome.clamps import Ablate
from actome.core.errors import MeasureError
from actome.core.load import wrap
from actome.core.model import Model
from actome.dynamics.walk import over_runs
from actome.measures.drains import ResidualPeak, ValueDrain
from actome.measures.heads import DormantHeads

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class ExtremeTokens:
    """Attention sink, value drain, residual peak and logit gap, with queries sorted by domain.

    Args:
        domains: names of the domains that labels stand for.
        eps: of `DormantHeads`; 0.2 suits models of one or two layers.
        normalise: make the weights of a query sum to one first, for attention that does not (ReLU, sigmoid); a query
            with no weight at all stays at zero.
        batch_size: sequences a forward.

    >>> import actome as ac
    >>> tokens = torch.arange(40).view(2, 20)
    >>> frame = ExtremeTokens(("even", "odd")).measure(ac.demo(), tokens, tokens % 2)
    >>> len(frame), {"sink even", "uniform odd", "logit_gap odd", "value_drain", "residual_peak"} <= set(frame)
    (16, True)
    """

    domains: tuple[str, ...]
    eps: float = 0.3
    normalise: bool = False
    batch_size: int = 64

    def measure(self, model: Model, tokens: Tensor, labels: Tensor) -> pd.DataFrame:
        """The measures of one model.

        Args:
            tokens: (sequences, pos) without padding, the first token of each being the one that attention parks on.
            labels: (sequences, pos) integers, the domain of every query; -1 leaves out. The first token is left out
                always: it sees nothing else.

        Returns:
            One row for each head: ``layer``, ``head``; for each domain ``sink NAME``, the mean weight on the first
            token, ``uniform NAME``, what an even spread over the past would give, ``dormant_rate NAME``, see
            `DormantHeads`, and ``logit_gap NAME``, the first token's score less the mean of the others' in sight;
            ``value_drain``, see `ValueDrain` (of the head's key and value group where heads share them), and
            ``residual_peak`` after the layer, see `ResidualPeak`.

        Raises:
            MeasureError: labels of another shape or of domains that are not there.
            SiteError: the model has no attention or residual stream.
        """
        import pandas as pd

        labels = _checked(tokens, labels, self.domains)
        patterns = model.match("blocks.*.attn.pattern")
        dormant = [DormantHeads(self.domains, eps=self.eps) for _ in patterns]
        sinks, gaps = ([_ByDomain(len(self.domains)) for _ in patterns] for _ in range(2))
        scores = [site.name.replace("pattern", "scores") for site in patterns]
        for rows, of in _batches(tokens, labels, self.batch_size):
            recording = model.record(rows, [*(site.name for site in patterns), *scores])
            for i, site in enumerate(patterns):
                pattern_NHQS = recording[site.name].double()
                if self.normalise:
                    pattern_NHQS = pattern_NHQS / pattern_NHQS.sum(-1, keepdim=True).clamp_min(1e-9)
                dormant[i].update(pattern_NHQS, domains=of)
                sinks[i].update(pattern_NHQS[..., 0], of)
                gaps[i].update(_logit_gap(recording[scores[i]]), of)
        measures = {"blocks.*.attn.v": ValueDrain(), "blocks.*.resid.post": ResidualPeak()}
        table = model.measure(tokens, measures, batch_size=self.batch_size)
        drain, peak = table.value("value_drain"), table.value("residual_peak")
        share_T = 1 / torch.arange(1, tokens.shape[1] + 1, dtype=torch.float64)
        uniform_C = [float(share_T.expand(labels.shape)[labels == c].mean()) for c in range(len(self.domains))]
        rows = []
        for i, site in enumerate(patterns):
            sink_CH, gap_CH, rate_CH = sinks[i].mean(), gaps[i].mean(), dormant[i].compute()["dormant_rate"]
            heads = sink_CH.shape[1]
            for head in range(heads):
                row = {"layer": site.layer, "head": head}
                for c, name in enumerate(self.domains):
                    row[f"sink {name}"] = float(sink_CH[c, head])
                    row[f"uniform {name}"] = uniform_C[c]
                    row[f"dormant_rate {name}"] = float(rate_CH[c, head])
                    row[f"logit_gap {name}"] = float(gap_CH[c, head])
                row["value_drain"] = float(drain[i, head * drain.shape[1] // heads])
                row["residual_peak"] = float(peak[i])
                rows.append(row)
        return pd.DataFrame(rows)

    def trace(self, runs: Any, tokens: Tensor, labels: Tensor) -> pd.DataFrame:
        """The same over checkpoints.

        Args:
            runs: one run or a list of runs of the same steps, each a `Training`, modules or models by step, or an
                iterator of (step, module).
            tokens, labels: as in `measure`.

        Returns:
            The rows of `measure` behind columns ``run`` and ``step``.
        """
        import pandas as pd

        def look(module: Any) -> pd.DataFrame:
            return self.measure(module if isinstance(module, Model) else wrap(module), tokens, labels)

        steps, found = over_runs(runs, look)
        parts = [
            frame.assign(run=i, step=step)
            for i, run in enumerate(found)
            for step, frame in zip(steps, run, strict=True)
        ]
        frame = pd.concat(parts, ignore_index=True)
        return frame[["run", "step", *frame.columns.drop(["run", "step"])]]


class _ByDomain:
    """The mean of a number that each head has at each query, (domain, head), over the queries of each domain."""

    def __init__(self, domains: int):
        self.total: Any = torch.zeros(domains, 1, dtype=torch.float64)
        self.count = torch.zeros(domains, 1, dtype=torch.float64)

    def update(self, values_NHQ: Tensor, labels_NQ: Tensor) -> None:
        of_NQC = torch.stack([labels_NQ == c for c in range(len(self.count))], -1).double()
        self.total = self.total + torch.einsum("nhq,nqc->ch", values_NHQ.double().cpu(), of_NQC)
        self.count = self.count + of_NQC.sum((0, 1))[:, None]

    def mean(self) -> Tensor:
        return self.total / self.count


def _logit_gap(scores_NHQS: Tensor) -> Tensor:
    """The first token's score less the mean of the others in sight, (n, head, query)."""
    later_QS = torch.ones(scores_NHQS.shape[-2:], dtype=torch.bool, device=scores_NHQS.device).tril()
    later_QS[:, 0] = False
    scores_NHQS = scores_NHQS.double()
    others_NHQ = scores_NHQS.masked_fill(~later_QS, 0.0).sum(-1) / later_QS.sum(-1).clamp_min(1)
    return scores_NHQS[..., 0] - others_NHQ


@torch.no_grad()
def ablation_by_query(
    model: Model, tokens: Tensor, labels: Tensor, domains: Sequence[str], sites: str = "blocks.*.attn.z",
    batch_size: int = 64,
) -> pd.DataFrame:  # fmt: skip
    """How much the loss after the queries of each domain rises when one head's output is set to zero.

    What `head_ablation_by_domain` is for whole texts, for queries of several domains within one text.

    Args:
        tokens, labels: as in `ExtremeTokens.measure`.
        domains: names that labels stand for.
        sites: the heads' outputs.

    Returns:
        One row for each head: ``layer``, ``head``, and for each domain ``NAME loss`` of the whole model and
        ``NAME rise``, in nats.
    """
    import pandas as pd

    labels = _checked(tokens, labels, domains)
    whole = _loss_by_domain(model, tokens, labels, len(domains), batch_size)
    rows = []
    for site in model.match(sites):
        if "head" not in site.dims:
            raise MeasureError(f"{site.name} has no heads (its dims are {', '.join(site.dims)}); take attn.z")
        for head in range(site.size("head") or 0):
            with model.clamp(Ablate(site.name, "zero", heads=[head])):
                without = _loss_by_domain(model, tokens, labels, len(domains), batch_size)
            rises = {f"{name} rise": without[c] - whole[c] for c, name in enumerate(domains)}
            losses = {f"{name} loss": whole[c] for c, name in enumerate(domains)}
            rows.append({"layer": site.layer, "head": head, **losses, **rises})
    return pd.DataFrame(rows)


def _loss_by_domain(model: Model, tokens: Tensor, labels: Tensor, domains: int, batch_size: int) -> list[float]:
    total, count = torch.zeros(domains, dtype=torch.float64), torch.zeros(domains, dtype=torch.float64)
    for rows, of in _batches(tokens, labels, batch_size):
        log_p = model.logits(rows)[:, :-1].double().log_softmax(-1).cpu()
        loss_NT = -log_p.gather(-1, rows[:, 1:, None].cpu())[..., 0]
        for c in range(domains):
            here = of[:, :-1] == c
            total[c] += loss_NT[here].sum()
            count[c] += here.sum()
    return (total / count).tolist()


def _checked(tokens: Tensor, labels: Tensor, domains: Sequence[str]) -> Tensor:
    if isinstance(domains, str) or not domains:
        raise MeasureError(f"domains is {domains!r}; give their names, such as ('ordinary', 'trigger')")
    if tokens.ndim != 2 or labels.shape != tokens.shape or labels.is_floating_point():
        raise MeasureError(
            f"labels are integers in the shape of the tokens (sequences, pos), not {labels.dtype} "
            f"{tuple(labels.shape)} for {tuple(tokens.shape)}"
        )
    labels = labels.long().cpu().clone()
    labels[:, 0] = -1
    for c, name in enumerate(domains):
        if not bool((labels == c).any()):
            raise MeasureError(f"no query is labelled {c} ({name!r}); every domain needs some behind the first token")
    return labels


def _batches(tokens: Tensor, labels: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(tokens), size):
        yield tokens[start : start + size], labels[start : start + size]
