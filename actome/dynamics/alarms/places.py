"""Where in the forward a site or component stands, from its name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

# Within a block, in the order of the forward; a component (such as "attn") stands where its last site does.
_WITHIN = (
    "resid.pre", "norm_attn", "attn.q", "attn.k", "attn.v", "attn.scores", "attn.pattern", "attn.z", "attn.out", "attn",
    "resid.mid", "norm_mlp", "moe.router", "moe.weights", "mlp.pre", "mlp.act", "moe.experts", "moe", "mlp.out", "mlp",
    "resid.post",
)  # fmt: skip
_RANK = {name: i for i, name in enumerate(_WITHIN)}
_STACKS = ("vision", "encoder", "text", "", "decoder")
_BLOCK = re.compile(r"^(?:(\w+)\.)?blocks\.(\d+)(?:\.(.+))?$")


def forward_rank(site: str) -> tuple[int, int, int]:
    """A key that sorts sites, and components of weights, in the order of the forward.

    For names that are not those of actome (`module:` paths), the order in which they are given is kept by a stable
    sort.

    >>> sorted(["logits", "blocks.10.mlp.out", "blocks.2.resid.post", "blocks.2.attn.q", "embed"], key=forward_rank)
    ['embed', 'blocks.2.attn.q', 'blocks.2.resid.post', 'blocks.10.mlp.out', 'logits']
    """
    found = _BLOCK.match(site)
    if found is None:
        prefix, _, last = site.rpartition(".")
        stack = _stack(prefix)
        if last in ("embed", "positions", "embeddings"):
            return stack, -1, 0
        if last in ("final_norm", "norm"):
            return stack, 1 << 30, 0
        if last in ("logits", "unembed", "lm_head", "head"):
            return len(_STACKS), 1 << 30, 1
        return stack, 0, 0
    prefix, layer, within = found.groups()
    # The longest known beginning, so that "attn.qkv" stands with "attn".
    known = [rank for name, rank in _RANK.items() if within and (within == name or within.startswith(f"{name}."))]
    return _stack(prefix or ""), int(layer), max(known, default=len(_WITHIN))


def _stack(prefix: str) -> int:
    return _STACKS.index(prefix) if prefix in _STACKS else _STACKS.index("")


def in_forward_order(sites: Iterable[str], order: Sequence[str] = ()) -> list[str]:
    """Each site once: by the given order where it has all of them, otherwise by their names."""
    found = list(dict.fromkeys(sites))
    at = {name: i for i, name in enumerate(order)}
    if all(site in at for site in found):
        return sorted(found, key=at.__getitem__)
    return sorted(found, key=forward_rank)
