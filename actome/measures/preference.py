"""Geometry of preference pairs: which of them will push the preferred answer down when a model is trained on them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..core.errors import MeasureError
from .spans import Texts, spans

if TYPE_CHECKING:
    from ..core.model import Model


def ches(
    model: Model,
    prompts: Texts,
    preferred: Texts,
    dispreferred: Texts,
    normalise: bool = True,
    *,
    site: str = "final_norm",
    batch_size: int = 8,
) -> Tensor:
    r"""Centred hidden embedding similarity of preference pairs: high where preferred and dispreferred look alike.

    For a prompt x with the preferred response :math:`y^+` and the dispreferred :math:`y^-`, and h the state that the
    unembedding reads after a prefix,

    .. math:: S^\pm = \sum_{k=1}^{|y^\pm|} h_{x, y^\pm_{<k}}, \qquad
        \mathrm{CHES} = \langle S^+, S^- \rangle - \lVert S^+ \rVert^2

    and with `normalise` means in place of the sums, so that lengths do not decide. The sums run over the states that
    *predict* a response: from that of the prompt's last token to that of the response's last but one. So two
    responses of one token each have the score 0 whatever they are: give responses with their end token.

    Training on pairs with a high score by direct preference optimisation tends to lower the likelihood of preferred
    responses as well; the paper keeps the pairs with the lowest scores.

    Args:
        model: predicts the next token; its `site` is what the unembedding reads.
        prompts, preferred, dispreferred: texts or token ids, as many of each. Strings need the model's tokenizer.
        batch_size: rows a forward.

    Returns:
        (pair), float64, on the CPU; compare scores of one model only.

    Raises:
        MeasureError: not as many of each, or an empty prompt or response.
        SiteError: a model without the site.

    Source: Razin et al. 2025, Unintentional Unalignment: Likelihood Displacement in Direct Preference Optimization
    (definition 2; by means, definition 3).

    >>> import actome as ac
    >>> score = ches(ac.demo(), ["The value of"], [" the sum is"], [" a list of"])
    >>> score.shape, float(ches(ac.demo(), ["The value"], [" of"], [" is"]))
    (torch.Size([1]), 0.0)
    """
    if len(preferred) != len(dispreferred):
        raise MeasureError(f"there are {len(preferred)} preferred and {len(dispreferred)} dispreferred responses")
    good_ND, bad_ND = (
        response_states(model, prompts, responses, normalise, site=site, batch_size=batch_size)
        for responses in (preferred, dispreferred)
    )
    return (good_ND * (bad_ND - good_ND)).sum(-1)


def response_states(
    model: Model,
    prompts: Texts,
    responses: Texts,
    mean: bool = True,
    *,
    site: str = "final_norm",
    batch_size: int = 8,
) -> Tensor:
    """Mean, or sum, of the states from which each response is predicted, (response, d_model), float64, on the CPU.

    >>> import actome as ac
    >>> model = ac.demo()
    >>> response_states(model, ["The value"], [" of x"]).shape == (1, model.d_model)
    True
    """
    parts = []
    for span in spans(prompts, responses, model.tokenizer, batch_size):
        with torch.no_grad():
            states = model.record(span.batch, site)[site]
        if tuple(states.shape[:2]) != tuple(span.batch.ids.shape):
            raise MeasureError(f"{site} has the shape {tuple(states.shape)}, not one state for each token")
        picked = states[span.before.to(states.device)].double().cpu()
        sums = torch.zeros(len(span.prompt), picked.shape[-1], dtype=torch.float64).index_add_(0, span.row, picked)
        parts.append(sums / span.response[:, None] if mean else sums)
    return torch.cat(parts)
