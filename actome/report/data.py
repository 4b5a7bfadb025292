"""What the scripts of the page need beside the figures: the numbers of each layer, arrays, heads, and the passage."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pandas as pd

from actome.report.arrays import rounded
from actome.report.compare import Comparison
from actome.report.distributions import doublings
from actome.report.scan import Scan
from actome.report.words import GROUPS, kind_of, layer_page, stack_of, word


def page_data(scan: Scan, comparison: Comparison | None = None) -> dict[str, Any]:
    """The data of the page's scripts, ready for JSON.

    Returns:
        ``words``: by measure its title, sentence and number format. ``layers``: page, stack, layer and severity of
        each. ``values``: by kind of site and measure the values of all layers (and of the other scan). ``heads``: the
        same with a list for each layer. ``units``: those that findings name. ``arrays``, ``passage``: of the scan.
    """
    frame = scan.frame.assign(kind=scan.frame["site"].map(kind_of), stack=scan.frame["site"].map(stack_of))
    frame = frame[frame["layer"].notna()]
    data = {
        "layers": _layers(scan, frame),
        "values": list(_values(frame, comparison)),
        "heads": list(_heads(frame)),
        "units": _units(frame),
        "arrays": [_array(one) for one in scan.arrays if one.get("layer") is not None],
        "passage": scan.passage,
    }
    names = {*frame["measure"], *(one["measure"] for one in scan.arrays)}
    names |= {one["measure"] for one in (scan.passage or {}).get("values", [])}
    return {"words": {name: _word(name) for name in sorted(names)}, **data}


def _word(measure: str) -> dict[str, Any]:
    one = word(measure)
    order = GROUPS.index(one.group) if one.group in GROUPS else len(GROUPS)
    return {"title": one.title, "says": one.says, "look": one.look, "order": order}


def _layers(scan: Scan, frame: pd.DataFrame) -> list[dict[str, Any]]:
    worst: dict[str, str] = {}
    for finding in reversed(scan.findings):  # the most severe last, so that it stays
        for layer in finding.where.get("layers", []):
            worst[layer_page(stack_of(finding.site), layer)] = finding.severity
    places = frame[["stack", "layer"]].drop_duplicates()
    order = list(dict.fromkeys(places["stack"]))
    found = sorted(zip(places["stack"], places["layer"], strict=True), key=lambda at: (order.index(at[0]), at[1]))
    return [
        {
            "page": layer_page(stack, layer),
            "stack": stack,
            "layer": int(layer),
            "severity": worst.get(layer_page(stack, layer), ""),
        }
        for stack, layer in found
    ]


def _values(frame: pd.DataFrame, comparison: Comparison | None) -> Iterable[dict[str, Any]]:
    others: dict[tuple[str, str], float] = {}
    if comparison is not None:
        rows = comparison.frame
        rows = rows[rows[["head", "expert"]].isna().all(axis=1)]
        others = dict(zip(zip(rows["site"], rows["measure"], strict=True), rows["other"], strict=True))
    plain = frame[frame[["head", "unit", "expert"]].isna().all(axis=1)]
    for (kind, measure), part in plain.groupby(["kind", "measure"], sort=False):
        found = {
            "kind": kind,
            "stack": part["stack"].iloc[0],
            "measure": measure,
            "sites": part["site"].tolist(),
            "layers": part["layer"].astype(int).tolist(),
            "values": [_number(x) for x in part["value"]],
        }
        if others:
            found["others"] = [_number(others.get((site, measure))) for site in part["site"]]
        yield found


def _number(x: float | None) -> float | str | None:
    """Six digits; infinities by name, since the page shows them, and None for what is not a number."""
    if x is None or math.isnan(x):
        return None
    return rounded(x, 6) if math.isfinite(x) else "∞" if x > 0 else "-∞"


def _heads(frame: pd.DataFrame) -> Iterable[dict[str, Any]]:
    for place in ("head", "expert"):
        rest = [name for name in ("head", "unit", "expert") if name != place]
        rows = frame[frame[place].notna() & frame[rest].isna().all(axis=1)]
        for (kind, measure), part in rows.groupby(["kind", "measure"], sort=False):
            by_layer = part.groupby("layer", sort=True)["value"]
            yield {
                "kind": kind,
                "stack": part["stack"].iloc[0],
                "measure": measure,
                "place": place,
                "layers": [int(layer) for layer in by_layer.groups],
                "values": [[_number(x) for x in values] for _, values in by_layer],
            }


def _units(frame: pd.DataFrame) -> list[dict[str, Any]]:
    rows = frame[frame["unit"].notna() & frame["head"].isna()]
    return [
        {
            "kind": row.kind,
            "stack": row.stack,
            "layer": int(row.layer),
            "unit": int(row.unit),
            "measure": row.measure,
            "value": _number(row.value),
        }
        for row in rows.itertuples()
    ]


def _array(one: dict[str, Any]) -> dict[str, Any]:
    found = {**one, "kind": kind_of(one["site"]), "stack": stack_of(one["site"])}
    if one["dim"] == "bin" and "at" in one:
        found["bins"] = doublings(one)
        del found["values"], found["at"]
    return found
