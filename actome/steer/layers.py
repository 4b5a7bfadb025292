"""Which layer: the site of a fitted contrast, chosen by what steering or ablating there does to examples held back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from actome.core.clamp import Clamp
from actome.core.errors import MeasureError

from .contrast import Steering
from .controls import random_of
from .lab import Lab, Task
from .placing import Placing
from .preference import Pairs, checked, finite
from .recommend import recommend

if TYPE_CHECKING:
    import pandas as pd

    from actome.core.model import Model


@dataclass(frozen=True)
class LayerChoice:
    """Where a contrast is to be used.

    Attributes:
        clamp: the contrast at the chosen site and strength, or what takes it out; None where nothing is recommended.
        site: whose direction it is; None where nothing is recommended.
        strength: of the addition; 1 for an ablation, which has none.
        why: the reason, with its figures.
        table: a row for each site and strength, 0 among them: site, strength, and each measure that was looked at.
    """

    clamp: Clamp | None
    site: str | None
    strength: float | None
    why: str
    table: pd.DataFrame


def select_layer(
    model: Model,
    clamp: Steering,
    pairs: Pairs,
    *,
    how: Literal["add", "ablate"] = "add",
    sites: Sequence[str] | None = None,
    everywhere: str = "blocks.*.resid.post",
    strengths: Sequence[float] = (0.5, 1.0, 1.5, 2.0),
    text: Any = None,
    task: Task | None = None,
    prompts: Any = None,
    positions: Placing = "all",
    allowed: float = 0.1,
    per_token: bool = False,
    new_tokens: int = 0,
    random: int = 3,
    batch_size: int = 16,
    seed: int = 0,
) -> LayerChoice:
    """Chooses the site of a fitted contrast by what it does there, not by how well it separates.

    All pairs serve for choosing: give validation data, and judge on others. What is chosen is what `evaluate` would
    choose of its half: the smallest strength that gives 90 % of the preference that can be had with at most the allowed
    damage, over all sites; nothing where random directions at any of the sites do as much.

    Args:
        model: to be steered.
        clamp: fitted at several sites, as `Contrast` gives.
        pairs: validation pairs; wanted is what the clamp should bring about. For an ablation: prompts that bring the
            trait about, with what is said without it as wanted.
        how: ``"add"`` the contrast, or ``"ablate"`` its direction.
        sites: those to try; all that the contrast was fitted at unless given.
        everywhere: the sites at which an ablation takes each direction out.
        strengths: multiples of the contrast to add; above 0.
        text, task, prompts, per_token, new_tokens: what must not suffer; as `evaluate` takes them.
        positions: where the addition acts; an ablation acts at all tokens.
        allowed: rise of nll and repetition, fall of accuracy, up to which a site may be chosen.
        random: directions to compare with at each site; 0 compares with none.
        seed: of those, and of intervals.

    Raises:
        MeasureError: a clamp that was not fitted at sites, an unknown `how`, a site that was not looked at, strengths
            that are not above 0.

    Source: after Arditi et al. 2024, Refusal in Language Models Is Mediated by a Single Direction (a direction
    chosen by its effect on validation prompts, with what else it changes held down).

    >>> import actome as ac
    >>> from actome.steer import Contrast, Examples
    >>> model = ac.demo()
    >>> code = ["import os", "def f(x):", "return x", "for i in y:", "class A:", "x = [1]", "if x:", "print(x)"]
    >>> prose = ["The cat", "It is a", "When the", "This value", "An object", "You can", "See the", "There is"]
    >>> clamp = Contrast("blocks.{1..2}.resid.post").fit(model, Examples(code, prose))
    >>> found = select_layer(model, clamp, Pairs(["The dog", "It was"], [" ="] * 2, [" is"] * 2), strengths=(1.0,))
    >>> found.table.columns.tolist(), len(found.table)
    (['site', 'strength', 'preference', 'utility'], 4)
    """
    if not isinstance(clamp, Steering) or not clamp.directions:
        raise MeasureError(
            f"a layer is chosen of a contrast fitted at several, as Contrast gives, not of {clamp!r:.60}"
        )
    if how not in ("add", "ablate"):
        raise MeasureError(f"how={how!r} does not exist; choose 'add' or 'ablate'")
    checked(pairs)
    if how == "add" and min(finite(strengths)) <= 0:
        raise MeasureError(f"strengths={list(strengths)}: give numbers above 0, one at least")
    if random < 0:
        raise MeasureError(f"random={random}: a number of directions")
    steps = [1.0] if how == "ablate" else sorted(strengths)
    found = {site: clamp.to(site, 1.0) for site in (clamp.directions if sites is None else sites)}
    tried: dict[str, Clamp] = {site: one.ablate(everywhere) if how == "ablate" else one for site, one in found.items()}
    placing: Placing = "all" if how == "ablate" else positions
    lab = Lab(model, pairs, text, prompts, task, per_token, new_tokens, batch_size, seed)
    rows = []
    generator = torch.Generator().manual_seed(seed)
    for site, one in tried.items():
        arms = [("fitted", 0, one), *(("random", i, random_of(one, generator)) for i in range(random))]
        for arm, draw, some in arms:
            for step in (0.0, *steps):
                plain = how == "ablate" and step > 0
                got = lab.measured([some], placing) if plain else lab.at([some], step, placing)
                rows += [(site, placing, arm, draw, step, name, value[0]) for name, value in got.items()]
    import pandas as pd

    frame = pd.DataFrame(rows, columns=["site", "positions", "arm", "draw", "strength", "measure", "value"])
    site, _, strength, why = recommend(frame, allowed)
    table = (
        frame[frame["arm"] == "fitted"]
        .pivot(index=["site", "strength"], columns="measure", values="value")
        .reset_index()
    )
    table.columns.name = None
    table = table.drop(columns="off_manifold", errors="ignore")
    if site is None or strength is None:
        return LayerChoice(None, None, None, why, table)
    chosen = tried[site]
    return LayerChoice(chosen if how == "ablate" else replace(found[site], scale=strength), site, strength, why, table)
