"""The run that is written, such that nothing that befalls it ends the training."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from actome.core.errors import RunError

from ..alarms.base import Alarm, Reading
from ..writer import RunWriter


class Logbook:
    """Writes to a run, or nowhere in a process that is not the writer.

    A disk that is full (or any other `RunError`) is told by one warning. What was logged waits in memory, every later
    call tries again, and when it succeeds an event says what happened. It is never raised: training goes on, and so
    does what the script does after it, such as saving the weights.

    Attributes:
        run: the writer; None where another process writes.
        error: why the last attempt failed; None when all is written.
    """

    def __init__(self, run: RunWriter | None):
        self.run = run
        self.error: RunError | None = None

    def readings(self, step: int, readings: Sequence[Reading]) -> None:
        """Numbers of one step, those of one place together."""
        if self.run is None:
            return
        places: dict[tuple[Any, ...], dict[str, float]] = {}
        for one in readings:
            places.setdefault(one[2:], {})[one.measure] = one.value
        for (site, layer, head, unit, expert), values in places.items():
            self._try(self.run.log, step, values, site=site, layer=layer, head=head, unit=unit, expert=expert)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Numbers of the whole network."""
        if self.run is not None and values:
            self._try(self.run.log, step, values)

    def alarm(self, alarm: Alarm) -> None:
        """An alarm, committed at once; its source joins the evidence."""
        if self.run is None:
            return
        evidence = {**alarm.evidence, **({"source": alarm.source} if alarm.source else {})}
        self._try(
            self.run.alarm,
            alarm.step,
            alarm.name,
            alarm.message,
            site=alarm.site,
            level=alarm.level,
            advice=alarm.advice or None,
            evidence=evidence,
        )

    def event(self, name: str, step: int | None = None, **data: Any) -> None:
        """Something that happened."""
        if self.run is not None:
            self._try(self.run.event, name, step, **data)

    def commit(self) -> None:
        """Writes down now what waits."""
        if self.run is not None:
            self._try(self.run.commit)

    def close(self, kind: type[BaseException] | None = None, error: BaseException | None = None) -> None:
        """Ends the run, as failed when an exception ended it."""
        if self.run is not None:
            self._try(self.run.__exit__, kind, error, None)

    def _try(self, act: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        assert self.run is not None
        try:
            act(*args, **kwargs)
        except RunError as error:
            if self.error is None:
                warnings.warn(
                    f"training goes on, and is not written down for now: {error}", RuntimeWarning, stacklevel=4
                )
            self.error = error
            return
        if self.error is not None and self._written():
            said, self.error = str(self.error), None
            self._try(self.run.event, "writing_resumed", None, after=said)

    def _written(self) -> bool:
        """Whether what had to wait can be written now."""
        assert self.run is not None
        try:
            self.run.commit()
        except RunError:
            return False
        return True
