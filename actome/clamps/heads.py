"""Ablation of heads in which what other heads attend to stays as it was."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from ..core.clamp import Clamp
from ..core.errors import ClampError
from .ablate import Ablate
from .patch import Patch

if TYPE_CHECKING:
    from ..core.model import Model


def pattern_preserving_ablation(
    model: Model, inputs: Any, heads: Mapping[int, Iterable[int]], *, which: Literal["silence", "only"] = "silence"
) -> tuple[Clamp, ...]:
    """Clamps that silence heads while all later layers attend as in the unperturbed forward of these inputs.

    An ordinary ablation changes two things: what the head adds, and where later heads look because of it. Here the
    patterns of an unperturbed forward are put back, so that only the first is left: whether the head's *output* is
    needed.

    Args:
        model: with heads at ``blocks.L.attn.z``.
        inputs: what the clamped forwards will be given, the same rows and positions.
        heads: for each layer the heads.
        which: ``"silence"`` these, or leave ``"only"`` these of each layer named and silence its others.

    Returns:
        Clamps for ``model.clamp(*clamps)``: `Ablate` at ``attn.z`` and `Patch` at the patterns of later layers.

    Raises:
        SiteError: a layer or a head that does not exist.
        ClampError: no head to silence, or a model without heads at ``attn.z``.

    Example:
        >>> import actome as ac
        >>> model = ac.demo()
        >>> clamps = pattern_preserving_ablation(model, "The file is", {0: [1]})
        >>> [clamp.site for clamp in clamps]
        ['blocks.0.attn.z', 'blocks.1.attn.pattern', 'blocks.2.attn.pattern', 'blocks.3.attn.pattern']
        >>> with model.clamp(*clamps):
        ...     logits = model.logits("The file is")

    Source: Singh et al. 2024, What needs to go right for an induction head? (pattern-preserving ablations).
    """
    if which not in ("silence", "only"):
        raise ClampError(f"which={which!r}; choose 'silence' or 'only'")
    clamps: list[Clamp] = []
    for layer in sorted(heads):
        site = model.match(f"blocks.{layer}.attn.z")[0]
        count = site.size("head")
        if count is None:
            raise ClampError(f"{site.name} has no heads (its dims are {', '.join(site.dims)})")
        named = [int(head) for head in heads[layer]]
        beyond = [head for head in named if not -count <= head < count]
        if beyond:
            raise ClampError(f"{site.name} has the heads 0 to {count - 1}, not {beyond}")
        chosen = {head % count for head in named}
        silenced = sorted(chosen if which == "silence" else set(range(count)) - chosen)
        if silenced:
            clamps.append(Ablate(site.name, "zero", heads=silenced))
    if not clamps:
        raise ClampError(f"heads={dict(heads)!r} with which={which!r} leaves nothing to silence")
    first = int(re.findall(r"\d+", clamps[0].site)[0])
    later = [site.name for site in model.match("blocks.*.attn.pattern") if (site.layer or 0) > first]
    if later:
        patterns = model.record(inputs, later)
        clamps += [Patch(name, patterns) for name in later]
    return tuple(clamps)
