"""That a look at a network in training leaves no trace in it."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from actome.core.prove import evaluating


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """A block in which the module may run forwards, after which training goes on as if it had not.

    Within it the module is in evaluation mode and nothing asks for gradients. Afterwards every module has its own mode
    again, every buffer its values, and the generators of torch (on every device in use), numpy and Python stand where
    they stood.

    >>> net = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout())
    >>> with untouched(net):
    ...     _ = torch.rand(3), net(torch.rand(4, 2))
    >>> int(net[0].num_batches_tracked), net.training
    (0, True)
    """
    devices = {p.device for p in module.parameters() if p.device.type not in ("cpu", "meta")}
    generators = [(torch.get_device_module(d), () if d.type == "mps" else (d,)) for d in devices]
    state, more = torch.get_rng_state(), [one.get_rng_state(*where) for one, where in generators]
    python, numpy = random.getstate(), sys.modules.get("numpy")
    numpys = None if numpy is None else numpy.random.get_state()
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    owners = [(one, dict(one._buffers)) for one in module.modules() if one._buffers]
    try:
        with evaluating(module), torch.no_grad():
            yield
    finally:
        torch.set_rng_state(state)
        for (one, where), before in zip(generators, more, strict=True):
            one.set_rng_state(before, *where)
        random.setstate(python)
        if numpys is not None:
            numpy.random.set_state(numpys)
        with torch.no_grad():
            # Casts made without gradients must not be found by a forward that wants some, within one autocast.
            torch.clear_autocast_cache()
            for buffer, before in buffers:
                # Written to only where it changed, so that whoever counts versions sees none.
                if not _same(buffer, before):
                    buffer.copy_(before)
        for one, held in owners:
            for name, buffer in held.items():
                if one._buffers.get(name) is not buffer:
                    one._buffers[name] = buffer


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a, b) if not a.is_floating_point() else torch.equal(a.nan_to_num(), b.nan_to_num())
