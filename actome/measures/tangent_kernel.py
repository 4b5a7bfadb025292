"""The tangent kernel of a network on probes: how alike the gradients of its outputs are.

Letters: N probe, C output, R row (an output of a probe), P parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..core.errors import MeasureError, nearest
from ..core.prove import evaluating
from ..core.real import wide

Read = Callable[[Any], Tensor]
MOST = 1024  # outputs of a probe that are taken without being asked for


def tangent_kernel(
    net: Any,
    probes: Tensor | Mapping[str, Any],
    *,
    outputs: int | Sequence[int] | None = None,
    parameters: str | Sequence[str] | None = None,
    read: Read | None = None,
    per: Literal["probe", "output"] = "probe",
    seed: int = 0,
    memory: int = 2**26,
) -> Tensor:
    r"""The empirical neural tangent kernel, :math:`K = J J^\top` with :math:`J = \partial f / \partial \theta`.

    With :math:`f_c(x_n)` an output of a probe,

    .. math:: K_{(n c)(m d)} = \nabla_\theta f_c(x_n) \cdot \nabla_\theta f_d(x_m)

    and ``per="probe"`` sums over equal outputs, :math:`K_{nm} = \sum_c K_{(n c)(m c)}`. To compare two states of a
    network, take the same probes, outputs and seed for both.

    In evaluation mode and probe by probe, so that probes do not meet in a batch; parameter after parameter, so that
    never more than about `memory` numbers of J exist. The network is not written to. Products are in float32 or better,
    gradients in the network's dtype.

    Args:
        net: an ``nn.Module`` or an actome model.
        probes: a tensor of inputs, or a mapping of arguments of the forward; everything that is a tensor with as many
            rows as the first is cut into rows.
        outputs: which of a probe's outputs, as its flattened output counts them; or how many, drawn with `seed`; all
            by default, up to 1024. The cost goes with their number.
        parameters: names or patterns of parameters; by default all that ask for a gradient.
        read: of the forward's result, the outputs of one probe, (1, ...); by default ``.logits``, or the tensor itself.
            For sequences choose a position, such as ``lambda out: out.logits[:, -1]``.
        per: ``"probe"`` or ``"output"``.
        seed: of the drawn outputs.
        memory: largest piece of J, in numbers.

    Returns:
        float32 (float64 for float64 networks): (probe, probe), or (probe * output, probe * output) with the outputs of
        a probe together.

    Raises:
        MeasureError: no probes, outputs or parameters that there are not, gradients that are not finite.

    Source: Jacot, Gabriel and Hongler 2018, Neural Tangent Kernel.

    Example:
        >>> net = nn.Linear(3, 1)
        >>> tangent_kernel(net, torch.eye(3))           # x_n . x_m, and 1 for the bias
        tensor([[2., 1., 1.],
                [1., 2., 1.],
                [1., 1., 2.]])
    """
    if per not in ("probe", "output"):
        raise MeasureError(f"per={per!r} does not exist; choose 'probe' or 'output'")
    module: nn.Module = net if isinstance(net, nn.Module) else net.module
    rows = list(_rows(module, probes))
    names = _chosen(module, parameters)
    # Only plain attention can be differentiated for many outputs at once.
    with evaluating(module), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        run = _Outputs(module, read or _logits)
        count = run({}, rows[0]).numel()
        taken = _taken(count, outputs, seed)
        sizes = {name: module.get_parameter(name).numel() for name in names}
        height = len(rows) * len(taken)
        weight = module.get_parameter(names[0])
        kernel_RR = torch.zeros(height, height, dtype=wide(weight.detach().flatten()[:0]).dtype, device=weight.device)
        for group in _groups(sizes, memory // max(height, 1)):
            step = max(1, memory // (2 * len(taken) * sum(sizes[name] for name in group)))  # two pieces at a time
            parts = [slice(at, at + step) for at in range(0, len(rows), step)]
            for i, part in enumerate(parts):
                left = _jacobian(run, rows[part], group, taken)
                for other in parts[i:]:
                    right = left if other is part else _jacobian(run, rows[other], group, taken)
                    at, to = _outputs_of(part, len(taken), height), _outputs_of(other, len(taken), height)
                    product = left @ right.T
                    kernel_RR[at, to] += product
                    if other is not part:
                        kernel_RR[to, at] += product.T
    if not bool(kernel_RR.isfinite().all()):
        raise MeasureError("gradients of the outputs are not finite at some probe, so there is no kernel")
    if per == "output":
        return kernel_RR
    return kernel_RR.unflatten(0, (len(rows), -1)).unflatten(2, (len(rows), -1)).diagonal(dim1=1, dim2=3).sum(-1)


class _Outputs:
    """The flattened outputs of one probe, as a function of some parameters; all others stay as they are."""

    def __init__(self, module: nn.Module, read: Read):
        self.module, self.read = module, read

    def __call__(self, parameters: Mapping[str, Tensor], row: Any) -> Tensor:
        args, kwargs = ((), row) if isinstance(row, Mapping) else ((row,), {})
        return self.read(functional_call(self.module, dict(parameters), args, dict(kwargs))).flatten()


def _jacobian(run: _Outputs, rows: Sequence[Any], names: Sequence[str], taken: Tensor) -> Tensor:
    """(probe * output, parameter) of some parameters, float32 or better."""
    parameters = {name: run.module.get_parameter(name).detach() for name in names}
    out = []
    for row in rows:
        values, back = vjp(lambda given, row=row: run(given, row)[taken], parameters)
        (gradients,) = vmap(back)(torch.eye(len(values), dtype=values.dtype, device=values.device))
        out.append(torch.cat([wide(gradients[name]).flatten(1) for name in names], 1))
    return torch.cat(out)


def _outputs_of(rows: slice, each: int, height: int) -> slice:
    return slice(rows.start * each, min(rows.stop * each, height))


def _groups(sizes: Mapping[str, int], most: int) -> Iterator[list[str]]:
    """Names in their order, as many together as hold at most so many numbers; a larger one alone.

    >>> list(_groups({"a": 3, "b": 4, "c": 20, "d": 1}, 8))
    [['a', 'b'], ['c'], ['d']]
    """
    group: list[str] = []
    for name, size in sizes.items():
        if group and sum(sizes[one] for one in group) + size > most:
            yield group
            group = []
        group.append(name)
    yield group


def _rows(module: nn.Module, probes: Tensor | Mapping[str, Any]) -> Iterator[Any]:
    """One probe after the other, each as a batch of one."""
    device = next((one.device for one in module.parameters()), torch.device("cpu"))
    tensors = {"": probes} if isinstance(probes, Tensor) else dict(probes)
    count = next((len(one) for one in tensors.values() if isinstance(one, Tensor) and one.ndim), 0)
    if not count:
        raise MeasureError("no probes; give a tensor of inputs, or a mapping with one, one row at least")
    for i in range(count):
        row = {
            key: one[i : i + 1].to(device) if isinstance(one, Tensor) and one.ndim and len(one) == count else one
            for key, one in tensors.items()
        }
        yield row[""] if isinstance(probes, Tensor) else row


def _taken(count: int, outputs: int | Sequence[int] | None, seed: int) -> Tensor:
    if outputs is None:
        if count > MOST:
            raise MeasureError(
                f"a probe has {count} outputs, each of which costs a backward pass; draw some (outputs=16), or "
                "choose with read=, such as one position and a few classes"
            )
        return torch.arange(count)
    if isinstance(outputs, int):
        if not 1 <= outputs <= count:
            raise MeasureError(f"outputs={outputs}: a probe has {count}, so draw 1 to {count} of them")
        return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:outputs].sort().values
    wrong = [one for one in outputs if not -count <= one < count]
    if wrong or not len(outputs):
        raise MeasureError(f"outputs {wrong or '[]'}: a probe has {count}, counted from 0; give one at least")
    return torch.tensor(list(outputs))


def _chosen(module: nn.Module, patterns: str | Sequence[str] | None) -> list[str]:
    known = [name for name, one in module.named_parameters() if one.requires_grad]
    if patterns is None:
        if not known:
            raise MeasureError(f"no parameter of this {type(module).__name__} asks for a gradient; name some")
        return known
    return parameters_named([name for name, one in module.named_parameters() if one.is_floating_point()], patterns)


def parameters_named(known: Collection[str], patterns: str | Sequence[str]) -> list[str]:
    """The names that go by some patterns, each once.

    Raises:
        MeasureError: a pattern that no parameter goes by, with the nearest that there are.

    >>> parameters_named(["a.weight", "a.bias", "b.weight"], ["*.weight", "a.*"])
    ['a.weight', 'b.weight', 'a.bias']
    """
    found: dict[str, None] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        hits = [name for name in known if fnmatchcase(name, pattern)]
        if not hits:
            raise MeasureError(f"no parameter goes by {pattern!r}{nearest(pattern, known)}")
        found.update(dict.fromkeys(hits))
    return list(found)


def _logits(out: Any) -> Tensor:
    out = getattr(out, "logits", out)
    if not isinstance(out, Tensor):
        raise MeasureError(f"the forward gives {type(out).__name__}; say with read= which tensor its outputs are")
    return out
