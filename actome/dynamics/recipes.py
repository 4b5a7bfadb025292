"""Recipes: what the way of training does to a model, over a grid of ways; and how well each can be quantised."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from actome.core.errors import MeasureError, nearest

from .quantisation import QuantisationProbe, weight_outliers

if TYPE_CHECKING:
    import pandas as pd

    from actome.core.model import Model


@dataclass(frozen=True)
class Recipes:
    """What came out of a grid of recipes; made by `recipe_grid`.

    Attributes:
        table: a row for each training: the settings of the recipe, seed, and every number measured.
        settings: the names of the settings.
    """

    table: pd.DataFrame
    settings: tuple[str, ...]

    def means(self) -> pd.DataFrame:
        """A row for each recipe: means over seeds."""
        keys = list(self.settings)
        return self.table.drop(columns="seed").groupby(keys, dropna=False, sort=False).mean().reset_index()

    def effect(self, setting: str, outcome: str) -> pd.Series:
        """The mean of an outcome at each value of one setting, over all others."""
        self._known(setting, self.settings)
        self._known(outcome, self.table)
        return self.table.groupby(setting, dropna=False, sort=False)[outcome].mean()

    def association(self, a: str, b: str, *, permutations: int = 1000, seed: int = 0) -> tuple[float, float]:
        """Spearman correlation of two numbers over all trainings, and its one-sided p by permutation."""
        from actome.tasks.trials import null, spearman

        for name in (a, b):
            self._known(name, self.table)
        x, y = (torch.tensor(self.table[name].to_numpy(np.float64)) for name in (a, b))
        found = null(lambda p, q: spearman(p.numpy(), q.numpy()), x, y, permutations=permutations, seed=seed)
        return found.value, found.p

    def spread(self, outcome: str, clean: str = "clean", within: float = 0.05) -> Spread:
        """The two recipes whose mean outcome differs most while their mean clean losses differ by at most `within`.

        Raises:
            MeasureError: there are no two such recipes.
        """
        for name in (outcome, clean):
            self._known(name, self.table)
        means = self.means()
        low, high = _furthest(means, outcome, clean, within)
        return self._between(means.iloc[low], means.iloc[high], outcome, clean)

    def held_out_spread(self, outcome: str, clean: str = "clean", within: float = 0.05) -> float:
        """How many times larger the outcome is for the worst recipe than for the best, where both were chosen by other
        seeds: for each seed by all but that one. Chance alone gives about 1, while `spread` is the largest of many.
        """
        seeds = self.table["seed"].unique()
        if len(seeds) < 2:
            raise MeasureError("a held-out spread needs two seeds or more")
        best = worst = 0.0
        for seed in seeds:
            mine = self.table["seed"] == seed
            others, one = (Recipes(self.table[rows], self.settings).means() for rows in (~mine, mine))
            low, high = _furthest(others, outcome, clean, within)
            best, worst = best + float(one[outcome].iloc[low]), worst + float(one[outcome].iloc[high])
        return worst / best if best > 0 else float("inf")

    def _between(self, low: pd.Series, high: pd.Series, outcome: str, clean: str) -> Spread:
        names = [{key: row[key] for key in self.settings} for row in (low, high)]
        ratio = float(high[outcome] / low[outcome]) if low[outcome] > 0 else float("inf")
        return Spread(*names, ratio, float(high[outcome] - low[outcome]), float(high[clean] - low[clean]))

    @staticmethod
    def _known(name: str, there: Any) -> None:
        if name not in there:
            raise MeasureError(f"the recipes have no {name!r}{nearest(name, map(str, there))}")


@dataclass(frozen=True)
class Spread:
    """Two recipes of nearly the same loss, and how far an outcome differs between them.

    Attributes:
        best, worst: their settings.
        ratio, difference: of the outcome, worst over best and worst less best.
        clean: the loss of the worst less that of the best.
    """

    best: dict[str, Any]
    worst: dict[str, Any]
    ratio: float
    difference: float
    clean: float


def _furthest(means: pd.DataFrame, outcome: str, clean: str, within: float) -> tuple[int, int]:
    """The rows of the least and the greatest outcome whose clean losses are near enough."""
    y, x = (means[name].to_numpy(np.float64) for name in (outcome, clean))
    near = np.abs(x[:, None] - x) <= within
    np.fill_diagonal(near, False)
    if not near.any():
        raise MeasureError(f"no two recipes have a {clean} within {within} of each other; {len(means)} were trained")
    apart = np.where(near, y - y[:, None], -np.inf)  # of the second over the first
    return tuple(map(int, np.unravel_index(apart.argmax(), apart.shape)))


def recipe_grid(
    train_fn: Callable[..., Model],
    grid: Mapping[str, Sequence[Any]],
    measures: Mapping[str, Any],
    probe: QuantisationProbe | Sequence[QuantisationProbe],
    tokens: Tensor,
    *,
    seeds: Sequence[int] = (0,),
    progress: Callable[[int], None] = lambda done: None,
) -> Recipes:
    """Trains one model for every recipe of a grid and every seed, and measures what rounding does to each.

    Args:
        train_fn: from ``seed`` and the settings, all by keyword, to a trained model. What differs between recipes must
            be only what the settings say: the same data in the same order for the same seed.
        grid: values by setting; every combination is trained.
        measures: by site or pattern, as `Model.measure` takes them; of each number of a site the mean over sites (and
            heads) becomes a column under the measure's name; values of single units are left out.
        probe: one or several. The first one's columns are ``clean``, ``rise`` and ``relative``; those of all of them
            are under their names too, such as ``a4_tensor_rise``.
        tokens: (batch, pos) held-out text, for the measures and the probes.
        seeds: one training each.
        progress: called with how many are done.

    Returns:
        The `Recipes`; the table also has what `weight_outliers` says.

    Raises:
        MeasureError: an empty grid, no seeds, or no probe.

    Source: Ahmadian et al. 2023, section 3, which trains 410 M models over weight decay, dropout, gradient clipping and
    half precision.
    """
    import pandas as pd

    probes = [probe] if isinstance(probe, QuantisationProbe) else list(probe)
    if not grid or not all(map(len, grid.values())) or not seeds or not probes:
        raise MeasureError("recipe_grid needs a value or more for each setting, a seed and a probe")
    rows = []
    for values in itertools.product(*grid.values()):
        for seed in seeds:
            recipe = dict(zip(grid, values, strict=True))
            model = train_fn(seed=seed, **recipe)
            rows.append({**recipe, "seed": seed, **_look(model, measures, probes, tokens)})
            progress(len(rows))
    return Recipes(pd.DataFrame(rows), tuple(grid))


def _look(
    model: Model, measures: Mapping[str, Any], probes: Sequence[QuantisationProbe], tokens: Tensor
) -> dict[str, float]:
    found: dict[str, float] = {}
    for i, probe in enumerate(probes):
        one = probe(model, tokens)
        found |= {} if i else one
        found |= {f"{probe.name}_{key}": value for key, value in one.items() if key != "clean"}
    if measures:
        frame = model.measure(tokens, measures).frame
        plain = frame[frame["unit"].isna()] if "unit" in frame else frame
        found |= {str(name): float(part.mean()) for name, part in plain.groupby("measure", sort=False)["value"]}
    return found | weight_outliers(model)
