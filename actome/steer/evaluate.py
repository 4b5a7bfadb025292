"""Evaluate: what a clamp does at each strength, what it costs, and whether chance would do the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from actome.core.clamp import Clamp
from actome.core.errors import MeasureError
from actome.tasks.trials import interval, split

from .choices import Choices
from .contrast import Examples
from .controls import Arm, Estimator, dealt
from .lab import Lab, Task
from .placing import Placing, while_generating
from .preference import Pairs, checked, finite, scaled, together
from .recommend import collapsed, recommend

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pandas as pd

    from actome.core.model import Model

STRENGTHS = (-1.0, 0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
_COLUMNS = ["site", "positions", "arm", "draw", "strength", "measure", "value", "low", "high"]


@dataclass(frozen=True)
class Evaluation:
    """A dose-response with its controls; `actome.report.steering_page` makes a page of it.

    Attributes:
        frame: a row for each site, positions, arm (``fitted``, ``random``, ``shuffled``), draw of the arm, strength and
            measure: site, positions, arm, draw, strength, measure, value, low, high (95 %, over pairs, questions or
            rows). Measures are ``preference`` and ``utility`` (log-odds), ``nll`` (nats a token of the text),
            ``accuracy`` (of the task), ``repetition`` (share of 4-grams in generated text that it held before) and
            ``off_manifold`` (at the end of the stream, about 1 for clean states).
        site, positions, strength: what is recommended; None where nothing is.
        why: the reason, in a sentence with its figures.
        collapsed: site, positions and strength at which the fitted clamp takes the model apart (nll up by more than a
            nat a token, repetition by more than 0.5, accuracy down by more than 0.5, utility by more than 5 nats, or
            not finite), with how far each moved; empty where it does not.
        held_out: figures of the recommended clamp on pairs that were not used to choose it: preference without and
            with the clamp, with intervals; the same of random directions.
        samples: prompts with their continuations without a clamp (strength 0) and at some strengths, as text or ids.
        about: how it was done.
    """

    frame: pd.DataFrame
    site: str | None
    positions: str | None
    strength: float | None
    why: str
    collapsed: pd.DataFrame
    held_out: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)

    def curve(
        self, measure: str, *, site: str | None = None, positions: str | None = None, arm: str = "fitted"
    ) -> pd.DataFrame:
        """Strength, value, low, high of one measure; of an arm with several draws their mean and range.

        Raises:
            MeasureError: a measure, site, placing or arm that was not looked at.
        """
        site = site or self.site or self.frame["site"].iloc[0]
        positions = positions or self.positions or self.frame["positions"].iloc[0]
        one = self.frame.query("measure == @measure and site == @site and positions == @positions and arm == @arm")
        if one.empty:
            known = {name: sorted(self.frame[name].unique()) for name in ("measure", "site", "positions", "arm")}
            raise MeasureError(f"there is no {measure!r} of {arm!r} at {site!r}, {positions!r}; there are {known}")
        if one["draw"].nunique() > 1:
            by = one.groupby("strength")["value"]
            return by.agg(value="mean", low="min", high="max").reset_index()
        return one[["strength", "value", "low", "high"]].sort_values("strength").reset_index(drop=True)


def evaluate(
    model: Model,
    clamp: Clamp | Sequence[Clamp],
    pairs: Pairs,
    *,
    text: Any = None,
    prompts: Any = None,
    task: Task | None = None,
    strengths: Sequence[float] = STRENGTHS,
    sites: str | Sequence[str] | None = None,
    positions: Placing | Sequence[Placing] = ("all",),
    estimator: Estimator | None = None,
    data: Examples | None = None,
    random: int = 5,
    shuffled: int = 2,
    allowed: float = 0.1,
    per_token: bool = False,
    new_tokens: int = 24,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool | Callable[[int, int], None] = False,
) -> Evaluation:
    """The dose-response of a clamp, against random directions of the same norm and shuffled labels.

    Half of the pairs choose site, positions and strength, the other half tell what the choice is worth.

    Args:
        model: to be steered.
        clamp: one, or several that act together, with a `scale` each: what `Contrast` fits, transport, a controller,
            an addition under a condition. Strengths multiply their own scales. Random directions are tried in the
            place of constant vectors, and of clamps that have a `random(seed)` of their own; others are compared with
            shuffled labels.
        pairs: what it should bring about; eight at least.
        text: held-out text (list of texts, ids, `Text`) whose likelihood must not suffer; the clamp acts on all of it.
        prompts: from which text is generated, to look for repetition; the pairs' prompts unless given.
        task: what the model should still be able to do: `Choices`, or a function of the model that gives a score for
            each question, such as 0 and 1. Without `text` and `task` damage shows in `utility` and `repetition` only.
        strengths: multiples; 0 is always looked at.
        sites: other sites, or a pattern, to try the contrast at (layer sweep); needs a `Steering` clamp fitted there.
        positions: where to try it: at ``"all"`` tokens, those of the ``"prompt"``, its ``"last"`` token, or those from
            which the ``"response"`` comes, the newest one of every step.
        estimator, data: with which the clamp was fitted; needed for the control with shuffled labels.
        random, shuffled: how many draws of each control.
        allowed: rise of nll (nats a token) and of repetition, and fall of accuracy, up to which a strength may be
            recommended.
        per_token: likelihoods as nats a token, for long responses.
        new_tokens: to generate for `repetition`; 0 generates nothing.
        seed: of splits, controls and intervals.
        progress: True for a bar, or a function called with steps done and of how many.

    Raises:
        MeasureError: fewer than eight pairs, a clamp without a scale, sites where it was not fitted, an unknown
            placing, or one beside a clamp that says itself where it acts.

    >>> import actome as ac, torch
    >>> model = ac.demo()
    >>> pairs = Pairs(["import", "from", "return", "print"] * 2, [" os"] * 8, [" the"] * 8)
    >>> clamp = ac.Add("blocks.1.resid.post", torch.randn(112, generator=torch.Generator().manual_seed(0)))
    >>> found = evaluate(model, clamp, pairs, strengths=(1.0,), random=1, new_tokens=0)
    >>> sorted(found.frame["arm"].unique()), found.curve("preference")["strength"].tolist()
    (['fitted', 'random'], [0.0, 1.0])
    """
    import pandas as pd

    if len(checked(pairs)) < 8:
        raise MeasureError(f"{len(pairs)} pairs are too few to choose on one half and judge on the other; give 8")
    clamps = together(clamp)
    if isinstance(positions, str):
        positions = (positions,)
    if isinstance(sites, str):
        sites = [site.name for site in model.match(sites)]
    if not isinstance(random, int) or not isinstance(shuffled, int):
        raise MeasureError(f"random={random!r}, shuffled={shuffled!r}: whole numbers of draws")
    if task is not None and not callable(task) and not isinstance(task, Choices):
        raise MeasureError(f"task= takes Choices, or a function of the model, not {type(task).__name__}")
    if not clamps or not positions:
        raise MeasureError("give a clamp at least, and positions= one placing at least")
    for one in clamps:
        scaled(one, 1.0)
    for placing in positions:
        while_generating(clamps, placing)
    if random < 0 or shuffled < 0:
        raise MeasureError(f"random={random}, shuffled={shuffled}: numbers of draws")
    steps = _steps(strengths)
    choose, judge = split(len(pairs), [0.5, 0.5], seed)
    lab = Lab(model, pairs.part(choose.tolist()), text, prompts, task, per_token, new_tokens, batch_size, seed)
    arms = dealt(model, clamps, sites, estimator, data, random, shuffled, seed)
    todo = [(arm, placing, step) for arm in arms for placing in positions for step in steps]
    rows: list[tuple[Any, ...]] = []
    with _told(progress) as tell:
        for i, (arm, placing, step) in enumerate(todo):
            found = lab.at(arm.clamps, step, placing)
            place = (arm.site, placing, arm.name, arm.draw, step)
            rows += [(*place, measure, *value) for measure, value in found.items()]
            tell(i + 1, len(todo))
    frame = pd.DataFrame(rows, columns=_COLUMNS)
    site, placing, strength, why = recommend(frame, allowed)
    held_out = {}
    if site is not None and placing is not None and strength is not None:
        held_out = _judged(
            lab, pairs.part(judge.tolist()), [one for one in arms if one.site == site], strength, placing
        )
    about = {
        "model": model.name,
        "clamps": [f"{type(one).__name__} at {one.site}" for one in clamps],
        "pairs": len(pairs),
        "strengths": list(steps),
        "random": sum(arm.name == "random" for arm in arms if arm.site == arms[0].site),
        "shuffled": sum(arm.name == "shuffled" for arm in arms if arm.site == arms[0].site),
        "allowed": allowed,
        "seed": seed,
    }
    shown = (arms[0] if site is None else next(arm for arm in arms if arm.name == "fitted" and arm.site == site)).clamps
    at = sorted({0.0, strength or 1.0, max(steps)})
    samples = [lab.sample(shown, step, placing or positions[0]) for step in at] if new_tokens else []
    return Evaluation(frame, site, placing, strength, why, collapsed(frame), held_out, samples, about)


def _steps(strengths: Sequence[float]) -> tuple[float, ...]:
    """In order, zero among them."""
    found = finite(strengths)
    if not any(found):
        raise MeasureError(f"strengths={found}: finite numbers, one at least that is not zero")
    return tuple(sorted({0.0, *map(float, found)}))


def _judged(lab: Lab, pairs: Pairs, arms: Sequence[Arm], strength: float, placing: Any) -> dict[str, Any]:
    """Figures on pairs that were not used to choose."""
    fitted = next(arm for arm in arms if arm.name == "fitted")
    bare = lab.preference((), 0.0, placing, pairs)
    steered = lab.preference(fitted.clamps, strength, placing, pairs)

    def gains(name: str) -> list[float]:
        some = [arm.clamps for arm in arms if arm.name == name]
        return [float((lab.preference(one, strength, placing, pairs) - bare).mean()) for one in some]

    return {
        "pairs": len(pairs),
        "without": interval(bare, lab.seed),
        "with": interval(steered, lab.seed),
        "gain": interval(steered - bare, lab.seed),
        "random_gains": gains("random"),
        "shuffled_gains": gains("shuffled"),
    }


@contextmanager
def _told(progress: bool | Callable[[int, int], None]) -> Iterator[Callable[[int, int], None]]:
    """Who is told of steps done: nobody, a function, or a bar on standard error."""
    if callable(progress):
        yield progress
        return
    if not progress:
        yield lambda done, of: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("dose-response", total=None)
        yield lambda done, of: bar.update(task, completed=done, total=of)
