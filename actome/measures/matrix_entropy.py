"""How compressed a representation is: the entropy of its Gram matrix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from ..core.errors import MeasureError
from .spectral import renyi_entropy, trace_share_missed
from .spectrum import SecondMoments


class MatrixEntropy(SecondMoments):
    r"""Matrix-based entropy of the tokens' directions.

    Each token is scaled to length 1 (so that no norm plays a part); with :math:`\lambda_k` the eigenvalues of the
    normalised Gram matrix of the N tokens, which sum to 1 and are those of :math:`\sum_t x_t x_t^\top / N`:

    - ``matrix_entropy``: :math:`-\sum_k \lambda_k \ln \lambda_k` (von Neumann), or for another order
      :math:`\frac{1}{1-\alpha} \ln \sum_k \lambda_k^\alpha` (Rényi), in nats
    - ``matrix_entropy_share``: the same over its largest value :math:`\ln \min(N, U)`, to compare widths and numbers of
      tokens; NaN for a single token or unit
    - ``matrix_entropy_sketch_error``: share of the trace that a sketch does not resolve, 0 where it is exact

    Over real tokens, not centred; tokens that are zero have no direction and are left out. Accumulated in the width of
    the site, so N may be anything, but with few tokens the entropy is bound by :math:`\ln N`.

    Args:
        order: :math:`\alpha`, 1 for von Neumann; 2 gives minus the logarithm of the purity.
        max_width, sketch, every, seed: see `SecondMoments`.

    Shapes: x (\*stack, batch, pos, unit); values (\*stack).

    Source: Yu 2025, Memorization-Compression Cycles Improve Generalization (matrix-based entropy); Giraldo, Rao and
    Principe 2015 for the Rényi form.

    Example:
        >>> entropy = MatrixEntropy(order=2)
        >>> entropy.update(torch.eye(4)[None] * torch.tensor([5.0, 1.0, 1.0, 0.0]))
        >>> round(float(entropy.compute()["matrix_entropy"].exp()), 4)
        3.0
    """

    value_dims: ClassVar[dict[str, tuple[str, ...]]] = {
        "matrix_entropy": (),
        "matrix_entropy_share": (),
        "matrix_entropy_sketch_error": (),
    }

    def __init__(self, order: float = 1.0, **options: object):
        super().__init__(**options)
        if order <= 0:
            raise MeasureError(f"order={order}: give a positive number, 1 for the von Neumann entropy")
        self.order = order

    def rows(self, x_NU: Tensor) -> Tensor:
        """Each token at length 1; zeros stay zeros and add nothing."""
        return torch.nn.functional.normalize(x_NU, dim=-1, eps=1e-30)

    def values(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See the class."""
        _, around_zero = self.eigenvalues(stats)
        entropy = renyi_entropy(around_zero, self.order).where(around_zero.trace > 0, torch.nan)
        most = around_zero.count.clamp_min(1).to(entropy.dtype).log()
        return {
            "matrix_entropy": entropy.clamp_min(0.0),
            "matrix_entropy_share": (entropy / most).where(most > 0, torch.nan),
            "matrix_entropy_sketch_error": trace_share_missed(around_zero),
        }
