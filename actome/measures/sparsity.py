"""How many units are silent: at a token, for most tokens, or for all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from ..core.errors import MeasureError
from ..core.measure import Measure, Reduction, double, ratio, real_tokens, shared, token_norms, unit_peaks

# Rows whose intermediate results stay in a core's cache; larger ones would be written to memory and read again.
_CHUNK = 1 << 18
_CHUNK_ACCELERATOR = 1 << 26


class Sparsity(Measure):
    r"""Shares of exact zeros and near-zeros, and how often each unit is active.

    A unit is *active* at a token when :math:`|a_u| > \epsilon \sqrt{\frac{1}{U} \sum_v a_v^2}`: the threshold follows
    the rms of the token's own activations at this site. So it is known when the token passes, the result does not
    depend on how the text was cut into batches, and scaling a layer changes nothing.

    - ``zeros``: share of activations that are exactly 0, over tokens and units
    - ``near_zeros``: share that are not active, exact zeros among them
    - ``frequency``: for each unit, share of tokens at which it is active

    Over real tokens; those with a non-finite unit are left out.

    Args:
        near: :math:`\epsilon`, 0.01 by default.

    Shapes: x (\*stack, batch, pos, unit); zeros and near_zeros (\*stack), frequency (\*stack, unit).

    Source: exact zeros after Li et al. 2023, The Lazy Neuron Phenomenon (their measure of sparsity in ReLU layers). The
    relative threshold carries the notion over to GELU and SiLU, which are never quite zero.

    Example:
        >>> sparsity = Sparsity()
        >>> sparsity.update(torch.tensor([[[1.0, 0.0, 0.001, -1.0], [1.0, 0.0, 0.5, 0.0]]]))
        >>> sparsity.compute()["frequency"].tolist()
        [1.0, 0.0, 0.5, 0.5]
    """

    reductions: ClassVar[dict[str, Reduction]] = {"tokens": "sum", "active": "sum", "nonzero": "sum"}
    value_dims: ClassVar[dict[str, tuple[str, ...]]] = {"zeros": (), "near_zeros": (), "frequency": ("unit",)}

    def __init__(self, near: float = 0.01, **options: object):
        super().__init__(**options)
        if not near >= 0:
            raise MeasureError(f"near={near}: a multiple of the token's root mean square, 0 or more")
        self.near = near

    def site_statistics(self, x: Tensor, mask: Tensor | None = None, tokens: Tensor | None = None) -> dict[str, Tensor]:
        """tokens: (); active: (unit), tokens at which a unit is active; nonzero: ()."""
        kept = real_tokens(x, mask)
        x_NU = kept.x.flatten(0, 1)
        rms_N1 = token_norms(x, mask).flatten()[:, None] / x_NU.shape[-1] ** 0.5
        return {
            "tokens": kept.count,
            "active": count_above(x_NU, rms_N1 * self.near),
            "nonzero": _nonzero(x, mask).sum(),
        }

    def values(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See the class."""
        entries = stats["tokens"] * stats["active"].shape[-1]
        return {
            "zeros": 1 - ratio(stats["nonzero"], entries),
            "near_zeros": 1 - ratio(stats["active"].sum(-1), entries),
            "frequency": ratio(stats["active"], stats["tokens"][..., None]),
        }


class DeadUnits(Measure):
    r"""Units that never did anything over the whole stream.

    A unit is dead when :math:`\max_t |a_{tu}| \le \tau \cdot \mathrm{rms}` with the rms of all activations at the site.
    For ReLU a dead unit's maximum is exactly 0. GELU and SiLU are never zero: a unit whose input stays below about -4
    puts out less than a thousandth of what the others do, which no later layer can tell from nothing; one that opens
    once, however rarely, exceeds the threshold by far and is alive. A unit that is stuck at a constant is not dead.

    A unit that opens rarely looks dead in a short text. With no activation in N tokens its true frequency is, with 95 %
    confidence, below :math:`1 - 0.05^{1/N} \approx 3/N` (tokens taken as independent, so rather more on a text about
    one thing): that bound is reported, and a dead unit means no more than it says.

    - ``dead``: share of units that are dead
    - ``dead_bound``: the highest frequency that a unit called dead may still have
    - ``peak``: for each unit :math:`\max_t |a_{tu}| / \mathrm{rms}`

    Over real tokens; those with a non-finite unit are left out.

    Args:
        threshold: :math:`\tau`, 0.001 by default.

    Shapes: x (\*stack, batch, pos, unit); dead and dead_bound (\*stack), peak (\*stack, unit).

    Source: Voita et al. 2023, Neurons in Large Language Models: Dead, N-gram, Positional (for ReLU: a unit that never
    activates over a large corpus); the relative threshold is ours.

    Example:
        >>> dead = DeadUnits()
        >>> dead.update(torch.tensor([[[1.0, 0.0], [2.0, 1e-6]]]))
        >>> float(dead.compute()["dead"])
        0.5
    """

    reductions: ClassVar[dict[str, Reduction]] = {"tokens": "sum", "square": "sum", "largest": "max"}
    value_dims: ClassVar[dict[str, tuple[str, ...]]] = {"dead": (), "dead_bound": (), "peak": ("unit",)}

    def __init__(self, threshold: float = 1e-3, **options: object):
        super().__init__(**options)
        if not threshold >= 0:
            raise MeasureError(f"threshold={threshold}: a multiple of the site's root mean square, 0 or more")
        self.threshold = threshold

    def site_statistics(self, x: Tensor, mask: Tensor | None = None, tokens: Tensor | None = None) -> dict[str, Tensor]:
        """tokens: (); square: (), sum of all squares; largest: (unit), largest magnitude."""
        return {
            "tokens": real_tokens(x, mask).count,
            "square": double(token_norms(x, mask)).square().sum(),
            "largest": unit_peaks(x, mask).amax(0),
        }

    def values(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See the class."""
        tokens, largest = stats["tokens"], stats["largest"]
        rms = ratio(stats["square"], tokens * largest.shape[-1]).sqrt()[..., None]
        # A site that is zero throughout is dead throughout, and one that saw no token is neither.
        peak = torch.where(rms == 0, 0.0, double(largest) / rms)
        return {
            "dead": double(peak <= self.threshold).mean(-1).where(tokens > 0, torch.nan),
            "dead_bound": 1 - 0.05 ** (1 / double(tokens)),
            "peak": peak,
        }


class UnitFrequency(Measure):
    r"""How often each unit is active, and whether silence is shared by all units or owed to dead ones.

    With :math:`f_u` the share of tokens at which unit u is active, :math:`a_{tu} \neq 0`, or with `near` above 0
    active in the sense of `Sparsity`:

    - ``active``: mean of :math:`f_u`, the activation density; by layer, depth or checkpoint the *lazy-neuron curve*
    - ``never_active``, ``always_active``: share of units with :math:`f_u = 0`, and with :math:`f_u \geq 0.99`
    - ``silence_of_dead``: share of all silent activations that belong to units that were never active. Sparsity token
      by token, as opposed to dead units, shows in a low ``active`` together with a low ``silence_of_dead``
    - ``unit_frequency``: :math:`f_u`
    - ``frequency_histogram``: share of units with :math:`f_u` in each of 20 equal bins from 0 to 1; not in tables

    Over real tokens; those with a non-finite unit are left out. Like `DeadUnits.dead`, ``never_active`` depends on how
    much text was seen: a unit that was active at none of N tokens may still be so at up to 3/N of them.

    Args:
        near: 0 counts what is exactly zero as silent, which suits ReLU; GELU and SiLU are never quite zero, and want
            the relative threshold of `Sparsity`, 0.01 say.
        always: from which frequency on a unit is called always active.

    Shapes: x (\*stack, batch, pos, unit); unit_frequency (\*stack, unit), frequency_histogram (\*stack, 20), others
    (\*stack).

    Source: Li et al. 2023, The Lazy Neuron Phenomenon (share of nonzero entries by layer, and the histogram which
    shows that it is not a matter of dead units).

    Example:
        >>> units = UnitFrequency()
        >>> units.update(torch.tensor([[[1.0, 0.0, 0.0], [1.0, 0.0, 0.5]]]))
        >>> {name: round(float(value), 2) for name, value in units.compute().items() if value.ndim == 0}
        {'active': 0.5, 'never_active': 0.33, 'always_active': 0.33, 'silence_of_dead': 0.67}
    """

    reductions: ClassVar[dict[str, Reduction]] = {"tokens": "sum", "active": "sum"}
    value_dims: ClassVar[dict[str, tuple[str, ...]]] = {
        "active": (),
        "never_active": (),
        "always_active": (),
        "silence_of_dead": (),
        "unit_frequency": ("unit",),
        "frequency_histogram": ("frequency",),
    }
    bins: ClassVar[int] = 20

    @staticmethod
    def axis(dim: str) -> list[float]:
        """The middles of the bins."""
        return [(i + 0.5) / UnitFrequency.bins for i in range(UnitFrequency.bins)]

    def __init__(self, near: float = 0.0, always: float = 0.99, **options: object):
        super().__init__(**options)
        if not near >= 0 or not 0 < always <= 1:
            raise MeasureError(f"near={near}, always={always}: 0 or more, and a share of tokens, above 0 and up to 1")
        self.near = near
        self.always = always

    def site_statistics(self, x: Tensor, mask: Tensor | None = None, tokens: Tensor | None = None) -> dict[str, Tensor]:
        """tokens: (); active: (unit), tokens at which a unit is active."""
        kept = real_tokens(x, mask)
        if not self.near:
            return {"tokens": kept.count, "active": _nonzero(x, mask)}
        threshold_N1 = token_norms(x, mask).flatten()[:, None] * (self.near / x.shape[-1] ** 0.5)
        return {"tokens": kept.count, "active": count_above(kept.x.flatten(0, 1), threshold_N1)}

    def values(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See the class."""
        tokens, active = stats["tokens"][..., None], stats["active"]
        frequency = ratio(active, tokens)
        seen = stats["tokens"] > 0
        never = active == 0
        # In whole numbers: a frequency that is the edge of a bin must not fall to either side by rounding.
        bin_ = (active.long() * self.bins // tokens.long().clamp_min(1)).clamp_max(self.bins - 1)
        histogram = torch.nn.functional.one_hot(bin_, self.bins).double().mean(-2)
        return {
            "active": frequency.mean(-1),
            "never_active": double(never).mean(-1).where(seen, torch.nan),
            "always_active": double(frequency >= self.always).mean(-1).where(seen, torch.nan),
            "silence_of_dead": ratio(never.sum(-1) * stats["tokens"], (tokens - active).sum(-1)),
            "unit_frequency": frequency,
            "frequency_histogram": histogram.where(seen[..., None], torch.nan),
        }


def _nonzero(x: Tensor, mask: Tensor | None) -> Tensor:
    """At how many tokens each unit is not exactly 0: (unit), int64."""

    def make() -> Tensor:
        x_NU = real_tokens(x, mask).x.flatten(0, 1)
        return count_above(x_NU, x_NU.new_zeros(len(x_NU), 1))

    return shared("nonzero", x, mask, make)


def count_above(x_NU: Tensor, threshold_N1: Tensor) -> Tensor:
    """How many tokens each unit exceeds the token's threshold at, in absolute value: (unit), int64."""
    rows = max(1, (_CHUNK if x_NU.device.type == "cpu" else _CHUNK_ACCELERATOR) // x_NU.shape[-1])
    above = torch.zeros(x_NU.shape[-1], dtype=torch.long, device=x_NU.device)
    # Counted as a product with ones in float32, several times faster than a sum of bools, and exact below 2^24 rows.
    magnitude = x_NU.new_empty(min(rows, len(x_NU)), x_NU.shape[-1])
    ones = x_NU.new_ones(len(magnitude))
    hit = torch.empty_like(magnitude)
    for x, threshold in zip(x_NU.split(rows), threshold_N1.split(rows), strict=True):
        n = len(x)
        torch.gt(torch.abs(x, out=magnitude[:n]), threshold, out=hit[:n])
        above += (ones[:n] @ hit[:n]).long()
    return above
