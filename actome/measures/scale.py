"""How large activations are, and whether all of them are numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from ..core.measure import Measure, Reduction, double, ratio, real_tokens, token_norms, unit_peaks


class ActivationScale(Measure):
    r"""Root mean square, mean norm and largest magnitude of a site's activations, and how many are not finite.

    Over N real tokens :math:`x_t \in \mathbb{R}^U`, those with a non-finite unit left out of all but `non_finite`:

    - ``rms``: :math:`\sqrt{\frac{1}{NU} \sum_t \lVert x_t \rVert^2}`
    - ``norm``: :math:`\frac{1}{N} \sum_t \lVert x_t \rVert`
    - ``max_abs``: :math:`\max_{t,u} |x_{tu}|`
    - ``non_finite``: share of all activations at real tokens that are NaN or infinite

    Shapes: x (\*stack, batch, pos, unit); every value (\*stack). NaN where there was no token to speak of.

    Source: standard. How the rms grows with depth is `actome.measures.Movement`.

    Example:
        >>> scale = ActivationScale()
        >>> scale.update(torch.tensor([[[3.0, 4.0], [0.0, 0.0]]]))
        >>> {name: round(float(value), 3) for name, value in scale.compute().items()}
        {'rms': 2.5, 'norm': 2.5, 'max_abs': 4.0, 'non_finite': 0.0}
    """

    reductions: ClassVar[dict[str, Reduction]] = {
        "entries": "sum",
        "tokens": "sum",
        "square": "sum",
        "length": "sum",
        "peak": "max",
        "real_entries": "sum",
        "lost_entries": "sum",
    }
    value_dims: ClassVar[dict[str, tuple[str, ...]]] = {"rms": (), "norm": (), "max_abs": (), "non_finite": ()}

    def site_statistics(self, x: Tensor, mask: Tensor | None = None, tokens: Tensor | None = None) -> dict[str, Tensor]:
        """Counts of entries and tokens, sums of norms and their squares, the largest magnitude; all scalars."""
        kept = real_tokens(x, mask)
        norm_BT = double(token_norms(x, mask))
        return {
            "entries": kept.count * x.shape[-1],
            "tokens": kept.count,
            "square": norm_BT.square().sum(),
            "length": norm_BT.sum(),
            "peak": unit_peaks(x, mask).amax(),
            "real_entries": kept.real * x.shape[-1],
            "lost_entries": kept.non_finite,
        }

    def values(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See the class."""
        seen = stats["tokens"] > 0
        return {
            "rms": ratio(stats["square"], stats["entries"]).sqrt(),
            "norm": ratio(stats["length"], stats["tokens"]),
            "max_abs": stats["peak"].where(seen, torch.nan),
            "non_finite": ratio(stats["lost_entries"], stats["real_entries"]),
        }
