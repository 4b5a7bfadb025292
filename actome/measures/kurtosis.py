"""How heavy the tails of activations are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from ..core.measure import Measure, Reduction, double, ratio, real_tokens
from .sampling import checked_every, sampled

# Activations that stay in a core's cache in float64; a GPU takes more at once.
_CHUNK = 1 << 16
_CHUNK_ACCELERATOR = 1 << 25


class Kurtosis(Measure):
    r"""Excess kurtosis :math:`m_4 / m_2^2 - 3` of activations: 0 for a Gaussian, large where few entries carry all.

    :math:`m_k` is the mean of :math:`(x - \bar x)^k` over

    - ``kurtosis``: all units and tokens together
    - ``token_kurtosis``: the units of one token, then averaged over tokens; large when there are outlier channels
    - ``unit_kurtosis``: the tokens, for each unit; large for units that are loud at a few tokens, as features are, and
      massive activations

    Over real tokens; those with a non-finite unit are left out. A token or unit that is constant (up to rounding) has
    no kurtosis: it is left out of the mean, or NaN. Among n values one alone that is not 0 gives the largest kurtosis
    there is, n - 5 + 1 / (n - 1): only many tokens can show how heavy the tails of ``unit_kurtosis`` are.

    Args:
        every: take every n-th token of a row only, counted from its first real one; 8 by default, 1 for all of them.

    Shapes: x (\*stack, batch, pos, unit); kurtosis, token_kurtosis (\*stack), unit_kurtosis (\*stack, unit).

    Source: as a predictor of the loss from quantisation, Ahmadian et al. 2023, Intriguing Properties of Quantization at
    Scale. Powers are summed in float64, which is enough up to a mean of a few hundred standard deviations.

    Example:
        >>> kurtosis = Kurtosis(every=1)
        >>> kurtosis.update(torch.tensor([[[1.0, 0.0, 0.0, 0.0], [0.0, -1.0, 0.0, 0.0]]]))
        >>> {name: round(float(value), 3) for name, value in kurtosis.compute().items() if value.ndim == 0}
        {'kurtosis': 1.0, 'token_kurtosis': -0.667}
    """

    reductions: ClassVar[dict[str, Reduction]] = {
        "tokens": "sum",
        "powers": "sum",
        "varied": "sum",
        "token_kurtosis": "sum",
    }
    value_dims: ClassVar[dict[str, tuple[str, ...]]] = {
        "kurtosis": (),
        "token_kurtosis": (),
        "unit_kurtosis": ("unit",),
    }

    def __init__(self, every: int = 8, **options: object):
        super().__init__(**options)
        self.every = checked_every(every)

    def site_statistics(self, x: Tensor, mask: Tensor | None = None, tokens: Tensor | None = None) -> dict[str, Tensor]:
        """tokens, varied: counts; powers: (4, unit), sums of x^1 to x^4; token_kurtosis: (), summed over tokens."""
        kept = real_tokens(x, mask)
        x_NU, _ = sampled(kept, mask, self.every)
        powers = double(x_NU.new_zeros(4, x.shape[-1]))
        total, varied = powers.new_zeros(()), torch.zeros((), dtype=torch.long, device=x.device)
        rows = max(1, (_CHUNK if x.device.type == "cpu" else _CHUNK_ACCELERATOR) // x.shape[-1])
        for part in x_NU.split(rows):
            a = double(part)
            square = a.square()
            powers[0] += a.sum(0)
            powers[1] += square.sum(0)
            powers[2] += (a * square).sum(0)
            powers[3] += square.square().sum(0)
            deviation = (a - a.mean(-1, keepdim=True)).square_()
            second = deviation.mean(-1)
            fourth = deviation.square_().mean(-1)
            some = second > _FLAT * square.mean(-1)
            total += (fourth / second.square() - 3).where(some, 0.0).sum()
            varied += some.sum()
        count = torch.tensor(len(x_NU), device=x.device)
        return {"tokens": count, "powers": powers, "varied": varied, "token_kurtosis": total}

    def values(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See the class."""
        tokens, powers = stats["tokens"], stats["powers"]
        return {
            "kurtosis": _excess(ratio(powers.mean(-1), tokens[..., None])),
            "token_kurtosis": ratio(stats["token_kurtosis"], stats["varied"]),
            "unit_kurtosis": _excess(ratio(powers, tokens[..., None, None]).movedim(-2, -1)),
        }


# A variance below this share of the mean square is the rounding of a constant: float32 keeps 24 bits of each entry.
_FLAT = 1e-13


def _excess(raw: Tensor) -> Tensor:
    """Excess kurtosis from the raw moments of order 1 to 4 in the last dim; NaN for a constant."""
    m1, m2, m3, m4 = raw.unbind(-1)
    second = m2 - m1**2
    fourth = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
    return torch.where(second > _FLAT * m2, fourth / second**2 - 3, torch.nan)
