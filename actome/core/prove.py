"""Proof: one small forward on the model at hand that says which of the sites hold.

A site is offered only when the forward reached it exactly once and its algebra held: ``resid.post[i]`` equals
``resid.pre[i+1]``, ``resid.mid - resid.pre`` equals ``attn.out``, ``pattern @ v`` equals ``z`` (where these are
not to be had, rows of ``pattern`` sum to at most one), and what goes through a projection comes out of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .errors import SiteError
from .run import Run, track
from .sites import STREAM_DIMS, Site, SiteTable
from .taps import HookPoint, Point, TapSet


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
    for name in (*_broken(values), *_unprojected(sites, values), *(check(values) if check is not None else ())):
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
            v, z = values.get(base + ".v"), values.get(base + ".z")
            if v is not None and z is not None:
                v = v.repeat_interleave(value.shape[1] // v.shape[1], dim=1)
                bad = not close(torch.matmul(value.to(v.dtype), v).transpose(1, 2), z)
            else:
                bad = bool((value.float().sum(dim=-1) > 1.02).any())
            if bad:
                broken += [name, f"{base}.scores"]
        elif last == "z":
            v = values.get(base + ".v")
            if v is not None and value.shape[-1] != v.shape[-1]:
                broken.append(name)
    return broken


# What goes through a projection, and what comes out of it.
_PROJECTED = {
    "attn.z": "attn.out",
    "cross.z": "cross.out",
    "mlp.act": "mlp.out",
    "mixer.act": "mixer.out",
    "moe.shared.act": "moe.shared.out",
}


def _unprojected(sites: list[Site], values: dict[str, Tensor]) -> Iterable[str]:
    """Names of sites that do not give what follows them when they are put through their projection (and post-norm)."""
    by_name = {site.name: site for site in sites}
    for site in sites:
        local = next((end for end in _PROJECTED if site.name.endswith("." + end)), None)
        if local is None or site.name not in values:
            continue
        after = site.name.removesuffix(local) + _PROJECTED[local]
        point, out = site.address, values.get(after)
        if out is None:
            continue
        if not isinstance(point, HookPoint) or point.side != "in":
            yield site.name
            continue
        x = values[site.name]
        with torch.no_grad():
            given = point.module.forward(x.flatten(-2) if point.heads is not None else x)
            given = given.reshape(out.shape) if given.numel() == out.numel() else given
            held = close(given, out)
            ending = by_name[after].address
            if not held and ending.side == "out" and not list(ending.module.children()) and given.shape == out.shape:
                # What is added to the stream may also be what a norm makes of it.
                held = close(ending.module.forward(given), out)
        if not held:
            yield site.name


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
    if main == "inputs_embeds":
        return {"inputs_embeds": torch.randn((2, 5, config.d_in), generator=generator).to(weight)}
    if main == "input_ids":
        inputs = {"input_ids": ids(text.vocab_size)}
        if getattr(config, "model_type", None) == "clip":
            inputs["pixel_values"] = image(config.vision_config).expand(2, -1, -1, -1)
        if getattr(config, "is_encoder_decoder", False) and hasattr(root, "decoder"):
            inputs["decoder_input_ids"] = ids(text.vocab_size)
        return inputs
    raise SiteError(f"{type(root).__name__} takes {main!r}; wrap it with example= to have its sites proved")
