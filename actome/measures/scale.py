"""How large activations are, and whether all of them are numbers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..core.measure import Measure, real_tokens


class ActivationScale(Measure):
    r"""Root mean square, mean norm and largest magnitude of a site's activations, and how many are not finite.

    Over N real tokens :math:`x_t \in \mathbb{R}^U`, those with a non-finite unit left out of all but `non_finite`:

    - ``rms``: :math:`\sqrt{\frac{1}{NU} \sum_t \lVert x_t \rVert^2}`
    - ``norm``: :math:`\frac{1}{N} \sum_t \lVert x_t \rVert`
    - ``max_abs``: :math:`\max_{t,u} |x_{tu}|`
    - ``non_finite``: share of all activations at real tokens that are NaN or infinite

    Shapes: x (*stack, batch, pos, unit); every value (*stack). NaN when there was no token to speak of.

    Source: standard; the growth of the rms with depth is what `actome.measures.Movement` gives as ``growth``.

    Example:
        >>> import torch
        >>> scale = ActivationScale()
        >>> scale.update(torch.tensor([[[3.0, 4.0], [0.0, 0.0]]]))
        >>> {name: round(float(value), 3) for name, value in scale.compute().items()}
        {'rms': 2.5, 'norm': 2.5, 'max_abs': 4.0, 'non_finite': 0.0}
    """

    reductions = {  # noqa: RUF012
        "tokens": "sum",
        "activations": "sum",
        "entries": "sum",
        "non_finite_entries": "sum",
        "square": "sum",
        "norm": "sum",
        "max_abs": "max",
    }
    value_dims = {"rms": (), "norm": (), "max_abs": (), "non_finite": ()}  # noqa: RUF012

    def site_statistics(self, x: Tensor, mask: Tensor | None = None, tokens: Tensor | None = None) -> dict[str, Tensor]:
        """Counts, sums of squares and of norms, and the maximum, each a scalar."""
        kept = real_tokens(x, mask)
        units = x.shape[-1]
        norm_BT = torch.linalg.vector_norm(kept.x, dim=-1)
        real = kept.count if kept.keep is mask else mask.sum() if mask is not None else x.new_tensor(0).long() + x.shape[0] * x.shape[1]
        return {}
