"""In-context learning against the best that can be learned from a prompt: regret, and the distance to Bayes.

Letters: Z latent, B prompt, T example, C answer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.errors import MeasureError
from ..core.real import double


def icl_regret(log_probs_BT: Tensor, comparator_ZBT: Tensor) -> Tensor:
    r"""How much more a predictor pays per example than the best single hypothesis chosen in hindsight.

    For each horizon T of a prompt,

    .. math:: \frac1T \sum_{t \le T} -\log \hat p(y_t \mid S_{t-1}, x_t)
              - \min_z \frac1T \sum_{t \le T} -\log p(y_t \mid x_t, z)

    in nats, over the same examples; both of the answer given its question, never of the question. Bayesian model
    averaging with a uniform prior over Z hypotheses pays at most log(Z) / T.

    Args:
        log_probs_BT: log probability that was given to each answer, (B, T).
        comparator_ZBT: the same for each hypothesis, (Z, B, T).

    Returns:
        (B, T): the regret at each horizon 1 to T. It may be below 0 for a predictor that none of the hypotheses is.

    Raises:
        MeasureError: shapes that do not fit, or log probabilities above 0.

    Source: Zhang et al. 2023, What and How does In-Context Learning Learn? Bayesian Model Averaging,
    Parameterization, and Generalization, section 4 (corollary 4.2).

    Example:
        >>> icl_regret(torch.tensor([[-2.0, -1.0]]), torch.tensor([[[-1.0, -1.0]], [[-3.0, 0.0]]]))
        tensor([[1.0000, 0.5000]], dtype=torch.float64)
    """
    if log_probs_BT.ndim != 2 or comparator_ZBT.shape[1:] != log_probs_BT.shape:
        raise MeasureError(
            f"log probabilities are (B, T) and those of hypotheses (Z, B, T), "
            f"not {tuple(log_probs_BT.shape)} and {tuple(comparator_ZBT.shape)}"
        )
    if bool((log_probs_BT > 1e-6).any() | (comparator_ZBT > 1e-6).any()):
        raise MeasureError("there are log probabilities above 0: give log_softmax of logits, not logits")
    horizon = torch.arange(1, log_probs_BT.shape[1] + 1, device=log_probs_BT.device)
    paid, best = -double(log_probs_BT).cumsum(-1), -double(comparator_ZBT).cumsum(-1)
    return (paid - best.amin(0)) / horizon


def regret_slope(regret_BT: Tensor, first: int = 2) -> float:
    """The slope of log mean regret over log horizon, from horizon `first` on: -1 for regret that falls like 1 / T.

    Raises:
        MeasureError: fewer than three horizons, or a mean regret that is not above 0.

    Example:
        >>> round(regret_slope(1 / torch.arange(1.0, 9.0)[None]), 6)
        -1.0
    """
    mean = double(regret_BT).mean(0)[first - 1 :]
    if len(mean) < 3 or not bool((mean > 0).all()):
        raise MeasureError("a slope needs three horizons or more with a mean regret above 0")
    x = torch.arange(first, first + len(mean), dtype=torch.float64, device=mean.device).log()
    x = x - x.mean()
    return float((x * mean.log()).sum() / x.square().sum())


def bma(log_likelihood_ZBT: Tensor, predictive_ZBTC: Tensor, log_prior_Z: Tensor | None = None) -> Tensor:
    r"""The exact Bayesian average over hypotheses, :math:`\sum_z p(y \mid x, z)\, p(z \mid S_{t-1})`.

    Args:
        log_likelihood_ZBT: of each answer given its question under each hypothesis, (Z, B, T).
        predictive_ZBTC: what each hypothesis gives to each possible answer, (Z, B, T, C), or broadcast to it.
        log_prior_Z: uniform by default.

    Returns:
        (B, T, C) log probabilities; example t knows the answers before t only.

    Example:
        >>> coins = torch.tensor([0.2, 0.8])
        >>> heads = coins.log()[:, None, None].expand(2, 1, 3)  # three heads in a row
        >>> p = bma(heads, torch.stack([1 - coins, coins], -1)[:, None, None].expand(2, 1, 3, 2))
        >>> [round(float(one), 3) for one in p[0, :, 1].exp()]
        [0.5, 0.68, 0.765]
    """
    log_likelihood = double(log_likelihood_ZBT)
    Z = len(log_likelihood)
    prior = log_likelihood.new_zeros(Z) if log_prior_Z is None else double(log_prior_Z)
    known = log_likelihood.cumsum(-1) - log_likelihood + prior[:, None, None]
    return (known.log_softmax(0)[..., None] + double(predictive_ZBTC).log()).logsumexp(0)


def bma_gap(log_model_BTC: Tensor, log_reference_BTC: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    r"""How far a model's in-context predictions are from a reference's, example by example.

    The mean over prompts of :math:`\mathrm{KL}(\text{model} \,\|\, \text{reference})` in nats, for each number of
    examples seen. The reference is Bayesian model averaging (`bma`) where the claim is that the model does it.

    Args:
        log_model_BTC, log_reference_BTC: log probabilities of each possible answer, (B, T, C).
        mask_BT: examples that count.

    Returns:
        (T); NaN where no example counts, infinite where the model gives weight to what the reference rules out.

    Raises:
        MeasureError: shapes that do not fit, or rows that are no log probabilities.

    Source: as `icl_regret`.

    Example:
        >>> even, sure = torch.tensor([[[0.5, 0.5]]]).log(), torch.tensor([[[0.9, 0.1]]]).log()
        >>> round(float(bma_gap(even, sure)), 4), float(bma_gap(sure, sure))
        (0.5108, 0.0)
    """
    if log_model_BTC.shape != log_reference_BTC.shape or log_model_BTC.ndim != 3:
        raise MeasureError(f"both are (B, T, C), not {tuple(log_model_BTC.shape)} and {tuple(log_reference_BTC.shape)}")
    model, reference = double(log_model_BTC), double(log_reference_BTC)
    keep_BT = torch.ones(model.shape[:2], dtype=torch.bool, device=model.device) if mask_BT is None else mask_BT
    for name, one in (("model", model), ("reference", reference)):
        off = (one.logsumexp(-1).abs() > 1e-3) & keep_BT
        if bool(off.any()):
            raise MeasureError(f"the {name}'s rows are no log probabilities; give log_softmax over the answers")
    p = model.exp()
    kl_BT = torch.where(p > 0, p * (model - reference), 0.0).sum(-1).clamp_min(0)
    return kl_BT.where(keep_BT, 0.0).sum(0) / keep_BT.sum(0)


def ridge_prediction(k_TD: Tensor, v_TC: Tensor, q_QD: Tensor, noise: float) -> Tensor:
    r"""The Bayesian average over linear-Gaussian hypotheses, :math:`q K^\top (K K^\top + \lambda I)^{-1} V`.

    What attention would have to give to do Bayesian model averaging for linear tasks: the posterior mean of
    :math:`v = W k + \epsilon` with :math:`W \sim \mathcal N(0, I)` and noise of variance :math:`\lambda`.

    Returns:
        (Q, C) predictions for queries (Q, D) from keys (T, D) and values (T, C).

    Source: as `icl_regret`, section 4.1 (attention as kernel ridge regression).

    Example:
        >>> k = torch.eye(2, dtype=torch.float64)
        >>> ridge_prediction(k, 2 * k, k[:1], noise=1.0)
        tensor([[1., 0.]], dtype=torch.float64)
    """
    if noise <= 0:
        raise MeasureError(f"noise={noise}; the variance of the noise is above 0")
    k, v, q = double(k_TD), double(v_TC), double(q_QD)
    gram = k @ k.T + noise * torch.eye(len(k), dtype=k.dtype, device=k.device)
    return q @ k.T @ torch.linalg.solve(gram, v)
