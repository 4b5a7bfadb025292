"""Drawing in bulk: what the worlds of `actome.tasks` share.

A Markov chain has to be drawn one position after the other, but all sequences at once, and one draw should cost one
search in one table, however many rows the table has. `Rows` does that; the rest are a few words that every world needs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

# A uniform draw so near to one that its sum with a row number could round up into the next row is held below it.
_BELOW_ONE = 1 - 1e-9


def seeded(seed: int) -> torch.Generator:
    """A generator on the CPU with this seed; every draw of a world comes from one of these.

    >>> torch.rand(2, generator=seeded(3)).equal(torch.rand(2, generator=seeded(3)))
    True
    """
    return torch.Generator().manual_seed(seed)


@contextlib.contextmanager
def weights_from(seed: int) -> Iterator[None]:
    """Within it, modules draw their initial weights from this seed; the caller's random state stays as it is.

    >>> with weights_from(1):
    ...     one = torch.nn.Linear(2, 2)
    >>> with weights_from(1):
    ...     other = torch.nn.Linear(2, 2)
    >>> one.weight.equal(other.weight)
    True
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def dirichlet(shape: tuple[int, ...], concentration: float, generator: torch.Generator) -> Tensor:
    """Probability vectors from a symmetric Dirichlet distribution, float64, along the last dim of `shape`.

    >>> dirichlet((2, 3), 0.5, seeded(0)).sum(-1).allclose(torch.ones(2, dtype=torch.float64))
    True
    """
    gamma = torch._standard_gamma(torch.full(shape, concentration, dtype=torch.float64), generator=generator)
    gamma = gamma + 1e-9  # small concentrations underflow to rows of zeros
    return gamma / gamma.sum(-1, keepdim=True)


def entropy(probabilities: Tensor) -> Tensor:
    """Entropy of the last dim in nats; zero probabilities count zero.

    >>> entropy(torch.tensor([[0.5, 0.5], [1.0, 0.0]]))
    tensor([0.6931, 0.0000])
    """
    return torch.special.entr(probabilities).sum(-1)


def counts(**wanted: tuple[int, int]) -> None:
    """Refuses counts below their least: `counts(sequences=(sequences, 1))`.

    Raises:
        ValueError: that names the count, what was given and the least that makes sense.

    >>> counts(length=(1, 2))
    Traceback (most recent call last):
    ValueError: length=1 is too small; give at least 2
    """
    for name, (given, least) in wanted.items():
        if given < least:
            raise ValueError(f"{name}={given} is too small; give at least {least}")


def share(**given: float) -> None:
    """Refuses what is no probability: `share(switch=switch)`.

    Raises:
        ValueError: that names the value and the range.

    >>> share(switch=1.5)
    Traceback (most recent call last):
    ValueError: switch=1.5 is no probability; give a number from 0 to 1
    """
    for name, value in given.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name}={value} is no probability; give a number from 0 to 1")


def positive(**given: float) -> None:
    """Refuses what is not above zero: `positive(concentration=concentration)`.

    Raises:
        ValueError: that names the value.

    >>> positive(noise=0.0)
    Traceback (most recent call last):
    ValueError: noise=0.0 must be above zero
    """
    for name, value in given.items():
        if not value > 0:
            raise ValueError(f"{name}={value} must be above zero")


class Rows:
    """Categorical draws from the rows of a table, one search for all of them.

    The cumulative probabilities of row r are laid out from r to r + 1, one row after the other, so a draw from row r
    is the place of r + u in one sorted list. A column of probability zero is never drawn.

    Args:
        table_RV: non-negative weights, [rows, columns]; each row is normalised.

    >>> rows = Rows(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    >>> rows.draw(torch.tensor([0, 1, 0]), seeded(0))
    tensor([1, 0, 1])
    """

    def __init__(self, table_RV: Tensor) -> None:
        table_RV = table_RV.double()
        self.columns = table_RV.shape[1]
        total_R1 = table_RV.sum(1, keepdim=True)
        if not bool((total_R1 > 0).all()):
            raise ValueError("a row of the table has no weight at all, so nothing can be drawn from it")
        cumulative_RV = (table_RV / total_R1).cumsum(1).clamp_max(1.0)
        # Rounding may leave the last value below one; every column from the last possible one on ends the row.
        ends_RV = table_RV.flip(1).cumsum(1).flip(1) - table_RV <= 0
        cumulative_RV[ends_RV] = 1.0
        self._flat = (cumulative_RV + torch.arange(len(table_RV), dtype=torch.float64)[:, None]).flatten()

    def draw(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """One column for each row number, int64 in the shape of `rows`."""
        uniform = torch.rand(rows.shape, generator=generator, dtype=torch.float64)
        return self.place(rows, uniform)

    def place(self, rows: Tensor, uniform: Tensor) -> Tensor:
        """The columns at which given uniform draws fall, for when the draws are made beforehand."""
        at = torch.searchsorted(self._flat, rows + uniform.clamp_max(_BELOW_ONE), right=True)
        return at - rows * self.columns
