"""Taps: how a tensor on its way through a module is seen or replaced.

A `Point` is one place of one module where something is tapped. It installs its hook when the first tap arrives and
removes it when the last one leaves, so that a module without taps is bit for bit what it was. Taps that change the
tensor run first, in the order in which they came; those that only look see what flows on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# A tap is given the tensor in the site's dims and returns its replacement, or None to leave it as it is.
Tap = Callable[[Tensor], Tensor | None]
# "write" may replace the tensor; "read" looks at it; "keep" looks at the very tensor that flows on, for its gradient.
Kind = Literal["write", "read", "keep"]


class StopForward(Exception):
    """Raised by the last tap of a forward that nobody needs to finish."""


class Point:
    """One tapped place: an ordered set of taps, and what is installed while there is one."""

    # Whether its tensor comes with tokens flattened, so that somebody must know (batch, pos).
    needs_tokens = False
    # Whether what is being read belongs to nobody else, so that it may be kept without a copy.
    fresh = False

    def __init__(self) -> None:
        self.writers: list[Tap] = []
        self.readers: list[Tap] = []
        self.keeps = 0
        self._undo: Callable[[], None] | None = None

    def add(self, tap: Tap, kind: Kind) -> None:
        (self.writers if kind == "write" else self.readers).append(tap)
        self.keeps += kind == "keep"
        if self._undo is None:
            self._undo = self.install()

    def remove(self, tap: Tap, kind: Kind) -> None:
        (self.writers if kind == "write" else self.readers).remove(tap)
        self.keeps -= kind == "keep"
        if self._undo is not None and not self.writers and not self.readers:
            self._undo()
            self._undo = None

    def install(self) -> Callable[[], None]:
        """Puts the hook in; returns what takes it out."""
        raise NotImplementedError

    def write(self, x: Tensor) -> Tensor:
        """What flows on; `x` itself when nobody changed it."""
        for tap in self.writers:
            new = tap(x)
            if new is not None:
                x = new
        return x

    def read(self, x: Tensor) -> None:
        for tap in self.readers:
            tap(x)


class HookPoint(Point):
    """The first tensor argument or the output of a module, seen in the site's dims.

    Args:
        module: the module to hook.
        side: ``"in"`` or ``"out"``.
        heads: split the last dim into (head, d_head) with this many heads.
        inplace: write into the tensor itself, because the caller keeps it as the residual too.
        mutated: the model changes the tensor in place afterwards, so that one that is kept must not be the one it gets.
        tokens: gives (batch, pos) of the forward at hand, for modules that see flattened tokens.
        field: name of the output's field that holds the tensor (``"logits"``), for the root module.
    """

    def __init__(
        self,
        module: nn.Module,
        side: Literal["in", "out"],
        *,
        heads: int | None = None,
        inplace: bool = False,
        mutated: bool = False,
        tokens: Callable[[], tuple[int, int]] | None = None,
        field: str | None = None,
    ) -> None:
        super().__init__()
        self.module, self.side, self.heads, self.inplace, self.mutated = module, side, heads, inplace, mutated
        self.tokens, self.field = tokens, field
        self.shaped = heads is not None or tokens is not None
        self.needs_tokens = tokens is not None
        self.image = False  # whether four dims are those of an image, in modules without a family
        self.plain = not self.shaped and not inplace and not mutated

    def install(self) -> Callable[[], None]:
        # What `register_forward_hook` does, less its handle: a recording installs dozens of hooks for one forward,
        # and on a small or fast model the handles alone would cost more than the copies.
        key: Any = f"actome {id(self)}"
        module = self.module
        if self.side == "in":
            module._forward_pre_hooks[key] = self._before
            module._forward_pre_hooks_with_kwargs[key] = True

            def undo() -> None:
                del module._forward_pre_hooks[key], module._forward_pre_hooks_with_kwargs[key]
        else:
            module._forward_hooks[key] = self._after

            def undo() -> None:
                del module._forward_hooks[key]

        return undo

    def see(self, x: Tensor) -> Tensor:
        """Runs the taps on `x`; returns what flows on, which is `x` itself when nothing changed."""
        shaped = self.shaped
        y = self._present(x) if shaped else x
        # A view that is kept is not what the caller's residual comes from: go through a copy.
        through = shaped and self.keeps > 0
        if self.inplace and (self.writers or through):
            # Autograd may need the value that is about to be overwritten: give the writers another one.
            before = y.clone() if x.requires_grad else y
            new = self.write(before)
            if new is not before or (through and before is not y):
                x.copy_(new.reshape(x.shape))
            self.read(new if through else y)
            return x
        new = self.write(y)
        self.read(new)
        if self.mutated and self.keeps:
            return new.clone()
        if new is y and not (shaped and self.keeps):
            return x
        return new.reshape(x.shape) if shaped else new

    def _present(self, x: Tensor) -> Tensor:
        if self.tokens is not None and x.ndim == 2:
            batch, length = self.tokens()
            x = x.view(batch, length, x.shape[-1])
        return x if self.heads is None else x.unflatten(-1, (self.heads, -1))

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args and isinstance(args[0], Tensor):
            new = self.see(args[0])
            return None if new is args[0] else ((new, *args[1:]), kwargs)
        key = next((k for k, v in kwargs.items() if isinstance(v, Tensor)), None)
        if key is None:
            return None
        new = self.see(kwargs[key])
        return None if new is kwargs[key] else (args, {**kwargs, key: new})

    def _after(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        if isinstance(out, Tensor):
            if self.plain and not self.writers:
                for tap in self.readers:
                    tap(out)
                return None
            new = self.see(out)
            return None if new is out else new
        if isinstance(out, (tuple, list)):
            new = self.see(out[0])
            return None if new is out[0] else type(out)((new, *out[1:]))
        # What is left is a mapping such as a ModelOutput; unless told otherwise its first tensor is the state.
        key = self.field or next(k for k, v in out.items() if isinstance(v, Tensor))
        new = self.see(out[key])
        if new is out[key]:
            return None
        out[key] = new
        return out


def mode_during(module: nn.Module, make: Callable[[], TorchFunctionMode]) -> Callable[[], None]:
    """Has a torch function mode live while a module's forward runs, also when that ends in an exception.

    Args:
        make: gives a new mode for each forward.

    Returns:
        What takes it out again.
    """
    modes: list[TorchFunctionMode] = []

    def before(module: nn.Module, args: Any) -> None:
        modes.append(make().__enter__())

    def after(module: nn.Module, args: Any, out: Any) -> None:
        # Called after an exception too, and then perhaps without the pre-hook having run.
        if modes:
            modes.pop().__exit__(None, None, None)

    handles = [module.register_forward_pre_hook(before), module.register_forward_hook(after, always_call=True)]
    return lambda: [handle.remove() for handle in handles]  # type: ignore[return-value]


class TapSet:
    """Taps that live and die together; leaving the context removes every one, whatever happened in between."""

    __slots__ = ("_active", "_taps")

    def __init__(self, taps: list[tuple[Point, Tap, Kind]]):
        self._taps = taps
        self._active = 0

    def __enter__(self) -> TapSet:
        try:
            for point, tap, kind in self._taps:
                point.add(tap, kind)
                self._active += 1
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        while self._active:
            self._active -= 1
            point, tap, kind = self._taps[self._active]
            point.remove(tap, kind)
