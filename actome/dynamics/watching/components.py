"""Components: the parameters of a network in groups that a person knows, named like its sites.

`embed`, `blocks.2.attn`, `blocks.2.mlp`, `blocks.2.norm`, `final_norm`, `unembed`; for a network without named sites
the paths of its modules.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from actome.core.model import Model


def components(model: Model) -> dict[str, str]:
    """For each parameter, by its name in the module, the component that it belongs to.

    A parameter belongs to the attention, MLP or mixture in whose module it lies, else to its block's ``norm`` or
    ``other``, else to the ``embed``, ``final_norm`` or ``unembed`` it is part of. What the sites do not tell goes by
    its module's path, up to the last numbered part if there is one: ``layer3.0`` for ``layer3.0.conv1.weight``.

    >>> import actome as ac
    >>> found = components(ac.demo())
    >>> list(dict.fromkeys(found.values()))[:4], set(found.values()) & {"final_norm"}
    (['embed', 'blocks.0.attn', 'blocks.0.mlp', 'blocks.0.norm'], {'final_norm'})
    """
    module = model.module
    places = _places(model)
    # Blocks whose MLP is no module of its own, so that its projections lie in the block itself.
    loose = {site.name.removesuffix(".mlp.act") for site in model.table if site.name.endswith(".mlp.act")}
    loose -= {name.removesuffix(".mlp") for name in places.values()}
    return {name: _component(name, module, places, loose) for name, _ in module.named_parameters()}


def _places(model: Model) -> dict[str, str]:
    """For the path of a module the component that its parameters are, as far as the sites tell."""
    paths = {one: path for path, one in model.module.named_modules()}
    found: dict[str, str] = {}
    for site in model.table:
        point = site.address
        owner = getattr(getattr(point, "seam", point), "module", None)
        path = paths.get(owner) if isinstance(owner, nn.Module) else None
        if not path or getattr(point, "side", "out") == "in":
            continue
        name = re.sub(r"\.(out|q|k|v|z|scores|pattern|router|weights|chosen|experts)$", "", site.name)
        # The block itself is what its residual stream comes out of; what lies deeper is said by the other sites.
        name = re.sub(r"\.resid\.(pre|mid|post)$", "", name)
        # A projection within an attention or MLP, such as the gate, belongs to the whole of it.
        name = re.sub(r"\.(mlp|attn|moe|cross|mixer)\..*$", r".\1", name)
        if path not in found or len(name) < len(found[path]):
            found[path] = name
    head = getattr(model.module, "get_output_embeddings", lambda: None)()
    if head is not None and head in paths:
        found.setdefault(paths[head], "unembed")
    return found


def _component(name: str, module: nn.Module, places: Mapping[str, str], loose: Collection[str]) -> str:
    path = name.rpartition(".")[0]
    parts = path.split(".") if path else []
    for end in range(len(parts), 0, -1):
        found = places.get(".".join(parts[:end]))
        if found is None:
            continue
        if re.search(r"(^|\.)blocks\.\d+$", found):
            kind = type(module.get_submodule(path)).__name__
            rest = "mlp" if found in loose else "other"
            return f"{found}.{'norm' if 'norm' in kind.lower() else rest}"
        return found
    numbered = [i for i, part in enumerate(parts) if part.isdigit()]
    # A parameter of the root itself has no module's path; its own name is all there is.
    return ".".join(parts[: numbered[-1] + 1] if numbered else parts) or name
