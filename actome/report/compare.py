"""Two scans side by side: which numbers differ, by how much, and which findings came or went."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from actome.core.errors import ActomeError
from actome.measures.findings import Finding
from actome.report.plain import write
from actome.report.scan import Scan, read_line
from actome.report.words import kind_of, word

if TYPE_CHECKING:
    from rich.console import Console

_PLACES = ["layer", "head", "expert"]
# Below these, a change of a share or of a count is not worth being at the top of a list.
_FLOOR = {"share": 0.01, "count": 1.0}


@dataclass(frozen=True)
class Comparison:
    """Two scans side by side.

    Attributes:
        this, other: the scans.
        frame: one row for each number that both have: site, layer, head, expert, other_site, measure, value, other,
            difference (value less other), relative (difference over the magnitude of other) and change: the magnitude
            of the difference over the larger of both, by which things are sorted (0 to 2; shares below 1 % and counts
            below 1 are taken as these). Single units are left out.
        gained, lost: findings that only this, or only the other scan has. One is told by its id, its severity, its
            kind of site and its layer, whatever units and heads it names; between models of different depth by the
            first three.
        notes: why the two do not compare in every respect: other texts, other depth.
    """

    this: Scan
    other: Scan
    frame: pd.DataFrame = field(repr=False)
    gained: tuple[Finding, ...] = ()
    lost: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def same_depth(self) -> bool:
        """Whether layers are compared one by one, and not by relative depth."""
        return _depths(self.this) == _depths(self.other)

    def changes(self) -> pd.DataFrame:
        """One row for each value and kind of site, the most changed first.

        Returns:
            Columns kind, measure, value and other (means over layers and heads), difference, relative, change, and
            most_site, most_value and most_other: where the change is largest. Sites where either is not finite count
            for neither mean; indices, which have no mean, are left out.
        """
        rows = self.frame[np.isfinite(self.frame["value"]) & np.isfinite(self.frame["other"])]
        rows = rows[rows["measure"].map(lambda name: word(name).look != "index")]
        rows = rows.assign(kind=rows["site"].map(kind_of))
        found = []
        for (kind, measure), part in rows.groupby(["kind", "measure"], sort=False):
            most = part.loc[part["change"].idxmax()]
            found.append(
                {
                    "kind": kind,
                    "measure": measure,
                    "value": part["value"].mean(),
                    "other": part["other"].mean(),
                    "most_site": most["site"],
                    "most_value": most["value"],
                    "most_other": most["other"],
                }
            )
        columns = ["kind", "measure", "value", "other", "most_site", "most_value", "most_other"]
        changes = _with_differences(pd.DataFrame(found, columns=columns))
        return changes.sort_values("change", ascending=False, kind="stable", ignore_index=True)

    def to_html(self) -> str:
        """Both scans as one page that needs no network."""
        from actome.report.html import page

        return page(self.this, self)

    def save_html(self, path: str | Path) -> Path:
        """Writes `to_html` to a file, whose folders are made; returns its path."""
        return write(path, self.to_html())

    def print(self, console: Console | None = None) -> None:
        """Prints what differs to the terminal, or to a console of the rich library."""
        from actome.report.terminal import print_comparison

        print_comparison(self, console)


def compare(this: Scan, other: Scan) -> Comparison:
    """Two scans of one panel side by side.

    Models of different depth are compared by relative depth: block l of L with that block of the other model which
    ends nearest to (l + 1) / L of its way. Heads are compared one by one only where both models have as many.

    Raises:
        ActomeError: the scans are of different panels, or no number is in both.
    """
    panels = (this.run.get("panel"), other.run.get("panel"))
    if panels[0] != panels[1]:
        raise ActomeError(f"one scan is of the panel {panels[0]!r} and the other of {panels[1]!r}; scan both with one")
    mine, theirs = _plain(this), _plain(other)
    match = _partner(_depths(this), _depths(other))
    mine["other_site"] = [match(site) for site in mine["site"]]
    mine = _comparable_heads(mine, theirs)
    keys = ["other_site", "head", "expert", "measure"]
    theirs = theirs.drop(columns="layer").rename(columns={"site": "other_site", "value": "other"})
    frame = mine.merge(theirs.drop_duplicates(keys), on=keys, how="inner", sort=False)
    if frame.empty:
        raise ActomeError("the two scans have no number in common; were they made of models of the same kind?")
    columns = ["site", *_PLACES, "other_site", "measure", "value", "other"]
    same = _depths(this) == _depths(other)
    return Comparison(
        this,
        other,
        _with_differences(frame[columns]),
        tuple(_only(this.findings, other.findings, same)),
        tuple(_only(other.findings, this.findings, same)),
        tuple(_notes(this, other)),
    )


def _plain(scan: Scan) -> pd.DataFrame:
    rows = scan.frame[scan.frame["unit"].isna()]
    return rows.drop(columns="unit").reset_index(drop=True)


def _depths(scan: Scan) -> dict[str, int]:
    """How many layers each stack of blocks has."""
    names = scan.frame.loc[scan.frame["layer"].notna(), "site"].unique()
    depths: dict[str, int] = {}
    for name in names:
        if found := _LAYER.match(name):
            depths[found[1]] = max(depths.get(found[1], 0), int(found[2]) + 1)
    return depths


_LAYER = re.compile(r"(.*?)blocks\.(\d+)\.")


def _partner(mine: dict[str, int], theirs: dict[str, int]) -> Callable[[str], str]:
    """The function from a site to the site of the other model at the same relative depth."""

    def partner(site: str) -> str:
        found = _LAYER.match(site)
        if not found or found[1] not in theirs or mine[found[1]] == theirs[found[1]] or site.endswith("resid.pre"):
            return site
        depth = (int(found[2]) + 1) / mine[found[1]] * theirs[found[1]]
        # Halves go up, so that each block has one partner whatever Python rounds to.
        return f"{found[1]}blocks.{max(0, int(depth + 0.5) - 1)}.{site[found.end() :]}"

    return partner


def _comparable_heads(mine: pd.DataFrame, theirs: pd.DataFrame) -> pd.DataFrame:
    """Without the heads and experts of sites whose partner has another number of them."""
    for place in ("head", "expert"):
        counts = theirs.groupby("site")[place].max()
        own = mine.groupby("site")[place].max()
        same = mine["site"].map(own).eq(mine["other_site"].map(counts)).fillna(False)
        mine = mine[mine[place].isna() | same]
    return mine


def _with_differences(frame: pd.DataFrame) -> pd.DataFrame:
    value, other = frame["value"].astype(float), frame["other"].astype(float)
    floor = frame["measure"].map(lambda name: _FLOOR.get(word(name).look, 0.0)).astype(float)
    larger = np.maximum(np.maximum(value.abs(), other.abs()), floor)
    difference = value - other
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = difference / other.abs()
        change = (difference.abs() / larger).where(larger > 0, 0.0)
    return frame.assign(difference=difference, relative=relative.where(difference != 0, 0.0), change=change)


def _only(these: Iterable[Finding], those: Iterable[Finding], by_layer: bool) -> Iterable[Finding]:
    known = {key for finding in those for key in _keys(finding, by_layer)}
    for finding in these:
        new = {key: site for key, site in _keys(finding, by_layer).items() if key not in known}
        if not new:
            continue
        layers = [layer for *_, layer in new]
        if by_layer and len(new) < len(finding.sites):
            names = list(new.values())
            site = names[0] if len(names) == 1 else _pattern(names[0], layers)
            finding = replace(finding, site=site, where={**finding.where, "layers": layers})
        yield finding


def _keys(finding: Finding, by_layer: bool) -> dict[tuple, str]:
    layers = finding.where.get("layers") or [None]
    sites = finding.sites
    pairs = zip(sites, layers, strict=True) if len(sites) == len(layers) else [(site, None) for site in sites]
    return {
        (finding.id, finding.severity, kind_of(site), layer if by_layer else None): site for site, layer in pairs
    }  # fmt: skip


def _pattern(site: str, layers: list[int]) -> str:
    return re.sub(r"blocks\.\d+\.", "blocks.{" + ",".join(map(str, layers)) + "}.", site, count=1)


def _notes(this: Scan, other: Scan) -> Iterable[str]:
    mine, theirs = _depths(this), _depths(other)
    if mine != theirs:
        counts = " and ".join(str(sum(depths.values())) for depths in (mine, theirs))
        yield f"The models have {counts} layers and are compared by relative depth, heads not one by one."
    if this.model.get("vocab") != other.model.get("vocab"):
        yield "The models have other vocabularies: their losses are of other tokens and do not compare."
    if this.text.get("source") != other.text.get("source"):
        yield f"The texts differ: {this.text.get('source')}, and {other.text.get('source')}."
    elif read_line(this.text) != read_line(other.text):
        yield f"Not as much was read: {read_line(this.text)}; the other {read_line(other.text)}."
    if (this.run.get("thresholds") or {}) != (other.run.get("thresholds") or {}):
        yield "The findings were made with other thresholds."
