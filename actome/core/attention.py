"""Taps inside attention: queries, keys, values, scores and patterns, as the attention function sees them.

The seam is transformers' registry of attention functions. While a layer is tapped, a dispatcher stands in the registry
under the name of the model's own implementation; it hands every call to that implementation, and only for a tapped
layer looks at or replaces the tensors. Nothing about the mask or the configuration changes, so a layer that is only
read gives bit for bit what it gave before. A pattern that is only read is computed beside the user's kernel by the
model's own eager function; one that is written goes through that eager function.

Architectures that never ask the registry (Falcon, BLOOM, GPT-J) are tapped by a torch function mode that lives only
while their attention module runs (`FunctionSeam`).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function_unary

from .errors import SiteError
from .taps import Kind, Point, Tap, mode_during

_SEAMS: dict[nn.Module, RegistrySeam] = {}
_REPLACED: dict[str, Any] = {}
_NOTHING = object()
# The functions that make a pattern of scores, their first argument.
_WEIGHS: set[Callable[..., Tensor]] = {F.softmax, torch.softmax, Tensor.softmax}


def weighs(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Declares that an eager attention function makes its pattern of its scores by this function: no softmax, then.

    Args:
        function: takes scores (batch, head, query, key) first and returns the pattern of the same shape. Where a query
            may not look, scores are the lowest number of their dtype.

    >>> @weighs
    ... def squared(scores):
    ...     return scores.relu().square()
    >>> squared(torch.tensor([[[[2.0, -1.0]]]])).tolist()
    [[[[4.0, 0.0]]]]
    """

    @functools.wraps(function)
    def seen(scores: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if has_torch_function_unary(scores):
            return handle_torch_function(seen, (scores,), scores, *args, **kwargs)  # type: ignore[no-any-return]
        return function(scores, *args, **kwargs)

    _WEIGHS.add(seen)
    return seen


class AttentionPoint(Point):
    """One of ``q``, ``k``, ``v``, ``scores``, ``pattern`` of one attention module; the seam does the work."""

    def __init__(self, seam: RegistrySeam | FunctionSeam, part: str):
        super().__init__()
        self.seam, self.part = seam, part

    def add(self, tap: Tap, kind: Kind) -> None:
        super().add(tap, kind)
        self.seam.refresh()

    def remove(self, tap: Tap, kind: Kind) -> None:
        super().remove(tap, kind)
        self.seam.refresh()

    def install(self) -> Callable[[], None]:
        return self.seam.join(self)

    def pass_on(self, x: Tensor, fresh: bool = False) -> Tensor:
        """Runs the taps; `fresh` says that nobody else holds `x`, so that a single reader may keep it uncopied."""
        new = self.write(x)
        self.fresh = fresh and len(self.readers) == 1
        self.read(new)
        self.fresh = False
        return new


class _Seam:
    """Holds the points of one attention module that are in use."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.points: dict[str, AttentionPoint] = {}
        self.on_path = self.beside = False
        # Whether its eager function is a softmax of scaled products and a mask, nothing else; found out by comparing.
        self.plain: bool | None = None

    def join(self, point: AttentionPoint) -> Callable[[], None]:
        if not self.points:
            self.open()
        self.points[point.part] = point

        def leave() -> None:
            del self.points[point.part]
            if not self.points:
                self.close()

        return leave

    def refresh(self) -> None:
        inner = [p for name in ("scores", "pattern") if (p := self.points.get(name))]
        # Only a pattern that is changed, or whose gradient is wanted, has to be the one that the output comes from.
        self.on_path = any(p.writers or p.keeps for p in inner)
        self.beside = bool(inner) and not self.on_path

    def pass_on(self, part: str, x: Tensor) -> Tensor:
        point = self.points.get(part)
        return x if point is None else point.pass_on(x)

    def open(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


class RegistrySeam(_Seam):
    """The seam of a module that asks transformers' registry for its attention function."""

    def open(self) -> None:
        if not _SEAMS:
            _install_dispatchers()
        _SEAMS[self.module] = self

    def close(self) -> None:
        del _SEAMS[self.module]
        if not _SEAMS:
            _remove_dispatchers()

    def call(self, original: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, mask: Any, *args: Any, **kw: Any):
        module = self.module
        q, k, v = self.pass_on("q", q), self.pass_on("k", k), self.pass_on("v", v)
        if self.on_path:
            return self._eager(q, k, v, mask, *args, **kw)
        out = original(module, q, k, v, mask, *args, **kw)
        if self.beside:
            with torch.no_grad():
                self._look(q, k, v, mask, out[1], args, kw)
        return out

    def _look(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, pattern: Tensor | None, args: Any, kw: Any) -> None:
        """Shows scores and pattern to their readers, beside a kernel that does not give them."""
        if "scores" not in self.points:
            if pattern is not None:
                self.pass_on("pattern", pattern)
                return
            if self.plain and _may_be_plain(q, kw):
                self.points["pattern"].pass_on(plain_pattern(self.module, q, k, mask, kw), fresh=True)
                return
        # The values play no part in the pattern: one column of them keeps the product small.
        _, own = self._eager(q, k, v[..., :1], mask, *args, **{**kw, "dropout": 0.0})
        if self.plain is None and _may_be_plain(q, kw):
            self.plain = torch.allclose(plain_pattern(self.module, q, k, mask, kw), own, rtol=1e-4, atol=1e-6)

    def _eager(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, *args: Any, **kw: Any) -> tuple[Tensor, Tensor]:
        module = self.module
        mask = additive_mask(module, mask, q, k, kw)
        eager = own_eager(module)
        if "scores" in self.points:
            with _SoftmaxSeam(self.points["scores"], keys=k.shape[-2]):
                out, pattern = eager(module, q, k, v, mask, *args, **kw)
        else:
            out, pattern = eager(module, q, k, v, mask, *args, **kw)
        point = self.points.get("pattern")
        if point is None:
            return out, pattern
        new = point.pass_on(pattern)
        if new is not pattern:
            out = torch.matmul(new.to(v.dtype), _for_queries(v, new)).transpose(1, 2).contiguous()
        return out, new


class _SoftmaxSeam(TorchFunctionMode):
    """Lets the taps of `scores` see what an eager attention function gives to its softmax, or what it has for one."""

    def __init__(self, point: AttentionPoint, keys: int):
        self.point, self.keys = point, keys

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _WEIGHS and args[0].ndim == 4:
            scores = args[0]
            # A learnt sink stands as one more column behind the keys; it is no score of a token.
            extra = scores[..., self.keys :]
            new = self.point.pass_on(scores[..., : self.keys] if extra.shape[-1] else scores)
            if new is not scores:
                scores = torch.cat([new, extra], dim=-1) if extra.shape[-1] else new
                args = (scores, *args[1:])
        return func(*args, **kwargs)


class FunctionSeam(_Seam):
    """The seam of a module that computes attention itself: a torch function mode while its forward runs.

    Sees `softmax` over a (batch, head, query, key) tensor as scores and pattern, and, where the module calls
    `scaled_dot_product_attention`, its queries, keys and values as well.
    """

    def open(self) -> None:
        self.close = mode_during(self.module, lambda: _FunctionMode(self))  # type: ignore[method-assign]

    def attend(self, func: Any, q: Tensor, k: Tensor, v: Tensor, args: tuple[Any, ...], kw: dict[str, Any]) -> Tensor:
        """`scaled_dot_product_attention` with its inner tensors seen; same formula as the library documents."""
        q, k, v = self.pass_on("q", q), self.pass_on("k", k), self.pass_on("v", v)
        if not self.on_path:
            out = func(q, k, v, *args, **kw)
            if self.beside:
                with torch.no_grad():
                    self._pattern(q, k, args, kw)
            return out
        pattern = self._pattern(q, k, args, kw)
        return torch.matmul(pattern, _for_queries(v, pattern))

    def _pattern(self, q: Tensor, k: Tensor, args: tuple[Any, ...], kw: dict[str, Any]) -> Tensor:
        mask, dropout, causal = (*args, *(None, 0.0, False)[len(args) :])[:3]
        mask, dropout, causal = kw.get("attn_mask", mask), kw.get("dropout_p", dropout), kw.get("is_causal", causal)
        scale = kw.get("scale") or q.shape[-1] ** -0.5
        scores = torch.matmul(q, _for_queries(k, q).transpose(-1, -2)) * scale
        if causal:
            mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
        pattern = F.softmax(self.pass_on("scores", scores), dim=-1)
        return self.pass_on("pattern", F.dropout(pattern, dropout) if dropout else pattern)


class _FunctionMode(TorchFunctionMode):
    def __init__(self, seam: FunctionSeam):
        self.seam = seam

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        seam = self.seam
        if func is F.scaled_dot_product_attention:
            q, k, v, *rest = args if len(args) >= 3 else (kwargs.pop("query"), kwargs.pop("key"), kwargs.pop("value"))
            return seam.attend(func, q, k, v, tuple(rest), kwargs)
        if func in (F.softmax, torch.softmax, Tensor.softmax) and args[0].ndim == 4:
            scores = seam.pass_on("scores", args[0])
            return seam.pass_on("pattern", func(scores, *args[1:], **kwargs))
        return func(*args, **kwargs)


def _may_be_plain(q: Tensor, kw: dict[str, Any]) -> bool:
    # Half precision is left to the eager function, whose roundings are its own; tensors among the rest are biases.
    return q.dtype == torch.float32 and not any(isinstance(value, Tensor) for value in kw.values())


def plain_pattern(module: nn.Module, q: Tensor, k: Tensor, mask: Any, kw: dict[str, Any]) -> Tensor:
    """``softmax(scale * q @ k.T + mask)`` in one product and one pass in place.

    Args:
        q: (batch, head, query, d_head); `k` (batch, kv_head, key, d_head); `mask` as the attention function got it.

    Returns:
        (batch, head, query, key), a tensor of its own.
    """
    mask = additive_mask(module, mask, q, k, kw)
    scale = kw.get("scaling")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k = _for_queries(k, q)
    if mask is not None and mask.shape[:2] == (1, 1):
        many = q.shape[0] * q.shape[1]
        added = mask[0].expand(many, -1, -1)
        scores = torch.baddbmm(added, q.flatten(0, 1), k.flatten(0, 1).transpose(-1, -2), alpha=scale)
        scores = scores.view(*q.shape[:3], k.shape[-2])
    else:
        # The eager functions' own order of roundings, in place.
        scores = torch.matmul(q, k.transpose(-1, -2)).mul_(scale)
        if mask is not None:
            scores += mask
    return torch.softmax(scores, dim=-1, out=scores) if scores.device.type == "cpu" else scores.softmax(dim=-1)


def _for_queries(kv: Tensor, queries: Tensor) -> Tensor:
    """Keys or values with each head repeated for the query heads that share it."""
    if kv.ndim < 3 or kv.shape[-3] == queries.shape[-3]:
        return kv
    return kv.repeat_interleave(queries.shape[-3] // kv.shape[-3], dim=-3)


def additive_mask(module: nn.Module, mask: Any, q: Tensor, k: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
    """The mask of any implementation in the form that eager functions add to the scores.

    Args:
        mask: ``None``, a bool or additive tensor broadcastable to (batch, head, query, key), or (batch, key) as the
            flash implementations take it.

    Returns:
        (batch or 1, 1, query, key) of `q`'s dtype, or ``None``.
    """
    queries, keys = q.shape[-2], k.shape[-2]
    if mask is not None and not isinstance(mask, Tensor):
        raise SiteError(
            f"attention patterns cannot be tapped under a {type(mask).__name__}; load the model with "
            'attn_implementation="sdpa" or "eager"'
        )
    lowest = torch.finfo(q.dtype).min
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if mask is None or mask.ndim == 2:
        allowed = None
        if causal and queries > 1:
            # As the kernels have it, the last query sees every key (a static cache is cut to the queries instead).
            offset = keys - queries if mask is not None else 0
            allowed = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(offset)
            window = kwargs.get("sliding_window")
            if window is not None:
                allowed &= torch.ones_like(allowed).triu(offset - window + 1)
            allowed = allowed[None, None]
        if mask is not None:
            real = mask[:, None, None, -keys:].bool()
            allowed = real if allowed is None else allowed & real
        mask = allowed
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, lowest)
    return mask[..., :keys]


def has_own_eager(module: nn.Module) -> bool:
    """Whether the file that defines the module has an eager attention function to compute patterns with."""
    return hasattr(sys.modules[type(module).__module__], "eager_attention_forward")


def own_eager(module: nn.Module) -> Callable[..., Any]:
    """The eager attention function of the file that defines the module: exact for its sinks, biases and caps."""
    return sys.modules[type(module).__module__].eager_attention_forward  # type: ignore[no-any-return]


def _dispatcher(name: str, original: Callable[..., Any] | None) -> Callable[..., Any]:
    def attend(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        function = original if original is not None else own_eager(module)
        seam = _SEAMS.get(module)
        return function(module, *args, **kwargs) if seam is None else seam.call(function, *args, **kwargs)

    attend.__name__ = f"actome_{name}"
    return attend


def _install_dispatchers() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as registry

    for name in [*registry, "eager"]:
        original = registry.get(name, None)
        _REPLACED[name] = registry._local_mapping.get(name, _NOTHING)
        registry[name] = _dispatcher(name, original)


def _remove_dispatchers() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as registry

    for name, before in _REPLACED.items():
        if before is _NOTHING:
            with suppress(KeyError):
                del registry[name]
        else:
            registry[name] = before
    _REPLACED.clear()
