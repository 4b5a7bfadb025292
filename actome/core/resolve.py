"""From a module and its row of the family table to its sites, as yet unproved."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from .attention import AttentionPoint, FunctionSeam, RegistrySeam, has_own_eager
from .errors import SiteError
from .experts import ExpertsPoint, RouterPoint, WeightsPoint
from .families import Family, Stack
from .run import Run
from .sites import Site
from .taps import HookPoint, Point

_RESIDUAL = ("batch", "pos", "d_model")
_DIMS = {
    "z": ("batch", "pos", "head", "d_head"),
    "q": ("batch", "head", "query", "d_head"),
    "k": ("batch", "kv_head", "key", "d_head"),
    "v": ("batch", "kv_head", "key", "d_head"),
    "scores": ("batch", "head", "query", "key"),
    "pattern": ("batch", "head", "query", "key"),
    "mlp.pre": ("batch", "pos", "d_mlp"),
    "mlp.act": ("batch", "pos", "d_mlp"),
    "moe.shared.act": ("batch", "pos", "d_mlp"),
    "mixer.act": ("batch", "pos", "d_inner"),
    "moe.router": ("batch", "pos", "expert"),
    "moe.weights": ("batch", "pos", "expert"),
    "moe.chosen": ("batch", "pos", "choice"),
    "moe.experts": ("batch", "pos", "choice", "d_model"),
    "logits": ("batch", "pos", "vocab"),
}


def dims_of(local: str) -> tuple[str, ...]:
    """The dims of a local site name; whatever is not listed lies in the residual stream's width."""
    return _DIMS.get(local) or _DIMS.get(local.rsplit(".", 1)[-1], _RESIDUAL)


class Resolver:
    """Turns addresses into points.

    Args:
        root: the wrapped module.
        family: its row.
        run: tells (batch, pos) of the forward at hand to points that see flattened tokens.
    """

    def __init__(self, root: nn.Module, family: Family, run: Run):
        self.root, self.family, self.run = root, family, run

    def sites(self) -> list[Site]:
        """Every site that the row names and the module has, unproved, in the order of the row."""
        found: list[Site] = []
        for stack in self.family.stacks:
            blocks = self.module(self.root, stack.blocks)
            if blocks is None:
                continue
            for i, block in enumerate(blocks):
                for local, address in stack.block.items():
                    for name, point, writable in self.points(block, local, address, stack):
                        found.append(self._site(f"{stack.prefix}blocks.{i}.{name}", name, point, i, writable, stack))
            for name, address in stack.top.items():
                full = name if name == "logits" else f"{stack.prefix}{name}"
                # What the model returns as its logits, after caps and scales that follow the head.
                place = self._head(address) if name == "logits" else address
                for _, point, writable in self.points(self.root, name, place, stack):
                    found.append(self._site(full, name, point, None, writable, stack))
        return found

    def _head(self, address: str) -> str:
        return "@out.logits" if self.module(self.root, address.partition("@")[0]) is not None else "missing@out"

    @staticmethod
    def _site(name: str, local: str, point: Point, layer: int | None, writable: bool, stack: Stack) -> Site:
        return Site(name, dims_of(local), (), layer, writable, point, stack.causal)

    def module(self, start: nn.Module, path: str) -> nn.Module | None:
        """The module at a path, also when the wrapped class lacks the path's base prefix; ``None`` if there is none."""
        paths = [path]
        if start is self.root:
            paths += [path[len(base) + 1 :] for base in self.family.bases if path.startswith(base + ".")]
        for one in paths:
            try:
                found = start.get_submodule(one)
            except AttributeError:
                continue
            if isinstance(found, nn.Module):
                return found
        return None

    def points(self, start: nn.Module, local: str, address: str, stack: Stack) -> Iterable[tuple[str, Point, bool]]:
        """(local name, point, writable) for an address; nothing when the module is not there."""
        path, _, rest = address.partition("@")
        kind, *modifiers = rest.split("|")
        module = self.module(start, path)
        if module is None:
            return
        if kind in ("attention", "functions"):
            seam = RegistrySeam(module) if kind == "attention" else FunctionSeam(module)
            parts = ["q", "k", "v", "scores", "pattern"]
            if kind == "attention" and not has_own_eager(module):
                parts = parts[:3]
            for part in parts:
                yield f"{local}.{part}", AttentionPoint(seam, part), True
        elif kind == "router":
            yield local, RouterPoint(module, self.tokens), True
            experts = getattr(module, "num_experts", None) or module.weight.shape[0]
            yield "moe.weights", WeightsPoint(module, self.tokens, experts), True
            yield "moe.chosen", WeightsPoint(module, self.tokens, experts, part="chosen"), False
        elif kind == "experts":
            yield local, ExpertsPoint(module, self.tokens), True
        else:
            side, _, field = kind.partition(".")
            heads = self._heads(start, stack) if "heads" in modifiers else None
            yield (
                local,
                HookPoint(
                    module,
                    "in" if side == "in" else "out",
                    heads=heads,
                    inplace="inplace" in modifiers,
                    mutated="mutated" in modifiers,
                    tokens=self.tokens if "flat" in modifiers else None,
                    field=field or None,
                ),
                True,
            )

    def _heads(self, block: nn.Module, stack: Stack) -> int:
        key = next(k for k in ("attn", "cross") if k in stack.block)
        attention = self.module(block, stack.block[key].partition("@")[0])
        for owner in (getattr(attention, "config", None), attention, getattr(self.root, "config", None)):
            count = getattr(owner, stack.heads, None)
            if isinstance(count, int):
                return count
        raise SiteError(f"{type(attention).__name__} does not say how many heads it has ({stack.heads})")

    def tokens(self) -> tuple[int, int]:
        return self.run.batch, self.run.length
