"""Shards: the tensors of a run, each group a safetensors file that is there whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from actome.core.errors import RunError

from .schema import TENSORS

if TYPE_CHECKING:  # torch takes seconds to import, and most readers want numbers alone
    from torch import Tensor


def shard_name(number: int) -> str:
    """Where a shard lies in the folder of its run, with slashes on every system.

    >>> shard_name(12)
    'tensors/00000012.safetensors'
    """
    return f"{TENSORS}/{number:08d}.safetensors"


def write_shard(folder: Path, number: int, step: int, tensors: Mapping[str, Tensor]) -> str:
    """Puts tensors into a shard, flushed to the disk; its name in the folder."""
    from safetensors.torch import save_file

    from actome.core.folder import commit

    name = shard_name(number)
    whole = {key: _own(tensor) for key, tensor in tensors.items()}
    # The step is in the file too, so that a shard says what it is even when the database is lost.
    commit(folder / name, lambda path: save_file(whole, path, metadata={"format": "pt", "step": str(step)}))
    return name


def read_tensor(folder: Path, shard: str, key: str, step: int) -> Tensor:
    """One tensor of a shard; `RunError` when the shard is missing or damaged."""
    from safetensors import SafetensorError, safe_open

    path = folder / shard
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(key)
    except FileNotFoundError as error:
        raise RunError(f"the tensor {key!r} of step {step} is missing: there is no {path}") from error
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise RunError(f"the tensor {key!r} of step {step} is damaged: {path}: {error}") from error


def clean(folder: Path, known: set[str]) -> None:
    """Deletes the shards that no row names: a writer was killed between the two."""
    for path in (folder / TENSORS).iterdir() if (folder / TENSORS).is_dir() else ():
        if path.name.startswith(".") or f"{TENSORS}/{path.name}" not in known:
            path.unlink()


def _own(tensor: Tensor) -> Tensor:
    """On the CPU, in one piece, and sharing no memory with another."""
    mine = tensor.detach().to("cpu").contiguous()
    # A view into a larger tensor would be refused, or bring all of it along.
    return mine.clone() if mine.untyped_storage().nbytes() != mine.numel() * mine.element_size() else mine


def dtype_name(tensor: Tensor) -> str:
    """As in ``bfloat16``."""
    return str(tensor.dtype).removeprefix("torch.")


def as_tensor(name: str, value: object) -> Tensor:
    """A tensor of what was given, or `RunError`."""
    import torch
    from torch import Tensor

    try:
        return value if isinstance(value, Tensor) else torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise RunError(f"{name!r} is no tensor but {type(value).__name__}: {error}") from error
