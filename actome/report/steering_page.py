"""The page of a steering evaluation: what is recommended and why, doses and responses, what it costs, what is said."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd

from actome import __version__
from actome.report.shell import Page, whole
from actome.report.steering_figures import ARMS, MEASURES, place_of, steering_figures
from actome.report.vocabulary import Word
from actome.steer import Evaluation

_DOSES = (
    "The shade is a 95 % interval over pairs, questions or rows. Thin lines are controls, one a draw. The broken line "
    "is the recommended strength; strength 0 is the bare model."
)
_SECTIONS = {
    "dose": (
        "Dose and response",
        "Doses",
        _DOSES,
        "depth",
    ),
    "trade": ("What the effect costs", "Costs", "The same numbers, one against the other.", "depth"),
    "sweep": ("Where to steer", "Places", "The fitted clamp at each place that was tried.", "heads"),
}


def steering_page(found: Evaluation, name: str | None = None) -> Page:
    """The page of what `actome.steer.evaluate` found.

    Args:
        name: what to call it; the clamps' names unless given.

    >>> import actome as ac, torch
    >>> from actome.steer import Pairs, evaluate
    >>> pairs = Pairs(["import", "from", "return", "print"] * 2, [" os"] * 8, [" the"] * 8)
    >>> clamp = ac.Add("blocks.1.resid.post", torch.ones(112))
    >>> page = steering_page(evaluate(ac.demo(), clamp, pairs, strengths=(1.0,), random=1, new_tokens=0), "ones")
    >>> "<title>ones – actome steer</title>" in page.html
    True
    """
    drawn = steering_figures(found)
    about = found.about
    sections = [
        {"key": key, "title": title, "short": short, "lead": lead, "grid": grid, "figures": figures}
        for key, (title, short, lead, grid) in _SECTIONS.items()
        if (figures := [figure for figure in drawn if figure.group == key])
    ]
    return Page(
        whole(
            "steering.html",
            specs={figure.key: figure.spec for figure in drawn},
            data={"words": {}, "layers": []},
            scripts=("page.js", "start.js"),
            name=name or ", ".join(about.get("clamps", ["a clamp"])),
            facts=[str(about[key]) for key in ("model",) if key in about] + [f"{about.get('pairs', 0)} pairs"],
            advised=found.strength is not None,
            why=found.why,
            place=_place(found),
            tiles=list(_tiles(found)),
            collapsed=list(_collapses(found)),
            sections=sections,
            samples=_samples(found),
            tables=list(_tables(found)),
            settings=[(key, str(value)) for key, value in about.items()],
            made=f"actome {__version__}",
        )
    )


def _place(found: Evaluation) -> str:
    site, positions = place_of(found)
    where = {"all": "all tokens", "prompt": "the prompt", "last": "the prompt's last token", "response": "the response"}
    return f"{site}, {where.get(positions, positions)}"


def _tiles(found: Evaluation) -> Iterator[dict[str, str]]:
    strength = "none" if found.strength is None else f"{found.strength:g}"
    yield {"name": "Recommended strength", "value": strength, "tone": "warning" if found.strength is None else ""}
    held = found.held_out
    if held:
        mean, low, high = held["gain"]
        yield {"name": "Gain on held-out pairs", "value": f"{mean:+.2f}", "beside": f"{low:+.2f} to {high:+.2f} nats"}
        for key, title in (("random_gains", "Best random direction"), ("shuffled_gains", "Best of shuffled labels")):
            if held.get(key):
                yield {"name": title, "value": f"{max(held[key]):+.2f}", "beside": f"of {len(held[key])}"}
    site, positions = place_of(found)
    here = (found.collapsed["site"] == site) & (found.collapsed["positions"] == positions)
    broken = int(here.sum())
    yield {"name": "Strengths that break it", "value": str(broken or "none"), "tone": "critical" if broken else "calm"}


def _collapses(found: Evaluation) -> Iterator[str]:
    """One line a place: the strengths at which the model comes apart there, and what the first of them does."""
    for (site, positions), rows in found.collapsed.groupby(["site", "positions"], sort=False):
        strengths = ", ".join(f"{one:g}" for one in rows["strength"])
        first = rows.loc[rows["strength"].abs().idxmin()]
        moved = [f"{MEASURES[key][0].lower()} {first[key]:+.2f}" for key in MEASURES if pd.notna(first.get(key))]
        yield f"{site} ({positions}), strength {strengths}; at {first['strength']:g} {', '.join(moved) or 'not finite'}"


def _samples(found: Evaluation) -> dict[str, Any]:
    """Prompts down, strengths across."""
    if not found.samples:
        return {}
    return {
        "strengths": [f"{one['strength']:g}" for one in found.samples],
        "rows": [
            (str(prompt), [str(one["continuations"][i]) for one in found.samples])
            for i, prompt in enumerate(found.samples[0]["prompts"])
        ],
    }


def _tables(found: Evaluation) -> Iterator[dict[str, Any]]:
    columns = {name: Word(*MEASURES[name]) for name in MEASURES if name in set(found.frame["measure"])}
    for (site, positions), here in found.frame.groupby(["site", "positions"], sort=False):
        for arm, rows in here.groupby("arm", sort=False):
            mean = rows.groupby(["strength", "measure"])["value"].mean().unstack()
            body = [
                {
                    "name": f"{strength:g}",
                    "layer": None,
                    "page": "",
                    "site": site,
                    "cells": [_number(values.get(name)) for name in columns],
                }
                for strength, values in mean.iterrows()
            ]
            title = f"{site}, {positions}: {ARMS[str(arm)]}"
            yield {"title": title, "index": "strength", "columns": list(columns.items()), "rows": body}


def _number(value: Any) -> str:
    return "–" if value is None or pd.isna(value) else f"{value:.3f}"
