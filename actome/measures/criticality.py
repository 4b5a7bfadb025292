"""Which layers a model needs: put one module back to its initial state at a time, and see how far predictions move."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from ..core.errors import MeasureError, nearest
from ..core.real import wide

if TYPE_CHECKING:
    import pandas as pd

Reset = Literal["init", "zero"]


def layer_criticality(
    model: Any,
    data: Any,
    modules: Sequence[str] | str | None = None,
    *,
    trials: int = 3,
    reset: Reset = "init",
    factory: Callable[[], nn.Module] | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    r"""How much each module of a trained model matters to its predictions.

    The parameters and buffers of one module are replaced by those of a freshly initialised one, everything else stays
    as trained, and the same inputs run again. With :math:`p` and :math:`q` the probabilities of the whole and of the
    changed model,

    .. math:: \text{criticality} = 1 - \operatorname{mean}_x \cos(p(x), q(x))

    0: the module is not needed at all; labels are not needed. Over the inputs (for a sequence model over its real
    tokens). Parameters that are tied to another module's are replaced there too.

    Where the fresh state comes from, so that it is drawn as the model's own was: `factory` when given; for a
    transformers model a new one of its configuration; otherwise a copy of the module through ``reset_parameters``,
    which is torch's default scheme. A model that initialises itself otherwise needs `factory`.

    The wrapped module is never written to: the changed state exists only within `torch.func.functional_call`, and its
    training flags and the global random state are put back.

    Args:
        model: an ``nn.Module`` or an actome model; returns logits (..., class), or an object with ``.logits``.
        data: a tensor of inputs; or batches of inputs, dicts of arguments or (inputs, labels). Batches are
            kept, since they are run once for each module and trial. An ``attention_mask`` (B, T) is respected.
        modules: names or patterns (``"blocks.*.1"``); by default every module that owns parameters itself.
        trials: fresh draws for each module; 1 is enough for ``reset="zero"``, which draws nothing.
        reset: ``"init"`` or ``"zero"``, which sets every parameter to 0 and leaves buffers alone.
        factory: makes a freshly initialised model with the same state names, each time another.

    Returns:
        One row for each module and trial: ``module``, ``depth`` (its place among those measured, 0 to 1), ``trial``,
        ``criticality``, ``l1`` and ``l2`` (mean distances of the probabilities), ``kl`` (mean of
        :math:`\sum p \ln(p/q)` in nats, the cross-entropy beyond the entropy of p), and with labels ``accuracy_drop``.

    Raises:
        MeasureError: a module that does not exist or cannot be initialised anew, no data, logits that are not finite.

    Source: Gavrikov et al. 2024, How Do Training Methods Influence the Utilization of Vision Models?;
    re-initialisation of single modules is Zhang, Bengio and Singer 2019, Are All Layers Created Equal?

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> frame = layer_criticality(net, torch.eye(4), trials=1)
        >>> list(frame["module"]), bool((frame["criticality"] >= 0).all())
        (['0', '2'], True)
    """
    import pandas as pd

    if reset not in ("init", "zero"):
        raise MeasureError(f"reset={reset!r} does not exist; choose 'init' or 'zero'")
    if trials < 1:
        raise MeasureError(f"trials={trials}; at least one is needed")
    net: nn.Module = model if isinstance(model, nn.Module) else model.module
    batches = [data] if isinstance(data, Tensor | Mapping) else list(data)
    if not batches:
        raise MeasureError("there is no data to predict")
    names = _chosen(net, modules)
    rows = []
    with _evaluating(net), torch.no_grad():
        before = [_probabilities(net, {}, batch) for batch in batches]
        for i, name in enumerate(names):
            for trial in range(trials if reset == "init" else 1):
                state = _zeroed(net, name) if reset == "zero" else _fresh(net, name, factory, _seed(seed, i, trial))
                moved = _moved(net, state, batches, before)
                rows.append({"module": name, "depth": i / max(len(names) - 1, 1), "trial": trial, **moved})
    return pd.DataFrame(rows)


def criticality_profile(frame: pd.DataFrame) -> pd.DataFrame:
    """The mean over trials of each module, in the order of depth: one row a module.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> criticality_profile(layer_criticality(net, torch.eye(4), trials=2)).index.tolist()
        ['0', '2']
    """
    return frame.groupby("module", sort=False).mean(numeric_only=True).drop(columns="trial")


def centre_of_gravity(frame: pd.DataFrame) -> float:
    """Where in the depth the criticality lies, 0 the first module and 1 the last; NaN when nothing is critical.

    Example:
        >>> import pandas as pd
        >>> centre_of_gravity(pd.DataFrame({"depth": [0.0, 1.0], "criticality": [0.3, 0.1]}))
        0.25
    """
    weight = frame["criticality"].clip(lower=0)
    return float((frame["depth"] * weight).sum() / weight.sum()) if weight.sum() > 0 else float("nan")


def _seed(*parts: int) -> int:
    """One seed of several numbers, so that each module and trial has draws of its own."""
    import numpy as np

    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def _chosen(net: nn.Module, modules: Sequence[str] | str | None) -> list[str]:
    own = [name for name, one in net.named_modules() if any(p is not None for p in one._parameters.values())]
    if modules is None:
        if not own:
            raise MeasureError(f"{type(net).__name__} has no module with parameters")
        return own
    known = [name for name, one in net.named_modules() if next(one.parameters(), None) is not None]
    found: list[str] = []
    for pattern in [modules] if isinstance(modules, str) else modules:
        hits = [name for name in known if fnmatchcase(name, pattern)]
        if not hits:
            raise MeasureError(f"no module with parameters matches {pattern!r}{nearest(pattern, known)}")
        found += [name for name in hits if name not in found]
    if not found:
        raise MeasureError("modules is empty; give names or patterns, or None for all that have parameters")
    return found


def _under(name: str, states: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    prefix = f"{name}." if name else ""
    return {key: value for key, value in states if key.startswith(prefix)}


def _zeroed(net: nn.Module, name: str) -> dict[str, Tensor]:
    return {key: torch.zeros_like(value) for key, value in _under(name, net.named_parameters()).items()}


def _fresh(net: nn.Module, name: str, factory: Callable[[], nn.Module] | None, seed: int) -> dict[str, Tensor]:
    """Parameters and buffers of a freshly initialised module, under their names in the whole, with dtype and device."""
    wanted = {**_under(name, net.named_parameters()), **_under(name, net.named_buffers())}
    # Seeding seeds every device, so the state of every one of them is put back.
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        if factory is not None or (hasattr(net, "config") and hasattr(net, "from_pretrained")):
            # A configuration is what transformers models are made from; it is never changed by making one.
            new = factory() if factory is not None else type(net)(copy.deepcopy(net.config))
            states = {**dict(new.named_parameters()), **dict(new.named_buffers())}
        else:
            prefix = f"{name}." if name else ""
            module = copy.deepcopy(net.get_submodule(name))
            left = {key.removeprefix(prefix) for key in wanted}
            for path, one in module.named_modules():
                if hasattr(one, "reset_parameters"):
                    one.reset_parameters()
                    inner = f"{path}." if path else ""
                    left -= {inner + key for key in (*dict(one.named_parameters()), *dict(one.named_buffers()))}
            if left:
                raise MeasureError(
                    f"{name or type(net).__name__} holds {', '.join(sorted(left)[:3])}, which no reset_parameters of "
                    "its modules initialises; give factory=, a function that makes a freshly initialised model"
                )
            states = {prefix + key: one for key, one in (*module.named_parameters(), *module.named_buffers())}
    missing = [key for key in wanted if key not in states or states[key].shape != wanted[key].shape]
    if missing:
        raise MeasureError(f"the freshly initialised model has no {missing[0]} of the shape of the trained one")
    return {key: states[key].detach().to(value.device, value.dtype) for key, value in wanted.items()}


def _probabilities(net: nn.Module, state: dict[str, Tensor], batch: Any) -> tuple[Tensor, Tensor | None]:
    """log probabilities (N, class) of the rows that count, and their labels."""
    inputs, labels, mask = batch, None, None
    if isinstance(batch, tuple | list):
        inputs, labels = batch[0], batch[1] if len(batch) > 1 else None
    if isinstance(inputs, Mapping):
        mask = inputs.get("attention_mask")
        out = functional_call(net, state, (), dict(inputs))
    else:
        out = functional_call(net, state, (inputs,))
    logits = wide(getattr(out, "logits", out))
    keep = mask.bool() if mask is not None and mask.shape == logits.shape[:-1] else None
    if keep is not None:
        logits = logits[keep]
        labels = labels[keep] if labels is not None and labels.shape == keep.shape else None
    return logits.reshape(-1, logits.shape[-1]).log_softmax(-1), None if labels is None else labels.reshape(-1)


def _moved(
    net: nn.Module, state: dict[str, Tensor], batches: list[Any], before: list[tuple[Tensor, Tensor | None]]
) -> dict[str, float]:
    totals: dict[str, float] = {}
    rows = 0
    for batch, (old, labels) in zip(batches, before, strict=True):
        new, _ = _probabilities(net, state, batch)
        if bool(old.isnan().any() | new.isnan().any()):
            raise MeasureError("the model gives logits that are not finite, so its predictions cannot be compared")
        p, q = old.double().exp(), new.double().exp()
        part = {
            "criticality": 1 - F.cosine_similarity(p, q, dim=-1),
            "l1": (p - q).abs().sum(-1),
            "l2": (p - q).norm(dim=-1),
            "kl": (p * (old.double() - new.double())).where(p > 0, 0.0).sum(-1),
        }
        if labels is not None:
            part["accuracy_drop"] = (p.argmax(-1) == labels).double() - (q.argmax(-1) == labels).double()
        for key, value in part.items():
            totals[key] = totals.get(key, 0.0) + float(value.sum())
        rows += len(p)
    if not rows:
        raise MeasureError("no row of the data counts")
    return {key: value / rows for key, value in totals.items()}


class _evaluating:
    """Evaluation mode, with the flag of every single module put back afterwards."""

    def __init__(self, net: nn.Module):
        self.net = net

    def __enter__(self) -> None:
        self.flags = [(one, one.training) for one in self.net.modules()]
        self.net.eval()

    def __exit__(self, *error: object) -> None:
        for one, training in self.flags:
            one.training = training
