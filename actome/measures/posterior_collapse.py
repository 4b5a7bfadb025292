"""Posterior collapse: the latent units of a VAE that say nothing of its input, counted and forecast."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..core.errors import MeasureError
from ..core.fold import Fold, Reduction
from ..core.real import double
from .rows import finite_rows


class PosteriorCollapse(Fold):
    r"""How many latent units of a VAE have collapsed to the prior.

    With :math:`\mathrm{KL}_i(x) = \frac12 (\mu_i^2 + \sigma_i^2 - \ln \sigma_i^2 - 1)` of the posterior
    :math:`N(\mu_i, \sigma_i^2)` from the prior N(0, 1), in nats, unit i is (eps, delta)-collapsed when
    :math:`P_x[\mathrm{KL}_i(x) < \epsilon] \ge 1 - \delta`. A threshold on the mean KL alone would call a unit
    dead that speaks of one input in a hundred.

    - ``collapsed``: share of units that are (eps, delta)-collapsed, (eps)
    - ``below``: for each eps and unit, share of inputs with a KL below it, (eps, unit)
    - ``kl``: mean KL of each unit, (unit)
    - ``mean_variance``: variance over inputs of :math:`\mu_i`, (unit)
    - ``active``: how many units have one above `active`, ()

    Args:
        eps: one threshold or several, in nats, for the curve.
        delta: share of inputs that may exceed it.
        active: the threshold of Burda et al. on the variance of the mean.

    Shapes: update takes mu and logvar, (rows, units) each; rows with anything non-finite are left out.

    Source: Dang et al. 2024, Beyond Vanilla Variational Autoencoders (definition of (eps, delta)-collapse, after Lucas
    et al. 2019); active units Burda et al. 2016.

    Example:
        >>> collapse = PosteriorCollapse(eps=0.01)
        >>> collapse.update(torch.tensor([[0.0, 1.0], [0.0, -1.0]]), torch.tensor([[0.0, -2.0], [0.0, -2.0]]))
        >>> collapse.compute()["collapsed"].tolist(), int(collapse.compute()["active"])
        ([0.5], 1)
    """

    reductions: ClassVar[dict[str, Reduction]] = {
        "rows": "sum",
        "few": "sum",
        "kl_sum": "sum",
        "mu": "sum",
        "mu_square": "sum",
    }

    def __init__(
        self, eps: float | Sequence[float] = 0.01, delta: float = 0.05, active: float = 0.01, **options: object
    ):
        super().__init__(**options)
        self.eps = torch.tensor([eps] if isinstance(eps, int | float) else list(eps), dtype=torch.float64)
        if not len(self.eps) or bool((self.eps <= 0).any()) or not 0 <= delta < 1:
            raise MeasureError(f"eps={eps} and delta={delta}: thresholds above 0, and a share below 1")
        self.delta, self.active = delta, active

    def statistics(self, mu_NU: Tensor, logvar_NU: Tensor) -> dict[str, Tensor]:
        """rows: (); few: (eps, unit), inputs below; kl_sum, mu, mu_square: (unit)."""
        if mu_NU.shape != logvar_NU.shape:
            raise MeasureError(f"mu {tuple(mu_NU.shape)} and logvar {tuple(logvar_NU.shape)} have different shapes")
        both, units = torch.cat([mu_NU, logvar_NU], -1), mu_NU.shape[-1]
        (both,) = finite_rows("PosteriorCollapse", both)
        mu, logvar = double(both[:, :units]), double(both[:, units:])
        kl = 0.5 * (mu**2 + torch.expm1(logvar) - logvar)
        few = torch.stack([(kl < eps).sum(0) for eps in self.eps.tolist()])
        return {
            "rows": torch.tensor(len(mu), device=mu.device),
            "few": few,
            "kl_sum": kl.sum(0),
            "mu": mu.sum(0),
            "mu_square": mu.square().sum(0),
        }

    def values(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See the class."""
        n = double(stats["rows"])
        below = stats["few"] / n
        mean = stats["mu"] / n
        variance = (stats["mu_square"] / n - mean**2).clamp_min(0)
        return {
            "collapsed": double(below >= 1 - self.delta).mean(-1).where(n > 0, torch.nan),
            "below": below,
            "kl": stats["kl_sum"] / n,
            "mean_variance": variance,
            "active": (variance > self.active).sum(),
        }


@dataclass(frozen=True)
class Forecast:
    """What the latent units of a linear VAE will be after training.

    Attributes:
        theta2: (unit), eigenvalues of the covariance that the latents have to explain, largest first.
        omega2: (unit), squared singular values of the decoder.
        variance: (unit), of the posterior.
        kl: (unit), in nats, of the posterior means and variances averaged over inputs.
    """

    theta2: Tensor
    omega2: Tensor
    variance: Tensor
    kl: Tensor

    def collapsed(self, eps: float = 0.0) -> int:
        """How many units have a KL of at most so many nats; 0 for those that die altogether."""
        return int((self.kl <= eps).sum())


def linear_vae_forecast(
    data: Tensor, cond: Tensor | None = None, *, beta: float = 1.0, eta: float = 1.0, latents: int | None = None
) -> Forecast:
    r"""Says before training which latent units of a linear (conditional) VAE will die.

    For the loss :math:`\lVert y - \hat y \rVert^2 / (2 \eta^2) + \beta\,\mathrm{KL}` the condition explains what a
    regression on it explains; what is left, :math:`R = S_{yy} - S_{yx} S_{xx}^{-1} S_{xy}` with eigenvalues
    :math:`\theta_i^2` (without a condition :math:`R = S_{yy}`), is the latents' share. At the optimum
    :math:`\omega_i^2 = \max(0, \theta_i^2 - \beta\eta^2)`, :math:`\sigma_i^2 = \beta\eta^2 / \theta_i^2`,
    :math:`\mathrm{KL}_i = \frac12 \ln \frac{\theta_i^2}{\beta\eta^2}`: a unit dies when
    :math:`\theta_i^2 \le \beta \eta^2`. So a condition that tells much of the target makes units die. For nonlinear
    models it is a guide and no theorem.

    Args:
        data: (rows, units), what is to be reconstructed; cond: (rows, units), what encoder and decoder are given.
        beta, eta: of the loss above. For ||.||^2 without 1/2 eta^2 give eta = sqrt(1/2).
        latents: how many units the model has, all by default; the surplus beyond the units of the data dies.

    Source: Dang et al. 2024, Beyond Vanilla Variational Autoencoders; Lucas et al. 2019, Don't Blame the ELBO!, for the
    plain linear VAE.

    >>> x = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 0.1], [0.0, -0.1]])
    >>> linear_vae_forecast(x).collapsed()
    1
    """
    y = _centred("data", data)
    if cond is None:
        return forecast_from_covariance(y.T @ y / len(y), beta=beta, eta=eta, latents=latents)
    x = _centred("cond", cond)
    if len(x) != len(y):
        raise MeasureError(f"{len(y)} rows of data and {len(x)} of the condition")
    n = len(y)
    left = residual_covariance(y.T @ y / n, y.T @ x / n, x.T @ x / n)
    return forecast_from_covariance(left, beta=beta, eta=eta, latents=latents)


def residual_covariance(s_yy: Tensor, s_yx: Tensor, s_xx: Tensor) -> Tensor:
    """What a linear regression on x leaves of the covariance of y; directions that x does not have are cut.

    >>> residual_covariance(torch.tensor([[1.0]]), torch.tensor([[0.8]]), torch.tensor([[1.0]])).round(decimals=4)
    tensor([[0.3600]], dtype=torch.float64)
    """
    s_yy, s_yx, s_xx = s_yy.double(), s_yx.double(), s_xx.double()
    return s_yy - s_yx @ torch.linalg.pinv(s_xx, rtol=1e-10, hermitian=True) @ s_yx.T


def forecast_from_covariance(
    covariance: Tensor, *, beta: float = 1.0, eta: float = 1.0, latents: int | None = None
) -> Forecast:
    """The same as `linear_vae_forecast` from the covariance (unit, unit) that is left to the latents.

    >>> forecast_from_covariance(torch.eye(2) * torch.tensor([4.0, 0.5])).omega2.tolist()
    [3.0, 0.0]
    """
    if beta <= 0 or eta <= 0:
        raise MeasureError(f"beta={beta} and eta={eta}: both are above 0")
    theta2 = torch.linalg.eigvalsh(covariance.double()).flip(0).clamp_min(0)
    size = latents or len(theta2)
    theta2 = torch.cat([theta2[:size], theta2.new_zeros(max(0, size - len(theta2)))])
    noise = beta * eta**2
    variance = torch.where(theta2 > noise, noise / theta2, 1.0)
    return Forecast(theta2, (theta2 - noise).clamp_min(0), variance, -0.5 * variance.log())


def _centred(name: str, x: Tensor) -> Tensor:
    (x,) = finite_rows("linear_vae_forecast", x)
    if len(x) < 2:
        raise MeasureError(f"{name} has {len(x)} finite rows; a covariance needs two at least")
    return x.double() - x.double().mean(0)
