"""GGUF control vectors: how llama.cpp and its like are given a direction to add.

The format holds one vector a layer, added to what the layer writes into the residual stream. It has no place for the
first layer: `direction.1` is the earliest.

Source: gguf, `general.architecture = controlvector`, as read by llama.cpp (`--control-vector`) and written by repeng.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from actome.clamps import Add
from actome.core.clamp import Clamp
from actome.core.errors import ClampError

from .constant import constant_vectors

if TYPE_CHECKING:
    from actome.core.model import Model

_ARCHITECTURE = "controlvector"


def to_gguf(path: str | Path, model: Model, clamps: Clamp | Sequence[Clamp], *, hint: str | None = None) -> Path:
    """Writes constant additions as a control vector, strength included: load it with a scale of 1.

    Args:
        path: the file.
        model: whose residual stream the clamps add to.
        clamps: additions at ``blocks.I.resid.post`` (or at ``blocks.I+1.resid.pre``, which is the same place).
        hint: the architecture that a runtime may look at; the model's ``model_type`` unless given.

    Raises:
        ClampError: a clamp that is not a constant addition, at another place, or after the first layer.
        ImportError: without the extra ``actome[gguf]``.

    >>> import actome as ac, tempfile
    >>> model = ac.demo()
    >>> file = to_gguf(f"{tempfile.mkdtemp()}/v.gguf", model, ac.Add("blocks.2.resid.post", torch.ones(112)))
    >>> from_gguf(file, model)[0].site
    'blocks.2.resid.post'
    """
    gguf = _package()
    by_layer: dict[int, torch.Tensor] = {}
    for site, vector in constant_vectors(model, clamps).items():
        layer = _layer(site)
        if layer < 1:
            raise ClampError(
                f"{site}: a control vector has no place for what the first layer writes; steer a later one"
            )
        by_layer[layer] = by_layer.get(layer, torch.zeros_like(vector)) + vector
    kind = hint or getattr(model.config, "model_type", None) or model.family
    try:
        writer = gguf.GGUFWriter(str(path), _ARCHITECTURE)
        writer.add_string(f"{_ARCHITECTURE}.model_hint", kind)
        writer.add_uint32(f"{_ARCHITECTURE}.layer_count", len(by_layer))
        for layer in sorted(by_layer):
            writer.add_tensor(f"direction.{layer}", by_layer[layer].numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    except OSError as error:
        raise ClampError(f"{path} cannot be written: {error}") from error
    return Path(path)


def from_gguf(path: str | Path, model: Model | None = None, *, scale: float = 1.0) -> list[Add]:
    """The additions of a control vector, one a layer, also of files that others wrote.

    Args:
        path: the file.
        model: what they are for; widths and layers are then looked at now.
        scale: multiplies all.

    Raises:
        ClampError: not a control vector, a damaged file, or one for another model.
        ImportError: without the extra ``actome[gguf]``.
    """
    gguf = _package()
    if not Path(path).is_file():
        raise ClampError(f"there is no file {path}")
    try:
        reader = gguf.GGUFReader(str(path))
    except (ValueError, OSError, IndexError, KeyError) as error:
        raise ClampError(f"{path} is not a GGUF file, or it is damaged: {error}") from None
    field = reader.get_field("general.architecture")
    kind = None if field is None else field.contents()
    if kind != _ARCHITECTURE:
        raise ClampError(f"{path} holds {kind or 'no architecture'}, not a control vector")
    clamps = []
    for tensor in reader.tensors:
        match = re.fullmatch(r"direction\.(\d+)", tensor.name)
        if match is None:
            raise ClampError(f"{path}: a tensor {tensor.name!r} is no direction of a control vector")
        layer, vector = int(match.group(1)), torch.from_numpy(tensor.data.copy()).float()
        if model is not None and (layer >= model.layers or len(vector) != model.d_model):
            raise ClampError(
                f"{path}: a direction of width {len(vector)} at layer {layer}; {model.name} has {model.layers} layers "
                f"of width {model.d_model}"
            )
        clamps.append(Add(f"blocks.{layer}.resid.post", vector, scale=scale))
    if not clamps:
        raise ClampError(f"{path} holds no direction")
    return clamps


def _layer(site: str) -> int:
    match = re.fullmatch(r"blocks\.(\d+)\.resid\.(pre|post)", site)
    if match is None:
        raise ClampError(f"{site}: a control vector is added to the residual stream after a layer, blocks.I.resid.post")
    return int(match.group(1)) - (match.group(2) == "pre")


def _package() -> Any:
    try:
        import gguf
    except ImportError:
        raise ImportError("GGUF files need the package gguf: pip install 'actome[gguf]'") from None
    return gguf
