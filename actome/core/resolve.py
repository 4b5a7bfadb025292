"""From a module and its row of the family table to a table of sites, each proved by a forward pass.

A site is offered only when the proof forward reached it exactly once and its algebra held: ``resid.post[i]`` equals
``resid.pre[i+1]``, ``resid.mid - resid.pre`` equals ``attn.out``, rows of ``pattern`` sum to (at most) one and
``pattern @ v`` equals ``z``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .attention import AttentionPoint, FunctionSeam, RegistrySeam, has_own_eager
from .errors import SiteError
from .experts import ExpertsPoint, RouterPoint, WeightsPoint
from .families import Family, Stack
from .run import Run, track
from .sites import STREAM_DIMS, Site, SiteTable
from .taps import HookPoint, Point, TapSet

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
                        found.append(self._site(f"{stack.prefix}blocks.{i}.{name}", name, point, i, writable))
            for name, address in stack.top.items():
                full = name if name == "logits" else f"{stack.prefix}{name}"
                # What the model returns as its logits, after caps and scales that follow the head.
                place = self._head(address) if name == "logits" else address
                for _, point, writable in self.points(self.root, name, place, stack):
                    found.append(self._site(full, name, point, None, writable))
        return found

    def _head(self, address: str) -> str:
        return "@out.logits" if self.module(self.root, address.partition("@")[0]) is not None else "missing@out"

    @staticmethod
    def _site(name: str, local: str, point: Point, layer: int | None, writable: bool) -> Site:
        return Site(name, dims_of(local), (), layer, writable, point)

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


def prove(
    root: nn.Module,
    sites: list[Site],
    run: Run,
    inputs: dict[str, Any],
    check: Callable[[dict[str, Tensor]], Iterable[str]] | None = None,
) -> SiteTable:
    """Runs one forward with every site read and keeps the sites that hold, in the order in which they were reached.

    Args:
        inputs: keyword arguments of a forward, at least two positions long.
        check: names, from the values by site, further sites that do not hold.
    """
    seen: dict[str, list[Tensor]] = {}
    taps: list[tuple[Point, Callable[[Tensor], None], Any]] = []
    for site in sites:
        seen_here = seen.setdefault(site.name, [])

        def keep(x: Tensor, name: str = site.name, store: list[Tensor] = seen_here) -> None:
            seen[name] = seen.pop(name)  # moves the name to the end: the order of arrival
            store.append(x.detach().clone())

        taps.append((site.address, keep, "read"))
    tracker = track(root, run)
    try:
        with TapSet(taps), evaluating(root), torch.no_grad():
            root(**inputs)
    finally:
        tracker.remove()
    values = {name: found[0] for name, found in seen.items() if len(found) == 1}
    held = {site.name: site for site in sites if site.name in values}
    for name in (*_broken(values), *(check(values) if check is not None else ())):
        held.pop(name, None)
    table = []
    for name, value in values.items():
        if name not in held:
            continue
        site = held[name]
        dims = site.dims if value.ndim == len(site.dims) else _dims_by_count(site, value)
        sizes = tuple(None if d in STREAM_DIMS else s for d, s in zip(dims, value.shape, strict=True))
        table.append(replace(site, dims=dims, sizes=sizes))
    return SiteTable(table)


def _dims_by_count(site: Site, value: Tensor) -> tuple[str, ...]:
    if site.name == "logits" and value.ndim == 2:
        return ("batch", "class")
    return ("batch", *("unit" if i else "pos" for i in range(value.ndim - 1)))


def _broken(values: dict[str, Tensor]) -> list[str]:
    """Names of sites whose algebra does not hold."""
    broken = []
    for name, value in values.items():
        base, _, last = name.rpartition(".")
        if name.endswith("resid.post"):
            following = values.get(_shift(name).replace("resid.post", "resid.pre"))
            if following is not None and not close(value, following):
                broken.append(name)
        elif name.endswith("resid.mid"):
            block = name.removesuffix("resid.mid")
            pre, out = values.get(block + "resid.pre"), values.get(block + "attn.out")
            if pre is None or out is None or not close(value, pre + out):
                broken.append(name)
        elif last == "pattern":
            total = value.float().sum(dim=-1)
            v, z = values.get(base + ".v"), values.get(base + ".z")
            bad = bool((total > 1.02).any())
            if v is not None and z is not None:
                v = v.repeat_interleave(value.shape[1] // v.shape[1], dim=1)
                bad = bad or not close(torch.matmul(value.to(v.dtype), v).transpose(1, 2), z)
            if bad:
                broken += [name, f"{base}.scores"]
        elif last == "z":
            v = values.get(base + ".v")
            if v is not None and value.shape[-1] != v.shape[-1]:
                broken.append(name)
    return broken


def _shift(name: str) -> str:
    head, _, tail = name.partition("blocks.")
    index, _, rest = tail.partition(".")
    return f"{head}blocks.{int(index) + 1}.{rest}"


def close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:  # also what broadcasts is not the same
        return False
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        # A broken model must stay measurable: what is not finite proves nothing either way.
        return True
    tolerance = 3e-2 if a.dtype.itemsize < 4 else 1e-3
    return bool(torch.allclose(a.float(), b.float(), rtol=tolerance, atol=tolerance * float(a.abs().max())))


@contextmanager
def evaluating(root: nn.Module) -> Any:
    """Evaluation mode for the time of a block; every module's own flag is put back, also after an exception."""
    training = [module for module in root.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def probe_inputs(root: nn.Module) -> dict[str, Tensor]:
    """Small random inputs for a transformers model, made from its configuration alone.

    Raises:
        SiteError: nothing is known of what the model eats.
    """
    config: Any = root.config
    weight = next(root.parameters())
    generator = torch.Generator().manual_seed(0)

    def ids(vocabulary: int) -> Tensor:
        # Ids from the middle: special ids (padding at either end) are treated apart by some embeddings.
        low = min(3, vocabulary - 1)
        return torch.randint(low, vocabulary, (2, 5), generator=generator).to(weight.device)

    def image(c: Any) -> Tensor:
        size = c.image_size if isinstance(c.image_size, (tuple, list)) else (c.image_size, c.image_size)
        shape = (1, getattr(c, "num_channels", 3), *size)
        return torch.randn(shape, generator=generator).to(weight)

    main = getattr(root, "main_input_name", None)
    text = getattr(config, "text_config", config)
    if main == "pixel_values":
        return {"pixel_values": image(getattr(config, "vision_config", config))}
    if main == "input_features":
        frames = 2 * config.max_source_positions
        inputs = {"input_features": torch.randn((1, config.num_mel_bins, frames), generator=generator).to(weight)}
        if getattr(config, "is_encoder_decoder", False) and not type(root).__name__.endswith("Encoder"):
            inputs["decoder_input_ids"] = ids(config.vocab_size)[:1]
        return inputs
    if main == "input_ids":
        inputs = {"input_ids": ids(text.vocab_size)}
        if getattr(config, "model_type", None) == "clip":
            inputs["pixel_values"] = image(config.vision_config).expand(2, -1, -1, -1)
        if getattr(config, "is_encoder_decoder", False) and hasattr(root, "decoder"):
            inputs["decoder_input_ids"] = ids(text.vocab_size)
        return inputs
    raise SiteError(f"{type(root).__name__} takes {main!r}; wrap it with example= to have its sites proved")
