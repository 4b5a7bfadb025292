"""The network beneath what training wraps around it."""

from __future__ import annotations

from typing import Any

from torch import nn

from actome.core.errors import RunError

# Their forward is that of what they hold; by name, so that no library is imported to look for it.
_WRAPPERS = {"DistributedDataParallel": "module", "DataParallel": "module", "OptimizedModule": "_orig_mod"}
_SHARDED = ("FullyShardedDataParallel", "FSDPModule", "DeepSpeedEngine")


def unwrap(module: nn.Module) -> nn.Module:
    """The module that `torch.compile`, data parallelism and PEFT wrap, in whichever order.

    A PEFT model gives its base model, which the adapters are part of: its sites are those of the base, and the
    adapters' weights are among its parameters.

    Raises:
        RunError: parameters are split over processes (FSDP, DeepSpeed), so that no process can read the network.

    >>> unwrap(nn.DataParallel(nn.Linear(2, 3)))
    Linear(in_features=2, out_features=3, bias=True)
    """
    while True:
        kinds = {kind.__name__ for kind in type(module).__mro__}
        inner: Any = next((getattr(module, at) for kind, at in _WRAPPERS.items() if kind in kinds), None)
        if inner is None and hasattr(module, "get_base_model") and hasattr(module, "peft_config"):
            inner = module.get_base_model()
        if inner is None or inner is module:
            break
        module = inner
    sharded = next((kind for kind in _SHARDED if kind in {k.__name__ for k in type(module).__mro__}), None)
    if sharded is None and any(type(p).__name__ == "DTensor" for p in module.parameters()):
        sharded = "parameters that are DTensors"
    if sharded is not None:
        raise RunError(
            f"{type(module).__name__} has its weights split over processes ({sharded}), and watching one is not "
            "supported: every process must hold the whole network, as under DistributedDataParallel"
        )
    return module
