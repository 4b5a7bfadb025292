"""Sites of unknown families of the usual shape: found by structure, offered only when their algebra holds.

The usual shape is a list of equal blocks, each with one attention module and something after it that ends in a linear
map to the stream's width. The rule for the MLP is that of all linear maps outside attention the last one executed that
writes the model width is the down projection; its input is ``mlp.act``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .families import Family, Stack
from .prove import close, evaluating, prove
from .resolve import Resolver
from .run import Run
from .sites import SiteTable


def structural_sites(root: nn.Module, run: Run, inputs: dict[str, Any]) -> SiteTable:
    """The proved sites of the largest list of equal blocks, or an empty table."""
    name, blocks = _block_list(root)
    if blocks is None:
        return SiteTable()
    linears = _executed(blocks[0], root, inputs)
    block = {"resid.pre": "@in", "resid.post": "@out"}
    attention = next((n for n, _ in blocks[0].named_children() if "attn" in n or "attention" in n), None)
    if attention is not None:
        # A function mode sees through whatever the attention module is made of.
        block["attn"] = f"{attention}@functions"
        block["attn.out"] = f"{attention}@out"
        inner = [path for path, wide in linears if wide and path.startswith(attention + ".")]
        if inner and isinstance(getattr(getattr(root, "config", None), "num_attention_heads", None), int):
            block["attn.z"] = f"{inner[-1]}@in|heads"
    down = [path for path, wide in linears if wide and not (attention and path.startswith(attention + "."))]
    if down:
        block["mlp.act"] = f"{down[-1]}@in"
        parent = down[-1].split(".")[0]
        block["mlp.out"] = f"{parent}@out"
    family = Family("structural", (), (Stack(name, block, {"logits": "@out.logits"}),), bases=())
    resolver = Resolver(root, family, run)
    seen: dict[str, Tensor] = {}

    def check(values: dict[str, Tensor]) -> Iterator[str]:
        seen.update(values)
        yield from _unproved(values)

    table = prove(root, resolver.sites(), run, inputs, check=check)
    patterns = [x for name, x in seen.items() if name.endswith("attn.pattern")]
    causal = all(float(pattern.float().triu(1).abs().max()) == 0.0 for pattern in patterns)
    return SiteTable(replace(site, causal=causal) for site in table)


def _block_list(root: nn.Module) -> tuple[str, nn.ModuleList | nn.Sequential | None]:
    best: tuple[int, str, Any] = (0, "", None)
    for name, module in root.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) >= 2:
            kinds = {type(child) for child in module}
            compound = all(len(list(child.children())) >= 2 for child in module)
            if len(kinds) == 1 and compound:
                size = sum(p.numel() for p in module.parameters())
                if size > best[0]:
                    best = (size, name, module)
    return best[1], best[2]


def _executed(block: nn.Module, root: nn.Module, inputs: dict[str, Any]) -> list[tuple[str, bool]]:
    """The linear maps of a block in the order in which they run, and whether each writes the stream's width."""
    seen: list[tuple[str, int]] = []
    width: list[int] = []
    handles = [
        module.register_forward_hook(lambda m, a, out, path=path: seen.append((path, out.shape[-1])))
        for path, module in block.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D")
    ]
    handles.append(
        block.register_forward_pre_hook(lambda m, a, k: width.append(_first(a, k).shape[-1]), with_kwargs=True)
    )
    try:
        with evaluating(root), torch.no_grad():
            root(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return [(path, size == width[0]) for path, size in seen] if width else []


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))


def _unproved(values: dict[str, Tensor]) -> Iterator[str]:
    """Without a row that was proved beforehand, what attention and MLP add must make up the block's whole change."""
    for name, post in values.items():
        if not name.endswith("resid.post"):
            continue
        block = name.removesuffix("resid.post")
        pre, attn, mlp = (values.get(block + part) for part in ("resid.pre", "attn.out", "mlp.out"))
        if pre is None or attn is None or mlp is None or not close(post, pre + attn + mlp):
            yield from (block + part for part in ("attn.out", "mlp.out", "mlp.act"))
