"""What an entry of the papers registry and a reproduction are, and how they are found and run."""

from __future__ import annotations

import importlib
import math
import pkgutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from actome.core.errors import ActomeError, nearest

Scale = Literal["smoke", "small"]
SCALES: tuple[Scale, ...] = ("smoke", "small")


class PaperError(ActomeError, LookupError):
    """A paper or a scale that the registry does not have."""


@dataclass(frozen=True)
class Reproduction:
    """What came out when a paper's claim was put to the test.

    Attributes:
        slug, seed, scale: what was run.
        claim: in words, with its thresholds.
        figures: what was measured, by name; numbers, or lists and mappings of numbers.
        control: the same for the control, where the claim must not show.
        checks: each part of the claim, and whether it held.
        held: whether all of them did.
        seconds: how long it took.
    """

    slug: str
    seed: int
    scale: Scale
    claim: str
    figures: dict[str, Any]
    control: dict[str, Any]
    checks: dict[str, bool]
    seconds: float = 0.0

    @property
    def held(self) -> bool:
        return all(self.checks.values())

    def to_dict(self) -> dict[str, Any]:
        """Everything, `held` included, ready for strict JSON; NaN and infinity become ``None``."""
        return _plain({**asdict(self), "held": self.held})


@dataclass(frozen=True)
class Entry:
    """One paper of the registry.

    Attributes:
        number: of the card in the project's list of research.
        slug: its name on the command line.
        title: of the paper.
        kind: ``"measure"``, ``"method"``, ``"phenomenon"``, ``"theory"`` or ``"domain-model"``.
        home: where in actome its method lives, as a dotted name.
        claim: what the reproduction tests, in one line.
        test: ``test(seed, scale) -> (figures, control, checks)``.
        takes: about how long each scale takes on two cores, in words.
        open: what of the paper is not covered yet; empty when nothing.
    """

    number: int
    slug: str
    title: str
    kind: Literal["measure", "method", "phenomenon", "theory", "domain-model"]
    home: str
    claim: str
    test: Callable[[int, Scale], tuple[dict[str, Any], dict[str, Any], dict[str, bool]]] = field(repr=False)
    takes: dict[Scale, str] = field(default_factory=dict)
    open: str = ""

    def reproduce(self, seed: int = 0, scale: Scale = "smoke") -> Reproduction:
        """Puts the claim to the test.

        Args:
            seed: of everything random in it; the same seed gives the same figures on the same machine.
            scale: ``"smoke"`` (seconds, fewer seeds or steps than the claim is stated for) or ``"small"``.

        Raises:
            PaperError: for a scale that does not exist.
        """
        if scale not in SCALES:
            raise PaperError(f"there is no scale {scale!r}; choose {' or '.join(SCALES)}")
        start = time.perf_counter()
        figures, control, checks = self.test(seed, scale)
        seconds = round(time.perf_counter() - start, 1)
        return Reproduction(self.slug, seed, scale, self.claim, figures, control, checks, seconds)

    def to_dict(self) -> dict[str, Any]:
        """What `actome papers show --json` prints."""
        keys = ("number", "slug", "title", "kind", "home", "claim", "takes", "open")
        return {key: value for key in keys if (value := getattr(self, key)) != ""}


def slugs() -> list[str]:
    """The slugs of all papers: one module each, named after its slug and imported when it is asked for.

    >>> "lac-voids" in slugs()
    True
    """
    names = (module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]))
    return sorted(name.replace("_", "-") for name in names if name != "registry" and not name.startswith("_"))


def entries() -> list[Entry]:
    """All entries, by number.

    >>> [entry.number for entry in entries() if entry.slug == "lac-voids"]
    [14]
    """
    return sorted(map(find, slugs()), key=lambda entry: entry.number)


def find(slug: str) -> Entry:
    """The entry of a slug, or of a number written as digits.

    Raises:
        PaperError: when there is none; names the nearest.

    >>> find("lac-voids").number
    14
    """
    if slug.isdecimal():
        for entry in entries():
            if entry.number == int(slug):
                return entry
    known = slugs()
    if slug not in known:
        raise PaperError(f"there is no paper {slug!r}{nearest(slug, known) or '; there are: ' + ', '.join(known)}")
    return importlib.import_module(f"actome.papers.{slug.replace('-', '_')}").ENTRY


def run(slug: str, seed: int = 0, scale: Scale = "smoke") -> Reproduction:
    """Puts one paper's claim to the test; see `Entry.reproduce`."""
    return find(slug).reproduce(seed, scale)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value
