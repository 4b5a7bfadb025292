"""Evaluate: what a clamp does at each strength, what it costs, and whether chance would do the same.

Letters: N pairs, R rows of text, S strengths.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from actome.clamps import Add
from actome.core.errors import MeasureError
from actome.measures import repetition
from actome.tasks.trials import split

from .contrast import Contrast, Examples
from .controls import dealt
from .likelihood import text_nll
from .manifold import Manifold
from .preference import Pairs, at_strength, odds
from .states import states

if TYPE_CHECKING:
    import pandas as pd

    from actome.core.model import Model

STRENGTHS = (-1.0, 0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
_LAST = "blocks.*.resid.post"


@dataclass(frozen=True)
class Evaluation:
    """A dose-response with its controls.

    Attributes:
        frame: a row for each site, arm (``fitted``, ``random``, ``shuffled``), draw of the arm, strength and measure:
            site, arm, draw, strength, measure, value, low, high. Measures are ``preference`` and ``utility``
            (log-odds), ``nll`` (nats a token of the text), ``repetition`` (of generated text) and ``off_manifold``
            (at the end of the stream, about 1 for clean states).
        site, strength: what is recommended; None where nothing is.
        why: the reason, in a sentence with its figures.
        held_out: figures of the recommended clamp on pairs that were not used to choose it: preference without and
            with the clamp, with intervals; the same of random directions.
        about: how it was done.
    """

    frame: pd.DataFrame
    site: str | None
    strength: float | None
    why: str
    held_out: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    def curve(self, measure: str, *, site: str | None = None, arm: str = "fitted") -> pd.DataFrame:
        """Strength, value, low, high of one measure; of an arm with several draws their mean and range.

        Raises:
            MeasureError: a measure, site or arm that was not looked at.
        """
        site = site or self.site or self.frame["site"].iloc[0]
        one = self.frame.query("measure == @measure and site == @site and arm == @arm")
        if one.empty:
            known = {name: sorted(self.frame[name].unique()) for name in ("measure", "site", "arm")}
            raise MeasureError(f"there is no {measure!r} of {arm!r} at {site!r}; there are {known}")
        if one["draw"].nunique() > 1:
            by = one.groupby("strength")["value"]
            return by.agg(value="mean", low="min", high="max").reset_index()
        return one[["strength", "value", "low", "high"]].sort_values("strength").reset_index(drop=True)


def evaluate(
    model: Model,
    clamp: Add,
    pairs: Pairs,
    *,
    text: Any = None,
    prompts: Any = None,
    strengths: Sequence[float] = STRENGTHS,
    sites: Sequence[str] | None = None,
    estimator: Contrast | None = None,
    data: Examples | None = None,
    random: int = 5,
    shuffled: int = 2,
    allowed: float = 0.1,
    per_token: bool = False,
    new_tokens: int = 24,
    batch_size: int = 16,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """The dose-response of an additive clamp, against random directions of the same norm and shuffled labels.

    Half of the pairs choose the site and strength, the other half tell what the choice is worth.

    Args:
        model: to be steered.
        clamp: an `Add`, such as `Contrast` fits. Strengths multiply its own scale.
        pairs: what it should bring about; eight at least.
        text: held-out text (list of texts, ids, `Text`) whose likelihood must not suffer; without it, damage shows
            only in `utility` and `repetition`.
        prompts: from which text is generated, to look for repetition; the pairs' prompts unless given.
        strengths: multiples; 0 is always looked at.
        sites: other sites to try the contrast at (layer sweep); needs a `Steering` clamp fitted there.
        estimator, data: with which the clamp was fitted; needed for the control with shuffled labels.
        random, shuffled: how many draws of each control.
        allowed: rise of nll (nats a token) and of repetition up to which a strength may be recommended.
        per_token: likelihoods as nats a token, for long responses.
        new_tokens: to generate for `repetition`; 0 generates nothing.
        seed: of splits, controls and intervals.
        progress: called with steps done and of how many.

    Raises:
        MeasureError: fewer than eight pairs, a clamp that is no constant vector, sites where it was not fitted.

    >>> import actome as ac, torch
    >>> model = ac.demo()
    >>> pairs = Pairs(["import", "from", "return", "print"] * 2, [" os"] * 8, [" the"] * 8)
    >>> clamp = ac.Add("blocks.1.resid.post", torch.randn(112, generator=torch.Generator().manual_seed(0)))
    >>> found = evaluate(model, clamp, pairs, strengths=(1.0,), random=1, new_tokens=0)
    >>> sorted(found.frame["arm"].unique()), found.curve("preference")["strength"].tolist()
    (['fitted', 'random'], [0.0, 1.0])
    """
    if len(pairs) < 8:
        raise MeasureError(f"{len(pairs)} pairs are too few to choose on one half and judge on the other; give 8")
    if not isinstance(clamp, Add) or not isinstance(clamp.value, Tensor):
        raise MeasureError(f"evaluate takes an additive clamp with a vector, not {type(clamp).__name__}")
    steps = tuple(sorted({0.0, *map(float, strengths)}))
    choose, judge = split(len(pairs), [0.5, 0.5], seed)
    lab = _Lab(model, pairs.part(choose.tolist()), text, prompts, per_token, new_tokens, batch_size, seed)
    arms = dealt(model, clamp, sites, estimator, data, random, shuffled, seed)
    rows: list[tuple[Any, ...]] = []
    for i, (arm, draw, one) in enumerate(arms):
        for j, strength in enumerate(steps):
            found = lab.at(one, strength)
            rows += [(one.site, arm, draw, strength, measure, *value) for measure, value in found.items()]
            if progress is not None:
                progress(i * len(steps) + j + 1, len(arms) * len(steps))
    import pandas as pd

    frame = pd.DataFrame(rows, columns=["site", "arm", "draw", "strength", "measure", "value", "low", "high"])
    site, strength, why = _recommend(frame, allowed)
    held_out = {}
    if site is not None and strength is not None:
        chosen = next(one for arm, _, one in arms if arm == "fitted" and one.site == site)
        controls = [one for arm, _, one in arms if arm == "random" and one.site == site]
        held_out = _judge(lab, pairs.part(judge.tolist()), chosen, controls, strength)
    about = {
        "pairs": len(pairs),
        "strengths": list(steps),
        "random": random,
        "shuffled": shuffled if estimator is not None else 0,
        "allowed": allowed,
        "seed": seed,
    }
    return Evaluation(frame, site, strength, why, held_out, about)


class _Lab:
    """Everything that is measured at one strength of one clamp, and the same without a clamp, once."""

    def __init__(
        self,
        model: Model,
        pairs: Pairs,
        text: Any,
        prompts: Any,
        per_token: bool,
        new_tokens: int,
        batch_size: int,
        seed: int,
    ):
        self.model, self.pairs, self.text = model, pairs, text
        self.prompts = pairs.prompts if prompts is None else prompts
        self.per_token, self.new_tokens, self.batch_size, self.seed = per_token, new_tokens, batch_size, seed
        self.end = model.match(_LAST)[-1].name
        clean = self._end_states()
        self.manifold = Manifold.fit(clean) if len(clean) >= 16 else None
        self.bare: dict[str, tuple[float, float, float]] | None = None

    def at(self, clamp: Add, strength: float) -> dict[str, tuple[float, float, float]]:
        """Measures with their 95 % intervals over pairs or rows."""
        if strength == 0.0:
            if self.bare is None:
                self.bare = self._measured()
            return self.bare
        with at_strength(self.model, clamp, strength):
            return self._measured()

    def _measured(self) -> dict[str, tuple[float, float, float]]:
        found = odds(self.model, self.pairs, per_token=self.per_token, batch_size=self.batch_size)
        out = {name: interval(getattr(found, name).numpy(), self.seed) for name in ("preference", "utility")}
        if self.text is not None:
            got = text_nll(self.model, self.text, batch_size=self.batch_size)
            out["nll"] = interval(got.nll.numpy(), self.seed, got.tokens.numpy())
        if self.new_tokens:
            value = self._repetition()
            out["repetition"] = (value, math.nan, math.nan)
        if self.manifold is not None:
            out["off_manifold"] = interval(self.manifold.distance(self._end_states()).numpy(), self.seed)
        return out

    def _end_states(self) -> Tensor:
        found = states(self.model, self.prompts, self.end, over="last", batch_size=self.batch_size)
        return found[self.end]

    def _repetition(self) -> float:
        prompts = self.prompts[: self.batch_size]
        made = self.model.generate(prompts, max_new_tokens=self.new_tokens).new
        return repetition(made)


def _recommend(frame: pd.DataFrame, allowed: float) -> tuple[str | None, float | None, str]:
    """The smallest strength that gives most of what can be had without more damage than is allowed."""
    fitted = frame[frame["arm"] == "fitted"]
    wide = fitted.pivot_table(index=["site", "strength"], columns="measure", values="value").reset_index()
    bare = wide[wide["strength"] == 0.0].iloc[0]
    fit = (wide["strength"] > 0) & wide["preference"].notna()
    for name in ("nll", "repetition"):
        if name in wide:
            fit &= ~(wide[name] - bare[name] > allowed)
    usable = wide[fit]
    if usable.empty:
        return None, None, f"every strength raises nll or repetition by more than {allowed:g}"
    gain = usable["preference"] - bare["preference"]
    if not gain.max() > 0:
        return None, None, f"no strength within the allowed damage raises preference (best {gain.max():.2g} nats)"
    chance = frame[frame["arm"] != "fitted"]
    enough = usable.assign(gain=gain)[gain >= 0.9 * gain.max()]
    best = enough.sort_values(["strength", "gain"], ascending=[True, False]).iloc[0]
    got = best["preference"] - bare["preference"]
    at = chance.query("site == @best.site and strength == @best.strength and measure == 'preference'")["value"]
    beside = "" if at.empty else f"; the best control there moves it by {at.max() - bare['preference']:+.2f}"
    if not at.empty and at.max() - bare["preference"] >= got:
        return None, None, f"controls raise preference as much ({at.max() - bare['preference']:.2f} of {got:.2f} nats)"
    cost = f", nll {best['nll'] - bare['nll']:+.3f}" if "nll" in wide else ""
    why = f"preference {got:+.2f} nats{cost}: 90 % of what can be had with damage up to {allowed:g}{beside}"
    return str(best["site"]), float(best["strength"]), why


def _judge(lab: _Lab, pairs: Pairs, clamp: Add, controls: Sequence[Add], strength: float) -> dict[str, Any]:
    """Figures on pairs that were not used to choose."""

    def preference(one: Add, times: float = strength) -> np.ndarray:
        with at_strength(lab.model, one, times):
            return odds(lab.model, pairs, per_token=lab.per_token, batch_size=lab.batch_size).preference.numpy()

    bare, steered = preference(clamp, 0.0), preference(clamp)
    gains = [float((preference(one) - bare).mean()) for one in controls]
    return {
        "pairs": len(pairs),
        "without": interval(bare, lab.seed),
        "with": interval(steered, lab.seed),
        "gain": interval(steered - bare, lab.seed),
        "random_gains": gains,
    }


def interval(
    values: np.ndarray, seed: int = 0, weights: np.ndarray | None = None, resamples: int = 1000
) -> tuple[float, float, float]:
    """Mean with its 95 % percentile bootstrap over rows; sums over sums where rows have weights."""
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, len(values), (resamples, len(values)))
    if weights is None:
        mean, means = values.mean(), values[drawn].mean(1)
    else:
        mean, means = values.sum() / weights.sum(), values[drawn].sum(1) / weights[drawn].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(mean), float(low), float(high)
