"""States: one vector an example at each site, which is what every estimator is fitted on.

Letters: N examples, D width of a site.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..core.errors import MeasureError
from ..core.tokens import Batch, encode
from .spans import spans

if TYPE_CHECKING:
    from ..core.model import Model
    from ..core.sites import Site

Over = Literal["last", "mean", "response", "prompt"]
OVERS: tuple[Over, ...] = ("last", "mean", "response", "prompt")


def states(model: Model, examples: Any, sites: str, *, over: Over = "last", batch_size: int = 8) -> dict[str, Tensor]:
    """One vector for each example at each site.

    Args:
        model: whose sites are recorded, under whatever clamps are active.
        examples: texts or token ids, or pairs of a prompt and its response, as ``(prompts, responses)``.
        sites: a name or pattern of sites with one vector a token.
        over: which tokens of an example: its ``"last"`` one, the ``"mean"`` of all; with pairs also the mean of the
            ``"response"``, or the last of the ``"prompt"``.
        batch_size: rows a forward.

    Returns:
        By site, (N, D), float32, on the CPU.

    Raises:
        MeasureError: no example, pairs that do not match, or a site with other dims.

    >>> import actome as ac
    >>> model = ac.demo()
    >>> found = states(model, ["import os", "def f(x):"], "blocks.{1..2}.resid.post")
    >>> {site: tuple(x.shape) for site, x in found.items()}
    {'blocks.1.resid.post': (2, 112), 'blocks.2.resid.post': (2, 112)}
    """
    if over not in OVERS:
        raise MeasureError(f"over={over!r} does not exist; choose {', '.join(OVERS)}")
    places = model.match(sites)
    for site in places:
        if site.dims[:2] != ("batch", "pos") or len(site.dims) != 3:
            raise MeasureError(f"{site.name} has the dims {', '.join(site.dims)}, and not one vector a token")
    found: dict[str, list[Tensor]] = {site.name: [] for site in places}
    for batch, chosen_BT in chosen_tokens(model, examples, over, batch_size):
        for name, part in _pooled(model, batch, chosen_BT, places).items():
            found[name].append(part)
    return {name: torch.cat(parts) for name, parts in found.items()}


def is_pairs(examples: Any) -> bool:
    """Whether these are prompts with responses rather than examples of one piece."""
    return isinstance(examples, tuple) and len(examples) == 2 and not isinstance(examples[0], (str, int))


def count(examples: Any) -> int:
    """How many examples there are."""
    return len(examples[0]) if is_pairs(examples) else len(examples)


def subset(examples: Any, index: Sequence[int]) -> Any:
    """Some of the examples, in the order of `index`."""
    if is_pairs(examples):
        return tuple(subset(part, index) for part in examples)
    if isinstance(examples, Tensor):
        return examples[torch.as_tensor(list(index), dtype=torch.long)]
    return [examples[i] for i in index]


def chosen_tokens(model: Model, examples: Any, over: Over, batch_size: int) -> Any:
    """Rows of ids, and which tokens of each are looked at, (batch, pos)."""
    if is_pairs(examples):
        for one in spans(examples[0], examples[1], model.tokenizer, batch_size):
            position_T = torch.arange(one.batch.ids.shape[1])
            end_B1 = (one.prompt + one.response)[:, None]
            prompt_B1 = one.prompt[:, None]
            chosen_BT = {
                "last": position_T == end_B1 - 1,
                "mean": position_T < end_B1,
                "response": (position_T >= prompt_B1) & (position_T < end_B1),
                "prompt": position_T == prompt_B1 - 1,
            }[over]
            yield one.batch, chosen_BT
        return
    if over in ("response", "prompt"):
        raise MeasureError(f"over={over!r} needs prompts with responses, as (prompts, responses)")
    if isinstance(examples, str) or not len(examples):
        raise MeasureError(f"give a list of examples, at least one, not {examples!r:.60}")
    for at in range(0, len(examples), batch_size):
        batch = encode(examples[at : at + batch_size], model.tokenizer)
        real_BT = torch.ones_like(batch.ids, dtype=torch.bool) if batch.mask is None else batch.mask
        last_B1 = real_BT.sum(1, keepdim=True) - 1
        yield batch, real_BT if over == "mean" else torch.arange(batch.ids.shape[1]) == last_B1


def _pooled(model: Model, batch: Batch, chosen_BT: Tensor, places: Sequence[Site]) -> dict[str, Tensor]:
    """Means over the chosen tokens of each row, by site, (batch, D); nothing but them is kept of the forward."""
    names = [site.name for site in places]
    weight_BT = chosen_BT.float() / chosen_BT.sum(1, keepdim=True)
    recording = model.record(batch, names)
    return {name: torch.einsum("bt,btd->bd", weight_BT, recording[name].float().cpu()) for name in names}
