"""Layers as linear systems: attention with its feature maps, state space models, gated recurrences.

Letters: T position, N state, C channel, K key width, M features of a key.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.errors import MeasureError
from .linear_systems import DSF

Features = Callable[[Tensor], Tensor]
Normaliser = Literal["features", "softmax", "none"]


def attention_to_dsf(
    q_TK: Tensor,
    k_TK: Tensor,
    features: Features | tuple[Features, Features] | None = None,
    *,
    normaliser: Normaliser | Tensor = "features",
    scale: float | None = None,
) -> DSF:
    r"""Causal attention of one head as a linear system, the values being its inputs.

    With feature maps :math:`\psi, \phi` and a normaliser :math:`\eta_i`,

    .. math:: \Lambda_i = \eta_{i-1} / \eta_i, \quad B_i = \phi(k_i) / \eta_i, \quad C_i = \psi(q_i)

    The state is (features x value width), and all value channels share the coefficients. Without the normaliser
    :math:`\Lambda_i` would be 1: what is forgotten in attention is forgotten by normalising.

    Args:
        q_TK, k_TK: (T, key width), as attention sees them (sites ``attn.q`` and ``attn.k``).
        features: what `q` and `k` become, (T, K) -> (T, M): one map or (for q, for k); by default ``elu + 1``. For
            softmax attention `taylor_features` or `random_features` approximate its infinitely many.
        normaliser: ``"features"``: :math:`\eta_i = \psi(q_i) \cdot \sum_{j \le i} \phi(k_j)`; ``"softmax"``: the exact
            :math:`\sum_{j \le i} \exp(q_i \cdot k_j)`; ``"none"``: 1; or any (T) tensor without zeros.
        scale: multiplies q k, half of it on either; 1 / sqrt(K) by default with ``"softmax"``, otherwise 1.

    Raises:
        MeasureError: shapes that do not fit, or a normaliser of 0 somewhere.

    Source: Sieber et al. 2024, Understanding the differences in Foundation Models; linear attention is Katharopoulos et
    al. 2020.

    Example:
        >>> q = k = v = torch.eye(3, dtype=torch.float64)
        >>> system = attention_to_dsf(q, k, lambda x: x + 1)
        >>> bool(torch.allclose(system.mix()[0].sum(-1), torch.ones(3, dtype=torch.float64)))
        True
    """
    if q_TK.shape != k_TK.shape or q_TK.ndim != 2:
        raise MeasureError(f"queries and keys of one head are (T, key width) both, not {q_TK.shape} and {k_TK.shape}")
    soft = isinstance(normaliser, str) and normaliser == "softmax"
    scale = (1 / math.sqrt(q_TK.shape[1]) if soft else 1.0) if scale is None else scale
    q, k = q_TK * math.sqrt(scale), k_TK * math.sqrt(scale)
    of_q, of_k = features if isinstance(features, tuple) else (features or _elu, features or _elu)
    psi_TM, phi_TM = of_q(q), of_k(k)
    if isinstance(normaliser, Tensor):
        eta_T = normaliser
    elif normaliser == "features":
        eta_T = (psi_TM * phi_TM.cumsum(0)).sum(-1)
    elif normaliser == "softmax":
        eta_T = (q @ k.T).exp().tril().sum(-1)
    elif normaliser == "none":
        eta_T = q.new_ones(len(q))
    else:
        choices = "'features', 'softmax', 'none' or a tensor"
        raise MeasureError(f"normaliser={normaliser!r} does not exist; choose {choices}")
    if eta_T.shape != q.shape[:1] or not bool(((eta_T != 0) & eta_T.isfinite()).all()):
        raise MeasureError("the normaliser is one finite number for each position, none of them 0; is q k too large?")
    before_T = torch.cat([eta_T.new_zeros(1), eta_T[:-1]])
    decay = (before_T / eta_T)[:, None, None].expand(-1, phi_TM.shape[1], 1)
    return DSF(decay, (phi_TM / eta_T[:, None])[..., None], psi_TM[..., None])


def taylor_features(order: int) -> Features:
    r"""The map whose products are the Taylor series of :math:`\exp(q \cdot k)` up to an order.

    :math:`\phi(x) = (1, x, x^{\otimes 2} / \sqrt{2!}, \ldots, x^{\otimes p} / \sqrt{p!})`, with 1 + K + ... + K^p
    entries. For |q k| <= 1 the error falls with each order.

    Example:
        >>> x = torch.tensor([[0.5, 0.5]], dtype=torch.float64)
        >>> phi = taylor_features(6)(x)
        >>> abs(float(phi @ phi.T) - math.exp(0.5)) < 1e-5
        True
    """
    if order < 0:
        raise MeasureError(f"order={order}; the Taylor series starts at order 0")

    def features(x: Tensor) -> Tensor:
        power, parts = x.new_ones(len(x), 1), [x.new_ones(len(x), 1)]
        for p in range(1, order + 1):
            power = (power[:, :, None] * x[:, None]).flatten(1) / math.sqrt(p)
            parts.append(power)
        return torch.cat(parts, 1)

    return features


def random_features(width: int, count: int, seed: int = 0) -> Features:
    r"""Positive random features of :math:`\exp(q \cdot k)`, right on average, with an error of order 1 / sqrt(count).

    :math:`\phi(x) = \exp(W x - \|x\|^2 / 2) / \sqrt{M}` with Gaussian rows of W.

    Source: Choromanski et al. 2021, Rethinking Attention with Performers, lemma 1.

    Example:
        >>> phi = random_features(2, 4096)(torch.tensor([[0.3, 0.4]], dtype=torch.float64))
        >>> abs(float(phi @ phi.T) - math.exp(0.25)) < 0.1
        True
    """
    weights_KM = torch.randn(width, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def features(x: Tensor) -> Tensor:
        w = weights_KM.to(x.device, x.dtype)
        return (x @ w - x.square().sum(-1, keepdim=True) / 2).exp() / math.sqrt(count)

    return features


def selective_ssm(delta_TC: Tensor, a_CN: Tensor, b_TN: Tensor, c_TN: Tensor, skip: Tensor | float = 0.0) -> DSF:
    r"""A selective state space model (S6, Mamba): :math:`\Lambda_i = \exp(\Delta_i A)`, :math:`B_i = \Delta_i b_i`.

    What is forgotten and what is written hang together through the step size :math:`\Delta_i`.

    Args:
        delta_TC: step sizes after softplus, (T, channel).
        a_CN: (channel, state), negative.
        b_TN, c_TN: of each position, (T, state).
        skip: (channel).

    Source: Gu and Dao 2023, Mamba, with the simplified discretisation of its code; Sieber et al. 2024,
    Understanding the differences in Foundation Models.

    Example:
        >>> one = torch.ones(2, 1)
        >>> round(float(selective_ssm(one, -one[:1], one, one).mix()[0, 1, 0]), 4)
        0.3679
    """
    decay = (delta_TC[:, None] * a_CN.T).exp()
    return DSF(decay, b_TN[..., None] * delta_TC[:, None], c_TN[..., None], skip)


def gated_rnn(forget_TC: Tensor, write_TC: Tensor, read_TC: Tensor | None = None) -> DSF:
    """A gated recurrence whose gates look at the input only: h = forget * h + write * u, y = read * h.

    qLSTM, RG-LRU and the linear form of a GRU (write = 1 - forget) are of this kind; a GRU or LSTM proper, whose gates
    look at their own state, is not linear even for fixed coefficients.

    Args:
        forget_TC, write_TC, read_TC: gates, (T, channel); `read` is 1 by default.

    Source: Sieber et al. 2024, Understanding the differences in Foundation Models.

    Example:
        >>> gate = torch.tensor([[0.5], [0.25]])
        >>> gated_rnn(gate, 1 - gate)(torch.tensor([[1.0], [0.0]]))[:, 0].tolist()
        [0.5, 0.125]
    """
    read_TC = torch.ones_like(write_TC) if read_TC is None else read_TC
    return DSF(forget_TC[:, None], write_TC[:, None], read_TC[:, None])


def as_dsf(layer: Any, hidden_TD: Tensor) -> tuple[DSF, Tensor]:
    """The linear system in a layer of a model, and the inputs that it takes, for one sequence.

    Known: transformers' Mamba mixer. The system is its selective scan: the inputs are what comes out of its
    convolution, and the outputs are what its gate multiplies. For attention take `attention_to_dsf` with the queries
    and keys that were recorded.

    Args:
        layer: such as ``model.backbone.layers[0].mixer``.
        hidden_TD: what enters it (after the norm), (T, width), without padding.

    Returns:
        The system and its inputs u (T, channel).

    Raises:
        MeasureError: a layer of another kind.
    """
    names = ("in_proj", "conv1d", "x_proj", "dt_proj", "A_log", "D", "time_step_rank", "ssm_state_size")
    missing = [name for name in names if not hasattr(layer, name)]
    # Jamba and Falcon Mamba have the same parts, and norms between them.
    normed = hasattr(layer, "dt_layernorm")
    if missing or normed or hidden_TD.ndim != 2:
        because = f"without {missing[0]}" if missing else "with norms of its coefficients" if normed else ""
        raise MeasureError(
            f"as_dsf takes a Mamba mixer of transformers and (T, width), not {type(layer).__name__} {because} and "
            f"{tuple(hidden_TD.shape)}; for attention use attention_to_dsf, for other recurrences DSF, selective_ssm "
            "or gated_rnn with their coefficients"
        )
    with torch.no_grad():
        u_CT = layer.in_proj(hidden_TD).T.chunk(2)[0]
        u_TC = layer.act(layer.conv1d(u_CT[None])[0, :, : len(hidden_TD)]).T
        sizes = [layer.time_step_rank, layer.ssm_state_size, layer.ssm_state_size]
        step, b_TN, c_TN = layer.x_proj(u_TC).split(sizes, -1)
        delta_TC = F.softplus(layer.dt_proj(step))
        return selective_ssm(delta_TC, -layer.A_log.exp(), b_TN, c_TN, layer.D), u_TC


def _elu(x: Tensor) -> Tensor:
    return F.elu(x) + 1
