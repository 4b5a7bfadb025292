"""Procrustes: how far two sets of features are apart after the best rotation."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..core.errors import MeasureError
from .paired import CrossMoments


class Procrustes(CrossMoments):
    r"""Distance of two sets of features of the same N rows after centring, scaling to norm 1 and the best rotation.

    With :math:`s = \lVert X^\top Y \rVert_* / (\lVert X \rVert_F \lVert Y \rVert_F)`, the sum of singular values over
    the norms, X and Y centred:

    - ``procrustes``: s, 1 for the same up to rotation and scale
    - ``procrustes_angle``: :math:`\arccos s`, in radians: a metric (it obeys the triangle inequality)
    - ``procrustes_distance``: :math:`\sqrt{2 - 2 s}`, the root of the least summed squared difference of both at norm 1

    Widths may differ: the narrower is read as if it had zeros. It grows with chance when there are few rows for the
    widths; compare it with rows that were shuffled.

    Shapes: x (N, unit), y (N, other).

    Raises:
        MeasureError: fewer than 3 rows, or one of the two does not vary.

    Source: Schönemann 1966; angle and metric as in Williams et al. 2021, Generalized Shape Metrics on Neural
    Representations; the distance is that of Ding, Denain and Steinhardt 2021 before its square.

    Example:
        >>> x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
        >>> procrustes = Procrustes()
        >>> procrustes.update(x, 3 * x @ torch.tensor([[0.0, 1.0], [-1.0, 0.0]]) + 7)
        >>> round(float(procrustes.compute()["procrustes"]), 6)
        1.0
    """

    needs = 3

    def values(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See the class."""
        m = self.centred(stats)
        norms = (m.xx.diagonal().sum() * m.yy.diagonal().sum()).sqrt()
        if not bool(norms > 0):
            raise MeasureError("one of the two sets of features is the same in every row: it has no shape")
        s = (torch.linalg.svdvals(m.xy).sum() / norms).clamp(0, 1)
        return {"procrustes": s, "procrustes_angle": s.arccos(), "procrustes_distance": (2 - 2 * s).clamp_min(0).sqrt()}
