"""The report as one HTML page that needs no network: findings first, then depth, heads, text and numbers.

The pages of single layers are made in the browser from the data that `actome.report.data` puts beside the figures.
"""

from __future__ import annotations

from typing import Any

import pandas as pd

from actome import __version__
from actome.measures.findings import Finding
from actome.report import band
from actome.report.compare import Comparison
from actome.report.data import page_data
from actome.report.distributions import templates
from actome.report.figures import Figure, figures
from actome.report.scan import Scan, read_line
from actome.report.shell import whole
from actome.report.words import GROUPS, cited, grouped, kind_of, layer_page, place_of, stack_of, word

_SECTIONS = {
    "depth": ("Through the layers", "Layer -1 is the stream before the first block. Click a point to open its layer."),
    "heads": ("Heads and experts", "Each cell is one of them. Click it to open its layer."),
    "distributions": ("Distributions", "How large the activations are, and what is measured between sites."),
}
_SCRIPTS = ("page.js", "layer.js", "tokens.js", "filter.js")
_MOST_CHANGES = 60


def page(scan: Scan, comparison: Comparison | None = None) -> str:
    """The page of a scan, or of two of them.

    Args:
        comparison: of `scan` with another, which is then shown beside it.

    Returns:
        HTML of about a megabyte, nearly all of it the drawing library; it loads nothing.
    """
    drawn = figures(scan, comparison)
    specs = {**{figure.key: figure.spec for figure in drawn}, **{f"layer:{k}": v for k, v in templates().items()}}
    data = page_data(scan, comparison)
    return whole(
        "page.html",
        specs=specs,
        data=data,
        scripts=_SCRIPTS,
        needed=bool(drawn or data["layers"]),
        model=scan.model,
        facts=_facts(scan.model),
        read=read_line(scan.text),
        tiles=_tiles(scan, comparison),
        severities=_severities(scan),
        findings=[_findings(group) for group in grouped(scan.findings)],
        comparison=None if comparison is None else _compared(comparison),
        sections=_sections(drawn),
        band=band.about() if any(figure.note for figure in drawn) else "",
        layers=data["layers"],
        passage=scan.passage,
        marks=_marks(scan.passage or {}),
        tables=_tables(scan.frame),
        skipped=scan.skipped,
        made=_made(scan),
    )  # fmt: skip


def _facts(model: dict[str, Any]) -> list[str]:
    facts = [str(model.get("class", ""))]
    if "parameters" in model:
        facts.append(f"{_count(model['parameters'])} parameters")
    facts += [f"{model[key]} {plural}" for key, plural in (("layers", "layers"), ("head", "heads")) if model.get(key)]
    facts += [f"width {model['d_model']}"] if model.get("d_model") else []
    return [fact for fact in (*facts, str(model.get("dtype", "")), str(model.get("device", ""))) if fact]


def _tiles(scan: Scan, comparison: Comparison | None) -> list[dict[str, str]]:
    other = None if comparison is None else comparison.other
    tiles = []
    for name in ("loss", "perplexity", "max_logit"):
        rows = scan.values(name)
        if len(rows):
            before = other.values(name) if other is not None else rows.iloc[:0]
            value = word(name).show(rows["value"].iloc[0])
            beside = word(name).show(before["value"].iloc[0]) if len(before) else ""
            tiles.append({"name": word(name).title, "value": value, "tone": "", "other": beside})
    for severity, title in (("critical", "Critical findings"), ("warning", "Warnings"), ("info", "Notes")):
        count = _number(scan, severity)
        tone = severity if count else "calm" if severity != "info" else ""
        beside = str(_number(other, severity)) if other is not None else ""
        tiles.append({"name": title, "value": str(count), "tone": tone, "other": beside})
    seconds = scan.run.get("seconds")
    return [*tiles, *([{"name": "Seconds", "value": f"{seconds:.1f}", "tone": ""}] if seconds is not None else [])]


def _number(scan: Scan, severity: str) -> int:
    return sum(finding.severity == severity for finding in scan.findings)


def _severities(scan: Scan) -> list[tuple[str, str, int]]:
    named = (("critical", "critical"), ("warning", "warnings"), ("info", "notes"))
    return [(severity, name, count) for severity, name in named if (count := _number(scan, severity))]


def _findings(group: list[Finding]) -> dict[str, Any]:
    first = group[0]
    places = [
        {
            "site": finding.site,
            "place": place_of({name: at for name, at in finding.where.items() if name != "layers"}),
            "layers": _layer_links(finding),
            "sought": " ".join([*finding.sites, kind_of(finding.sites[0])]),
            "evidence": [
                (cited(name), word(name).show(x).replace(" ", "\u00a0") if isinstance(x, int | float) else str(x))
                for name, x in finding.evidence.items()
            ],
        }
        for finding in group
    ]
    return {
        "id": first.id,
        "severity": first.severity,
        "places": places,
        "advice": first.advice,
        "source": first.source,
        "values": " ".join(dict.fromkeys(name for finding in group for name in finding.evidence)),
    }


def _layer_links(finding: Finding) -> list[dict[str, Any]]:
    stack = stack_of(finding.site)
    return [{"layer": n, "page": layer_page(stack, n)} for n in finding.where.get("layers", [])]


def _compared(comparison: Comparison) -> dict[str, Any]:
    changes = comparison.changes()
    rows = [
        {
            "kind": row.kind,
            "measure": row.measure,
            "title": word(row.measure).title,
            "says": word(row.measure).says,
            "value": word(row.measure).show(row.value),
            "other": word(row.measure).show(row.other),
            "relative": _relative(row.relative),
            "bar": f"{min(1.0, row.change) * 100:.0f}",
            "up": row.difference > 0,
            "site": row.most_site,
            "most": f"{word(row.measure).show(row.most_other)} → {word(row.measure).show(row.most_value)}",
        }
        for row in changes[changes["change"] > 0].head(_MOST_CHANGES).itertuples()
    ]
    return {
        "name": str(comparison.other.model.get("name", "the other")),
        "read": read_line(comparison.other.text),
        "started": comparison.other.run.get("started", ""),
        "notes": comparison.notes,
        "rows": rows,
        "same": int((changes["change"] == 0).sum()),
        "gained": [(one.severity, one.id, one.site, place_of(one.where)) for one in comparison.gained],
        "lost": [(one.severity, one.id, one.site, place_of(one.where)) for one in comparison.lost],
    }  # fmt: skip


def _relative(x: float) -> str:
    if x in (float("inf"), float("-inf")):
        return "from 0"
    shown = f"×{1 + x:.3g}" if x >= 9 else f"{x:+.0%}" if abs(x) >= 1 else f"{x:+.1%}"
    return shown.replace("%", " %").replace("-", "−")


def _sections(drawn: list[Figure]) -> list[dict[str, Any]]:
    """The sections, each with its figures by group, and the name of the group where figures of several stand."""
    sections = []
    for key, (title, lead) in _SECTIONS.items():
        some = [figure for figure in drawn if figure.group == key]
        groups = {figure.key: word(figure.measure).group for figure in some}
        if some:
            names = len(set(groups.values())) > 1
            listed = [
                (figure, groups[figure.key].replace("Other", "") if names else "")
                for figure in sorted(some, key=_group_order)
            ]
            sections.append({"key": key, "title": title, "lead": lead, "figures": listed})
    return sections


def _group_order(figure: Figure) -> int:
    group = word(figure.measure).group
    return GROUPS.index(group) if group in GROUPS else len(GROUPS)


def _marks(passage: dict[str, Any]) -> dict[str, dict[int, str]]:
    """What is to be said of single tokens, by position."""
    massive: dict[int, list[str]] = {}
    for one in passage.get("massive", []):
        massive.setdefault(one["position"], []).append(f"layer {one['layer']} unit {one['unit']} (×{one['ratio']:g})")
    sinks: dict[int, list[str]] = {}
    for one in passage.get("sinks", []):
        weight = word("attention_received").show(one["weight"])
        sinks.setdefault(one["position"], []).append(f"layer {one['layer']} head {one['head']} ({weight})")
    return {
        "massive": {position: _short_list(said) for position, said in massive.items()},
        "sinks": {position: _short_list(said) for position, said in sinks.items()},
    }


def _short_list(said: list[str]) -> str:
    more = f" and {len(said) - 4} more" if len(said) > 4 else ""
    return ", ".join(said[:4]) + more


def _tables(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """One table for each kind of site, a row for each layer; sites without a layer share one."""
    rows = frame[frame[["head", "unit", "expert"]].isna().all(axis=1)]
    layered = rows["layer"].notna()
    kinds = rows["site"].map(kind_of).where(layered, "other sites")
    tables = []
    for kind, part in rows.groupby(kinds, sort=False):
        index = "site" if kind == "other sites" else "layer"
        wide = part.pivot_table(index=index, columns="measure", values="value", sort=False, dropna=False)
        columns = [(str(name), word(name)) for name in wide.columns]
        sites = dict(zip(part[index], part["site"], strict=True))
        tables.append(
            {
                "title": kind,
                "index": index,
                "columns": columns,
                "rows": [
                    {
                        "name": str(name),
                        "site": sites[name],
                        "layer": name if index == "layer" else None,
                        "page": layer_page(stack_of(sites[name]), int(name)) if index == "layer" else "",
                        "cells": [w.show(value) for (_, w), value in zip(columns, values, strict=True)],
                    }
                    for name, values in zip(wide.index, wide.to_numpy(), strict=True)
                ],
            }
        )
    return tables


def _made(scan: Scan) -> str:
    run = scan.run
    versions = ", ".join(f"{name} {number}" for name, number in run.get("versions", {}).items())
    changed = ", ".join(f"{name} = {value:g}" for name, value in (run.get("thresholds") or {}).items())
    thresholds = f"; thresholds changed: {changed}" if changed else ""
    return f"actome {__version__}, panel {run.get('panel')}, {run.get('started')}, {versions}{thresholds}"


def _count(n: int) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.3g} {letter}"
    return str(n)
