"""What attention, state space models and gated recurrences are: a linear system whose coefficients change in time.

Letters: T position, N state, C channel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.errors import MeasureError
from ..core.real import double


@dataclass(frozen=True, eq=False)
class DSF:
    r"""A layer as a linear time-varying system with a diagonal transition (dynamical systems framework).

    .. math:: h_i = \Lambda_i \odot h_{i-1} + B_i u_i, \qquad y_i = C_i \cdot h_i + D u_i

    for each channel by itself; a size of 1 in place of the channels means that all share the coefficients.

    Attributes:
        decay: :math:`\Lambda_i`, (T, state, channel or 1); what of the state is kept when input *i* comes.
        write: :math:`B_i`, (T, state, channel or 1).
        read: :math:`C_i`, (T, state, channel or 1).
        skip: *D*, (channel) or a number; what of the input goes past the state.

    The coefficients depend on the sequence for which they were made, so a system says what a layer does to one input;
    given those coefficients it is linear. `dsf(u)` with u (T, channel) gives y (T, channel).

    Source: Sieber et al. 2024, Understanding the differences in Foundation Models.

    Example:
        >>> half = torch.full((3, 1, 1), 0.5)
        >>> system = DSF(half, torch.ones(3, 1, 1), torch.ones(3, 1, 1))
        >>> system(torch.tensor([[1.0], [0.0], [0.0]]))[:, 0].tolist()
        [1.0, 0.5, 0.25]
        >>> system.mix()[0].tolist()
        [[1.0, 0.0, 0.0], [0.5, 1.0, 0.0], [0.25, 0.5, 1.0]]
    """

    decay: Tensor
    write: Tensor
    read: Tensor
    skip: Tensor | float = 0.0

    def __post_init__(self) -> None:
        shapes = [tuple(one.shape) for one in (self.decay, self.write, self.read)]
        if any(len(shape) != 3 or shape[:2] != shapes[1][:2] for shape in shapes):
            raise MeasureError(f"decay, write and read are (T, state, channel or 1) each, not {shapes}")

    def __call__(self, u_TC: Tensor) -> Tensor:
        """The outputs (T, channel) for inputs (T, channel)."""
        if u_TC.ndim != 2 or len(u_TC) != len(self.decay):
            raise MeasureError(f"the system has {len(self.decay)} positions, and the input is {tuple(u_TC.shape)}")
        h_NC = u_TC.new_zeros(self.decay.shape[1], u_TC.shape[1])
        out = []
        for decay, write, read, u_C in zip(self.decay, self.write, self.read, u_TC, strict=True):
            h_NC = decay * h_NC + write * u_C
            out.append((read * h_NC).sum(0))
        return torch.stack(out) + self.skip * u_TC

    def mix(self) -> Tensor:
        r"""The mixing matrices :math:`\Phi_{ij} = C_i \Lambda_i \cdots \Lambda_{j+1} B_j`, skip on the diagonal.

        Returns:
            (channel or 1, T, T), lower triangular: :math:`y = \Phi u` channel by channel.
        """
        T = len(self.decay)
        channels = max(one.shape[2] for one in (self.decay, self.write, self.read))
        # What each input has become by now, (T, state, channel): filled from above while time goes on.
        kept = self.write.new_zeros(T, self.write.shape[1], channels)
        phi_TTC = self.write.new_zeros(T, T, channels)
        for i in range(T):
            kept[:i] *= self.decay[i]
            kept[i] = self.write[i]
            phi_TTC[i, : i + 1] = (self.read[i] * kept[: i + 1]).sum(1)
        phi = phi_TTC.permute(2, 0, 1)
        if not isinstance(self.skip, Tensor) and self.skip == 0:
            return phi
        skip = torch.as_tensor(self.skip, dtype=phi.dtype, device=phi.device).reshape(-1, 1, 1)
        return phi + skip * torch.eye(T, dtype=phi.dtype, device=phi.device)

    def memory(self) -> Tensor:
        r"""How far back each position reads, in positions: :math:`\sum_j |\Phi_{ij}| (i - j) / \sum_j |\Phi_{ij}|`.

        Returns:
            (channel or 1, T); NaN where a position reads nothing at all.
        """
        phi = self.mix().abs()
        back = torch.arange(phi.shape[-1], device=phi.device)
        return (phi * (back[:, None] - back)).sum(-1) / phi.sum(-1)

    def rank(self, tolerance: float = 1e-6) -> Tensor:
        r"""What the state carries across time: the largest rank of a block :math:`\Phi_{i \ge t, j < t}`.

        The whole matrix has full rank as soon as its diagonal has no zero; what passes a cut between positions is at
        most the state, and less where the coefficients do not use it.

        Args:
            tolerance: singular values below this share of the block's largest count as 0.

        Returns:
            (channel or 1), int64.
        """
        phi = double(self.mix())
        T = phi.shape[-1]
        ranks = [torch.zeros(len(phi), dtype=torch.long, device=phi.device)]
        for cut in range(1, T):
            values = torch.linalg.svdvals(phi[:, cut:, :cut])
            ranks.append((values > tolerance * values[:, :1].clamp_min(1e-300)).sum(-1))
        return torch.stack(ranks).amax(0)

    def effective_rank(self) -> Tensor:
        """The exponential of the entropy of the singular values of the mixing matrix, (channel or 1)."""
        values = torch.linalg.svdvals(double(self.mix()))
        p = values / values.sum(-1, keepdim=True).clamp_min(1e-300)
        return torch.special.entr(p).sum(-1).exp()

    def moduli(self) -> Tensor:
        r"""The moduli of the eigenvalues of all :math:`\Lambda_i` after the first, sorted.

        The transition is diagonal, so they are its entries; the first acts on an empty state.
        """
        return self.decay[1:].abs().flatten().sort().values
