"""What a rule is: when a kind of finding is made, and what it rests on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from ...core.measure import Measure
from .thresholds import Thresholds

Severity = Literal["info", "warning", "critical"]
Values = Mapping[str, Tensor]
Measures = Mapping[str, Measure]


class Verdict(NamedTuple):
    """What a rule says of one site.

    Attributes:
        severity: info, warning or critical.
        degree: how strong it is; of sites that are told together the strongest gives the evidence.
        evidence: the numbers that it rests on.
        where: heads, units, experts and positions, those that apply.
        advice: what to do, where it depends on the cause; that of the rule otherwise.
    """

    severity: Severity
    degree: float
    evidence: dict[str, float]
    where: dict[str, list[int]]
    advice: str = ""


@dataclass(frozen=True)
class Rule:
    """One kind of finding.

    Attributes:
        id: its name.
        needs: the values that must have been measured at a site for the rule to apply there.
        judge: from the values of one site, the measures they come from, and the thresholds, the verdict if any.
        source: where the phenomenon or the definition comes from.
        advice: what to do about it, where the verdict does not say.
        only: the end of the names of the sites that it applies to; all when empty.
    """

    id: str
    needs: tuple[str, ...]
    judge: Judge
    source: str
    advice: str
    only: str = ""


Judge = Callable[[Values, Measures, Thresholds], Verdict | None]


def indices(hits: Tensor) -> list[int]:
    """Where a vector is true.

    >>> import torch
    >>> indices(torch.tensor([False, True, True]))
    [1, 2]
    """
    return hits.nonzero().flatten().tolist()
