"""A leaky recurrent network of rectified units, and digits that are read row by row."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .draw import weights_from


class LeakyRNN(nn.Module):
    r"""A recurrent network of rectified units with leak, for sequences of vectors.

    .. math:: h_t = \rho\, h_{t-1} + (1 - \rho)\,(W\,\mathrm{relu}(h_{t-1}) + U x_t), \qquad
        y = V\,\mathrm{relu}(h_T) + b

    with :math:`h_0 = 0`, :math:`W_{ij} \sim N(0, g^2 / N)` and U, V of the usual scale. The submodule `state` gives
    every h_t, (batch, pos, unit), so that ``module:state`` is a site; `recurrent` holds W, without a bias.

    Args:
        inputs, width, outputs: of x_t, of the state (N) and of the readout.
        leak: rho, 0 for none.
        gain: g.
        seed: of all weights.

    Shapes: x (batch, pos, input), output (batch, output).

    Source: Liu et al. 2024, How connectivity structure shapes rich and lazy learning in neural circuits.

    >>> LeakyRNN(8, 16, 10)(torch.zeros(5, 8, 8)).shape
    torch.Size([5, 10])
    """

    def __init__(self, inputs: int, width: int, outputs: int, *, leak: float = 0.0, gain: float = 1.0, seed: int = 0):
        super().__init__()
        if not 0 <= leak < 1 or gain <= 0:
            raise ValueError(f"leak={leak}, gain={gain}: the leak is from 0 to below 1 and the gain above 0")
        with weights_from(seed):
            self.input = nn.Linear(inputs, width, bias=False)
            self.recurrent = nn.Linear(width, width, bias=False)
            self.readout = nn.Linear(width, outputs)
            nn.init.normal_(self.recurrent.weight, std=gain * width**-0.5)
        self.state = nn.Identity()
        self.leak = leak

    def forward(self, x: Tensor) -> Tensor:
        driven_BTN = self.input(x)
        h = torch.zeros_like(driven_BTN[:, 0])
        states = []
        for drive in driven_BTN.unbind(1):
            h = self.leak * h + (1 - self.leak) * (self.recurrent(h.relu()) + drive)
            states.append(h)
        states_BTN = self.state(torch.stack(states, 1))
        return self.readout(states_BTN[:, -1].relu())


def rows_of(images: Tensor) -> Tensor:
    """Square images as sequences of their rows, from top to bottom: (n, side * side) to (n, side, side).

    >>> rows_of(torch.zeros(5, 64)).shape
    torch.Size([5, 8, 8])
    """
    side = round(images[0].numel() ** 0.5)
    if side * side != images[0].numel():
        raise ValueError(f"images of {images[0].numel()} pixels are not square, so they have no rows")
    return images.reshape(len(images), side, side)
