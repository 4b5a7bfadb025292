"""Findings: what in a measurement is worth a person's attention, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from ..core.errors import MeasureError, nearest
from ..core.measure import Measure
from ..core.sites import Site, expand
from ..core.table import MeasureResult, finite_or_none
from .rules import IDS, RULES, Rule, Severity, Thresholds, Verdict

__all__ = ["IDS", "Finding", "Severity", "Thresholds", "find", "thresholds_of"]


@dataclass(frozen=True)
class Finding:
    """One thing worth a person's attention.

    Attributes:
        id: what kind of thing: one of `IDS`.
        severity: ``"info"`` (good to know, found in healthy models), ``"warning"`` or ``"critical"``.
        site: the site; for several layers with the same finding at the same place, the pattern that selects them.
        where: lists of layers, heads, units, experts and positions, those that apply.
        evidence: the numbers that it rests on; of several layers those of the strongest, whose name is under ``"at"``.
        source: where the phenomenon or definition comes from.
        advice: what to do about it.

    Example:
        >>> finding = Finding("idle-layers", "warning", "blocks.{3..4}.resid.post", {"layers": [3, 4]})
        >>> finding.sites
        ['blocks.3.resid.post', 'blocks.4.resid.post']
    """

    id: str
    severity: Severity
    site: str
    where: dict[str, list[int]] = field(default_factory=dict)
    evidence: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    advice: str = ""

    @property
    def sites(self) -> list[str]:
        """The names of the sites."""
        return expand(self.site)

    def units(self) -> list[tuple[str, int]]:
        """Every single unit that is named, with its site."""
        return [(site, unit) for site in self.sites for unit in self.where.get("units", [])]

    def to_dict(self) -> dict[str, Any]:
        """As plain data for JSON: keys absent where they do not apply, ``None`` for what is not a number."""
        evidence = {key: finite_or_none(x) if isinstance(x, float) else x for key, x in self.evidence.items()}
        given = {
            "id": self.id,
            "severity": self.severity,
            "site": self.site,
            "where": {key: list(places) for key, places in self.where.items()},
            "evidence": evidence,
            "source": self.source,
            "advice": self.advice,
        }
        return {key: value for key, value in given.items() if value}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Finding:
        """The finding that `to_dict` wrote."""
        return cls(**{key: data[key] for key in cls.__dataclass_fields__ if key in data})


def find(results: Iterable[MeasureResult], thresholds: Thresholds | Mapping[str, float] | None = None) -> list[Finding]:
    """What stands out in a measurement.

    Args:
        results: a `MeasureTable`, or results of single measures. Rules whose values were not measured do not apply.
        thresholds: all of them, or those that differ from the defaults, by name.

    Returns:
        Findings, the most severe first, then in the order of `IDS`. Layers of one kind of site that have the same
        finding at the same units, heads and positions are told together.

    Raises:
        MeasureError: a threshold that does not exist.

    Example:
        >>> import torch
        >>> from actome.core.measure import MeasureResult
        >>> from actome.measures import ActivationScale
        >>> scale = ActivationScale()
        >>> scale.update(torch.tensor([[[1.0, float("nan")]]]))
        >>> site = Site("blocks.2.resid.post", ("batch", "pos", "d_model"), (None, None, 2), 2)
        >>> [(found.id, found.where) for found in find([MeasureResult(scale, (site,), scale.compute())])]
        [('non-finite', {'layers': [2]})]
    """
    limits = thresholds if isinstance(thresholds, Thresholds) else thresholds_of(thresholds)
    places = list(_by_site(results))
    found = [
        finding
        for rule in RULES
        for finding in _together(rule, [(site, v) for site, v in _verdicts(rule, places, limits) if v is not None])
    ]
    order = ("critical", "warning", "info")
    return sorted(found, key=lambda finding: order.index(finding.severity))


def thresholds_of(changed: Mapping[str, float] | None = None) -> Thresholds:
    """The thresholds for findings, with those that are changed.

    Raises:
        MeasureError: a threshold that does not exist; the nearest are named, or all.

    >>> thresholds_of({"dead_share": 0.1}).dead_share
    0.1
    """
    known = Thresholds.__dataclass_fields__
    for name in changed or {}:
        if name not in known:
            others = nearest(name, known) or f"; there are: {', '.join(known)}"
            raise MeasureError(f"there is no threshold {name!r}{others}")
    return Thresholds(**(changed or {}))


@dataclass
class _Place:
    """All that was measured at one site, and by what."""

    site: Site
    values: dict[str, Tensor] = field(default_factory=dict)
    measures: dict[str, Measure] = field(default_factory=dict)


def _by_site(results: Iterable[MeasureResult]) -> Iterator[_Place]:
    places: dict[str, _Place] = {}
    for result in results:
        for name in result.values:
            for site, value in zip(result.sites, result.per_site(name), strict=True):
                place = places.setdefault(site.name, _Place(site))
                place.values[name] = value
                place.measures[name] = result.measure
    yield from places.values()


def _verdicts(rule: Rule, places: list[_Place], limits: Thresholds) -> Iterator[tuple[Site, Verdict | None]]:
    for place in places:
        if place.site.name.endswith(rule.only) and all(name in place.values for name in rule.needs):
            yield place.site, rule.judge(place.values, place.measures, limits)


def _together(rule: Rule, verdicts: list[tuple[Site, Verdict]]) -> Iterator[Finding]:
    groups: dict[Any, list[tuple[Site, Verdict]]] = {}
    for site, verdict in verdicts:
        place = tuple((key, tuple(at)) for key, at in verdict.where.items())
        # Sites without a layer have no neighbours to be told with.
        kind = site.local if site.layer is not None else site.name
        groups.setdefault((kind, verdict.severity, place), []).append((site, verdict))
    for group in groups.values():
        sites = [site for site, _ in group]
        strongest, verdict = max(group, key=lambda one: one[1].degree)
        layers = {"layers": [site.layer for site in sites]} if sites[0].layer is not None else {}
        finding = Finding(
            rule.id,
            verdict.severity,
            strongest.name,
            {**layers, **verdict.where},
            dict(verdict.evidence),
            rule.source,
            verdict.advice or rule.advice,
        )
        if len(sites) > 1:
            pattern = strongest.local.replace("*", _braces(layers["layers"]), 1)
            finding = replace(finding, site=pattern, evidence={**finding.evidence, "at": strongest.name})
        yield finding


def _braces(layers: list[int]) -> str:
    """The piece of a pattern that selects these layers.

    >>> _braces([2, 3, 4]), _braces([0, 3])
    ('{2..4}', '{0,3}')
    """
    if layers == list(range(layers[0], layers[-1] + 1)):
        return f"{{{layers[0]}..{layers[-1]}}}"
    return "{" + ",".join(map(str, layers)) + "}"
