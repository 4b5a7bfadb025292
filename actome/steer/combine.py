"""Several clamps at once: how alike their directions are, and what each does alone and beside the others."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from actome.clamps import Add
from actome.core.clamp import Clamp
from actome.core.errors import MeasureError
from actome.tasks.trials import interval

from .preference import Pairs, checked, odds, together

if TYPE_CHECKING:
    import pandas as pd

    from actome.core.model import Model


@dataclass(frozen=True)
class Interference:
    """What clamps do to one another.

    Attributes:
        cosines: (clamp, clamp), between directions at sites of the same width; by name.
        effects: one row for each goal and set of clamps: goal, clamps (those that were active, joined by `` + ``),
            effect (change of preference log-odds against no clamp), low, high.
        interference: one row for each goal and clamp: goal, clamp, alone (effect), marginal (effect of adding it to all
            the others), lost (alone less marginal), with an interval of what is lost.
    """

    cosines: pd.DataFrame
    effects: pd.DataFrame
    interference: pd.DataFrame


def interference(
    model: Model,
    clamps: Mapping[str, Clamp | Sequence[Clamp]],
    goals: Mapping[str, Pairs],
    *,
    per_token: bool = False,
    batch_size: int = 16,
    seed: int = 0,
) -> Interference:
    """The effect of each clamp alone, of every two, and of all together, on every goal.

    Args:
        clamps: by name, two or more; each one clamp, or several that belong together. Cosines are of those that are a
            constant vector, and NaN for others.
        goals: by name, what each should bring about, as pairs of responses; not used for fitting. A goal need not
            have a clamp of its name, and what a clamp does to others' goals is shown as well.

    Raises:
        MeasureError: fewer than two clamps, or no goal.

    >>> import actome as ac
    >>> model = ac.demo()
    >>> some = {name: ac.Add("blocks.1.resid.post", torch.eye(112)[i] * 3) for i, name in enumerate("ab")}
    >>> found = interference(model, some, {"a": Pairs(["import", "from"], [" os"] * 2, [" the"] * 2)})
    >>> found.effects["clamps"].tolist(), float(found.cosines.loc["a", "b"])
    (['a', 'b', 'a + b'], 0.0)
    """
    import pandas as pd

    if not isinstance(clamps, Mapping) or not isinstance(goals, Mapping):
        raise MeasureError("give clamps and goals by name, such as {'kind': clamp} and {'kind': pairs}")
    if len(clamps) < 2 or not goals:
        raise MeasureError(f"{len(clamps)} clamps and {len(goals)} goals; give two clamps at least, and a goal")
    names = list(clamps)
    several = {name: together(one) for name, one in clamps.items()}
    for pairs in goals.values():
        checked(pairs)
    sets = [tuple(some) for k in (1, 2, len(names)) for some in itertools.combinations(names, k)]
    sets += [tuple(n for n in names if n != name) for name in names]
    sets = list(dict.fromkeys(sets))
    moved: dict[tuple[str, tuple[str, ...]], np.ndarray] = {}
    for goal, pairs in goals.items():
        bare = odds(model, pairs, per_token=per_token, batch_size=batch_size).preference
        for some in sets:
            active = [one for name in some for one in several[name]]
            found = odds(model, pairs, clamps=active, per_token=per_token, batch_size=batch_size).preference
            moved[goal, some] = (found - bare).numpy()
    shown = [some for some in sets if len(some) in (1, 2, len(names))]
    effects = [(goal, " + ".join(some), *interval(moved[goal, some], seed)) for goal in goals for some in shown]
    lost = []
    for goal in goals:
        for name in names:
            others = tuple(n for n in names if n != name)
            alone, marginal = moved[goal, (name,)], moved[goal, tuple(names)] - moved[goal, others]
            missing = interval(alone - marginal, seed)
            lost.append((goal, name, float(alone.mean()), float(marginal.mean()), *missing))
    return Interference(
        cosines(several),
        pd.DataFrame(effects, columns=["goal", "clamps", "effect", "low", "high"]),
        pd.DataFrame(lost, columns=["goal", "clamp", "alone", "marginal", "lost", "low", "high"]),
    )


def cosines(clamps: Mapping[str, Clamp | Sequence[Clamp]]) -> pd.DataFrame:
    """Cosines between the vectors that clamps add, (clamp, clamp), by name: which traits are alike, and which opposed.

    Args:
        clamps: by name. Those that are no constant vector, or not of the same width, have NaN.

    Raises:
        MeasureError: clamps without names.

    >>> import actome as ac, torch
    >>> one = ac.Add("blocks.1.resid.post", torch.tensor([1.0, 0.0]))
    >>> float(cosines({"a": one, "b": one.at(scale=-2.0)}).loc["a", "b"])
    -1.0
    """
    import pandas as pd

    if not isinstance(clamps, Mapping):
        raise MeasureError("give clamps by name, such as {'kind': clamp}")
    vectors = {name: _vector([some] if isinstance(some, Clamp) else some) for name, some in clamps.items()}

    def cosine(a: Tensor | None, b: Tensor | None) -> float:
        if a is None or b is None or a.shape != b.shape:
            return float("nan")
        return float(torch.nn.functional.cosine_similarity(a, b, dim=0))

    rows = [[cosine(a, b) for b in vectors.values()] for a in vectors.values()]
    return pd.DataFrame(rows, index=list(vectors), columns=list(vectors))


def _vector(some: Sequence[Clamp]) -> Tensor | None:
    """The constant vector that a clamp adds, if that is what it does."""
    if len(some) != 1 or not isinstance(some[0], Add) or not isinstance(some[0].value, Tensor):
        return None
    return (some[0].value * some[0].scale).float().flatten().cpu()
