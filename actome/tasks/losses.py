"""What a batch costs: next tokens, targets, or real numbers.

Dims: N sequences, T position.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actome.core.errors import ActomeError

IGNORE = -100  # a target that is not counted


class TrainingError(ActomeError, RuntimeError):
    """A training that cannot go on: a loss that is not finite, or batches that do not fit."""


def logits_of(out: Any) -> Tensor:
    """The logits of whatever a module returned: the tensor itself, or its field ``logits``."""
    return out if isinstance(out, Tensor) else out.logits


def next_token_loss(module: nn.Module, tokens_NT: Tensor, mask_NT: Tensor | None = None) -> Tensor:
    """Mean next-token cross-entropy, in nats; NaN when no target counts.

    Args:
        module: gives logits (batch, pos, vocab), or an object with a field ``logits``, for tokens (batch, pos).
        tokens_NT: (batch, pos).
        mask_NT: (batch, pos) bool: which tokens count as targets; the first one never does.

    >>> from torch.nn.functional import one_hot
    >>> sure = torch.nn.Embedding.from_pretrained(100 * one_hot(torch.tensor([1, 2, 0]), 3).float())  # counts upwards
    >>> float(next_token_loss(sure, torch.tensor([[0, 1, 2, 0, 1]])))
    0.0
    """
    targets_NT = tokens_NT[:, 1:]
    if mask_NT is not None:
        targets_NT = targets_NT.masked_fill(~mask_NT[:, 1:], IGNORE)
    return target_loss(module, tokens_NT[:, :-1], targets_NT)


def target_loss(module: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy, in nats, against integer targets (-100 is left out); mean squared error against real ones.

    Args:
        inputs: whatever the module takes as its first argument; real (batch, pos, d_in) for a subject with `d_in`.
        targets: integers in the shape of the logits without their last dim, or reals in the shape of the output (or of
            all but a last dim of one).

    Raises:
        TrainingError: targets of another shape.
    """
    name = getattr(module, "main_input_name", None) if inputs.is_floating_point() else None
    out = logits_of(module(**{name: inputs}) if name else module(inputs))
    if targets.is_floating_point():
        out = out.squeeze(-1) if out.ndim == targets.ndim + 1 and out.shape[-1] == 1 else out
        if out.shape != targets.shape:
            raise TrainingError(f"real targets {tuple(targets.shape)} do not fit an output of {tuple(out.shape)}")
        return F.mse_loss(out, targets)
    if out.shape[:-1] != targets.shape:
        raise TrainingError(
            f"targets {tuple(targets.shape)} do not fit logits {tuple(out.shape)}; they want {tuple(out.shape[:-1])}"
        )
    return F.cross_entropy(out.flatten(0, -2), targets.flatten(), ignore_index=IGNORE)


def z_loss(module: nn.Module, tokens_NT: Tensor, mask_NT: Tensor | None = None, *, weight: float = 1e-4) -> Tensor:
    """`next_token_loss` plus weight times the mean of (log Z)^2, which holds output logits near log-probabilities.

    Z is the sum of the exponentials of a position's logits, over the positions whose next token counts.

    Args:
        module, tokens_NT, mask_NT: as for `next_token_loss`.
        weight: 1e-4 in the paper.

    Source: Chowdhery et al. 2022, PaLM; Wortsman et al. 2024, Small-scale proxies for large-scale Transformer training
    instabilities, section 3.1.2.

    >>> flat = torch.nn.Embedding.from_pretrained(torch.zeros(4, 4))                 # log Z = ln 4 everywhere
    >>> tokens = torch.tensor([[0, 1, 2]])
    >>> round(float(z_loss(flat, tokens, weight=1.0) - next_token_loss(flat, tokens)), 4)       # (ln 4)^2
    1.9218
    """
    logits_NTV = logits_of(module(tokens_NT[:, :-1]))
    targets_NT = tokens_NT[:, 1:] if mask_NT is None else tokens_NT[:, 1:].masked_fill(~mask_NT[:, 1:], IGNORE)
    log_z_NT = logits_NTV.float().logsumexp(-1)
    counts_NT = targets_NT != IGNORE
    square = (log_z_NT.square() * counts_NT).sum() / counts_NT.sum()
    return F.cross_entropy(logits_NTV.flatten(0, -2), targets_NT.flatten(), ignore_index=IGNORE) + weight * square


def default_loss(module: nn.Module, *batch: Tensor) -> Tensor:
    """The loss that a batch calls for: tokens; tokens with a bool mask of what counts; or inputs with targets."""
    if len(batch) == 1 or batch[1].dtype == torch.bool:
        return next_token_loss(module, *batch)
    return target_loss(module, *batch)
