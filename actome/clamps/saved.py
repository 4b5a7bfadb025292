"""Clamps on disk: a safetensors file for their tensors with a JSON beside it, readable without actome."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..core.clamp import Clamp, When
from ..core.errors import ClampError, nearest_beside

if TYPE_CHECKING:
    from ..core.model import Model

FORMAT, VERSION = "actome-clamps", 1
_HEADER, _TENSORS = "clamps.json", "clamps.safetensors"
_PLAIN = (bool, int, float, str)


def save_clamps(
    path: str | os.PathLike[str],
    clamps: Clamp | Sequence[Clamp],
    *,
    model: Model | None = None,
    about: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes clamps into a folder: `clamps.json` says what they are, `clamps.safetensors` holds their tensors.

    The header is written last and put in place in one step, so that a folder with a header is whole.

    Args:
        path: the folder; made when it does not exist.
        clamps: in the order in which they are to be applied. A condition that is a Python function (`When`) cannot
            be saved.
        model: what they were made for; its name, width and layers are kept, and `load_clamps` compares them.
        about: whatever else is worth keeping, ready for JSON: how they were fitted, the strength that is advised.
        overwrite: replace clamps that lie there.

    Raises:
        ClampError: the folder holds something already, or a clamp has a field that is no number, text or tensor.

    >>> import actome as ac, tempfile, torch
    >>> folder = save_clamps(f"{tempfile.mkdtemp()}/calm", ac.Add("blocks.1.resid.post", torch.ones(112), scale=2.0))
    >>> sorted(file.name for file in folder.iterdir()), load_clamps(folder)[0].scale
    (['clamps.json', 'clamps.safetensors'], 2.0)
    """
    folder = Path(path).expanduser()
    some = [clamps] if isinstance(clamps, Clamp) else list(clamps)
    if not some:
        raise ClampError("there is no clamp to save")
    if folder.exists() and not folder.is_dir():
        raise ClampError(f"{folder} is a file; clamps are saved into a folder")
    if (folder / _HEADER).exists() and not overwrite:
        raise ClampError(
            f"{folder} holds clamps already; overwrite=True replaces them (--overwrite on the command line)"
        )
    tensors: dict[str, Tensor] = {}
    rows = [_row(clamp, f"{i}", tensors) for i, clamp in enumerate(some)]
    header = {"format": FORMAT, "version": VERSION, "model": None if model is None else _facts(model)}
    header |= {"about": dict(about or {}), "clamps": rows}
    try:
        text = json.dumps(header, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ClampError(f"about= must be ready for JSON: {error}") from None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _HEADER).unlink(missing_ok=True)
        save_file(tensors, folder / _TENSORS)
        (folder / f"{_HEADER}.part").write_text(text, encoding="utf-8")
        (folder / f"{_HEADER}.part").replace(folder / _HEADER)
    except (OSError, SafetensorError) as error:
        raise ClampError(f"{folder} cannot be written: {error}") from error
    return folder


def load_clamps(path: str | os.PathLike[str], model: Model | None = None) -> list[Clamp]:
    """The clamps that `save_clamps` wrote, in order.

    Args:
        path: the folder.
        model: what they are for; sites and widths are then looked at now rather than in the first forward.

    Raises:
        ClampError: no clamps there, a damaged file, clamps of a later version, of a class that is not a clamp, or
            made for a model of another width.
    """
    folder = Path(path).expanduser()
    header = read_header(folder)
    tensors = _tensors(folder)
    clamps = [_clamp(folder, row, tensors) for row in header["clamps"]]
    if model is not None:
        made_for = header.get("model") or {}
        width = made_for.get("d_model")
        if width is not None and len(model.table) and width != model.d_model:
            raise ClampError(
                f"{folder} was made for {made_for.get('name')}, whose residual stream is {width} wide; "
                f"{model.name} has {model.d_model}"
            )
        for clamp in clamps:
            model.match(clamp.site)
    return clamps


def read_header(folder: Path) -> dict[str, Any]:
    """What `clamps.json` says: format, version, model, about and clamps."""
    path = folder / _HEADER
    if not path.is_file():
        where = nearest_beside(folder) if not folder.is_dir() else f"; it has no {_HEADER}"
        raise ClampError(f"there are no clamps in {folder}{where}")
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ClampError(f"{path} is damaged: {error}") from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ClampError(f"{path} does not describe clamps of actome")
    if header.get("version") != VERSION:
        raise ClampError(f"{path} has version {header.get('version')}, and this actome reads {VERSION}; update actome")
    if not isinstance(header.get("clamps"), list) or not header["clamps"]:
        raise ClampError(f"{path} is damaged: it lists no clamps")
    return header


def _facts(model: Model) -> dict[str, Any]:
    info = model.info
    return {key: info[key] for key in ("name", "family", "class", "layers", "d_model", "vocab") if key in info}


def _row(clamp: Clamp, key: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    if not isinstance(clamp, Clamp):
        raise ClampError(f"only clamps can be saved, not {type(clamp).__name__}")
    if not type(clamp).__module__.startswith("actome."):
        raise ClampError(
            f"{type(clamp).__name__} is a clamp of your own; who loads it would have to run your code. Save its "
            "tensors and build it again"
        )
    return _fields(clamp, key, tensors)


def _fields(one: Any, key: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    values = {}
    for field in fields(one):
        value = getattr(one, field.name)
        if field.default is not MISSING and value is field.default:
            continue
        values[field.name] = _written(value, f"{key}.{field.name}", tensors, f"{type(one).__name__}.{field.name}")
    return {"kind": f"{type(one).__module__}.{type(one).__qualname__}", "values": values}


def _written(value: Any, key: str, tensors: dict[str, Tensor], what: str) -> Any:
    if value is None or isinstance(value, _PLAIN):
        return value
    if isinstance(value, Tensor):
        tensors[key] = value.detach().cpu().contiguous().clone()
        return {"tensor": key}
    if isinstance(value, slice):
        return {"slice": [value.start, value.stop, value.step]}
    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    if isinstance(value, (list, tuple)):
        return {"list": [_written(one, f"{key}.{i}", tensors, what) for i, one in enumerate(value)]}
    if is_dataclass(value) and type(value).__module__.startswith("actome."):
        return {"object": _fields(value, key, tensors)}
    if isinstance(value, dict):
        if not all(isinstance(name, str) for name in value):
            raise ClampError(f"{what}: only mappings with text as keys can be saved")
        return {"mapping": {name: _written(one, f"{key}.{name}", tensors, what) for name, one in value.items()}}
    raise ClampError(
        f"{what} is a {type(value).__name__}, which cannot be saved; numbers, text, tensors, slices and lists can"
    )


def _read(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "tensor":
        return tensors[inner]
    if kind == "slice":
        return slice(*inner)
    if kind == "range":
        return range(*inner)
    if kind == "list":
        return [_read(one, tensors) for one in inner]
    if kind == "mapping":
        return {name: _read(one, tensors) for name, one in inner.items()}
    if kind == "object":
        return _made(inner, tensors)
    raise KeyError(kind)


def _tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / _TENSORS
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except FileNotFoundError:
        raise ClampError(f"{folder} is damaged: {_TENSORS} is missing") from None
    except (SafetensorError, OSError) as error:
        raise ClampError(f"{path} is damaged: {error}") from None


def _clamp(folder: Path, row: Any, tensors: Mapping[str, Tensor]) -> Clamp:
    try:
        clamp = _made(row, tensors)
        if not isinstance(clamp, Clamp):
            raise ClampError(f"{row.get('kind')!r} is not a clamp")
    except ClampError as error:
        raise ClampError(f"{folder}: {error}") from None
    for field in fields(clamp):
        value = getattr(clamp, field.name)
        if isinstance(value, Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ClampError(f"{folder} is damaged: {field.name} holds values that are not finite")
    return clamp


def _made(row: Any, tensors: Mapping[str, Tensor]) -> Any:
    """A clamp or a condition from what was written of it."""
    kind = row.get("kind", "") if isinstance(row, dict) else ""
    module, _, name = str(kind).rpartition(".")
    # Only classes of this package are looked up: a file that was found somewhere must not choose what is imported.
    if not module.startswith(("actome.clamps", "actome.core.", "actome.steer")):
        raise ClampError(f"{kind!r} is not a clamp of actome")
    try:
        made = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        raise ClampError(f"this actome has no clamp {kind!r}; it may be from a later version") from None
    if not (isinstance(made, type) and issubclass(made, (Clamp, When))):
        raise ClampError(f"{kind!r} is not a clamp")
    try:
        return made(**{field: _read(value, tensors) for field, value in row["values"].items()})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ClampError(f"the file is damaged: {kind} cannot be made from what it says ({error})") from None
