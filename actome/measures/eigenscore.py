"""How far several answers to one question lie apart inside the model: EigenScore, exact and by moments.

Letters: K answers, D width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..core.errors import MeasureError
from ..core.fold import Fold, Reduction
from ..core.real import double, ratio

Centre = Literal["units", "answers"]


class EigenScore(Fold):
    r"""Mean log eigenvalue of the covariance of several answers' embeddings: high when the answers disagree.

    For the embeddings :math:`Z` (K, D) of K sampled answers to one question, such as the state of the last token at a
    middle layer, centred,

    .. math:: \frac{1}{K} \log\det\left(Z Z^\top + \alpha I_K\right) = \frac{1}{K} \sum_i \log(\lambda_i + \alpha)

    - ``eigenscore``: mean over questions

    `score` gives it for each question. Scores of different K or D are not comparable.

    Args:
        alpha: :math:`\alpha > 0`, which keeps the logarithm finite: K answers that are alike have one eigenvalue.
        centre: what is subtracted: of each answer its mean over units, as published for EigenScore (``"units"``), or
            of each unit its mean over the answers (``"answers"``), as in the published fast form.

    Shapes: `update` and `score` take (\*questions, K, D), K at least 2; computed in float64.

    Raises:
        MeasureError: fewer than two answers, or a state that is not finite.

    Source: Chen et al. 2024, INSIDE: LLMs' Internal States Retain the Power of Hallucination Detection;
    its use over training after Mohammadzadeh et al. 2024, Hallucination Detox.

    Example:
        >>> alike, apart = torch.ones(4, 8).cumsum(1), torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
        >>> bool(EigenScore().score(alike) < EigenScore().score(apart))
        True
    """

    reductions: ClassVar[dict[str, Reduction]] = {"total": "sum", "questions": "sum"}

    def __init__(self, alpha: float = 1e-3, centre: Centre = "units", **options: object):
        super().__init__(**options)
        if not alpha > 0:
            raise MeasureError(f"alpha={alpha}; it must be positive, for K answers never span K centred directions")
        if centre not in ("units", "answers"):
            raise MeasureError(f"centre={centre!r}; choose 'units' or 'answers'")
        self.alpha, self.centre = alpha, centre

    def score(self, answers: Tensor) -> Tensor:
        """The score of each question, (\\*questions), float64, from (\\*questions, K, D)."""
        gram = self._centred(answers)
        gram = gram @ gram.mT
        return torch.linalg.eigvalsh(gram).clamp_min(0).add(self.alpha).log().mean(-1)

    def statistics(self, answers: Tensor) -> dict[str, Tensor]:
        """total: sum of the scores; questions: how many; both ()."""
        scores = self.score(answers)
        return {"total": scores.sum(), "questions": torch.tensor(scores.numel(), device=scores.device)}

    def values(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See the class."""
        return {"eigenscore": ratio(stats["total"], stats["questions"])}

    def _centred(self, answers: Tensor) -> Tensor:
        if answers.ndim < 2 or answers.shape[-2] < 2:
            raise MeasureError(f"EigenScore compares at least two answers (K, D), and this is {tuple(answers.shape)}")
        z = double(answers.detach())
        if not bool(z.isfinite().all()):
            raise MeasureError("an answer's embedding is not finite; leave that answer out")
        return z - z.mean(-1 if self.centre == "units" else -2, keepdim=True)


class EfficientEigenScore(EigenScore):
    r"""EigenScore from a few matrix products, without eigenvalues: for thousands of answers.

    :math:`M = 2 Z Z^\top / \sigma_1^2 - I` has its spectrum in [-1, 1], with :math:`\sigma_1` the largest singular
    value, by power iteration. Its Chebyshev moments are estimated with random signs z, and summed with the Chebyshev
    coefficients :math:`c_m` of the logarithm on that interval:

    .. math:: \sum_{m=0}^{\text{moments}} c_m d_m, \quad d_m = \overline{z^\top T_m(M) z} / K, \quad
        \log\left(\sigma_1^2 \tfrac{1 + x}{2} + \alpha\right) \approx \sum_m c_m T_m(x)

    The published form also divides each unit by its standard deviation and takes the logarithm of the rescaled
    spectrum; that forgets how far apart the answers lie, so here the scale is kept, and with more moments and probes
    the value tends to `EigenScore` with the same `alpha` and `centre`. With few moments small eigenvalues are read
    as about :math:`\sigma_1^2 / \text{moments}^2`: ranks are kept better than values.

    Args:
        moments: highest order; each costs a product with Z and one with its transpose.
        probes: random sign vectors; with no more answers than probes, all directions are taken instead, exactly.
        seed: of the probes.
        alpha, centre: as for `EigenScore`.

    Source: Mohammadzadeh et al. 2024, Hallucination Detox (Efficient EigenScore); kernel polynomial method after
    Lin, Saad and Yang 2016, Approximating Spectral Densities of Large Matrices.

    Example:
        >>> answers = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
        >>> exact, fast = EigenScore(alpha=1.0), EfficientEigenScore(moments=60, probes=200, alpha=1.0)
        >>> bool((fast.score(answers) - exact.score(answers)).abs() < 0.2)
        True
    """

    def __init__(
        self,
        moments: int = 20,
        probes: int = 20,
        alpha: float = 1e-3,
        centre: Centre = "units",
        seed: int = 0,
        **options: object,
    ):
        super().__init__(alpha, centre, **options)
        if moments < 1 or probes < 1:
            raise MeasureError(f"moments={moments} and probes={probes}; at least one of each is needed")
        self.moments, self.probes, self.seed = moments, probes, seed

    def score(self, answers: Tensor) -> Tensor:
        """The score of each question, (\\*questions), float64, from (\\*questions, K, D)."""
        if answers.ndim > 2:
            parts = [self.score(one) for one in answers.flatten(0, -3)]
            return torch.stack(parts).view(answers.shape[:-2])
        z = self._centred(answers)
        count = len(z)
        generator = torch.Generator().manual_seed(self.seed)
        square = _largest_square(z, generator)
        if square == 0:
            return torch.full((), math.log(self.alpha), dtype=z.dtype, device=z.device)
        if count <= self.probes:
            # Every direction once gives the trace itself.
            signs = torch.eye(count, dtype=z.dtype, device=z.device) * math.sqrt(count)
        else:
            signs = torch.randint(0, 2, (count, self.probes), generator=generator).mul(2).sub(1).to(z)

        def apply(v: Tensor) -> Tensor:
            return (2 / square) * (z @ (z.T @ v)) - v

        before, now = signs, apply(signs)
        moments = [torch.ones((), dtype=z.dtype, device=z.device), (signs * now).sum() / signs.numel()]
        for _ in range(2, self.moments + 1):
            before, now = now, 2 * apply(now) - before
            moments.append((signs * now).sum() / signs.numel())
        return (torch.stack(moments) * _log_coefficients(square, self.alpha, self.moments).to(z)).sum()


def _largest_square(z: Tensor, generator: torch.Generator) -> float:
    """The square of the largest singular value, a little above rather than below, so that the spectrum fits."""
    v = torch.randn(z.shape[1], 1, generator=generator).to(z)
    value = 0.0
    for _ in range(100):
        v = v / torch.linalg.vector_norm(v)
        v = z.T @ (z @ v)
        before, value = value, float(torch.linalg.vector_norm(v))
        if value == 0 or abs(value - before) < 1e-4 * value:
            break
    return value * 1.01


def _log_coefficients(square: float, alpha: float, order: int) -> Tensor:
    """Chebyshev coefficients of log(square (1 + x) / 2 + alpha), (order + 1), by Gauss-Chebyshev quadrature."""
    nodes = 4096
    theta = (torch.arange(nodes, dtype=torch.float64) + 0.5) * (math.pi / nodes)
    # 1 + cos(theta) as a square, which does not cancel near -1, where the logarithm is steep.
    f = (square * (theta / 2).cos().square() + alpha).log()
    c = 2 / nodes * (torch.cos(torch.arange(order + 1, dtype=torch.float64)[:, None] * theta) @ f)
    c[0] /= 2
    return c
