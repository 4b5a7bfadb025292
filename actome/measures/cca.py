"""Canonical correlations: how much of two sets of features is the same up to any linear map."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..core.errors import MeasureError
from .paired import CrossMoments


class CCA(CrossMoments):
    r"""Canonical correlations of two sets of features of the same N rows, streaming.

    With the covariances' leading eigenvectors and -values, :math:`\Sigma_x = V_x D_x V_x^\top`, the singular values of
    :math:`(D_x + r)^{-1/2} V_x^\top \Sigma_{xy} V_y (D_y + r)^{-1/2}`:

    - ``correlations`` (rank): each, largest first, as many as the smaller of both has directions
    - ``cca``: their mean
    - ``cca_square``: the mean of their squares, the share of variance that the one explains of the whitened other
    - ``cca_directions_x``, ``cca_directions_y``: how many directions took part

    Invariant to any invertible linear map of either (without `variance` and `ridge`), and so blind to which directions
    carry the variance; compare `LinearCKA`.

    Args:
        variance: keep the leading directions that hold this share of each one's variance; 1 for all above the rounding.
            0.99 makes it `SVCCA`.
        ridge: r, in shares of each one's mean variance; shrinks correlations of weak directions.

    Shapes: x (N, unit), y (N, other).

    Raises:
        MeasureError: no more rows than both have directions together: some correlations would be 1 whatever the
            features; or one of the two does not vary.

    Source: Hotelling 1936; Raghu et al. 2017, SVCCA; the mean as in Kornblith et al. 2019.

    Example:
        >>> x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
        >>> cca = CCA()
        >>> cca.update(x, x @ torch.tensor([[1.0, 5.0, 0.0], [0.0, 1.0, 2.0], [3.0, 0.0, 1.0]]))
        >>> round(float(cca.compute()["cca"]), 6)
        1.0
    """

    def __init__(self, variance: float = 1.0, ridge: float = 0.0, **options: object):
        super().__init__(**options)
        if not 0 < variance <= 1 or ridge < 0:
            raise MeasureError(f"variance={variance} is a share in (0, 1], and ridge={ridge} 0 or more")
        self.variance, self.ridge = variance, ridge

    def values(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See the class."""
        m = self.centred(stats)
        x, y = self._whitening(m.xx, "x"), self._whitening(m.yy, "y")
        both = x.shape[1] + y.shape[1]
        if int(m.count) <= both:
            raise MeasureError(
                f"{int(m.count)} rows are too few for {x.shape[1]} and {y.shape[1]} directions: more than {both} are "
                "needed, or correlations of 1 come out whatever the features. Give more rows, or fewer directions: "
                f"{type(self).__name__}(variance=0.9)"
            )
        correlations = torch.linalg.svdvals(x.T @ m.xy @ y).clamp(0, 1)
        return {
            "correlations": correlations,
            "cca": correlations.mean(),
            "cca_square": correlations.square().mean(),
            "cca_directions_x": torch.tensor(x.shape[1]),
            "cca_directions_y": torch.tensor(y.shape[1]),
        }

    def _whitening(self, product: Tensor, name: str) -> Tensor:
        """The directions that take part, each divided by its deviation: (unit, directions)."""
        values, vectors = torch.linalg.eigh(product)
        values, vectors = values.flip(0), vectors.flip(1)
        total = values.clamp_min(0).sum()
        if not bool(total > 0):
            raise MeasureError(f"{name} is the same in every row: it has no correlations")
        share = values.clamp_min(0).cumsum(0) / total
        directions = int((share < self.variance - 1e-12).sum()) + 1
        directions = min(directions, int((values > 1e-10 * values[0]).sum()))
        return vectors[:, :directions] / (values[:directions] + self.ridge * total / len(values)).sqrt()


class SVCCA(CCA):
    """`CCA` of the leading directions that hold 99 % of each one's variance.

    Source: Raghu et al. 2017, SVCCA.

    Example:
        >>> x = torch.randn(300, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([9.0, 9.0, 9.0, 0.01])
        >>> svcca = SVCCA()
        >>> svcca.update(x, x)
        >>> int(svcca.compute()["cca_directions_x"])
        3
    """

    def __init__(self, variance: float = 0.99, ridge: float = 0.0, **options: object):
        super().__init__(variance, ridge, **options)
