"""What of a run is shown, in which order: the loss, plain numbers, and panels by layer; for terminal and page alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from actome.core.errors import RunError, nearest
from actome.dynamics.digest import RunDigest
from actome.report.words import WORDS, kind_of, word

LEVELS = ("critical", "warning", "info")
# What is looked at first; then what the vocabulary knows, in its order, then the rest.
_FIRST = (
    "loss", "loss/*", "grad_norm", "update_norm", "update_ratio", "weight_norm", "weight_movement", "lr", "log_z",
    "max_logit", "accuracy", "perplexity",
)  # fmt: skip
# Said of weights rather than of what flows: shown after that.
NORMS = frozenset({"grad_norm", "update_norm", "update_ratio", "weight_norm", "weight_movement"})
_LAST = ("step_time", "overhead")


@dataclass(frozen=True)
class Line:
    """A number of the whole model, or of one place that belongs to no layer.

    Attributes:
        series: its number in the digest.
        measure: its name.
        label: what it is called among the others.
    """

    series: int
    measure: str
    label: str


@dataclass(frozen=True)
class Panel:
    """One measure at one kind of site, through the layers.

    Attributes:
        measure, kind: what, and at what kind of site.
        layers: rising.
        members: the series of each layer; several where there are heads or experts.
        over: what there are several of in a layer: ``"heads"``, ``"experts"``, or nothing.
    """

    measure: str
    kind: str
    layers: tuple[int, ...]
    members: tuple[tuple[int, ...], ...]
    over: str = ""

    @property
    def title(self) -> str:
        kinds = () if self.kind in ("", "attn.pattern", "attn.scores", "moe.router") else (self.kind,)
        return ", ".join((word(self.measure).title, *kinds))

    @property
    def says(self) -> str:
        """What a value of a layer is where it has several: their largest."""
        return f"largest of the {self.over}" if self.over else ""

    def table(self, digest: RunDigest) -> np.ndarray:
        """Mean in each bin, (layer, bin), the largest where a layer has several; NaN where there is none."""
        return np.stack([_largest(digest.table(list(some))) for some in self.members])

    def latest(self, digest: RunDigest) -> np.ndarray:
        """The last value of each layer, (layer)."""
        return np.array([_largest(np.array([digest.latest(one) for one in some])) for some in self.members])


def _largest(values: np.ndarray) -> Any:
    return np.fmax.reduce(values, axis=0)  # NaN only where all are


def chosen(digest: RunDigest, measures: Sequence[str] = ()) -> list[str]:
    """The measures to show, in order.

    Args:
        measures: names or patterns such as ``loss*``; all when empty.

    Raises:
        RunError: nothing was logged under such a name; the message names the nearest.
    """
    there = digest.measures
    if measures:
        for one in measures:
            if not any(fnmatchcase(name, one) for name in there):
                have = nearest(one, there) or (f"; it has {', '.join(there)}" if there else "; it has none yet")
                raise RunError(f"{digest.run.path} has no measure {one!r}{have}")
        there = [name for name in there if any(fnmatchcase(name, one) for one in measures)]
    known = list(WORDS)

    def order(name: str) -> tuple[int, int]:
        for i, pattern in enumerate(_FIRST):
            if fnmatchcase(name, pattern):
                return i, 0
        if name in _LAST:
            return len(_FIRST) + 2, _LAST.index(name)
        return (len(_FIRST), known.index(name)) if name in WORDS else (len(_FIRST) + 1, 0)

    return sorted(there, key=order)


def lines(digest: RunDigest, measures: Sequence[str]) -> list[Line]:
    """Plain numbers: those without layer, head and expert; of a measure that of the whole model first.

    The loss of the training, for one, is of no site, and that of a probe is of the logits; a site is named where there
    is more than one, or where it is not the logits.
    """
    found = []
    for measure in measures:
        places = {i: digest.places[i] for i in digest.find(measure)}
        some = [i for i, (*_, layer, head, expert) in places.items() if layer is head is expert is None]
        for i in sorted(some, key=lambda i: (places[i].site is not None, i)):
            site = places[i].site
            unsaid = site is None or (site == "logits" and len(some) == 1)
            found.append(Line(i, measure, named(measure) + ("" if unsaid else f", {site}")))
    return found


def named(measure: str) -> str:
    """What a measure is called: ``Loss, aux`` for ``loss/aux``.

    >>> named("loss/aux"), named("grad_norm")
    ('Loss, aux', 'Grad norm')
    """
    first, _, rest = measure.partition("/")
    return word(first).title + (f", {rest}" if rest else "")


def panels(digest: RunDigest, measures: Sequence[str]) -> list[Panel]:
    """What was measured in layers, one panel for each measure and kind of site; of one layer alone too."""
    groups: dict[tuple[str, str], dict[int, list[int]]] = {}
    over: dict[tuple[str, str], str] = {}
    for measure in measures:
        for i in digest.find(measure):
            place = digest.places[i]
            if place.layer is not None:
                key = measure, kind_of(place.site or "")
                groups.setdefault(key, {}).setdefault(place.layer, []).append(i)
                if place.head is not None or place.expert is not None:
                    over[key] = "heads" if place.head is not None else "experts"
    return [
        Panel(
            measure, kind, tuple(sorted(by)), tuple(tuple(by[at]) for at in sorted(by)), over.get((measure, kind), "")
        )
        for (measure, kind), by in groups.items()
    ]


def alarm_groups(digest: RunDigest) -> list[list[dict[str, Any]]]:
    """Alarms of one kind, level and site together, the most severe first and of these the latest."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for alarm in digest.alarms:
        groups.setdefault((alarm["level"], alarm["name"], alarm["site"]), []).append(alarm)
    newest = sorted(groups.values(), key=lambda some: -some[-1]["step"])
    return sorted(newest, key=lambda some: LEVELS.index(some[0]["level"]))


def status_facts(digest: RunDigest) -> list[str]:
    """Status, step, speed, time and the cost of watching, in words, as far as they are known."""
    facts = [digest.status]
    if digest.last_step is not None:
        facts.append(f"step {digest.last_step:,}")
    if digest.pace is not None:
        facts.append(
            f"{word('').show(digest.pace)} steps/s" if digest.pace >= 0.1 else f"{1 / digest.pace:.3g} s a step"
        )
    facts.append(span(digest.seconds))
    overhead = [f"overhead {digest.latest(one):.1%}".replace("%", " %") for one in digest.find("overhead")[:1]]
    return [*facts, *overhead]


def span(seconds: float) -> str:
    """A time in words.

    >>> span(4.2), span(250), span(7384), span(200_000)
    ('4 s', '4 min 10 s', '2 h 3 min', '2 d 7 h')
    """
    seconds = int(seconds)
    for size, name, small, part in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= size:
            return f"{seconds // size} {name} {seconds % size // small} {part}"
    return f"{seconds} s"
