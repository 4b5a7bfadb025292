"""A look: the panel's measures at the probe, and heads at repeated tokens, as readings."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from actome.core.errors import ActomeError, MeasureError, SiteError, nearest
from actome.core.model import Model
from actome.core.sites import Site
from actome.core.stream import Plan
from actome.core.table import MeasureTable
from actome.measures.induction import InductionScore
from actome.measures.loss import NextTokenLoss
from actome.measures.panels import PANELS, Panel

from ..alarms.base import Reading
from .locate import search
from .logbook import Logbook
from .probe import repeated_tokens, rows_of, shares
from .ranks import Ranks
from .untouched import untouched

_INDUCTION = {"blocks.*.attn.pattern": InductionScore()}
# So many looks in a row may fail before no more are taken.
_FAILURES = 3
_NONE = object()


class Looker:
    """Takes the measures of a panel at the same probe again and again.

    Args:
        model: the network.
        panel: a panel's name, a `Panel`, or what `Model.measure` takes.
        batches: the probe (`probe_batches`).
        ranks: each process reads its share, and all get the values of the whole.
        autocast: the dtype that training's forwards are cast to, if they are.
        losses: further batches by name, of which the next-token loss is taken.

    Attributes:
        batches: this process's share of the probe.
        skipped: what the panel has and this network has no place for.

    Raises:
        MeasureError: no panel of this name; nothing of it fits the network.
    """

    def __init__(
        self,
        model: Model,
        panel: Any,
        batches: list[Any],
        ranks: Ranks,
        autocast: torch.dtype | None = None,
        losses: Mapping[str, list[Any]] | None = None,
    ):
        if isinstance(panel, str):
            if panel not in PANELS:
                raise MeasureError(
                    f"there is no panel {panel!r}{nearest(panel, PANELS)}; there are {', '.join(PANELS)}"
                )
            panel = PANELS[panel]
        self.model, self.panel, self.autocast, self.ranks = model, panel, autocast, ranks
        self.batches = shares(batches, ranks.rank, ranks.count)
        self._losses = {name: shares(some, ranks.rank, ranks.count) for name, some in (losses or {}).items()}
        self.first, self._failures = True, 0
        try:
            with untouched(model.module):
                self._plan = Plan(model, panel)
        except (MeasureError, SiteError) as error:
            name = panel.name if isinstance(panel, Panel) else "what was asked for"
            raise type(error)(f"{model.name} cannot be watched by {name}: {error}") from error
        self.skipped = list(self._plan.skipped)
        self._repeated = self._heads(ranks)
        self._induction = None if self._repeated is None else Plan(model, _INDUCTION)

    def _heads(self, ranks: Ranks) -> Tensor | None:
        if not isinstance(self.panel, Panel) or self.panel.name != "training":
            return None
        patterns = [site for site in self.model.table if site.local == "blocks.*.attn.pattern" and site.causal]
        tokens = repeated_tokens(self.model) if patterns else None
        return None if tokens is None else tokens[ranks.rank :: ranks.count]

    def look(self) -> list[Reading]:
        """All values of one look; those of `non_finite` first, in the order of the forward."""
        with untouched(self.model.module), self._cast():
            tables = [self.model.measure(self.batches, self._plan)]
            if self._repeated is not None:
                # An empty share of it still has to meet the others.
                given = [self._repeated] if len(self._repeated) else []
                tables.append(self.model.measure(given, self._induction))
            found = [reading for table in tables for reading in readings(table)]
            for name, batches in self._losses.items():
                value = self.model.measure(batches, {"logits": NextTokenLoss()}).value("loss")
                found.append(Reading(f"loss_{name}", float(value)))
        order = self.model.order
        # Sorting is stable: all others stay as they came.
        found.sort(key=lambda one: order.get(one.site or "", -1) if _lost(one) else len(order))
        return found

    def look_safely(self, log: Logbook, at: int) -> list[Reading]:
        """`look`, when a training has begun that must not end by it: a look that fails is told, and skipped.

        After three in a row no more are taken. With several processes it is raised, since the others would wait for
        this one for ever. So it is at the first look, which shows what cannot work at all.
        """
        if self._failures >= _FAILURES:
            return []
        try:
            found = self.look()
        except Exception as error:
            if (
                self.first
                and isinstance(error, IndexError | TypeError | ValueError)
                and not isinstance(error, ActomeError)
            ):
                raise MeasureError(
                    f"{self.model.name} cannot read the probe ({type(error).__name__}: {error}): give what its forward "
                    "takes, such as token ids below its vocabulary in rows no longer than its context"
                ) from error
            if self.first or not self.ranks.alone:
                raise
            self._failures += 1
            said = f"{type(error).__name__}: {error}"
            log.event("look_failed", at, error=said)
            last = "; no more are taken" if self._failures == _FAILURES else ""
            warnings.warn(
                f"a look at step {at} failed, and training goes on{last}: {said}", RuntimeWarning, stacklevel=4
            )
            return []
        self.first, self._failures = False, 0
        return found

    def describe(self) -> dict[str, Any]:
        """How large the probe is."""
        return {"batches": len(self.batches), "rows": sum(map(rows_of, self.batches)), "losses": list(self._losses)}

    def _cast(self) -> contextlib.AbstractContextManager[Any]:
        return cast(self.model, self.autocast)


def cast(model: Model, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    """Autocast as in training; nothing for None."""
    return contextlib.nullcontext() if dtype is None else torch.autocast(model.device.type, dtype=dtype)


def origin(model: Model, batches: Iterable[Any], autocast: torch.dtype | None, weights: Any = None) -> Reading | None:
    """Where the first activation that is not finite comes from, as a reading of `non_finite`."""
    with cast(model, autocast):
        for one in batches:
            found = search(model, one, weights)
            if found is not None:
                return Reading("non_finite", found.share, found.site.name, found.site.layer)
    return None


def _place(dims: tuple[str, ...], site: Site) -> Any:
    """What tells the values of one site apart: nothing, its heads or its experts; `_NONE` for those without rows."""
    if dims == ():
        return None
    if dims in (("head",), ("expert",)):
        return dims[0]
    # The units of a router are its experts.
    return "expert" if dims == ("unit",) and site.dims[2:] == ("expert",) else _NONE


def _lost(reading: Reading) -> bool:
    return reading.measure == "non_finite" and reading.value > 0


def readings(table: MeasureTable) -> list[Reading]:
    """A table's values as readings, those of single units left out.

    >>> import actome as ac
    >>> from actome.measures import SinkScore
    >>> table = ac.demo().measure("The value of the", {"blocks.*.attn.pattern": SinkScore()})
    >>> one = readings(table)[0]
    >>> one.measure, one.site, one.layer, one.head
    ('sink', 'blocks.0.attn.pattern', 0, 0)
    """
    found = []
    for result in table:
        for name, dims in result.measure.value_dims.items():
            place = _place(dims, result.sites[0])
            if name not in result.values or place is _NONE:
                continue
            values = result.per_site(name).double()
            for site, value in zip(result.sites, values, strict=True):
                if not isinstance(place, str):
                    found.append(Reading(name, float(value), site.name, site.layer))
                    continue
                for i, one in enumerate(value.tolist()):
                    found.append(Reading(name, one, site.name, site.layer, **{place: i}))
    return found
