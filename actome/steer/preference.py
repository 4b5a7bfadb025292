r"""Preference and utility of an intervention, on one scale for all kinds of intervention.

For a prompt with a response that shows the concept and one that shows its opposite, with likelihoods
:math:`L_p, L_n` (nats, negative), preference log-odds are :math:`L_n - L_p`, and utility log-odds
:math:`\log u / (1 - u)` with :math:`u = e^{-L_p} + e^{-L_n}`, the mass that is left on answers which fit the task.

Source: Why Steering Works: Toward a Unified View of Language Model Parameter Dynamics.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from actome.core.clamp import Clamp
from actome.core.errors import MeasureError
from actome.measures.spans import Texts

from .likelihood import response_nll
from .placing import Placing

if TYPE_CHECKING:
    import pandas as pd

    from actome.core.model import Model


@dataclass(frozen=True)
class Pairs:
    """Prompts with a response that the clamp should bring about and one that it should not.

    Attributes:
        prompts, wanted, unwanted: texts or token ids, as many of each.
    """

    prompts: Texts
    wanted: Texts
    unwanted: Texts

    def __post_init__(self) -> None:
        for name in ("prompts", "wanted", "unwanted"):
            if isinstance(getattr(self, name), str):
                raise MeasureError(f"pairs take lists, and {name}={getattr(self, name)!r:.60} is one text")
        sizes = (len(self.prompts), len(self.wanted), len(self.unwanted))
        if len(set(sizes)) > 1 or not sizes[0]:
            raise MeasureError(
                "pairs take as many wanted and unwanted responses as prompts, one at least; there are "
                f"{sizes[0]} prompts, {sizes[1]} wanted and {sizes[2]} unwanted"
            )

    def __len__(self) -> int:
        return len(self.prompts)

    def part(self, index: Sequence[int]) -> Pairs:
        """Some of them."""
        from .states import subset

        return Pairs(*(subset(some, index) for some in (self.prompts, self.wanted, self.unwanted)))


class Odds(NamedTuple):
    """Log-odds of each pair, (N), float64."""

    preference: Tensor
    utility: Tensor


def odds(
    model: Model,
    pairs: Pairs,
    *,
    clamps: Sequence[Clamp] = (),
    placing: Placing = "all",
    per_token: bool = False,
    batch_size: int = 16,
) -> Odds:
    """Preference and utility log-odds of each pair, under whatever clamps are active.

    Args:
        clamps, placing: active beside those; see `response_nll`.
        per_token: likelihoods as nats a token, for responses of many tokens and of different lengths. Their masses
            then need not sum to less than one, and utility is that of their mean.

    Raises:
        MeasureError: what is given are no pairs.
    """
    checked(pairs)
    good, bad = (
        response_nll(model, pairs.prompts, responses, clamps=clamps, placing=placing, batch_size=batch_size)
        for responses in (pairs.wanted, pairs.unwanted)
    )
    wanted, unwanted = (good.mean, bad.mean) if per_token else (good.nll, bad.nll)
    log_u = torch.logaddexp(-wanted, -unwanted) - (0.6931471805599453 if per_token else 0.0)
    # log(1 - u) without losing what is left of it near u = 1.
    log_rest = torch.log(-torch.expm1(log_u.clamp_max(-1e-12)))
    return Odds(unwanted - wanted, log_u - log_rest)


def preference_utility(
    model: Model,
    clamp: Clamp,
    pairs: Pairs,
    multipliers: Sequence[float] = (0.0, 0.5, 1.0, 2.0, 4.0),
    *,
    per_token: bool = False,
    batch_size: int = 16,
) -> pd.DataFrame:
    """Mean preference and utility log-odds over multiples of a clamp's strength.

    Args:
        clamp: with a `scale`, such as `Add`; its own scale is what a multiplier of 1 means.

    Returns:
        One row a multiplier: multiplier, preference, utility.

    >>> import actome as ac, torch
    >>> model = ac.demo()
    >>> pairs = Pairs(["import", "from"], [" os", " os"], [" the", " the"])
    >>> clamp = ac.Add("blocks.1.resid.post", torch.ones(112), scale=0.1)
    >>> preference_utility(model, clamp, pairs, (0.0, 1.0)).columns.tolist()
    ['multiplier', 'preference', 'utility']
    """
    import pandas as pd

    rows = []
    for multiplier in finite(multipliers, "multipliers"):
        some = [scaled(clamp, multiplier)] if multiplier else []
        found = odds(model, pairs, clamps=some, per_token=per_token, batch_size=batch_size)
        rows.append((multiplier, float(found.preference.mean()), float(found.utility.mean())))
    return pd.DataFrame(rows, columns=["multiplier", "preference", "utility"])


def finite(strengths: Iterable[float], name: str = "strengths") -> list[float]:
    """The strengths as a list.

    Raises:
        MeasureError: not a list of finite numbers.

    >>> finite((0, 0.5))
    [0, 0.5]
    """
    found = [] if isinstance(strengths, str) or not isinstance(strengths, Iterable) else list(strengths)
    found = [one.item() if isinstance(one, Tensor) and one.ndim == 0 else one for one in found]
    if not found or not all(isinstance(one, Real) and math.isfinite(one) for one in found):
        raise MeasureError(f"{name}={strengths!r:.60}: give a list of finite numbers, such as [0.5, 1.0]")
    return found


def together(clamps: Clamp | Sequence[Clamp]) -> list[Clamp]:
    """One clamp, or several that act together, as a list.

    Raises:
        MeasureError: something that is no clamp.
    """
    found = [clamps] if isinstance(clamps, Clamp) or not isinstance(clamps, (list, tuple)) else list(clamps)
    for one in found:
        if not isinstance(one, Clamp):
            raise MeasureError(f"give a clamp such as Add, or a list of them, not {type(one).__name__}")
    return found


def checked(pairs: Pairs) -> Pairs:
    """The pairs.

    Raises:
        MeasureError: something else.
    """
    if not isinstance(pairs, Pairs):
        raise MeasureError(f"give Pairs(prompts, wanted, unwanted), not {type(pairs).__name__}")
    return pairs


def scaled(clamp: Clamp, multiplier: float) -> Clamp:
    """The clamp at a multiple of its strength.

    Raises:
        MeasureError: a clamp that has no strength.
    """
    if not hasattr(clamp, "scale"):
        raise MeasureError(f"{type(clamp).__name__} has no scale, and so no strength to vary; give Add, or one like it")
    return clamp.at(scale=clamp.scale * multiplier)
