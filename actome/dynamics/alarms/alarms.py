"""Alarms: the detectors of one run, so that each trouble is told once, to whom it concerns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from actome.core.errors import MeasureError, nearest

from .actions import Acted, Action, Watching, perform
from .base import LEVELS, Alarm, Detector, Level, Reading

if TYPE_CHECKING:
    import pandas as pd

    from actome.dynamics.store import RunStore

_WORSE = 2.0  # times the degree that was told last


@dataclass
class _Standing:
    """An alarm that was told and has not cleared."""

    told_at: int
    level: Level
    degree: float
    absent: int = 0


class Alarms:
    """The detectors of one run and what is done when they find something.

    An alarm is told once. It is told again when its level rises, when its degree has doubled, or when it comes back
    after it cleared. What one detector finds at several sites at one step is one alarm, of the site where it began,
    with the others in its evidence under ``"also"``.

    Args:
        detectors: by default `default_detectors`. One object watches one run.
        actions: what to do, by the name of an alarm, by a level (``"critical"``), or ``"*"`` for every alarm; one
            action or several. An action is called with the alarm and the watch, see `actions`.
        clear: an alarm has cleared once its detector looked this many times in a row and did not find it.

    Raises:
        MeasureError: an action for an alarm that none of the detectors raises.

    >>> alarms = Alarms()
    >>> alarms.update(7, [Reading("non_finite", 0.0, "embed"), Reading("non_finite", 0.5, "blocks.0.mlp.act")])[0].site
    'blocks.0.mlp.act'
    >>> alarms.update(8, [Reading("non_finite", 0.5, "blocks.0.mlp.act")])         # said already
    []
    """

    def __init__(
        self,
        detectors: Iterable[Detector] | None = None,
        actions: Mapping[str, Action | Sequence[Action]] | None = None,
        *,
        clear: int = 3,
    ):
        if detectors is None:
            from .default import default_detectors

            detectors = default_detectors()
        self.detectors = list(detectors)
        for detector in self.detectors:
            if not hasattr(detector, "update"):
                raise MeasureError(f"a detector is an object such as LossSpike(), not {detector!r}")
        self.clear = clear
        self.actions = {key: _listed(one) for key, one in (actions or {}).items()}
        known = {"*", *LEVELS, *(one.name for one in self.detectors)}
        for key in self.actions:
            if key not in known:
                others = nearest(key, known) or f"; there are: {', '.join(sorted(known))}"
                raise MeasureError(f"there is no alarm {key!r} to act on{others}")
        self._standing: dict[tuple[str, str | None], _Standing] = {}
        self._retired: set[int] = set()
        self._last: int | None = None

    @property
    def needs(self) -> tuple[str, ...]:
        """The measures that any of the detectors looks at."""
        return tuple(dict.fromkeys(name for detector in self.detectors for name in detector.needs))

    def update(self, step: int, readings: Iterable[Reading]) -> list[Alarm]:
        """Takes in what was read at a step, and gives the alarms to be told now, the most severe first.

        Steps come in order. One step may come in several parts, and steps at which only the loss was read may be handed
        in late, as long as they come before the next sample. A detector that fails is left out from then on, and that
        is told as an alarm: watching must not end a training.

        Raises:
            MeasureError: a step before the last one; call `rewind` first when a run went back.
        """
        if self._last is not None and step < self._last:
            raise MeasureError(f"step {step} comes after step {self._last}; call rewind({step}) when a run goes back")
        self._last = step
        by_measure: dict[str, list[Reading]] = {}
        for one in readings:
            by_measure.setdefault(one.measure, []).append(one)
        news: list[Alarm] = []
        for i, detector in enumerate(self.detectors):
            mine = [one for name in detector.needs if name in by_measure for one in by_measure[name]]
            if not mine or i in self._retired:
                continue
            try:
                found = detector.update(step, mine)
            except Exception as error:  # whatever it is: a training of days must not end here
                self._retired.add(i)
                news.append(_failure(step, detector, error))
                continue
            if found is not None:
                news += self._news(step, detector.name, found)
        return sorted(news, key=lambda one: -LEVELS.index(one.level))

    def act(self, alarm: Alarm, watch: Watching | None = None) -> list[Acted]:
        """Does what is to be done about an alarm. An action that raises is told in what this returns, and no more."""
        wanted = [one for key in (alarm.name, alarm.level, "*") for one in self.actions.get(key, ())]
        return [perform(one, alarm, watch) for one in wanted]

    def rewind(self, step: int) -> None:
        """Forgets this step and later ones: the run goes back to a checkpoint and makes `step` again.

        What had cleared before that is not brought back; it is told anew if it holds.
        """
        for detector in self.detectors:
            detector.rewind(step)
        self._standing = {key: one for key, one in self._standing.items() if one.told_at < step}
        if self._last is not None and self._last >= step:
            self._last = step - 1

    def replay(self, run: RunStore | pd.DataFrame) -> list[Alarm]:
        """The alarms of what was logged, in order, as they would have been told at the time; no action is taken.

        For runs of anybody's: the measures are found by their names. Afterwards these alarms stand as they did at the
        end of the run, so that a run that is resumed tells nothing twice.

        Args:
            run: a store, a `Trace`, or a tidy frame with the columns step, measure, value, and site, layer, head, unit,
                expert where there are such. What a run logged before it went back to an earlier step is passed over.

        Raises:
            MeasureError: a frame without the columns, with no measure that a detector looks at, or of several runs.
        """
        return [alarm for step, readings in _steps(run, self.needs) for alarm in self.update(step, readings)]

    def _news(self, step: int, name: str, found: Sequence[Alarm]) -> list[Alarm]:
        here = {(one.name, one.site) for one in found}
        for key, standing in list(self._standing.items()):
            if key[0] == name and key not in here:
                standing.absent += 1
                if standing.absent >= self.clear:
                    del self._standing[key]
        news = []
        for one in found:
            standing = self._standing.get((one.name, one.site))
            if standing is None or _worse(one, standing):
                news.append(one)
                self._standing[one.name, one.site] = _Standing(step, one.level, one.degree)
            else:
                standing.absent = 0
        if len(news) < 2:
            return news
        first = max(news, key=lambda one: LEVELS.index(one.level))  # the first of those of the highest level
        also = [one.site for one in news if one is not first]
        return [replace(first, evidence={**first.evidence, "also": also})]


def _worse(one: Alarm, told: _Standing) -> bool:
    return LEVELS.index(one.level) > LEVELS.index(told.level) or one.degree >= _WORSE * told.degree > 0


def _failure(step: int, detector: Detector, error: Exception) -> Alarm:
    what = f"{type(error).__name__}: {error}"
    return Alarm(
        step, "detector_failed", f"the detector {detector.name!r} failed and is left out from here on: {what}",
        level="info", advice="the training is not concerned; report the failure", evidence={"error": what},
    )  # fmt: skip


def _listed(actions: Action | Sequence[Action]) -> list[Action]:
    listed = [actions] if callable(actions) or isinstance(actions, str) else list(actions)
    for one in listed:
        if not callable(one):
            raise MeasureError(f"an action is Stop(), LowerLR(), SaveCheckpoint() or a function, not {one!r}")
    return listed


def _steps(run: Any, needs: Sequence[str]) -> Iterator[tuple[int, list[Reading]]]:
    """Step by step what was logged of the measures that matter."""
    frame = getattr(run, "frame", run)
    if callable(frame):
        frame = frame(measure=[name for name in needs if name in run.measures])
    else:
        missing = {"step", "measure", "value"} - set(getattr(frame, "columns", ()))
        if missing:
            raise MeasureError(
                "alarms are replayed from a run store (RunStore.open), or a frame with step, measure and value; "
                f"{type(run).__name__} lacks {', '.join(sorted(missing))}"
            )
        if len(frame) and not frame["measure"].isin(needs).any():
            # An empty list would say that all is well.
            there = ", ".join(map(str, frame["measure"].unique()[:6]))
            raise MeasureError(
                f"no detector looks at any of the measures in the frame ({there}); they look at {', '.join(needs)}"
            )
        frame = frame[frame["measure"].isin(needs)]
    if "run" in frame and frame["run"].nunique() > 1:
        raise MeasureError(f"alarms are of one run; choose one of {', '.join(map(str, frame['run'].unique()))}")
    if frame.empty:
        return
    for name in ("step", "value"):
        if frame[name].dtype.kind not in "iufb" or (name == "step" and frame[name].isna().any()):
            raise MeasureError(f"the column {name!r} holds something that is no number")
    frame = frame.sort_values("step", kind="stable")
    columns = [frame[name].tolist() for name in ("measure", "value")]
    for name in ("site", "layer", "head", "unit", "expert"):
        given = frame[name].astype(object).where(frame[name].notna(), None).tolist() if name in frame else None
        if given is not None and name != "site":
            given = [None if one is None else int(one) for one in given]
        columns.append(given or [None] * len(frame))
    steps = frame["step"].tolist()
    at = 0
    readings = list(map(Reading, *columns))
    for i in range(1, len(steps) + 1):
        if i == len(steps) or steps[i] != steps[at]:
            yield int(steps[at]), readings[at:i]
            at = i
