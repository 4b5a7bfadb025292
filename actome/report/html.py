"""The report as one HTML page that needs no network: findings first, then depth, heads and numbers.

The page is a template with a style sheet and a short script beside it. The drawing library comes from the wheel of
vl-convert and is put into the page once for all figures. Whatever a model, a text or a path is called is escaped.
"""

from __future__ import annotations

import json
from functools import lru_cache
from importlib.resources import files
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup

from actome import __version__
from actome.measures.findings import Finding
from actome.report.figures import Figure, figures
from actome.report.scan import Scan, read_line
from actome.report.words import grouped, kind_of, place_of, word

_SECTIONS = {
    "depth": ("Through the layers", "Layer -1 is the stream before the first block. Hover for the site and its value."),
    "heads": ("Heads", "Each cell is one attention head. Hover for its place and value."),
}


def page(scan: Scan) -> str:
    """The page of a scan.

    Returns:
        HTML of about a megabyte, nearly all of it the drawing library; it loads nothing.
    """
    drawn = figures(scan)
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        _asset("page.html")
    )
    return template.render(
        version=__version__,
        model=scan.model,
        facts=_facts(scan.model),
        read=read_line(scan.text),
        tiles=_tiles(scan),
        findings=[_findings(group) for group in grouped(scan.findings)],
        sections=_sections(drawn),
        tables=_tables(scan.frame),
        skipped=scan.skipped,
        made=_made(scan),
        # In a script element the text is not HTML: nothing in it may look like the end of the element.
        specs=Markup(_in_script(json.dumps({figure.key: figure.spec for figure in drawn}, allow_nan=False))),
        style=Markup(_asset("page.css")),
        script=Markup(_asset("page.js")),
        vega=Markup(_drawing_library() if drawn else ""),
    )  # fmt: skip


def _asset(name: str) -> str:
    return files("actome.report").joinpath("assets", name).read_text(encoding="utf-8")


@lru_cache(maxsize=1)
def _drawing_library() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script that defines `vegaEmbed`."""
    import vl_convert

    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;").replace("</script", "<\\/script")


def _in_script(data: str) -> str:
    return data.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _facts(model: dict[str, Any]) -> list[str]:
    facts = [str(model.get("class", ""))]
    if "parameters" in model:
        facts.append(f"{_count(model['parameters'])} parameters")
    facts += [f"{model[key]} {plural}" for key, plural in (("layers", "layers"), ("head", "heads")) if model.get(key)]
    facts += [f"width {model['d_model']}"] if model.get("d_model") else []
    return [fact for fact in (*facts, str(model.get("dtype", "")), str(model.get("device", ""))) if fact]


def _tiles(scan: Scan) -> list[dict[str, str]]:
    tiles = []
    for name in ("loss", "perplexity", "max_logit"):
        rows = scan.values(name)
        if len(rows):
            tiles.append({"name": word(name).title, "value": word(name).show(rows["value"].iloc[0]), "tone": ""})
    for severity in ("critical", "warning", "info"):
        count = sum(finding.severity == severity for finding in scan.findings)
        tone = severity if count else "calm" if severity != "info" else ""
        title = {"critical": "Critical findings", "warning": "Warnings", "info": "Notes"}[severity]
        tiles.append({"name": title, "value": str(count), "tone": tone})
    seconds = scan.run.get("seconds")
    return [*tiles, *([{"name": "Seconds", "value": f"{seconds:.1f}", "tone": ""}] if seconds is not None else [])]


def _findings(group: list[Finding]) -> dict[str, Any]:
    first = group[0]
    places = [
        {
            "site": finding.site,
            "place": place_of(finding.where),
            "evidence": [
                (name.replace("_", " "), word(name).show(x) if isinstance(x, int | float) else str(x))
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
    }


def _sections(drawn: list[Figure]) -> list[dict[str, Any]]:
    return [
        {"key": key, "title": title, "lead": lead, "figures": [figure for figure in drawn if figure.group == key]}
        for key, (title, lead) in _SECTIONS.items()
        if any(figure.group == key for figure in drawn)
    ]


def _tables(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """One table for each kind of site, a row for each layer; sites without a layer share one."""
    rows = frame[frame[["head", "unit", "expert"]].isna().all(axis=1)]
    layered = rows["layer"].notna()
    kinds = rows["site"].map(kind_of).where(layered, "other sites")
    tables = []
    for kind, part in rows.groupby(kinds, sort=False):
        index = "site" if kind == "other sites" else "layer"
        wide = part.pivot_table(index=index, columns="measure", values="value", sort=False, dropna=False)
        columns = [word(name) for name in wide.columns]
        tables.append(
            {
                "title": kind,
                "index": index,
                "columns": columns,
                "rows": [
                    {"name": str(name), "cells": [w.show(value) for w, value in zip(columns, values, strict=True)]}
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
