"""Baking: constant clamps written into the weights of a copy, which then needs no actome.

Additions become biases of the projections that write into the residual stream, and updates of a linear map its weights.
Projecting a direction out of everything
that is written there becomes an edit of those projections and of the embedding. Whether the copy does what the clamped
model does is not assumed but compared, logit by logit.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from actome.clamps import Project, WeightUpdate
from actome.core.clamp import Clamp
from actome.core.errors import ClampError
from actome.core.sites import MODULE_PREFIX

from .constant import GATES, constant_vectors

if TYPE_CHECKING:
    from actome.core.model import Model

# The configuration's switch that gives a projection its bias, by model type: (of the MLP, of attention).
_SWITCHES = {"llama": ("mlp_bias", "attention_bias"), "actome-subject": ("bias", "bias")}
_PROBE = 64  # tokens on which the copy is compared


@dataclass(frozen=True)
class Baked:
    """A copy with clamps in its weights.

    Attributes:
        module: the copy.
        difference: largest difference of its logits from those of the clamped model, over the logits' spread.
        changed: names of the parameters that differ from the model's.
    """

    module: nn.Module
    difference: float
    changed: tuple[str, ...]

    def save(self, folder: str | Path, tokenizer: Any = None) -> Path:
        """Writes a checkpoint that transformers loads by itself."""
        self.module.save_pretrained(folder)  # type: ignore[operator]
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        return Path(folder)


def bake(model: Model, clamps: Clamp | Sequence[Clamp], *, probe: Any = None, tolerance: float = 1e-3) -> Baked:
    """Writes constant clamps into the weights of a copy and compares the two.

    Args:
        model: a transformers model; it stays as it is.
        clamps: constant additions to the residual stream or to what attention or the MLP writes into it; a
            `WeightUpdate` of a linear map, as `SPLIT` trains it; or a `Project` out of everything that is written
            (``blocks.0.resid.pre`` or ``embed``, ``blocks.*.attn.out`` and ``blocks.*.mlp.out``).
        probe: inputs to compare on; random tokens unless given.
        tolerance: largest difference of logits, over their standard deviation, with which the copy is given out.

    Raises:
        ClampError: a clamp that depends on what flows through; a projection that can have no bias; a copy whose logits
            differ by more, as where a norm stands behind the projection.

    >>> import actome as ac
    >>> model = ac.demo()
    >>> baked = bake(model, ac.Add("blocks.1.resid.post", torch.ones(112), scale=0.1))
    >>> baked.difference < 1e-4, baked.changed
    (True, ('model.layers.1.mlp.down_proj.bias',))
    """
    some = [clamps] if isinstance(clamps, Clamp) else list(clamps)
    if getattr(model.config, "model_type", None) is None or not hasattr(model.module, "save_pretrained"):
        raise ClampError(f"{model.name} is not a transformers model; there is no plain checkpoint to write it into")
    bases = _bases(model, [clamp for clamp in some if isinstance(clamp, Project)])
    vectors = constant_vectors(model, [clamp for clamp in some if not isinstance(clamp, (Project, WeightUpdate))])
    names = {id(part): name for name, part in model.module.named_modules()}
    biases = [(*_writer(model, site, names), vector) for site, vector in vectors.items()]
    weights = []
    for one in some:
        if isinstance(one, WeightUpdate):
            name, part, weight, bias = _updated(model, one, names)
            weights += [(name, weight)] if weight is not None else []
            biases += [(name, part, bias)] if bias is not None else []
    module = _copy(model, biases)
    changed: list[str] = []
    with torch.no_grad():
        for name, _, vector in biases:
            projection = module.get_submodule(name)
            projection.bias += vector.to(projection.bias)
            changed.append(f"{name}.bias")
        for name, weight in weights:
            projection = module.get_submodule(name)
            # transformers' Conv1D keeps its weight the other way round.
            projection.weight += (weight if isinstance(projection, nn.Linear) else weight.T).to(projection.weight)
            changed.append(f"{name}.weight")
        if bases:
            _untie(model, module)
        for basis, positions in bases:
            changed += _without(model, module, basis, positions, names)
    difference = _compare(model, module, some, probe)
    if not difference <= tolerance:
        raise ClampError(
            f"the copy's logits differ from the clamped model's by {difference:.2g} of their spread: in a "
            f"{type(model.module).__name__} this clamp cannot be written into weights. "
            "Serve it, or write a control vector"
        )
    return Baked(module.eval(), difference, tuple(dict.fromkeys(changed)))


def _writer(model: Model, site: str, names: dict[int, str]) -> tuple[str, str]:
    """The projection whose bias adds to a place of the residual stream, and whether of the MLP or of attention."""
    match = re.fullmatch(r"blocks\.(\d+)\.(resid\.pre|resid\.mid|resid\.post|attn\.out|mlp\.out)", site)
    if match is None:
        raise ClampError(f"{site} is not a place where a projection writes into the residual stream")
    layer, place = int(match.group(1)), match.group(2)
    if place == "resid.pre":
        layer -= 1
        if layer < 0:
            raise ClampError(f"{site}: nothing but the embedding writes there, and it has no bias")
    part = "attn" if place in ("resid.mid", "attn.out") else "mlp"
    source = model.table[f"blocks.{layer}.{'attn.z' if part == 'attn' else 'mlp.act'}"]
    return names[id(source.address.module)], part  # type: ignore[attr-defined]


def _updated(model: Model, clamp: WeightUpdate, names: dict[int, str]) -> tuple[str, str, Tensor | None, Tensor | None]:
    """The linear map that an update is of, whether of the MLP or of attention, and what its weight and bias gain."""
    gates = [gate for gate in ("units", *GATES) if getattr(clamp, gate) is not None]
    if gates:
        raise ClampError(f"this WeightUpdate applies only at some {', '.join(gates)}, which weights cannot say")
    if clamp.site.startswith(MODULE_PREFIX):
        name = clamp.site.removeprefix(MODULE_PREFIX)
        if clamp.reads and clamp.read != f"{clamp.site}@in":
            raise ClampError(f"{clamp.site} reads {clamp.read} and not its own input; such an update is no edit of it")
        part = ""
    else:
        name, part = _writer(model, clamp.site, names)
        own = clamp.site.removesuffix("out") + ("z" if part == "attn" else "act")
        if not clamp.site.endswith(".out") or (clamp.reads and clamp.read != own):
            raise ClampError(f"{clamp.site} reading {clamp.read} is no edit of one linear map; that of {own} would be")
    weight = clamp.weight if clamp.up is None or clamp.down is None else clamp.up.float() @ clamp.down.float()
    return (
        name,
        part,
        None if weight is None else clamp.scale * weight.float(),
        None if clamp.bias is None else clamp.scale * clamp.bias.float(),
    )


def _copy(model: Model, biases: Sequence[tuple[str, str, Tensor]]) -> nn.Module:
    """A copy in which the projections have biases."""
    lacking = {part for name, part, _ in biases if getattr(model.module.get_submodule(name), "bias", None) is None}
    if not lacking:
        return copy.deepcopy(model.module)
    kind = getattr(model.config, "model_type", "")
    if kind not in _SWITCHES or "" in lacking:
        raise ClampError(
            f"the projections of a {kind} have no bias and its configuration cannot give them one; serve the clamp, or "
            "write a control vector"
        )
    config = copy.deepcopy(model.config)
    for part in lacking:
        setattr(config, _SWITCHES[kind][part == "attn"], True)
    module = type(model.module)(config).to(device=model.device, dtype=model.dtype)
    missing, surplus = module.load_state_dict(model.module.state_dict(), strict=False)
    strange = [name for name in missing if not name.endswith(".bias")]
    if strange or surplus:
        raise ClampError(f"a {kind} with biases has other weights too: {', '.join([*strange, *surplus][:4])}")
    with torch.no_grad():
        for name in missing:
            module.get_parameter(name).zero_()
    return module


def _bases(model: Model, clamps: Sequence[Project]) -> list[tuple[Tensor, bool]]:
    """The directions that are taken out, (directions, d_model), and whether of embedded positions too.

    Raises:
        ClampError: what is taken out at some places would be written again at others.
    """
    groups: list[tuple[Tensor, set[str]]] = []
    for clamp in clamps:
        if clamp.which != "out" or any(getattr(clamp, gate) is not None for gate in ("units", *GATES)):
            raise ClampError("of projections only those that take directions out, at every token, can be baked")
        sites = {site.name for site in model.match(clamp.site)}
        known = next((one for one in groups if torch.equal(one[0], clamp.basis)), None)
        if known is None:
            groups.append((clamp.basis, sites))
        else:
            known[1].update(sites)
    first = {"embed", "blocks.0.resid.pre"}  # the second has the embedded positions in it, where there are any
    wanted = {f"blocks.{i}.{part}.out" for i in range(model.layers) for part in ("attn", "mlp")}
    for _, sites in groups:
        if sites - first != wanted or len(sites & first) != 1:
            off = sorted((wanted ^ (sites - first)) or (sites & first) or first)
            raise ClampError(
                "a direction can be taken out of the weights only where it is taken out of everything that is written: "
                "at blocks.0.resid.pre (or embed), blocks.*.attn.out and blocks.*.mlp.out, and nowhere else "
                f"(differs at {', '.join(off[:4])})"
            )
    return [(basis, "embed" not in sites) for basis, sites in groups]


def _untie(model: Model, module: nn.Module) -> None:
    """Gives the unembedding weights of its own: only what is written into the stream is edited, not what reads it."""
    embedding, head = module.get_input_embeddings(), module.get_output_embeddings()  # type: ignore[operator]
    if head is not None and head.weight is embedding.weight:
        head.weight = nn.Parameter(embedding.weight.detach().clone())
        module.config.tie_word_embeddings = False  # type: ignore[union-attr]


def _without(model: Model, module: nn.Module, basis: Tensor, positions: bool, names: dict[int, str]) -> list[str]:
    """Takes directions out of all that is written into the residual stream; the parameters that changed."""
    width = model.d_model
    if basis.shape[-1] != width:
        raise ClampError(f"the basis has width {basis.shape[-1]}, the residual stream {width}")
    changed = []

    def take_out(name: str, weight: Tensor, axis: int) -> None:
        rows = weight.movedim(axis, -1)
        inside = (rows.float() @ basis.to(rows.device).T) @ basis.to(rows.device)
        rows -= inside.to(rows.dtype)
        changed.append(name)

    tokens = module.get_input_embeddings()  # type: ignore[operator]
    for name, part in module.named_modules():
        if part is tokens or (positions and isinstance(part, nn.Embedding) and part.embedding_dim == width):
            take_out(f"{name}.weight", part.weight, -1)
    for layer in range(model.layers):
        for place in ("attn.z", "mlp.act"):
            name = names[id(model.table[f"blocks.{layer}.{place}"].address.module)]  # type: ignore[attr-defined]
            part = module.get_submodule(name)
            # transformers' Conv1D keeps its weight the other way round.
            take_out(f"{name}.weight", part.weight, 0 if isinstance(part, nn.Linear) else -1)  # type: ignore[arg-type]
            if getattr(part, "bias", None) is not None:
                take_out(f"{name}.bias", part.bias, -1)  # type: ignore[arg-type]
    return changed


def _compare(model: Model, module: nn.Module, clamps: Sequence[Clamp], probe: Any) -> float:
    if probe is None:
        size = int(model.info["vocab"])
        probe = torch.randint(size, (2, _PROBE // 2), generator=torch.Generator().manual_seed(0))
    arguments, _, mask = model.arguments(probe)
    with model.clamp(*clamps), torch.no_grad():
        wanted = model.module(**arguments).logits.float()
    with torch.no_grad():
        got = module.eval()(**arguments).logits.float()
    if mask is not None:
        wanted, got = wanted[mask], got[mask]
    return float((wanted - got).abs().max() / wanted.std())
