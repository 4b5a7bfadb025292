"""Measuring: one pass over a text, every tensor folded into statistics where it flows, none of it kept."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import MeasureError, SiteError, TextError
from .fold import Fold
from .measure import TOGETHER, Measure
from .real import forget, shared_tokens
from .sites import MODULE_PREFIX, STACKS, Site
from .table import MeasureResult, MeasureTable
from .taps import Kind, Point, StopForward, Tap

if TYPE_CHECKING:
    from .model import Model

_PREFIXES = tuple(f"{stack}." for stack in STACKS)


class _Stream:
    """One measure at sites of one shape, fed by taps: a metric for each site, or one for all depths together."""

    def __init__(self, measure: Measure, sites: Sequence[Site], lenient: bool = False):
        self.measure, self.sites, self.lenient = measure, tuple(sites), lenient
        self.without_ids = False
        self.together = measure.layout in TOGETHER
        self.metrics = [measure.clone() for _ in (sites[:1] if self.together else sites)]
        self.layers: list[Tensor] = []
        self.previous: Tensor | None = None
        self.mask: Tensor | None = None
        self.tokens: Tensor | None = None

    def taps(self) -> list[tuple[Point, Tap, Kind]]:
        return [(site.address, self._tap(site, i), "read") for i, site in enumerate(self.sites)]

    def _tap(self, site: Site, index: int) -> Tap:
        measure, layout = self.measure, self.measure.layout

        def feed(x: Tensor) -> None:
            if layout == "logits" and self.tokens is None and self.lenient:
                self.without_ids = True
                return
            x = canonical(x, site, layout)
            self.metrics[index].fold(measure.statistics(x, fitting(self.mask, x, layout), self.tokens))

        def feed_together(x: Tensor) -> None:
            x = canonical(x, site, "tokens")
            self.layers.append(measure.prepare(x, self.previous, fitting(self.mask, x, "tokens")))
            if layout == "depth":
                self.previous = x

        return feed_together if self.together else feed

    def begin(self, mask: Tensor | None, tokens: Tensor | None) -> None:
        """Takes in what belongs to the next forward."""
        self.mask, self.tokens, self.previous, self.layers = mask, tokens, None, []

    def end(self) -> None:
        """Folds what had to wait for the last layer."""
        if self.together and len(self.layers) == len(self.sites):
            if self.measure.layout == "depth":
                x = torch.stack(self.layers)
                mask = self.mask if self.mask is not None and self.mask.shape == x.shape[-2:] else None
                self.metrics[0].fold(self.measure.statistics(x, mask))
            else:
                self.metrics[0].fold(self.measure.statistics(self.layers, self.mask, self.tokens))
        self.previous, self.layers = None, []

    def unreached(self) -> list[str]:
        """The sites whose module no forward has called."""
        if self.together:
            return [] if self.metrics[0].update_count else [site.name for site in self.sites]
        return [site.name for site, one in zip(self.sites, self.metrics, strict=True) if not one.update_count]

    def results(self) -> list[MeasureResult]:
        """The measure over everything and its values: with the layers in front, or where rows are kept by site."""
        if not self.together and "cat" in self.measure.reductions.values():
            parts = zip(self.metrics, self.sites, strict=True)
            return [MeasureResult(one, (site,), one.compute()) for one, site in parts]
        return [self._stacked()]

    def _stacked(self) -> MeasureResult:
        total = self.metrics[0]
        if not self.together:
            missing = [site.name for site, m in zip(self.sites, self.metrics, strict=True) if not m.update_count]
            if missing and len(missing) < len(self.sites):
                raise MeasureError(f"the forward did not reach {', '.join(missing[:4])}")
            total = self.measure.clone()
            if not missing:
                names = self.measure.reductions
                total.fold({name: torch.stack([getattr(m, name) for m in self.metrics]) for name in names})
        return MeasureResult(total, self.sites, total.compute())


def measure(
    model: Model,
    inputs: Any,
    measures: Any,
    *,
    batch_size: int = 8,
    progress: Callable[[int], None] | None = None,
) -> MeasureTable:
    """Folds the stream of activations into statistics, in one pass whose memory does not grow with the text.

    Args:
        inputs: a `Text`; text or a list of texts; token ids (pos) or (batch, pos); or any iterable of batches, each
            ids or a dict of forward arguments, such as a data loader.
        measures: ``{pattern or tuple of patterns: measure or list of measures}``, a panel, or a `Plan` of them. Each
            measure is cloned for each stack of sites; those given stay empty.
        batch_size: rows a batch, for inputs that are not yet batched.
        progress: called with the number of tokens done, after each batch.

    Returns:
        A `MeasureTable`: ``.frame`` is the tidy table, ``.value(name)`` a tensor with the layers in front. Under
        ``torch.distributed`` every process gives its own part of the text and gets the values of all.

    Raises:
        SiteError: a pattern that matches nothing (in a panel it is skipped and told in ``.skipped``).
        MeasureError: a measure that does not fit its site; inputs without a batch; a site that no forward reached (in a
            panel it is skipped and told in ``.skipped``).

    Example:
        >>> import actome as ac
        >>> from actome.measures import ActivationScale
        >>> model = ac.demo()
        >>> table = model.measure("The value of the expression", {"blocks.*.resid.post": ActivationScale()})
        >>> table.value("rms").shape[0] == model.layers
        True
    """
    planned = measures if isinstance(measures, Plan) else Plan(model, measures)
    streams, skipped = planned.anew(), list(planned.skipped)
    taps = [tap for stream in streams for tap in stream.taps()]
    # After the measures of a place: what they shared must not outlive the tensor.
    taps += [(point, _forget, "read") for point in dict.fromkeys(point for point, _, _ in taps)]
    taps += stop_after(model, {site.name for stream in streams for site in stream.sites})
    done, forwards = 0, 0
    for arguments, ids, mask in batches(model, inputs, batch_size):
        forwards += 1
        for stream in streams:
            # Logits are of the decoder's tokens where there is one.
            stream.begin(mask, arguments.get("decoder_input_ids", ids))
        with model.tap(taps), torch.no_grad(), shared_tokens():
            with contextlib.suppress(StopForward):
                model.module(**arguments)
            for stream in streams:
                stream.end()
        done += 0 if ids is None else ids.numel() if mask is None else int(mask.sum())
        if progress is not None:
            progress(done)
    # Where several processes work together, what one did not reach or read another may have.
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        if not forwards:
            raise MeasureError("nothing was measured: the inputs hold no batch; an iterator can be read only once")
        streams, unreached = _reached(streams, planned.lenient)
        skipped += unreached
    return MeasureTable([result for stream in streams for result in stream.results()], skipped)


class Plan:
    """Measures at the sites of a model, found once, for whoever measures the same again and again.

    The tables that it was used for hold the very measures that the next use begins anew: their values stay, their
    statistics do not.

    Args:
        model: whose sites are meant.
        measures: as `measure` takes them.

    Attributes:
        skipped: what a panel asks for that this model has no place for.

    Raises:
        SiteError, MeasureError: as `measure`.

    >>> import actome as ac
    >>> from actome.measures import ActivationScale
    >>> model = ac.demo()
    >>> again = Plan(model, {"blocks.*.resid.post": ActivationScale()})
    >>> one, other = (model.measure(text, again).value("rms") for text in ("The value of", "The value of"))
    >>> bool((one == other).all())
    True
    """

    def __init__(self, model: Model, measures: Any):
        self.lenient = hasattr(measures, "entries")
        self._streams, self.skipped = plan(model, measures)

    def anew(self) -> list[_Stream]:
        """The streams, empty."""
        for stream in self._streams:
            for one in stream.metrics:
                if one.update_count:
                    one.reset()
            stream.without_ids = False
        return self._streams


def _reached(streams: Sequence[_Stream], lenient: bool) -> tuple[list[_Stream], list[str]]:
    """The streams that forwards came by; of the others, which a panel skips (`lenient`), why they say nothing."""
    reached, skipped = [], []
    for stream in streams:
        missing = stream.unreached()
        if len(missing) < len(stream.sites):
            reached.append(stream)
        else:
            name = type(stream.measure).__name__
            if stream.without_ids:
                skipped.append(f"{name} at {stream.sites[0].local}: it needs token ids, and the inputs are none")
            else:
                skipped.append(f"{name}: the forward did not reach {', '.join(missing[:4])}")
    if skipped and not (lenient and reached):
        raise MeasureError("; ".join(skipped[:4]))
    return reached, skipped


def _forget(x: Tensor) -> None:
    forget()


def _stop(x: Tensor) -> None:
    raise StopForward


def plan(model: Model, measures: Any) -> tuple[list[_Stream], list[str]]:
    """The streams of what `measure` is asked for, and what a panel asks for that this model has no place for."""
    if not hasattr(measures, "entries"):
        if not isinstance(measures, Mapping):
            raise MeasureError(
                f"measures are {{pattern: measure or list of measures}} or a panel such as PANELS['health'], "
                f"not {measures!r}"
            )
        streams, skipped = _streams(model, measures.items(), lenient=False)
    else:
        streams, skipped = _streams(model, measures.entries, lenient=True)
        if not streams and getattr(measures, "fallback", ()):
            streams, more = _streams(model, measures.fallback, lenient=True)
            skipped += more
    if not streams:
        raise MeasureError("nothing to measure: " + ("; ".join(skipped) or "no measure was given"))
    return streams, skipped


def _streams(model: Model, entries: Iterable[tuple[Any, Any]], lenient: bool) -> tuple[list[_Stream], list[str]]:
    """One stream for each measure and stack of sites; what does not fit is told (`lenient`) or raised."""
    streams: list[_Stream] = []
    skipped: list[str] = []
    for patterns, wanted in entries:
        patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
        try:
            sites = _match(model, patterns)
        except SiteError:
            if not lenient:
                raise
            skipped.append(f"{', '.join(patterns)}: this model has no such site")
            continue
        for one in wanted if isinstance(wanted, (list, tuple)) else [wanted]:
            one = _a_measure(one, patterns)
            for group in _groups(sites, one.layout):
                reason = one.fits(group[0]) or _misfit(one, group[0])
                if reason is None:
                    try:
                        streams.append(_Stream(one.at(group), group, lenient))
                    except MeasureError as error:
                        if not lenient:
                            raise
                        skipped.append(f"{type(one).__name__} at {group[0].local}: {error}")
                elif lenient:
                    skipped.append(f"{type(one).__name__} at {group[0].local}: {reason}")
                else:
                    raise MeasureError(f"{type(one).__name__} does not fit {group[0].name}: {reason}")
    return streams, skipped


def _a_measure(one: Any, patterns: tuple[str, ...]) -> Measure:
    made = one() if callable(one) and not isinstance(one, Fold) else one
    if isinstance(made, Measure):
        return made
    if isinstance(made, Fold):
        raise MeasureError(
            f"{type(made).__name__} takes more than the activations of {', '.join(patterns)}; use model.fold, which "
            "brings labels along, or update it in a loop of your own"
        )
    raise MeasureError(
        f"{', '.join(patterns)}: {made!r} is no measure; give one, such as Sparsity(), or a list of them"
    )


def _match(model: Model, patterns: tuple[str, ...]) -> list[Site]:
    """The sites of the patterns, in every stack of the model when they name none."""
    found: dict[str, Site] = {}
    error: SiteError | None = None
    # What a stack's pattern cannot select would cost as much as the nearest names that its error tells.
    stacks = {f"{site.stack}." for site in model.table if site.stack}
    for pattern in patterns:
        variants = [pattern]
        if not pattern.startswith((*_PREFIXES, MODULE_PREFIX)):
            variants += [prefix + pattern for prefix in _PREFIXES if prefix in stacks]
        hits: list[Site] = []
        for variant in variants:
            try:
                hits += model.match(variant)
            except SiteError as missing:
                error = error or missing
        if not hits:
            assert error is not None
            raise error
        found.update((site.name, site) for site in hits)
    order = model.order
    return sorted(found.values(), key=lambda site: order.get(site.name, 0))


def _groups(sites: Sequence[Site], layout: str) -> Iterator[list[Site]]:
    groups: dict[Any, list[Site]] = {}
    for site in sites:
        stack = site.name.partition("blocks.")[0]
        name = site.local if site.layer is not None else site.name
        groups.setdefault(stack if layout in TOGETHER else (name, site.sizes), []).append(site)
    yield from groups.values()


def _misfit(measure: Measure, site: Site) -> str | None:
    square = "query" in site.dims and "key" in site.dims
    if measure.layout == "pattern" and not square:
        return f"it takes attention patterns, and this has the dims {', '.join(site.dims)}"
    if measure.layout in ("tokens", *TOGETHER) and square:
        return "it takes one vector a token, and this has a value for each pair of positions"
    if measure.layout == "logits" and site.dims[-1:] != ("vocab",):
        return f"it takes logits over a vocabulary, and this has the dims {', '.join(site.dims)}"
    return None


def stop_after(model: Model, names: set[str]) -> list[tuple[Point, Tap, Kind]]:
    """What ends a forward after the last of these sites, or the last under an active clamp; nothing where unknown."""
    order = model.order
    names = names | {one.site.name for context in model.clamped for one in context.active}
    if not all(name in order for name in names):
        return []
    return [(model.table[max(names, key=order.__getitem__)].address, _stop, "read")]


def canonical(x: Tensor, site: Site, layout: str) -> Tensor:
    """A site's tensor in the dims of a layout: features flattened behind (batch, pos), heads behind positions."""
    if layout in ("pattern", "logits"):
        return x
    dims = site.dims
    if not dims:
        from .plain import module_dims

        dims = module_dims(site, x)
    if dims[:2] == ("batch", "pos") and len(dims) == 3:
        return x
    places = [i for i, d in enumerate(dims) if d in ("pos", "query", "key", "height", "width") or d.startswith("pos")]
    features = [i for i in range(1, len(dims)) if i not in places]
    x = x.permute(0, *places, *features)
    x = x.flatten(1 + len(places)) if features else x.unsqueeze(-1)
    if not places:
        return x.unsqueeze(1)
    return x.flatten(1, len(places))


def fitting(mask: Tensor | None, x: Tensor, layout: str) -> Tensor | None:
    """The mask where it speaks of this tensor's positions; cross attention, images and the like have their own."""
    if mask is None:
        return None
    wanted = (x.shape[0], x.shape[-1]) if layout == "pattern" else tuple(x.shape[:2])
    return mask if tuple(mask.shape) == wanted else None


def batches(
    model: Model, inputs: Any, batch_size: int
) -> Iterator[tuple[dict[str, Any], Tensor | None, Tensor | None]]:
    """(forward arguments, ids, mask) for every batch of whatever is given."""
    if isinstance(inputs, str) or (isinstance(inputs, list) and inputs and isinstance(inputs[0], str)):
        inputs = model.read(inputs, batch_size)
    if isinstance(inputs, Mapping):
        inputs = [inputs]
    elif isinstance(inputs, Tensor):
        inputs = inputs[None] if inputs.ndim == 1 and not inputs.is_floating_point() else inputs
        inputs = inputs.split(batch_size)
    if not isinstance(inputs, Iterable):
        raise TextError(f"measure() takes text, ids or an iterable of batches, not {type(inputs).__name__}")
    for batch in inputs:
        yield model.arguments(
            batch[0] if isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], Tensor) else batch
        )
