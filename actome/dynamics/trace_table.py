"""The table that a trace is: values over steps, with curves, fits, dates and figures of them."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from actome.core.errors import MeasureError, RunError, SiteError, nearest
from actome.core.sites import select
from actome.dynamics.store import RunStore

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from actome.dynamics.trace_dates import Dated
    from actome.dynamics.trace_fits import Fits

KIND, DONE, LEFT_OUT = "trace", "checkpoint", "left_out"
COLUMNS = ["step", "site", "layer", "head", "expert", "measure", "value"]
PLACES = ["site", "layer", "head", "expert"]
# What draws is a layer above, which imports from here; it is found by its name when it is asked for.
_DRAWS = "actome.report.trace"


@dataclass(frozen=True)
class Trace:
    """Values of measures over the steps of a training.

    Attributes:
        frame: one row for each number: step, site, layer, head, expert (missing where they do not apply), measure,
            value; in order of step. Numbers of the whole model, such as a loss, have no site.
        about: what was traced: source, panel, text, facts about the model.
        left_out: for each step that could not be measured, why.
        notes: what the panel measures and these models have no place for, and what was passed over.

    >>> frame = pd.DataFrame({"step": [0, 10, 20], "measure": "loss", "value": [3.0, 2.0, 1.5]})
    >>> found = Trace(frame)
    >>> found
    Trace(3 steps from 0 to 20, 1 measure)
    >>> found.curve("loss").tolist()
    [3.0, 2.0, 1.5]
    """

    frame: pd.DataFrame
    about: dict[str, Any] = field(default_factory=dict)
    left_out: dict[int, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "frame", _typed(self.frame))

    def __repr__(self) -> str:
        steps, measures = self.steps, len(self.measures)
        span = f"{len(steps)} steps from {steps[0]} to {steps[-1]}" if steps else "no steps"
        left = f", {len(self.left_out)} left out" if self.left_out else ""
        return f"Trace({span}, {measures} measure{'s' if measures != 1 else ''}{left})"

    @property
    def steps(self) -> list[int]:
        """The steps at which anything was measured, in order."""
        return sorted(int(step) for step in self.frame["step"].unique())

    @property
    def measures(self) -> list[str]:
        """The names of the values, each once."""
        return list(dict.fromkeys(self.frame["measure"]))

    # -- curves -------------------------------------------------------------------------------------------------------

    def rows(
        self, measure: str, site: str | None = None, *, head: int | None = None, expert: int | None = None
    ) -> pd.DataFrame:
        """The rows of one measure, with a column ``place`` that names each curve.

        Args:
            measure: a name out of `measures`.
            site: one, or a pattern such as ``blocks.*.resid.post``.
            head, expert: only these.

        Raises:
            MeasureError: nothing of that name, or nothing at such a place; names the nearest.
        """
        if measure not in set(self.frame["measure"]):
            raise MeasureError(
                f"the trace has no measure {measure!r}{nearest(measure, self.measures) or f'; it has {self.measures}'}"
            )
        rows = self.frame[self.frame["measure"] == measure]
        if site is not None:
            there = list(dict.fromkeys(rows["site"].dropna()))
            try:
                rows = rows[rows["site"].isin(select(site, there))]
            except SiteError as error:
                raise MeasureError(f"{measure!r}: {error}") from error
        for name, at in (("head", head), ("expert", expert)):
            if at is not None:
                rows = rows[(rows[name] == at).fillna(False)]
        if rows.empty:
            where = ", ".join(
                f"{k} {v}" for k, v in (("site", site), ("head", head), ("expert", expert)) if v is not None
            )
            raise MeasureError(f"{measure!r} was not measured at {where}")
        return rows.assign(place=places_of(rows))

    def curve(
        self,
        measure: str,
        site: str | None = None,
        *,
        head: int | None = None,
        expert: int | None = None,
        over: str | None = None,
    ) -> pd.Series:
        """One value a step, by step.

        Args:
            measure, site, head, expert: as in `rows`.
            over: ``"mean"``, ``"max"`` or ``"min"`` over all places that these leave.

        Raises:
            MeasureError: several places are left and `over` does not say what to do with them.
        """
        rows = self.rows(measure, site, head=head, expert=expert)
        if over is not None:
            if over not in ("mean", "max", "min"):
                raise MeasureError(f"over={over!r}; choose 'mean', 'max' or 'min'")
            return rows.groupby("step")["value"].agg(over).rename(measure)
        names = list(dict.fromkeys(rows["place"]))
        if len(names) > 1:
            some = "; ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            raise MeasureError(
                f"{measure!r} was measured at {len(names)} places ({some}); name one by site= and head=, give "
                "over='mean', or use `curves`"
            )
        return rows.set_index("step")["value"].rename(measure)

    def curves(
        self, measure: str, site: str | None = None, *, head: int | None = None, expert: int | None = None
    ) -> pd.DataFrame:
        """All curves of a measure, one column a place, by step; NaN where a step lacks it."""
        rows = self.rows(measure, site, head=head, expert=expert)
        order = list(dict.fromkeys(rows["place"]))
        return rows.pivot(index="step", columns="place", values="value")[order].rename_axis(columns=None)

    def each(self, measure: str | Sequence[str] | None = None, site: str | None = None) -> Iterator[Curve]:
        """Every curve of some or all measures, those with no number left out."""
        names = self.measures if measure is None else [measure] if isinstance(measure, str) else list(measure)
        for name in names:
            for place, part in self.rows(name, site).groupby("place", sort=False):
                finite = part[part["value"].abs() < float("inf")]
                if len(finite):
                    at = {key: None if pd.isna(part[key].iloc[0]) else part[key].iloc[0] for key in PLACES}
                    yield Curve(name, str(place), at, finite["step"].to_numpy(float), finite["value"].to_numpy(float))

    # -- what they say ------------------------------------------------------------------------------------------------

    def fit(self, measure: str, law: str = "exp_log", site: str | None = None, **options: Any) -> Fits:
        """A law fitted to each curve of a measure, with its goodness, band and shuffled control; see `fit_curves`."""
        from actome.dynamics.trace_fits import fit_curves

        return fit_curves(self, measure, law, site, **options)

    def dates(self, measure: str | Sequence[str] | None = None, site: str | None = None, **options: Any) -> Dated:
        """When each curve changed; see `date_curves`."""
        from actome.dynamics.trace_dates import date_curves

        return date_curves(self, measure, site, **options)

    def figure(self, measure: str, site: str | None = None, **options: Any) -> Any:
        """The curves of a measure as an Altair chart; see `actome.report.trace.chart`."""
        return importlib.import_module(_DRAWS).chart(self, measure, site, **options)

    def to_html(self, path: str | os.PathLike[str] | None = None) -> str:
        """The trace as one page that needs no network; written to a file when one is given."""
        drawn = importlib.import_module(_DRAWS)
        html = drawn.page(self)
        if path is not None:
            drawn.write(Path(path).expanduser(), html)
        return html

    # -- on disk ------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Writes the trace as a run store; `Trace.open` reads it.

        Raises:
            RunError: something is there already.
        """
        config = {**self.about, "kind": KIND}
        with RunStore.create(path, config=config, overwrite=overwrite) as store:
            store.log_rows(self.frame)
            for step in self.steps:
                store.event(DONE, step, checkpoint=f"step {step}", mark=None, notes=list(self.notes))
            for step, reason in self.left_out.items():
                store.event(LEFT_OUT, step, checkpoint=f"step {step}", reason=reason)
        return Path(path)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Trace:
        """A trace from the folder that `trace(out=...)`, `save` or a watched run wrote."""
        with RunStore.open(path) as run:
            return cls.from_run(run)

    @classmethod
    def from_run(cls, run: RunStore, name: str | None = None) -> Trace:
        """A trace of what a run logged; a run that was watched is a trace too.

        Args:
            run: opened or being written.
            name: of one run, in a store that several were merged into.

        Raises:
            RunError: a store of several runs and no name.
        """
        several = len(run.configs) > 1
        if several and name is None:
            raise RunError(f"{run.path} holds the runs {', '.join(run.configs)}; name one of them")
        frame, events = run.frame(run=name), run.events
        if several:
            events = events[events["run"] == name]
        config = run.configs[name] if name is not None else run.config
        about = {key: value for key, value in config.items() if key != "architecture"}
        about.setdefault("source", str(run.path))
        left_out, notes = {}, {}
        if config.get("kind") == KIND:
            # What came in after the last note that a checkpoint is done is a part of one.
            done = {int(e.step): e.data for e in events[events["name"] == DONE].itertuples()}
            frame = frame[frame["step"].isin(list(done))]
            notes = dict.fromkeys(note for data in done.values() for note in data.get("notes", ()))
            gone = events[events["name"] == LEFT_OUT]
            left_out = {int(e.step): e.data["reason"] for e in gone.itertuples() if int(e.step) not in done}
        if "unit" in frame:
            frame = frame[frame["unit"].isna()]
        return cls(frame.drop(columns=["run", "unit"], errors="ignore"), about, left_out, tuple(notes))


@dataclass(frozen=True)
class Curve:
    """One value over steps.

    Attributes:
        measure, place: its names; `place` is as in the columns of `Trace.curves`.
        at: site, layer, head, expert, None where they do not apply.
        x, y: steps and values, finite ones only, (points) each.
    """

    measure: str
    place: str
    at: dict[str, Any]
    x: Any
    y: Any


def places_of(rows: pd.DataFrame) -> list[str]:
    """A name for the place of each row: its site, head and expert.

    >>> places_of(pd.DataFrame({"site": ["blocks.0.attn.pattern", None], "head": [1, None], "expert": None}))
    ['blocks.0.attn.pattern head 1', 'model']
    """
    names = []
    for site, head, expert in zip(rows["site"], rows["head"], rows["expert"], strict=True):
        words = [site if isinstance(site, str) else "model"]
        words += [f"{k} {int(v)}" for k, v in (("head", head), ("expert", expert)) if not pd.isna(v)]
        names.append(" ".join(words))
    return names


def _typed(frame: pd.DataFrame) -> pd.DataFrame:
    lacking = [name for name in ("step", "measure", "value") if name not in frame]
    if lacking:
        raise MeasureError(f"a trace is a table with the columns {', '.join(COLUMNS)}; this lacks {', '.join(lacking)}")
    frame = frame.reindex(columns=COLUMNS)
    frame = frame.astype({"step": "int64", "layer": "Int64", "head": "Int64", "expert": "Int64", "value": "float64"})
    frame["site"] = frame["site"].astype(object).where(frame["site"].notna(), None)
    # A checkpoint that was measured again, after an interruption, has the later value.
    frame = frame.drop_duplicates(["step", *PLACES, "measure"], keep="last")
    return frame.sort_values("step", kind="stable", ignore_index=True)
