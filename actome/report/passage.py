"""A passage of the text with values for every token: what the page's view of the text is drawn from.

Every measure takes leading stack dims, so one token an entry of the stack gives the values of any measure for each
token. What a single token says nothing of (a rank, a share that is the same everywhere) is left out.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actome.core.errors import ActomeError
from actome.core.measure import Measure
from actome.core.sites import Site
from actome.core.stream import canonical
from actome.core.table import MeasureResult
from actome.measures.findings import Thresholds
from actome.report.arrays import rounded
from actome.report.words import kind_of

if TYPE_CHECKING:
    from actome.core.model import Model

LENGTH = 192
_MOST_LAYERS = 24
_MOST_NUMBERS = 150_000  # about a megabyte
# A statistic of one token that is larger than this for each unit (a covariance, say) is not meant for one token.
_MOST_STATE = 16
# Mean attention over fewer queries than these is too noisy to be called a sink; excess as in `SinkScore`.
_QUERIES, _SINK = 32, 0.3
_DIGITS = 4
_TEXT_ONLY = {"input_ids", "attention_mask", "position_ids", "use_cache"}
# A measure that needs more than one token says so by one of these.
_REFUSALS = (ActomeError, RuntimeError, ValueError, IndexError, ZeroDivisionError)


class Peek:
    """Batches as they come, with the first one remembered: a stream may be read only once."""

    def __init__(self, batches: Iterable[Any]):
        self.batches, self.first = batches, None

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            if self.first is None:
                self.first = batch
            yield batch


def passage_of(
    model: Model, batch: Any, results: Iterable[MeasureResult], thresholds: Thresholds | None = None
) -> dict[str, Any] | None:
    """Reads the beginning of the first row of a batch again and takes values of every token.

    Args:
        model: the model.
        batch: what it was given first.
        results: what was measured: their measures at their sites give the values.
        thresholds: from which ratio on an activation is called massive.

    Returns:
        ``None`` when the batch is no text. Otherwise ``tokens`` (pieces of the text that join to it), ``values``: dicts
        with measure, kind (of the site), and for each of ``layers`` a list over tokens in ``values`` (a single list
        and no layers for values of the logits); ``massive``: position, layer, unit, ratio of tokens with massive
        activations; ``sinks``: position, layer, head and weight of what attention rests on.
    """
    if model.tokenizer is None or batch is None:
        return None
    arguments, ids, mask = model.arguments(batch)
    if ids is None or not {"input_ids"} <= set(arguments) <= {
        "input_ids",
        "attention_mask",
        "position_ids",
        "use_cache",
    }:
        return None
    row = ids[0] if mask is None else ids[0][mask[0]]
    row = row[:LENGTH]
    if len(row) < 2:
        return None
    reader = _Reader(row, thresholds or Thresholds())
    taps = [(site.address, tap, "read") for site, tap in reader.taps(list(results), model)]
    again, _, _ = model.arguments(row[None])
    with model.tap(taps), torch.no_grad():
        model.module(**again)
    reader.finish()
    return {
        "tokens": pieces(model.tokenizer, row.tolist()),
        "values": reader.entries(),
        "massive": sorted(reader.massive, key=lambda one: (one["position"], one["layer"])),
        "sinks": sorted(reader.sinks, key=lambda one: (one["position"], one["layer"], one["head"])),
    }


class _Reader:
    """Collects values by measure, kind of site and layer, in the order in which they were measured."""

    def __init__(self, row: Tensor, thresholds: Thresholds):
        self.row, self.thresholds = row.cpu(), thresholds
        self.found: dict[tuple[str, str], dict[int | None, Tensor]] = {}
        self.massive: list[dict[str, Any]] = []
        self.sinks: list[dict[str, Any]] = []
        self.refused: set[tuple[int, str]] = set()
        # Of measures that compare layers: what they made of each, and the states of the site before, by measure.
        self.depths: list[tuple[MeasureResult, list[Tensor]]] = []
        self.last: dict[int, Tensor] = {}

    def taps(self, results: list[MeasureResult], model: Model) -> Iterator[tuple[Site, Callable[[Tensor], None]]]:
        """For each site one function that takes all that is wanted there."""
        layers = sorted({site.layer for result in results for site in result.sites if site.layer is not None})
        step = max(1, math.ceil(len(layers) / _MOST_LAYERS))
        kept = {*layers[::step], *layers[-1:]}
        wanted: dict[str, tuple[Site, list[Callable[[Tensor], None]]]] = {}

        def add(site: Site, take: Callable[[Tensor], None]) -> None:
            wanted.setdefault(site.name, (site, []))[1].append(take)

        seen: set[tuple[str, str]] = set()
        for result in results:
            measure = result.measure
            by_token = "cat" not in measure.reductions.values() and () in measure.value_dims.values()
            if not by_token and measure.layout not in ("pattern", "logits"):
                continue
            states: list[Tensor] = []
            if measure.layout == "depth":
                self.depths.append((result, states))
            for site in result.sites:
                if measure.layout == "depth":
                    add(site, self._depth(measure, site, states))
                elif measure.layout == "tokens" and site.layer in kept and not site.name.endswith("resid.pre"):
                    add(site, self._single(measure, site))
                elif (once := (measure.layout, site.name)) not in seen:
                    seen.add(once)
                    if measure.layout == "pattern" and site.layer in kept and "cross" not in site.name:
                        add(site, self._attention(site))
                    elif measure.layout == "logits" and site.causal:
                        add(site, self._prediction)
        for site in [site for site, _ in wanted.values()]:
            if site.name.endswith("resid.post") and site.layer in kept:
                add(site, self._extremes(site))
        for site, takes in wanted.values():
            yield site, _all(takes)

    def _single(self, measure: Measure, site: Site) -> Callable[[Tensor], None]:
        def take(x: Tensor) -> None:
            key = (id(measure), kind_of(site.name))
            x_TU = canonical(x, site, "tokens")[0].detach().float().cpu()
            if key in self.refused or len(x_TU) != len(self.row):
                return
            values = _of_single_tokens(measure, x_TU)
            if values is None:
                self.refused.add(key)
                return
            for name, value in values.items():
                self._keep(name, site, value)

        return take

    def _depth(self, measure: Measure, site: Site, states: list[Tensor]) -> Callable[[Tensor], None]:
        def take(x: Tensor) -> None:
            x = canonical(x, site, "tokens").detach().float().cpu()
            states.append(measure.prepare(x, self.last.get(id(measure))))
            self.last[id(measure)] = x

        return take

    def _attention(self, site: Site) -> Callable[[Tensor], None]:
        def take(x: Tensor) -> None:
            pattern_HQS = x[0].detach().float().cpu()
            if pattern_HQS.shape[-2:] != (len(self.row), len(self.row)):
                return
            received_HS, excess_HS, queries_S = received(pattern_HQS, bool(site.causal))
            self._keep("attention_received", site, received_HS.mean(0))
            self._keep("attention_received_most", site, received_HS.amax(0))
            for head, position in ((excess_HS > _SINK) & (queries_S >= _QUERIES)).nonzero().tolist():
                weight = rounded(received_HS[head, position], _DIGITS)
                self.sinks.append({"position": position, "layer": site.layer, "head": head, "weight": weight})

        return take

    def _extremes(self, site: Site) -> Callable[[Tensor], None]:
        def take(x: Tensor) -> None:
            magnitude_TU = canonical(x, site, "tokens")[0].detach().float().cpu().abs()
            ratio_T = magnitude_TU.amax(-1) / magnitude_TU[magnitude_TU.isfinite()].median()
            for position in (ratio_T >= self.thresholds.massive_ratio).nonzero().flatten().tolist():
                self.massive.append(
                    {
                        "position": position,
                        "layer": site.layer,
                        "unit": int(magnitude_TU[position].argmax()),
                        "ratio": rounded(ratio_T[position], _DIGITS),
                    }
                )

        return take

    def _prediction(self, x: Tensor) -> None:
        # Of the token that stands there: how well, how surely and how narrowly it was foreseen.
        log_p_TV = x[0, :-1].detach().float().cpu().log_softmax(-1)
        nothing = torch.full((1,), torch.nan)
        loss = -log_p_TV.gather(-1, self.row[1:, None])[:, 0]
        entropy = torch.special.entr(log_p_TV.exp()).sum(-1)
        top = log_p_TV.topk(min(2, log_p_TV.shape[-1]), -1).values.exp()
        for name, value in (("token_loss", loss), ("token_entropy", entropy), ("token_margin", top[:, 0] - top[:, -1])):
            self.found[name, "logits"] = {None: torch.cat([nothing, value])}

    def _keep(self, name: str, site: Site, value_T: Tensor) -> None:
        self.found.setdefault((name, kind_of(site.name)), {})[site.layer] = value_T.double().cpu()

    def finish(self) -> None:
        """What compares layers with one another."""
        for result, states in self.depths:
            if len(states) != len(result.sites):
                continue
            x = torch.stack(states)  # (layer, k, 1, token)
            with contextlib.suppress(*_REFUSALS):
                singles = x.permute(3, 0, 1, 2).unsqueeze(-1).contiguous()
                values = result.measure.values(result.measure.statistics(singles))
                for name, value in values.items():
                    if result.measure.value_dims[name] == () and value.shape == (len(self.row), len(result.sites)):
                        for site, value_T in zip(result.sites, value.unbind(1), strict=True):
                            if site.layer is not None and not site.name.endswith("resid.pre"):
                                self._keep(name, site, value_T)

    def entries(self) -> list[dict[str, Any]]:
        """All values that differ from token to token, ready for JSON; those of most interest while there is room."""
        entries, room = [], _MOST_NUMBERS
        for (name, kind), by_layer in sorted(self._told().items(), key=lambda one: _interest(one[0][1])):
            room -= len(by_layer) * len(self.row)
            if room < 0:
                break
            lists = [[rounded(x, _DIGITS) for x in value.tolist()] for value in by_layer.values()]
            if None in by_layer:
                entries.append({"measure": name, "kind": kind, "values": lists[0]})
            else:
                entries.append({"measure": name, "kind": kind, "layers": list(by_layer), "values": lists})
        return entries

    def _told(self) -> dict[tuple[str, str], dict[int | None, Tensor]]:
        """What says something, and each only once: of one token, an error by tensor is the same as one by token."""
        told: dict[tuple[str, str], dict[int | None, Tensor]] = {}
        same: dict[tuple[str, bytes], str] = {}
        for (name, kind), by_layer in self.found.items():
            if not any(_tells(value) for value in by_layer.values()):
                continue
            content = (kind, torch.stack(list(by_layer.values())).numpy().tobytes())
            first = same.setdefault(content, name)
            if first != name:
                if "token" not in name or "token" in first:
                    continue
                del told[first, kind]
                same[content] = name
            told[name, kind] = by_layer
        return told


def _interest(kind: str) -> int:
    """Predictions come first, then the residual stream, then where attention goes."""
    order = ("logits", "resid.post", "attn.pattern", "mlp.act")
    return next((i for i, end in enumerate(order) if kind.endswith(end)), len(order))


def _all(takes: list[Callable[[Tensor], None]]) -> Callable[[Tensor], None]:
    def take(x: Tensor) -> None:
        for one in takes:
            one(x)

    return take


def _of_single_tokens(measure: Measure, x_TU: Tensor) -> dict[str, Tensor] | None:
    """The scalar values of each token alone; ``None`` for a measure that says nothing of one token."""
    try:
        probe = measure.statistics(x_TU[:1, None, None, :])
        if sum(part.numel() for part in probe.values()) > _MOST_STATE * x_TU.shape[-1] + 4096:
            return None
        values = measure.values(measure.statistics(x_TU[:, None, None, :]))
    except _REFUSALS:
        return None
    told = {name: values[name] for name, dims in measure.value_dims.items() if dims == () and name in values}
    told = {name: value for name, value in told.items() if value.shape == x_TU.shape[:1]}
    return told if any(_tells(value) for value in told.values()) else None


def _tells(value_T: Tensor) -> bool:
    finite = value_T[value_T.isfinite()]
    return len(finite) > 1 and bool((finite - finite[0]).abs().max() > 1e-6 * finite.abs().max())


def received(pattern_HQS: Tensor, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """What each token gets of the attention of the others.

    Args:
        pattern_HQS: (head, query, key), square.
        causal: whether a query sees only the keys up to itself.

    Returns:
        The mean weight over the other queries that see it (head, key), the same beyond an even spread over the keys
        that each query sees, and the number of these queries (key). NaN for a key that no other query sees.

    >>> pattern = torch.tensor([[[1.0, 0.0], [0.75, 0.25]]])
    >>> [part.tolist() for part in received(pattern, causal=True)]
    [[[0.75, nan]], [[0.25, nan]], [1, 0]]
    """
    length = pattern_HQS.shape[-1]
    ones = torch.ones(length, length)
    sees_QS = (ones.tril(-1) if causal else ones - torch.eye(length)).to(pattern_HQS.dtype)
    queries_S = sees_QS.sum(0)
    even_Q = torch.arange(1, length + 1).reciprocal() if causal else torch.full((length,), 1 / length)
    weight_HS = (pattern_HQS * sees_QS).sum(-2) / queries_S
    return weight_HS, weight_HS - (even_Q[:, None] * sees_QS).sum(0) / queries_S, queries_S.long()


def pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    """The text of each token, such that they join to the text of all.

    A character that takes several tokens stands at the last of them.

    >>> import actome as ac
    >>> tokenizer = ac.demo().tokenizer
    >>> pieces(tokenizer, tokenizer("def f(x):", add_special_tokens=False).input_ids)
    ['def', ' f', '(', 'x', '):']
    """
    found, before = [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)
        complete = text.removesuffix("\ufffd") if end < len(ids) else text
        if not complete.startswith(before):
            return [tokenizer.decode([one]) for one in ids]
        found.append(complete[len(before) :])
        before = complete
    return found
