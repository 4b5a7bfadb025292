"""Around the optimizer's step: that it came, what it was given, and how far it moved the weights."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from actome.core.errors import RunError

from ..alarms.base import Reading
from .components import components
from .norms import EXACT, Chosen, by_component, fetch, lengths

# The guard looks at the gradients of so many small parameters, spread over the network.
_GUARDS = 4


class OptimizerWatch:
    """Hooks around the step of the optimizers that train a network.

    Args:
        model: a `Model`.
        optimizers: those that train it; when none is given, the first ones to step on its parameters are taken.
        measure_next: whether norms are to be taken at the step to come.
        broken: called before an update whose gradients are not finite.

    Attributes:
        stepped: whether an optimizer has stepped since `begin_step`.
        lr: the learning rate of the last step, of the first optimizer's first group.
        skips: for optimizers that decide on the device whether to step, what they found, by call; 0 is finite.
        spent: seconds that the hooks took since `begin_step`.

    Raises:
        RunError: an optimizer that trains nothing of this network.
    """

    def __init__(
        self,
        model: Any,
        optimizers: Iterable[Any],
        measure_next: Callable[[], bool],
        broken: Callable[[OptimizerWatch], None] | None,
        reference: Tensor | None = None,
    ):
        self.module: nn.Module = model.module
        self.component = components(model)
        self._measure_next, self._broken = measure_next, broken
        self._names = {id(p): name for name, p in self.module.named_parameters()}
        self.optimizers: list[Optimizer] = []
        self._handles: list[Any] = []
        self._guarded: dict[int, list[nn.Parameter]] = {}
        self.wanted = False  # whether norms are to be taken at this step, whatever was planned
        # Whether the loop calls `before` itself, since it makes the gradients within the optimizer's step.
        self.before_is_called = False
        self._chosen = Chosen({})
        self.first = self._reference(reference)
        self._entry: dict[str, Tensor] | None = None
        self._norms: dict[str, dict[str, Tensor]] = {}
        self._whole = False
        self.lr: float | None = None
        self.begin_step()
        given = [unwrapped(one) for one in optimizers]
        for one in given:
            self._adopt(one, told=True)
        if not given:
            self._handles.append(register_optimizer_step_pre_hook(self._meet))

    # -- which optimizers -----------------------------------------------------------------------------------------

    def _meet(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """A step of any optimizer: one that trains this network is watched from here on."""
        if optimizer in self.optimizers or not self._trains(optimizer):
            return
        self._adopt(optimizer, told=False)  # its own hooks come after these, so the new one is called for this step too

    def _trains(self, optimizer: Optimizer) -> bool:
        return any(id(p) in self._names for group in optimizer.param_groups for p in group["params"])

    def _adopt(self, optimizer: Any, told: bool) -> None:
        if not isinstance(optimizer, Optimizer):
            raise RunError(f"an optimizer is a torch.optim.Optimizer, and this is {type(optimizer).__name__}")
        if told and not self._trains(optimizer):
            count = sum(len(group["params"]) for group in optimizer.param_groups)
            raise RunError(
                f"the optimizer trains {count} tensors, and none of them belongs to this {type(self.module).__name__}: "
                "give the one that was made of its parameters"
            )
        self.optimizers.append(optimizer)
        self._handles += [
            optimizer.register_step_pre_hook(self._pre),
            optimizer.register_step_post_hook(self._post),
        ]

    def close(self) -> None:
        """Takes the hooks out."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    # -- at each step ---------------------------------------------------------------------------------------------

    def begin_step(self) -> None:
        """Begins to wait for the next step."""
        self.stepped = self.wanted = False
        self.skips: list[Tensor | float] = []
        self.spent = 0.0

    @property
    def measured(self) -> bool:
        """Whether norms were taken around this step."""
        return bool(self._norms)

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained now, by name."""
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    def has_gradients(self) -> bool:
        """Whether gradients wait for an optimizer to use them."""
        return any(p.grad is not None for p in self.module.parameters())

    def _pre(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self.before_is_called:
            self.before(optimizer)

    def before(self, optimizer: Optimizer) -> None:
        """What is to be seen before an update, when all gradients are there."""
        begin = time.perf_counter()
        # A gradient scaler that has seen an overflow has the step passed over: that is its business.
        skipped = self._broken is not None and float(getattr(optimizer, "found_inf", None) or 0) != 0
        if self._broken is not None and not skipped and not self._sound(optimizer):
            self._broken(self)
        if self.wanted or self._measure_next():
            self._take(optimizer)
        self.spent += time.perf_counter() - begin

    def _post(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        begin = time.perf_counter()
        self.stepped = True
        found = getattr(optimizer, "found_inf", None)
        if found is not None:
            self.skips.append(found.detach().clone() if isinstance(found, Tensor) else float(found))
        if optimizer is self.optimizers[0]:
            self.lr = optimizer.param_groups[0]["lr"]
        self.spent += time.perf_counter() - begin

    def _sound(self, optimizer: Optimizer) -> bool:
        """Whether gradients are finite, by a look at a few small ones at both ends of the network.

        What is not finite in the loss is not finite in every gradient; what arises on the way back is not in all that
        comes after it, of which the first layers come last.
        """
        grads = [p.grad for p in self._guards(optimizer) if p.grad is not None and not p.grad.is_sparse]
        return all(math.isfinite(value) for value in fetch(lengths(grads)))

    def _guards(self, optimizer: Optimizer) -> list[nn.Parameter]:
        if id(optimizer) not in self._guarded:
            mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
            some = [p for p in self.module.parameters() if id(p) in mine and p.requires_grad]
            small = [p for p in some if p.ndim <= 1] or sorted(some, key=lambda p: p.numel())[:_GUARDS]
            ends = {0, len(small) - 1, len(small) // 3, 2 * len(small) // 3}
            self._guarded[id(optimizer)] = [small[i] for i in sorted(ends)] if small else []
        return self._guarded[id(optimizer)]

    # -- norms ----------------------------------------------------------------------------------------------------

    def _reference(self, given: Tensor | None) -> dict[str, Tensor]:
        """The chosen entries of the weights that movement is measured from; those given, if they fit."""
        mine = self._chosen.take(self.trained())
        if given is None or given.numel() != sum(one.numel() for one in mine.values()):
            return mine
        parts = given.split([one.numel() for one in mine.values()])
        return {name: part.to(mine[name]) for name, part in zip(mine, parts, strict=True)}

    def flat_reference(self) -> Tensor:
        """The same as one tensor, to be kept with the run."""
        parts = [one.detach().float().cpu().reshape(-1) for one in self.first.values()]
        return torch.cat(parts) if parts else torch.zeros(0)

    def _take(self, optimizer: Optimizer) -> None:
        """Norms of the gradients, and the weights as they are before the update."""
        mine = {self._names[id(p)]: p for g in optimizer.param_groups for p in g["params"] if id(p) in self._names}
        graded = {name: p for name, p in mine.items() if p.grad is not None}
        scale = getattr(optimizer, "grad_scale", None)
        norms = lengths([p.grad for p in graded.values()])  # type: ignore[misc]
        if scale is not None:
            # This optimizer undoes the scale itself, on the way.
            norms = [norm / scale.to(norm.device) for norm in norms]
        self._norms.setdefault("grad_norm", {}).update(zip(graded, norms, strict=True))
        if self._entry is None:
            trained = self.trained()
            self._whole = sum(p.numel() for p in trained.values()) <= EXACT
            self._entry = (
                {name: p.detach().clone() for name, p in trained.items()} if self._whole else self._chosen.take(trained)
            )

    def _compare(self) -> None:
        assert self._entry is not None
        trained = {name: p.detach() for name, p in self.trained().items() if name in self._entry}
        if self._whole:
            before = [self._entry[name] for name in trained]
            torch._foreach_sub_(before, list(trained.values()))
            moved = dict(zip(trained, lengths(before), strict=True))
        else:
            moved = self._chosen.distances(trained, self._entry)
        self._norms["update_norm"] = moved

    def weights(self) -> None:
        """Takes the norms of the weights, and how far they are from where they began and from before this step."""
        if self._entry is not None:
            self._compare()
        trained = {name: p.detach() for name, p in self.trained().items()}
        for name, p in trained.items():
            if name not in self.first:  # trained only from here on
                self.first |= self._chosen.take({name: p})
        self._norms["weight_norm"] = dict(zip(trained, lengths(list(trained.values())), strict=True))
        self._norms["weight_movement"] = self._chosen.distances(trained, self.first)

    def readings(self) -> list[Reading]:
        """Everything taken since the last call, by component, with one transfer."""
        taken, self._norms, self._entry = self._norms, {}, None
        if any(fetch(one if isinstance(one, Tensor) else torch.tensor(one) for one in self.skips)):
            # The step was passed over, since its gradients had overflown their scale: they say nothing.
            taken = {measure: norms for measure, norms in taken.items() if measure.startswith("weight")}
        names = [(measure, name) for measure, norms in taken.items() for name in norms]
        values = fetch(taken[measure][name] for measure, name in names)
        norms: dict[str, dict[str, float]] = {}
        for (measure, name), value in zip(names, values, strict=True):
            norms.setdefault(measure, {})[name] = value
        found = {measure: by_component(measure, some, self.component) for measure, some in norms.items()}
        out = [reading for some in found.values() for reading in some]
        lengths_ = {reading.site: reading.value for reading in found.get("weight_norm", ())}
        for reading in found.get("update_norm", ()):
            if lengths_.get(reading.site):
                ratio = reading.value / lengths_[reading.site]
                out.append(reading._replace(measure="update_ratio", value=ratio))
        return out


def unwrapped(optimizer: Any) -> Any:
    """The optimizer itself, beneath what accelerate and Lightning wrap around it."""
    while type(optimizer).__name__ in ("AcceleratedOptimizer", "LightningOptimizer"):
        optimizer = getattr(optimizer, "optimizer")  # noqa: B009 - Any
    return optimizer
