"""One line of the table: what was done, what it cost, what it may cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .timing import Figure


@dataclass(frozen=True)
class Options:
    """What every suite is told.

    Attributes:
        threads: for the large model; the small one always has one.
        quick: few rounds, to see that everything works.
        peers: whether the libraries that are compared with may be imported.
        panel: whose measures are told one by one.
    """

    threads: int = 2
    quick: bool = False
    peers: bool = True
    panel: str = "health"

    def rounds(self, full: int) -> int:
        """How many rounds to make of those that a suite would like."""
        return max(2, full // 10) if self.quick else full


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        work: what was done.
        unit: ``"x"`` of the bare model's time; ``"ms"`` or ``"s"`` beside it; ``"MB"``.
        ours: what actome took.
        limit: what it may take; ``None`` for a line that only informs.
        bare: what the bare model took, in words.
        peers: the same of other libraries, or why there is none.
        note: what a reader must know.
    """

    work: str
    unit: str
    ours: Figure
    limit: float | None = None
    bare: str = ""
    peers: dict[str, Figure | str] = field(default_factory=dict)
    note: str = ""

    @property
    def verdict(self) -> str:
        """ok or over, by the median in as many decimals as limits are given in; nothing without a limit."""
        if self.limit is None:
            return ""
        return "ok" if round(self.ours.median, 2) <= self.limit else "over"

    def as_json(self) -> dict[str, Any]:
        """All of it, samples included."""
        peers = {name: one if isinstance(one, str) else _figure(one) for name, one in self.peers.items()}
        rest = {key: getattr(self, key) for key in ("work", "unit", "limit", "verdict", "bare", "note")}
        return {**rest, "actome": _figure(self.ours), "peers": peers}


def _figure(figure: Figure) -> dict[str, Any]:
    return {
        "median": figure.median,
        "quartiles": [figure.quantile(0.25), figure.quantile(0.75)],
        "samples": list(figure.samples),
    }
