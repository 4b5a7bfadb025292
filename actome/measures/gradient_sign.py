"""Whether the loss would have active units be smaller: the pull towards sparse activations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.errors import MeasureError
from ..core.fold import Fold, Reduction
from ..core.real import double, ratio, wide
from ..core.stream import batches, canonical, fitting

if TYPE_CHECKING:
    import pandas as pd

    from ..core.model import Model


class GradientSign(Fold):
    r"""Sign of an activation times the loss's gradient with respect to it.

    For the loss L of a row of the batch, summed over its targets, and over its real tokens t and units i,
    :math:`g = \sum_{ti} a_{ti} \, \partial L / \partial a_{ti}`. If g is positive, a small step down the gradient makes
    the activations smaller: what drives ReLU networks to sparsity from their initial weights on.

    - ``pull``: mean of g over rows, for each token
    - ``pull_error``: its standard error over rows, NaN for one row. The sign is settled where ``pull`` is some
      errors from 0
    - ``positive_rows``: share of rows with g > 0
    - ``positive_units``: share of the units with a nonzero total whose total is positive

    Shapes: `update` takes activations and gradients (batch, pos, unit) and a mask (batch, pos) or None.

    Source: Li et al. 2023, The Lazy Neuron Phenomenon (positive in expectation at random weights, for cross-entropy and
    squared error).

    Example:
        >>> sign = GradientSign()
        >>> sign.update(torch.tensor([[[1.0, 0.0]], [[2.0, 1.0]]]), torch.tensor([[[0.5, 9.0]], [[0.5, -0.2]]]))
        >>> {name: round(float(value), 2) for name, value in sign.compute().items()}
        {'pull': 0.65, 'pull_error': 0.15, 'positive_rows': 1.0, 'positive_units': 0.5}
    """

    reductions: ClassVar[dict[str, Reduction]] = {
        "rows": "sum",
        "tokens": "sum",
        "pull": "sum",
        "square": "sum",
        "tokens_square": "sum",
        "cross": "sum",
        "positive": "sum",
        "units": "sum",
    }

    def statistics(self, activation: Tensor, gradient: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """rows, tokens, positive: counts; pull, square, cross: sums over rows; units: (unit), totals."""
        if activation.shape != gradient.shape or activation.ndim != 3:
            raise MeasureError(
                f"activations and gradients are (batch, pos, unit) alike, not {tuple(activation.shape)} and "
                f"{tuple(gradient.shape)}"
            )
        product_BTU = double(wide(activation.detach()) * wide(gradient))
        count_B = torch.full((len(activation),), activation.shape[1], device=activation.device)
        if mask is not None:
            product_BTU = product_BTU.masked_fill(~mask[..., None], 0.0)
            count_B = mask.sum(-1)
        pull_B = product_BTU.sum((1, 2))
        good_B = pull_B.isfinite() & (count_B > 0)
        pull_B, count_B = pull_B.where(good_B, 0.0), count_B.where(good_B, 0)
        return {
            "rows": good_B.sum(),
            "tokens": count_B.sum(),
            "pull": pull_B.sum(),
            "square": pull_B.square().sum(),
            "tokens_square": count_B.square().sum(),
            "cross": (pull_B * count_B).sum(),
            "positive": (pull_B > 0).sum(),
            "units": product_BTU.sum(1)[good_B].sum(0),
        }

    def values(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See the class."""
        rows, units = double(stats["rows"]), stats["units"]
        pull = ratio(stats["pull"], stats["tokens"])
        # Standard error of a ratio of sums over rows of unequal length.
        left = stats["square"] - 2 * pull * stats["cross"] + pull**2 * stats["tokens_square"]
        error = (left.clamp_min(0) * rows / (rows - 1)).sqrt() / stats["tokens"]
        return {
            "pull": pull,
            "pull_error": error.where(rows > 1, torch.nan),
            "positive_rows": ratio(stats["positive"], rows),
            "positive_units": ratio((units > 0).sum(-1), (units != 0).sum(-1)),
        }


def gradient_sign(
    model: Model,
    inputs: Any,
    sites: str | Sequence[str] = "blocks.*.mlp.act",
    *,
    loss: Callable[[Any, Tensor | None, Tensor | None], Tensor] | None = None,
    batch_size: int = 8,
) -> pd.DataFrame:
    """`GradientSign` at sites of a model, by one forward and one backward for each batch.

    Nothing of the model changes: no parameter gets a gradient, and frozen parameters do not stand in the way.

    Args:
        inputs: as in `Model.measure`.
        sites: names or patterns; sites that a clamp could change.
        loss: ``loss(output, tokens, mask)`` gives a scalar that is a sum over the rows of the batch. By default the
            next-token cross-entropy in nats, summed over real targets.
        batch_size: rows a batch, for inputs that are not yet batched.

    Returns:
        One row for each site: site, layer, and the values of `GradientSign` as columns.

    Raises:
        MeasureError: a loss that is no scalar, or that does not depend on a site.

    Example:
        >>> import actome as ac
        >>> gradient_sign(ac.demo(0), "The value of the expression is")["pull"].shape
        (4,)
    """
    import pandas as pd

    loss = loss or _next_token_loss
    wanted = model.match(sites)
    folds = {site.name: GradientSign() for site in wanted}
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def tap(site: Any) -> Callable[[Tensor], Tensor]:
        def follow(x: Tensor) -> Tensor:
            # Adding zeros that want a gradient gives the gradient here, also where no parameter wants one.
            zeros = torch.zeros_like(x, requires_grad=True)
            seen[site.name] = (x.detach().clone(), zeros)
            return x + zeros

        return follow

    taps = [(site.address, tap(site), "write") for site in wanted]
    for arguments, ids, mask in batches(model, inputs, batch_size):
        with model.tap(taps), torch.enable_grad():
            total = loss(model.module(**arguments), ids, mask)
            if total.ndim:
                raise MeasureError(f"the loss is {tuple(total.shape)}; give a scalar, a sum over rows of the batch")
            pairs = [seen.pop(site.name) for site in wanted]
            gradients = torch.autograd.grad(total, [zeros for _, zeros in pairs], allow_unused=True)
        for site, (x, _), gradient in zip(wanted, pairs, gradients, strict=True):
            if gradient is None:
                raise MeasureError(f"the loss does not depend on {site.name}")
            a, g = canonical(x, site, "tokens"), canonical(gradient, site, "tokens")
            folds[site.name].update(a, g, fitting(mask, a, "tokens"))
    rows = [
        {"site": site.name, "layer": site.layer, **{k: float(v) for k, v in folds[site.name].compute().items()}}
        for site in wanted
    ]
    return pd.DataFrame(rows)


def _next_token_loss(output: Any, tokens: Tensor | None, mask: Tensor | None) -> Tensor:
    logits_BTV = getattr(output, "logits", output)
    if tokens is None or not isinstance(logits_BTV, Tensor) or logits_BTV.shape[:2] != tokens.shape:
        raise MeasureError("the model does not predict the next of its tokens; give loss=")
    targets = tokens[:, 1:].to(logits_BTV.device)
    if mask is not None:
        targets = targets.masked_fill(~(mask[:, 1:] & mask[:, :-1]), -100)
    return F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1).float(), targets.flatten(), reduction="sum")
