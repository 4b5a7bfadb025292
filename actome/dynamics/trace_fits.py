"""Laws fitted to the curves of a trace, each with its goodness, its band and its shuffled control."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from actome.core.errors import MeasureError
from actome.dynamics.law_families import Law, law_of
from actome.dynamics.laws import LawFit, fit_law
from actome.dynamics.trace_table import PLACES

if TYPE_CHECKING:
    from actome.dynamics.trace_table import Trace


@dataclass(frozen=True)
class Fits:
    """One law fitted to several curves.

    Attributes:
        law: its name.
        frame: one row for each curve: place, site, layer, head, expert, points, ``r2``, the parameters (in units of
            steps), what follows from them, ``control`` (the median r2 of the same law on the values in shuffled order),
            ``p`` (share of shuffles that fit as well) and ``open`` (parameters that the data leave open).
        fits: the `LawFit` of each place.
        failed: for each place that could not be fitted, why; a flat curve is one.
    """

    law: str
    frame: pd.DataFrame = field(repr=False)
    fits: dict[str, LawFit] = field(repr=False)
    failed: dict[str, str]

    def __repr__(self) -> str:
        said = f", {len(self.failed)} could not be fitted" if self.failed else ""
        best = f", r2 {self.frame['r2'].min():.3f} to {self.frame['r2'].max():.3f}" if len(self.frame) else ""
        return f"Fits({self.law} on {len(self.frame)} curves{best}{said})"

    def band(self, place: str, steps: Any, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
        """Where the law's curve lies at some steps: low and high, (steps) each; see `LawFit.band`."""
        if place not in self.fits:
            raise MeasureError(f"{place!r} was not fitted: {self.failed.get(place, 'there is no such curve')}")
        return self.fits[place].band(steps, level)


def fit_curves(
    trace: Trace,
    measure: str,
    law: str | Law = "exp_log",
    site: str | None = None,
    *,
    min_points: int | None = None,
    permutations: int = 19,
    starts: int = 12,
    seed: int = 0,
) -> Fits:
    """Fits a law to every curve of a measure.

    Args:
        trace, measure, site: which curves.
        law, min_points, starts: as `fit_law` takes them. A law takes a number of points before its fit says anything
            (20 for ``exp_log``), which few traces of saved checkpoints have.
        permutations, seed: of the shuffled control.

    Raises:
        MeasureError: no curve could be fitted; with the reason of the first.

    >>> from actome.dynamics import Trace
    >>> step = np.arange(1, 31)
    >>> trace = Trace(pd.DataFrame({"step": step, "measure": "norm", "value": 2 + 3 * np.sqrt(step)}))
    >>> found = trace.fit("norm", law="power")
    >>> bool(found.frame["r2"][0] > 0.999), bool(found.frame["control"][0] < 0.5), round(float(found.frame["a"][0]), 2)
    (True, True, 0.5)
    """
    family = law_of(law)
    rows, fits, failed = [], {}, {}
    for curve in trace.each(measure, site):
        try:
            fit = fit_law(curve.x, curve.y, family, min_points=min_points, starts=starts)
            control = fit.control(permutations, seed)
        except MeasureError as error:
            failed[curve.place] = str(error)
            continue
        fits[curve.place] = fit
        rows.append(
            {
                "place": curve.place, **curve.at, "points": len(curve.x), "r2": fit.r2, **fit.parameters, **fit.derived,
                "control": control.median, "p": control.p, "open": ", ".join((*fit.open, *fit.at_bound)),
            }
        )  # fmt: skip
    if not rows:
        first = next(iter(failed.items()), ("", "there are no curves"))
        raise MeasureError(f"no curve of {measure!r} could be fitted by {family.name!r}; {first[0]}: {first[1]}")
    frame = pd.DataFrame(rows)
    return Fits(family.name, frame.astype({key: "Int64" for key in PLACES if key != "site"}), fits, failed)
