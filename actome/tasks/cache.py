"""A folder of trained subjects, so that what takes minutes to train is trained once on a machine.

One safetensors file holds one training: final weights, checkpoints and losses, with the recipe as JSON in its header.
Its name carries a hash of everything that could change the result. A file that is not whole, or not of this recipe,
is trained anew and replaced.

Where: the folder in the environment variable ``ACTOME_CACHE``, else ``actome`` in the user's cache folder. With
``ACTOME_CACHE=off`` nothing is read or written.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from actome.core.errors import ActomeError
from actome.core.load import check_safetensors

from .training import Training

# Raised whenever subjects or the training loop change so that old files no longer say what training would give.
VERSION = 1


class CacheError(ActomeError, RuntimeError):
    """A cache that cannot be written, or a recipe that it cannot name."""


def cached(
    name: str,
    build: Callable[[], Training],
    key: Mapping[str, Any],
    folder: str | Path | None = None,
    skeleton: Callable[[], nn.Module] | None = None,
) -> Training:
    """The training that `build` gives, from the cache where it is there, else built and kept.

    Args:
        name: what to call it: letters, digits, ``-``, ``_`` and ``.``.
        build: trains and returns the `Training`; called only when nothing whole is kept.
        key: everything that the result depends on: configuration, steps, seeds, data. Plain data, dataclasses,
            `SubjectConfig`. The versions of torch and of actome's training are added.
        folder: in the place of the user's cache.
        skeleton: makes an untrained module to fill with the kept weights. A `Subject` needs none.

    Returns:
        A `Training`, equal whether kept or fresh, but for its module being another object.

    Raises:
        CacheError: the folder cannot be written (before anything is trained), the key is no plain data, or the module
            is no subject and there is no skeleton.

    >>> import tempfile
    >>> from actome.tasks import Subject, SubjectConfig, cached, train
    >>> config, tokens = SubjectConfig(vocab=8, d_model=8, heads=2), torch.zeros(32, 9, dtype=torch.long)
    >>> def build():
    ...     print("training")
    ...     return train(Subject.fresh(config, seed=0), tokens, steps=2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     first = cached("example", build, {"config": config, "steps": 2}, folder)
    ...     again = cached("example", build, {"config": config, "steps": 2}, folder)
    training
    >>> torch.equal(first.losses, again.losses)
    True
    """
    if not re.fullmatch(r"[\w.-]+", name):
        raise CacheError(f"{name!r} cannot name a file; use letters, digits, '-', '_' and '.'")
    place = Path(folder) if folder is not None else folder_of_cache()
    if place is None:
        return build()
    recipe = _recipe(name, key)
    digest = hashlib.sha256(recipe.encode()).hexdigest()[:20]
    file = place / f"{name}-{digest}.safetensors"
    kept = _read(file, recipe, skeleton)
    if kept is not None:
        return kept
    _writable(place)
    training = build()
    if not isinstance(training, Training):
        raise CacheError(f"build() gave {type(training).__name__}; it must return what train() returns, a Training")
    _write(file, recipe, training, skeleton)
    return training


def folder_of_cache() -> Path | None:
    """Where trained subjects are kept; ``None`` when the cache is off."""
    said = os.environ.get("ACTOME_CACHE", "").strip()
    if said.lower() in ("off", "0", "no", "false"):
        return None
    if said:
        return Path(said).expanduser()
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "actome" / "subjects"


def clear(name: str | None = None, folder: str | Path | None = None) -> int:
    """Deletes what the cache holds, or what it holds under one name; returns how many trainings there were.

    Only files that the cache wrote are touched.
    """
    place = Path(folder) if folder is not None else folder_of_cache()
    if place is None or not place.is_dir():
        return 0
    of_name = re.escape(name) if name is not None else r"[\w.-]+"
    count = 0
    for file in place.iterdir():
        if re.fullmatch(rf"{of_name}-[0-9a-f]{{20}}\.safetensors", file.name):
            count += 1
            file.unlink(missing_ok=True)
        elif re.fullmatch(rf"\.{of_name}-[0-9a-f]{{20}}\..+\.part", file.name):  # of a process that was killed
            file.unlink(missing_ok=True)
    return count


def _recipe(name: str, key: Mapping[str, Any]) -> str:
    def plain(value: Any) -> Any:
        if hasattr(value, "shape") and isinstance(value.shape, dict):  # a SubjectConfig
            return {"subject": value.shape}
        if is_dataclass(value) and not isinstance(value, type):
            return {type(value).__name__: asdict(value)}
        raise CacheError(
            f"the key holds a {type(value).__name__}; describe it by plain data (numbers, strings, lists, dicts), "
            "dataclasses or configurations"
        )

    whole = {"name": name, "key": dict(key), "torch": torch.__version__, "machine": platform.machine(), "v": VERSION}
    return json.dumps(whole, sort_keys=True, default=plain)


def _writable(place: Path) -> None:
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise CacheError(
            f"cannot write to the cache folder {place} ({error.strerror}); set ACTOME_CACHE to a folder that can be "
            "written, or to 'off'"
        ) from error


def _write(file: Path, recipe: str, training: Training, skeleton: Callable[[], nn.Module] | None) -> None:
    from safetensors.torch import save_file

    # A copy of each: tied weights are one tensor under two names, which safetensors does not take.
    def copies(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
        return {f"{prefix}/{name}": value.detach().cpu().contiguous().clone() for name, value in state.items()}

    tensors = copies(training.module.state_dict(), "final") | {"losses": training.losses.clone()}
    for step, state in training.checkpoints.items():
        tensors |= copies(state, f"step-{step}")
    about = {"recipe": recipe, "digest": _digest(tensors), "seconds": repr(training.seconds)}
    shape = getattr(getattr(training.module, "config", None), "shape", None)
    if isinstance(shape, dict):
        about["subject"] = json.dumps(shape)
    elif skeleton is None:
        raise CacheError(f"a {type(training.module).__name__} cannot be made again without skeleton=, which makes one")
    number, part = tempfile.mkstemp(prefix=f".{file.stem}.", suffix=".part", dir=file.parent)
    os.close(number)
    try:
        save_file(tensors, part, metadata=about)
        os.replace(part, file)  # whole or not at all
    finally:
        Path(part).unlink(missing_ok=True)


def _read(file: Path, recipe: str, skeleton: Callable[[], nn.Module] | None) -> Training | None:
    """The training in a file, or ``None`` when it is not there, not whole or not of this recipe."""
    from safetensors import SafetensorError, safe_open

    try:
        check_safetensors(file)
        with safe_open(file, framework="pt") as opened:
            about = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
    except (OSError, ActomeError, SafetensorError, KeyError, ValueError):
        return None
    if about.get("recipe") != recipe or about.get("digest") != _digest(tensors):
        return None
    if skeleton is not None:
        module = skeleton()
    else:
        from .subject import Subject, SubjectConfig

        module = Subject.fresh(SubjectConfig(**json.loads(about["subject"])))
    losses = tensors.pop("losses")
    states: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        group, _, rest = name.partition("/")
        states.setdefault(group, {})[rest] = value
    final = states.pop("final")
    module.to(next(iter(final.values())).dtype) if skeleton is None else None
    module.load_state_dict(final)
    steps = {int(group.removeprefix("step-")): state for group, state in states.items()}
    return Training(module.eval(), losses, dict(sorted(steps.items())), float(about["seconds"]))


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """Of names, shapes and bytes: a file may be whole and still have lost a bit."""
    found = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        value = tensors[name]
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()
