"""Units that may change places without changing what a network computes: hidden units, channels, heads.

A `Group` says along which axes of which parameters its units lie. Groups are guessed from the structure of a module and
then *proved*: what is offered left the outputs of a forward as they were when its units were shuffled.

Letters: U unit of a group, I, J entries along an axis.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from ..core.errors import MeasureError
from ..core.model import Model
from ..core.prove import evaluating, probe_inputs

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Axis:
    """One axis along which the units of a group lie, of size ``repeats * units * block``.

    Attributes:
        name: of a parameter or buffer.
        dim: which of its dims.
        block: neighbouring entries that belong to one unit, such as the width of a head.
        repeats: how often all units come after one another, such as 3 for queries, keys and values in one.
    """

    name: str
    dim: int
    block: int = 1
    repeats: int = 1

    def index(self, order_U: Tensor) -> Tensor:
        """Where each entry of the permuted axis comes from.

        >>> Axis("w", 0, block=2).index(torch.tensor([1, 0]))
        tensor([2, 3, 0, 1])
        """
        size = self.repeats * len(order_U) * self.block
        return torch.arange(size).view(self.repeats, -1, self.block)[:, order_U.cpu()].flatten()


@dataclass(frozen=True)
class Group:
    """Units that may be permuted together.

    Attributes:
        name: the module that reads them.
        units: how many.
        axes: where they lie.
        site: path of a module whose input holds them, for matching by activations; ``None`` when there is none.
        dim: the dim of that input.
    """

    name: str
    units: int
    axes: tuple[Axis, ...]
    site: str | None = None
    dim: int = -1


def permutation_groups(net: nn.Module | Model, example: Any = None) -> list[Group]:
    """The groups of units of a network that may be permuted, each proved by a forward.

    Of a transformers model the hidden units of each MLP and the heads of each attention (with grouped queries: the
    groups), where their maps are plain linear modules, gated and fused ones among them. Of any other module the outputs
    of a linear or convolutional layer that the next one reads, with the norm between them. Units that a residual stream
    connects are not among them, nor are experts, nor recurrent states; describe such with `Group`.

    Args:
        net: the network.
        example: an input, or a mapping of arguments; needed for all but transformers models.

    Raises:
        MeasureError: no example, or an input on which the network gives nothing finite.

    >>> from actome.tasks.nets import MLP
    >>> [(one.name, one.units) for one in permutation_groups(MLP([4, 8, 6, 2]), torch.eye(4))]
    [('linear.1', 8), ('linear.2', 6)]
    """
    model = net if isinstance(net, Model) else Model(net, example=example)
    module = model.module
    named = [site for site in model.table if site.name.endswith((".attn.z", ".mlp.act"))]
    if example is None:
        try:
            example = probe_inputs(module)
        except (LookupError, AttributeError):
            raise MeasureError(f"give an example of what {type(module).__name__} takes, to prove groups on") from None
    guesses = _of_sites(model, named) if named else _of_a_chain(module)
    found: list[Group] = []
    with evaluating(module), torch.no_grad():
        before = forward(module, example)
        if not bool(before.isfinite().all()):
            raise MeasureError("the outputs of the example are not finite, so no permutation can be proved on it")
        for guess in guesses:
            if guess.name not in {one.name for one in found} and _proved(module, guess, example, before):
                found.append(guess)
    return found


def permuted(weights: Weights, groups: Sequence[Group], orders: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state in which unit u of each group is what was unit ``orders[name][u]``; what no group holds is shared."""
    out = dict(weights)
    for group in groups:
        for axis in group.axes:
            if axis.name in out:
                index = axis.index(orders[group.name]).to(out[axis.name].device)
                out[axis.name] = out[axis.name].index_select(axis.dim, index)
    return out


def forward(module: nn.Module, inputs: Any) -> Tensor:
    """The outputs for a tensor or a mapping of arguments: ``.logits``, or the tensor itself."""
    out = module(**inputs) if isinstance(inputs, Mapping) else module(inputs)
    out = getattr(out, "logits", out)
    if not isinstance(out, Tensor):
        raise MeasureError(f"{type(module).__name__} gives {type(out).__name__}; neither a tensor nor logits")
    return out


def check_groups(module: nn.Module, groups: Sequence[Group]) -> None:
    """Refuses groups that do not fit a module.

    Raises:
        MeasureError: an axis that does not exist, or that has another size than the group's units make.
    """
    state = module.state_dict()
    for group in groups:
        for axis in group.axes:
            if axis.name not in state:
                raise MeasureError(f"group {group.name!r}: there is no parameter or buffer {axis.name!r}")
            size, wanted = state[axis.name].shape[axis.dim], axis.repeats * group.units * axis.block
            if size != wanted:
                raise MeasureError(
                    f"group {group.name!r}: dim {axis.dim} of {axis.name} has {size} entries, and "
                    f"{axis.repeats} x {group.units} units x {axis.block} make {wanted}"
                )


def _proved(module: nn.Module, group: Group, example: Any, before: Tensor) -> bool:
    """Whether shuffled units change nothing, next to what it changes when the module that reads them is left out."""
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    order = torch.randperm(group.units, generator=torch.Generator().manual_seed(group.units)).roll(1)
    if bool((order == torch.arange(group.units)).all()):
        order = order.roll(1)
    changes = []
    for part in (group.axes, [axis for axis in group.axes if not axis.name.startswith(f"{group.name}.")]):
        partly = Group(group.name, group.units, tuple(part))
        moved = {axis.name: state[axis.name] for axis in group.axes}
        new = permuted(moved, [partly], {group.name: order})
        arguments = ((), dict(example)) if isinstance(example, Mapping) else ((example,), {})
        after = functional_call(module, new, *arguments)
        after = getattr(after, "logits", after)
        changes.append(float((after.float() - before.float()).abs().max()))
    return changes[0] <= 0.01 * changes[1]


def _of_sites(model: Model, sites: Sequence[Any]) -> Iterator[Group]:
    """Heads and hidden units of a transformer, from what the proved sites know: who reads them, and how many."""
    paths = {module: name for name, module in model.module.named_modules()}
    for site in sites:
        reader = getattr(site.address, "module", None)
        if reader is None or _widths(reader) is None:
            continue
        name = paths[reader]
        parent = model.module.get_submodule(name.rpartition(".")[0])
        inputs = _widths(reader)[0]
        units = inputs
        if site.name.endswith(".attn.z"):
            keys = model.match(site.name.removesuffix("z") + "k")[0]
            units = keys.size("kv_head") or keys.size("head") or site.size("head")
        if not units or inputs % units:
            continue
        makers = [
            (f"{name.rpartition('.')[0]}.{child}", one)
            for child, one in parent.named_children()
            if one is not reader and _widths(one) is not None and _widths(one)[1] % units == 0
        ]
        read = Axis(f"{name}.weight", _dims(reader)[0], inputs // units)
        for fused in (False, True):
            axes = [read]
            for path, one in makers:
                each = _widths(one)[1] // units
                repeats = each * units // inputs if fused and each * units % inputs == 0 else 1
                axes += _written(path, one, each // repeats, repeats)
            yield Group(name, units, tuple(axes), name)


def _of_a_chain(module: nn.Module) -> Iterator[Group]:
    """Layers in the order in which they were registered, each read by the next."""
    maker: tuple[str, nn.Module] | None = None
    norms: list[Axis] = []
    for name, one in module.named_modules():
        if isinstance(one, _BatchNorm | nn.LayerNorm):
            if maker is not None:
                norms += [Axis(f"{name}.{key}", 0) for key, value in one.state_dict().items() if value.ndim == 1]
        elif (widths := _widths(one)) is not None:
            if maker is not None and widths[0] % (units := _widths(maker[1])[1]) == 0:
                read = Axis(f"{name}.weight", _dims(one)[0], widths[0] // units)
                made = _written(*maker, 1, 1)
                dim = -1 if isinstance(one, nn.Linear) else 1
                yield Group(name, units, (*made, *norms, read), name, dim)
            maker, norms = (name, one), []


def _written(path: str, module: nn.Module, block: int, repeats: int) -> list[Axis]:
    bias = [Axis(f"{path}.bias", 0, block, repeats)] if module.bias is not None else []
    return [Axis(f"{path}.weight", _dims(module)[1], block, repeats), *bias]


def _widths(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a map whose weight is a plain matrix or kernel."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, _ConvNd):
        return (module.in_channels, module.out_channels) if module.groups == 1 and not module.transposed else None
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # the linear map of GPT-2
        return module.weight.shape[0], module.weight.shape[1]
    return None


def _dims(module: nn.Module) -> tuple[int, int]:
    """The dims of the weight along which inputs and outputs lie."""
    return (0, 1) if type(module).__name__ == "Conv1D" else (1, 0)


def copied(module: nn.Module, state: Weights) -> nn.Module:
    """A copy of a module with another state."""
    out = copy.deepcopy(module)
    out.load_state_dict(dict(state))
    return out
