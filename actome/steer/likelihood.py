"""How likely a model finds given responses, and held-out text, under whatever clamps are active.

Letters: N prompts or rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from actome.core.clamp import Clamp
from actome.core.errors import MeasureError
from actome.measures.spans import Texts, spans

from .placing import Placing, active, while_scoring

if TYPE_CHECKING:
    from actome.core.model import Model


class Likelihoods(NamedTuple):
    """Of each response: nll in nats, summed over its tokens, and how many those are; (N) each, float64, on the CPU."""

    nll: Tensor
    tokens: Tensor

    @property
    def mean(self) -> Tensor:
        """Nats a token, (N)."""
        return self.nll / self.tokens


def response_nll(
    model: Model,
    prompts: Texts,
    responses: Texts,
    *,
    clamps: Sequence[Clamp] = (),
    placing: Placing = "all",
    batch_size: int = 16,
    grad: bool = False,
) -> Likelihoods:
    """Negative log-likelihood of each response after its prompt; with `grad` also for a backward pass.

    Args:
        clamps, placing: active beside those that are, at ``"all"`` tokens, those of the ``"prompt"``, its ``"last"``
            one, or those from which the ``"response"`` is predicted.

    Raises:
        MeasureError: not as many responses as prompts, or an empty one.

    >>> import actome as ac
    >>> likely, odd = response_nll(ac.demo(), ["import", "import"], [" os", " ostrich"]).mean
    >>> bool(likely < odd)
    True
    """
    sums, counts = [], []
    for one in spans(prompts, responses, model.tokenizer, batch_size):
        with active(model, while_scoring(model, clamps, placing, one)):
            logits_NV = model.logits(one.batch, grad=grad)[one.before.to(model.device)].float()
        targets_N = one.targets.to(logits_NV.device)
        nll_N = torch.nn.functional.cross_entropy(logits_NV, targets_N, reduction="none").double().cpu()
        sums.append(torch.zeros(len(one.prompt), dtype=torch.float64).index_add_(0, one.row, nll_N))
        counts.append(one.response)
    return Likelihoods(torch.cat(sums), torch.cat(counts))


def text_nll(model: Model, text: Any, *, batch_size: int = 8) -> Likelihoods:
    """Negative log-likelihood of each row of held-out text, first tokens left out.

    Args:
        text: a list of texts, ids (row, pos), or a `Text`.

    Raises:
        MeasureError: no row of two tokens or more.
    """
    from actome.core.stream import batches

    sums, counts = [], []
    for arguments, ids, mask in batches(model, text, batch_size):
        assert ids is not None
        with torch.no_grad():
            logits_BTV = model.module(**arguments).logits[:, :-1].float()
        targets_BT = ids[:, 1:].to(logits_BTV.device)
        real_BT = torch.ones_like(targets_BT, dtype=torch.bool) if mask is None else mask[:, 1:].to(targets_BT.device)
        nll_BT = torch.nn.functional.cross_entropy(logits_BTV.transpose(1, 2), targets_BT, reduction="none")
        sums.append((nll_BT * real_BT).double().sum(1).cpu())
        counts.append(real_BT.sum(1).cpu())
    if not counts or not int(torch.cat(counts).sum()):
        raise MeasureError("the held-out text has no token that follows another; give longer texts")
    return Likelihoods(torch.cat(sums), torch.cat(counts))
