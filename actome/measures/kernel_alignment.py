"""How alike two kernels are, of features or of gradients: lazy training leaves them alone, rich training does not.

Letters: N row (probe, token), K class.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..core.errors import MeasureError
from ..core.real import double, wide
from .tangent_kernel import tangent_kernel

if TYPE_CHECKING:
    import pandas as pd


def kernel_alignment(k: Tensor, other: Tensor, *, centred: bool = True) -> float:
    r"""How alike two kernel matrices of the same rows are, :math:`\langle K, L \rangle / (\|K\| \|L\|)`.

    Args:
        k, other: (row, row).
        centred: take row and column means off both before (centred kernel alignment); otherwise a part that all rows
            share counts as agreement.

    Returns:
        At most 1, which only multiples of one another have; NaN where one of the two is zero.

    Source: Cortes, Mohri and Rostamizadeh 2012, Algorithms for Learning Kernels Based on Centered Alignment; not
    centred, Cristianini et al. 2001 and Liu et al. 2024 (see `actome.dynamics.regime`).

    Example:
        >>> import torch
        >>> k = torch.eye(4)
        >>> kernel_alignment(k, 3 * k), round(kernel_alignment(k, torch.ones(4, 4), centred=False), 6)
        (1.0, 0.5)
    """
    if k.shape != other.shape or k.ndim != 2 or k.shape[0] != k.shape[1]:
        raise MeasureError(f"kernels of {tuple(k.shape)} and {tuple(other.shape)}; want two (row, row) of one size")
    a, b = double(k), double(other.to(k.device))
    if centred:
        a, b = _centred(a), _centred(b)
    scale = a.norm() * b.norm()
    return float((a * b).sum() / scale) if scale > 0 else float("nan")


def representation_alignment(x: Tensor, y: Tensor) -> float:
    r"""`kernel_alignment`, not centred, of :math:`X X^\top` and :math:`Y Y^\top`, without making them.

    :math:`\|X^\top Y\|_F^2 / (\|X^\top X\|_F \|Y^\top Y\|_F)`: how much of the similarity structure of the rows is the
    same, whatever the basis.

    Args:
        x, y: features of the same rows, (row, unit) and (row, other).

    Example:
        >>> import torch
        >>> x = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
        >>> round(representation_alignment(x, x.flip(1)), 6)
        1.0
    """
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or not len(x):
        raise MeasureError(f"features of {tuple(x.shape)} and {tuple(y.shape)}; want (row, unit) of the same rows")
    x, y = double(x), double(y.to(x.device))
    scale = (x.T @ x).norm() * (y.T @ y).norm()
    return float((x.T @ y).square().sum() / scale) if scale > 0 else float("nan")


def label_kernel(y: Tensor) -> Tensor:
    r"""The kernel that knows the targets, :math:`Y Y^\top`: of classes (row) as one-hot vectors, of numbers as such.

    Example:
        >>> import torch
        >>> label_kernel(torch.tensor([0, 1, 0]))
        tensor([[1., 0., 1.],
                [0., 1., 0.],
                [1., 0., 1.]])
    """
    if y.ndim == 1 and not y.is_floating_point():
        y = (y[:, None] == y.unique()).float()
    y_NK = wide(y.reshape(len(y), -1))
    return y_NK @ y_NK.T


class TangentKernelAlignment:
    """Follows the tangent kernel over a training: how aligned it is to the targets, and still to what it was at first.

    The first update is the reference. When the kernel stays where it was, the run is lazy; when it turns towards the
    targets, features are being learned.

    Args:
        probes, y: inputs and their targets, (probe, ...) and (probe) of classes or (probe, ...) of numbers.
        options: of `tangent_kernel`.

    Source: Kumar et al. 2024, Grokking as the Transition from Lazy to Rich Training Dynamics.

    Example:
        >>> import torch
        >>> x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
        >>> follow = TangentKernelAlignment(x, x[:, 0].sign())
        >>> follow.update(0, torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)))
        >>> follow.compute().columns.tolist(), round(float(follow.compute().initial_alignment[0]), 6)
        (['step', 'label_alignment', 'initial_alignment', 'norm'], 1.0)
    """

    def __init__(self, probes: Tensor | Mapping[str, Any], y: Tensor, **options: Any):
        if options.setdefault("per", "probe") != "probe":
            raise MeasureError("targets are one a probe, so the kernel is followed per='probe'")
        self.probes, self.options = probes, options
        self.target = label_kernel(y)
        self.first: Tensor | None = None
        self.rows: list[dict[str, float]] = []

    def update(self, step: float, net: Any) -> None:
        """Measures the kernel of a network at one step."""
        kernel = tangent_kernel(net, self.probes, **self.options)
        self.first = kernel if self.first is None else self.first
        self.rows.append(
            {
                "step": step,
                "label_alignment": kernel_alignment(kernel, self.target.to(kernel.device)),
                "initial_alignment": kernel_alignment(kernel, self.first),
                "norm": float(kernel.norm()),
            }
        )

    def compute(self) -> pd.DataFrame:
        """One row an update: step, label_alignment and initial_alignment (both centred), and the kernel's norm."""
        import pandas as pd

        return pd.DataFrame(self.rows, columns=["step", "label_alignment", "initial_alignment", "norm"])


def _centred(k: Tensor) -> Tensor:
    k = k - k.mean(0)
    return k - k.mean(1, keepdim=True)
