"""Alerts: from readings to alarms, and from alarms to what is done about them, in every process alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from actome.core.errors import MeasureError

from ..alarms import Alarms
from ..alarms.base import Alarm, Reading
from .logbook import Logbook
from .ranks import Ranks

if TYPE_CHECKING:
    from .watch import Watch


class Alerts:
    """The detectors of one watched run.

    Args:
        detectors: True for the usual ones, False or None for none; detectors; or an `Alarms`.
        actions: what to do, by an alarm's name, a level or ``"*"``; with an `Alarms`, which has its own, None.
    """

    def __init__(self, detectors: Any, actions: Mapping[str, Any] | None):
        self.alarms: Alarms | None
        if isinstance(detectors, Alarms):
            if actions:
                raise MeasureError("an Alarms has actions of its own: give them to it, Alarms(actions=...)")
            self.alarms = detectors
        elif detectors in (False, None):
            if actions:
                raise MeasureError("actions= are for alarms, and alarms=False has none raised; leave one of them out")
            self.alarms = None
        else:
            self.alarms = Alarms(None if detectors is True else list(detectors), actions)

    def resume(self, run: Any) -> None:
        """Stands where the run that is gone on with had ended, so that nothing is told twice."""
        if self.alarms is not None:
            self.alarms.replay(run)

    def found(self, steps: Iterable[tuple[int, Sequence[Reading]]]) -> list[Alarm]:
        """The alarms of some steps, in order."""
        if self.alarms is None:
            return []
        return [alarm for step, readings in steps for alarm in self.alarms.update(step, readings)]

    def tell(self, alarms: Sequence[Alarm], log: Logbook, watch: Watch) -> None:
        """Writes alarms down and does what is to be done about them."""
        for alarm in alarms:
            log.alarm(alarm)
            for act in [] if self.alarms is None else self.alarms.act(alarm, watch):
                log.event("action", watch.at, alarm=alarm.name, **act._asdict())


def agree(alarms: list[Alarm], ranks: Ranks) -> list[Alarm]:
    """The first process's alarms in all of them, since an action that only one took would part their weights."""
    return ranks.tell(alarms)
