"""When the attention sink of a head, its drained value and its residual peak came up, and by which law.

Source: Guo et al. 2024, "Active-Dormant Attention Heads: Mechanistically Demystifying Extreme-Token Phenomena in LLMs".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from actome.core.errors import MeasureError
from actome.dynamics.dates import Lead, Passage, first_passage, lead_time
from actome.dynamics.law_checks import Control
from actome.dynamics.laws import LawFit, fit_law

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class SinkEmergence:
    """When and how the sink of one head came up.

    Attributes:
        dates: of ``"sink"``, ``"value_drain"`` and ``"residual_peak"``.
        leads: of the sink over each of the other two; missing where neither came.
        change: last value less first of each, mean over runs; a date of what hardly changed says nothing.
        growth: the law ``a + b ln(step)`` of the logit gap, with its band.
        control: the same law on the gap's values in shuffled order.
        reinforcement: rank correlation of logit gap and value drain over checkpoints, median over runs: near -1 where
            one grows while the other shrinks. Two trends correlate whatever made them.
    """

    dates: dict[str, Passage]
    leads: dict[str, Lead]
    change: dict[str, float]
    growth: LawFit = field(repr=False)
    control: Control = field(repr=False)
    reinforcement: float

    @property
    def order(self) -> tuple[str, ...]:
        """By median date, what never came last."""
        return tuple(sorted(self.dates, key=lambda name: self.dates[name].at))


def sink_emergence(
    frame: pd.DataFrame, idle: str, *, layer: int = 0, head: int = 0, share: float = 0.5, hold: int = 2,
    after: float = 1, permutations: int = 99, seed: int = 0,
) -> SinkEmergence:  # fmt: skip
    """Dates the sink, the value drain and the residual peak of one head, and fits the growth of its logit gap.

    Args:
        frame: of `ExtremeTokens.trace`.
        idle: the domain in which the head has nothing to do.
        layer, head: which head.
        share: of the way from its first value to its last that each has to go, for good, to have come up.
        hold: checkpoints in a row that must be beyond that.
        after: steps before it are left out of the law, such as those before there is a sink.
        permutations, seed: of the control and of the intervals.

    Raises:
        MeasureError: a domain or a head that the frame does not have, or too few checkpoints.

    Source: Guo et al. 2024, section 3 (mutual reinforcement; the gap grows like the logarithm of the steps).
    """
    from scipy.stats import spearmanr

    domains = [name.removeprefix("sink ") for name in frame.columns if name.startswith("sink ")]
    if idle not in domains:
        raise MeasureError(f"idle={idle!r} is no domain of this frame; there are {', '.join(domains) or 'none'}")
    one = frame[(frame["layer"] == layer) & (frame["head"] == head)]
    if one.empty:
        raise MeasureError(f"layer {layer} has no head {head} in this frame")
    columns = {"sink": f"sink {idle}", "value_drain": "value_drain", "residual_peak": "residual_peak"}
    curves = {name: one.pivot(index="run", columns="step", values=column) for name, column in columns.items()}
    gap = one.pivot(index="run", columns="step", values=f"logit_gap {idle}")
    steps = gap.columns.to_numpy(dtype=np.float64)
    dates = {
        name: first_passage(steps, curve.to_numpy(), share=share, hold=hold, seed=seed)
        for name, curve in curves.items()
    }
    came = {name for name, date in dates.items() if date.censored < 1}
    leads = {
        name: lead_time(dates["sink"], dates[name], seed=seed)
        for name in ("value_drain", "residual_peak") if came & {"sink", name}
    }  # fmt: skip
    late = (steps >= after) & (steps > 0)  # a logarithm takes no step 0
    growth = fit_law(steps[late], gap.to_numpy()[:, late], "log")
    together = [
        float(spearmanr(gap.to_numpy()[i, late], curves["value_drain"].to_numpy()[i, late]).statistic)
        for i in range(len(gap))
    ]
    return SinkEmergence(
        dates, leads, {name: float((curve.iloc[:, -1] - curve.iloc[:, 0]).mean()) for name, curve in curves.items()},
        growth, growth.control(permutations, seed), float(np.median(together)),
    )  # fmt: skip
