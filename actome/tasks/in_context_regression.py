"""Linear regression in context: examples (x, y) of a hidden linear map, then more of them to predict.

With maps from a Gaussian prior the best predictor is ridge regression; with one of D fixed maps it is the posterior
mean over those D (dMMSE). A model trained on D maps lies somewhere between the two, which tells whether it has stored
its tasks or learned to regress.

Source: Garg et al. 2022, "What Can Transformers Learn In-Context?"; Raventós et al. 2023, "Pretraining task diversity
and the emergence of non-Bayesian in-context learning for regression" (dMMSE and ridge).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from actome.tasks.draw import counts, positive, seeded


class Regression(NamedTuple):
    """Prompts: inputs [B, T, D], targets [B, T], the maps [B, D] and the index [B] of each among the fixed ones.

    The index is -1 where maps come from the Gaussian prior.
    """

    inputs: Tensor
    targets: Tensor
    weights: Tensor
    task: Tensor

    def interleaved(self) -> Tensor:
        """The prompt as a model reads it, [B, 2 T, D + 1]: row 2 i holds (0, x_i), row 2 i + 1 holds (y_i, 0, ..., 0).

        The prediction of y_i is read at row 2 i.
        """
        x = torch.nn.functional.pad(self.inputs, (1, 0))
        y = torch.nn.functional.pad(self.targets[..., None], (0, self.inputs.shape[-1]))
        return torch.stack((x, y), 2).flatten(1, 2)


class Expected(NamedTuple):
    """A predictive distribution of each target from the examples before it: mean and variance, both [B, T]."""

    mean: Tensor
    variance: Tensor


@dataclass(frozen=True)
class InContextRegression:
    """y = w.x + noise with x ~ N(0, I); w from N(0, I), or from D maps drawn from it once. All float64.

    Attributes:
        dim: of the inputs.
        noise: standard deviation of the targets around the map; above zero.
        tasks: number of fixed maps, D; None draws each map from the prior.
        seed: of the fixed maps.

    >>> world = InContextRegression(dim=4, noise=0.5)
    >>> prompts = world.sample(2000, 16, seed=1)
    >>> error = (world.ridge(prompts).mean - prompts.targets).square().mean()
    >>> abs(error.item() / world.floor(prompts) - 1) < 0.1
    True
    """

    dim: int = 8
    noise: float = 0.25
    tasks: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        counts(dim=(self.dim, 1), tasks=(1 if self.tasks is None else self.tasks, 1))
        positive(noise=self.noise)

    def maps(self) -> Tensor:
        """The fixed maps, [tasks, D]."""
        if self.tasks is None:
            raise ValueError("this world draws every map from the prior; give tasks=D for D fixed maps")
        return torch.randn(self.tasks, self.dim, generator=seeded(self.seed), dtype=torch.float64)

    def sample(self, sequences: int, length: int, seed: int) -> Regression:
        """Draws prompts, all at once.

        Args:
            sequences: how many.
            length: examples in each.
            seed: of the draw.
        """
        counts(sequences=(sequences, 1), length=(length, 1))
        generator = seeded(seed)
        if self.tasks is None:
            task_B = torch.full((sequences,), -1)
            weights_BD = torch.randn(sequences, self.dim, generator=generator, dtype=torch.float64)
        else:
            task_B = torch.randint(self.tasks, (sequences,), generator=generator)
            weights_BD = self.maps()[task_B]
        x_BTD = torch.randn(sequences, length, self.dim, generator=generator, dtype=torch.float64)
        noise_BT = torch.randn(sequences, length, generator=generator, dtype=torch.float64)
        return Regression(
            x_BTD, torch.einsum("btd,bd->bt", x_BTD, weights_BD) + self.noise * noise_BT, weights_BD, task_B
        )

    def ridge(self, prompts: Regression) -> Expected:
        """Bayes-optimal prediction under the Gaussian prior: ridge regression with penalty noise^2.

        mean_t = m_t . x_t and variance_t = x_t' S_t x_t + noise^2, where m_t and S_t are the posterior mean and
        covariance of w after the examples before t, updated one example at a time.
        """
        mean_BD = torch.zeros_like(prompts.weights)
        cov_BDD = torch.eye(self.dim, dtype=torch.float64).repeat(len(mean_BD), 1, 1)
        means, variances = [], []
        for x_BD, y_B in zip(prompts.inputs.unbind(1), prompts.targets.unbind(1), strict=True):
            along_BD = (cov_BDD @ x_BD[..., None])[..., 0]
            variance_B = (x_BD * along_BD).sum(1) + self.noise**2
            expected_B = (mean_BD * x_BD).sum(1)
            means.append(expected_B)
            variances.append(variance_B)
            gain_BD = along_BD / variance_B[:, None]
            mean_BD = mean_BD + gain_BD * (y_B - expected_B)[:, None]
            cov_BDD = cov_BDD - gain_BD[:, :, None] * along_BD[:, None, :]
        return Expected(torch.stack(means, 1), torch.stack(variances, 1))

    def posterior(self, prompts: Regression) -> Tensor:
        """P(map d | the examples before t), [B, T, tasks]."""
        fit_BTZ = prompts.inputs @ self.maps().T
        log_BTZ = -(prompts.targets[..., None] - fit_BTZ).square() / (2 * self.noise**2)
        return torch.nn.functional.pad(log_BTZ.cumsum(1)[:, :-1], (0, 0, 1, 0)).softmax(-1)

    def dmmse(self, prompts: Regression) -> Expected:
        """Bayes-optimal prediction when the map is one of the fixed ones: the posterior mean over them."""
        posterior_BTZ, fit_BTZ = self.posterior(prompts), prompts.inputs @ self.maps().T
        mean_BT = (posterior_BTZ * fit_BTZ).sum(-1)
        spread_BT = (posterior_BTZ * (fit_BTZ - mean_BT[..., None]).square()).sum(-1)
        return Expected(mean_BT, spread_BT + self.noise**2)

    def predict(self, prompts: Regression) -> Expected:
        """The Bayes-optimal prediction of this world: `dmmse` with fixed maps, else `ridge`."""
        return self.ridge(prompts) if self.tasks is None else self.dmmse(prompts)

    def floor(self, prompts: Regression) -> float:
        """Least possible mean squared error on these prompts: mean predictive variance of `predict`."""
        return float(self.predict(prompts).variance.mean())
