"""Centred kernel alignment: how alike the geometry of two sets of features of the same tokens is.

Letters: L site, N tokens, M tokens of a minibatch, U unit.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..core.errors import MeasureError
from ..core.measure import Measure, Reduction, double, ratio, wide
from .paired import CrossMoments, common_rows, cross_moments
from .sampling import taken

Kernel = Literal["linear", "rbf"]
_ROUNDING = torch.finfo(torch.float64).eps


class CKA(Measure):
    r"""Centred kernel alignment of all pairs of sites in one pass, by unbiased minibatches.

    In every minibatch of n tokens, with :math:`\tilde K` the kernel matrix of a site without its diagonal,

    .. math:: HSIC_1(K, L) = \frac{1}{n (n - 3)} \Big( \operatorname{tr} \tilde K \tilde L + \frac{1^\top \tilde K 1 \;
        1^\top \tilde L 1}{(n - 1)(n - 2)} - \frac{2}{n - 2} 1^\top \tilde K \tilde L 1 \Big)

    which is without bias for any n of 4 or more; its mean over minibatches, each weighing its n, makes

    - ``cka`` (site, site): :math:`HSIC(K, L) / \sqrt{HSIC(K, K)\, HSIC(L, L)}`: 1 for the same geometry, about 0 for
      unrelated ones (it may be slightly negative)
    - ``cka_next`` (site): that with the next site of the list; NaN at the last

    Each kernel matrix is centred once, so that all pairs are one matrix product. The real tokens of a batch are dealt
    out at random (the same way each time) to minibatches of at most `size`, so that each mixes texts and positions.
    Merging is streaming: it adds minibatches, and those are within one batch.

    Invariant to rotation and to isotropic scale of a site's features. A token that is padding or not finite at any site
    is left out at all. A batch with fewer than 4 real tokens adds nothing; NaN when there was no other.

    Args:
        kernel: ``"linear"``, or ``"rbf"`` :math:`\exp(-d^2 / 2 \sigma^2)`.
        size: tokens of a minibatch at most; memory and time go with its square.
        bandwidth: :math:`\sigma` of the rbf kernel, in medians of the minibatch's distances.
        every: take every n-th token of a row, counted from its first real one.

    Shapes: `update` takes a list of (batch, pos, unit), units may differ; values (site, site) and (site).

    Source: Nguyen, Raghu and Kornblith 2021, Do Wide and Deep Networks Learn the Same Things? (minibatch CKA), with
    the unbiased HSIC of Song et al. 2012; CKA is Kornblith et al. 2019.

    Example:
        >>> x = torch.randn(2, 40, 8, generator=torch.Generator().manual_seed(0))
        >>> cka = CKA()
        >>> cka.update([x, 3 * x.flip(-1), x.square()])
        >>> [round(float(one), 4) for one in cka.compute()["cka"][0, :2]]
        [1.0, 1.0]
    """

    layout = "sites"
    reductions: ClassVar[dict[str, Reduction]] = {"tokens": "sum", "hsic": "sum"}
    value_dims: ClassVar[dict[str, tuple[str, ...]]] = {"cka": ("site",), "cka_next": ()}

    def __init__(
        self, kernel: Kernel = "linear", size: int = 256, bandwidth: float = 1.0, every: int = 1, **options: object
    ):
        super().__init__(**options)
        if kernel not in ("linear", "rbf"):
            raise MeasureError(f"kernel={kernel!r} does not exist; choose 'linear' or 'rbf'")
        if size < 4 or bandwidth <= 0 or every < 1:
            raise MeasureError(
                f"size={size}, bandwidth={bandwidth}, every={every}: take at least 4 tokens a minibatch, a positive "
                "bandwidth and every=1 or more"
            )
        self.kernel, self.size, self.bandwidth, self.every = kernel, size, bandwidth, every

    def prepare(self, x: Tensor, previous: Tensor | None, mask: Tensor | None = None) -> Tensor:
        """The tokens that are taken, in the order in which they are dealt out: a copy, (token, unit)."""
        if x.ndim != 3 or (mask is not None and (mask.shape != x.shape[:2] or mask.dtype != torch.bool)):
            raise MeasureError(
                f"CKA takes (batch, pos, unit) and a bool mask (batch, pos), not {tuple(x.shape)}"
                + ("" if mask is None else f" with {mask.dtype} {tuple(mask.shape)}")
            )
        kept = taken(x.detach(), mask, mask, self.every).x
        return kept[_order(len(kept)).to(x.device)]

    def site_statistics(
        self, x: Sequence[Tensor], mask: Tensor | None = None, tokens: Tensor | None = None
    ) -> dict[str, Tensor]:
        """tokens: (site), how many took part; hsic: (site, site), summed over minibatches with their sizes."""
        if not x or any(one.ndim != 2 or len(one) != len(x[0]) for one in x):
            shapes = ", ".join(str(tuple(one.shape)) for one in x)
            raise MeasureError(f"CKA compares sites with the same tokens, and these were prepared of {shapes}")
        hsic = self._hsic(x)
        if not bool(hsic.isfinite().all()):
            # Some token is not finite somewhere: it is left out everywhere, and the others are dealt out anew.
            finite = torch.stack([one.isfinite().all(-1).to(x[0].device) for one in x]).all(0)
            order = _order(len(finite)).to(finite.device)
            rows = order.argsort()[finite[order.argsort()]]
            x = [one[rows.to(one.device)][_order(len(rows)).to(one.device)] for one in x]
            hsic = self._hsic(x)
        count = sum(len(part) for part in _minibatches(len(x[0]), self.size))
        return {"tokens": torch.full((len(x),), count, device=x[0].device), "hsic": hsic}

    def _hsic(self, x: Sequence[Tensor]) -> Tensor:
        device = x[0].device
        hsic = torch.zeros(len(x), len(x), dtype=torch.float64, device=device)
        for part in _minibatches(len(x[0]), self.size):
            n = len(part)
            dtype = torch.float64 if any(one.dtype == torch.float64 for one in x) else torch.float32
            grams = torch.empty(len(x), n, n, dtype=dtype, device=device)
            for one, gram in zip(x, grams, strict=True):
                gram.copy_(centred_gram(one[part.start : part.stop], self.kernel, self.bandwidth))
            flat = grams.flatten(1)
            scale = torch.linalg.vector_norm(flat, dim=1, keepdim=True).clamp_min(1e-30)
            flat /= scale  # so that no square overflows
            scaled = double(flat @ flat.T)
            hsic += scaled * (double(scale) @ double(scale).T) / (n - 3)  # n times the HSIC, the weight that it has
        return hsic

    def values(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See the class."""
        hsic = ratio(stats["hsic"], stats["tokens"][..., None])
        scale = hsic.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
        both = scale[..., :, None] * scale[..., None, :]
        cka = (hsic / both).where(both > 0, torch.nan)
        following = torch.cat([cka.diagonal(1, -2, -1), torch.full_like(cka[..., 0, :1], torch.nan)], -1)
        return {"cka": cka, "cka_next": following}


@lru_cache(maxsize=4)
def _order(tokens: int) -> Tensor:
    """The order in which tokens are dealt out to minibatches, the same each time.

    In turn would not do: in rows of one length it puts the same positions of all rows together, whose pairs are
    special.
    """
    return torch.randperm(tokens, generator=torch.Generator().manual_seed(tokens))


def _minibatches(tokens: int, size: int) -> list[range]:
    """As few as there can be, of nearly the same size; those that are too small for an estimate are left out.

    >>> [len(part) for part in _minibatches(14, 5)]
    [5, 5, 4]
    """
    parts = -(-tokens // size)
    small, more = divmod(tokens, max(parts, 1))
    ends = [small * i + min(i, more) for i in range(parts + 1)]
    return [range(a, b) for a, b in itertools.pairwise(ends) if b - a >= 4]


def centred_gram(x_MU: Tensor, kernel: Kernel = "linear", bandwidth: float = 1.0) -> Tensor:
    r"""The kernel matrix of a minibatch, centred so that products of two of them are unbiased: (*, M, M).

    :math:`\langle P_K, P_L \rangle = n (n - 3) HSIC_1(K, L)` for the matrices P that this gives (U-centring: Székely
    and Rizzo 2014). In the precision of `x_MU`, float32 or better.
    """
    x_MU = wide(x_MU)
    x_MU = x_MU - x_MU.mean(-2, keepdim=True)  # changes nothing but the rounding
    gram = _symmetric(x_MU)
    n = gram.shape[-1]
    if kernel == "rbf":
        norm = gram.diagonal(dim1=-2, dim2=-1)
        square = (norm[..., :, None] + norm[..., None, :] - 2 * gram).clamp_min(0)
        i, j = torch.triu_indices(n, n, 1, device=gram.device)
        median = square[..., i, j].median(-1).values[..., None, None]
        gram = (-square / (2 * bandwidth**2 * median.clamp_min(torch.finfo(square.dtype).tiny))).exp()
    gram.diagonal(dim1=-2, dim2=-1).zero_()
    row = gram.sum(-1)
    row = (row - row.sum(-1, keepdim=True) / (2 * (n - 1))) / (n - 2)
    gram -= row[..., :, None]
    gram -= row[..., None, :]
    gram.diagonal(dim1=-2, dim2=-1).zero_()
    return gram


def _symmetric(x_MU: Tensor) -> Tensor:
    n = x_MU.shape[-2]
    if n < 64 or x_MU.ndim > 2 or x_MU.device.type != "cpu":
        return x_MU @ x_MU.mT
    # Three blocks of four: the other is a mirror image.
    half = n // 2
    gram = x_MU.new_empty(n, n)
    torch.mm(x_MU[:half], x_MU.T, out=gram[:half])
    torch.mm(x_MU[half:], x_MU[half:].T, out=gram[half:, half:])
    gram[half:, :half] = gram[:half, half:].T
    return gram


class LinearCKA(CrossMoments):
    r"""Linear CKA of two sets of features of the same N rows, over all of them at once and without minibatches.

    From products of features, so memory goes with the widths and not with N; exact, as if the (N, N) matrices had been
    made. With centred X and Y:

    - ``cka``: the debiased estimate, whose numerator is :math:`\lVert X^\top Y \rVert_F^2 - \frac{N}{N - 2} \sum_i
      \lVert x_i \rVert^2 \lVert y_i \rVert^2 + \frac{\lVert X \rVert_F^2 \lVert Y \rVert_F^2}{(N - 1)(N - 2)}`, that
      is :math:`N (N - 3) HSIC_1`, and whose denominator is the root of the two likewise
    - ``cka_biased``: :math:`\lVert X^\top Y \rVert_F^2 / (\lVert X^\top X \rVert_F \lVert Y^\top Y \rVert_F)`, which
      tends to 1 as the widths outgrow N

    Shapes: x (N, unit), y (N, other). NaN where one of the two is the same in every row.

    Raises:
        MeasureError: fewer than 4 rows, or a mean of thousands of deviations, for fourth powers are summed around zero.

    Source: Kornblith et al. 2019, Similarity of Neural Network Representations Revisited, debiased as in Nguyen,
    Raghu and Kornblith 2021.

    Example:
        >>> x = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
        >>> cka = LinearCKA()
        >>> cka.update(x, -2 * x)
        >>> round(float(cka.compute()["cka"]), 6)
        1.0
    """

    reductions: ClassVar[dict[str, Reduction]] = {
        **CrossMoments.reductions,
        "aa": "sum",
        "bb": "sum",
        "ab": "sum",
        "ax": "sum",
        "bx": "sum",
        "ay": "sum",
        "by": "sum",
    }
    needs = 4

    def statistics(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """As `CrossMoments`, and products of squared lengths, a of rows of x and b of y, with one another and x, y."""
        x, y = common_rows(x, y)
        a, b = x.square().sum(1), y.square().sum(1)
        return {
            **cross_moments(x, y),
            "aa": a @ a,
            "bb": b @ b,
            "ab": a @ b,
            "ax": a @ x,
            "bx": b @ x,
            "ay": a @ y,
            "by": b @ y,
        }

    def values(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See the class."""
        m = self.centred(stats)
        n, mean_x, mean_y = m.count, m.mean_x, m.mean_y
        # Sums of products of squared lengths around the means, from those around zero.
        xx = _lengths(stats["aa"], stats["ax"], stats["ax"], m.xx, mean_x, mean_x, m.a, m.a, n)
        yy = _lengths(stats["bb"], stats["by"], stats["by"], m.yy, mean_y, mean_y, m.b, m.b, n)
        xy = _lengths(stats["ab"], stats["ay"], stats["bx"], m.xy, mean_x, mean_y, m.a, m.b, n)
        X, Y = m.xx.diagonal().sum(), m.yy.diagonal().sum()
        cross, own_x, own_y = (
            product.square().sum() - n / (n - 2) * lengths + one * other / ((n - 1) * (n - 2))
            for product, lengths, one, other in ((m.xy, xy, X, Y), (m.xx, xx, X, X), (m.yy, yy, Y, Y))
        )
        for fourth, product in ((stats["aa"], m.xx), (stats["bb"], m.yy)):
            if bool(_ROUNDING * fourth > 1e-5 * product.square().sum()) and bool(product.any()):
                raise MeasureError(
                    "the features' mean is thousands of times their spread, and what is left of their fourth powers is "
                    "rounding; subtract a constant from them first, such as their first row, which changes no CKA"
                )
        varies = (X > 0) & (Y > 0)
        return {
            "cka": (cross / (own_x.clamp_min(0) * own_y.clamp_min(0)).sqrt()).where(varies, torch.nan),
            "cka_biased": m.xy.square().sum() / (m.xx.norm() * m.yy.norm()),
        }


def _lengths(
    ab: Tensor, ay: Tensor, bx: Tensor, xy: Tensor, mu: Tensor, nu: Tensor, a: Tensor, b: Tensor, n: Tensor
) -> Tensor:
    r""":math:`\sum_i \lVert x_i - \mu \rVert^2 \lVert y_i - \nu \rVert^2`, with `xy` the centred product and a, b the
    sums of squared lengths."""
    m, k = mu @ mu, nu @ nu
    full = mu @ xy @ nu + n * m * k  # of mu'x y'nu around zero
    return ab - 2 * (nu @ ay) - 2 * (mu @ bx) + k * a + m * b + 4 * full - 3 * n * m * k
