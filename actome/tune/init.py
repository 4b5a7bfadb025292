"""Initial weights of a chosen rank: the structure of the start decides how much features move in training."""

from __future__ import annotations

import torch
from torch import Tensor

from actome.core.real import wide


@torch.no_grad()
def low_rank_(weight: Tensor, rank: int, align_to: Tensor | None = None) -> Tensor:
    r"""Brings a weight matrix to a lower rank in place, at the same Frobenius norm.

    .. math:: W \leftarrow \|W\|_F \, \frac{W_r}{\|W_r\|_F}, \qquad W_r = \sum_{k \le r} \sigma_k u_k v_k^\top

    The norm is kept so that ranks can be compared: without that, a lower rank is only a smaller start. Training from a
    low rank is richer (weights, features and the tangent kernel move further) than from a full one, unless the
    directions that it keeps are those that the task needs.

    Args:
        weight: (out, in), such as ``rnn.recurrent.weight``; any floating dtype, also a parameter.
        rank: how many singular triplets stay, 1 to min(out, in).
        align_to: (out, in), take the leading triplets of this matrix in place of the weight's own, such as those of a
            trained weight or of the covariance of output and input. The norm is still that of `weight`.

    Returns:
        `weight` itself.

    Raises:
        ValueError: not a matrix, a rank that it cannot have, another shape to align to, or a zero matrix.

    Source: Liu et al. 2024, How connectivity structure shapes rich and lazy learning in neural circuits.

    >>> weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    >>> norm = weight.norm()
    >>> torch.linalg.matrix_rank(low_rank_(weight, 2)).item(), torch.allclose(weight.norm(), norm)
    (2, True)
    """
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(f"low_rank_ takes a matrix of floats, not {weight.dtype} {tuple(weight.shape)}")
    if not 1 <= rank <= min(weight.shape):
        raise ValueError(f"rank={rank}: a matrix of {tuple(weight.shape)} has ranks from 1 to {min(weight.shape)}")
    source = weight if align_to is None else align_to.to(weight.device)
    if source.shape != weight.shape:
        raise ValueError(f"align_to is {tuple(source.shape)} and the weight {tuple(weight.shape)}; give one shape")
    u, s, vh = torch.linalg.svd(wide(source), full_matrices=False)
    low = (u[:, :rank] * s[:rank]) @ vh[:rank]
    norm = low.norm()
    if not norm > 0:
        raise ValueError("the matrix that gives the directions is zero or not finite, so it has no leading ones")
    return weight.copy_(low * (wide(weight).norm() / norm))
