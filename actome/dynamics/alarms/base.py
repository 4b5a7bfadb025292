"""What an alarm is, what it is raised from, and what looks for it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

Level = Literal["info", "warning", "critical"]
LEVELS: tuple[Level, ...] = ("info", "warning", "critical")


class Reading(NamedTuple):
    """One number of one step, as a row of the run store.

    Attributes:
        measure: what was measured, such as ``loss``, ``grad_norm`` or ``attention_logit_max``.
        value: the number; NaN and infinities as they came.
        site: where, or None for the model as a whole. Numbers about weights have the path of a component as their
            site, such as ``blocks.2.attn``.
        layer, head, unit, expert: those that apply.
    """

    measure: str
    value: float
    site: str | None = None
    layer: int | None = None
    head: int | None = None
    unit: int | None = None
    expert: int | None = None


@dataclass(frozen=True)
class Alarm:
    """Something in a run that a person should know now.

    Attributes:
        step: at which it began to show.
        name: of the kind of alarm, such as ``non_finite``.
        message: what happened, in a sentence with its figures.
        site: where it began; None when it has no place.
        level: ``"info"``, ``"warning"`` or ``"critical"``.
        advice: what to do about it.
        evidence: the figures behind it, ready for JSON.
        source: the paper that describes it.
        degree: how bad it is, on a scale of its kind that starts above 0; 0 where there is no more and less. An alarm
            that stands is told again once its degree has doubled.
    """

    step: int
    name: str
    message: str
    site: str | None = None
    level: Level = "warning"
    advice: str = ""
    evidence: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    degree: float = 0.0


class Detector(ABC):
    """Looks at a run sample by sample for one kind of trouble; one object a run, with memory of what it saw.

    A detector says what holds; `Alarms` sees to it that nobody is told twice. Its memory is bounded, whatever the
    length of the run.

    Attributes:
        name: of the alarms that it raises.
        needs: the measures it looks at; a run that logs none of them is not looked at.
    """

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]]

    @abstractmethod
    def update(self, step: int, readings: Sequence[Reading]) -> list[Alarm] | None:
        """Takes in what was read at a step, and tells what holds now.

        Args:
            step: not smaller than the last one, but for a run that went back to a checkpoint (`rewind`).
            readings: of this step, those of the measures that it needs, or more.

        Returns:
            Every alarm that holds, the place where it began first; an empty list where all is well; None where these
            readings do not suffice to tell, which leaves standing what stands.
        """

    @abstractmethod
    def rewind(self, step: int) -> None:
        """Forgets what was read at this step and later ones, when the run goes back to an earlier checkpoint."""
