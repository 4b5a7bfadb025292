"""Prompts from one of several hidden distributions, with the exact Bayesian average over them.

A latent z is drawn once per prompt; every symbol y then comes from p(y | x, z). The best predictor averages over z with
its posterior (Bayesian model averaging), and its regret against the best single z is at most log(latents) / T. So one
can ask of a trained model not only whether it predicts well but whether it is that predictor.

Source: Zhang et al. 2023, "What and How does In-Context Learning Learn? Bayesian Model Averaging, Parameterization,
and Generalization", section 4 (model averaging and its regret).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from actome.tasks.draw import Rows, counts, dirichlet, positive, seeded
from actome.tasks.in_context_regression import InContextRegression


class Prompts(NamedTuple):
    """Symbols [B, T], inputs [B, T] (all zero in a world of one input) and the latent [B] of each prompt."""

    symbols: Tensor
    inputs: Tensor
    latent: Tensor


@dataclass(frozen=True)
class DiscreteLatents:
    """Categorical distributions over a few symbols, one per latent and input.

    Attributes:
        latents: number of latents, all equally probable.
        vocab: number of symbols.
        inputs: number of inputs x, drawn uniformly; 1 leaves them out.
        concentration: of the Dirichlet distribution of the tables.
        seed: of the tables.

    >>> import math
    >>> world = DiscreteLatents()
    >>> prompts = world.sample(500, 64, seed=1)
    >>> best = world.log_likelihood(prompts).sum(1).amax(1)
    >>> regret = best - world.surprise(world.predict(prompts), prompts).neg().sum(1)
    >>> 0 < regret.max().item() <= math.log(8) + 1e-9
    True
    """

    latents: int = 8
    vocab: int = 4
    inputs: int = 1
    concentration: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        counts(latents=(self.latents, 1), vocab=(self.vocab, 2), inputs=(self.inputs, 1))
        positive(concentration=self.concentration)

    def tables(self) -> Tensor:
        """p(y | x, z), [latents, inputs, V], float64."""
        return dirichlet((self.latents, self.inputs, self.vocab), self.concentration, seeded(self.seed))

    def sample(self, sequences: int, length: int, seed: int, *, latent: int | None = None) -> Prompts:
        """Draws prompts, all symbols at once.

        Args:
            sequences: how many.
            length: symbols in each.
            seed: of the draw.
            latent: the one latent of all prompts; None draws one for each.
        """
        counts(sequences=(sequences, 1), length=(length, 1))
        if latent is not None and not 0 <= latent < self.latents:
            raise ValueError(f"latent={latent} does not exist; there are 0 to {self.latents - 1}")
        generator = seeded(seed)
        latent_B = torch.randint(self.latents, (sequences,), generator=generator)
        if latent is not None:
            latent_B = torch.full_like(latent_B, latent)
        x_BT = torch.randint(self.inputs, (sequences, length), generator=generator)
        rows = Rows(self.tables().flatten(0, 1))
        return Prompts(rows.draw(latent_B[:, None] * self.inputs + x_BT, generator), x_BT, latent_B)

    def tokens(self, prompts: Prompts) -> Tensor:
        """What a model reads: a begin token (V), then symbols, each after its input where there are several.

        With one input [B, 1 + T]; else [B, 1 + 2 T] with inputs numbered from V + 1 on.
        """
        body = prompts.symbols
        if self.inputs > 1:
            body = torch.stack((self.vocab + 1 + prompts.inputs, prompts.symbols), 2).flatten(1)
        return torch.nn.functional.pad(body, (1, 0), value=self.vocab)

    def log_likelihood(self, prompts: Prompts) -> Tensor:
        """log p(y_t | x_t, z) for every latent, [B, T, latents]; conditional on the inputs, not joint with them."""
        log_XVZ = self.tables().log().permute(1, 2, 0)
        return log_XVZ[prompts.inputs, prompts.symbols]

    def posterior(self, prompts: Prompts) -> Tensor:
        """P(z | the t pairs before position t), [B, T + 1, latents]; the last is after the whole prompt."""
        return torch.nn.functional.pad(self.log_likelihood(prompts).cumsum(1), (0, 0, 1, 0)).softmax(-1)

    def predict(self, prompts: Prompts) -> Tensor:
        """Bayesian model averaging: sum_z p(y | x_t, z) P(z | pairs before t), [B, T, V]."""
        table_XZV = self.tables().transpose(0, 1)
        return torch.einsum("btz,btzv->btv", self.posterior(prompts)[:, :-1], table_XZV[prompts.inputs])

    def plug_in(self, prompts: Prompts) -> Tensor:
        """The prediction of the single most probable latent so far, [B, T, V]; without pairs that is latent 0."""
        best_BT = self.posterior(prompts)[:, :-1].argmax(-1)
        return self.tables()[best_BT, prompts.inputs]

    @staticmethod
    def surprise(predicted: Tensor, prompts: Prompts) -> Tensor:
        """-log p of the symbols under predictions [B, T, V], [B, T], nats."""
        return -predicted.gather(-1, prompts.symbols[..., None])[..., 0].log()

    def floor(self, prompts: Prompts) -> float:
        """Least possible mean loss per symbol on these prompts, in nats: mean entropy of `predict`."""
        return float(torch.special.entr(self.predict(prompts)).sum(-1).mean())


def latent_prompts(
    family: Literal["discrete", "linear"] = "discrete", **parameters: float
) -> DiscreteLatents | InContextRegression:
    """The world of a family of latents: categorical ones, or linear maps with a Gaussian prior.

    For "linear", `predict` is Bayesian model averaging too: the posterior mean is ridge regression, the same numbers as
    kernel regression on the keys, y' (K K' + noise^2 I)^-1 K x.

    >>> latent_prompts("discrete", latents=3).latents, latent_prompts("linear", dim=2).dim
    (3, 2)
    """
    families = {"discrete": DiscreteLatents, "linear": InContextRegression}
    if family not in families:
        raise ValueError(f"family={family!r} does not exist; choose 'discrete' or 'linear'")
    return families[family](**parameters)
